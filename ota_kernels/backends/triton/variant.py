"""What the merge kernel is compiled for."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...tensors.terms import Terms
from .table import by_place, is_aligned, is_indexed
from .tiles import BLOCK, TYPES, WARPS, DeviceTile, kind_of, streamed

UNROLLED = 16  # experts up to which loops over them are unrolled: loads are issued long before their use


@dataclass(frozen=True, slots=True)
class Variant:
    """What the kernel is compiled for; the fields are its constexpr parameters.

    weights, bases, outs, curvatures: stored types; acc: type of the sums; edit .. divide: words of Terms;
    power: "half", "scaled", "one" or "general"; scaled, trimmed: whether some edit_scale is not 1, some trim
    not 0; floored: whether the divisor has a least value; indexed, flat: whether thresholds hold for parts of
    the flat indices, and whether these are asked for; quads: random numbers by `stages.draw`; place: as in
    `loads.place_of`; aligned: 16-byte loads, by_fours: of what belongs to columns; tail: the block that is
    not full; listed: undecided elements, whose results go to their positions."""

    n_experts: int
    weights: tl.dtype
    bases: tl.dtype
    outs: tl.dtype
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
    listed: bool = False

    @classmethod
    def of(cls, tile: DeviceTile, terms: Terms, out: torch.Tensor, exact_roots: bool = False) -> Variant:
        """The full blocks' variant for a unified tile. exact_roots: never "scaled" ones."""
        words, c = terms.words, tile.curvatures[0]
        kind, gathered = kind_of(c), tile.index is not None
        rows = by_place(terms) or kind in ("rank1", "log8")
        place = tile.place.kind(tile.numel, gathered) if rows else "none"
        indexed, random = is_indexed(terms), words.select in ("random", "random by rank")
        quads = words.select == "random" and not gathered and tile.start % 4 == 0
        quads &= len(tile.experts) <= UNROLLED
        acc = tl.float64 if out.dtype.itemsize >= 4 else tl.float32
        streams = [x for x in (tile.base, *tile.experts, *tile.origins, out) if x is not None]
        streams += [x for c in tile.curvatures for x in streamed(c)]
        return cls(
            n_experts=len(tile.experts),
            weights=TYPES[tile.experts[0].dtype],
            bases=TYPES[(tile.experts[0] if tile.base is None else tile.base).dtype],
            outs=TYPES[out.dtype],
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
            floored=words.divide == "kept weights" and terms.least > 0,
            zero_divisor=terms.zero,
            fallback="base" if terms.fallback == "base" and tile.base is not None else "mean",
            repair=terms.repair,
            brackets=any(e.span or e.wanted for e in terms.experts),
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
    """Warps of a program: so many that a thread's elements stay in registers, 8 or (in float64, with a
    census, or with places of their own) 4."""
    in_float64 = variant.acc == tl.float64 or variant.power == "general"
    places = variant.place in ("narrow", "wide", "gathered")  # a row and a column of each element
    return 2 * WARPS if in_float64 or places or variant.census else WARPS


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
