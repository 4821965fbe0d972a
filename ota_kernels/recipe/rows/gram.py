"""Rows that combine the inputs linearly, by coefficients that follow from their inner products.

G[s, t] = <x_s, x_t> over a tensor, a row or a column; x_t: d_t with a base, else w_t; N_t^2 = G[t, t]
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ...errors import InputError
from ...tensors.curvature import Uniform
from ...tensors.found import Found
from ...tensors.terms import ExpertTerms, Terms, Words
from ...tensors.tile import TensorInputs
from ..methods import Method, Need, register
from ..parameters import FINITE, NOT_NEGATIVE, POSITIVE, POSITIVE_INTEGER, REQUIRED, SCALE, SWITCH, Parameter
from ..settings import Settings
from .linear import divided_by_weights

_GRAM = [Need("gram")]


def _combination(weights, lambda_: float = 1.0, words: str = "constant") -> Terms:
    """sum_t a_t x_t, plus w_0 with a base. weights: numbers, or float64[rows or columns] each."""
    experts = tuple(
        ExpertTerms(weight_scale=float(a))
        if words == "constant"
        else ExpertTerms(weights=np.ascontiguousarray(a, np.float64))
        for a in weights
    )
    return Terms(Words(score="none", select="all", weigh=words, divide="number"), experts, lambda_=lambda_)


def _coefficients(cosine: np.ndarray, t: float, straight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sin((1-t) theta), sin(t theta)) / sin theta; (1 - t, t) where `straight`."""
    theta = np.where(straight, np.pi / 2, np.arccos(cosine))
    sine = np.sin(theta)
    first, second = np.sin((1 - t) * theta) / sine, np.sin(t * theta) / sine
    return np.where(straight, 1 - t, first), np.where(straight, t, second)


def _norms(gram: np.ndarray) -> np.ndarray:
    return np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))


# slerp: the base is one of the two


def _base_as_expert(tensor: TensorInputs, settings: Settings) -> TensorInputs:
    if tensor.base is None:
        return tensor
    experts = (tensor.base, *tensor.experts)
    return replace(tensor, base=None, experts=experts, curvatures=(Uniform(),) * len(experts))


def _slerp_terms(settings: Settings, found: Found) -> Terms:
    t = settings["t"]
    if found.gram is None:
        return _combination([1 - t, t])
    norms = [n if n > 1e-8 else 1.0 for n in _norms(found.gram)]
    cosine = np.clip(found.gram[0, 1] / (norms[0] * norms[1]), -1, 1)
    return _combination(_coefficients(cosine, t, np.abs(cosine) > 0.9995))


register(
    Method(
        name="slerp",
        source="Shoemake 1985",
        formula="(sin((1-t) theta) w_0 + sin(t theta) w_1) / sin theta, theta between the tensors",
        base="required",
        edits=False,
        parameters=(Parameter("t", FINITE, REQUIRED, "0: the base, 1: the other model", affects="values"),),
        needs=lambda settings: _GRAM,
        view=_base_as_expert,
        terms=_slerp_terms,
        least=1,
        most=1,
        absent="only one",
    )
)


# nuslerp


def _nuslerp_groups(settings: Settings, shape: tuple[int, ...]) -> str:
    if settings["nuslerp_flatten"] or len(shape) < 2:
        return "tensor"
    return "column" if settings["nuslerp_row_wise"] else "row"


def _columns_of_the_first_axis(tensor: TensorInputs, settings: Settings) -> TensorInputs:
    """Vectors along axis 0 are columns of a matrix."""
    if _nuslerp_groups(settings, tensor.shape) != "column":
        return tensor
    return replace(tensor, shape=(tensor.shape[0], math.prod(tensor.shape[1:])))


def _nuslerp_terms(settings: Settings, found: Found) -> Terms:
    first, second = settings.each("weight")
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    lambda_ = settings.lambda_ if settings.has_base else 1.0
    if found.gram is None:
        return _combination([1 - t, t], lambda_)
    norms = np.maximum(_norms(found.gram), 1e-7)
    cosine = np.clip(found.gram[..., 0, 1] / (norms[..., 0] * norms[..., 1]), -1, 1)
    weights = _coefficients(cosine, t, 1 - cosine**2 <= 1e-16)
    groups = _nuslerp_groups(settings, found.shape)
    return _combination(weights, lambda_, "constant" if groups == "tensor" else f"by {groups}")


register(
    Method(
        name="nuslerp",
        source="mergekit",
        formula="slerp of w_1 and w_2, of d_1 and d_2 with a base, at t = weight_2 / (weight_1 + weight_2)",
        base="optional",
        parameters=(
            Parameter(
                "weight", FINITE, REQUIRED, "how near the result is to the model", "expert", affects="values"
            ),
            Parameter("nuslerp_flatten", SWITCH, True, "a tensor is one vector; false: each row is"),
            Parameter("nuslerp_row_wise", SWITCH, False, "without flatten: vectors along the first axis"),
            *SCALE,
        ),
        needs=lambda settings: _GRAM,
        groups=_nuslerp_groups,
        view=_columns_of_the_first_axis,
        terms=_nuslerp_terms,
        least=2,
        most=2,
        absent="only one",
    )
)


# multislerp


def _multislerp_terms(settings: Settings, found: Found) -> Terms:
    weights = np.array(settings.each("weight"), np.float64)
    if settings["normalize_weights"]:
        weights = weights / weights.sum()
    lambda_ = settings.lambda_ if settings.has_base else 1.0
    if len(weights) == 1:
        return _combination([1.0])
    if found.gram is None:
        return _combination(weights, lambda_)
    norms, eps = _norms(found.gram), settings["eps"]
    if not norms.any():
        return _combination(np.zeros(len(weights)), lambda_)
    of_units = weights / (norms + eps)
    length = math.sqrt(max(float(of_units @ found.gram @ of_units), 0.0))
    if length < eps:
        if len(weights) == 2:
            return _combination(weights, lambda_)
        raise InputError(
            f"{found.name}: multislerp: the weighted directions cancel, and opposite vectors have no mean on "
            "a sphere: change the weights, or take `linear`"
        )
    return _combination(float(weights @ norms) * of_units / length, lambda_)


register(
    Method(
        name="multislerp",
        source="mergekit",
        formula="(sum_t omega_t N_t) v / ||v||, v = sum_t omega_t x_t / N_t",
        base="optional",
        parameters=(
            Parameter(
                "weight", FINITE, REQUIRED, "how near the result is to the model", "expert", affects="values"
            ),
            Parameter("normalize_weights", SWITCH, True, "divide the weights by their sum", affects="values"),
            Parameter("eps", POSITIVE, 1e-8, "norms below it count as none", affects="values"),
            *SCALE,
        ),
        needs=lambda settings: _GRAM,
        check=divided_by_weights("normalize_weights"),
        terms=_multislerp_terms,
        least=1,
    )
)


# karcher


def karcher_coefficients(gram: np.ndarray, max_iter: int, tol: float) -> np.ndarray:
    """a_t of sum_t a_t w_t: the Karcher mean of the directions times the mean of the norms (2603.04972). All
    on coefficients of the w_t and their inner products, float64[T, T]."""
    norms = _norms(gram)
    valid = norms > tol
    if not valid.any():
        return np.zeros(len(norms))
    of_units = np.where(valid, 1 / np.where(valid, norms, 1.0), 0.0)
    cosines = gram * of_units[:, None] * of_units[None, :]  # <u_s, u_t>
    alpha = valid / valid.sum()

    def length(c: np.ndarray) -> float:
        return math.sqrt(max(float(c @ cosines @ c), 0.0))

    mu, size = alpha, length(alpha)
    mu = np.eye(len(norms))[np.argmax(valid)] if size < tol else mu / size
    for _ in range(max_iter):
        to_mu = np.clip(cosines @ mu, -1, 1)
        theta = np.arccos(to_mu)
        moving = valid & (theta >= tol) & (theta <= math.pi - tol)
        factor = np.where(moving, alpha * theta / np.where(moving, np.sin(theta), 1.0), 0.0)
        tau = factor - float(factor @ to_mu) * mu
        step = length(tau)
        if step < tol:
            break
        mu = math.cos(step) * mu + math.sin(step) * tau / step
        mu = mu / length(mu)
    return float(norms.mean()) * mu * of_units


def _karcher_terms(settings: Settings, found: Found) -> Terms:
    count = len(settings.experts)
    if found.gram is None or count == 1:
        return _combination([1 / count] * count)
    return _combination(karcher_coefficients(found.gram, settings["max_iter"], settings["tol"]))


register(
    Method(
        name="karcher",
        source="arXiv 2603.04972",
        formula="mean norm times the Karcher mean of the directions w_t / N_t",
        base="ignored",
        edits=False,
        parameters=(
            Parameter("max_iter", POSITIVE_INTEGER, 10, "steps at most", affects="values"),
            Parameter(
                "tol", NOT_NEGATIVE, 1e-5, "a step, or a norm, below it counts as none", affects="values"
            ),
        ),
        needs=lambda settings: _GRAM,
        terms=_karcher_terms,
        least=1,
    )
)


# model_stock


def _stock_groups(settings: Settings, shape: tuple[int, ...]) -> str:
    return "row" if settings["filter_wise"] and len(shape) > 1 else "tensor"


def _stock_terms(settings: Settings, found: Found) -> Terms:
    count = len(settings.experts)
    if found.gram is None:
        return _combination([1 / count] * count, settings.lambda_)
    norms, pairs = _norms(found.gram), np.triu_indices(count, 1)
    products = np.maximum(norms[..., pairs[0]] * norms[..., pairs[1]], 1e-6)
    cosine = np.clip(found.gram[..., pairs[0], pairs[1]] / products, -1, 1).mean(axis=-1)
    divisor = 1 + (count - 1) * cosine
    flat = np.abs(divisor) < 1e-6
    tau = np.where(flat, 0.0, count * cosine / np.where(flat, 1.0, divisor))
    words = "by row" if found.gram.ndim == 3 else "constant"
    return _combination([tau / count] * count, settings.lambda_, words)


register(
    Method(
        name="model_stock",
        source="arXiv 2403.19522",
        formula="w_0 + tau mean_t(d_t), tau = T c / (1 + (T-1) c), c: mean cosine of pairs of edits",
        base="required",
        parameters=(
            Parameter("filter_wise", SWITCH, False, "each row has its own tau"),
            *SCALE,
        ),
        needs=lambda settings: _GRAM,
        groups=_stock_groups,
        terms=_stock_terms,
        least=2,
        absent="three",
    )
)
