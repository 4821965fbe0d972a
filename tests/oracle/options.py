"""Options of every row that adds edits to a base, and tables of weights (FIELD section 1).

layers: [a, b]     lambda of layer l of L times a + (b - a) l / (L - 1), a outside the layers; L = 1: b
match_norm: mean   lambda times mean_t ||d_t|| / ||out - w_0||, norms over the whole model in float64, out
                   with its own lambda and layers; a merged edit of 0 stays 0
weights_path       {tensor: T weights}: takes the place of `weight`; every tensor needs its row
origin             `Tensor.origins`: d_t = w_t - o_t, in values, decisions and norms alike
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from .parameters import Method, Model, Settings
from .tensors import Merged

KEYS = ("layers", "match_norm", "weights_path")


def check(name: str, method: Method, model: Model, options: dict) -> None:
    """ValueError for an option that has no meaning here."""
    has_base = all(t.base is not None for t in model.values())
    for key in ("layers", "match_norm"):
        if options.get(key) is not None and not (method.edits and has_base):
            raise ValueError(f"{name} adds no edits to a base: {key} has no meaning")
    if any(t.origins is not None for t in model.values()) and not (method.edits and has_base):
        raise ValueError(f"{name} adds no edits to a base: origin has no meaning")
    if options.get("match_norm") not in (None, "mean"):
        raise ValueError(f"match_norm is mean, not {options['match_norm']!r}")
    if options.get("weights_path") is not None and "weight" not in method.own:
        raise ValueError(f"{name} has no weights: weights_path has no meaning")


def table_weights(table: dict[str, list[float]], model: Model) -> dict[str, dict]:
    """{tensor: {weight: T values}} of a table that covers the model; ValueError otherwise."""
    missing, unknown = model.keys() - table.keys(), table.keys() - model.keys()
    if missing or unknown:
        raise ValueError(f"the table of weights lacks {sorted(missing)} and has {sorted(unknown)} besides")
    return {name: {"weight": [float(w) for w in row]} for name, row in table.items()}


def layer_factors(pair: list[float], model: Model) -> dict[str, float]:
    """LiNeS: the factor of each tensor's edit."""
    a, b = pair
    last = max((t.layer for t in model.values() if t.layer is not None), default=0)

    def factor(layer: int | None) -> float:
        if layer is None:
            return a
        return a + (b - a) * layer / last if last else b

    return {name: factor(t.layer) for name, t in model.items()}


def scaled(settings: dict[str, Settings], factors: dict[str, float]) -> dict[str, Settings]:
    """Settings with each tensor's lambda multiplied."""
    return {
        name: replace(s, shared=s.shared | {"lambda": s["lambda"] * factors[name]})
        for name, s in settings.items()
    }


def norm_factor(model: Model, merged: dict[str, Merged], settings: dict[str, Settings]) -> float:
    """mean_t ||d_t|| / ||merged edit||; t over all experts of the recipe."""
    if any(not s.shared.get("fallback_to_base", True) for s in settings.values()):
        raise ValueError(
            "match_norm needs fallback_to_base: a fallback to the experts' mean is no edit of theirs"
        )
    squares: dict[int, float] = {}
    for name, tensor in model.items():
        for d, own in zip(tensor.edits(), settings[name].own, strict=True):
            squares[own["position"]] = squares.get(own["position"], 0.0) + float(np.square(d).sum())
    length = math.sqrt(sum(float(np.square(merged[n].out - t.base).sum()) for n, t in model.items()))
    if not length:
        return 1.0
    return sum(map(math.sqrt, squares.values())) / len(squares) / length
