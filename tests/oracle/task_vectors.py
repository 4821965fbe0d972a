"""The task-vector family: edits, keep sets, rescale, weights, election, quotient (METHODS section 4).

    d_t = w_t - w_0;   e_t = r_t k_t d_t;   y_t = weight_t e_t
    s = +1 where sum_t y_t >= 0, else -1;   g_t = [sign(y_t) = s], 1 without election
    out = w_0 + lambda (num / den if normalize else num),   num = sum_t g_t y_t,   den = sum_t g_t weight_t

Decisions, all float32, d = float32(w) - float32(w_0):

    magnitude          exactly max(1, floor(density n)) in the order (|d| descending, index ascending)
    outliers           ranks low .. low + K - 1 in the order (|d| ascending, index ascending)
    random             u < float32(density), u of `philox.uniforms`
    rank-random        u < float32(p), p in float64 from the rank in the row, in the order (|d| ascending,
                       index ascending)
    election           y_t = float32(weight_t r_t) d_t, and with `rescale_by: density` of rank-random, whose
                       factor is of each element, float32(weight_t) (d_t / float32(p)); added in recipe order
                       to a float32 that starts at 0 (`consensus: count`: sign(y_t) is). An expert of y_t = 0
                       never agrees
    den = 0            elect: sum g_t float32(weight_t), in float32 and recipe order, is 0, or the float64
                       sum is; else |sum_t weight_t| < 1e-8 in float64

The l1 sums of r_t are of the float64 |d|, added exactly, so that they know no order; floor(density n) takes
the density as the decimal that is written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .parameters import REQUIRED, Method, Model, Settings, places, same_everywhere
from .philox import uniforms
from .tensors import Merged, Tensor, largest, merged, share_of

NORM_FLOOR = np.float64(1e-7)
WEIGHT_FLOOR = 1e-8


@dataclass(frozen=True)
class Row:
    """sparsify: none, magnitude, outliers, random, or rank-random; elect: by the sign of the sum or not."""

    sparsify: str
    elect: bool
    normalize: bool
    rescale: bool


ROWS = {
    "task_arithmetic": Row("none", False, False, False),
    "ties": Row("magnitude", True, True, False),
    "dare_linear": Row("random", False, False, True),
    "dare_ties": Row("random", True, False, True),
    "breadcrumbs": Row("outliers", False, False, False),
    "breadcrumbs_ties": Row("outliers", True, False, False),
    "della": Row("rank-random", True, True, True),
    "della_linear": Row("rank-random", False, False, True),
}


@dataclass(frozen=True)
class Kept:
    """One tensor after selection. masks: bool[T, *shape]; probability: float32[T, *shape], with which each
    element was kept, 1 where no draw decided."""

    masks: np.ndarray
    probability: np.ndarray


def window(scores: np.ndarray, first: int, count: int) -> np.ndarray:
    """The elements of ranks first .. first + count - 1 in the order (score ascending, index ascending)."""
    kept = np.zeros(scores.size, bool)
    kept[np.argsort(scores.ravel(), kind="stable")[first : first + count]] = True
    return kept.reshape(scores.shape)


def kept_magnitudes(scores: np.ndarray, density: float) -> np.ndarray:
    """Exactly k = max(1, floor(density n)) largest; all for density >= 1, none for density <= 0."""
    if density >= 1:
        return np.ones(scores.shape, bool)
    if density <= 0 or not scores.size:
        return np.zeros(scores.shape, bool)
    return largest(scores, max(1, share_of(scores.size, density)))


def kept_between_outliers(scores: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """K = floor(density n) elements: floor(gamma n) largest go first, then the smallest."""
    if density >= 1:
        return np.ones(scores.shape, bool)
    count, top = share_of(scores.size, density), share_of(scores.size, gamma)
    low = max(0, scores.size - count - top)
    # With gamma > 1 - density fewer than K are left below the outliers; the ranks from 0 are K all the same.
    return window(scores, low, count)


def rank_probabilities(magnitudes: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """float32 p of MagPrune: density - epsilon for the smallest of a row, density + epsilon for its largest.

    Rows lie along axis 1, a vector is one row. p_j = density - epsilon + 2 epsilon j / (L - 1), float64 from
    left to right, rounded once; L = 1: density."""
    if density >= 1 or density <= 0:
        return np.full(magnitudes.shape, np.float32(density >= 1))
    if density - epsilon <= 0 or density + epsilon >= 1:
        raise ValueError(
            f"density {density} and epsilon {epsilon}: density +- epsilon must lie between 0 and 1"
        )
    axis = 1 if magnitudes.ndim > 1 else 0
    rows = magnitudes if magnitudes.ndim else magnitudes.reshape(1)
    length = rows.shape[axis]
    rank = np.argsort(np.argsort(rows, axis=axis, kind="stable"), axis=axis, kind="stable")
    if length > 1:
        p = density - epsilon + 2 * epsilon * rank / (length - 1)
    else:
        p = np.full(rows.shape, float(density))
    return np.float32(p).reshape(magnitudes.shape)


def drawn(probability: np.ndarray, seed: int, name: str, position: int) -> np.ndarray:
    """u < p in float32."""
    u = uniforms(seed, name, position, 0, probability.size).reshape(probability.shape)
    return u < probability


def _select(row: Row, scores: np.ndarray, own: dict) -> np.ndarray:
    if row.sparsify == "magnitude":
        return kept_magnitudes(scores, own["density"])
    return kept_between_outliers(scores, own["density"], own["gamma"])


def _keep(row: Row, name: str, tensor: Tensor, settings: Settings) -> Kept:
    """Selection where each tensor decides for itself."""
    masks = np.ones((len(tensor.experts), *tensor.shape), bool)
    probability = np.ones(masks.shape, np.float32)
    for t, (d, own) in enumerate(zip(tensor.edits32(), settings.own, strict=True)):
        if row.sparsify in ("magnitude", "outliers"):
            masks[t] = _select(row, np.abs(d), own)
        elif row.sparsify != "none":
            if row.sparsify == "random":
                probability[t] = np.float32(min(own["density"], 1))
            else:
                probability[t] = rank_probabilities(np.abs(d), own["density"], own["epsilon"])
            masks[t] = drawn(probability[t], settings["seed"], name, own["position"])
    return Kept(masks, probability)


def _keep_by_model(row: Row, model: Model, settings: dict[str, Settings]) -> dict[str, Kept]:
    """Magnitudes and outliers counted over the whole model: the index goes on from tensor to tensor, in the
    order in which the model lists them."""
    found = {
        name: Kept(np.ones((len(t.experts), *t.shape), bool), np.ones((len(t.experts), *t.shape), np.float32))
        for name, t in model.items()
    }
    for where in places(settings).values():
        own = {
            k: same_everywhere(settings, where, k)
            for k in ("density", "gamma")
            if k in settings[where[0][0]].own[0]
        }
        edits = [model[name].edits32()[t] for name, t in where]
        kept = _select(row, np.abs(np.concatenate([d.ravel() for d in edits])), own)
        ends = np.cumsum([d.size for d in edits])
        for (name, t), piece in zip(where, np.split(kept, ends[:-1]), strict=True):
            found[name].masks[t] = piece.reshape(model[name].shape)
    return found


def _l1(x: np.ndarray) -> float:
    return math.fsum(np.abs(x).ravel().tolist())


def _rescale_by_norm(d: np.ndarray, mask: np.ndarray, own: dict, row: Row) -> float:
    """r_t = sum |d_t| / sum |k_t d_t|; 1 when either sum < 1e-7, and where nothing was sparsified."""
    if row.sparsify == "none" or own["density"] >= 1:
        return 1.0
    whole, kept = _l1(d), _l1(np.where(mask, d, 0.0))
    return 1.0 if min(whole, kept) < NORM_FLOOR else whole / kept


@dataclass(frozen=True)
class Weighted:
    """One tensor's y_t, float64 for values and float32 for the election, [T, *shape]."""

    values: np.ndarray
    votes: np.ndarray


def _weighted(row: Row, tensor: Tensor, kept: Kept, settings: Settings) -> Weighted:
    d32, d64 = tensor.edits32(), tensor.edits()
    values, votes = np.zeros(d64.shape), np.zeros(d32.shape, np.float32)
    for t, own in enumerate(settings.own):
        weight, mask = own["weight"], kept.masks[t]
        if settings["rescale"] and settings["rescale_by"] == "density":
            inverse = 1.0 / np.where(mask, kept.probability[t], np.float32(1)).astype(np.float64)
            if row.sparsify == "rank-random":
                vote = np.float32(weight) * (d32[t] / np.where(mask, kept.probability[t], np.float32(1)))
            else:
                inverse = 1.0 / own["density"] if 0 < own["density"] < 1 else 1.0
                vote = np.float32(weight * inverse) * d32[t]
            value = weight * inverse * d64[t]
        else:
            r = _rescale_by_norm(d64[t], mask, own, row) if settings["rescale"] else 1.0
            vote, value = np.float32(weight * r) * d32[t], weight * r * d64[t]
        values[t], votes[t] = np.where(mask, value, 0.0), np.where(mask, vote, np.float32(0))
    return Weighted(values, votes)


def vote_sum(votes: np.ndarray, consensus: str) -> np.ndarray:
    """float32 sum in recipe order of y_t, or of the signs of y_t (`consensus: count`)."""
    total = np.zeros(votes.shape[1:], np.float32)
    for y in votes:
        total = total + (np.sign(y) if consensus == "count" else y)
    return total


def _majority(sums: list[np.ndarray]) -> int:
    """The commoner sign among the sums of a whole model: +1 unless more are negative."""
    return 1 if sum(int((x > 0).sum()) - int((x < 0).sum()) for x in sums) >= 0 else -1


def _quotient(row: Row, agreed: np.ndarray, weights: list[float], settings: Settings) -> tuple:
    """(den, sum of |terms| of den): by which num is divided."""
    shape = agreed.shape[1:]
    if not settings["normalize"]:
        return np.ones(shape), np.ones(shape)
    den, den32, size = np.zeros(shape), np.zeros(shape, np.float32), np.zeros(shape)
    for g, weight in zip(agreed, weights, strict=True):
        den = den + np.where(g, weight, 0.0)
        den32 = den32 + np.where(g, np.float32(weight), np.float32(0))
        size = size + np.where(g, abs(weight), 0.0)
    none = (den32 == 0) | (den == 0) if row.elect else np.abs(den) < WEIGHT_FLOOR
    return np.where(none, 1.0, den), np.where(none, 1.0, size)


def _combined(
    row: Row, tensor: Tensor, kept: Kept, y: Weighted, sums: np.ndarray, zero: int, settings: Settings
) -> Merged:
    agreed = np.ones(y.values.shape, bool)
    if row.elect:
        elected = np.where(sums == 0, zero, np.where(sums > 0, 1, -1))
        agreed = np.sign(y.votes) == elected
    num = np.where(agreed, y.values, 0.0).sum(axis=0)
    den, size = _quotient(row, agreed, settings.each("weight"), settings)
    edit = settings["lambda"] * num / den
    terms = [settings["lambda"] * np.abs(x) * size / den**2 for x in y.values]  # den's own cancellation too
    return merged(tensor.base + edit, tensor, terms, kept.masks, agreed if row.elect else None)


def _evaluation(row: Row):
    def evaluate(model: Model, settings: dict[str, Settings]) -> dict[str, Merged]:
        by_model = any(s.shared.get("density_scope") == "model" for s in settings.values())
        if by_model:
            if not all(s["density_scope"] == "model" for s in settings.values()):
                raise ValueError("density_scope is the same for all tensors")
            kept = _keep_by_model(row, model, settings)
        else:
            kept = {name: _keep(row, name, t, settings[name]) for name, t in model.items()}
        y = {name: _weighted(row, t, kept[name], settings[name]) for name, t in model.items()}
        sums = {n: vote_sum(y[n].votes, settings[n].shared.get("consensus", "sum")) for n in model}
        majority = _majority(list(sums.values()))
        found = {}
        for name, tensor in model.items():
            zero = majority if settings[name].shared.get("zero_sign") == "majority" else 1
            found[name] = _combined(row, tensor, kept[name], y[name], sums[name], zero, settings[name])
        return found

    return evaluate


def _check(row: Row):
    def check(settings: Settings) -> None:
        for key, allowed in (
            ("density_scope", ("tensor", "model")),
            ("zero_sign", ("positive", "majority")),
            ("consensus", ("sum", "count")),
            ("rescale_by", ("norm", "density")),
        ):
            if settings.shared.get(key, allowed[0]) not in allowed:
                raise ValueError(f"{key} is {' or '.join(allowed)}, not {settings[key]!r}")
        magnitudes = row.sparsify in ("magnitude", "outliers")
        if settings["rescale"] and settings["rescale_by"] == "density" and magnitudes:
            raise ValueError("rescale_by: density is for random selection: no paper rescales magnitudes so")
        for own in settings.own:
            if row.sparsify in ("outliers", "random") and own["density"] < 0:
                raise ValueError(f"density is negative: {own['density']}")
            if "gamma" in own and not 0 <= own["gamma"] <= 1:
                raise ValueError(f"gamma must lie in [0, 1]: {own['gamma']}")

    return check


def _method(row: Row) -> Method:
    shared = {"lambda": 1.0, "normalize": row.normalize, "rescale": row.rescale, "int8_mask": False}
    shared["rescale_by"] = "norm"
    own = {"weight": REQUIRED, "density": 1.0}
    if row.elect:
        shared |= {"consensus": "sum", "zero_sign": "positive"}
    if row.sparsify in ("magnitude", "outliers"):
        shared["density_scope"] = "tensor"
    elif row.sparsify != "none":
        shared["seed"] = 0
    if row.sparsify == "outliers":
        own["gamma"] = 0.01
    if row.sparsify == "rank-random":
        own["epsilon"] = 0.15
    return Method(_evaluation(row), shared, own, check=_check(row))


METHODS = {name: _method(row) for name, row in ROWS.items()}
