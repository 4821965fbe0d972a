"""Random numbers that are the same everywhere: Philox 4x32-10 (Salmon et al., SC 2011).

    key = (seed mod 2^32, low half of H),   counter = (g mod 2^32, g div 2^32, expert, high half of H)
    H: the first 8 bytes, little endian, of BLAKE2b of the tensor's name;   g = i div 4, i the flat index
    element i takes word i mod 4 of the four;   u = (word >> 8) 2^-24, a float32 in [0, 1)

`random by rank` (MagPrune, arXiv 2406.11617): in a row of L elements, the one of rank j = 0 .. L-1,
ascending in (|d32|, i), has p = float32((probability - spread) + 2 spread j / (L - 1)) in float64
arithmetic; L = 1: p = float32(probability).
"""

from __future__ import annotations

import hashlib

import numpy as np

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def name_hash(name: str) -> int:
    """H of a tensor's name, 64 bits."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def philox(key: tuple[int, int], counter: tuple[np.ndarray | int, ...]) -> tuple[np.ndarray, ...]:
    """The four words, uint32[m] each, of counters of four words (uint32[m] or numbers)."""
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, np.uint64) for c in counter))
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(_ROUNDS):
        first, second = c0 * np.uint64(_MULTIPLIERS[0]), c2 * np.uint64(_MULTIPLIERS[1])
        c0, c1, c2, c3 = (second >> half) ^ c1 ^ k0, second & mask, (first >> half) ^ c3 ^ k1, first & mask
        k0, k1 = (k0 + np.uint64(_WEYL[0])) & mask, (k1 + np.uint64(_WEYL[1])) & mask
    return tuple(c.astype(np.uint32) for c in (c0, c1, c2, c3))


def uniform(seed: int, name: int, expert: int, index: np.ndarray) -> np.ndarray:
    """u of the elements at `index` (int64[n]), float32[n]. name: the tensor's `name_hash`."""
    index = np.asarray(index, np.uint64)
    group, inverse = np.unique(index >> np.uint64(2), return_inverse=True)
    low, high = group & np.uint64(0xFFFFFFFF), group >> np.uint64(32)
    key = (seed & 0xFFFFFFFF, name & 0xFFFFFFFF)
    words = np.stack(philox(key, (low, high, expert, name >> 32)), axis=-1).reshape(len(group), 4)
    word = words[inverse, (index & np.uint64(3)).astype(np.int64)]
    return (word >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def probability_of_rank(probability: float, spread: float, rank: np.ndarray, length: int) -> np.ndarray:
    """p of elements of these ranks (int64[n]) in a row of `length`, float32[n]."""
    if length == 1:
        return np.full(np.shape(rank), probability, np.float32)
    return ((probability - spread) + 2 * spread * rank / (length - 1)).astype(np.float32)
