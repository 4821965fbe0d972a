"""How long the merged edit is: what `lambda: auto` and `match_norm` are.

    e: the merged edit at lambda 1;  k_t = m_t d_t, as merged (signed as its weight, scaled as `rescale` does)
    auto        min(sqrt(sum_t ||k_t||^2) / ||e||,  sum_t ||k_t||^2 / sum_t <e, k_t>)
    match_norm  mean_t ||d_t|| / ||lambda e||                     norms and products over the whole model

The first gives the merged edit the norm that the kept edits have together, as if none had been averaged away;
the second, smaller where experts are alike, finds every kept edit in full in the merged one, on average.

All sums are over a sample of every tensor that the names and shapes alone decide: the same elements whatever
tiles, threads, backend and page cache. The sample is merged by the method itself, into float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..recipe.parameters import AUTO
from ..recipe.settings import Settings
from ..select.thresholds import KEEP_NOTHING, SMALLEST
from ..tensors import array as resident
from ..tensors.dtypes import BY_NAME
from ..tensors.found import Selection
from ..tensors.random import name_hash
from ..tensors.segment import CHUNK
from ..tensors.terms import Terms, close, is_open
from ..tensors.tile import TensorInputs, concatenated

if TYPE_CHECKING:
    from .decide import Decider
    from .found import ModelFound
    from .matrices import Matrix

# Elements: a hundredth of the model, but so many at least and at most (a factor within 3 % needs no more);
# the least where nobody asks, and a report only says what `auto` would be.
_LEAST, _MOST = 1 << 17, 1 << 20
# Elements of models of which it does not: some tenths of a second would be a tenth of their merge.
UNASKED_NOT = range(1 << 26, 1 << 30)
_UNASKED_TENSORS = 1 << 13  # at most: each takes half a millisecond
# Neighbouring elements of a sample: a cache line or several. Rows are alike: longer runs would say less.
_RUN = 64
_FEWEST = 16  # runs of a tensor
# Of these, what a sample of a tensor says is not what the tensor says.
_WHOLE = {"norms", "gram", "row scores"}


class Sums(NamedTuple):
    """Over the model, of one merged edit e: sum_t ||k_t||^2, ||e||^2, sum_t <e, k_t>, and ||lambda e||^2
    for each tensor's own lambda, `auto` and `match_norm` taken as 1; edits: ||d_t||^2 per expert. Of a part
    of the model, lambda is without the recipe's `lambda` and `times`."""

    kept: float
    merged: float
    product: float
    scaled: float
    edits: tuple[float, ...]


@dataclass(frozen=True)
class Scale:
    """What the sums say. auto, match_norm: factors of those names; length: ||lambda e|| / mean_t ||d_t||
    without either; elements: how many were sampled; norms: each ||d_t||."""

    auto: float
    match_norm: float
    length: float
    elements: int
    norms: Sequence[float] = ()

    def factor(self, settings: Settings) -> float:
        """By which these settings ask a merged edit to be multiplied."""
        if settings["lambda"] == AUTO:
            return self.auto
        return 1.0 if settings.shared.get("match_norm") is None else self.match_norm

    @classmethod
    def of(cls, sums: Sums, elements: int, before: Sequence[float] = ()) -> Scale:
        """Factors to six digits: the sums' last ones differ between backends. before: norms of the experts
        that the first one stands for, where it is a merge of them."""
        own = list(map(math.sqrt, sums.edits))
        norms = [*before, *own[1:]] if before else own
        mean, six = math.fsum(norms) / max(len(norms), 1), list(map(_six, norms))
        length = math.sqrt(sums.merged)
        if not (length and math.isfinite(sums.kept + sums.merged + sums.scaled)):
            return cls(1.0, 1.0, 0.0, elements, six)  # nothing to scale, or what the merge itself refuses
        auto = math.sqrt(sums.kept) / length
        if sums.product > 0:
            auto = min(auto, sums.kept / sums.product)
        if len(sums.edits) == 1:
            auto = 1.0
        scaled = math.sqrt(sums.scaled) / mean if mean else 0.0
        return cls(_six(auto), _six(1 / scaled) if scaled else 1.0, _six(scaled), elements, six)


NONE = Scale(1.0, 1.0, 0.0, 0)


def _six(value: float) -> float:
    return float(f"{value:.6g}")


def decide(decider: Decider, always: bool = False) -> ModelFound:
    """`decide_model`, and the scale where it is asked for; always: also for a report, where a sample is all
    that it takes and the merge takes much longer or no time."""
    found = decider.decide_model()
    settings = [decider.settings(tensor) for tensor in decider.tensors]
    if not settings or not all(s.has_base and "lambda" in s.shared for s in settings):
        return found
    a_sample_tells = not ((_WHOLE | {"low rank"}) & _statistics(decider) or decider.needs.matrices)
    if settings[0].scaled:
        return replace(found, scale=find(decider, found))
    costs = _elements(decider) in UNASKED_NOT or len(decider.tensors) > _UNASKED_TENSORS
    if always and a_sample_tells and not costs:
        return replace(found, scale=find(decider, found, _LEAST))
    return found


def find(decider: Decider, model: ModelFound, most: int = _MOST) -> Scale:
    """Of a decider's tensors. model: what was found of it; most: elements of the sample."""
    size = int(min(max(_elements(decider) / 100, _LEAST), most))
    measured = decider.surveys.measured(size, lambda: _measured(decider.of_length_one(), model, size))
    if measured is None:
        return NONE
    factors = {tensor.name: decider.settings(tensor).lambda_ for tensor in decider.tensors}
    sums = [part._replace(scaled=part.scaled * factors[name] ** 2) for name, part in measured.parts]
    return Scale.of(_added(sums), measured.elements, decider.norms_before)


class _Measured(NamedTuple):
    """The sums of parts of the model, each of a tensor; elements: how many were sampled."""

    parts: list[tuple[str, Sums]]
    elements: int


def _elements(decider: Decider) -> int:
    return sum(t.numel for t in decider.tensors)


def _measured(decider: Decider, model: ModelFound, size: int) -> _Measured | None:
    """Of a decider of edits of length one, by a sample of so many elements; None of no elements."""
    total = _elements(decider)
    if not total:
        return None
    share = size / total
    whole = [t for t in decider.tensors if decider.matrices.by_formula(t)]
    ready = (decider.prepare(t) for t in decider.tensors if not decider.matrices.by_formula(t))

    def sample(tensor: TensorInputs) -> list[TensorInputs]:
        return list(_pieces(tensor, share, decider.score_terms(tensor), decider.release))

    pieces = list(itertools.chain.from_iterable(decider.pool.run(sample, ready)))
    by_tensors = _WHOLE & _statistics(decider) or decider.needs.matrices
    terms_of = _terms_of_tensors if by_tensors else _terms_of_sample
    times = _times(decider, pieces)

    def sums(pair: tuple[TensorInputs, Terms]) -> tuple[str, Sums]:
        piece, terms = pair
        return piece.name, _sums(decider, piece, terms, times[piece.name])

    def of_matrix(matrix: Matrix) -> tuple[str, Sums]:
        return matrix.stored.name, _sums_of_matrix(decider, matrix)

    parts = list(decider.pool.run(sums, terms_of(decider, model, pieces)))
    parts += decider.pool.run(of_matrix, _matrices(decider, model, whole))
    return _Measured(parts, sum(p.numel for p in pieces) + sum(t.numel for t in whole))


def _statistics(decider: Decider) -> set[str]:
    return {need.statistic for need in decider.needs.everything}


def _pieces(
    tensor: TensorInputs, share: float, terms: Terms, release: Callable[[TensorInputs], None]
) -> Iterator[TensorInputs]:
    """A sample of one tensor: one tile of runs, each in its own stratum. terms: where they want elements that
    stay together, those are tiles of their own; release: lets go of a tile's mapped pages."""
    run = terms.whole if terms.whole > 1 else _RUN
    count = max(math.ceil(share * tensor.numel / run), _FEWEST)
    if not tensor.numel:
        return
    if count * run >= tensor.numel:
        yield tensor.made
        return
    places = tensor.numel // run if terms.whole > 1 else tensor.numel - run
    random = np.random.default_rng(name_hash(tensor.name))
    starts = ((np.arange(count) + random.random(count)) * (places / count)).astype(np.int64)
    if not terms.gathers:
        step = run if terms.whole > 1 else 1
        yield from (tensor.slice(start * step, start * step + run) for start in starts.tolist())
        return
    tiles = []
    for first in range(0, tensor.numel, CHUNK):
        within = starts[(starts >= first) & (starts < first + CHUNK)]
        if not len(within):
            continue
        positions = (within[:, None] + np.arange(run)).reshape(-1)
        if tensor.is_resident:
            positions = resident.beside(positions, tensor.experts[0].data)
        tiles.append(tensor.gather(positions))
        if not tensor.is_computed:
            release(tensor.slice(first, min(first + CHUNK + run, tensor.numel)))
    yield concatenated(tiles)


Settled = Iterator[tuple[TensorInputs, Terms]]


def _terms_of_tensors(decider: Decider, model: ModelFound, pieces: list[TensorInputs]) -> Settled:
    """The terms by which whole tensors merge: their statistics are read."""
    whole = {tensor.name: tensor for tensor in decider.tensors}
    unscaled = replace(model, scale=NONE)
    for name, of_tensor in itertools.groupby(pieces, lambda piece: piece.name):
        terms = decider.terms(decider.prepare(whole[name]), unscaled)
        yield from ((piece, terms) for piece in of_tensor)


def _terms_of_sample(decider: Decider, model: ModelFound, pieces: list[TensorInputs]) -> Settled:
    """As if the sample were the model, with thresholds of its own: brackets depend on the page cache."""
    sample = decider.of_sample(pieces)
    thresholds = list(model.thresholds)
    if sample.model_scope:
        for t, selection in enumerate(sample.selections()):
            if selection.surveyed:
                thresholds[t] = _threshold(decider, sample, pieces, t, selection)
    found = replace(model, thresholds=tuple(thresholds), brackets=(None,) * len(thresholds), scale=NONE)
    for piece in pieces:
        terms = sample.terms(piece, found)
        opened = [t for t, expert in enumerate(terms.experts) if is_open(expert)]
        yield piece, close(terms, sample.exact_thresholds(piece, opened)) if opened else terms


def _threshold(
    decider: Decider, sample: Decider, pieces: list[TensorInputs], t: int, selection: Selection
) -> float:
    """Expert t's over the model: each score counts as many times as its piece stands for. Small tensors are
    sampled whole, and hold much of the saliency."""
    times = _times(decider, pieces)
    taking_part = [piece for piece in pieces if sample.takes_part(piece)]

    def scores(piece: TensorInputs) -> np.ndarray:
        return resident.host(decider.backend.scores(piece, t, sample.score_terms(piece))[0])

    if not taking_part:
        return KEEP_NOTHING
    # Sorted as integers: the score's bits, then its piece.
    found = enumerate(decider.pool.run(scores, taking_part))
    keys = np.concatenate([s.view(np.uint32).astype(np.uint64) << 32 | np.uint64(i) for i, s in found])
    keys.sort()
    keys = keys[::-1]
    values = (keys >> 32).astype(np.uint32).view(np.float32)
    of_each = np.array([times[p.name] for p in taking_part])[keys & 0xFFFFFFFF]
    reached = np.cumsum(of_each * (values.astype(np.float64) if selection.rule == "mass" else 1.0))
    at = int(np.searchsorted(reached, selection.value * reached[-1]))
    if selection.value <= 0 or not values[0]:
        return KEEP_NOTHING
    return max(float(values[min(at, len(values) - 1)]), SMALLEST)


def _times(decider: Decider, pieces: list[TensorInputs]) -> dict[str, float]:
    """How many elements one of a tensor's sample stands for."""
    sampled: dict[str, int] = {}
    for piece in pieces:
        sampled[piece.name] = sampled.get(piece.name, 0) + piece.numel
    return {t.name: t.numel / sampled[t.name] for t in decider.tensors if t.name in sampled}


def _sums(decider: Decider, piece: TensorInputs, terms: Terms, times: float) -> Sums:
    """Of a piece that stands for `times` as many elements."""
    tile = replace(piece, out_dtype=BY_NAME["float64"])
    merged = _merged(decider, tile, terms, 1.0) - _merged(decider, tile, terms, 0.0)
    every = replace(terms, words=replace(terms.words, score="none", select="all", edit="difference"))
    kept = product = 0.0
    places = decider.positions(piece)
    edits = [0.0] * max(decider.experts, len(places))
    for t, expert in enumerate(terms.experts):
        of_expert = _edits(decider, tile, t, terms) * (
            math.copysign(1.0, expert.weight_scale) * expert.edit_scale
        )
        kept += float(np.square(of_expert).sum())
        product += float((merged * of_expert).sum())
        edits[places[t]] = times * float(np.square(_edits(decider, tile, t, every)).sum())
    length = float(np.square(merged).sum())
    return Sums(
        times * kept, times * length, times * product, times * length * terms.lambda_**2, tuple(edits)
    )


def _matrices(decider: Decider, model: ModelFound, tensors: list[TensorInputs]) -> Iterator[Matrix]:
    for tensor, (piece, terms) in zip(tensors, _terms_of_tensors(decider, model, tensors), strict=True):
        yield from decider.matrices.of(tensor, decider.prepare(piece), terms, 0, tensor.numel)


def _sums_of_matrix(decider: Decider, matrix: Matrix) -> Sums:
    """Of all elements: no sample says what a formula makes of a matrix."""
    kept, merged, product, of_experts = decider.matrices.sums(matrix)
    places = decider.positions(matrix.stored)
    edits = [0.0] * max(decider.experts, len(places))
    for place, square in zip(places, of_experts, strict=True):
        edits[place] = square
    return Sums(kept, merged, product, merged * matrix.terms.lambda_**2, tuple(edits))


def _merged(decider: Decider, tile: TensorInputs, terms: Terms, factor: float) -> np.ndarray:
    room = resident.empty(8 * tile.numel, tile.experts[0].data)
    decider.backend.merge(tile, replace(terms, lambda_=factor, fallback="base"), room)
    return resident.host(room).view(np.float64)


def _edits(decider: Decider, tile: TensorInputs, t: int, terms: Terms) -> np.ndarray:
    return resident.host(decider.backend.edits(tile, t, terms)[0]).astype(np.float64)


def _added(parts: list[Sums]) -> Sums:
    kept, merged, product, scaled = (math.fsum(values) for values in list(zip(*parts, strict=True))[:4])
    edits = tuple(map(math.fsum, zip(*(part.edits for part in parts), strict=True)))
    return Sums(kept, merged, product, scaled, edits)
