"""out = w_0 + lambda N / D, N = sum_t g_t P_t y_t (tensors/terms.py): one pass over a tile, all in registers.

A program takes every n-th block of the tile and counts in registers, thread by thread; at its end it sums and
writes each count once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...errors import BackendError
from ...tensors.result import CENSUS, EXPONENTS, MergeStats
from ...tensors.terms import ExpertTerms, Terms, score_bits
from . import loads, stages
from .survey import values
from .table import by_place, chances_of, is_aligned, is_indexed, launch, launches, operands, unified
from .tiles import BLOCK, TYPES, WARPS, DeviceTile, kind_of, nonfinite, streamed

UNROLLED = 16  # experts up to which loops over them are unrolled: loads are issued long before their use
MOST = 64  # experts: one bit each of `kept_by`

# Programs of a launch for each processor of the device: four or more run at once, the rest even out the end.
_PROGRAMS = 16
_INTERPRETED_PROGRAMS = 2

# Fields of the counts beside those of experts: unkept, overflow, repaired, suspects.
N_TOTALS = 4
_N_TOTALS = tl.constexpr(N_TOTALS)
_EXPONENTS = tl.constexpr(EXPONENTS)
_CENSUS = tl.constexpr(CENSUS)


@triton.jit(do_not_specialize=["n", "first_block", "end_block", "first_program", "n_programs", "first", "n_columns"])
def _merge_kernel(
    base_pointer,
    out_pointer,
    table,
    numbers,
    counts,
    lengths,
    censuses,
    n,
    first_block,
    end_block,
    first_program,
    n_programs,
    first,
    n_columns,
    n_experts: tl.constexpr,
    weights: tl.constexpr,
    curvature: tl.constexpr,
    curvatures: tl.constexpr,
    acc: tl.constexpr,
    edit: tl.constexpr,
    score: tl.constexpr,
    select: tl.constexpr,
    elect: tl.constexpr,
    weigh: tl.constexpr,
    divide: tl.constexpr,
    power: tl.constexpr,
    has_base: tl.constexpr,
    origins: tl.constexpr,
    scaled: tl.constexpr,
    trimmed: tl.constexpr,
    floored: tl.constexpr,
    zero_divisor: tl.constexpr,
    fallback: tl.constexpr,
    repair: tl.constexpr,
    brackets: tl.constexpr,
    census: tl.constexpr,
    indexed: tl.constexpr,
    gathered: tl.constexpr,
    quads: tl.constexpr,
    flat: tl.constexpr,
    place: tl.constexpr,
    by_fours: tl.constexpr,
    aligned: tl.constexpr,
    tail: tl.constexpr,
    unroll: tl.constexpr,
    packed: tl.constexpr,
    keepers: tl.constexpr,
    width: tl.constexpr,
    fields: tl.constexpr,
    per_thread: tl.constexpr,
    block_size: tl.constexpr,
):
    # 64-bit offsets, 32-bit lanes.
    lane = tl.arange(0, block_size)
    zero = tl.zeros((block_size,), acc)
    column_of_counts = counts + first_program + tl.program_id(0)
    kept_counts = tl.zeros((block_size // per_thread, fields), tl.int32)
    reached_counts = kept_counts
    other_counts = tl.zeros((block_size // per_thread, _N_TOTALS), tl.int32)
    lambda_ = loads.shared(numbers, n_experts, loads.LAMBDA).to(acc)
    for block in tl.range(first_block + tl.program_id(0), end_block, tl.num_programs(0)):
        offset = tl.cast(block, tl.int64) * block_size
        inside = loads.inside_of(lane, n - offset, tail, block_size)
        row, column, wrapped, has_next = loads.place_of(
            table, block, offset, n, lane, inside, first, n_columns,
            n_experts, place, by_fours, block_size)  # fmt: skip
        index = loads.flat_index(table, n_experts, offset, lane, inside, gathered) if flat else lane
        base = tl.load(base_pointer + offset + lane, mask=inside, other=0).to(acc) if has_base else zero
        base32 = base.to(tl.float32)
        of_all = base32
        if score == "spread":
            of_all = stages.spread(
                table, offset, lane, inside, base, n_experts, weights, origins, aligned, unroll)  # fmt: skip

        # Score and select. Where nothing is elected, each expert's elements are read once, and added.
        numerator, denominator, sum_of_weights = zero, zero, zero
        kept_by = tl.zeros((block_size,), keepers)  # field t: m_t
        counted_by = kept_by  # field t: m_t where the inputs are usable
        added_by = kept_by  # field t: m_t where the edit is not trimmed; then g_t
        elected = tl.zeros((block_size,), tl.float32) - (1.0 if elect == "largest" else 0.0)
        winner = lane * 0 - 1
        # Numbers, not flags: a thread has eight elements and seven predicates.
        undecided, unusable = lane * 0, tl.zeros((block_size,), tl.uint32)
        if has_base and (origins or repair):
            unusable = stages.bits(tl.abs(base32))
        for t in tl.range(0, n_experts, loop_unroll_factor=unroll):
            w, d, d32, usable = loads.edit_of(
                table, t, offset, lane, inside, base, acc, n_experts, weights, origins, aligned)  # fmt: skip
            h = loads.curvature(
                table, t, offset, lane, inside, row, column, wrapped, has_next,
                n_experts, curvature, curvatures, place, aligned, block_size)  # fmt: skip
            s = stages.score(
                table, numbers, t, h, d32, of_all, inside, row, wrapped, has_next, score, n_experts, place)
            keep = stages.select(
                table, numbers, t, s, offset, lane, inside, index,
                select, n_experts, indexed, quads, block_size)  # fmt: skip
            kept_by |= keep.to(keepers) << (t * width)
            if brackets:
                threshold = loads.number(numbers, t, loads.THRESHOLD).to(tl.float32)
                span = loads.integer(table, t, n_experts, loads.SPAN).to(tl.uint32)
                undecided |= stages.in_bracket(s, threshold, span).to(tl.int32)
            if repair:
                usable &= loads.is_finite(w.to(tl.float32)) & loads.is_finite(base32) & loads.is_curvature(h)
                counted_by |= (keep & usable).to(keepers) << (t * width)
                unusable = tl.where(usable, unusable, 0xFFFFFFFF)
            elif score == "saliency":
                unusable = tl.maximum(unusable, stages.bits(s))
            else:
                unusable = tl.maximum(unusable, stages.bits(tl.abs(d32)))
                if curvature != "uniform":
                    unusable = tl.maximum(unusable, stages.bits(s if score == "curvature" else h))
            survive = keep
            if trimmed:
                survive &= tl.abs(d32) >= loads.number(numbers, t, loads.TRIM).to(tl.float32)
            if elect != "none" or weigh == "alone":
                added_by |= survive.to(keepers) << (t * width)
            if elect != "none":
                v = loads.number(numbers, t, loads.VOTE).to(tl.float32) * d32
                elected, winner = stages.vote(v, survive, elected, winner, t, elect)
            elif weigh != "alone":
                numerator, denominator = _add(
                    numerator, denominator, table, numbers, t, d, h, survive, survive, inside,
                    row, column, wrapped, has_next, zero,
                    edit, weigh, divide, power, scaled, n_experts, place, acc)  # fmt: skip
            if fallback == "mean":
                sum_of_weights += w.to(acc)

        if elect == "largest":
            added_by = tl.where(winner >= 0, tl.full((block_size,), 1, keepers) << (winner * width), 0)
        elif elect == "agreement" or (elect != "none" and weigh == "alone"):
            added_by = _agreeing(
                table, numbers, offset, lane, inside, base, added_by, elected,
                elect, n_experts, weights, origins, aligned, keepers, width, unroll)  # fmt: skip
        if elect != "none" or weigh == "alone":
            is_alone = (added_by != 0) & ((added_by & (added_by - 1)) == 0)
            for t in tl.range(0, n_experts, loop_unroll_factor=unroll):
                _, d, d32, _ = loads.edit_of(
                    table, t, offset, lane, inside, base, acc, n_experts, weights, origins, aligned)
                h = loads.curvature(
                    table, t, offset, lane, inside, row, column, wrapped, has_next,
                    n_experts, curvature, curvatures, place, aligned, block_size)  # fmt: skip
                added = ((added_by >> (t * width)) & 1) != 0
                if (elect == "sum" or elect == "count") and weigh != "alone":
                    v = loads.number(numbers, t, loads.VOTE).to(tl.float32) * d32
                    tie = loads.shared(numbers, n_experts, loads.TIE).to(tl.float32)
                    added &= stages.agrees(v, elected, tie, tie, elect)
                numerator, denominator = _add(
                    numerator, denominator, table, numbers, t, d, h, added, is_alone, inside,
                    row, column, wrapped, has_next, zero,
                    edit, weigh, divide, power, scaled, n_experts, place, acc)  # fmt: skip

        denominator = stages.divisor(numbers, denominator, divide, floored, zero_divisor, n_experts, acc)
        mean = stages.divide(sum_of_weights, zero + n_experts) if fallback == "mean" else base
        merged = base + lambda_ * stages.divide(numerator, denominator)
        merged = tl.where((kept_by == 0) | (denominator == 0), mean, merged)
        bad = unusable >= 0x7F800000
        if repair:
            merged = tl.where(bad, base, merged)
        written = merged.to(out_pointer.dtype.element_ty)
        tl.store(out_pointer + offset + lane, written, mask=inside)

        decided = inside
        if brackets:
            decided &= undecided == 0
        written = written if acc == tl.float64 else written.to(tl.float32)
        others = tl.where(decided & (kept_by == 0), 1, 0)
        others += tl.where(decided & loads.negated(loads.is_finite(written)), 1 << 4, 0)
        others += tl.where(decided & bad, 1 << 8, 0) + tl.where(inside & bad, 1 << 12, 0)
        other_counts += _by_thread(others, _N_TOTALS, per_thread, block_size)
        counted = counted_by if repair else kept_by
        if packed:
            kept = tl.where(decided, counted, 0) if brackets or tail else counted
            kept_counts += _by_thread(kept, fields, per_thread, block_size)
            if brackets:
                reached = tl.where(inside, counted, 0) if tail else counted
                reached_counts += _by_thread(reached, fields, per_thread, block_size)
        else:  # a program has one block
            for t in tl.range(0, n_experts):
                flag = ((counted >> t) & 1) != 0
                to = column_of_counts + t * n_programs
                tl.store(to, tl.sum((decided & flag).to(tl.int32)))
                if brackets:
                    tl.store(to + n_experts * n_programs, tl.sum((inside & flag).to(tl.int32)))

        if brackets:
            _append(
                base_pointer, table, lengths, block, offset, n, lane, tl.where(inside, undecided, 0), first,
                n_columns, n_experts, weights, curvature, curvatures, has_base, place, block_size)  # fmt: skip
        if census:
            _add_to_census(
                table, numbers, censuses, offset, lane, inside, base, of_all, row, column, wrapped, has_next,
                score, n_experts, weights, origins, curvature, curvatures, place, aligned,
                block_size)  # fmt: skip

    if packed:
        _store_counts(column_of_counts, kept_counts, n_programs, n_experts, fields)
        if brackets:
            to = column_of_counts + n_experts * n_programs
            _store_counts(to, reached_counts, n_programs, n_experts, fields)
    to = column_of_counts + n_experts * (2 if brackets else 1) * n_programs
    _store_counts(to, other_counts, n_programs, _N_TOTALS, _N_TOTALS)


@triton.jit
def _add(
    numerator,
    denominator,
    table,
    numbers,
    t,
    d,
    h,
    added,
    is_alone,
    inside,
    row,
    column,
    wrapped,
    has_next,
    zero,
    edit: tl.constexpr,
    weigh: tl.constexpr,
    divide: tl.constexpr,
    power: tl.constexpr,
    scaled: tl.constexpr,
    n_experts: tl.constexpr,
    place: tl.constexpr,
    acc: tl.constexpr,
):
    """N and D with what expert t adds to them."""
    y = d
    if edit == "clipped":
        y = stages.clipped(d, loads.shared(numbers, n_experts, loads.CLIP).to(acc))
    if scaled:
        y = loads.number(numbers, t, loads.EDIT_SCALE).to(acc) * y
    weight = stages.weigh(
        table, numbers, t, h, is_alone, inside, row, column, wrapped, has_next, zero,
        weigh, power, n_experts, place, acc)  # fmt: skip
    kept_weight = tl.where(added, weight, zero)
    denominator += stages.share_of_divisor(weight, kept_weight, added, divide)
    return tl.fma(kept_weight, y, numerator), denominator


@triton.jit
def _agreeing(
    table,
    numbers,
    offset,
    lane,
    inside,
    base,
    survives,
    elected,
    word: tl.constexpr,
    n_experts: tl.constexpr,
    weights: tl.constexpr,
    origins: tl.constexpr,
    aligned: tl.constexpr,
    keepers: tl.constexpr,
    width: tl.constexpr,
    unroll: tl.constexpr,
):
    """Fields of g_t: the survivors that agree with the sum of all, or with "agreement" all survivors where
    enough of them do."""
    share = loads.shared(numbers, n_experts, loads.AGREEMENT).to(tl.float32)
    tie = loads.shared(numbers, n_experts, loads.TIE).to(tl.float32)
    number, found = lane * 0, survives & 0
    for t in tl.range(0, n_experts, loop_unroll_factor=unroll):
        _, _, d32, _ = loads.edit_of(
            table, t, offset, lane, inside, base, tl.float32, n_experts, weights, origins, aligned)  # fmt: skip
        v = loads.number(numbers, t, loads.VOTE).to(tl.float32) * d32
        agrees = (((survives >> (t * width)) & 1) != 0) & stages.agrees(v, elected, share, tie, word)
        number += agrees.to(tl.int32)
        found |= agrees.to(keepers) << (t * width)
    if word == "agreement":
        needed = loads.shared(numbers, n_experts, loads.NEEDED).to(tl.int32)
        found = tl.where(number >= needed, survives, 0)
    return found


# Counts.


@triton.jit
def _by_thread(packed, fields: tl.constexpr, per_thread: tl.constexpr, block_size: tl.constexpr):
    """int32[threads, fields]: the fields of 4 bits, summed over the elements of each thread, 15 at most: no
    thread needs another one's for that."""
    sums = tl.sum(tl.reshape(packed, (block_size // per_thread, per_thread)), 1)
    shifts = (4 * tl.arange(0, fields)).to(sums.dtype)
    return ((sums[:, None] >> shifts[None, :]) & 15).to(tl.int32)


@triton.jit
def _store_counts(to, found, n_programs, n_rows: tl.constexpr, fields: tl.constexpr):
    """The sums of int32[threads, fields] into the program's column of n_rows rows."""
    row = tl.arange(0, fields)
    tl.store(to + row * n_programs, tl.sum(found, 0), mask=row < n_rows)


# What a bracket leaves undecided.


@triton.jit
def _append(
    base_pointer,
    table,
    lengths,
    block,
    offset,
    n,
    lane,
    wanted,
    first,
    n_columns,
    n_experts: tl.constexpr,
    weights: tl.constexpr,
    curvature: tl.constexpr,
    curvatures: tl.constexpr,
    has_base: tl.constexpr,
    place: tl.constexpr,
    block_size: tl.constexpr,
):
    """Write the block's wanted elements (1, else 0) to the columns, from the block's own beginning on, where
    they are in the cache: reading a tenth of the elements later would read nearly every 32-byte sector again.

    Positions first; then as many threads as a program has take one element each and all that belongs to it,
    instead of every element's thread a masked turn."""
    columns = loads.N_TABLE * n_experts + loads.N_SCALARS
    positions = loads.pointer(table, columns, tl.int32, True) + offset
    m = tl.sum(wanted)
    tl.store(lengths + block, m)
    tl.store(positions + tl.cumsum(wanted, 0) - 1, offset.to(tl.int32) + lane, mask=wanted != 0)
    tl.debug_barrier()  # each thread's positions are seen by all
    each: tl.constexpr = "narrow" if place == "whole" or place == "long" else place
    at = tl.arange(0, block_size // 8)
    while tl.sum((at < m).to(tl.int32)) > 0:
        there = at < m
        which = tl.load(positions + at, mask=there, other=0) - offset.to(tl.int32)
        if has_base:
            to = loads.pointer(table, columns + 1, base_pointer.dtype.element_ty, True) + offset
            tl.store(to + at, tl.load(base_pointer + offset + which, mask=there), mask=there)
        if curvature != "uniform":
            row, column, wrapped, has_next = loads.place_of(
                table, block, offset, n, which, there, first, n_columns,
                n_experts, each, False, block_size // 8)  # fmt: skip
        for t in tl.range(0, n_experts):
            w = loads.elements(table, loads.WEIGHTS * n_experts + t, offset, which, there, weights, False)
            tl.store(loads.pointer(table, columns + 2 + t, weights, True) + offset + at, w, mask=there)
            if curvature != "uniform":
                h = loads.curvature(
                    table, t, offset, which, there, row, column, wrapped, has_next,
                    n_experts, curvature, curvatures, each, False, block_size // 8)  # fmt: skip
                to = loads.pointer(table, columns + 2 + n_experts + t, tl.float32, True) + offset
                tl.store(to + at, h, mask=there)
        at += block_size // 8


@triton.jit
def _add_to_census(
    table,
    numbers,
    censuses,
    offset,
    lane,
    inside,
    base,
    of_all,
    row,
    column,
    wrapped,
    has_next,
    score: tl.constexpr,
    n_experts: tl.constexpr,
    weights: tl.constexpr,
    origins: tl.constexpr,
    curvature: tl.constexpr,
    curvatures: tl.constexpr,
    place: tl.constexpr,
    aligned: tl.constexpr,
    block_size: tl.constexpr,
):
    """Add each expert's scores outside of its bracket to its census."""
    base32 = base.to(tl.float32)
    for t in tl.range(0, n_experts):
        w, _, d32, usable = loads.edit_of(
            table, t, offset, lane, inside, base, tl.float32, n_experts, weights, origins, aligned)  # fmt: skip
        h = loads.curvature(
            table, t, offset, lane, inside, row, column, wrapped, has_next,
            n_experts, curvature, curvatures, place, aligned, block_size)  # fmt: skip
        s = stages.score(
            table, numbers, t, h, d32, of_all, inside, row, wrapped, has_next, score, n_experts, place)
        usable &= inside & loads.is_finite(base32) & loads.is_finite(w.to(tl.float32)) & loads.is_curvature(h)
        s = stages.usable_score(s, usable)
        lowest = loads.number(numbers, t, loads.THRESHOLD).to(tl.float32)
        span = loads.integer(table, t, n_experts, loads.SPAN).to(tl.uint32)
        s = tl.where(stages.in_bracket(s, lowest, span), 0.0, s)
        _add_significands(censuses + _CENSUS * t, s, stages.bits(lowest) + tl.maximum(span, 1))


@triton.jit
def _add_significands(sums, s, end):
    """Adds the significands of the block's scores by exponent, those from `end` (bits) upwards apart.

    One sum and one exact atomic addition per exponent that occurs, some twenty of them, instead of an
    addition per element to the same few addresses. Relaxed: nobody reads them before the kernel's end."""
    exponent = (stages.bits(s) >> 23).to(tl.int32)
    significand = ((stages.bits(s) & 0x7FFFFF) + tl.where(exponent > 0, 0x800000, 0)).to(tl.int64)
    above = stages.bits(s) >= end
    e, highest = tl.min(tl.where(s > 0, exponent, _EXPONENTS)), tl.max(exponent)
    while e <= highest:
        of_e = tl.where(exponent == e, significand, 0)
        tl.atomic_add(sums + e, tl.sum(tl.where(above, 0, of_e)), sem="relaxed")
        tl.atomic_add(sums + _EXPONENTS + e, tl.sum(tl.where(above, of_e, 0)), sem="relaxed")
        e += 1
    tl.atomic_add(sums + 2 * _EXPONENTS, tl.sum(above.to(tl.int64)), sem="relaxed")


# Launching it.


@dataclass(frozen=True, slots=True)
class Variant:
    """What the kernel is compiled for; the fields are its constexpr parameters.

    weights, curvatures: stored types; acc: type of the sums; edit .. divide: words of Terms; power: "half",
    "scaled", "one" or "general"; scaled, trimmed: whether some edit_scale is not 1, some trim not 0; floored:
    whether the divisor has a least value; indexed, flat: whether thresholds hold for parts of the flat indices,
    and whether these are asked for; quads: as in `stages.uniform`; place: as in `loads.place_of`; aligned:
    16-byte loads, by_fours: of what belongs to columns; tail: the block that is not full.
    """

    n_experts: int
    weights: tl.dtype
    curvature: str
    curvatures: tl.dtype
    acc: tl.dtype
    edit: str
    score: str
    select: str
    elect: str
    weigh: str
    divide: str
    power: str
    has_base: bool
    origins: bool
    scaled: bool
    trimmed: bool
    floored: bool
    zero_divisor: str
    fallback: str
    repair: bool
    brackets: bool
    census: bool
    indexed: bool
    gathered: bool
    quads: bool
    flat: bool
    place: str
    by_fours: bool
    aligned: bool
    tail: bool = False

    @classmethod
    def of(cls, tile: DeviceTile, terms: Terms, out: torch.Tensor, exact_roots: bool = False) -> Variant:
        """The full blocks' variant for a unified tile. exact_roots: never "scaled" ones."""
        words, c = terms.words, tile.curvatures[0]
        kind, gathered = kind_of(c), tile.index is not None
        rows = by_place(terms) or kind in ("rank1", "log8")
        place = tile.place.kind(tile.numel, gathered) if rows else "none"
        indexed, random = is_indexed(terms), words.select in ("random", "random by rank")
        quads = random and not gathered and tile.start % 4 == 0
        acc = tl.float64 if out.dtype.itemsize >= 4 else tl.float32
        streams = [x for x in (tile.base, *tile.experts, *tile.origins, out) if x is not None]
        streams += [x for c in tile.curvatures for x in streamed(c)]
        return cls(
            n_experts=len(tile.experts),
            weights=TYPES[tile.experts[0].dtype],
            curvature=kind,
            curvatures=TYPES[c.dtype] if kind == "full" else tl.float32,
            acc=acc,
            edit=words.edit,
            score=words.score,
            select=words.select,
            elect=words.elect,
            weigh=words.weigh,
            divide=words.divide,
            power=_power(terms, acc, exact_roots),
            has_base=tile.base is not None,
            origins=bool(tile.origins),
            scaled=any(e.edit_scale != 1 for e in terms.experts),
            trimmed=any(e.trim > 0 for e in terms.experts),
            floored=terms.least > 0,
            zero_divisor=terms.zero,
            fallback="base" if terms.fallback == "base" and tile.base is not None else "mean",
            repair=terms.repair,
            brackets=any(e.span for e in terms.experts),
            census=any(e.census for e in terms.experts),
            indexed=indexed,
            gathered=gathered,
            quads=quads,
            flat=indexed or (random and not quads),
            place=place,
            by_fours=place == "long" and tile.place.by_fours,
            aligned=is_aligned(streams),
        )


def _power(terms: Terms, acc: tl.dtype, exact_roots: bool) -> str:
    """Roots are "scaled" where the score tells of a product h k that overflows (`Merged.is_overdone`), and
    where k keeps the smallest h normal."""
    words = terms.words
    if words.weigh != "curvature":
        return "one"
    if terms.power != 0.5:
        return "one" if terms.power == 1 else "general"
    scores_tell = words.score in ("saliency", "curvature") and not terms.repair
    normal = all(2.0**24 <= e.score_scale <= 2.0**64 for e in terms.experts)
    return "scaled" if acc == tl.float32 and scores_tell and normal and not exact_roots else "half"


def warps(variant: Variant) -> int:
    """Warps of a program: so many that a thread's elements stay in registers, 8 or (in float64) 4."""
    in_float64 = variant.weights == tl.float64 or variant.power == "general"
    return 2 * WARPS if in_float64 else WARPS


@functools.cache
def constants(variant: Variant, block_size: int = BLOCK) -> dict:
    """The kernel's constexpr arguments. A field of `kept_by` has room for a count of a thread's elements, or,
    with many experts, one bit."""
    n_experts = variant.n_experts
    packed = n_experts <= UNROLLED
    variables = {name: getattr(variant, name) for name in Variant.__dataclass_fields__}
    return variables | {
        "unroll": n_experts if packed else 1,
        "packed": packed,
        "keepers": tl.int32 if n_experts <= 8 else tl.int64,
        "width": 4 if packed else 1,
        "fields": triton.next_power_of_2(n_experts) if packed else 1,
        "per_thread": 8 * WARPS // warps(variant),
        "block_size": block_size,
    }


def _scaled(terms: Terms) -> Terms:
    """Weights for roots of h k instead of h."""
    experts = (replace(e, weight_scale=e.weight_scale / e.score_scale**0.5) for e in terms.experts)
    return replace(terms, experts=tuple(experts))


class Undecided(NamedTuple):
    """Elements that some bracket leaves undecided. positions: int32[m], ascending; operands: their inputs,
    curvature as float32; steps: per expert, of each score in its bracket, how many float32 numbers it lies
    above the lowest one (int32)."""

    positions: torch.Tensor
    operands: DeviceTile
    steps: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Merged:
    """What a launched merge will have counted; reading it waits for the device.

    tile: the inputs; terms: what was asked for; totals: int32, one for each count; columns: of the undecided
    elements, each block's from its own beginning on; lengths: how many of each block; censuses: int64[T,
    CENSUS].
    """

    tile: DeviceTile
    terms: Terms
    variant: Variant
    totals: torch.Tensor
    columns: tuple[torch.Tensor, ...] = ()
    lengths: torch.Tensor | None = None
    censuses: torch.Tensor | None = None

    def is_overdone(self, totals: list[int], bad: tuple) -> bool:
        """Whether some root may have overflowed: then merge again with exact ones. bad: the inputs that cannot
        be used, which explain the suspects otherwise."""
        return self.variant.power == "scaled" and totals[-1] > 0 and not bad

    def stats(self, totals: list[int]) -> MergeStats:
        """The counts, from the totals; undecided elements and censuses stay on the device."""
        unkept, overflow, repaired, suspects = totals[-N_TOTALS:]
        n_experts = len(self.tile.experts)
        kept = tuple(totals[:n_experts])
        return MergeStats(
            kept=kept,
            reached=tuple(totals[n_experts : 2 * n_experts]) if self.columns else kept,
            unkept=unkept,
            overflow=overflow,
            repaired=repaired if self.terms.repair else 0,
            nonfinite=nonfinite(self.tile) if suspects else (),
        )

    def undecided(self) -> Undecided:
        """The undecided elements in ascending order: what the blocks have written, one after the other."""
        n_experts, lengths = len(self.tile.experts), self.lengths
        ahead = torch.arange(len(lengths), device=lengths.device) * BLOCK - (lengths.cumsum(0) - lengths)
        shift = torch.repeat_interleave(ahead, lengths)
        order = shift + torch.arange(len(shift), device=shift.device)
        positions, base, *rest = (None if x is None else x[order] for x in self.columns)
        # Kernels run on unified types; a candidate is stored in its tensor's own, which loses nothing.
        given = (self.tile.base, *self.tile.experts)
        stored = zip([base, *rest[:n_experts]], given, strict=True)
        base, *experts = (w if w is None else w.to(own.dtype) for w, own in stored)
        operands = _gathered(self.tile, positions.long(), base, experts, rest[n_experts:])
        found = ((values("scores", operands, t, self.terms)[0], e) for t, e in enumerate(self.terms.experts))
        return Undecided(positions, operands, tuple(_steps(s, e) for s, e in found))


def _gathered(tile: DeviceTile, positions: torch.Tensor, base, experts, curvatures) -> DeviceTile:
    """The elements of a tile at these positions (int64[m]), of which base, experts and curvatures are there."""
    # Arrays by row begin with the first row of a tile that is not gathered itself: there its indices begin too.
    index = tile.place.first + positions if tile.index is None else tile.index[positions]
    return replace(
        tile,
        base=base,
        experts=tuple(experts),
        curvatures=tuple(curvatures),
        origins=tuple(o if o is None else o[positions] for o in tile.origins),
        index=index,
    )


def _steps(s: torch.Tensor, e: ExpertTerms) -> torch.Tensor:
    above_lowest = s.view(torch.int32) - score_bits(e.threshold)
    return above_lowest[(above_lowest >= 0) & (above_lowest < e.span)]


def merge(tile: DeviceTile, terms: Terms, out: torch.Tensor, exact_roots: bool = False) -> Merged:
    """Merge a tile into `out` ([n], any output type) without waiting for the device.

    Raises BackendError for more than 64 experts.
    """
    if len(tile.experts) > MOST:
        raise BackendError(f"the triton backend merges {MOST} experts at most, not {len(tile.experts)}")
    given, tile = tile, unified(tile, by_place(terms))
    variant = Variant.of(tile, terms, out, exact_roots)
    n, n_experts, n_blocks = tile.numel, len(tile.experts), triton.cdiv(tile.numel, BLOCK)
    chances = ()
    if variant.select == "random by rank":
        chances = tuple(chances_of(given, e, t) for t, e in enumerate(terms.experts))
    columns = _columns(tile) if variant.brackets else ()
    asked = _scaled(terms) if variant.power == "scaled" else terms
    table, numbers = operands(tile, asked, variant.acc, chances, columns)
    programs = _programs(tile.device, n_blocks) if n_experts <= UNROLLED else n_blocks
    parts = [(*part, min(part[1] - part[0], programs)) for part in launches(n)]
    n_programs = sum(part[-1] for part in parts)
    rows = n_experts * (1 + variant.brackets) + N_TOTALS
    counts = torch.empty(rows, n_programs, dtype=torch.int32, device=tile.device)
    lengths = counts if not columns else torch.empty(n_blocks, dtype=torch.int32, device=tile.device)
    censuses = None
    if variant.census:
        censuses = torch.zeros(n_experts, CENSUS, dtype=torch.int64, device=tile.device)
    first_program = 0
    for first_block, end_block, tail, programs in parts:
        launch(
            _merge_kernel,
            (programs,),
            out if tile.base is None else tile.base,
            out,
            table,
            numbers,
            counts,
            lengths,
            counts if censuses is None else censuses,
            n,
            first_block,
            end_block,
            first_program,
            n_programs,
            tile.place.first,
            tile.place.columns,
            **constants(replace(variant, tail=tail) if tail else variant),
            num_warps=warps(variant),
            enable_fp_fusion=False,
        )
        first_program += programs
    totals = counts.sum(1, dtype=torch.int32)
    return Merged(given, terms, variant, totals, columns, lengths if columns else None, censuses)


def _programs(device: torch.device, n_blocks: int) -> int:
    """Of a launch over so many blocks."""
    if device.type != "cuda":
        return min(_INTERPRETED_PROGRAMS, n_blocks)
    return min(_PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count, n_blocks)


def _columns(tile: DeviceTile) -> tuple[torch.Tensor | None, ...]:
    """Room for every element of the tile as a candidate: positions, base, weights, curvatures."""
    empty = functools.partial(torch.empty, tile.numel, device=tile.device)
    base = None if tile.base is None else empty(dtype=tile.base.dtype)
    weights = [empty(dtype=w.dtype) for w in tile.experts]
    curvatures = [None if c is None else empty(dtype=torch.float32) for c in tile.curvatures]
    return (empty(dtype=torch.int32), base, *weights, *curvatures)
