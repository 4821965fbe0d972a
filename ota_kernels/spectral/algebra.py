"""Singular directions and polar factors of a matrix, from the float64 Gram matrix of its smaller side.

    G = X X^T (X^T X where X is tall) = Q diag(w) Q^T;   polar(X) = U V^T = G^(-1/2) X

by torch.linalg (LAPACK, cuSOLVER), where the matrix lies. Directions of s_i <= s_1 2^-24 count as null and
are left out: a float64 Gram matrix resolves about 2^-26.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

NULL = 2.0**-24  # of the largest singular value

_lock = threading.Lock()
_inside, _threads = 0, 1


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """A block whose linear algebra on the CPU runs on the calling thread alone, so that sums are in one order
    however many threads and processors there are. torch's setting is back once all threads have left."""
    import torch

    global _inside, _threads
    with _lock:
        if _inside == 0:
            _threads = torch.get_num_threads()
        _inside += 1
        torch.set_num_threads(1)  # of this thread, and of those that begin later
        # A thread takes the common number over once, at its first loop or question: here, while it is 1.
        torch.get_num_threads()
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            torch.set_num_threads(_threads)


class Triples(NamedTuple):
    """Leading singular triples, largest first: u [m, k], s [k], vt [k, n], float64."""

    u: Tensor
    s: Tensor
    vt: Tensor


def leading(x: Tensor, k: int | None = None, least: float = 0.0) -> Triples:
    """The k leading triples of x (float64[m, n]), fewer where there are fewer; None: all. least: singular
    values up to it are null too, where x is what rounding may have left of something larger."""
    if x.shape[0] > x.shape[1]:
        vt, s, u = leading(x.T, k, least)
        return Triples(u.T, s, vt.T)
    u = _eigenvectors(x @ x.T, k)
    rows = u.T @ x
    # The length of u^T x is good to a rounding also where the root of an eigenvalue is not.
    s = rows.norm(dim=1)
    kept = int((s > (s[:1] * NULL).clamp_min(least)).sum())
    return Triples(u[:, :kept], s[:kept], rows[:kept].div_(s[:kept, None]))


def polar(x: Tensor) -> Tensor:
    """U V^T of x (float64[m, n]) = U diag(s) V^T; null directions left out."""
    if x.shape[0] > x.shape[1]:
        return polar(x.T).T
    u = _eigenvectors(x @ x.T)
    s = (u.T @ x).norm(dim=1)
    kept = s > s.max() * NULL if len(s) else s > 0
    u, s = u[:, kept], s[kept]
    return ((u / s) @ u.T) @ x


def _eigenvectors(gram: Tensor, k: int | None = None) -> Tensor:
    """Of the k largest eigenvalues (None: all) of a symmetric matrix, the largest first: float64[r, k]."""
    import torch

    found = torch.linalg.eigh(gram)[1]
    return found[:, found.shape[1] - (len(found) if k is None else min(k, len(found))) :].flip(1)
