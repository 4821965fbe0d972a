"""The functional API as torch operators: torch.compile and torch.export keep its calls in one graph.

torch.ops.ota_kernels.merge(tensors, numbers, call)        merge_state_dicts, and with it merge_tensors
torch.ops.ota_kernels.graft(tensors, numbers, call)        graft
torch.ops.ota_kernels.topk_threshold(score, k, largest)    topk_threshold

Importing this module registers them. In a region that torch traces, the functional API calls the functions
below that have its names (tracing.py). An operator has one implementation, the functional API itself, for the
tensors of every device. It leaves its inputs as they are and returns new, contiguous tensors. It has no
gradient: results are detached, whether or not inputs require gradients. Weights that are tensors go to
another operator, which has gradients (gradients.py).

`call` holds the arguments as JSON, in which {"tensor": i} and {"number": i} stand for items of the lists:
tensors, and with dynamic shapes numbers too, are symbols while torch traces.

Wrong arguments raise the functional API's errors, when the operator runs: what it returns while torch traces
has the shapes and types of a call that is right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import api as functional
from .. import topk as selection
from ..arguments import recipe_of
from ..errors import InputError, RecipeError
from ..planning.buffers import written_type
from ..recipe import methods
from ..recipe.parameters import DTYPE, parse_plain
from ..tensors.dtypes import BY_NAME
from . import gradients

_MODELS = "(Tensor[] tensors, Scalar[] numbers, str call) -> Tensor[]"
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)

# For most arguments the host decides while these run, which no CUDA graph can hold (api.merge_tensors says
# which it can), and torch is told of an operator, not of its call; older versions cannot be told.
_TAGS = {"tags": [torch.Tag.cudagraph_unsafe]} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


def merge_state_dicts(
    base: Mapping[str, Tensor] | None,
    experts: Sequence[Mapping[str, Tensor]],
    curvatures: Sequence[Mapping[str, Tensor]] | None = None,
    *,
    method: str = "ota",
    origins: Sequence[Mapping[str, Tensor] | None] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """functional.merge_state_dicts by its operator."""
    if any(isinstance(options.get(key), Tensor) for key in gradients.KEYS):
        return gradients.merge_state_dicts(base, experts, method, {**options, "curvatures": curvatures})
    if not _uses_base(method):
        base = None
    arguments = {"base": base, "experts": experts, "curvatures": curvatures, "method": method, **options}
    arguments |= {} if origins is None else {"origins": origins}
    merged = torch.ops.ota_kernels.merge(*packed(arguments))
    return dict(zip(_first(base, experts), merged, strict=True))


def graft(
    base: Tensor | Mapping[str, Tensor],
    expert: Tensor | Mapping[str, Tensor],
    curvature: Tensor | Mapping[str, Tensor] | None,
    **options: Any,
) -> Tensor | dict[str, Tensor]:
    """functional.graft by its operator."""
    arguments = {"base": base, "expert": expert, "curvature": curvature, **options}
    grafted = torch.ops.ota_kernels.graft(*packed(arguments))
    return dict(zip(base, grafted, strict=True)) if isinstance(base, Mapping) else grafted[0]


def topk_threshold(score: Tensor, k: int | Sequence[int], *, largest: bool = True) -> Tensor | list[Tensor]:
    """selection.topk_threshold by its operator.

    A threshold is a float64 tensor of shape () on the score's device, since a graph holds tensors only:
    `score >= threshold` is what it is with the number.
    """
    several = isinstance(k, Sequence)
    thresholds = torch.ops.ota_kernels.topk_threshold(score, list(k) if several else [k], largest)
    return list(thresholds.unbind()) if several else thresholds[0]


def packed(arguments: Mapping[str, Any]) -> tuple[list[Tensor], list[int | float], str]:
    """(tensors, numbers, call): keyword arguments of the functional API as the operators take them."""
    tensors, numbers = [], []
    return tensors, numbers, _json(_placeholders(arguments, tensors, numbers))


def _placeholders(value: Any, tensors: list[Tensor], numbers: list[int | float]) -> Any:
    """The value as JSON can hold it; its tensors and numbers are appended to the lists."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, _NUMBERS) and not isinstance(value, bool):
        numbers.append(value)
        return {"number": len(numbers) - 1}
    if isinstance(value, Mapping):
        return {"items": [[key, _placeholders(item, tensors, numbers)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_placeholders(item, tensors, numbers) for item in value]
    return value


def _unpacked(tensors: Sequence[Tensor], numbers: Sequence[int | float], call: str) -> dict[str, Any]:
    """The arguments that `packed` was given."""

    def restored(value: Any) -> Any:
        if isinstance(value, list):
            return [restored(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "items":
            return {key: restored(item) for key, item in content}
        return (tensors if kind == "tensor" else numbers)[content]

    return restored(json.loads(call))


@torch.compiler.assume_constant_result
def _json(value: Any) -> str:
    """JSON; of what no argument may be its repr, which the error then shows."""
    return json.dumps(value, default=repr)


@torch.compiler.assume_constant_result
def _uses_base(method: str) -> bool:
    return method not in methods.names() or methods.get(method).base != "ignored"


def _first(base: Any, experts: Sequence[Any]) -> Any:
    """The model whose tensors tell what a merge returns: their names, shapes and devices."""
    if base is not None:
        return base
    return experts[0] if experts else {}


@torch.library.custom_op("ota_kernels::merge", mutates_args=(), schema=_MODELS, **_TAGS)
def _merge(tensors: list[Tensor], numbers: list[int | float], call: str) -> list[Tensor]:
    arguments = _unpacked(tensors, numbers, call)
    merged = _untraced(functional.merge_state_dicts)(**arguments)
    # What a graph returns must be known before it runs.
    odd = set(merged) ^ set(_first(arguments["base"], arguments["experts"]))
    if odd:
        raise InputError(
            f"the models differ in the tensors they have: {min(odd)!r} is in some only, which a compiled "
            "graph cannot merge: call merge_state_dicts outside of it"
        )
    return [tensor.contiguous() for tensor in merged.values()]


@_merge.register_fake
def _(tensors: list[Tensor], numbers: list[int | float], call: str) -> list[Tensor]:
    arguments = _unpacked(tensors, numbers, call)
    base, experts = arguments["base"], arguments["experts"]
    models = [*([] if base is None else [base]), *experts]
    dtype = _output_dtype(arguments)
    merged = []
    for name, like in _first(base, experts).items():
        held = [model[name] for model in models if name in model]
        floats = all(tensor.is_floating_point() for tensor in held)
        own = _buffer_type(name, held)
        merged.append(_described(like, tensors, own or (dtype if floats else None)))
    return merged


def _buffer_type(name: str, held: Sequence[Tensor]) -> torch.dtype | None:
    """The type of a buffer that is written in its own, whatever `out_dtype` says."""
    known = [BY_NAME.get(str(tensor.dtype).removeprefix("torch.")) for tensor in held]
    if None in known:
        return None
    dtype = written_type(name, tuple(held[0].shape), known)
    return dtype and getattr(torch, dtype.name)


def _output_dtype(arguments: Mapping[str, Any]) -> torch.dtype | None:
    """The type that `out_dtype` asks for, None for each tensor's own."""
    base, experts, curvatures = (arguments[key] for key in ("base", "experts", "curvatures"))
    given = arguments.get("out_dtype")
    if not _first(base, experts):  # torch drops a call without results, so it could not raise later
        recipe_of(base is not None, len(experts), curvatures is not None, arguments["method"], given, {})
    try:
        name = None if given is None else parse_plain(given, "`out_dtype`", DTYPE)
    except RecipeError:
        return None
    return name and getattr(torch, name)


@torch.library.custom_op("ota_kernels::graft", mutates_args=(), schema=_MODELS, **_TAGS)
def _graft(tensors: list[Tensor], numbers: list[int | float], call: str) -> list[Tensor]:
    grafted = _untraced(functional.graft)(**_unpacked(tensors, numbers, call))
    return [tensor.contiguous() for tensor in _tensors(grafted)]


@_graft.register_fake
def _(tensors: list[Tensor], numbers: list[int | float], call: str) -> list[Tensor]:
    arguments = _unpacked(tensors, numbers, call)
    base, expert = arguments["base"], arguments["expert"]
    if not isinstance(base, Mapping):
        return [_described(base, tensors)]
    held = {name: [like, *([expert[name]] if name in expert else [])] for name, like in base.items()}
    return [_described(like, tensors, _buffer_type(name, held[name])) for name, like in base.items()]


def _tensors(model: Tensor | Mapping[str, Tensor]) -> list[Tensor]:
    return list(model.values()) if isinstance(model, Mapping) else [model]


@torch.library.custom_op(
    "ota_kernels::topk_threshold",
    mutates_args=(),
    schema="(Tensor score, Scalar[] k, bool largest) -> Tensor",
    **_TAGS,
)
def _topk_threshold(score: Tensor, k: list[int], largest: bool) -> Tensor:
    thresholds = _untraced(selection.topk_threshold)(score, k, largest=largest)
    return torch.tensor(thresholds, dtype=torch.float64, device=score.device)


@_topk_threshold.register_fake
def _(score: Tensor, k: list[int], largest: bool) -> Tensor:
    return score.new_empty(len(k), dtype=torch.float64)


def _described(like: Tensor, tensors: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """What stands for a result of like's shape, and its type if dtype is None.

    It is meta where any input is: torch calls the fake kernel for real tensors too if one of them is meta.
    """
    meta = any(tensor.device.type == "meta" for tensor in tensors)
    return like.new_empty(like.shape, dtype=dtype, device="meta" if meta else like.device)


def _untraced(function: Any) -> Any:
    """The function as it is when nothing is traced: draft_export runs operators while it traces."""
    return function.__wrapped__


def _detach(ctx: Any, inputs: tuple[Any, ...], output: Tensor | list[Tensor]) -> None:
    ctx.mark_non_differentiable(*(output if isinstance(output, list) else [output]))


for _operator in (_merge, _graft, _topk_threshold):
    _operator.register_autograd(lambda ctx, *gradients: None, setup_context=_detach)

gradients.define()
