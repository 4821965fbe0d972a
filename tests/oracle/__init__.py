"""What every merge method must compute, straight from the formulas: values in float64, decisions in float32.

Numpy alone, written method by method; shares no code with the package. A method's module says which of its
decisions are float32 and in which order their operations are: backends reproduce masks bit for bit. Values
are float64, and agree with a backend's within a rounding of its output type (`Merged.operand` bounds it).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from . import absent, combine, elementwise, gram, options, ota, spectral, task_vectors
from .ota import kept_by_density, kept_by_mass, low_rank, norm, rank1, score
from .parameters import Method, Settings, resolve
from .tensors import Merged, Tensor, task_vector

__all__ = [
    "METHODS",
    "Merged",
    "Method",
    "Tensor",
    "evaluate",
    "kept_by_density",
    "kept_by_mass",
    "low_rank",
    "norm",
    "rank1",
    "score",
    "task_vector",
]

METHODS: dict[str, Method] = {
    **ota.METHODS,
    **elementwise.METHODS,
    **task_vectors.METHODS,
    **gram.METHODS,
    **combine.METHODS,
    **spectral.METHODS,
}


def evaluate(
    model: dict[str, Tensor],
    method: str = "ota",
    settings: dict[str, dict[str, Any]] | None = None,
    **parameters: Any,
) -> dict[str, Merged]:
    """Merge a model.

    parameters: recipe keys, and the options `layers`, `match_norm`, `weights_path` (the table itself); a key
    of one model is one value, or a list of T values. settings: parameters of single tensors, where gradients
    or filters make them differ. The order of `model` is that of the layout, which decides among equal scores
    where a density counts over the model. A tensor that the method leaves out is missing from the result.
    ValueError: a parameter that is unknown, missing or out of range, a wrong number of models, inputs that
    have no merge.
    """
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; known: {', '.join(sorted(METHODS))}")
    row = METHODS[method]
    chosen = {key: parameters.pop(key) for key in options.KEYS if key in parameters}
    options.check(method, row, model, chosen)
    single = dict(settings or {})
    if chosen.get("weights_path") is not None:
        for name, weights in options.table_weights(chosen["weights_path"], model).items():
            single[name] = single.get(name, {}) | weights
    counts = {len(tensor.experts) for tensor in model.values()}
    if len(counts) > 1:
        raise ValueError(f"tensors have {sorted(counts)} experts: give None where a model lacks one")
    n_experts = counts.pop() if counts else 0
    _check_count(method, row, n_experts)
    if row.base == "ignored":
        model = {name: replace(tensor, base=None) for name, tensor in model.items()}
    if row.base == "required" and model and all(tensor.base is None for tensor in model.values()):
        raise ValueError(f"{method} needs a base")

    passed: dict[str, Merged] = {}
    present: dict[str, Tensor] = {}
    resolved: dict[str, Settings] = {}
    for name, tensor in model.items():
        own = resolve(method, row, parameters | single.get(name, {}), n_experts)
        left = absent.reduce(name, row, tensor, own)
        if isinstance(left, Merged):
            passed[name] = left
        elif left is not None:
            present[name], resolved[name] = left
    if chosen.get("layers") is not None:
        resolved = options.scaled(resolved, options.layer_factors(chosen["layers"], model))
    found = row.evaluate(present, resolved)
    if chosen.get("match_norm") is not None:
        factor = options.norm_factor(present, found, resolved)
        found = row.evaluate(present, options.scaled(resolved, dict.fromkeys(resolved, factor)))
    found = {name: absent.spread_out(m, n_experts, resolved[name]) for name, m in found.items()}
    return {name: (passed | found)[name] for name in model if name in passed or name in found}


def _check_count(method: str, row: Method, n_experts: int) -> None:
    if n_experts < row.least or (row.most is not None and n_experts > row.most):
        wanted = f"exactly {row.least}" if row.least == row.most else f"at least {row.least}"
        raise ValueError(f"{method} takes {wanted} model(s) besides the base, not {n_experts}")
