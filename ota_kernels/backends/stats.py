"""What a merged tile reports, the same for every backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..tensors import TensorInputs


@dataclass(frozen=True, slots=True)
class NonFinite:
    """Elements of one input that cannot be used. role: "base", "weights" or "curvature"; expert: its index,
    -1 for the base; first: index of the first one within the tile."""

    role: str
    expert: int
    count: int
    first: int


# A census of one expert's scores, undecided ones left out, int64[CENSUS]: sums of significands by exponent,
# of the scores up to the end of the bracket and of those above it; last, how many are above.
EXPONENTS = 256
CENSUS = 2 * EXPONENTS + 1


class Candidates(NamedTuple):
    """Elements of a tile that some expert's bracket leaves undecided.

    positions: uint32[m], ascending; operands: their inputs, m elements each, curvature as float32.
    """

    positions: np.ndarray
    operands: TensorInputs

    def copy(self) -> Candidates:
        """In memory of their own."""
        return Candidates(self.positions.copy(), self.operands.copy())


@dataclass(frozen=True, slots=True)
class MergeStats:
    """kept: elements each expert keeps; unkept: kept by nobody; overflow: results beyond the output type's
    range; repaired: set to the base value because an input was not finite. Undecided elements count nowhere
    but as not finite. candidates: None where every threshold is known; censuses: per expert, None where not
    asked for."""

    kept: tuple[int, ...]
    unkept: int
    overflow: int
    repaired: int
    nonfinite: tuple[NonFinite, ...]
    candidates: Candidates | None = None
    censuses: tuple[np.ndarray | None, ...] = ()
