"""OTA merging with Fast Fisher Grafting (arXiv 2509.11167), and its rows `ffg` and `localize_stitch`.

Decisions, all float32: the saliency (h 2^32) ((2^16 d) (2^16 d)), with h and d in float32 (d = float32(w) -
float32(w_0)); without a base h times 2^64; a bias correction c makes the factor of h float32(2^32 / c). It is
compared with float32(2^64 theta). Equal saliencies are kept together, saliency 0 is not kept by a density
below 1. TIES trims |d| and elects by sum_t float32(r_t) d_t, added in recipe order; `rescale` compares norms
of the same d, taken in float64.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from .parameters import Method, Model, Settings, places, same_everywhere
from .tensors import Merged, Tensor, merged, share_of, task_vector

SHARED = {
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
    # What these change happens before a merge, or shows in speed alone.
    "approximate_norm": False,
    "bias_correction": False,
    "missing_curvature": "error",
}
OWN = {
    "precond_threshold": None,
    "density": None,
    "saliency_mass": None,
    "scaling_factor": 1.0,
    "rank": None,
    "rank1_approx": False,
    "weight": 1.0,
    "preconditioner_path": None,
}


def ota(model: Model, settings: dict[str, Settings]) -> dict[str, Merged]:
    """w_0 + lambda sum_t P_t d_t / sum_t P_t, P_t = m_t (n(g_t h_t^p) + eps); variants `linear`, `ties`."""
    curvatures = {name: _curvatures(tensor, settings[name]) for name, tensor in model.items()}
    masks = _masks(model, curvatures, settings)
    with np.errstate(invalid="ignore", over="ignore"):
        weights = _weights(model, curvatures, settings)
        return {
            name: _ota(tensor, curvatures[name], masks[name], weights[name], settings[name])
            for name, tensor in model.items()
        }


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


def low_rank(v: np.ndarray, rank: int) -> np.ndarray:
    """max(0, U_r S_r V_r^T) of a matrix, float32. An SVD is not defined to the bit: a backend's factors give
    the same h up to rounding only, so compare masks where no saliency lies next to its threshold."""
    u, s, vt = np.linalg.svd(v.astype(np.float64), full_matrices=False)
    return np.float32(np.maximum((u[:, :rank] * s[:rank]) @ vt[:rank], 0.0))


def _curvatures(tensor: Tensor, settings: Settings) -> list[tuple[np.ndarray, float]]:
    """(h_t float32, the bias correction it must still be divided by) of each expert.

    Rank 1 is for every matrix, rank r for those that are neither embeddings nor output matrices: the
    published recipes leave both at full curvature."""
    n_experts = len(tensor.experts)
    corrections = tensor.bias_corrections or (1.0,) * n_experts
    found = []
    for t, (own, correction) in enumerate(zip(settings.own, corrections, strict=True)):
        if tensor.curvatures is None:
            found.append((np.ones(tensor.shape, np.float32), 1.0))
            continue
        h = tensor.curvatures[t]
        if own["rank1_approx"] and h.ndim == 2 and h.size:
            h = rank1(h)
        elif own["rank"] is not None and tensor.role == "matrix" and h.size:
            h = low_rank(h, own["rank"])
        found.append((h, correction))
    return found


def _unusable(tensor: Tensor, curvatures: list[tuple[np.ndarray, float]], t: int) -> np.ndarray:
    h = curvatures[t][0]
    bad = ~np.isfinite(tensor.experts[t].astype(np.float32)) | ~(np.isfinite(h) & (h >= 0))
    for origin in (tensor.base, tensor.origin(t)):
        if origin is not None:
            bad = bad | ~np.isfinite(origin.astype(np.float32))
    return bad


def kept_by_density(scores: np.ndarray, density: float) -> np.ndarray:
    """The floor(density n) largest scores, ties kept, zeros dropped. density as the decimal it is written."""
    if density >= 1:
        return np.ones(scores.shape, bool)
    k = share_of(scores.size, density)
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


def _select(scores: np.ndarray, density: float | None, mass: float | None) -> np.ndarray:
    return kept_by_mass(scores, mass) if density is None else kept_by_density(scores, density)


def _scores(tensor: Tensor, curvatures: list, t: int) -> tuple[np.ndarray, np.ndarray]:
    """(float32 scores of expert t, the same with 0 where an input is not usable)."""
    h, correction = curvatures[t]
    with np.errstate(invalid="ignore", over="ignore"):
        d = None if tensor.base is None else task_vector(tensor.experts[t], tensor.origin(t))
        found = score(h, d, correction)
    return found, np.where(_unusable(tensor, curvatures, t), np.float32(0), found)


def _masks(model: Model, curvatures: dict, settings: dict[str, Settings]) -> dict[str, np.ndarray]:
    """m_t of every tensor: bool[T, *shape]."""
    # Curvature 1 is not comparable with second moments: where only some tensors have it, they keep
    # everything, unless each tensor is decided by itself.
    everywhere_uniform = all(tensor.curvatures is None for tensor in model.values())
    part = {n for n in model if everywhere_uniform or model[n].curvatures is not None}
    masks = {name: np.ones((len(t.experts), *t.shape), bool) for name, t in model.items()}
    for where in places(settings).values():
        by_model = []
        for name, t in where:
            scores, usable = _scores(model[name], curvatures[name], t)
            own = settings[name].own[t]
            if own["precond_threshold"] is not None:
                if name in part:
                    with np.errstate(over="ignore"):
                        masks[name][t] = scores >= np.float32(own["precond_threshold"] * 2.0**64)
            elif own["density"] is None and own["saliency_mass"] is None:
                continue
            elif settings[name]["density_scope"] == "tensor":
                masks[name][t] = _select(usable, own["density"], own["saliency_mass"])
            elif name in part:
                by_model.append((name, t, usable))
        _mask_by_model(masks, by_model, settings)
    return masks


def _mask_by_model(masks: dict[str, np.ndarray], scores: list, settings: dict[str, Settings]) -> None:
    """One threshold of one expert over the tensors of `scores`, (name, t, scores) each."""
    if not scores:
        return
    where = [(name, t) for name, t, _ in scores]
    rule = [same_everywhere(settings, where, key) for key in ("density", "saliency_mass")]
    kept = _select(np.concatenate([s.ravel() for *_, s in scores]), *rule)
    ends = np.cumsum([s.size for *_, s in scores])
    for (name, t), piece in zip(where, np.split(kept, ends[:-1]), strict=True):
        masks[name][t] = piece.reshape(masks[name][t].shape)


def _weights(model: Model, curvatures: dict, settings: dict[str, Settings]) -> dict[str, np.ndarray]:
    """P_t before masking: float64[T, *shape] of every tensor."""

    def raw(name: str, t: int) -> np.ndarray:
        h, correction = curvatures[name][t]
        # scaling_factor multiplies h^p: n(g h^p), the key's published meaning
        power = settings[name]["power"]
        return settings[name].own[t]["scaling_factor"] * (h.astype(np.float64) / correction) ** power

    def total(name: str, t: int) -> float:
        h, _ = curvatures[name][t]
        return float(np.where(np.isfinite(h) & (h >= 0), raw(name, t), 0.0).sum())

    found = {name: np.zeros((len(t.experts), *t.shape)) for name, t in model.items()}
    for where in places(settings).values():
        elements = sum(model[name].size for name, _ in where)
        whole = sum(total(name, t) for name, t in where)
        for name, t in where:
            epsilon = settings[name]["epsilon"]
            if settings[name]["normalise"] == "none":
                divisor = 1.0
            elif settings[name]["normalise"] == "global":
                divisor = total(name, t) / max(model[name].size, 1) + epsilon
            else:
                divisor = whole / max(elements, 1) + epsilon
            found[name][t] = (raw(name, t) / divisor if divisor > 0 else 0.0 * raw(name, t)) + epsilon
    return found


def norm(edits: np.ndarray, role: str) -> float:
    """The operator norm by which `rescale` measures edits: l1 -> RMS, RMS -> RMS, or RMS.

    Embeddings and output matrices take the largest column norm of the stored [vocabulary, hidden] matrix
    over sqrt(rows), as the published code does for both."""
    edits = edits.astype(np.float64)
    if edits.size == 0:
        return 0.0
    if role == "matrix":
        d_out, d_in = edits.shape
        return float(np.sqrt(d_in / d_out) * np.linalg.norm(edits, 2))
    if role in ("embedding", "output"):
        return max(float(np.sqrt(np.mean(column**2))) for column in edits.T)
    return float(np.sqrt(np.mean(edits**2)))


def edit_scale(d: np.ndarray, mask: np.ndarray, role: str, relative_threshold: float) -> float:
    """r_t = norm(d_t) / norm(m_t d_t), 0 where the masked norm is too small a share."""
    whole, masked = norm(d, role), norm(np.where(mask, d, 0), role)
    return 0.0 if masked == 0 or masked < relative_threshold * whole else whole / masked


def _ota(
    tensor: Tensor, curvatures: list, masks: np.ndarray, weights: np.ndarray, settings: Settings
) -> Merged:
    n_experts, shape = len(tensor.experts), tensor.shape
    base = np.zeros(shape) if tensor.base is None else tensor.base
    variant = settings["masked_task_vector_merge_method"]
    d32 = tensor.edits32()
    scales = [1.0] * n_experts
    if settings["rescale"]:
        relative = settings["rescale_relative_threshold"]
        scales = [edit_scale(d, m, tensor.role, relative) for d, m in zip(d32, masks, strict=True)]
    edits = np.stack([r * d for r, d in zip(scales, tensor.edits(), strict=True)])

    survivors = masks
    if variant == "precond":
        numerator = np.where(masks, weights * edits, 0.0).sum(axis=0)
        denominator = np.where(masks | (not settings["mask_weights"]), weights, 0.0).sum(axis=0)
    else:
        if variant == "ties":
            survivors = _elected(d32, scales, masks, settings["ties_density"])
        numerator = np.where(survivors, edits, 0.0).sum(axis=0)
        denominator = np.full(shape, float(n_experts))

    unkept = ~masks.any(axis=0)
    to_base = settings["fallback_to_base"] and tensor.base is not None
    fallback = base if to_base else sum(tensor.experts) / n_experts
    out = base + settings["lambda"] * numerator / np.where(denominator == 0, 1.0, denominator)
    out = np.where(unkept | (denominator == 0), fallback, out)
    if settings["on_nonfinite"] == "base":
        bad = np.any([_unusable(tensor, curvatures, t) for t in range(n_experts)], axis=0)
        out = np.where(bad, base, out)
    return merged(
        out, tensor, list(settings["lambda"] * edits), masks, survivors if variant == "ties" else None
    )


def _elected(d32: np.ndarray, scales: list[float], masks: np.ndarray, density: float) -> np.ndarray:
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


def localize_stitch(model: Model, settings: dict[str, Settings]) -> dict[str, Merged]:
    """Localize-and-Stitch without data (2408.13656): out = w_0 + lambda sum_t m_t d_t / max(1, sum_t m_t).

    m_t: the floor(rho n) largest |d_t| (float32) over the model, ties kept, zeros never for rho < 1: OTA's
    masks with curvature 1. `embeddings: base` (default) leaves input embeddings as they are, and out of n;
    `merge` treats them as any tensor."""
    merging = {n for n, t in model.items() if settings[n]["embeddings"] == "merge" or t.role != "embedding"}
    masks = {name: np.zeros((len(t.experts), *t.shape), bool) for name, t in model.items()}
    for where in places(settings).values():
        scores = [
            (name, t, np.abs(task_vector(model[name].experts[t], model[name].origin(t))))
            for name, t in where
            if name in merging
        ]
        density = same_everywhere(settings, where, "density")
        kept = kept_by_density(
            np.concatenate([np.zeros(0, np.float32), *(s.ravel() for *_, s in scores)]), density
        )
        ends = np.cumsum([0, *(s.size for *_, s in scores)])
        for (name, t, s), start, stop in zip(scores, ends[:-1], ends[1:], strict=True):
            masks[name][t] = kept[start:stop].reshape(s.shape)
    found = {}
    for name, tensor in model.items():
        kept_edits = np.where(masks[name], tensor.edits(), 0.0)
        edit = kept_edits.sum(axis=0) / np.maximum(1, masks[name].sum(axis=0))
        lam = settings[name]["lambda"]
        found[name] = merged(tensor.base + lam * edit, tensor, list(lam * kept_edits), masks[name])
    return found


def _check_embeddings(settings: Settings) -> None:
    if settings["embeddings"] not in ("base", "merge"):
        raise ValueError(f"embeddings is base or merge, not {settings['embeddings']!r}")


METHODS = {
    "ota": Method(ota, SHARED, OWN, base="optional", least=1),
    "ffg": Method(
        ota, SHARED | {"masked_task_vector_merge_method": "linear"}, OWN, base="required", least=1, most=1
    ),
    "localize_stitch": Method(
        localize_stitch, {"embeddings": "base"}, {"density": 0.1}, base="required", check=_check_embeddings
    ),
}
