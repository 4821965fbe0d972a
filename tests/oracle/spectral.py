"""Rows of whole matrices (FIELD section 2), by float64 singular value decompositions of the edits themselves.

Matrices are 2-D tensors of the role "matrix", and each [m, n] of a 3-D tensor of the role "experts". All else
is w_0 + lambda mean_t(m_t d_t), or with `elsewhere: ota` OTA's merge. Masks m_t are OTA's.

Each formula returns the merged edit at lambda 1 and its condition: by how much a rounding of the largest
singular value of an edit grows in the result at most. Directions with s_i <= s_1 2^-24 are null and left out;
of what iso_cts leaves of d_t, those up to ||d_t|| 2^-24 too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from . import options, ota
from .parameters import Method, Model, Settings
from .tensors import Merged, Tensor, merged, share_of

NULL = 2.0**-24
Found = tuple[np.ndarray, float]  # edit, condition


def svd(x: np.ndarray, k: int | None = None, least: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k leading triples, without null directions."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    kept = s > np.maximum(s[:1] * NULL, least)
    return u[:, kept][:, :k], s[kept][:k], vt[kept][:k]


def _stacked(parts: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    us, ss, vts = zip(*parts, strict=True)
    return np.concatenate(us, 1), np.concatenate(ss), np.concatenate(vts)


def polar(x: np.ndarray) -> np.ndarray:
    u, _, vt = svd(x)
    return u @ vt


def _least(x: np.ndarray) -> float:
    """1 over the least singular value that is not null."""
    _, s, _ = svd(x)
    return 1 / s[-1] if len(s) else 1.0


def _cut(x: np.ndarray, k: int, least: float = 0.0) -> float:
    """How ill defined the span of the k leading directions is, and each direction by its length."""
    s = np.linalg.svd(x, compute_uv=False)
    kept = s[: min(k, int((s > np.maximum(s[:1] * NULL, least)).sum()))]
    if not len(kept):
        return 1.0
    rest = s[len(kept)] if len(kept) < len(s) else 0.0
    return max(s[0], least) ** 2 / max(kept[-1] ** 2 - rest**2, 1e-300)


def tsv(d: list[np.ndarray]) -> Found:
    k = max(min(d[0].shape) // len(d), 1)
    u, s, vt = _stacked([svd(x, k) for x in d])
    condition = max(_cut(x, k) for x in d) * _least(u) * _least(vt)
    return polar(u) @ np.diag(s) @ polar(vt), condition


def iso_c(d: list[np.ndarray]) -> Found:
    total = sum(d)
    s = np.linalg.svd(total, compute_uv=False)
    return s.mean() * polar(total), _cut(total, len(s))


def iso_cts(d: list[np.ndarray], common: float) -> Found:
    r, total = min(d[0].shape), sum(d)
    q = round((r - share_of(r, common)) / len(d))
    kc = max(r - q * len(d), 0)
    shared = svd(total, kc)
    rests = [x - shared[0] @ shared[0].T @ x for x in d]
    nulls = [NULL * np.linalg.norm(x) for x in d]
    u, s, vt = _stacked([*(svd(x, q, least) for x, least in zip(rests, nulls, strict=True)), shared])
    spans = [_cut(total, kc), *(_cut(x, q, least) for x, least in zip(rests, nulls, strict=True))]
    condition = max(spans) * _least(u) * _least(vt)
    return s.sum() / (kc + q * len(d)) * polar(u) @ polar(vt), condition


def covariance(d: list[np.ndarray], weights: str, ridge: float = 1e-10) -> Found:
    squares = [float(np.square(x).sum()) for x in d]
    g = [1.0 if weights == "equal" else 1 / q if q else 0.0 for q in squares]
    a = sum(w * x.T @ x for w, x in zip(g, d, strict=True))
    b = sum(w * x @ x.T @ x for w, x in zip(g, d, strict=True))
    mean = np.trace(a) / a.shape[0]
    if mean == 0:
        return np.zeros_like(b), 1.0
    a = a + ridge * mean * np.eye(len(a))
    return np.linalg.solve(a, b.T).T, np.linalg.cond(a)


def opcm(d: list[np.ndarray], alpha: float) -> Found:
    merged, condition = d[0], 1.0
    for x in d[1:]:
        u, s, vt = svd(merged)
        reached = [i for i in range(len(s)) if s[: i + 1].sum() / s.sum() > alpha]
        k = reached[0] if reached else 0
        change = x - u[:, :k] @ (u[:, :k].T @ x @ vt[:k].T) @ vt[:k]
        for i in range(k, len(s)):
            change = change - (u[:, i] @ x @ vt[i]) * np.outer(u[:, i], vt[i])
        squares = np.square(np.append(s, 0.0))
        if len(s):  # each direction of the rest counts by itself
            condition += len(s) * squares[0] / max(-np.diff(squares).max(), 1e-300)
        merged = merged + change
    return merged, condition


def svc(m: np.ndarray, d: list[np.ndarray], alpha: float) -> Found:
    u, s, _ = svd(m)
    a = u.T @ m
    total = np.zeros(len(s))
    for x in d:
        b = u.T @ x
        for i in range(len(s)):
            square = b[i] @ b[i]
            total[i] += max(alpha, a[i] @ b[i] / square if square else alpha)
    return u @ np.diag(len(d) / total) @ u.T @ m, _cut(m, len(s))


FORMULAS: dict[str, Callable[[list[np.ndarray], Settings], Found]] = {
    "tsv": lambda d, settings: tsv(d),
    "iso_c": lambda d, settings: iso_c(d),
    "iso_cts": lambda d, settings: iso_cts(d, settings["common"]),
    "covariance": lambda d, settings: covariance(d, settings["covariance_weights"]),
    "opcm": lambda d, settings: opcm(d, settings["alpha"]),
}


def by_matrix(d: np.ndarray, formula: Callable[[list[np.ndarray]], np.ndarray]) -> np.ndarray:
    """The formula of each matrix of float64[T, .., m, n]."""
    if d.ndim == 3:
        return formula(list(d))
    return np.stack([formula(list(d[:, e])) for e in range(d.shape[1])])


def row(name: str) -> Callable:
    def evaluate(model: Model, settings: dict[str, Settings]) -> dict[str, Merged]:
        curvatures = {n: ota._curvatures(t, settings[n]) for n, t in model.items()}
        masks = ota._masks(model, curvatures, settings)
        weights = ota._weights(model, curvatures, settings)
        return {
            n: _merged(name, t, curvatures[n], masks[n], weights[n], settings[n]) for n, t in model.items()
        }

    return evaluate


def matched(evaluate: Callable) -> Callable:
    """With the mean length of the experts' edits, over the whole model; the factor to six digits."""

    def evaluate_matched(model: Model, settings: dict[str, Settings]) -> dict[str, Merged]:
        factor = float(f"{options.norm_factor(model, evaluate(model, settings), settings):.6g}")
        return evaluate(model, options.scaled(settings, dict.fromkeys(settings, factor)))

    return evaluate_matched


def _merged(name: str, tensor: Tensor, curvatures, masks, weights, settings: Settings) -> Merged:
    if tensor.role in ("matrix", "experts") and tensor.size:
        edits = np.where(masks, tensor.edits(), 0.0)
        found = by_matrix(edits, lambda d: FORMULAS[name](d, settings)[0])
        out = tensor.base + settings["lambda"] * found
        return merged(out, tensor, [settings["lambda"] * found], masks)
    shared = ota.SHARED | settings.shared
    if settings["elsewhere"] != "ota":
        times = len(tensor.experts) if settings["elsewhere"] == "sum" else 1
        shared |= {"masked_task_vector_merge_method": "linear", "lambda": times * settings["lambda"]}
    return ota._ota(tensor, curvatures, masks, weights, replace(settings, shared=shared))


def calibrated(model: Model, found: dict[str, Merged], alpha: float | None = None) -> dict[str, Merged]:
    """After any row: the matrices of what it merged."""

    def of_matrix(d: list[np.ndarray]) -> np.ndarray:
        return svc(d[0], d[1:], 1 / len(d[1:]) if alpha is None else alpha)[0]

    result = {}
    for name, tensor in model.items():
        m = found[name]
        if tensor.role in ("matrix", "experts") and tensor.size:
            new = by_matrix(np.concatenate([(m.out - tensor.base)[None], tensor.edits()]), of_matrix)
            m = replace(m, out=tensor.base + new, operand=np.maximum(m.operand, np.abs(new)))
        result[name] = m
    return result


_SHARED = {
    "elsewhere": "mean",
    "power": 0.5,
    "normalise": "model",
    "epsilon": 1e-26,
    "density_scope": "model",
    "missing_curvature": "error",
    "bias_correction": False,
}
_OWN = {
    key: ota.OWN[key]
    for key in (
        "precond_threshold",
        "density",
        "saliency_mass",
        "preconditioner_path",
        "rank",
        "rank1_approx",
    )
} | {"scaling_factor": 1.0}

METHODS = {
    name: Method(row(name), _SHARED | own, _OWN, base="required", least=1)
    for name, own in {
        "tsv": {},
        "iso_c": {},
        "iso_cts": {"common": 0.8},
        "covariance": {"covariance_weights": "equal"},
    }.items()
} | {
    "opcm": Method(matched(row("opcm")), _SHARED | {"alpha": 0.5, "elsewhere": "sum"}, _OWN, least=1),
}
