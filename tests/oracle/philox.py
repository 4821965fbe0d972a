"""Random draws that depend on what is drawn for, and on nothing else: Philox 4x32-10.

    h       = the 8 bytes of blake2b(tensor name in UTF-8, digest_size=8), as a little-endian integer
    key     = (seed mod 2^32, h mod 2^32)
    counter = ((i // 4) mod 2^32, (i // 4) >> 32, expert position, h >> 32)    i: flat index in the tensor
    u       = (word i mod 4 of the output) >> 8, times 2^-24                      float32 in [0, 1), exact
    kept    when u < p, both float32

Expert position: place in the recipe from 0, the base not counted; an expert keeps its own where others lack
the tensor. Ten rounds of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11):

    (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0))
    (k0, k1) <- (k0 + W0, k1 + W1) after each round but the last, modulo 2^32
"""

from __future__ import annotations

import hashlib

import numpy as np

M0, M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
W0, W1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """uint32[..., 4] of counters uint32[..., 4] and one key of two 32-bit words."""
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter).astype(np.uint64), -1, 0)
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = M0 * c0, M1 * c2  # 32 by 32 bits: no overflow in 64
        c0, c1, c2, c3 = (
            (product1 >> _32) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _32) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + W0) & 0xFFFFFFFF, (k1 + W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def name_hash(name: str) -> int:
    """64 bits of a tensor's name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def uniforms(seed: int, name: str, position: int, start: int, stop: int) -> np.ndarray:
    """u of the elements start .. stop-1 of one expert's tensor, float32 in [0, 1)."""
    first, last = start // 4, -(-stop // 4)
    block = np.arange(first, last, dtype=np.uint64)
    h = name_hash(name)
    counter = np.empty((block.size, 4), np.uint32)
    counter[:, 0] = block & _LOW
    counter[:, 1] = block >> _32
    counter[:, 2] = position
    counter[:, 3] = h >> 32
    words = philox4x32(counter, (seed & 0xFFFFFFFF, h & 0xFFFFFFFF)).ravel()
    u = (words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
    return u[start - 4 * first : stop - 4 * first]
