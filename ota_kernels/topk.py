"""The exact k-th largest score of an array in memory, in one pass.

    sample --> bracket of each wanted rank --> one pass: count around it, collect inside --> exact score

As in a merge (bracket.py, group.py), but the scores are there already and may be negative: a bracket lies
between two sampled scores. The counts prove where a score is; a bracket that missed costs time, never
exactness.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import InputError, RecipeError
from .integrations.tracing import traceable
from .processors import default_threads
from .run.pool import Pool
from .select import order_statistics as ranks
from .select.bracket import DEVIATIONS, cluster_count, error_of_sum
from .select.sample import RUN, RUNS, clusters, runs_of
from .tensors import array as resident
from .tensors.array import Array
from .tensors.buffer import Buffer
from .tensors.convert import buffer_of
from .tensors.segment import CHUNK

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_DIRECT = 1 << 15  # scores up to which partitioning takes less time than a sample and threads
_MANY = 16  # ranks from which sorting everything is as fast: 1.1 s against 1.3 s of 30 million float32
_BLOCK = 1 << 16  # scores whose comparisons stay in a core's cache
DEVICE_BLOCK = 1 << 28  # scores whose comparisons a device holds


@traceable
def topk_threshold(score: Any, k: int | Sequence[int], *, largest: bool = True) -> float | list[float]:
    """The exact k-th largest (or smallest) score: score >= threshold (or <=) keeps exactly k, but for ties.

    score: a torch tensor or numpy array of any shape, float32, bfloat16, float16 or float64; infinities are
    scores like others. One on a GPU is searched there, on the current stream. k: 0 to the number of scores n;
    0 gives inf (-inf for the smallest). A sequence of k gives a list from the same pass: for [k, n + 1 - k]
    the k-th largest and the k-th smallest, strictly between which lies what a cut at both ends leaves.

    One pass, and little memory beside the scores; a copy of them for more than 16 ranks. Raises RecipeError
    for a wrong k; InputError where a score is NaN or of another type; BackendError for a device that no
    backend serves. Where torch.compile traces the call, each threshold is a float64 tensor (ops.py).
    """
    scores = buffer_of(score, "score")
    if scores.dtype.name not in _DTYPES:
        raise InputError(f"score is {scores.dtype.name}; scores are {', '.join(_DTYPES)}: convert it")
    several = not isinstance(k, numbers.Integral)
    wanted = [_checked(each, len(scores)) for each in (_sequence(k) if several else [k])]
    positions = {each: len(scores) - each if largest else each - 1 for each in wanted if each > 0}
    ascending = at_positions(scores, sorted(set(positions.values())))
    nothing = math.inf if largest else -math.inf
    thresholds = [ascending[positions[each]] if each else nothing for each in wanted]
    return thresholds if several else thresholds[0]


def _sequence(k: Any) -> Sequence[Any]:
    try:
        return list(k)
    except TypeError:
        raise _not_integer(k) from None


def _checked(k: Any, n: int) -> int:
    if isinstance(k, bool) or not isinstance(k, numbers.Integral):
        raise _not_integer(k)
    if not 0 <= k <= n:
        raise RecipeError(f"k is {k}: it must be from 0 to {n}, the number of scores")
    return int(k)


def _not_integer(k: Any) -> RecipeError:
    return RecipeError(f"k is a {type(k).__name__}: it must be an integer, or a sequence of integers")


def _values(scores: Buffer) -> Array:
    """The scores as numbers that are compared fast: float64, or float32 for the narrower types."""
    wide = scores.dtype.itemsize >= 4
    own = getattr(resident.library(scores.data), scores.dtype.name) if wide else None
    return scores.data.view(own) if wide else scores.float32()


def _refuse_nan(part: Buffer, scores: Buffer) -> Array:
    """The values of a part of the scores; InputError about all scores if one of the part is NaN."""
    values = _values(part)
    if len(values) and math.isnan(values.max()):
        lib = resident.library(values)
        is_nan = lib.isnan(_values(scores))
        raise InputError(
            f"{scores.origin}: {int(is_nan.sum())} of {len(scores)} values are NaN, the first at flat index "
            f"{int(lib.argmax(resident.raw(is_nan)))}: replace them, for example by a number below all scores"
        )
    return values


def sorted_at(scores: Buffer, positions: Sequence[int]) -> dict[int, float]:
    if not positions:
        return {}
    ascending = resident.sorted_at(_values(scores), positions)
    return dict(zip(positions, resident.numbers(*(ascending[i] for i in positions)), strict=True))


@dataclass(frozen=True, slots=True)
class Bracket:
    """The score at `position` of the ascending order should be from lowest to highest, both included."""

    position: int
    lowest: float
    highest: float


def brackets_of(scores: Buffer, positions: Iterable[int]) -> list[Bracket]:
    """From a sample of clusters."""
    _, starts = clusters([len(scores)], RUNS * cluster_count(len(scores)), 1)
    sample = _values(runs_of(scores, starts.reshape(-1))).reshape(-1, RUN)
    ascending = resident.ascending(sample)
    return [_bracket(ascending, sample, position, len(scores)) for position in positions]


def _bracket(ascending: Array, sample: Array, position: int, n: int) -> Bracket:
    target = (position + 0.5) / n * len(ascending)
    margin = DEVIATIONS * float(_standard_error(sample, ascending[int(target)])) + 1
    low, high = math.floor(target - margin), math.ceil(target + margin)
    return Bracket(
        position,
        float(ascending[low]) if low >= 0 else -math.inf,
        float(ascending[high]) if high < len(ascending) else math.inf,
    )


def _standard_error(sample: Array, threshold: Array) -> Array:
    """Of the count of sampled scores from the threshold up."""
    return error_of_sum(ranks.squared_differences(sample, threshold), len(sample))


@dataclass(frozen=True, slots=True)
class _Counted:
    """One block against a bracket. Scores that equal an end are counted, those between the ends collected, so
    that many equal scores take no memory."""

    below: int
    at_lowest: int
    at_highest: int
    between: Array


def _count(values: Array, bracket: Bracket) -> _Counted:
    lowest, highest = bracket.lowest, bracket.highest
    count = resident.library(values).count_nonzero
    below, at_lowest = int(count(values < lowest)), int(count(values == lowest))
    if lowest == highest:
        return _Counted(below, at_lowest, 0, values[:0])
    between = values[(values > lowest) & (values < highest)]
    return _Counted(below, at_lowest, int(count(values == highest)), between)


def _exact(bracket: Bracket, blocks: Sequence[_Counted]) -> float | None:
    """The score at the bracket's position, None if it lies outside."""
    rest = bracket.position - sum(b.below for b in blocks)
    if rest < 0:
        return None
    at_lowest = sum(b.at_lowest for b in blocks)
    if rest < at_lowest:
        return bracket.lowest
    rest -= at_lowest
    between = resident.joined([b.between for b in blocks])
    if rest < len(between):
        return float(resident.kth_largest(between, len(between) - rest))
    rest -= len(between)
    return bracket.highest if rest < sum(b.at_highest for b in blocks) else None


def at_positions(
    scores: Buffer,
    positions: Sequence[int],
    brackets_of: Callable[[Buffer, Sequence[int]], list[Bracket]] = brackets_of,
    sorted_at: Callable[[Buffer, Sequence[int]], dict[int, float]] = sorted_at,
    device_block: int = DEVICE_BLOCK,
) -> dict[int, float]:
    """The scores at these positions of the ascending order. brackets_of: where they should be; sorted_at:
    finds those that are elsewhere; device_block: scores whose comparisons a device holds."""
    n = len(scores)
    if n < _DIRECT or len(positions) > _MANY:
        _refuse_nan(scores, scores)
        return sorted_at(scores, positions)
    brackets = brackets_of(scores, positions)

    on_device = resident.is_resident(scores.data)
    chunk, size = (device_block, device_block) if on_device else (CHUNK, _BLOCK)

    def of_chunk(start: int) -> list[list[_Counted]]:
        stop = min(start + chunk, n)
        blocks = (scores.slice(i, min(i + size, stop)) for i in range(start, stop, size))
        values = (_refuse_nan(block, scores) for block in blocks)
        return [[_count(block, bracket) for bracket in brackets] for block in values]

    with contextlib.nullcontext() if on_device else Pool(default_threads()) as pool:
        run = map if on_device else pool.run
        blocks = list(itertools.chain.from_iterable(run(of_chunk, range(0, n, chunk))))
    found = {
        bracket.position: _exact(bracket, [block[i] for block in blocks])
        for i, bracket in enumerate(brackets)
    }
    missed = [position for position, value in found.items() if value is None]
    return found | sorted_at(scores, missed)
