"""Sums over a tile in plain torch and float64: what the other backends must compute of these names."""

from __future__ import annotations

import numpy as np
import torch


def gram(edits: list[torch.Tensor], columns: int, by: str) -> np.ndarray:
    """Products of edits, sum_i d_s d_t: float64[T, T], or [groups, T, T] by "row" or
    "column" of whole rows."""
    x = torch.stack(edits)
    if by == "tensor":
        return (x @ x.T).numpy()
    x = x.reshape(len(edits), -1, columns)
    return torch.einsum("srk,trk->rst" if by == "row" else "srk,trk->kst", x, x).numpy()


def masked_sums(edits: list[torch.Tensor], masks: list[torch.Tensor]) -> np.ndarray:
    """float64[T, 6]; columns as SUMS (tensors/result.py) names them."""
    together = sum(m.int() for m in masks)
    rows = [
        [m.sum(), d.abs().sum(), d[m].abs().sum(), (d[m] ** 2).sum(), (m & (together > 1)).sum(),
         (m & (together == 1)).sum()]
        for d, m in zip(edits, masks, strict=True)
    ]  # fmt: skip
    return np.array([[float(x) for x in row] for row in rows])


def row_divergence(w: torch.Tensor, origin: torch.Tensor, columns: int) -> np.ndarray:
    """How far rows of w are from those of `origin`: float64[rows], sum p (x - log1p x), x = q / p - 1, p and
    q the softmax of each plus 1e-8 (arcee_fusion): near-equal rows keep their digits."""
    p, q = (torch.softmax(x.reshape(-1, columns), 1) + 1e-8 for x in (w, origin))
    x = (q - p) / p
    return (p * (x - torch.log1p(x)).clamp(min=0)).sum(1).numpy()
