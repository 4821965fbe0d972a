"""Survey and decide: from a recipe and tensors to the numbers that each tensor's merge needs.

Model-wide decisions (thresholds over the whole model, mean weights) are made once, before the merge. All
others are made tensor by tensor, right before a tensor's first tile, so that nothing grows with the model.
Work is cut into fixed chunks: sums do not depend on tiles, threads or memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import NoReturn, TypeVar

import numpy as np

from ..backends import native
from ..errors import InputError
from ..planning.roles import EMBEDDING, role_of
from ..recipe import methods
from ..recipe.schema import Recipe
from ..select import thresholds as decide
from ..select.bracket import Bracket, bracket_of, bracket_share, cluster_count
from ..select.sample import are_cached, sample
from ..tensors import array as resident
from ..tensors.array import BINS, Array
from ..tensors.buffer import Buffer
from ..tensors.curvature import Curvature, Full, Log8, Uniform
from ..tensors.result import NonFinite
from ..tensors.segment import units
from ..tensors.terms import (
    ExpertTerms,
    Terms,
    saliency_of_score,
    scale_weights,
    score_of_saliency,
    score_scale,
)
from ..tensors.tile import TensorInputs
from .factors import CHUNK, Map, low_rank, rank1
from .norms import edit_norm

Result = TypeVar("Result")
# Told what will be read soon.
Wants = Callable[[Iterable[Buffer]], None]

_MAPPED = 4 * CHUNK  # elements up to which a sampled tensor's pages stay mapped until it is merged
_DIRECT = 1 << 15  # elements of a tensor that is selected from directly: a sample would be most of it
_FACTOR_CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class ModelDecisions:
    """What is decided once for the whole model, per expert: the score threshold (None where it is decided
    elsewhere), or the bracket in which it is expected; the mean weight that `normalise: model` divides by.
    spread: how large tensors are sampled. A tensor may be sampled again, by a process that resumes: it must
    find the same bracket, whatever the page cache holds then."""

    thresholds: tuple[float | None, ...]
    brackets: tuple[Bracket | None, ...]
    mean_weights: tuple[float | None, ...]
    spread: bool


class Survey:
    """Decides for one recipe over a list of tensors."""

    def __init__(
        self,
        recipe: Recipe,
        tensors: Sequence[TensorInputs],
        backend: ModuleType,
        release: Callable[[TensorInputs], None] = lambda tile: None,
        wants: Wants = lambda buffers: None,
    ) -> None:
        self.recipe = recipe
        self.tensors = tensors
        self.backend = backend
        self._release = release  # called with each surveyed tile of a large read: its pages may go
        self._wants = wants
        method = methods.get(recipe.merge_method)
        self.formula = method.kernel(recipe)
        self._fixed_weights = method.weights(recipe) if method.weights else None
        self.models = [m.parameters for m in recipe.models]
        self.selections = [decide.selection_of(m) for m in self.models]
        self.model_scope = recipe.parameters.density_scope == "model"
        # Curvature 1 is not comparable with second moments: where only some tensors have it, they take no
        # part in absolute and model-wide thresholds and keep all their edits.
        self.all_uniform = all(isinstance(c, Uniform) for t in tensors for c in t.curvatures)
        self._factors: dict[tuple[str, int], object] = {}
        self._factor_bytes = 0

    @property
    def brackets(self) -> bool:
        """Whether thresholds are bracketed before the merge and decided after it. Norms and trimming need
        masks before; low-rank factors of all tensors would not fit."""
        trims = self.formula.elect_signs and self.recipe.parameters.ties_density < 1
        late = self.recipe.parameters.rescale or trims or any(m.rank for m in self.models)
        return not late and any(s.surveyed for s in self.selections)

    @property
    def elements(self) -> int:
        """Elements that model-wide thresholds are over."""
        return sum(t.numel for t in self.tensors if self.takes_part(t))

    def expected_candidates(self) -> int:
        """Estimate of the undecided elements that are held at a time."""
        if not self.brackets:
            return 0
        open_ones = [s for s in self.selections if s.surveyed]
        sizes = [self.elements] if self.model_scope else {t.numel for t in self.tensors}
        return max((int(n * sum(bracket_share(s, n) for s in open_ones)) for n in sizes if n), default=0)

    @property
    def passes(self) -> int:
        """Model-wide reads of the inputs before the merge."""
        histograms = self._surveyed_experts() and not self.brackets
        return (2 if histograms else 0) + (1 if self._wants_model_mean() else 0)

    @property
    def tensor_passes(self) -> int:
        """Further reads of each tensor right before its merge, at most."""
        p = self.recipe.parameters
        histograms = not self.model_scope and any(s.surveyed for s in self.selections) and not self.brackets
        passes = 2 if histograms else 0
        passes += 1 if self.formula.curvature_weights and p.normalise == "global" else 0
        passes += 2 if p.rescale else 0
        passes += 2 if self.formula.elect_signs and p.ties_density < 1 else 0
        factored = (t for t in range(len(self.models)) if any(self._is_factored(x, t) for x in self.tensors))
        return passes + max((2 if self.models[t].rank else 1 for t in factored), default=0)

    def _surveyed_experts(self) -> list[int]:
        return [t for t, s in enumerate(self.selections) if s.surveyed] if self.model_scope else []

    def _wants_model_mean(self) -> bool:
        return self.formula.curvature_weights and self.recipe.parameters.normalise == "model"

    def takes_part(self, tensor: TensorInputs) -> bool:
        """Whether model-wide and absolute thresholds apply to a tensor."""
        return self.all_uniform or not any(isinstance(c, Uniform) for c in tensor.curvatures)

    def decide_model(self, run: Map) -> ModelDecisions:
        """Brackets from a sample of all tensors, or thresholds from passes over them, or nothing at all."""
        thresholds: list[float | None] = [None] * len(self.models)
        brackets: list[Bracket | None] = [None] * len(self.models)
        elements = self.elements
        spread = self.brackets and are_cached([b for t in self.tensors for b in t.buffers])
        for t in self._surveyed_experts():
            if not decide.keeps_some(self.selections[t], elements):
                thresholds[t] = decide.KEEP_NOTHING
        experts = [t for t in self._surveyed_experts() if thresholds[t] is None]
        if self.brackets and experts:
            taking_part = [self.prepare(t, run) for t in self.tensors if self.takes_part(t)]
            brackets = self._sampled_brackets(taking_part, spread, run)
            experts = [t for t in experts if brackets[t] is None]
        if experts:
            self._histogram_thresholds(experts, thresholds, run)
        return ModelDecisions(tuple(thresholds), tuple(brackets), tuple(self._model_means(run)), spread)

    def _sampled_brackets(
        self, tensors: Sequence[TensorInputs], spread: bool, run: Map
    ) -> list[Bracket | None]:
        """Per expert, None where it needs none or none is worth it."""
        elements = sum(t.numel for t in tensors)
        experts = [t for t, s in enumerate(self.selections) if s.surveyed and decide.keeps_some(s, elements)]

        def of_tensor(tensor: TensorInputs) -> list[tuple[int, ExpertTerms]]:
            return [(t, ExpertTerms(score_scale=score_scale_of(tensor, t))) for t in experts]

        found: list[Bracket | None] = [None] * len(self.models)
        if experts:
            # What is sampled from a small tensor is merged next, while its pages are still mapped.
            release = self._release if elements > _MAPPED else None
            count, spread = cluster_count(elements), spread or release is None
            sampled = sample(tensors, count, of_tensor, self.backend, run, release, spread)
            of_expert = [(self.selections[t], s) for t, s in zip(experts, sampled, strict=True)]
            for t, bracket in zip(experts, run(lambda pair: bracket_of(*pair), of_expert), strict=True):
                found[t] = bracket
        return found

    def _histogram_thresholds(self, experts: list[int], thresholds: list[float | None], run: Map) -> None:
        """Sets the exact model-wide thresholds of experts, in one or two passes."""
        digits: dict[int, decide.Digit] = {}
        histograms = self._model_histograms(experts, dict.fromkeys(experts, -1), run)
        for t in experts:
            answer = decide.first_digit(self.selections[t], *histograms[t])
            if isinstance(answer, decide.Digit):
                digits[t] = answer
            else:
                thresholds[t] = answer
        if not digits:
            return
        prefixes = {t: digit.prefix for t, digit in digits.items()}
        histograms = self._model_histograms(list(digits), prefixes, run)
        for t, digit in digits.items():
            thresholds[t] = decide.second_digit(self.selections[t], digit, histograms[t][0])

    def exact_thresholds(
        self, tensor: TensorInputs | None, terms: Terms, experts: list[int], run: Map
    ) -> list[float | None]:
        """The thresholds of experts whose bracket missed (None for the others), by passes over one tensor, or
        over all of them (None). terms: the tensor's."""
        found: list[float | None] = [None] * len(self.models)
        if tensor is None:
            self._histogram_thresholds(experts, found, run)
        else:
            for t in experts:
                found[t] = self._select(tensor, t, terms.experts[t], self.selections[t], False, run)
        return found

    def _units(
        self,
        wanted: Callable[[TensorInputs], bool],
        reads: Callable[[TensorInputs], Iterable[Buffer]],
        run: Map,
    ) -> Iterator[list[tuple]]:
        """Units of prepared tiles: (tile, flat index of its first element). reads: what of a tile is read."""
        prepared: dict[int, TensorInputs] = {}

        def ranges() -> Iterator[tuple[int, int, int]]:
            for index, tensor in enumerate(self.tensors):
                if wanted(tensor):
                    prepared[index] = self.prepare(tensor, run)
                    yield index, 0, tensor.numel

        for unit in units(ranges(), max(map(_chunk, self.tensors), default=CHUNK)):
            tiles = [(prepared[i].slice(start, stop), start) for i, start, stop in unit]
            for tile, _ in tiles:
                self._wants(reads(tile))
            yield tiles

    def _model_histograms(
        self, experts: list[int], prefixes: dict[int, int], run: Map
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        def of_unit(unit: list[tuple]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
            found = {t: self._histogram(unit, t, ExpertTerms(), False, prefixes[t]) for t in experts}
            for tile, _ in unit:
                self._release(tile)
            return found

        def inputs_of_scores(tile: TensorInputs) -> Iterator[Buffer]:
            if tile.base is not None:
                yield tile.base
            for t in experts:
                yield from (tile.experts[t], *tile.curvatures[t].buffers)

        totals = {t: (np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)) for t in experts}
        for result in run(of_unit, self._units(self.takes_part, inputs_of_scores, run)):
            for t, (counts, lows) in result.items():
                totals[t][0][:] += counts
                totals[t][1][:] += lows
        return totals

    def _histogram(
        self, unit: list[tuple], t: int, terms: ExpertTerms, of_edits: bool, prefix: int
    ) -> tuple[np.ndarray, np.ndarray]:
        counts, lows = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
        for tile, start in unit:
            scored = replace(terms, score_scale=score_scale_of(tile, t))
            bad = self.backend.histogram(tile, t, scored, of_edits, prefix, counts, lows)
            self.check(tile, start, bad)
        return counts, lows

    def _model_means(self, run: Map) -> list[float | None]:
        if not self._wants_model_mean():
            return [None] * len(self.models)

        def of_unit(unit: list[tuple]) -> list[list[float]]:
            sums = [
                [self._power_sum(tile, start, t) for tile, start in unit] for t in range(len(self.models))
            ]
            for tile, _ in unit:
                self._release(tile)
            return sums

        def curvature(tile: TensorInputs) -> Iterator[Buffer]:
            return (buffer for c in tile.curvatures for buffer in c.buffers)

        totals, elements = [0.0] * len(self.models), sum(t.numel for t in self.tensors)
        for result in run(of_unit, self._units(lambda _: True, curvature, run)):
            for t, sums in enumerate(result):
                for x in sums:
                    totals[t] += x
        return [total / max(elements, 1) for total in totals]

    def _power_sum(self, tile: TensorInputs, start: int, t: int) -> float:
        """Sum of the weights g h^p, bias correction divided out."""
        total, bad = self.backend.power_sum(tile, t, self.formula.power)
        self.check(tile, start, bad)
        return total * self._gain(tile, t)

    def _gain(self, tile: TensorInputs, t: int) -> float:
        return self.models[t].scaling_factor * tile.curvatures[t].bias_correction ** -self.formula.power

    def prepare(self, tensor: TensorInputs, run: Map) -> TensorInputs:
        """The tensor with low-rank curvature where the recipe asks for it."""
        changed = tuple(self._factor(tensor, t, c, run) for t, c in enumerate(tensor.curvatures))
        return replace(tensor, curvatures=changed)

    def _is_factored(self, tensor: TensorInputs, t: int) -> bool:
        """Whether the recipe asks for a low-rank form of expert t's curvature, which is none yet (matrices
        only; rank r not for embeddings)."""
        curvature, parameters = tensor.curvatures[t], self.models[t]
        if len(tensor.shape) != 2 or tensor.numel == 0 or not isinstance(curvature, Full | Log8):
            return False
        by_rank = parameters.rank is not None and role_of(tensor.name, tensor.shape) != EMBEDDING
        return parameters.rank1_approx or by_rank

    def _factor(self, tensor: TensorInputs, t: int, curvature: Curvature, run: Map) -> Curvature:
        if not self._is_factored(tensor, t):
            return curvature
        rank, by_sums = self.models[t].rank, self.models[t].rank1_approx
        key = (tensor.name, t)
        if key in self._factors:
            return self._factors[key]
        self._check_curvature(tensor, t, run)
        if by_sums:
            sums = self.backend.row_column_sums if tensor.is_resident else native.row_column_sums
            factors = rank1(curvature, tensor.shape, run, sums)
        else:
            factors = low_rank(curvature, tensor.shape, rank, run)
        size = sum(array.nbytes for array in factors.factors)
        if self._factor_bytes + size <= _FACTOR_CACHE_BYTES:
            self._factors[key] = factors
            self._factor_bytes += size
        return factors

    def _check_curvature(self, tensor: TensorInputs, t: int, run: Map) -> None:
        def of_chunk(tile: TensorInputs, start: int) -> None:
            self.check(tile, start, self.backend.power_sum(tile, t, 1.0)[1])

        for _ in self._chunks(of_chunk, tensor, run):
            pass

    def _chunks(
        self, fn: Callable[[TensorInputs, int], Result], tensor: TensorInputs, run: Map
    ) -> Iterable[Result]:
        """fn of each chunk of a tensor and the flat index of its first element, in order."""

        def of_chunk(start: int) -> Result:
            tile = tensor.slice(start, min(start + step, tensor.numel))
            found = fn(tile, start)
            self._release(tile)
            return found

        step = _chunk(tensor)
        return run(of_chunk, range(0, tensor.numel, step))

    def terms(self, tensor: TensorInputs, model: ModelDecisions, run: Map) -> Terms:
        """The kernel's numbers for one prepared tensor; open (see formula) where a threshold follows."""
        brackets = model.brackets
        if self.brackets and not self.model_scope and tensor.numel > _DIRECT:
            brackets = self._sampled_brackets([tensor], model.spread, run)
        experts = []
        for t, selection in enumerate(self.selections):
            e = ExpertTerms(score_scale=score_scale_of(tensor, t))
            bracket = brackets[t] if self.takes_part(tensor) or not self.model_scope else None
            if bracket is not None:
                census = selection.rule == "mass" or bracket.span == 0
                experts.append(replace(e, threshold=bracket.lowest, span=bracket.span, census=census))
            else:
                experts.append(replace(e, threshold=self._threshold(tensor, t, e, selection, model, run)))
        p = self.recipe.parameters
        if p.rescale:
            experts = [
                replace(e, edit_scale=self._edit_scale(tensor, t, e, run)) for t, e in enumerate(experts)
            ]
        if self.formula.elect_signs and p.ties_density < 1:
            experts = [replace(e, trim=self._trim(tensor, t, e, run)) for t, e in enumerate(experts)]
        weights, epsilon = self._weights(tensor, model, run), p.epsilon
        if self.formula.denominator is None:
            weights, epsilon = scale_weights(weights, epsilon)
        experts = [replace(e, weight_scale=w) for e, w in zip(experts, weights, strict=True)]
        return Terms(self.formula, epsilon, tuple(experts))

    def _threshold(
        self,
        tensor: TensorInputs,
        t: int,
        terms: ExpertTerms,
        selection: decide.Selection,
        model: ModelDecisions,
        run: Map,
    ) -> float:
        if selection.rule == "all" or not self.formula.masked:
            return decide.KEEP_ALL
        if selection.surveyed and not self.model_scope:
            return self._select(tensor, t, terms, selection, False, run)
        if not self.takes_part(tensor):
            return decide.KEEP_ALL
        return score_of_saliency(selection.value) if selection.rule == "threshold" else model.thresholds[t]

    def _select(
        self,
        tensor: TensorInputs,
        t: int,
        terms: ExpertTerms,
        selection: decide.Selection,
        of_edits: bool,
        run: Map,
    ) -> float:
        """The exact threshold over one tensor: directly where it is small, else by two histogram passes."""
        if tensor.numel == 0:
            return decide.KEEP_NOTHING
        # From a device, so many scores cross as histograms would.
        if tensor.numel <= (_DIRECT if tensor.is_resident else CHUNK):
            read = self.backend.edits if of_edits else self.backend.scores
            values, bad = read(tensor, t, terms)
            self.check(tensor, 0, bad)
            values = resident.host(values)
            return decide.threshold_of_scores(selection, np.abs(values) if of_edits else values)

        def histogram(prefix: int) -> tuple[np.ndarray, np.ndarray]:
            def of_chunk(tile: TensorInputs, start: int) -> tuple[np.ndarray, np.ndarray]:
                return self._histogram([(tile, start)], t, terms, of_edits, prefix)

            counts, lows = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
            for more_counts, more_lows in self._chunks(of_chunk, tensor, run):
                counts += more_counts
                lows += more_lows
            return counts, lows

        answer = decide.first_digit(selection, *histogram(-1))
        if not isinstance(answer, decide.Digit):
            return answer
        return decide.second_digit(selection, answer, histogram(answer.prefix)[0])

    def _trim(self, tensor: TensorInputs, t: int, terms: ExpertTerms, run: Map) -> float:
        """The least |d| among the ties_density share of the largest masked edits."""
        density = decide.Selection("density", self.recipe.parameters.ties_density)
        return self._select(tensor, t, terms, density, True, run)

    def _edits(self, tensor: TensorInputs, t: int, terms: ExpertTerms, run: Map) -> Array:
        def of_chunk(tile: TensorInputs, start: int) -> Array:
            values, bad = self.backend.edits(tile, t, terms)
            self.check(tile, start, bad)
            return values

        parts = list(self._chunks(of_chunk, tensor, run))
        return resident.joined(parts) if parts else np.zeros(0, np.float32)

    def _edit_scale(self, tensor: TensorInputs, t: int, terms: ExpertTerms, run: Map) -> float:
        """norm(d) / norm(m d); 0 where the masked norm is below the relative threshold."""
        p = self.recipe.parameters
        role = role_of(tensor.name, tensor.shape)

        def norm(e: ExpertTerms) -> float:
            return edit_norm(self._edits(tensor, t, e, run), tensor.shape, role, p.approximate_norm)

        whole = norm(replace(terms, threshold=decide.KEEP_ALL))
        masked = norm(terms)
        if masked == 0 or masked < p.rescale_relative_threshold * whole:
            return 0.0
        return whole / masked

    def _weights(self, tensor: TensorInputs, model: ModelDecisions, run: Map) -> list[float]:
        if self._fixed_weights is not None:
            return self._fixed_weights
        if not self.formula.curvature_weights:
            return [1.0] * len(self.models)
        gains = [self._gain(tensor, t) for t in range(len(self.models))]
        p = self.recipe.parameters
        if p.normalise == "none":
            return gains
        if p.normalise == "model":
            means = model.mean_weights
        else:
            means = [self._mean_weight(tensor, t, run) for t in range(len(self.models))]
        return [
            gain / (mean + p.epsilon) if mean + p.epsilon > 0 else 0.0
            for gain, mean in zip(gains, means, strict=True)
        ]

    def _mean_weight(self, tensor: TensorInputs, t: int, run: Map) -> float:
        def of_chunk(tile: TensorInputs, start: int) -> float:
            return self._power_sum(tile, start, t)

        return sum(self._chunks(of_chunk, tensor, run)) / max(tensor.numel, 1)

    def check(self, tile: TensorInputs, start: int, nonfinite: Iterable[NonFinite]) -> None:
        """Raise InputError for the first unusable input, unless `on_nonfinite: base` repairs it."""
        if not self.formula.repair_nonfinite:
            for bad in nonfinite:
                self._fail(tile, start, bad)

    def _fail(self, tile: TensorInputs, start: int, bad: NonFinite) -> NoReturn:
        tensor = next(t for t in self.tensors if t.name == tile.name)
        count, first = self._count(tensor, bad)
        if bad.role == "base":
            origin = tensor.base.origin
        elif bad.role == "weights":
            origin = tensor.experts[bad.expert].origin
        else:
            origin = tensor.curvatures[bad.expert].origin
        what = "negative or not finite" if bad.role == "curvature" else "not finite"
        kind = "curvature" if bad.role == "curvature" else "weight"
        hint = "; `on_nonfinite: base` would write the base value there" if tensor.base is not None else ""
        raise InputError(
            f"{origin}: {tensor.name}: {count} of {tensor.numel} {kind} values are {what}, "
            f"the first at flat index {first}{hint}"
        )

    def _count(self, tensor: TensorInputs, bad: NonFinite) -> tuple[int, int]:
        """How many such values the whole tensor has, and where the first is."""
        count, first = 0, -1
        step = _chunk(tensor)
        for start in range(0, tensor.numel, step):
            tile = tensor.slice(start, min(start + step, tensor.numel))
            for found in self.backend.edits(tile, max(bad.expert, 0), ExpertTerms())[1]:
                if found.role == bad.role:
                    first = start + found.first if first < 0 else first
                    count += found.count
        return count, first

    def ties(self, t: int, kept: Mapping[str, int]) -> int:
        """How many edits expert t keeps beyond the k of its density, because they tie with the k-th. kept: by
        tensor name."""
        selection = self.selections[t]
        if selection.rule != "density":
            return 0
        tensors = [x for x in self.tensors if x.name in kept and (not self.model_scope or self.takes_part(x))]
        groups = [tensors] if self.model_scope else [[x] for x in tensors]
        beyond = 0
        for group in groups:
            k = decide.count_of_density(selection.value, sum(x.numel for x in group))
            beyond += max(0, sum(kept[x.name] for x in group) - k)
        return beyond

    def saliency_threshold(self, terms: Terms, t: int) -> float | None:
        """Expert t's threshold as a saliency, where the recipe gives one as it stands there; None where
        everything or nothing is kept."""
        score = terms.experts[t].threshold
        if score == decide.KEEP_ALL or math.isnan(score):
            return None
        selection = self.selections[t]
        return selection.value if selection.rule == "threshold" else saliency_of_score(score)


def _chunk(tensor: TensorInputs) -> int:
    """Elements that are surveyed at a time. Of tensors on a device, sums are torch's own order anyway."""
    return resident.TILE if tensor.is_resident else CHUNK


def score_scale_of(tensor: TensorInputs, t: int) -> float:
    """score_scale of expert t's terms for a tensor or a tile of it."""
    return score_scale(tensor.base is not None, tensor.curvatures[t].bias_correction)
