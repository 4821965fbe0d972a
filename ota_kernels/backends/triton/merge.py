"""Launches the merge kernel over a tile that is on the device, and reads what it counted."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...errors import BackendError
from ...tensors.result import CENSUS, MergeStats
from ...tensors.terms import ExpertTerms, Formula, Terms, score_bits
from .merge_kernel import MOST, N_TOTALS, UNROLLED, _merge_kernel
from .survey_kernels import scores
from .tiles import (
    BLOCK,
    TYPES,
    WARPS,
    DeviceTile,
    addresses,
    is_aligned,
    kind_of,
    launch,
    launches,
    nonfinite,
    place_of,
    streamed,
    unified,
    upload,
)


@dataclass(frozen=True, slots=True)
class Variant:
    """What the kernel is compiled for; the fields are its constexpr parameters.

    weights, curvatures: stored types; acc: type of the sums; power: "none", "half", "one" or "general";
    aligned: 16-byte loads; aligned_rows: 16-byte loads of rank-1 columns; tail: the block that is not full.
    """

    n_experts: int
    weights: tl.dtype
    curvature: str
    curvatures: tl.dtype
    acc: tl.dtype
    power: str
    has_base: bool
    masked: bool
    brackets: bool
    census: bool
    mask_weights: bool
    fixed_denominator: bool
    elect_signs: bool
    fallback_to_base: bool
    repair: bool
    aligned: bool
    aligned_rows: bool
    tail: bool = False

    @classmethod
    def of(cls, tile: DeviceTile, terms: Terms, out: torch.Tensor) -> Variant:
        """The full blocks' variant for a unified tile."""
        formula, c = terms.formula, tile.curvatures[0]
        kind = kind_of(c)
        streams = [x for x in (tile.base, *tile.experts, out) if x is not None]
        streams += [x for c in tile.curvatures for x in streamed(c)]
        return cls(
            n_experts=len(tile.experts),
            weights=TYPES[tile.experts[0].dtype],
            curvature=kind,
            curvatures=TYPES[c.dtype] if kind == "full" else tl.float32,
            acc=tl.float64 if out.dtype.itemsize >= 4 else tl.float32,
            power=_power(formula),
            has_base=tile.base is not None,
            masked=formula.masked,
            brackets=any(e.span for e in terms.experts),
            census=any(e.census for e in terms.experts),
            mask_weights=formula.mask_weights,
            fixed_denominator=formula.denominator is not None,
            elect_signs=formula.elect_signs,
            fallback_to_base=formula.fallback_to_base and tile.base is not None,
            repair=formula.repair_nonfinite,
            aligned=is_aligned(streams),
            aligned_rows=kind == "rank1" and c.n_columns % 4 == 0 and c.start % 4 == 0,
        )


def warps(variant: Variant) -> int:
    """Warps of a program: so many that a thread's elements stay in registers, 8 or (in float64) 4."""
    in_float64 = variant.weights == tl.float64 or variant.power == "general"
    return 2 * WARPS if in_float64 else WARPS


@functools.cache
def constants(variant: Variant, block_size: int = BLOCK) -> dict:
    """The kernel's constexpr arguments."""
    unroll = variant.n_experts if variant.n_experts <= UNROLLED else 1
    keepers = tl.int32 if variant.n_experts <= UNROLLED else tl.int64
    fields = {name: getattr(variant, name) for name in Variant.__dataclass_fields__}
    return fields | {"unroll": unroll, "keepers": keepers, "block_size": block_size}


def _power(formula: Formula) -> str:
    if not formula.curvature_weights:
        return "none"
    return {0.5: "half", 1.0: "one"}.get(formula.power, "general")


def _numbers(terms: Terms) -> list[float]:
    """The kernel's numbers: of each expert, then of the merge."""
    formula = terms.formula
    experts = [
        (e.threshold, e.score_scale, e.weight_scale, e.edit_scale, e.trim, e.span) for e in terms.experts
    ]
    shared = (terms.epsilon, formula.lambda_, formula.power, formula.denominator or 0.0)
    return [x for e in experts for x in e] + list(shared)


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

    tile: the inputs; terms: what was asked for; counts: int32, a row of blocks for each count; columns: of
    the undecided elements, in the order in which blocks wrote them; censuses: int64[T, CENSUS].
    """

    tile: DeviceTile
    terms: Terms
    counts: torch.Tensor
    columns: tuple[torch.Tensor, ...] = ()
    censuses: torch.Tensor | None = None

    @functools.cached_property
    def _totals(self) -> list[int]:
        return self.counts.sum(1).tolist()

    def stats(self) -> MergeStats:
        """The counts; undecided elements and censuses stay on the device."""
        totals = self._totals
        masks, (unkept, overflow, repaired, suspects) = totals[:-N_TOTALS], totals[-N_TOTALS:][:4]
        kept, reached = (masks[::2], masks[1::2]) if self.columns else (masks, masks)
        return MergeStats(
            kept=tuple(kept),
            reached=tuple(reached),
            unkept=unkept,
            overflow=overflow,
            repaired=repaired if self.terms.formula.repair_nonfinite else 0,
            nonfinite=nonfinite(self.tile) if suspects else (),
        )

    def undecided(self) -> Undecided:
        """The undecided elements in ascending order.

        Blocks append when they are done, so the order is that of the moment: block by block it is put right,
        which reads and writes each candidate once, where sorting would do so for each digit of a position."""
        n_experts = len(self.tile.experts)
        lengths, starts = self.counts[-2:]
        ahead = starts - (lengths.cumsum(0) - lengths)
        shift = torch.repeat_interleave(ahead, lengths, output_size=self._totals[-2])
        order = shift + torch.arange(len(shift), device=shift.device)
        positions, base, *rest = (None if x is None else x[order] for x in self.columns)
        weights = [base, *rest[:n_experts]]
        # Kernels run on unified types; a candidate is stored in its tensor's own, which loses nothing.
        given = (self.tile.base, *self.tile.experts)
        base, *experts = (w if w is None else w.to(own.dtype) for w, own in zip(weights, given, strict=True))
        operands = DeviceTile(base, tuple(experts), tuple(rest[n_experts:]))
        steps = (_steps(operands.expert(t), e) for t, e in enumerate(self.terms.experts))
        return Undecided(positions, operands, tuple(steps))


def _steps(candidates: DeviceTile, terms: ExpertTerms) -> torch.Tensor:
    above_lowest = scores(candidates, terms)[0].view(torch.int32) - score_bits(terms.threshold)
    return above_lowest[(above_lowest >= 0) & (above_lowest < terms.span)]


def merge(tile: DeviceTile, terms: Terms, out: torch.Tensor) -> Merged:
    """Merge a tile into `out` ([n], any output type) without waiting for the device.

    Raises BackendError for more than 64 experts.
    """
    if len(tile.experts) > MOST:
        raise BackendError(f"the triton backend merges {MOST} experts at most, not {len(tile.experts)}")
    given, tile = tile, unified(tile)
    variant = Variant.of(tile, terms, out)
    n, n_blocks = tile.numel, triton.cdiv(tile.numel, BLOCK)
    columns = _columns(tile) if variant.brackets else ()
    first = tile.curvatures[0]
    table, numbers = upload(addresses(tile, columns), _numbers(terms), tile.device)
    rows = len(tile.experts) * (1 + variant.brackets) + N_TOTALS
    counts = torch.empty(rows, n_blocks, dtype=torch.int32, device=tile.device)
    appended, censuses = counts, None
    if variant.brackets:
        appended = torch.zeros(1, dtype=torch.int32, device=tile.device)
    if variant.census:
        censuses = torch.zeros(len(tile.experts), CENSUS, dtype=torch.int64, device=tile.device)
    for first_block, programs, tail in launches(n):
        launch(
            _merge_kernel,
            (programs,),
            out if tile.base is None else tile.base,
            out,
            table,
            numbers,
            counts,
            appended,
            counts if censuses is None else censuses,
            n,
            first_block,
            n_blocks,
            *place_of(first),
            **constants(replace(variant, tail=tail) if tail else variant),
            num_warps=warps(variant),
            enable_fp_fusion=False,
        )
    return Merged(given, terms, counts, columns, censuses)


def _columns(tile: DeviceTile) -> tuple[torch.Tensor | None, ...]:
    """Room for every element of the tile as a candidate: positions, base, weights, curvatures."""
    empty = functools.partial(torch.empty, tile.numel, device=tile.device)
    base = None if tile.base is None else empty(dtype=tile.base.dtype)
    weights = [empty(dtype=w.dtype) for w in tile.experts]
    curvatures = [None if c is None else empty(dtype=torch.float32) for c in tile.curvatures]
    return (empty(dtype=torch.int32), base, *weights, *curvatures)
