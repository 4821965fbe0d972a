"""What rows make of the edits d_t of one matrix: the merged edit at lambda 1, float64[m, n].

r = min(m, n); singular values descend; sums over experts in recipe order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .algebra import NULL, Triples, leading, polar

if TYPE_CHECKING:
    from torch import Tensor


class Edits(Protocol):
    """The experts' edits of one matrix: each is read when it is asked for, as float64[m, n]."""

    shape: tuple[int, int]

    def __len__(self) -> int: ...

    def __getitem__(self, t: int) -> Tensor: ...


@dataclass(frozen=True)
class Formula:
    """What a row makes of a matrix. by_columns: whether it holds [n, n] matrices also where m is smaller."""

    merged: Callable[[Edits], Tensor]
    by_columns: bool = False

    def bytes(self, shape: tuple[int, int]) -> int:
        """Held at most while a matrix of this shape merges: measured, tests/spectral/test_memory.py."""
        side = shape[1] if self.by_columns else min(shape)
        return 8 * (5 * shape[0] * shape[1] + 6 * side * side)


def _stacked(parts: Sequence[Triples]) -> Triples:
    """Side by side."""
    import torch

    us, ss, vts = zip(*parts, strict=True)
    return Triples(torch.cat(us, 1), torch.cat(ss), torch.cat(vts))


def tsv(edits: Edits) -> Tensor:
    """Task singular vectors (arXiv 2412.00081): of each expert the k = floor(r / T) leading triples (1 at
    least), side by side: polar(U*) diag(s*) polar(V*)."""
    k = max(min(edits.shape) // len(edits), 1)
    u, s, vt = _stacked([leading(edits[t], k) for t in range(len(edits))])
    return (polar(u) * s) @ polar(vt)


def iso_c(edits: Edits) -> Tensor:
    """One length for all directions of the sum (arXiv 2502.04959): mean(s) polar(D), D = sum_t d_t."""
    u, s, vt = leading(_sum(edits))
    return (s.sum() / min(edits.shape)) * (u @ vt)


def iso_cts(edits: Edits, common: int) -> Tensor:
    """The leading directions of the sum, and each expert's own beside them (arXiv 2502.04959).

    q = round((r - common) / T) of each expert, kc = r - q T of the sum D; expert t's are the leading triples
    of d_t - Uc Uc^T d_t, those above 2^-24 ||d_t||; all side by side: mean(s*) polar(U*) polar(V*).
    """
    r, count = min(edits.shape), len(edits)
    q = round((r - common) / count)
    kc = max(r - q * count, 0)
    shared = leading(_sum(edits), kc)
    parts = []
    for t in range(count):
        d = edits[t]
        parts.append(leading(d - shared.u @ (shared.u.T @ d), q, NULL * float(d.norm())))
    u, s, vt = _stacked([*parts, shared])
    return (s.sum() / (kc + q * count)) * (polar(u) @ polar(vt))


def _sum(edits: Edits) -> Tensor:
    total = edits[0]
    for t in range(1, len(edits)):
        total += edits[t]
    return total


def covariance(edits: Edits, by_norm: bool, ridge: float = 1e-10) -> Tensor:
    """The edits weighted by their own covariances (ACTMat, arXiv 2604.01329).

    C_t = d_t^T d_t;  A = sum_t g_t C_t;  B = sum_t g_t d_t C_t;  B (A + ridge tr(A) / n I)^-1
    g_t = 1, or by_norm 1 / ||d_t||^2, which makes it the minimum of WUDI's loss. No edits at all: 0.
    """
    import torch

    n = edits.shape[1]
    a = b = 0.0
    for t in range(len(edits)):
        d = edits[t]
        square = float(d.square().sum())
        g = 1.0 if not by_norm else 1 / square if square else 0.0
        c = d.T @ d
        b += g * (d @ c)
        a += g * c
    mean = float(a.diagonal().sum()) / n
    if mean == 0:
        return b
    a.diagonal().add_(ridge * mean)
    return torch.cholesky_solve(b.T, torch.linalg.cholesky(a)).T


def svc(merged: Tensor, edits: Edits, alpha: float) -> Tensor:
    """A merged edit M = U diag(s) V^T whose directions no expert is counted too often in (arXiv 2602.05536).

    a_i = u_i^T M;  b_ti = u_i^T d_t;  p_ti = <a_i, b_ti> / ||b_ti||^2, alpha where b_ti is 0
    U diag(f) U^T M,  f_i = T / sum_t max(alpha, p_ti)
    """
    import torch

    u, s, vt = leading(merged)
    total = torch.zeros_like(s)
    for t in range(len(edits)):
        b = u.T @ edits[t]
        squares = b.square().sum(1)
        shares = s * (vt * b).sum(1) / squares.where(squares > 0, 1.0)
        total += shares.where(squares > 0, alpha).clamp_min(alpha)
    return (u * (s * len(edits) / total)) @ vt
