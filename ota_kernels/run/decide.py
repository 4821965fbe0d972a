"""From statistics to the terms of each tensor: what must be known before it merges, read after read.

Model-wide facts (brackets or thresholds over the whole model, mean weights) are found once, before the
merge. All others are found tensor by tensor, right before a tensor's first tile, so that nothing grows with
the model.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from types import MappingProxyType

import numpy as np

from ..backends import Backend
from ..io.pages import check_reads
from ..planning.roles import matrix_of, role_of
from ..recipe.methods import Method
from ..recipe.needs import Needs
from ..recipe.settings import Settings
from ..select import thresholds as decide
from ..select.bracket import Bracket, bracket_share
from ..select.sample import sample
from ..tensors import array as resident
from ..tensors.buffer import Buffer
from ..tensors.curvature import Uniform
from ..tensors.found import KEEP_ALL, Found, Selection, Threshold, selection_of
from ..tensors.random import name_hash
from ..tensors.result import SUMS
from ..tensors.segment import CHUNK
from ..tensors.terms import (
    Terms,
    saliency_of_score,
    score_of_saliency,
    score_scale,
)
from ..tensors.tile import TensorInputs
from . import on_device
from .bundles import Bundle
from .checks import check
from .finders import FINDERS, located
from .found import ModelFound, open_threshold
from .low_rank import LowRankForms, is_factored
from .matrices import Matrices
from .pool import Pool
from .ranks import ALONE, Ranks
from .rules import RULES, Rules
from .statistics import (
    MaskedSums,
    MeanWeight,
    Reader,
    Signs,
    ValidCurvature,
    exact_thresholds,
)
from .surveys import Once, Surveys


class Decider:
    """Decides for one method over a list of tensors. settings: of each tensor, by its name.

    release: called with each tile of a large read, whose pages may go; wants: told what will be read soon;
    positions: the numbers in the recipe of a tensor's experts, by its name, where some do not take part;
    norms_before: of the edits of those that the first expert stands for, where it is a merge of others;
    bundles: those of the tensors that stand for several; seed: of random numbers; surveys: what was found
    before, and is kept; ranks: who decides of the model together.
    """

    norms_before: Sequence[float] = ()

    def __init__(
        self,
        method: Method,
        tensors: Sequence[TensorInputs],
        settings: Mapping[str, Settings],
        backend: Backend,
        pool: Pool,
        release: Callable[[TensorInputs], None] = lambda tile: None,
        wants: Callable[[Iterable[Buffer]], None] = lambda buffers: None,
        positions: Mapping[str, Sequence[int]] | None = None,
        bundles: Iterable[Bundle] = (),
        seed: int = 0,
        rules: Rules = RULES,
        surveys: Surveys | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.rules, self.surveys, self._ranks = rules, surveys or Once(), ranks
        self.method, self.tensors, self.backend, self.pool = method, tensors, backend, pool
        self._settings, self.release, self._wants = settings, release, wants
        self._positions, self._bundles, self._seed = positions or {}, bundles, seed
        self.needs = Needs.of(method, settings.values())
        self.model_scope = self.needs.model_scope
        # Curvature 1 is not comparable with second moments: where only some tensors have it, they take no
        # part in absolute and model-wide thresholds and keep all their edits.
        self._all_uniform = all(isinstance(c, Uniform) for t in tensors for c in t.curvatures)
        self._forms = LowRankForms(backend, pool)
        self._places = {tensor.name: i for i, tensor in enumerate(tensors)}

    # Made for each use: kept, it would be a circle of references, and inputs would stay open until Python's
    # collector looks for circles.
    @property
    def reader(self) -> Reader:
        """What takes statistics of these tensors."""
        return Reader(self.backend, self.pool, self.check, self.release, self._wants, self._ranks)

    @property
    def matrices(self) -> Matrices:
        """How matrices are merged whole, where some are."""
        return Matrices(self.method, self.settings, self.backend, self.check, self.release)

    def of_sample(self, tensors: Sequence[TensorInputs]) -> Decider:
        """One that takes these tensors, prepared, for the model."""
        other = copy.copy(self)
        other.__dict__.pop("experts", None)
        other.tensors, other.surveys, other._ranks = tensors, Once(), ALONE
        other.prepare = lambda tensor: tensor
        return other

    def of_length_one(self) -> Decider:
        """One whose merged edits have no factor of their own: `lambda` and `times` are 1."""
        other = copy.copy(self)
        each = {
            id(s): replace(s, shared=MappingProxyType({**s.shared, "lambda": 1.0, "times": 1.0}))
            for s in self._settings.values()
        }
        other._settings = {name: each[id(s)] for name, s in self._settings.items()}
        return other

    @functools.cached_property
    def experts(self) -> int:
        """Experts of the recipe that take part anywhere."""
        return 1 + max((max(self.positions(t)) for t in self.tensors), default=-1)

    def positions(self, tensor: TensorInputs) -> Sequence[int]:
        """The numbers in the recipe of a tensor's experts."""
        positions = self._positions.get(tensor.name, ())
        if len(positions) != len(tensor.experts):  # unknown, or a view makes the base an expert
            return range(len(tensor.experts))
        return positions

    def settings(self, tensor: TensorInputs) -> Settings:
        """What the recipe says of a tensor."""
        return self._settings[tensor.name]

    def selections(self, tensor: TensorInputs | None = None) -> list[Selection]:
        """Per expert; of the whole model (None), where it has one threshold."""
        settings = next(iter(self._settings.values())) if tensor is None else self.settings(tensor)
        found = [selection_of(e) for e in settings.experts]
        if self.needs.thresholds:
            return found
        return [Selection("all") if s.surveyed else s for s in found]  # such shares are the method's own

    @property
    def brackets(self) -> bool:
        """Whether thresholds are bracketed before the merge and decided after it."""
        return self.needs.brackets

    @property
    def elements(self) -> int:
        """Elements that model-wide thresholds are over."""
        return sum(t.numel for t in self.tensors if self.takes_part(t))

    def takes_part(self, tensor: TensorInputs) -> bool:
        """Whether model-wide and absolute thresholds apply to a tensor."""
        if self.keeps_base(tensor):
            return False
        return self._all_uniform or not any(isinstance(c, Uniform) for c in tensor.curvatures)

    def keeps_base(self, tensor: TensorInputs) -> bool:
        """Whether the method leaves a tensor of this role as the base has it."""
        return self.method.keeps_base(self.settings(tensor), role_of(tensor.name, tensor.shape))

    def expected_candidates(self) -> int:
        """Estimate of the undecided elements that are held at a time."""
        if not self.brackets:
            return 0
        if self.model_scope:
            groups = [(self.elements, self.selections())]
        else:
            groups = {(t.numel, tuple(self.selections(t))) for t in self.tensors}
        return max(
            (int(n * sum(bracket_share(s, n) for s in x if s.surveyed)) for n, x in groups if n), default=0
        )

    @property
    def passes(self) -> int:
        """Model-wide reads of the inputs before the merge."""
        histograms = 0 if self.brackets else 2 * self.needs.has("thresholds", "model")
        others = ("mean weight", "sums", "ranks", "signs")
        scaled = any(self.settings(t).scaled and self.matrices.by_formula(t) for t in self.tensors)
        return histograms + sum(self.needs.has(statistic, "model") for statistic in others) + 2 * scaled

    @property
    def tensor_passes(self) -> int:
        """Further reads of each tensor right before its merge, at most."""
        histograms = 0 if self.brackets else 2 * self.needs.has("thresholds", "tensor")
        forms = max((n.reads for n in self.needs.everything if n.statistic == "low rank"), default=0)
        pairs = ((t, i) for t in self.tensors for i in range(len(t.curvatures)))
        factored = forms > 0 and any(is_factored(t, self.settings(t), i) for t, i in pairs)
        matrices = 2 * self.needs.matrices  # what is kept, edits
        return histograms + sum(n.reads for n in self.needs.of_tensor) + (forms if factored else 0) + matrices

    # The whole model

    def decide_model(self) -> ModelFound:
        """Brackets from a sample of all tensors, or thresholds from reads of them, or nothing at all."""
        found = self.surveys.of(None, self._decide_model)
        if not self.needs.has("signs", "model"):
            return found

        def ready(tensor: TensorInputs) -> tuple[TensorInputs, Terms]:
            prepared, settings = self.prepare(tensor), self.settings(tensor)
            return prepared, self.method.terms(settings, self._found(prepared, settings, found, finds=False))

        return replace(found, signs=int(self.reader.over(Signs(), self.tensors, ready)[0]))

    def _decide_model(self) -> ModelFound:
        if not self.tensors:
            return ModelFound((), (), (), False)
        selections, elements = self.selections(), self.elements
        # Tensors may differ in their experts where nothing is found over the whole model.
        experts = range(max(len(t.experts) for t in self.tensors))
        thresholds: list[float | None] = [None for _ in experts]
        brackets: list[Bracket | None] = [None for _ in experts]
        buffers = [b for t in self.tensors for b in t.buffers]
        spread = self.brackets and self._ranks.tell(lambda: self.rules.cached(buffers))
        if self.model_scope:
            surveyed = {t: s for t, s in enumerate(selections) if s.surveyed}
            for t, selection in list(surveyed.items()):
                if not decide.keeps_some(selection, elements):
                    thresholds[t] = decide.KEEP_NOTHING
                    del surveyed[t]
            if self.brackets and surveyed:
                taking_part = [self.prepare(t) for t in self.tensors if self.takes_part(t)]
                brackets = self._sampled_brackets(taking_part, selections, spread, self._ranks)
                surveyed = {t: s for t, s in surveyed.items() if brackets[t] is None}
            for t, threshold in self._model_thresholds(surveyed).items():
                thresholds[t] = threshold
        means = self._model_means() if self.needs.has("mean weight", "model") else [None for _ in experts]
        sums = None
        if self.needs.has("sums", "model"):
            statistic = MaskedSums(len(selections), len(SUMS))
            sums = tuple(map(tuple, self.reader.over(statistic, self.tensors, self._ready).tolist()))
        at = None
        if self.needs.has("ranks", "model"):
            at = tuple(map(tuple, located(self, self.tensors, None, self._ready)))
        return ModelFound(tuple(thresholds), tuple(brackets), tuple(means), spread, sums, at=at)

    def _sampled_brackets(
        self,
        tensors: Sequence[TensorInputs],
        selections: Sequence[Selection],
        spread: bool,
        ranks: Ranks = ALONE,
    ) -> list[Bracket | None]:
        """Per expert, None where it needs none or none is worth it; found by `ranks` together."""
        elements = sum(t.numel for t in tensors)
        experts = [t for t, s in enumerate(selections) if s.surveyed and decide.keeps_some(s, elements)]
        found: list[Bracket | None] = [None] * len(selections)
        if experts:
            # What is sampled from a small tensor is merged next, while its pages are still mapped.
            release = self.release if elements > self.rules.mapped else None
            count, spread = self.rules.clusters(elements), spread or release is None
            scope, part = None if self.model_scope else tensors[0].name, (ranks.rank, ranks.size)
            score, run = self.score_terms, self.pool.run
            sampled = self.surveys.sampled(
                (scope, "bracket"),
                experts,
                lambda of: sample(tensors, count, of, score, self.backend, run, release, spread, part=part),
            )
            of_expert = [(selections[t], ranks.total(s)) for t, s in zip(experts, sampled, strict=True)]

            def brackets() -> list[dict | None]:
                found = self.pool.run(lambda pair: self.rules.bracket(*pair), of_expert)
                return [None if bracket is None else asdict(bracket) for bracket in found]

            for t, bracket in zip(experts, ranks.tell(brackets), strict=True):
                found[t] = None if bracket is None else Bracket(**bracket)
        return found

    def score_terms(self, tensor: TensorInputs) -> Terms:
        """Terms by which scores are computed: what they take from thresholds is not known yet."""
        return self.method.terms(self.settings(tensor), self._unknown(tensor))

    def _ready(self, tensor: TensorInputs) -> tuple[TensorInputs, Terms]:
        prepared = self.prepare(tensor)
        return prepared, self.score_terms(prepared)

    def _model_thresholds(self, selections: dict[int, Selection]) -> dict[int, float]:
        if not selections:
            return {}
        tensors = [t for t in self.tensors if self.takes_part(t)]
        return exact_thresholds(lambda h: self.reader.over(h, tensors, self._ready), selections)

    def _model_means(self) -> list[float]:
        settings = next(iter(self._settings.values()))
        statistic = MeanWeight(self.gains, settings.power, len(settings.experts))
        elements = sum(t.numel for t in self.tensors)
        totals = self.reader.over(statistic, self.tensors, self._ready)
        return [total / max(elements, 1) for total in totals.tolist()]

    def gains(self, tile: TensorInputs) -> list[float]:
        """g_t of each expert of a tile, bias correction divided out."""
        return self.settings(tile).gains([c.bias_correction for c in tile.curvatures])

    # One tensor

    def prepare(self, tensor: TensorInputs) -> TensorInputs:
        """The tensor as its kernels see it: low-rank curvature where the recipe asks for it, and what else
        the method makes of its inputs."""
        settings = self.settings(tensor)
        return self.method.view(self._forms.of(tensor, settings, self._check_curvature), settings)

    def terms(self, tensor: TensorInputs, model: ModelFound, finds: bool = False) -> Terms:
        """The kernel's numbers for one prepared tensor; open (see terms.is_open) where a threshold
        follows. finds: whether a device may find thresholds itself (run/on_device.py)."""
        settings = self.settings(tensor)
        finds = finds and (self.model_scope or on_device.finds(self, tensor))
        found = self.surveys.of(tensor.name, lambda: self._found(tensor, settings, model, finds))
        found.signs = model.signs
        terms, factor = self.method.terms(settings, found), settings.shared.get("layers") or 1.0
        if settings.scaled:
            factor *= model.scale.factor(settings)
        sample = on_device.sample_of(self, tensor) if finds and not self.model_scope else None
        return replace(terms, lambda_=terms.lambda_ * factor, sample=sample)

    def _found(self, tensor: TensorInputs, settings: Settings, model: ModelFound, finds: bool) -> Found:
        found = self._unknown(tensor)
        found.brackets = self._thresholds(tensor, model, finds)
        if self.needs.has("mean weight", "model"):
            found.means = list(model.mean_weights)
        if model.sums is not None:
            found.model_sums = np.array(model.sums)
        if model.at is not None:
            found.at = [[x.seen_from(tensor.name, self._places) for x in own] for own in model.at]
        for need in self.needs.of_tensor:
            FINDERS[need.statistic](self, tensor, settings, found)
        return found

    def _unknown(self, tensor: TensorInputs) -> Found:
        """What is known of a tensor before anything of it is read; experts whose selection is no threshold
        keep everything."""
        count = len(tensor.experts)
        corrections = [c.bias_correction for c in tensor.curvatures]
        masks = [s.surveyed or (s.rule == "threshold" and s.value > 0) for s in self.selections(tensor)]
        return Found(
            name=tensor.name,
            shape=tensor.shape,
            positions=list(self.positions(tensor)),
            seed=self._seed,
            name_hash=name_hash(tensor.name),
            is_matrix=matrix_of(tensor.name, tensor.shape) is not None,
            score_scales=[score_scale(tensor.base is not None, c) for c in corrections],
            bias_corrections=corrections,
            brackets=[Threshold(masks=m) for m in masks],
            edit_scales=[1.0] * count,
            trims=[0.0] * count,
        )

    def _thresholds(self, tensor: TensorInputs, model: ModelFound, finds: bool) -> list[Threshold]:
        selections, brackets = self.selections(tensor), model.brackets
        if self.keeps_base(tensor):
            return [Threshold(decide.KEEP_NOTHING)] * len(selections)
        if finds and not self.model_scope:
            found = [on_device.wanted(s, tensor) for s in selections]
            pairs = enumerate(zip(found, selections, strict=True))
            return [x or self._threshold(tensor, t, s, model) for t, (x, s) in pairs]
        if self.brackets and not self.model_scope and tensor.numel > self.rules.direct:
            brackets = self._sampled_brackets([tensor], selections, model.spread)
        found = []
        for t, selection in enumerate(selections):
            bracket = brackets[t] if self.takes_part(tensor) or not self.model_scope else None
            if bracket is None:
                found.append(self._threshold(tensor, t, selection, model))
            elif finds:
                found.append(on_device.bracketed(bracket, selection, self.elements))
            else:
                found.append(open_threshold(bracket, selection))
        return found

    def _threshold(self, tensor: TensorInputs, t: int, selection: Selection, model: ModelFound) -> Threshold:
        if selection.rule == "all":
            return KEEP_ALL
        if selection.surveyed and not self.model_scope:
            return Threshold(self.select(tensor, t, self.score_terms(tensor), selection))
        if not self.takes_part(tensor):
            return Threshold(decide.KEEP_ALL)
        if selection.rule == "threshold":
            return Threshold(score_of_saliency(selection.value), masks=selection.value > 0)
        return Threshold(model.thresholds[t])

    def select(
        self, tensor: TensorInputs, t: int, terms: Terms, selection: Selection, of_edits: bool = False
    ) -> float:
        """The exact threshold over one tensor: directly where it is small, else by two histogram reads."""
        if tensor.numel == 0:
            return decide.KEEP_NOTHING
        # From a device, so many scores cross as histograms would.
        if tensor.numel <= (self.rules.direct if tensor.is_resident else CHUNK):
            read = self.backend.edits if of_edits else self.backend.scores
            values, bad = read(tensor.made, t, terms)
            self.check(tensor, bad)
            values = resident.host(values)
            return decide.threshold_of_scores(selection, abs(values) if of_edits else values)
        take = self.reader.of_tensor
        return exact_thresholds(lambda h: take(h, tensor, terms), {t: selection}, of_edits)[t]

    def exact_thresholds(self, tensor: TensorInputs | None, experts: list[int]) -> list[float | None]:
        """The thresholds of experts whose bracket missed (None for the others), by reads of one prepared
        tensor, or of all of them (None)."""
        selections = self.selections(tensor)
        found: list[float | None] = [None] * len(selections)
        if tensor is None:
            for t, threshold in self._model_thresholds({t: selections[t] for t in experts}).items():
                found[t] = threshold
        else:
            terms = self.score_terms(tensor)
            for t in experts:
                found[t] = self.select(tensor, t, terms, selections[t])
        return found

    # Inputs that are not finite

    def check(self, tile: TensorInputs, nonfinite: Iterable) -> None:
        """Raise InputError for the first unusable input, unless `on_nonfinite: base` repairs it; and where a
        file could not be read."""
        check_reads()
        settings = self.settings(tile)
        if settings.shared.get("on_nonfinite", "error") != "base":
            check(self.tensors, self._bundles, self.backend, self.score_terms, tile, nonfinite)

    def _check_curvature(self, tensor: TensorInputs, t: int) -> None:
        self.reader.of_tensor(ValidCurvature(t), tensor, self.score_terms(tensor))

    # What a report says

    def saliency_threshold(self, tensor: TensorInputs, terms: Terms, t: int) -> float | None:
        """Expert t's threshold as a saliency, where the recipe gives one as it stands there, as a score where
        the method has scores of its own; None where everything or nothing is kept."""
        score = terms.experts[t].threshold
        if terms.words.score not in ("saliency", "curvature"):
            return None if terms.words.score == "none" or math.isnan(score) else score
        if score == decide.KEEP_ALL or math.isnan(score):
            return None
        selection = self.selections(tensor)[t]
        return selection.value if selection.rule == "threshold" else saliency_of_score(score)
