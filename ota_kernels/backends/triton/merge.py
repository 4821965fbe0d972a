"""out = w_0 + lambda N / D, N = sum_t g_t P_t y_t (tensors/terms.py): one pass over a tile, all in registers.

A program takes every n-th block of the tile and counts in registers, thread by thread; at its end it sums and
writes each count once.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import triton
import triton.language as tl

from ...errors import BackendError
from ...tensors.result import CENSUS
from ...tensors.terms import Terms
from . import loads, outcome, stages
from .outcome import N_TOTALS, Merged
from .table import by_place, chances_of, launch, launches, operands, unified
from .tiles import BLOCK, DeviceTile
from .variant import UNROLLED, Variant, constants, warps

MOST = 64  # experts: one bit each of `kept_by`

# Programs of a launch for each processor of the device: four or more run at once, the rest even out the end.
_PROGRAMS = 16
_INTERPRETED_PROGRAMS = 2
_MOST_BLOCKS = (1 << 13) - 1  # of a program, whose threads count 8 elements of each in 16 bits

_N_TOTALS = tl.constexpr(N_TOTALS)


@triton.jit(
    do_not_specialize=["n", "first_block", "end_block", "first_program", "n_programs", "first", "n_columns"]
)
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
    # 64-bit offsets, 32-bit lanes. One long function: what experts leave behind lies in registers, and Triton
    # 3.2 has no tuples in which to hand so many of them on.
    lane = tl.arange(0, block_size)
    zero = tl.zeros((block_size,), acc)
    column_of_counts = counts + first_program + tl.program_id(0)
    # Of kept edits, and with brackets, in the upper 16 bits, of those that reach them.
    kept_counts = tl.zeros((block_size // per_thread, fields), tl.int32)
    other_counts = tl.zeros((block_size // per_thread, _N_TOTALS), tl.int32)
    lambda_ = loads.shared(numbers, n_experts, loads.LAMBDA).to(acc)
    for block in tl.range(first_block + tl.program_id(0), end_block, tl.num_programs(0)):
        offset = tl.cast(block, tl.int64) * block_size
        inside = loads.inside_of(lane, n - offset, tail, block_size)
        row, column, wrapped, has_next = loads.place_of(
            table, offset, n, lane, inside, first, n_columns,
            n_experts, place, by_fours)  # fmt: skip
        index = loads.flat_index(table, n_experts, offset, lane, inside, gathered) if flat else lane
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
            for t in tl.range(0, n_experts):
                flag = ((counted >> t) & 1) != 0
                to = column_of_counts + t * n_programs
                tl.store(to, loads.int32_sum((decided & flag).to(tl.int32), 0))
                if brackets:
                    tl.store(to + n_experts * n_programs, loads.int32_sum((inside & flag).to(tl.int32), 0))

        if brackets:
            outcome.append(
                base_pointer, table, lengths, block, offset, n, lane, tl.where(inside, undecided, 0), first,
                n_columns, n_experts, weights, curvature, curvatures, has_base, place, unroll,
                block_size)  # fmt: skip
        if census:
            outcome.add_to_census(
                table, numbers, censuses, offset, lane, inside, base, of_all, row, column, wrapped, has_next,
                score, n_experts, weights, origins, curvature, curvatures, place, aligned,
                block_size)  # fmt: skip

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


def _scaled(terms: Terms) -> Terms:
    """Weights for roots of h k instead of h."""
    experts = (replace(e, weight_scale=e.weight_scale / e.score_scale**0.5) for e in terms.experts)
    return replace(terms, experts=tuple(experts))


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
        chances = tuple(chances_of(given, terms, t) for t in range(len(terms.experts)))
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
    return Merged(
        given, terms, variant.power == "scaled", totals, columns, lengths if columns else None, censuses
    )


def _programs(device: torch.device, n_blocks: int) -> int:
    """Of a launch over so many blocks."""
    wanted = _INTERPRETED_PROGRAMS
    if device.type == "cuda":
        wanted = _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
    return min(max(wanted, triton.cdiv(n_blocks, _MOST_BLOCKS)), n_blocks)


def _columns(tile: DeviceTile) -> tuple[torch.Tensor | None, ...]:
    """Room for every element of the tile as a candidate: positions, base; weights and curvatures by expert
    (None: all 1), [T, n] of whole blocks."""
    n, experts = triton.cdiv(tile.numel, BLOCK) * BLOCK, len(tile.experts)
    empty = functools.partial(torch.empty, device=tile.device)
    base = None if tile.base is None else empty(n, dtype=tile.base.dtype)
    weights = empty(experts, n, dtype=tile.experts[0].dtype)
    curvatures = None if tile.curvatures[0] is None else empty(experts, n, dtype=torch.float32)
    return empty(n, dtype=torch.int32), base, weights, curvatures
