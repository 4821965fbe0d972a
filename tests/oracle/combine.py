"""`combine`: any selection, any consensus, weights fixed or by curvature.

    out = w_0 + lambda sum_t g_t P_t r_t d_t / sum_t g_t P_t (normalize: false: not divided)
    P_t = weight_t, or weight_t h_t^power + 1e-26;   where nobody is left, or the weights sum to 0: the base

Selections, draws, rescale factors and elections are those of the task-vector family (votes know weight_t and
r_t, not h_t); saliency keeps exactly k in the order (saliency descending, index ascending), saliencies as
`ota` has them.
"""

from __future__ import annotations

import numpy as np

from . import task_vectors
from .ota import score
from .parameters import Method, Model, Settings
from .task_vectors import Kept, Row
from .tensors import Merged, Tensor, merged

_SPARSIFY = {"rank": "rank-random"}
_EPSILON = 1e-26


def _row(settings: Settings) -> Row:
    sparsify = _SPARSIFY.get(settings["select"], settings["select"])
    return Row(sparsify, settings["consensus"] != "none", settings["normalize"], settings["rescale"])


def _curvature(tensor: Tensor, t: int) -> np.ndarray:
    return np.ones(tensor.shape, np.float32) if tensor.curvatures is None else tensor.curvatures[t]


def _kept(row: Row, name: str, tensor: Tensor, settings: Settings) -> Kept:
    if row.sparsify != "saliency":
        return task_vectors._keep(row, name, tensor, settings)
    masks = [
        task_vectors.kept_magnitudes(score(_curvature(tensor, t), d), own["density"])
        for t, (d, own) in enumerate(zip(tensor.edits32(), settings.own, strict=True))
    ]
    return Kept(np.array(masks), np.ones((len(masks), *tensor.shape), np.float32))


def _combine(name: str, tensor: Tensor, kept: Kept, settings: Settings, majority: int) -> Merged:
    row = _row(settings)
    y = task_vectors._weighted(row, tensor, kept, settings)
    agreed = kept.masks
    if row.elect:
        sums = task_vectors.vote_sum(y.votes, settings["consensus"])
        elected = np.where(sums == 0, majority, np.where(sums > 0, 1, -1))
        agreed = kept.masks & (np.sign(y.votes) == elected)
    weights = np.array(settings.each("weight")).reshape(-1, *[1] * len(tensor.shape))
    p, factor = np.broadcast_to(weights, agreed.shape), np.ones(agreed.shape)
    if settings["weigh"] == "curvature":
        h = np.array([_curvature(tensor, t) for t in range(len(agreed))], np.float64)
        p = weights * h ** settings["power"] + _EPSILON
        factor = np.where(weights == 0, 0.0, p / np.where(weights == 0, 1.0, weights))
    terms = np.where(agreed, y.values * factor, 0.0)
    den = np.where(agreed, p, 0.0).sum(axis=0) if settings["normalize"] else np.ones(tensor.shape)
    den = np.where(den == 0, 1.0, den)
    edit = settings["lambda"] * terms.sum(axis=0) / den
    size = np.where(agreed, np.abs(p), 0.0).sum(axis=0) / np.abs(den) if settings["normalize"] else 1.0
    parts = [settings["lambda"] * np.abs(x) / np.abs(den) * size for x in terms]
    return merged(tensor.base + edit, tensor, parts, kept.masks, agreed)


def combine(model: Model, settings: dict[str, Settings]) -> dict[str, Merged]:
    first = next(iter(settings.values()))
    if first["density_scope"] == "model":
        kept = task_vectors._keep_by_model(_row(first), model, settings)
    else:
        kept = {n: _kept(_row(settings[n]), n, tensor, settings[n]) for n, tensor in model.items()}
    majority = 1
    if first["zero_sign"] == "majority":
        y = {n: task_vectors._weighted(_row(settings[n]), t, kept[n], settings[n]) for n, t in model.items()}
        sums = [task_vectors.vote_sum(y[n].votes, settings[n]["consensus"]) for n in model]
        majority = task_vectors._majority(sums)
    return {n: _combine(n, tensor, kept[n], settings[n], majority) for n, tensor in model.items()}


METHODS = {
    "combine": Method(
        combine,
        {
            "select": "magnitude",
            "consensus": "none",
            "weigh": "fixed",
            "normalize": True,
            "rescale": False,
            "rescale_by": "norm",
            "power": 0.5,
            "density_scope": "tensor",
            "zero_sign": "positive",
            "seed": 0,
        },
        {"weight": 1.0, "density": 1.0, "gamma": 0.01, "epsilon": 0.15},
        least=1,
    )
}
