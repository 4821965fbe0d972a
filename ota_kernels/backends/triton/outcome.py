"""What a merge gives beside its elements: counts, a census of scores, and the elements that it leaves
undecided."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from ...tensors.result import CENSUS, EXPONENTS, MergeStats, NonFinite
from ...tensors.terms import ExpertTerms, Terms, score_bits
from . import loads, stages
from .survey import values
from .tiles import DeviceTile, nonfinite

# Counts beside those of experts: unkept, overflow, repaired, suspects.
N_TOTALS = 4

_EXPONENTS = tl.constexpr(EXPONENTS)
_GROUP = tl.constexpr(8)  # exponents: the significands of 2^27 elements, shifted by 7 at most, fit 64 bits
_CENSUS = tl.constexpr(CENSUS)


@triton.jit
def by_thread(packed, fields: tl.constexpr, per_thread: tl.constexpr, block_size: tl.constexpr):
    """int32[threads, fields]: the fields of 4 bits, summed over the elements of each thread, 15 at most: no
    thread needs another one's for that."""
    field = tl.arange(0, fields)
    sums = _thread_sums(packed.to(tl.int32), per_thread, block_size)[:, None]
    if fields > 8:  # of 64 bits, in halves: they are added and shifted in one instruction
        high = _thread_sums((packed >> 32).to(tl.int32), per_thread, block_size)[:, None]
        sums = tl.where(field[None, :] < 8, sums, high)
    return (sums >> (4 * (field & 7))[None, :]) & 15


@triton.jit
def _thread_sums(x, per_thread: tl.constexpr, block_size: tl.constexpr):
    return tl.sum(tl.reshape(x, (block_size // per_thread, per_thread)), 1)


@triton.jit
def store_counts(to, found, n_programs, n_rows: tl.constexpr, fields: tl.constexpr):
    """The sums of int32[threads, fields] into the program's column of n_rows rows."""
    row = tl.arange(0, fields)
    tl.store(to + row * n_programs, loads.int32_sum(found, 0), mask=row < n_rows)


@triton.jit
def listed(table, n_experts: tl.constexpr):
    """How many undecided elements a list holds. table: from the list's own row on."""
    found = tl.load(loads.scalar_pointer(table, n_experts, loads.LENGTHS, tl.int32, False))
    return tl.minimum(found, loads.scalar(table, n_experts, loads.ROOM))


@triton.jit
def append(
    base_pointer,
    table,
    program,
    filled,
    offset,
    n,
    lane,
    wanted,
    first,
    n_columns,
    tail: tl.constexpr,
    n_experts: tl.constexpr,
    weights: tl.constexpr,
    bases: tl.constexpr,
    curvature: tl.constexpr,
    curvatures: tl.constexpr,
    has_base: tl.constexpr,
    place: tl.constexpr,
    unroll: tl.constexpr,
    block_size: tl.constexpr,
):
    """Write the block's wanted elements (1, else 0) behind the `filled` ones of the program's list, while
    they are in the cache: reading a tenth of the elements later would read nearly every 32-byte sector again.
    Returns how many the list would have with room for all.

    Positions first; then as many threads as a program has take one element each and all that belongs to it,
    instead of every element's thread a masked turn."""
    room = loads.scalar(table, n_experts, loads.ROOM)
    if tail:
        part = loads.scalar(table, n_experts, loads.PROGRAMS)
    else:
        part = program - loads.scalar(table, n_experts, loads.PROGRAM)
    begin = loads.scalar(table, n_experts, loads.BEGIN) + part * room
    positions = loads.scalar_pointer(table, n_experts, loads.POSITIONS, tl.int32, True) + begin
    end = filled + loads.int32_sum(wanted, 0)
    last = end if tail else tl.minimum(end, room.to(tl.int32))
    place_in_list = filled + tl.cumsum(wanted, 0) - 1
    tl.store(
        positions + place_in_list, offset.to(tl.int32) + lane, mask=(wanted != 0) & (place_in_list < last)
    )
    tl.debug_barrier()  # each thread's positions are seen by all
    of_base = loads.scalar_pointer(table, n_experts, loads.LISTED_BASE, bases, True) + begin
    ws = loads.scalar_pointer(table, n_experts, loads.LISTED_WEIGHTS, weights, True) + begin
    hs = loads.scalar_pointer(table, n_experts, loads.LISTED_VALUES, tl.float32, True) + begin
    stride = loads.scalar(table, n_experts, loads.STRIDE)
    each: tl.constexpr = "narrow" if place == "whole" or place == "long" else place
    for first_one in tl.range(filled, last, block_size // 8):
        at = first_one + tl.arange(0, block_size // 8)
        there = at < last
        which = tl.load(positions + at, mask=there, other=0) - offset.to(tl.int32)
        if has_base:
            tl.store(of_base + at, tl.load(base_pointer + offset + which, mask=there), mask=there)
        row, column, wrapped, has_next = loads.place_of(
            table, offset, n, which, there, first, n_columns,
            n_experts, each, False)  # fmt: skip
        for t in tl.range(0, n_experts, loop_unroll_factor=unroll):
            w = loads.elements(table, loads.WEIGHTS * n_experts + t, offset, which, there, weights, False)
            tl.store(ws + t * stride + at, w, mask=there)
            if curvature != "uniform":
                h = loads.curvature(
                    table, t, offset, which, there, row, column, wrapped, has_next,
                    n_experts, curvature, curvatures, each, False, block_size // 8)  # fmt: skip
                tl.store(hs + t * stride + at, h, mask=there)
    return end


@triton.jit
def add_to_census(
    table,
    numbers,
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
    censuses = loads.scalar_pointer(table, n_experts, loads.CENSUSES, tl.int64, False)
    for t in tl.range(0, n_experts):
        w, _, d32, usable = loads.edit_of(
            table, t, offset, lane, inside, base, tl.float32, n_experts, weights, origins, aligned
        )
        h = loads.curvature(
            table, t, offset, lane, inside, row, column, wrapped, has_next,
            n_experts, curvature, curvatures, place, aligned, block_size)  # fmt: skip
        s = stages.score(
            table, numbers, t, h, d32, of_all, inside, row, wrapped, has_next, score, n_experts, place
        )
        usable &= inside & loads.is_finite(base32) & loads.is_finite(w.to(tl.float32)) & loads.is_curvature(h)
        s = stages.usable_score(s, usable)
        lowest = loads.number(numbers, t, loads.THRESHOLD).to(tl.float32)
        span = loads.integer(table, t, n_experts, loads.SPAN).to(tl.uint32)
        s = tl.where(stages.in_bracket(s, lowest, span), 0.0, s)
        _add_significands(censuses + _CENSUS * t, s, stages.bits(lowest) + tl.maximum(span, 1))


@triton.jit
def _add_significands(sums, s, end):
    """Adds the significands of the block's scores by groups of exponents, those from `end` (bits) upwards
    apart: at the lowest exponent of a group, as multiples of its unit (`of_exponents` takes them apart).

    One sum and one exact atomic addition per group that occurs, three or four of them, instead of an addition
    per element to the same few addresses. Relaxed: nobody reads them before the kernel's end."""
    exponent = (stages.bits(s) >> 23).to(tl.int32)
    significand = ((stages.bits(s) & 0x7FFFFF) + tl.where(exponent > 0, 0x800000, 0)).to(tl.int64)
    place = tl.maximum(exponent, 1) - 1  # the exponents 0 and 1 have one unit
    shifted = significand << (place % _GROUP).to(tl.int64)
    group = place // _GROUP
    above = stages.bits(s) >= end
    g, last = tl.min(tl.where(s > 0, group, _EXPONENTS)), tl.max(group)
    while g <= last:
        of_g = tl.where(group == g, shifted, 0)
        at = sums + g * _GROUP + 1
        tl.atomic_add(at, tl.sum(tl.where(above, 0, of_g)), sem="relaxed")
        tl.atomic_add(at + _EXPONENTS, tl.sum(tl.where(above, of_g, 0)), sem="relaxed")
        g += 1
    tl.atomic_add(sums + 2 * _EXPONENTS, tl.sum(above.to(tl.int64)), sem="relaxed")


def of_exponents(censuses: np.ndarray) -> np.ndarray:
    """int64[T, CENSUS] of the kernel with its sums at exponents at which they are no larger than sums of
    significands are, so that those of many tiles can be added up."""
    found = censuses.copy()
    lowest = np.arange(1, EXPONENTS, _GROUP.value)
    further = np.minimum(_GROUP.value - 1, EXPONENTS - 2 - lowest)  # 254: the last exponent of finite scores
    for sums in (found[:, :EXPONENTS], found[:, EXPONENTS:-1]):
        whole = sums[:, lowest]
        sums[:, lowest] = whole & ((1 << further) - 1)
        sums[:, lowest + further] += whole >> further
    return found


def unusable(tile: DeviceTile, terms: Terms) -> tuple[NonFinite, ...]:
    """The inputs of a suspect tile that cannot be used. Scores of -0 and those that overflow are suspect,
    too: a read of each expert tells them apart before plain torch counts."""
    suspect = (values("scores", tile, t, terms)[1] for t in range(len(terms.experts)))
    return nonfinite(tile) if any(map(bool, suspect)) else ()


class Undecided(NamedTuple):
    """Elements that some bracket leaves undecided. positions: int32[m], ascending; operands: their inputs,
    curvature as float32; steps: per expert, of each score in its bracket, how many float32 numbers it lies
    above the lowest one (int32)."""

    positions: torch.Tensor
    operands: DeviceTile
    steps: tuple[torch.Tensor, ...]


class Lists(NamedTuple):
    """Undecided elements as the programs of a launch list them, one room after the other. positions:
    int32[n]; base: [n] or None; weights: [T, n]; curvatures: float32[T, n] or None (all 1); lengths:
    int32[programs], how many each has found."""

    positions: torch.Tensor
    base: torch.Tensor | None
    weights: torch.Tensor
    curvatures: torch.Tensor | None
    lengths: torch.Tensor


class Rooms(NamedTuple):
    """Where the lists of one tile are: of programs from `first` on, `count` of them, with a room of so many
    elements each, from `begin` on; then that of program `tail` (-1: there is none)."""

    first: int
    count: int
    tail: int
    begin: int
    room: int


@dataclass(frozen=True)
class Merged:
    """What a launched merge will have counted; reading it waits for the device.

    tile: the inputs; terms: what was asked for; scaled_roots: of h k instead of h; together: of the tiles
    that were launched with it, int32[tiles, counts], and its own place there; lists, rooms: of undecided
    elements; censuses: int64[T, CENSUS]."""

    tile: DeviceTile
    terms: Terms
    scaled_roots: bool
    together: torch.Tensor
    place: int
    lists: Lists | None = None
    rooms: Rooms | None = None
    censuses: torch.Tensor | None = None

    @property
    def totals(self) -> torch.Tensor:
        """int32, one for each count."""
        return self.together[self.place]

    def is_overdone(self, totals: list[int], bad: tuple) -> bool:
        """Whether some root may have overflowed: then merge again with exact ones. bad: the inputs that
        cannot be used, which explain the suspects otherwise."""
        return self.scaled_roots and totals[-1] > 0 and not bad

    def stats(self, totals: list[int]) -> MergeStats:
        """The counts, from the totals; undecided elements and censuses stay on the device."""
        unkept, overflow, repaired, suspects = totals[-N_TOTALS:]
        n_experts = len(self.tile.experts)
        kept = tuple(totals[:n_experts])
        return MergeStats(
            kept=kept,
            reached=tuple(totals[n_experts : 2 * n_experts]) if self.lists else kept,
            unkept=unkept,
            overflow=overflow,
            repaired=repaired if self.terms.repair else 0,
            nonfinite=unusable(self.tile, self.terms) if suspects else (),
        )

    def undecided(self) -> Undecided | None:
        """The undecided elements in ascending order; None where a list had no room for all. Waits once."""
        first, count, tail, begin, room = self.rooms
        lengths = self.lists.lengths[first : first + count]
        short = (lengths > room).sum()
        if tail >= 0:
            lengths = torch.cat([lengths, self.lists.lengths[tail : tail + 1]])
        found, is_short = torch.stack([lengths.sum(), short]).tolist()
        if is_short:
            return None
        ahead = begin + torch.arange(len(lengths), device=lengths.device) * room
        ahead -= lengths.cumsum(0) - lengths
        listed = torch.repeat_interleave(ahead, lengths, output_size=found)
        listed += torch.arange(found, device=listed.device)
        positions, order = self.lists.positions[listed].sort()
        parts = (None if x is None else x[..., listed[order]] for x in self.lists[1:4])
        base, weights, curvatures = parts
        # Kernels run on unified types; a candidate is stored in its tensor's own, which loses nothing.
        own = [w.dtype for w in self.tile.experts]
        operands = _gathered(
            self.tile,
            positions.long(),
            None if base is None else base.to(self.tile.base.dtype),
            [w.to(dtype) for w, dtype in zip(weights, own, strict=True)],
            (None,) * len(own) if curvatures is None else curvatures,
        )
        scores = ((values("scores", operands, t, self.terms)[0], e) for t, e in enumerate(self.terms.experts))
        return Undecided(positions, operands, tuple(_steps(s, e) for s, e in scores))


def _gathered(tile: DeviceTile, positions: torch.Tensor, base, experts, curvatures) -> DeviceTile:
    """The elements of a tile at these positions (int64[m]); base, experts and curvatures: theirs."""
    # Arrays by row begin with the first row of a tile that is not gathered itself: so do its indices.
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
