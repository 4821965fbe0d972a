"""out = w_0 + lambda N / D, N = sum_t g_t P_t y_t (tensors/terms.py): one pass over a tile, all in registers.

A program takes every n-th block of one tile and counts in registers, thread by thread; at its end it sums and
writes each count once. A launch is of many tiles (batch.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import loads, outcome, stages
from .outcome import N_TOTALS

_N_TOTALS = tl.constexpr(N_TOTALS)


@triton.jit(do_not_specialize=["first_program", "n_programs"])
def _merge_kernel(
    table,
    numbers,
    tiles,
    counts,
    first_program,
    n_programs,
    n_experts: tl.constexpr,
    weights: tl.constexpr,
    bases: tl.constexpr,
    outs: tl.constexpr,
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
    listed: tl.constexpr,
    unroll: tl.constexpr,
    packed: tl.constexpr,
    keepers: tl.constexpr,
    width: tl.constexpr,
    fields: tl.constexpr,
    per_thread: tl.constexpr,
    block_size: tl.constexpr,
):
    # 64-bit offsets, 32-bit lanes. One long function: what experts leave behind lies in registers, and Triton
    # 3.2 has no tuples in which to hand so many of them on.
    lane = tl.arange(0, block_size)
    zero = tl.zeros((block_size,), acc)
    program = first_program + tl.program_id(0)
    tile = tl.load(tiles + program)
    table = loads.row_of_table(table, program if listed else tile, n_experts)
    numbers = loads.row_of_numbers(numbers, tile, n_experts)
    n = outcome.listed(table, n_experts) if listed else loads.scalar(table, n_experts, loads.N)
    first, n_columns = loads.place_in_rows(table, n_experts, place)
    first_block = (n // block_size).to(tl.int32)
    end_block, step = first_block + 1, 1
    if listed:
        first_block, end_block = 0, tl.cdiv(n, block_size).to(tl.int32)
    elif not tail:
        end_block = first_block
        first_block = program - loads.scalar(table, n_experts, loads.PROGRAM).to(tl.int32)
        step = loads.scalar(table, n_experts, loads.PROGRAMS).to(tl.int32)
    # Of kept edits, and with brackets, in the upper 16 bits, of those that reach them.
    kept_counts = tl.zeros((block_size // per_thread, fields), tl.int32)
    other_counts = tl.zeros((block_size // per_thread, _N_TOTALS), tl.int32)
    filled = first_block * 0  # undecided elements in the program's list
    for block in tl.range(first_block, end_block, step):
        offset = tl.cast(block, tl.int64) * block_size
        inside = loads.inside_of(lane, n - offset, tail, block_size)
        row, column, wrapped, has_next = loads.place_of(
            table, offset, n, lane, inside, first, n_columns,
            n_experts, place, by_fours)  # fmt: skip
        index = loads.flat_index(table, n_experts, offset, lane, inside, gathered) if flat else lane
        base_pointer = loads.scalar_pointer(table, n_experts, loads.BASE, bases, aligned)
        base = tl.load(base_pointer + offset + lane, mask=inside, other=0).to(acc) if has_base else zero
        base32 = base.to(tl.float32)
        drawn = stages.draw(table, numbers, offset, n_experts, keepers, block_size) if quads else lane
        of_all = base32
        if score == "spread":
            of_all = stages.spread(
                table, offset, lane, inside, base, n_experts, weights, origins, aligned, unroll
            )

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
                table, t, offset, lane, inside, base, acc, n_experts, weights, origins, aligned
            )
            h = loads.curvature(
                table, t, offset, lane, inside, row, column, wrapped, has_next,
                n_experts, curvature, curvatures, place, aligned, block_size)  # fmt: skip
            s = stages.score(
                table, numbers, t, h, d32, of_all, inside, row, wrapped, has_next, score, n_experts, place
            )
            keep = stages.select(
                table, numbers, t, s, offset, lane, inside, index, drawn,
                select, n_experts, indexed, quads)  # fmt: skip
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
                v = stages.vote_of(table, numbers, t, d32, offset, lane, inside, edit, n_experts)
                elected, winner = stages.vote(v, survive, elected, winner, t, elect)
            elif weigh != "alone":
                numerator, denominator = _add(
                    numerator, denominator, table, numbers, t, d, h, survive, survive, offset, lane, inside,
                    row, column, wrapped, has_next, zero,
                    edit, weigh, divide, power, scaled, n_experts, place, acc)  # fmt: skip
            if fallback == "mean":
                sum_of_weights += w.to(acc)

        if elect == "largest":
            added_by = tl.where(winner >= 0, tl.full((block_size,), 1, keepers) << (winner * width), 0)
        elif elect == "agreement" or (elect != "none" and weigh == "alone"):
            added_by = stages.agreeing(
                table, numbers, offset, lane, inside, base, added_by, elected,
                edit, elect, n_experts, weights, origins, aligned, keepers, width, unroll)  # fmt: skip
        if elect != "none" or weigh == "alone":
            is_alone = (added_by != 0) & ((added_by & (added_by - 1)) == 0)
            for t in tl.range(0, n_experts, loop_unroll_factor=unroll):
                _, d, d32, _ = loads.edit_of(
                    table, t, offset, lane, inside, base, acc, n_experts, weights, origins, aligned
                )
                h = loads.curvature(
                    table, t, offset, lane, inside, row, column, wrapped, has_next,
                    n_experts, curvature, curvatures, place, aligned, block_size)  # fmt: skip
                added = ((added_by >> (t * width)) & 1) != 0
                if (elect == "sum" or elect == "count") and weigh != "alone":
                    v = stages.vote_of(table, numbers, t, d32, offset, lane, inside, edit, n_experts)
                    tie = loads.shared(numbers, n_experts, loads.TIE).to(tl.float32)
                    added &= stages.agrees(v, elected, tie, tie, elect)
                numerator, denominator = _add(
                    numerator, denominator, table, numbers, t, d, h, added, is_alone, offset, lane, inside,
                    row, column, wrapped, has_next, zero,
                    edit, weigh, divide, power, scaled, n_experts, place, acc)  # fmt: skip

        denominator = stages.divisor(numbers, denominator, divide, floored, zero_divisor, n_experts, acc)
        mean = stages.divide(sum_of_weights, zero + n_experts) if fallback == "mean" else base
        lambda_ = loads.shared(numbers, n_experts, loads.LAMBDA).to(acc)
        merged = base + lambda_ * stages.divide(numerator, denominator)
        merged = tl.where((kept_by == 0) | (denominator == 0), mean, merged)
        bad = unusable >= 0x7F800000
        if repair:
            merged = tl.where(bad, base, merged)
        written = merged.to(outs)
        out_pointer = loads.scalar_pointer(table, n_experts, loads.OUT, outs, aligned)
        if listed:
            positions = loads.scalar_pointer(table, n_experts, loads.POSITIONS, tl.int32, False)
            tl.store(out_pointer + tl.load(positions + offset + lane, mask=inside), written, mask=inside)
        else:
            tl.store(out_pointer + offset + lane, written, mask=inside)

        decided = inside
        if brackets:
            decided &= undecided == 0
        written = written if acc == tl.float64 else written.to(tl.float32)
        others = tl.where(decided & (kept_by == 0), 1, 0)
        others += tl.where(decided & loads.negated(loads.is_finite(written)), 1 << 4, 0)
        others += tl.where(inside & bad, 1 << 12, 0)
        if repair:
            others += tl.where(decided & bad, 1 << 8, 0)
        other_counts += outcome.by_thread(others, _N_TOTALS, per_thread, block_size)
        counted = counted_by if repair else kept_by
        if packed:
            kept = tl.where(decided, counted, 0) if brackets or tail else counted
            kept_counts += outcome.by_thread(kept, fields, per_thread, block_size)
            if brackets:
                reached = tl.where(inside, counted, 0) if tail else counted
                kept_counts += outcome.by_thread(reached, fields, per_thread, block_size) << 16
        else:  # a program has one block
            column_of_counts = counts + program
            for t in tl.range(0, n_experts):
                flag = ((counted >> t) & 1) != 0
                to = column_of_counts + t * n_programs
                tl.store(to, loads.int32_sum((decided & flag).to(tl.int32), 0))
                if brackets:
                    tl.store(to + n_experts * n_programs, loads.int32_sum((inside & flag).to(tl.int32), 0))

        if brackets:
            filled = outcome.append(
                base_pointer, table, program, filled, offset, n, lane, tl.where(inside, undecided, 0), first,
                n_columns, tail, n_experts, weights, bases, curvature, curvatures, has_base, place, unroll,
                block_size)  # fmt: skip
        if census:
            outcome.add_to_census(
                table, numbers, offset, lane, inside, base, of_all, row, column, wrapped, has_next,
                score, n_experts, weights, origins, curvature, curvatures, place, aligned,
                block_size)  # fmt: skip

    if brackets:
        tl.store(loads.scalar_pointer(table, n_experts, loads.LENGTHS, tl.int32, False) + program, filled)
    column_of_counts = counts + program
    if packed and brackets:
        to = column_of_counts + n_experts * n_programs
        outcome.store_counts(column_of_counts, kept_counts & 0xFFFF, n_programs, n_experts, fields)
        outcome.store_counts(to, (kept_counts >> 16) & 0xFFFF, n_programs, n_experts, fields)
    elif packed:
        outcome.store_counts(column_of_counts, kept_counts, n_programs, n_experts, fields)
    to = column_of_counts + n_experts * (2 if brackets else 1) * n_programs
    outcome.store_counts(to, other_counts, n_programs, _N_TOTALS, _N_TOTALS)


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
    offset,
    lane,
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
    elif edit == "by chance":
        y = stages.divide(d, stages.chance(table, t, offset, lane, inside, n_experts).to(acc))
    if scaled:
        y = loads.number(numbers, t, loads.EDIT_SCALE).to(acc) * y
    weight = stages.weigh(
        table, numbers, t, h, is_alone, inside, row, column, wrapped, has_next, zero,
        weigh, power, n_experts, place, acc)  # fmt: skip
    kept_weight = tl.where(added, weight, zero)
    denominator += stages.share_of_divisor(weight, kept_weight, added, divide)
    return tl.fma(kept_weight, y, numerator), denominator
