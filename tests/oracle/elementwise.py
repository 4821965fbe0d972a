"""Rows that look at one element at a time, and little besides: sums of weights, of edits, of what changed.

Decisions are float32, d = float32(w) - float32(w_0); each function says which it takes and in what order.
"""

from __future__ import annotations

import math

import numpy as np

from .parameters import REQUIRED, Method, Model, Settings, one_by_one, places
from .tensors import Merged, Tensor, exact_sum, largest, merged, share_of

SCE_SQUARES_FLOOR, SCE_WEIGHT_FLOOR = 1e-6, 1e-6
NEARSWAP_FLOOR = 1e-6


def linear(tensor: Tensor, settings: Settings) -> Merged:
    """sum_t weight_t w_t / (sum_t weight_t if normalize else 1). The base is not read: one that is an input
    stands among the experts. Weights whose decimals sum to 0: ValueError."""
    weights = settings.each("weight")
    total = float(exact_sum(weights)) if settings["normalize"] else 1.0
    if total == 0:
        raise ValueError("linear: the weights sum to 0, so that nothing can be divided by their sum")
    terms = [a * w / total for a, w in zip(weights, tensor.experts, strict=True)]
    return merged(sum(terms), tensor, terms)


def passthrough(tensor: Tensor, settings: Settings) -> Merged:
    """w, or scale w."""
    scale = settings.own[0]["scale"]
    out = tensor.experts[0] if scale is None else scale * tensor.experts[0]
    return merged(out, tensor, [out])


def checkpoint_coefficients(n: int, decay: str, beta: float, k: int | None) -> list[float]:
    """c_0 .. c_{n-1} of checkpoints, oldest first: of a learning rate that would fall by f, ema, or lawa."""
    if decay == "ema":
        return [beta ** (n - 1), *((1 - beta) * beta ** (n - 1 - i) for i in range(1, n))]
    if decay == "lawa":
        if k is None or not 1 <= k <= n:
            raise ValueError(f"lawa averages the last k of {n} checkpoints: k = {k} must lie in 1 .. {n}")
        return [0.0] * (n - k) + [1 / k] * k
    f = {
        "linear": lambda x: 1 - x,
        "minus_sqrt": lambda x: 1 - math.sqrt(x),
        "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    }.get(decay)
    if f is None:
        raise ValueError(f"decay is linear, minus_sqrt, cosine, ema or lawa, not {decay!r}")
    s = [f(i / n) for i in range(n)] + [0.0]  # f(0) = 1, and nothing follows the newest
    return [s[i] - s[i + 1] for i in range(n)]


def checkpoints(tensor: Tensor, settings: Settings) -> Merged:
    """sum_i c_i x_i of the checkpoints of one run (WSM, LAWA, EMA), oldest first. keys: decay (minus_sqrt),
    beta (0.9) of ema, k of lawa."""
    c = checkpoint_coefficients(len(tensor.experts), settings["decay"], settings["beta"], settings["k"])
    terms = [a * x for a, x in zip(c, tensor.experts, strict=True)]
    return merged(sum(terms), tensor, terms)


def spread(d32: np.ndarray) -> np.ndarray:
    """2^32 T times the population variance of d_t over t, float32[shape]: the score of sce.

    In float32, each operation rounded, nothing fused: e_t = 2^16 d_t - 2^16 d_0; m = (e_1 + e_2 + ..)
    float32(1/T), added in recipe order; sum over t = 0, 1, .. of (e_t - m)^2. Equal edits give exactly 0,
    which a mean of the d_t themselves would not."""
    n_experts = len(d32)
    scaled = d32 * np.float32(2.0**16)
    e = [x - scaled[0] for x in scaled]
    total = np.zeros(d32.shape[1:], np.float32)
    for x in e[1:]:
        total = total + x
    mean = total * np.float32(1 / n_experts)
    squares = np.zeros(d32.shape[1:], np.float32)
    for x in e:
        squares = squares + (x - mean) * (x - mean)
    return squares


def sce(tensor: Tensor, settings: Settings) -> Merged:
    """SCE (2408.07990): exactly floor(N select_topk) elements of largest `spread` are kept in all experts, N
    those of spread > 0; weights q_t by the squares of what was kept; election by the unweighted sum.

    q_t: of the float64 edits, added exactly; sum_t q_t < 1e-6: 1/T each. Election: float32 sum of the
    kept d_t in recipe order."""
    n_experts, shape, top = len(tensor.experts), tensor.shape, settings["select_topk"]
    d32 = tensor.edits32()
    shared = np.ones(shape, bool)
    if top < 1:
        v = spread(d32)
        shared = largest(v, share_of(int(np.count_nonzero(v)), max(top, 0)))
    kept32 = np.where(shared, d32, np.float32(0))
    q = np.array([math.fsum(np.square(d[shared]).tolist()) for d in tensor.edits()])
    q = q / max(tensor.size, 1)
    q = np.full(n_experts, 1 / n_experts) if q.sum() < SCE_SQUARES_FLOOR else q / q.sum()
    votes = np.zeros(shape, np.float32)
    for x in kept32:
        votes = votes + x
    agreed = np.sign(kept32) == np.where(votes >= 0, 1, -1)
    weights = np.where(agreed, q.reshape(-1, *[1] * len(shape)), 0.0)
    terms = weights * tensor.edits()
    den = np.maximum(weights.sum(axis=0), SCE_WEIGHT_FLOOR)
    edit = settings["lambda"] * terms.sum(axis=0) / den
    masks = np.broadcast_to(shared, (n_experts, *shape)).copy()
    return merged(tensor.base + edit, tensor, list(settings["lambda"] * terms / den), masks, agreed)


def changed(tensor: Tensor, epsilon: float) -> np.ndarray:
    """a_t = [|d_t| > epsilon], float32 on both sides: bool[T, *shape]."""
    return np.abs(tensor.edits32()) > np.float32(epsilon)


def _ram(tensor: Tensor, settings: Settings, alone: list[float]) -> Merged:
    """Mean of the edits that changed an element; alone: the factor of expert t's where no other did."""
    a = changed(tensor, settings["epsilon"])
    c = a.sum(axis=0)
    factor = np.array(alone).reshape(-1, *[1] * len(tensor.shape))
    terms = np.where(a, np.where(c == 1, factor, 1.0) * tensor.edits(), 0.0)
    edit = settings["lambda"] * terms.sum(axis=0) / np.maximum(c, 1)
    return merged(tensor.base + edit, tensor, list(settings["lambda"] * terms), a)


def overlap(tensor: Tensor, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """(shared int[T], unique int[T]): elements that expert t changed with others, and alone."""
    a = changed(tensor, epsilon)
    c, axes = a.sum(axis=0), tuple(range(1, a.ndim))
    return (a & (c > 1)).sum(axis=axes), (a & (c == 1)).sum(axis=axes)


def _factor_alone(shared: int, unique: int, settings: Settings) -> float:
    """1 + r clip(shared / max(unique, epsilon), 0, alpha); nothing unique multiplies nothing: any factor."""
    floor = max(unique, settings["epsilon"])
    return 1 + settings["r"] * min(shared / floor if floor else np.inf, settings["alpha"])


def ram(tensor: Tensor, settings: Settings) -> Merged:
    """RAM (2601.13572): the mean of the edits above epsilon."""
    return _ram(tensor, settings, [1.0] * len(tensor.experts))


def ramplus_tl(tensor: Tensor, settings: Settings) -> Merged:
    """RAM+ with counts of each tensor: edits that are alone are multiplied by 1 + r clip(rho_t, 0, alpha)."""
    counts = zip(*overlap(tensor, settings["epsilon"]), strict=True)
    return _ram(tensor, settings, [_factor_alone(int(s), int(u), settings) for s, u in counts])


def ramplus(model: Model, settings: dict[str, Settings]) -> dict[str, Merged]:
    """RAM+ with counts of the whole model: 1 + (R - 1) min(1, rho_t), which is ramplus_tl's factor for r =
    R - 1 = 0.2 and alpha = 1 (the defaults here); an expert that changed nothing alone would get R."""
    counts = {name: overlap(t, settings[name]["epsilon"]) for name, t in model.items()}
    totals = {
        position: [sum(int(counts[name][i][t]) for name, t in where) for i in (0, 1)]
        for position, where in places(settings).items()
    }
    return {
        name: _ram(tensor, s, [_factor_alone(*totals[p], s) for p in s.each("position")])
        for name, tensor in model.items()
        for s in [settings[name]]
    }


def nearswap(tensor: Tensor, settings: Settings) -> Merged:
    """w_0 + f d, f = clip(t / max(|d|, 1e-6), 0, 1)."""
    d = tensor.edit(0)
    f = np.clip(settings["t"] / np.maximum(np.abs(d), NEARSWAP_FLOOR), 0, 1)
    edit = settings["lambda"] * f * d
    return merged(tensor.base + edit, tensor, [edit])


def fisher(model: Model, settings: dict[str, Settings]) -> dict[str, Merged]:
    """Fisher averaging (2111.09832): sum_t P_t w_t / sum_t P_t, P_t = weight_t n(max(h_t, fisher_floor)).

    n by `normalise`: none: x; global: x / (mean of x over the tensor + epsilon); model (default): over the
    model. The paper's code divides by the L2 norm of the model's F where this takes its mean. sum_t P_t = 0:
    the mean of the w_t. The base is not read."""
    floored = {name: _fisher(tensor, settings[name]) for name, tensor in model.items()}
    totals, sizes = {}, {}
    for position, where in places(settings).items():
        totals[position] = sum(float(floored[name][t].sum()) for name, t in where)
        sizes[position] = sum(model[name].size for name, _ in where)
    found = {}
    for name, tensor in model.items():
        weights = []
        for f, own in zip(floored[name], settings[name].own, strict=True):
            rule, position = settings[name]["normalise"], own["position"]
            divisor = 1.0
            if rule == "global":
                divisor = float(f.sum()) / max(tensor.size, 1) + settings[name]["epsilon"]
            elif rule == "model":
                divisor = totals[position] / max(sizes[position], 1) + settings[name]["epsilon"]
            weights.append(own["weight"] * f / (divisor if divisor > 0 else 1.0))
        total = sum(weights)
        safe = np.where(total == 0, 1.0, total)
        terms = [p * w / safe for p, w in zip(weights, tensor.experts, strict=True)]
        out = np.where(total == 0, sum(tensor.experts) / len(tensor.experts), sum(terms))
        condition = sum(np.abs(p) for p in weights) / np.abs(safe)  # weights of both signs cancel in the sum
        found[name] = merged(out, tensor, [np.abs(x) * condition for x in terms])
    return found


def _fisher(tensor: Tensor, settings: Settings) -> list[np.ndarray]:
    """max(h_t / (1 - beta2^step), fisher_floor) of each expert, float64."""
    if tensor.curvatures is None:
        raise ValueError("fisher needs curvature: give every model a preconditioner_path")
    corrections = tensor.bias_corrections or (1.0,) * len(tensor.experts)
    return [
        np.maximum(h.astype(np.float64) / c, settings["fisher_floor"])
        for h, c in zip(tensor.curvatures, corrections, strict=True)
    ]


def consensus(tensor: Tensor, settings: Settings) -> Merged:
    """Consensus of tall masks: w_0 + lambda D [sum_t M_t >= k], D = sum_t d_t, M_t = |d_t| > q |D - d_t|.

    M_t in float32: D added in recipe order, D - d_t, times float32(q). masks: M_t."""
    d32 = tensor.edits32()
    total = np.zeros(tensor.shape, np.float32)
    for d in d32:
        total = total + d
    masks = np.abs(d32) > np.float32(settings["q"]) * np.abs(total - d32)
    agreed = masks.sum(axis=0) >= settings["k"]
    edits = settings["lambda"] * tensor.edits()
    return merged(tensor.base + np.where(agreed, edits.sum(axis=0), 0.0), tensor, list(edits), masks)


def magmax(tensor: Tensor, settings: Settings) -> Merged:
    """MagMax (2407.06322): w_0 + lambda d_t*, t* the last t of largest float32 |d_t|. masks: [t = t*]."""
    masks = np.zeros((len(tensor.experts), *tensor.shape), bool)
    if masks.size:
        chosen = len(masks) - 1 - np.argmax(np.abs(tensor.edits32())[::-1], axis=0)
        masks = np.arange(len(masks)).reshape(-1, *[1] * len(tensor.shape)) == chosen
    edits = settings["lambda"] * np.where(masks, tensor.edits(), 0.0)
    return merged(tensor.base + edits.sum(axis=0), tensor, list(edits), masks)


def row_divergence(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL = sum p log(p / q) along the last axis, p = softmax(one) + 1e-8, q = softmax(other) + 1e-8; float64.

    As sum p (x - log1p(x)), x = q / p - 1: p and q have equal sums, so sum p x = 0, and no term is negative;
    near-equal rows keep their digits."""
    p, q = (np.exp(w - w.max(axis=-1, keepdims=True)) for w in (one, other))
    p, q = (x / x.sum(axis=-1, keepdims=True) + 1e-8 for x in (p, q))
    x = (q - p) / p
    return (p * np.maximum(x - np.log1p(x), 0.0)).sum(axis=-1, keepdims=True)


def divergence_scores(tensor: Tensor) -> np.ndarray:
    """2^48 |d| KL: (2^16 |d|) float32(2^32 KL) in float32, KL in float64 and rounded once."""
    one, base = np.atleast_1d(tensor.experts[0], tensor.base)
    if not tensor.size:
        return np.zeros(tensor.shape, np.float32)
    scaled = np.float32(row_divergence(one, base) * 2.0**32)
    d = np.atleast_1d(tensor.edits32()[0]) * np.float32(2.0**16)
    return (np.abs(d) * scaled).reshape(tensor.shape)


def arcee_fusion(tensor: Tensor, settings: Settings) -> Merged:
    """w_1 where z >= theta, else w_0; z = |d| KL of its row, theta = median + 1.5 (Q3 - Q1) of z.

    z in float32 (`divergence_scores`); the order statistics at ranks floor(f (n - 1)) are float32, theta is
    their float64 combination, rounded to float32 once; z >= theta in float32."""
    z = divergence_scores(tensor)
    if not z.size:
        return merged(tensor.base, tensor, [], np.zeros((1, *tensor.shape), bool))
    ranked, last = np.sort(z, axis=None).astype(np.float64), z.size - 1
    first, median, third = (ranked[quarter * last // 4] for quarter in (1, 2, 3))
    masks = (z >= np.float32(median + 1.5 * (third - first)))[None]
    return merged(np.where(masks[0], tensor.experts[0], tensor.base), tensor, [], masks)


def _check_lawa(settings: Settings) -> None:
    checkpoint_coefficients(len(settings.own), settings["decay"], settings["beta"], settings["k"])


def _check_normalise(settings: Settings) -> None:
    if settings["normalise"] not in ("none", "global", "model"):
        raise ValueError(f"normalise is none, global or model, not {settings['normalise']!r}")


_RAM = {"epsilon": 1e-5}
_RAMPLUS = {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}
METHODS = {
    # weight is required in a recipe; here 1, as it is for merges of arrays.
    "linear": Method(
        one_by_one(linear), {"normalize": True}, {"weight": 1.0}, base="ignored", least=1, edits=False
    ),
    "passthrough": Method(
        one_by_one(passthrough), {}, {"scale": None}, base="ignored", least=1, most=1, edits=False
    ),
    "checkpoints": Method(
        one_by_one(checkpoints),
        {"decay": "minus_sqrt", "beta": 0.9, "k": None},
        base="ignored",
        least=1,
        edits=False,
        check=_check_lawa,
    ),
    "sce": Method(one_by_one(sce), {"select_topk": 1.0, "int8_mask": False}),
    "ram": Method(one_by_one(ram), _RAM),
    "ramplus_tl": Method(one_by_one(ramplus_tl), _RAMPLUS),
    "ramplus": Method(ramplus, _RAMPLUS | {"r": 0.2, "alpha": 1.0}),
    "nearswap": Method(one_by_one(nearswap), {"t": REQUIRED}, least=1, most=1, absent="base alone"),
    "arcee_fusion": Method(one_by_one(arcee_fusion), least=1, most=1, edits=False, absent="only one"),
    "fisher": Method(
        fisher,
        {"normalise": "model", "epsilon": 1e-26, "fisher_floor": 1e-6},
        {"weight": 1.0},
        base="ignored",
        least=1,
        edits=False,
        check=_check_normalise,
    ),
    "consensus": Method(one_by_one(consensus), {"q": 0.4, "k": 2}),
    "magmax": Method(one_by_one(magmax), {"lambda": 0.5}),
}
