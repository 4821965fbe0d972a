"""out = w_0 + lambda sum_t m_t P_t d_t / sum_t m_t P_t: one pass over a tile, everything in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from ...tensors.result import CENSUS, EXPONENTS
from . import formulas as f
from . import loads

UNROLLED = 16  # experts up to which the loop over them is unrolled: loads are issued long before their use
MOST = 64  # experts: one bit each of `kept_by`

# Where `merge._numbers` puts what: six numbers of each expert, then those of the merge.
_THRESHOLD, _SCORE_SCALE, _WEIGHT_SCALE, _EDIT_SCALE, _TRIM, _SPAN = map(tl.constexpr, range(6))
_N_NUMBERS = tl.constexpr(6)
_EPSILON, _LAMBDA, _POWER, _DENOMINATOR = map(tl.constexpr, range(4))

# Counts beside those of experts: unkept, overflow, repaired, suspects; undecided, where they were appended.
N_TOTALS = 6
_EXPONENTS = tl.constexpr(EXPONENTS)
_CENSUS = tl.constexpr(CENSUS)


@triton.jit(do_not_specialize=["n", "first_block", "n_blocks", "first_element", "n_columns"])
def _merge_kernel(
    base_pointer,
    out_pointer,
    table,
    numbers,
    counts,
    appended,
    censuses,
    n,
    first_block,
    n_blocks,
    first_element,
    n_columns,
    n_experts: tl.constexpr,
    weights: tl.constexpr,
    curvature: tl.constexpr,
    curvatures: tl.constexpr,
    acc: tl.constexpr,
    power: tl.constexpr,
    has_base: tl.constexpr,
    masked: tl.constexpr,
    brackets: tl.constexpr,
    census: tl.constexpr,
    mask_weights: tl.constexpr,
    fixed_denominator: tl.constexpr,
    elect_signs: tl.constexpr,
    fallback_to_base: tl.constexpr,
    repair: tl.constexpr,
    aligned: tl.constexpr,
    aligned_rows: tl.constexpr,
    tail: tl.constexpr,
    unroll: tl.constexpr,
    keepers: tl.constexpr,
    block_size: tl.constexpr,
):
    # One block of the tile: 8 neighbouring elements per thread. 64-bit offsets, 32-bit lanes.
    block = tl.program_id(0) + first_block
    offset = block.to(tl.int64) * block_size
    lane = tl.arange(0, block_size)
    everywhere = loads.everywhere(block_size)
    nowhere = f.negated(everywhere)
    zero = tl.zeros((block_size,), acc)
    inside = loads.inside(lane, n - offset, tail, block_size)
    row, has_next, column, wrapped = 0, False, lane, nowhere
    if curvature == "rank1" or curvature == "log8":
        place = loads.place_in_matrix(offset, n, lane, first_element, n_columns, aligned_rows)
        row, has_next, column, wrapped = place

    of_all = numbers + _N_NUMBERS * n_experts
    epsilon = tl.load(of_all + _EPSILON).to(acc)
    lambda_ = tl.load(of_all + _LAMBDA).to(acc)
    p = tl.load(of_all + _POWER)

    base = zero
    if has_base:
        base = tl.load(base_pointer + offset + lane, mask=inside, other=0).to(acc)
    base32 = base.to(tl.float32)

    # Each expert's elements are read once, and added to the sums where its mask keeps them.
    numerator, denominator, sum_of_weights = zero, zero, zero
    elected = tl.zeros((block_size,), tl.float32)
    kept_by = tl.zeros((block_size,), keepers)  # bit t: m_t
    counted_by = kept_by  # bit t: m_t where the inputs are usable
    survives = kept_by  # bit t: m_t where TIES does not trim
    undecided = nowhere
    unusable = f.negated(f.is_finite(base32))
    for t in tl.range(0, n_experts, loop_unroll_factor=unroll):
        of_t = numbers + _N_NUMBERS * t
        threshold = tl.load(of_t + _THRESHOLD).to(tl.float32)
        w = loads.elements(table, t, offset, lane, inside, weights, aligned)
        h = loads.curvature(table, t, offset, lane, inside, row, has_next, column, wrapped,
                            n_experts, curvature, curvatures, aligned, block_size)  # fmt: skip
        d = w.to(acc) - base
        d32 = w.to(tl.float32) - base32

        s = f.score(h, d32, tl.load(of_t + _SCORE_SCALE).to(tl.float32), has_base)
        keep = s >= threshold if masked else everywhere
        kept_by |= keep.to(keepers) << t
        if brackets:
            undecided |= f.in_bracket(s, threshold, tl.load(of_t + _SPAN).to(tl.uint32))
        if repair:
            usable = f.is_finite(base32) & f.is_finite(w.to(tl.float32)) & f.is_curvature(h)
            counted_by |= (keep & usable).to(keepers) << t
            unusable |= f.negated(usable)
        elif has_base and masked:
            unusable |= f.is_suspect(s)
        else:
            unusable |= f.negated(f.is_finite(w.to(tl.float32)) & f.is_curvature(h))

        edit_scale = tl.load(of_t + _EDIT_SCALE)
        if elect_signs:
            trimmed = edit_scale.to(tl.float32) * d32
            survive = keep & (tl.abs(d32) >= tl.load(of_t + _TRIM).to(tl.float32))
            survives |= survive.to(keepers) << t
            elected += tl.where(survive, trimmed, 0.0)
        else:
            weight = f.weight(h.to(acc), tl.load(of_t + _WEIGHT_SCALE).to(acc), epsilon, p, power)
            kept_weight = tl.where(keep, weight, zero)
            numerator = tl.fma(kept_weight, edit_scale.to(acc) * d, numerator)
            denominator += kept_weight if mask_weights else weight
        if not fallback_to_base:
            sum_of_weights += w.to(acc)

    if elect_signs:  # TIES: of the surviving edits, those that have the sign of their sum
        for t in tl.range(0, n_experts, loop_unroll_factor=unroll):
            of_t = numbers + _N_NUMBERS * t
            w = loads.elements(table, t, offset, lane, inside, weights, aligned)
            edit_scale = tl.load(of_t + _EDIT_SCALE)
            agrees = f.agrees(edit_scale.to(tl.float32) * (w.to(tl.float32) - base32), elected)
            edit = tl.load(of_t + _WEIGHT_SCALE).to(acc) * (edit_scale.to(acc) * (w.to(acc) - base))
            numerator += tl.where(agrees & (((survives >> t) & 1) != 0), edit, zero)

    if fixed_denominator:
        denominator = zero + tl.load(of_all + _DENOMINATOR).to(acc)
    fallback = base if fallback_to_base else f.divide(sum_of_weights, zero + n_experts)
    merged = base + lambda_ * f.divide(numerator, denominator)
    merged = tl.where((kept_by == 0) | (denominator == 0), fallback, merged)
    if repair:
        merged = tl.where(unusable, base, merged)
    written = merged.to(out_pointer.dtype.element_ty)
    tl.store(out_pointer + offset + lane, written, mask=inside)

    decided = inside & f.negated(undecided)
    written = written if acc == tl.float64 else written.to(tl.float32)
    counts += block
    for t in tl.range(0, n_experts, loop_unroll_factor=unroll):
        kept = ((counted_by if repair else kept_by) >> t) & 1
        tl.store(counts, _count(decided & (kept != 0)))
        counts += n_blocks
        if brackets:
            tl.store(counts, _count(inside & (kept != 0)))
            counts += n_blocks
    tl.store(counts, _count(decided & (kept_by == 0)))
    tl.store(counts + n_blocks, _count(decided & f.negated(f.is_finite(written))))
    tl.store(counts + 2 * n_blocks, _count(decided & unusable))
    tl.store(counts + 3 * n_blocks, _count(inside & unusable))

    if brackets:
        wanted = inside & undecided
        m = _count(wanted)
        first = tl.atomic_add(appended, m)
        tl.store(counts + 4 * n_blocks, m)
        tl.store(counts + 5 * n_blocks, first)
        # The candidates' operands are written here, where they are in the cache: reading a tenth of the
        # elements later would read nearly every 32-byte sector again.
        place = first + tl.cumsum(wanted.to(tl.int32), 0) - 1
        columns = table + 3 * n_experts
        tl.store(loads.pointer(columns, 0, tl.int32, True) + place, offset.to(tl.int32) + lane, mask=wanted)
        if has_base:
            bases = loads.pointer(columns, 1, base_pointer.dtype.element_ty, True)
            tl.store(bases + place, tl.load(base_pointer + offset + lane, mask=wanted), mask=wanted)
        for t in tl.range(0, n_experts):
            w = loads.elements(table, t, offset, lane, wanted, weights, aligned)
            tl.store(loads.pointer(columns, 2 + t, weights, True) + place, w, mask=wanted)
            if curvature != "uniform":
                h = loads.curvature(table, t, offset, lane, inside, row, has_next, column, wrapped,
                                    n_experts, curvature, curvatures, aligned, block_size)  # fmt: skip
                hs = loads.pointer(columns, 2 + n_experts + t, tl.float32, True)
                tl.store(hs + place, h, mask=wanted)

    if census:
        for t in tl.range(0, n_experts):
            of_t = numbers + _N_NUMBERS * t
            w = loads.elements(table, t, offset, lane, inside, weights, aligned).to(tl.float32)
            h = loads.curvature(table, t, offset, lane, inside, row, has_next, column, wrapped,
                                n_experts, curvature, curvatures, aligned, block_size)  # fmt: skip
            s = f.score(h, w - base32, tl.load(of_t + _SCORE_SCALE).to(tl.float32), has_base)
            s = f.usable_score(s, inside & f.is_finite(base32) & f.is_finite(w) & f.is_curvature(h))
            lowest = tl.load(of_t + _THRESHOLD).to(tl.float32)
            span = tl.load(of_t + _SPAN).to(tl.uint32)
            s = tl.where(f.in_bracket(s, lowest, span), 0.0, s)
            _add_to_census(censuses + _CENSUS * t, s, f.bits(lowest) + tl.maximum(span, 1))


@triton.jit
def _count(flags):
    return tl.sum(flags.to(tl.int32))


@triton.jit
def _add_to_census(sums, s, end):
    """Adds the significands of the block's scores by exponent, those from `end` (bits) upwards apart.

    One sum and one exact atomic addition per exponent that occurs, some twenty of them, instead of an
    addition per element to the same few addresses."""
    exponent = (f.bits(s) >> 23).to(tl.int32)
    significand = ((f.bits(s) & 0x7FFFFF) + tl.where(exponent > 0, 0x800000, 0)).to(tl.int64)
    above = f.bits(s) >= end
    e, highest = tl.min(tl.where(s > 0, exponent, _EXPONENTS)), tl.max(exponent)
    while e <= highest:
        of_e = tl.where(exponent == e, significand, 0)
        tl.atomic_add(sums + e, tl.sum(tl.where(above, 0, of_e)))
        tl.atomic_add(sums + _EXPONENTS + e, tl.sum(tl.where(above, of_e, 0)))
        e += 1
    tl.atomic_add(sums + 2 * _EXPONENTS, tl.sum(above.to(tl.int64)))
