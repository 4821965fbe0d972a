"""Whole numbers of a share."""

from __future__ import annotations

import math
from fractions import Fraction


def share_of(share: float, total: int) -> int:
    """floor(share * total), with the share taken as the decimal it was written as: 0.57 of 100 is 57,
    although the float64 product is 56.99..."""
    return math.floor(Fraction(repr(float(share))) * total)
