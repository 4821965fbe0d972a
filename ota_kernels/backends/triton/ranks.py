"""Scores by their rank, on the device, for many tiles and all experts at once.

    lists of elements --> values: the bits of their scores, which order like the scores; -1: does not count
    four passes, 8 bits each: lists --> bins of every (group, expert, query) --> the next pass

A group is a tile, or all of them. A list is a part of what of a tile is looked at: sampled runs, or what a
program left undecided. Nothing is sorted, nothing depends on an order, and no pass waits for the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...tensors.segment import RUN
from . import loads, stages

DIGITS, BINS = 4, 256

_BINS, _ROW = tl.constexpr(BINS), tl.constexpr(DIGITS * BINS)
_RUN, _PAIR = tl.constexpr(RUN), tl.constexpr(2 * RUN)
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit(do_not_specialize=["stride"])
def _score_kernel(
    table,
    lists,
    numbers,
    tiles,
    begins,
    lengths,
    places,
    runs,
    values,
    stride,
    n_experts: tl.constexpr,
    weights: tl.constexpr,
    bases: tl.constexpr,
    curvature: tl.constexpr,
    curvatures: tl.constexpr,
    score: tl.constexpr,
    has_base: tl.constexpr,
    place: tl.constexpr,
    sampled: tl.constexpr,
    block_size: tl.constexpr,
):
    """Values of one list and expert. sampled: elements of the runs (int32: where in the tile they begin) from
    the list's place on, of which every score counts; else undecided ones, of which those in the expert's
    bracket do."""
    i, t = tl.program_id(0), tl.program_id(1)
    tile, n = tl.load(tiles + i), tl.load(lengths + i)
    of_tile = loads.row_of_table(table, tile, n_experts)
    source = of_tile if sampled else loads.row_of_table(lists, i, n_experts)
    numbers = loads.row_of_numbers(numbers, tile, n_experts)
    first, n_columns = loads.place_in_rows(source, n_experts, place)
    to = values + t.to(tl.int64) * stride + tl.load(begins + i)
    for begin in tl.range(0, n, block_size):
        at = begin + tl.arange(0, block_size)
        inside = at < n
        which = at
        if sampled:
            which = tl.load(runs + tl.load(places + i) + at // _RUN, mask=inside, other=0) + at % _RUN
        row, column, wrapped, has_next = loads.place_of(
            source, tl.cast(0, tl.int64), n, which, inside, first, n_columns,
            n_experts, place, False)  # fmt: skip
        base = tl.zeros((block_size,), tl.float32)
        if has_base:
            bases_at = loads.scalar_pointer(source, n_experts, loads.BASE, bases, False)
            base = tl.load(bases_at + which, mask=inside, other=0).to(tl.float32)
        w, _, d, usable = loads.edit_of(
            source, t, 0, which, inside, base, tl.float32, n_experts, weights, False, False
        )
        h = loads.curvature(
            source, t, 0, which, inside, row, column, wrapped, has_next,
            n_experts, curvature, curvatures, place, False, block_size)  # fmt: skip
        usable &= loads.is_finite(w.to(tl.float32)) & loads.is_curvature(h) & loads.is_finite(base)
        s = stages.score(
            source, numbers, t, h, d, base, inside, row, wrapped, has_next, score, n_experts, place
        )
        counts = inside
        if not sampled:
            lowest = loads.number(numbers, t, loads.THRESHOLD).to(tl.float32)
            span = loads.integer(of_tile, t, n_experts, loads.SPAN).to(tl.uint32)
            counts &= stages.in_bracket(s, lowest, span)
        found = stages.bits(stages.usable_score(s, usable)).to(tl.int32, bitcast=True)
        tl.store(to + at, tl.where(counts, found, -1), mask=inside)


@triton.jit
def _found(bins, rest, digits: tl.constexpr, from_inside: tl.constexpr):
    """(The first digits of the rest-th largest value; its rank among those that share them; how many values
    there are). from_inside: rest lacks that number."""
    place = tl.arange(0, _BINS)
    prefix, n = tl.cast(0, tl.int32), tl.cast(0, tl.int64)
    for digit in tl.static_range(0, digits):
        bin_ = tl.load(bins + digit * _BINS + place).to(tl.int64)
        from_top = tl.sum(bin_) - tl.cumsum(bin_, 0) + bin_
        if digit == 0:
            n = tl.sum(bin_)
            if from_inside:
                rest += n
        highest = tl.maximum(loads.int32_sum((from_top >= rest).to(tl.int32), 0) - 1, 0)
        rest -= tl.sum(tl.where(place > highest, bin_, 0))
        prefix = prefix * _BINS + highest
    return prefix, rest, n


@triton.jit(do_not_specialize=["stride"])
def _digit_kernel(
    groups,
    begins,
    lengths,
    values,
    stride,
    bins,
    ranks,
    n_experts: tl.constexpr,
    queries: tl.constexpr,
    digit: tl.constexpr,
    from_inside: tl.constexpr,
    block_size: tl.constexpr,
):
    """Add one list's values to the bins of a (group, expert, query): those whose digits before this one are
    those of the rank. Relaxed: nobody reads the bins before the kernel's end."""
    i, which = tl.program_id(0), tl.program_id(1)
    row = tl.load(groups + i).to(tl.int64) * (n_experts * queries) + which
    rank = tl.load(ranks + row)
    prefix, _, _ = _found(bins + row * _ROW, rank, digit, from_inside)
    n = tl.load(lengths + i)
    of_list = values + (which // queries).to(tl.int64) * stride + tl.load(begins + i)
    found = tl.zeros((_BINS,), tl.int32)
    shift: tl.constexpr = 24 - 8 * digit
    for begin in tl.range(0, n, block_size):
        at = begin + tl.arange(0, block_size)
        v = tl.load(of_list + at, mask=at < n, other=-1)
        counts = v >= 0
        if digit > 0:
            counts &= (v >> (shift + 8)) == prefix
        found += tl.histogram(tl.where(counts, (v >> shift) & 255, 0), _BINS).to(tl.int32)
        others = loads.int32_sum(tl.where(counts, 0, 1), 0)
        found -= tl.where(tl.arange(0, _BINS) == 0, others, 0)
    to = bins + row * _ROW + digit * _BINS + tl.arange(0, _BINS)
    tl.atomic_add(to, found, mask=found != 0, sem="relaxed")


@triton.jit(do_not_specialize=["stride"])
def _squares_kernel(
    groups,
    begins,
    lengths,
    values,
    stride,
    bins,
    ranks,
    squares,
    n_experts: tl.constexpr,
    block_size: tl.constexpr,
):
    """Add up, over pairs of neighbouring runs, the squares of how many more values of one than of the other
    reach the rank's. An odd last run is left out."""
    i, t = tl.program_id(0), tl.program_id(1)
    row = tl.load(groups + i).to(tl.int64) * n_experts + t
    value, _, _ = _found(bins + row * _ROW, tl.load(ranks + row), 4, False)
    n = tl.load(lengths + i)
    of_list = values + t.to(tl.int64) * stride + tl.load(begins + i)
    total = tl.cast(0, tl.int64)
    for begin in tl.range(0, n, block_size):
        at = begin + tl.arange(0, block_size)
        whole = at // _PAIR * _PAIR + _PAIR <= n
        reaches = (tl.load(of_list + at, mask=whole, other=-1) >= value).to(tl.int32)
        sign = tl.where(at % _PAIR < _RUN, 1, -1)
        more = tl.sum(tl.reshape(reaches * sign, (block_size // _PAIR, _PAIR)), 1)
        total += tl.sum((more * more).to(tl.int64))
    tl.atomic_add(squares + row, total, sem="relaxed")


@triton.jit
def _bracket_kernel(table, numbers, bins, ranks, wanted, sizes, exact, n_experts: tl.constexpr):
    """Write the bracket of a tile and expert: from the value at the first of its two ranks (0 below the
    smallest) to that at the second (infinite above the largest); of `exact` ones the threshold."""
    row = tl.program_id(0).to(tl.int64)
    tile, t = row // n_experts, row % n_experts
    lower, upper = tl.load(ranks + 2 * row), tl.load(ranks + 2 * row + 1)
    low, _, _ = _found(bins + 2 * row * _ROW, lower, 4, False)
    high, _, _ = _found(bins + (2 * row + 1) * _ROW, upper, 4, False)
    low = tl.maximum(tl.where(lower > tl.load(sizes + tile), 0, low), 1)
    high = tl.maximum(tl.where(upper < 1, _INFINITY, high), 1)
    span = tl.where(tl.load(exact + tile) != 0, 0, high - low + 1)
    if tl.load(wanted + row) > 0:
        of_tile = loads.row_of_table(table, tile, n_experts)
        tl.store(of_tile + loads.SPAN * n_experts + t, span.to(tl.int64))
        to = loads.row_of_numbers(numbers, tile, n_experts) + loads.N_NUMBERS * t + loads.THRESHOLD
        tl.store(to, low.to(tl.float32, bitcast=True).to(numbers.dtype.element_ty))


@triton.jit
def _decide_kernel(
    table,
    numbers,
    bins,
    wanted,
    left,
    lengths,
    found,
    n_experts: tl.constexpr,
    together: tl.constexpr,
    block_size: tl.constexpr,
):
    """Write the threshold of a tile and expert, and to `found` its bits and whether it is none: it lies
    outside of the bracket, or a list of the tile had no room. wanted, left: of each group (all tiles
    together, or a tile) and expert, how many are kept, less those above the bracket; lengths: of lists."""
    tile, t = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tile * n_experts + t
    of_group = row * 0 + t if together else row
    of_tile = loads.row_of_table(table, tile, n_experts)
    at = loads.row_of_numbers(numbers, tile, n_experts) + loads.N_NUMBERS * t + loads.THRESHOLD
    lowest = tl.load(at).to(tl.float32).to(tl.int32, bitcast=True)
    span = loads.integer(of_tile, t, n_experts, loads.SPAN)
    k, rest = tl.load(wanted + of_group), tl.load(left + of_group)
    value, _, inside = _found(bins + of_group * _ROW, rest, 4, True)
    rest += inside
    value = tl.where((span == 0) | (rest > inside), lowest, value)
    short = tl.cast(0, tl.int32)
    room = loads.scalar(of_tile, n_experts, loads.ROOM)
    count = loads.scalar(of_tile, n_experts, loads.PROGRAMS).to(tl.int32)
    of_lists = lengths + loads.scalar(of_tile, n_experts, loads.PROGRAM)
    for begin in tl.range(0, count, block_size):
        which = begin + tl.arange(0, block_size)
        short += loads.int32_sum(
            (tl.load(of_lists + which, mask=which < count, other=0) > room).to(tl.int32), 0
        )
    missed = (span > 0) & ((rest <= 0) | ((rest > inside) & (lowest != 1)) | (short > 0))
    if k > 0:
        tl.store(at, value.to(tl.float32, bitcast=True).to(numbers.dtype.element_ty))
        tl.store(found + 2 * row, value)
        tl.store(found + 2 * row + 1, missed.to(tl.int32))
