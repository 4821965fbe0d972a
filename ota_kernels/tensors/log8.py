"""log8: second moments in 8 bits each, logarithmic, with a scale per row. A row is the last dimension.

    v = level(c) * scale[row]
    level(c) = the float32 with the bits ((32 c - (m (45 - 11 m) >> 2)) << 16) + (64 << 23), m = c & 3
    level(0) = 0

A code is a small float, 6 bits of exponent and 2 of significand, whose significands 1, 1.25, 1.5, 1.75 are
bent to 128, 152, 181, 215 of 128. Of all significands of 8 bits these have the least largest ratio of
neighbours, 181/152, and 17 bits of v tell which is nearest. Decoding is integer arithmetic and one exact
product, never subnormal, so that every backend gets the same float32.
"""

from __future__ import annotations

import itertools

import numpy as np

BIAS = 64  # exponent bits of the lowest octave of levels; the highest is [1, 2)
LARGEST_ERROR = 29 / 333  # (r - 1) / (r + 1) of neighbours of ratio r = 181/152
_OCTAVES = 64
_SIGNIFICANDS = (128, 152, 181, 215, 256)
# Twice the significands midway between neighbours: there a nearest level changes.
_MIDWAY = np.array([a + b for a, b in itertools.pairwise(_SIGNIFICANDS)])
_SHIFT = 15  # bits of a float32 below those that tell its nearest level
_LOWEST_SCALE, _HIGHEST_SCALE = BIAS, 254  # exponent bits: products are normal and finite


def _levels() -> np.ndarray:
    code = np.arange(256, dtype=np.uint32)
    m = code & 3
    bits = ((32 * code - (m * (45 - 11 * m) >> 2)) << 16) + np.uint32(BIAS << 23)
    levels = bits.view(np.float32)
    levels[0] = 0
    return levels


LEVELS = _levels()  # float32[256]
LEVELS.flags.writeable = False


def _quarters() -> np.ndarray:
    """How many quarter octaves above 2^-127 the nearest level of a float32 lies, by its bits >> 15."""
    exponent, significand = np.divmod(np.arange(1 << (31 - _SHIFT)), 1 << (23 - _SHIFT))
    return (4 * exponent + np.searchsorted(_MIDWAY, 256 + significand, side="right")).astype(np.int16)


_QUARTERS = _quarters()


def encode(h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes uint8[rows, columns], scales float32[rows]) of h float32[rows, columns], finite and >= 0.

    0 stays 0, and nothing else becomes 0. A scale is the power of two that puts the row's largest value into
    the top octave of codes, but never below 2^-63. The nearest level is within LARGEST_ERROR of the value,
    relative to it, unless the value is below 2^-62 times the row's largest or below 1.1 * 2^-126 (it becomes
    the lowest level, code 1), or above 1.83 * 2^127 (the highest, at most 17 % below).
    """
    bits = h.view(np.uint32) & np.uint32(0x7FFFFFFF)  # -0 is 0
    quarters = _QUARTERS.take(bits >> _SHIFT)
    exponents = np.clip(quarters.max(axis=1, initial=0) // 4, _LOWEST_SCALE, _HIGHEST_SCALE)
    quarters -= (4 * (exponents - (_OCTAVES - 1)).astype(np.int16))[:, None]
    codes = np.clip(quarters, 1, 255, out=quarters).astype(np.uint8)
    codes *= bits != 0
    return codes, (exponents.astype(np.uint32) << 23).view(np.float32)


def decode(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 of codes (uint8) and the scales of their rows (float32, of a shape that broadcasts)."""
    return LEVELS.take(codes) * scales
