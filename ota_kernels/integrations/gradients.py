"""Merges that are linear in their weights, with gradients: weights learned by gradient (aTLAS, AdaMerging).

torch.ops.ota_kernels.weighted(base, experts, weight, lambda_, normalize)

    out = w_0 + lambda sum_t weight_t d_t / W        W = sum_t weight_t with `normalize`, else 1
    d out / d weight_t = lambda (d_t - s [normalize] ) / W,  s = sum_t weight_t d_t / W;   d out / d lambda =
    s d out / d w_t = lambda weight_t / W;   d out / d w_0 = 1 - lambda sum_t weight_t / W

Without a base d_t is w_t, w_0 is 0 and lambda is 1. The forward pass is the merge kernel; products of the
backward pass are summed in float64.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError, RecipeError

METHODS = {
    "linear": True,
    "task_arithmetic": False,
}  # and whether they divide by the sum of weights by themselves
KEYS = ("weight", "lambda_", "lambda")


def are_given(parameters: Mapping[str, Any]) -> bool:
    """Whether some weights are tensors, so that gradients may be asked for."""
    torch = sys.modules.get("torch")
    return torch is not None and any(isinstance(parameters.get(key), torch.Tensor) for key in KEYS)


def merge_state_dicts(
    base: Mapping[str, Any] | None,
    experts: Sequence[Mapping[str, Any]],
    method: str,
    parameters: Mapping[str, Any],
) -> dict[str, Any]:
    """`api.merge_state_dicts` where `weight` is a tensor [experts], or `lambda_` one of shape (): results
    have gradients for them, and for inputs that require them. RecipeError for methods that are not linear in
    them."""
    import torch

    if method not in METHODS:
        raise RecipeError(
            f"`{method}` is not linear in its weights, so it has no gradient: use {' or '.join(METHODS)}, "
            "or give "
            "numbers"
        )
    parameters = {
        key: v for key, v in parameters.items() if v is not None and (key, v) != ("backend", "auto")
    }
    unknown = sorted(set(parameters) - {"weight", "lambda_", "lambda", "normalize"})
    if unknown:
        raise RecipeError(f"`{unknown[0]}` is not understood beside weights that are tensors: leave it out")
    lambda_ = parameters.get("lambda_", parameters.get("lambda"))
    if method == "linear":
        base = None
        if lambda_ is not None:
            raise RecipeError("`lambda` is not used by `linear`: leave it out")
    elif base is None:
        raise RecipeError("`task_arithmetic` needs a base")
    first = experts[0] if base is None else base
    if any(set(model) != set(first) for model in experts):
        raise InputError(
            "the models differ in the tensors that they have: weights with gradients need the same"
        )
    like = next(iter(first.values()))
    weight = _tensor(parameters.get("weight", 1.0), like)
    weight = weight.expand(len(experts)) if weight.ndim == 0 else weight
    if tuple(weight.shape) != (len(experts),):
        raise RecipeError(
            f"`weight` has shape {list(weight.shape)}: it must be [{len(experts)}], one per expert"
        )
    normalize = bool(parameters.get("normalize", METHODS[method]))
    factor = _tensor(1.0 if lambda_ is None else lambda_, like)
    merged = {}
    for name in first:
        given = None if base is None else base[name]
        each = [model[name] for model in experts]
        if not all(t.is_floating_point() for t in each):
            raise InputError(f"{name!r} is not floating point: leave it out of a merge with gradients")
        merged[name] = torch.ops.ota_kernels.weighted(given, each, weight, factor, normalize)
    return merged


def _tensor(value: Any, like: Any) -> Any:
    import torch

    return (
        value
        if isinstance(value, torch.Tensor)
        else torch.tensor(value, dtype=torch.float64, device=like.device)
    )


def define() -> None:
    """Register the operators with torch."""
    import torch
    from torch import Tensor

    from .. import api

    @torch.library.custom_op(
        "ota_kernels::weighted",
        mutates_args=(),
        schema="(Tensor? base, Tensor[] experts, Tensor weight, Tensor lambda_, bool normalize) -> Tensor",
    )
    def weighted(
        base: Tensor | None, experts: Sequence[Tensor], weight: Tensor, lambda_: Tensor, normalize: bool
    ) -> Tensor:
        numbers: dict[str, Any] = {"weight": weight.tolist(), "normalize": normalize}
        if base is None:
            return merged(None, experts, method="linear", **numbers)
        numbers["lambda_"] = float(lambda_)
        return merged(base, experts, method="task_arithmetic", **numbers)

    def merged(base: Tensor | None, experts: Sequence[Tensor], **options: Any) -> Tensor:
        function = api.merge_state_dicts.__wrapped__  # draft_export runs operators while it traces
        given = None if base is None else {"weight": base}
        return function(given, [{"weight": x} for x in experts], **options)["weight"].contiguous()

    @weighted.register_fake
    def _(base, experts, weight, lambda_, normalize):
        like = experts[0] if base is None else base
        return like.new_empty(like.shape)

    @torch.library.custom_op(
        "ota_kernels::weighted_products",
        mutates_args=(),
        schema="(Tensor gradient, Tensor? base, Tensor[] experts) -> Tensor",
    )
    def products(gradient: Tensor, base: Tensor | None, experts: Sequence[Tensor]) -> Tensor:
        """<gradient, d_t>, float64[experts]."""
        step = 1 << 20
        flat = [None if t is None else t.reshape(-1) for t in (gradient, base, *experts)]
        total = torch.zeros(len(experts), dtype=torch.float64, device=gradient.device)
        for start in range(0, gradient.numel(), step):
            g, b, *each = [None if t is None else t[start : start + step].double() for t in flat]
            total += torch.stack([g @ (w if b is None else w - b) for w in each])
        return total

    @products.register_fake
    def _(gradient, base, experts):
        return gradient.new_empty(len(experts), dtype=torch.float64)

    def save(ctx, inputs, output):
        base, experts, weight, lambda_, normalize = inputs
        ctx.has_base, ctx.normalize = base is not None, normalize
        ctx.save_for_backward(weight, lambda_, *([] if base is None else [base]), *experts)

    def backward(ctx, gradient):
        weight, lambda_, *models = ctx.saved_tensors
        base, experts = (models[0], models[1:]) if ctx.has_base else (None, models)
        w, factor = weight.double(), lambda_.double()
        total = w.sum() if ctx.normalize else torch.ones((), dtype=torch.float64, device=w.device)
        found = torch.ops.ota_kernels.weighted_products(gradient, base, experts)
        whole = (w * found).sum() / total  # <gradient, s>
        of_weight = factor * (found - (whole if ctx.normalize else 0.0)) / total
        share = factor * w / total
        of_base = None
        if ctx.has_base:
            of_base = gradient * (1 - share.sum()).to(gradient.dtype)
        of_experts = [
            (gradient * s.to(gradient.dtype)).to(e.dtype) for s, e in zip(share, experts, strict=True)
        ]
        return (
            of_base,
            of_experts,
            of_weight.to(weight.dtype),
            whole.to(lambda_.dtype).reshape(lambda_.shape) if ctx.has_base else torch.zeros_like(lambda_),
            None,
        )

    weighted.register_autograd(backward, setup_context=save)
