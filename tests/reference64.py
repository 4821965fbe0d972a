"""What a merge must compute, straight from the formulas: values in float64, decisions in float32.

Numpy alone; shares no code with the package. A saliency, and so a mask, is a float32 number by definition:
(h 2^32) (2^16 d)^2 with h and d in float32, compared with the float32 of 2^64 theta. The edits that TIES
trims and elects by, and those whose norms `rescale` compares, are the same float32 d.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

GLOBAL_DEFAULTS = {
    "epsilon": 1e-26,
    "normalise": "none",
    "power": 0.5,
    "lambda": 1.0,
    "fallback_to_base": True,
    "density_scope": "model",
    "mask_weights": True,
    "masked_task_vector_merge_method": "precond",
    "ties_density": 1.0,
    "rescale": False,
    "rescale_relative_threshold": 0.0,
    "on_nonfinite": "error",
    "normalize": True,
}
MODEL_DEFAULTS = {
    "precond_threshold": None,
    "density": None,
    "saliency_mass": None,
    "scaling_factor": 1.0,
    "rank1_approx": False,
    "weight": 1.0,
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of every model. base: float64[shape] or None; experts: float64[shape] each; curvatures:
    float32[shape] each, or None for curvature 1; role: embedding, output, matrix or vector; bias_corrections:
    1 - beta2^step of each expert, by which its curvature is divided."""

    base: np.ndarray | None
    experts: tuple[np.ndarray, ...]
    curvatures: tuple[np.ndarray, ...] | None
    role: str = "vector"
    bias_corrections: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Merged:
    """out: float64[shape]; masks: bool[T, *shape]; unkept: bool[shape], kept by nobody; operand:
    float64[shape], the largest magnitude that was added up."""

    out: np.ndarray
    masks: np.ndarray
    unkept: np.ndarray
    operand: np.ndarray


def evaluate(model: dict[str, Tensor], method: str = "ota", **parameters) -> dict[str, Merged]:
    """Merge a model. parameters: recipe keys; a key of one model is one value, or a list of T values."""
    shared = GLOBAL_DEFAULTS | {k: v for k, v in parameters.items() if k in GLOBAL_DEFAULTS}
    n_experts = len(next(iter(model.values())).experts)
    own = [
        {k: _of_expert(parameters.get(k, default), t) for k, default in MODEL_DEFAULTS.items()}
        for t in range(n_experts)
    ]
    if method == "linear":
        return {name: _linear(tensor, shared, own) for name, tensor in model.items()}
    curvatures = {name: _curvatures(tensor, own) for name, tensor in model.items()}
    masks = _masks(model, curvatures, shared, own)
    with np.errstate(invalid="ignore", over="ignore"):
        weights = _weights(model, curvatures, shared, own)
        return {
            name: _ota(tensor, curvatures[name], masks[name], weights[name], shared)
            for name, tensor in model.items()
        }


def _of_expert(value, t: int):
    return value[t] if isinstance(value, list | tuple) else value


def _linear(tensor: Tensor, shared: dict, own: list[dict]) -> Merged:
    weights = [o["weight"] for o in own]
    total = sum(weights) if shared["normalize"] else 1.0
    terms = [a * w / total for a, w in zip(weights, tensor.experts, strict=True)]
    shape = tensor.experts[0].shape
    return Merged(
        out=sum(terms),
        masks=np.ones((len(own), *shape), bool),
        unkept=np.zeros(shape, bool),
        operand=np.max([np.abs(x) for x in (*terms, *tensor.experts)], axis=0),
    )


def task_vector(w: np.ndarray, base: np.ndarray | None) -> np.ndarray:
    """d_t in float32."""
    w32 = w.astype(np.float32)
    return w32 if base is None else w32 - base.astype(np.float32)


def score(h: np.ndarray, d: np.ndarray | None, bias_correction: float = 1.0) -> np.ndarray:
    """The saliency times 2^64 in float32; d None: without a base."""
    if d is None:
        return h * np.float32(2.0**64 / bias_correction)
    scaled = d * np.float32(2.0**16)
    return (h * np.float32(2.0**32 / bias_correction)) * (scaled * scaled)


def rank1(v: np.ndarray) -> np.ndarray:
    """R_i C_j / sum(R) of a matrix, float32: sums are rounded to float32, as a file holds them, and so is
    C / sum(R); then they are multiplied."""
    v = v.astype(np.float64)
    rows, columns = np.float32(v.sum(axis=1)), np.float32(v.sum(axis=0))
    total = rows.sum(dtype=np.float64)
    return np.outer(rows, np.float32(columns / total) if total > 0 else columns)


def _curvatures(tensor: Tensor, own: list[dict]) -> list[tuple[np.ndarray, float]]:
    """(h_t float32, the bias correction it must still be divided by) of each expert."""
    n_experts = len(tensor.experts)
    corrections = tensor.bias_corrections or (1.0,) * n_experts
    found = []
    for t in range(n_experts):
        if tensor.curvatures is None:
            found.append((np.ones(tensor.experts[t].shape, np.float32), 1.0))
        elif own[t]["rank1_approx"] and tensor.experts[t].ndim == 2 and tensor.experts[t].size:
            found.append((rank1(tensor.curvatures[t]), corrections[t]))
        else:
            found.append((tensor.curvatures[t], corrections[t]))
    return found


def _unusable(tensor: Tensor, curvatures: list[tuple[np.ndarray, float]], t: int) -> np.ndarray:
    h = curvatures[t][0]
    bad = ~np.isfinite(tensor.experts[t].astype(np.float32)) | ~(np.isfinite(h) & (h >= 0))
    return bad if tensor.base is None else bad | ~np.isfinite(tensor.base.astype(np.float32))


def kept_by_density(scores: np.ndarray, density: float) -> np.ndarray:
    """The floor(density n) largest scores, ties kept, zeros dropped. density as the decimal it is written."""
    if density >= 1:
        return np.ones(scores.shape, bool)
    k = int(Fraction(str(density)) * scores.size)
    if k == 0:
        return np.zeros(scores.shape, bool)
    return (scores >= np.sort(scores.ravel())[::-1][k - 1]) & (scores > 0)


def kept_by_mass(scores: np.ndarray, share: float) -> np.ndarray:
    """The fewest of the largest scores that hold the share of the total, ties kept; in exact fractions."""
    values, counts = np.unique(scores[scores > 0], return_counts=True)
    target = Fraction(str(share)) * sum(
        Fraction(float(v)) * int(n) for v, n in zip(values, counts, strict=True)
    )
    held, threshold = Fraction(0), np.inf
    for value, count in zip(values[::-1], counts[::-1], strict=True):
        if held >= target:
            break
        held += Fraction(float(value)) * int(count)
        threshold = value
    return scores >= threshold if threshold != np.inf else np.zeros(scores.shape, bool)


def _select(scores: np.ndarray, own: dict) -> np.ndarray:
    if own["density"] is not None:
        return kept_by_density(scores, own["density"])
    return kept_by_mass(scores, own["saliency_mass"])


def _masks(
    model: dict[str, Tensor], curvatures: dict, shared: dict, own: list[dict]
) -> dict[str, np.ndarray]:
    """m_t of every tensor: bool[T, *shape]."""
    # Curvature 1 is not comparable with second moments: where only some tensors have it, they keep
    # everything, unless each tensor is decided by itself.
    everywhere_uniform = all(tensor.curvatures is None for tensor in model.values())
    part = [n for n in model if everywhere_uniform or model[n].curvatures is not None]
    masks = {name: np.ones((len(own), *t.experts[0].shape), bool) for name, t in model.items()}
    for t, o in enumerate(own):
        scores, usable_scores = {}, {}
        for name, tensor in model.items():
            h, correction = curvatures[name][t]
            with np.errstate(invalid="ignore", over="ignore"):
                d = None if tensor.base is None else task_vector(tensor.experts[t], tensor.base)
                scores[name] = score(h, d, correction)
            usable_scores[name] = np.where(
                _unusable(tensor, curvatures[name], t), np.float32(0), scores[name]
            )
        if o["precond_threshold"] is not None:
            with np.errstate(over="ignore"):
                threshold = np.float32(o["precond_threshold"] * 2.0**64)
            for name in part:
                masks[name][t] = scores[name] >= threshold
        elif o["density"] is None and o["saliency_mass"] is None:
            continue
        elif shared["density_scope"] == "tensor":
            for name in model:
                masks[name][t] = _select(usable_scores[name], o)
        else:
            kept = _select(np.concatenate([usable_scores[n].ravel() for n in part]), o)
            ends = np.cumsum([model[n].experts[0].size for n in part])
            for name, piece in zip(part, np.split(kept, ends[:-1]), strict=True):
                masks[name][t] = piece.reshape(masks[name][t].shape)
    return masks


def _weights(
    model: dict[str, Tensor], curvatures: dict, shared: dict, own: list[dict]
) -> dict[str, np.ndarray]:
    """P_t before masking: float64[T, *shape] of every tensor."""

    def raw(name: str, t: int) -> np.ndarray:
        h, correction = curvatures[name][t]
        # scaling_factor multiplies h^p: n(g h^p), the key's published meaning
        return own[t]["scaling_factor"] * (h.astype(np.float64) / correction) ** shared["power"]

    def total(name: str, t: int) -> float:
        h, _ = curvatures[name][t]
        return float(np.where(np.isfinite(h) & (h >= 0), raw(name, t), 0.0).sum())

    epsilon = shared["epsilon"]
    elements = sum(tensor.experts[0].size for tensor in model.values())
    found = {}
    for name, tensor in model.items():
        rows = []
        for t in range(len(own)):
            if shared["normalise"] == "none":
                divisor = 1.0
            elif shared["normalise"] == "global":
                divisor = total(name, t) / max(tensor.experts[0].size, 1) + epsilon
            else:
                divisor = sum(total(n, t) for n in model) / max(elements, 1) + epsilon
            rows.append((raw(name, t) / divisor if divisor > 0 else 0.0 * raw(name, t)) + epsilon)
        found[name] = np.stack(rows)
    return found


def norm(edits: np.ndarray, role: str) -> float:
    """The operator norm by which `rescale` measures edits: l1 -> RMS, RMS -> RMS, or RMS."""
    edits = edits.astype(np.float64)
    if edits.size == 0:
        return 0.0
    if role == "matrix":
        d_out, d_in = edits.shape
        return float(np.sqrt(d_in / d_out) * np.linalg.norm(edits, 2))
    if role == "embedding":  # a token is one-hot over the rows
        return max(float(np.sqrt(np.mean(row**2))) for row in edits)
    if role == "output":  # a hidden unit is one-hot over the columns
        return max(float(np.sqrt(np.mean(column**2))) for column in edits.T)
    return float(np.sqrt(np.mean(edits**2)))


def edit_scale(d: np.ndarray, mask: np.ndarray, role: str, relative_threshold: float) -> float:
    """r_t = norm(d_t) / norm(m_t d_t), 0 where the masked norm is too small a share."""
    whole, masked = norm(d, role), norm(np.where(mask, d, 0), role)
    return 0.0 if masked == 0 or masked < relative_threshold * whole else whole / masked


def _ota(tensor: Tensor, curvatures: list, masks: np.ndarray, weights: np.ndarray, shared: dict) -> Merged:
    variant, n_experts = shared["masked_task_vector_merge_method"], len(tensor.experts)
    base = np.zeros(tensor.experts[0].shape) if tensor.base is None else tensor.base
    d32 = [task_vector(w, tensor.base) for w in tensor.experts]
    scales = [1.0] * n_experts
    if shared["rescale"]:
        relative = shared["rescale_relative_threshold"]
        scales = [edit_scale(d, m, tensor.role, relative) for d, m in zip(d32, masks, strict=True)]
    edits = np.stack([r * (w - base) for r, w in zip(scales, tensor.experts, strict=True)])

    if variant == "precond":
        numerator = np.where(masks, weights * edits, 0.0).sum(axis=0)
        denominator = np.where(masks | (not shared["mask_weights"]), weights, 0.0).sum(axis=0)
    else:
        survivors = masks if variant == "linear" else _elected(d32, scales, masks, shared["ties_density"])
        numerator = np.where(survivors, edits, 0.0).sum(axis=0)
        denominator = np.full(base.shape, float(n_experts))

    unkept = ~masks.any(axis=0)
    to_base = shared["fallback_to_base"] and tensor.base is not None
    fallback = base if to_base else sum(tensor.experts) / n_experts
    merged = base + shared["lambda"] * numerator / np.where(denominator == 0, 1.0, denominator)
    out = np.where(unkept | (denominator == 0), fallback, merged)
    if shared["on_nonfinite"] == "base":
        bad = np.any([_unusable(tensor, curvatures, t) for t in range(n_experts)], axis=0)
        out = np.where(bad, base, out)
    magnitudes = [np.abs(base), *np.abs(tensor.experts), *np.abs(shared["lambda"] * edits)]
    return Merged(out, masks, unkept, np.max(magnitudes, axis=0))


def _elected(d32: list[np.ndarray], scales: list[float], masks: np.ndarray, density: float) -> np.ndarray:
    """TIES: which edits survive trimming and agree with the sign of the sum of the survivors."""
    trimmed = []
    for d, r, mask in zip(d32, scales, masks, strict=True):
        edits = np.where(mask, d, np.float32(0))
        trimmed.append(
            np.float32(r) * np.where(kept_by_density(np.abs(edits), density), edits, np.float32(0))
        )
    elected = np.zeros_like(d32[0])
    for x in trimmed:
        elected = elected + x
    return np.stack([(x != 0) & (np.sign(x) == np.sign(elected)) for x in trimmed])
