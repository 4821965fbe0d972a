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
        """Held at most while a matrix of this shape merges (`python -m bench.spectral` measures it)."""
        m, n = shape
        return 8 * (6 * m * n + 4 * n * n if self.by_columns else 9 * m * n + 7 * min(shape) ** 2)


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
    common_ones = leading(_sum(edits), kc)
    u, s, vt = _stacked([*(_own(edits[t], common_ones.u, q) for t in range(count)), common_ones])
    del common_ones
    return (s.sum() / (kc + q * count)) * (polar(u) @ polar(vt))


def _own(d: Tensor, shared: Tensor, q: int) -> Triples:
    """The q leading triples of what directions that are shared (orthonormal columns) leave of d."""
    least = NULL * float(d.norm())
    return leading(d.sub_(shared @ (shared.T @ d)), q, least)


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

    m, n = edits.shape
    first = edits[0]
    a, b = first.new_zeros(n, n), first.new_zeros(m, n)
    del first
    for t in range(len(edits)):
        d = edits[t]
        square = float(d.norm()) ** 2
        g = 1.0 if not by_norm else 1 / square if square else 0.0
        c = d.T @ d
        b.addmm_(d, c, alpha=g)
        a.add_(c, alpha=g)
        del d, c
    mean = float(a.diagonal().sum()) / n
    if mean == 0:
        return b
    a.diagonal().add_(ridge * mean)
    return torch.cholesky_solve(b.T, torch.linalg.cholesky(a)).T


def opcm(edits: Edits, alpha: float) -> Tensor:
    """Experts one after another, each without what the merge so far points at (arXiv 2501.09522).

    S_1 = d_1;  S_t = S_{t-1} + d_t - U_k (U_k^T d_t V_k) V_k^T - sum_{i >= k} (u_i^T d_t v_i) u_i v_i^T
    U, s, V of S_{t-1};  k: the first i with (s_0 + .. + s_i) / sum s > alpha, 0 if none
    """
    merged = edits[0]
    for t in range(1, len(edits)):
        merged += _without_known(edits[t], merged, alpha)
    return merged


def _without_known(d: Tensor, merged: Tensor, alpha: float) -> Tensor:
    u, s, vt = leading(merged)
    above = (s.cumsum(0) > alpha * s.sum()).nonzero()
    k = int(above[0]) if len(above) else 0
    products = u.T @ d @ vt.T
    known = products.diagonal().diag()
    known[:k, :k] = products[:k, :k]
    return d.sub_(u @ known @ vt)


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
        squares = b.norm(dim=1).square()
        shares = s * b.mul_(vt).sum(1) / squares.where(squares > 0, 1.0)
        total += shares.where(squares > 0, alpha).clamp_min(alpha)
        del b
    return (u * (s * len(edits) / total)) @ vt
