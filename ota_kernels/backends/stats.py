"""What a merged tile reports, the same for every backend."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NonFinite:
    """Elements of one input that cannot be used. role: "base", "weights" or "curvature"; expert: its index,
    -1 for the base; first: index of the first one within the tile."""

    role: str
    expert: int
    count: int
    first: int


@dataclass(frozen=True, slots=True)
class MergeStats:
    """kept: elements each expert keeps; unkept: kept by nobody; overflow: results beyond the output type's
    range; repaired: set to the base value because an input was not finite."""

    kept: tuple[int, ...]
    unkept: int
    overflow: int
    repaired: int
    nonfinite: tuple[NonFinite, ...]
