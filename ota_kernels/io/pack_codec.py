"""Records of a pack: which elements of a tile are kept, and what is stored of each. README.md has the
format; the decoder is csrc/pack_records.hpp."""

from __future__ import annotations

import numpy as np

TILE = 1 << 16  # elements of a tile; the last one of a tensor may be shorter
_MOST_RICE = 16
_BITMAP, _ALL = 64, 65  # first bytes of masks that are no Rice parameter


def tiles_of(start: int, stop: int) -> range:
    """Numbers of the tiles that elements [start, stop) are in."""
    return range(start // TILE, -(-stop // TILE) if stop > start else start // TILE)


def encode_mask(positions: np.ndarray, n: int) -> bytes:
    """Which of n elements are kept, in as few bytes as a bitmap or coded gaps take. positions: ascending
    integers[count], each once."""
    if len(positions) == 0:
        return b""
    if len(positions) == n:
        return bytes([_ALL])
    positions = positions.astype(np.int64, copy=False)
    gaps = np.diff(positions, prepend=-1) - 1
    # The best parameter is near log2 of the mean gap.
    near = max(0, int(n / len(positions)).bit_length() - 1)
    choices = range(max(0, near - 2), min(_MOST_RICE, near + 1) + 1)
    sizes = {k: int((gaps >> k).sum()) + len(gaps) * (1 + k) for k in choices}
    k = min(sizes, key=sizes.__getitem__)
    if sizes[k] >= n:
        bits = np.zeros(n, np.uint8)
        bits[positions] = 1
        return bytes([_BITMAP]) + np.packbits(bits, bitorder="little").tobytes()
    return bytes([k]) + _rice(gaps, k, sizes[k]).tobytes()


def _rice(gaps: np.ndarray, k: int, size: int) -> np.ndarray:
    """Each gap as gap >> k zeros, a one, and its low k bits, lowest first. size: bits of all."""
    high = gaps >> k
    ones = np.cumsum(high + 1 + k) - 1 - k
    bits = np.zeros(size, np.uint8)
    bits[ones] = 1
    for place in range(k):
        bits[ones + 1 + place] = gaps >> place & 1
    return np.packbits(bits, bitorder="little")


def encode_signs(positive: np.ndarray) -> bytes:
    """bool[count] as bits."""
    return np.packbits(positive, bitorder="little").tobytes()
