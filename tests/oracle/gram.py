"""The Gram family: coefficients from inner products, then one linear combination (METHODS section 6).

Everything in float64, decisions too: x_t = w_t or d_t taken in float64, N_t = ||x_t||. Inner products are
sums of a whole tensor, whose last bits depend on the order of adding; tests keep away from the borders
(0.9995 of slerp, 1e-16 of nuslerp, eps, tol). Groups of vectors lie along one axis; a scalar is a vector of
length 1.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from .parameters import REQUIRED, Method, Settings, one_by_one
from .tensors import Merged, Tensor, exact_sum, merged

SLERP_FLOOR, SLERP_PARALLEL = 1e-8, 0.9995
NUSLERP_FLOOR, NUSLERP_PARALLEL, NUSLERP_WEIGHTS = 1e-7, 1e-16, 1e-6
STOCK_FLOOR, STOCK_DENOMINATOR = 1e-6, 1e-6


def inner(a: np.ndarray, b: np.ndarray, axis: int | None = None) -> np.ndarray:
    """<a, b> along an axis, which stays as length 1; None: over the whole tensor."""
    return (a * b).sum(axis=axis, keepdims=axis is not None)


def _slerp_coefficients(cosine: np.ndarray, t: float, straight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sin((1-t) theta), sin(t theta)) / sin theta; (1 - t, t) where `straight`."""
    theta = np.where(straight, np.pi / 2, np.arccos(cosine))
    sine = np.sin(theta)
    first, second = np.sin((1 - t) * theta) / sine, np.sin(t * theta) / sine
    return np.where(straight, 1 - t, first), np.where(straight, t, second)


def slerp(tensor: Tensor, settings: Settings) -> Merged:
    """Between the base and one expert, each tensor one vector; linear where |cosine| > 0.9995. Norms up to
    1e-8 count as 1."""
    t, pair = settings["t"], (tensor.base, tensor.experts[0])
    norms = [math.sqrt(inner(x, x)) for x in pair]
    norms = [n if n > SLERP_FLOOR else 1.0 for n in norms]
    cosine = np.clip(inner(*pair) / (norms[0] * norms[1]), -1, 1)
    a, b = _slerp_coefficients(cosine, t, np.abs(cosine) > SLERP_PARALLEL)
    terms = [a * pair[0], b * pair[1]]
    return merged(terms[0] + terms[1], tensor, terms)


def _axis(ndim: int, row_wise: bool, flatten: bool) -> int | None:
    """The axis along which vectors lie; None: the whole tensor. row_wise: axis 0, else the last one."""
    if flatten or ndim < 2:
        return None
    return 0 if row_wise else -1


def nuslerp(tensor: Tensor, settings: Settings) -> Merged:
    """slerp of two experts, of their edits where there is a base, by t = weight_2 / (weight_1 + weight_2)."""
    one, two = tensor.edits()
    w1, w2 = settings.each("weight")
    t = 0.5 if abs(w1 + w2) < NUSLERP_WEIGHTS else w2 / (w1 + w2)
    axis = _axis(one.ndim, settings["nuslerp_row_wise"], settings["nuslerp_flatten"])
    norms = [np.maximum(np.sqrt(inner(x, x, axis)), NUSLERP_FLOOR) for x in (one, two)]
    cosine = np.clip(inner(one, two, axis) / (norms[0] * norms[1]), -1, 1)
    a, b = _slerp_coefficients(cosine, t, 1 - cosine**2 <= NUSLERP_PARALLEL)
    return _combination(tensor, [a, b], settings)


def _combination(tensor: Tensor, coefficients: list, settings: Settings) -> Merged:
    """w_0 + lambda sum_t a_t d_t; without a base sum_t a_t w_t."""
    terms = [a * x for a, x in zip(coefficients, tensor.edits(), strict=True)]
    if tensor.base is not None:
        terms = [settings["lambda"] * x for x in terms]
    total = sum(terms, np.zeros(tensor.shape))
    return merged(total if tensor.base is None else tensor.base + total, tensor, terms)


def multislerp(tensor: Tensor, settings: Settings) -> Merged:
    """(sum_t omega_t N_t) v / ||v||, v = sum_t omega_t x_t / (N_t + eps), plus w_0 with a base.

    One expert: its tensor. ||v|| < eps: two experts: sum omega_t x_t; more: ValueError, but where all N_t are
    0 the sum of nothing (the base). Weights whose decimals sum to 0 with normalize_weights: ValueError."""
    weights, eps = settings.each("weight"), settings["eps"]
    if len(weights) == 1:
        return merged(tensor.experts[0], tensor, [])
    if settings["normalize_weights"]:
        total = float(exact_sum(weights))
        if total == 0:
            raise ValueError("multislerp: the weights sum to 0, so that nothing can be divided by their sum")
        weights = [w / total for w in weights]
    x = tensor.edits()
    norms = [math.sqrt(inner(d, d)) for d in x]
    if not any(norms):
        return _combination(tensor, [0.0] * len(weights), settings)
    v = sum(w / (n + eps) * d for w, n, d in zip(weights, norms, x, strict=True))
    length = math.sqrt(inner(v, v))
    if length < eps:
        if len(weights) == 2:
            return _combination(tensor, weights, settings)
        raise ValueError(
            "multislerp: the weighted directions cancel: opposite vectors have no mean on a sphere"
        )
    reach = sum(w * n for w, n in zip(weights, norms, strict=True))
    return _combination(
        tensor, [reach * w / ((n + eps) * length) for w, n in zip(weights, norms, strict=True)], settings
    )


def karcher(tensor: Tensor, settings: Settings) -> Merged:
    """The Karcher mean of the directions times the mean of the norms (2603.04972).

    Norms up to tol count as zero; directions nearer than tol to the present mean, or to its opposite, give no
    step. The base is not read."""
    x, tol = tensor.experts, settings["tol"]
    if len(x) == 1:
        return merged(x[0], tensor, [])
    norms = [math.sqrt(inner(w, w)) for w in x]
    units = [w / n for w, n in zip(x, norms, strict=True) if n > tol]
    if not units:
        return merged(np.zeros(tensor.shape), tensor, [])
    alpha = 1 / len(units)
    mu = alpha * sum(units)
    length = math.sqrt(inner(mu, mu))
    mu = units[0] if length < tol else mu / length
    for _ in range(settings["max_iter"]):
        tau = np.zeros(tensor.shape)
        for u in units:
            cosine = min(max(float(inner(mu, u)), -1.0), 1.0)
            theta = math.acos(cosine)
            if tol <= theta <= math.pi - tol:
                tau = tau + alpha * theta / math.sin(theta) * (u - cosine * mu)
        step = math.sqrt(inner(tau, tau))
        if step < tol:
            break
        mu = math.cos(step) * mu + math.sin(step) * tau / step
        mu = mu / math.sqrt(inner(mu, mu))
    out = sum(norms) / len(norms) * mu
    return merged(out, tensor, [out])


def model_stock(tensor: Tensor, settings: Settings) -> Merged:
    """w_0 + tau (mean_t d_t), tau = T c / (1 + (T-1) c), c the mean cosine of pairs of edits (2403.19522).

    The product of two norms counts as at least 1e-6; |1 + (T-1) c| < 1e-6: tau = 0. filter_wise: for each
    vector along the last axis."""
    d, n_experts = tensor.edits(), len(tensor.experts)
    axis = _axis(d.ndim - 1, row_wise=False, flatten=not settings["filter_wise"])
    norms = [np.sqrt(inner(x, x, axis)) for x in d]
    cosines = [
        np.clip(inner(d[s], d[t], axis) / np.maximum(norms[s] * norms[t], STOCK_FLOOR), -1, 1)
        for s, t in itertools.combinations(range(n_experts), 2)
    ]
    c = sum(cosines) / len(cosines)
    den = 1 + (n_experts - 1) * c
    flat = np.abs(den) < STOCK_DENOMINATOR
    tau = np.where(flat, 0.0, n_experts * c / np.where(flat, 1.0, den))
    return _combination(tensor, [tau / n_experts] * n_experts, settings)


METHODS = {
    "slerp": Method(one_by_one(slerp), {"t": REQUIRED}, least=1, most=1, edits=False, absent="only one"),
    "nuslerp": Method(
        one_by_one(nuslerp),
        {"nuslerp_flatten": True, "nuslerp_row_wise": False},
        {"weight": REQUIRED},
        base="optional",
        least=2,
        most=2,
        absent="only one",
    ),
    "multislerp": Method(
        one_by_one(multislerp),
        {"normalize_weights": True, "eps": 1e-8},
        {"weight": REQUIRED},
        base="optional",
        least=1,
    ),
    "karcher": Method(
        one_by_one(karcher), {"max_iter": 10, "tol": 1e-5}, base="ignored", least=1, edits=False
    ),
    "model_stock": Method(one_by_one(model_stock), {"filter_wise": False}, least=2, absent="three"),
}
