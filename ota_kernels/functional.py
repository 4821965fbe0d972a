"""Merging tensors in memory: torch tensors or numpy arrays in, the same kind out.

Tensors on a GPU are merged there: nothing of their size crosses to the host, and everything runs on the
calling thread's current stream.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from . import backends, methods, resident
from .backends import Backend
from .candidates import Store
from .dtypes import BY_NAME, OUTPUT_NAMES, DType
from .engine import Engine
from .errors import BackendError, InputError, RecipeError
from .interchange import array_like, buffer_of, device_of, numpy_dtype
from .memory import GraftSink, Inline, MemorySink
from .models import buffers
from .planning import TILE_ELEMENTS
from .pool import Pool, default_threads
from .recipe import Recipe, parse_recipe
from .survey import Survey
from .tensors import Buffer, Curvature, Full, TensorInputs, Uniform
from .tracing import traceable

logger = logging.getLogger(__name__)

_UNLIMITED = 1 << 62  # inputs in memory leave room for their few candidates

Tensor = TypeVar("Tensor")  # torch.Tensor or numpy.ndarray
Model = TypeVar("Model")  # a Tensor, or a dictionary of them


def merge_tensors(
    base: Tensor | None,
    experts: Sequence[Tensor],
    curvatures: Sequence[Tensor] | None = None,
    *,
    method: str = "ota",
    name: str = "weight",
    out_dtype: str | None = None,
    backend: str = "auto",
    threads: int | None = None,
    **parameters: Any,
) -> Tensor:
    """Merge one tensor of several models: out = w_0 + lambda sum_t P_t d_t / sum_t P_t (arXiv 2509.11167).

    base: any shape, or None for methods that need none; experts: tensors of the same shape, in recipe order;
    curvatures: second moments v_t of each expert, same shape, float32, bfloat16 or float16, >= 0 (units of
    squared gradient), or None for curvature 1 everywhere. name: tells embeddings and output matrices from
    other matrices where that matters (`rank`, `rescale`). parameters: the recipe's keys (`density`,
    `precond_threshold`, `power`, `lambda_` for `lambda`, ...); a key of one model may be a list with a value
    per expert. Densities are over this tensor.

    Tensors on a GPU, all on one, are merged there by the backend `triton`, on the current stream. For others
    `auto` is `native`; `triton` streams them through a GPU.

    Returns a new tensor like the first input, on its device, in out_dtype (default: the base's, or first
    expert's, type). Raises RecipeError for a wrong parameter, InputError for tensors that do not fit, are not
    finite or lie on several devices, BackendError for a device that the backend does not serve.
    """
    merged = merge_state_dicts(
        None if base is None else {name: base},
        [{name: expert} for expert in experts],
        None if curvatures is None else [{name: curvature} for curvature in curvatures],
        method=method,
        out_dtype=out_dtype,
        backend=backend,
        threads=threads,
        **parameters,
    )
    return merged[name]


@traceable
def merge_state_dicts(
    base: Mapping[str, Tensor] | None,
    experts: Sequence[Mapping[str, Tensor]],
    curvatures: Sequence[Mapping[str, Tensor]] | None = None,
    *,
    method: str = "ota",
    out_dtype: str | None = None,
    backend: str = "auto",
    threads: int | None = None,
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merge dictionaries of tensors; densities are over all of them (`density_scope: model`) unless told.

    Arguments and errors as for `merge_tensors`. Tensors that are not floating point, and buffers that no
    optimizer trained (`inv_freq`, masks, counters), are copied in their own type when all models agree. Names
    that only some dictionaries have are an error unless `extra_tensors` says otherwise; of buffers, the first
    one's is taken. A name without curvature is an error unless `missing_curvature` says otherwise.
    """
    recipe = _recipe(base is not None, len(experts), curvatures is not None, method, out_dtype, parameters)
    return _merge_models(base, experts, curvatures, recipe, backend, threads, MemorySink)


@traceable
def graft(
    base: Model,
    expert: Model,
    curvature: Model | None,
    *,
    density: float | None = None,
    saliency_mass: float | None = None,
    precond_threshold: float | None = None,
    density_scope: str = "model",
    rank: int | None = None,
    rank1_approx: bool = False,
    missing_curvature: str = "error",
    backend: str = "auto",
    threads: int | None = None,
) -> Model:
    """Fast Fisher Grafting (arXiv 2509.11167): the base, with one expert's most salient edits.

    base, expert: a tensor each, of the same shape and any floating-point type that a merge can be written
    in, or dictionaries of tensors; curvature: the expert's second moments as for `merge_tensors`, or None for
    curvature 1, which grafts by magnitude. Exactly one of density, saliency_mass and precond_threshold says
    which edits are kept; they and the other parameters are the recipe's keys. Masks are those of a merge with
    this one expert: exact, ties kept.

    Returns new tensors of the base's types, a tensor or a dictionary like the base: where an edit is dropped,
    the base's value bit for bit, where it is kept, the expert's value bit for bit (rounded to the base's type
    where the expert's differs). An edit from 0 to -0 is none. Errors are those of `merge_tensors`, which call
    the expert experts[0].
    """
    selections = {"density": density, "saliency_mass": saliency_mass, "precond_threshold": precond_threshold}
    given = {key: value for key, value in selections.items() if value is not None}
    if len(given) != 1:
        found = " and ".join(f"`{key}`" for key in given) or "none"
        raise RecipeError(f"a graft takes exactly one of {', '.join(selections)}, not {found}")
    models = [base, expert] if curvature is None else [base, expert, curvature]
    kinds = {isinstance(model, Mapping) for model in models}
    if len(kinds) > 1:
        raise InputError("base, expert and curvature must be all tensors, or all dictionaries of tensors")
    parameters = given | {
        "masked_task_vector_merge_method": "linear",  # w_0 + d: the weights of one expert cancel
        "density_scope": density_scope,
        "rank1_approx": rank1_approx,
        "missing_curvature": missing_curvature,
    }
    if rank is not None:
        parameters["rank"] = rank
    recipe = _recipe(True, 1, curvature is not None, "ota", None, parameters)
    whole = kinds == {True}
    base, expert, *curvatures = models if whole else [{"weight": model} for model in models]
    merged = _merge_models(base, [expert], curvatures or None, recipe, backend, threads, GraftSink)
    return {name: merged[name] for name in base if name in merged} if whole else merged["weight"]


def _merge_models(
    base: Mapping[str, Tensor] | None,
    experts: Sequence[Mapping[str, Tensor]],
    curvatures: Sequence[Mapping[str, Tensor]] | None,
    recipe: Recipe,
    backend: str,
    threads: int | None,
    sink: type[MemorySink],
) -> dict[str, Tensor]:
    if threads is not None and threads < 1:
        raise RecipeError(f"threads must be at least 1, not {threads}")
    if curvatures is not None and len(curvatures) != len(experts):
        raise InputError(f"{len(experts)} experts but {len(curvatures)} curvatures")
    has_base = base is not None and methods.get(recipe.merge_method).base != "unused"
    models = {"base": base} if has_base else {}
    models |= {f"experts[{t}]": expert for t, expert in enumerate(experts)}
    names = list(dict.fromkeys(name for model in models.values() for name in model))
    if not names:
        return {}
    found_in = {name: next(label for label, model in models.items() if name in model) for name in names}
    first = {name: models[label][name] for name, label in found_in.items()}
    name, tensor = next(iter(first.items()))
    chosen, read = _serving(backend, tensor, f"{found_in[name]}[{name!r}]")

    merged: dict[str, Tensor] = {}
    tensors = []
    for tensor_name, like in first.items():
        own = {
            label: read(model[tensor_name], f"{label}[{tensor_name!r}]")
            for label, model in models.items()
            if tensor_name in model
        }
        choice = _choice(tensor_name, own, models, recipe, has_base)
        if choice.action == buffers.DROP:
            continue
        if choice.action in (buffers.TAKE, buffers.AVERAGE):
            merged[tensor_name] = _untrained(tensor_name, own, models, recipe, choice)
            continue
        _check_alike(tensor_name, like, models)
        weights = list(own.values())
        if not all(b.dtype.is_float for b in weights):
            merged[tensor_name] = _agreed(tensor_name, like, weights)
            continue
        kept, found = _curvatures(tensor_name, tuple(like.shape), len(experts), curvatures, recipe, read)
        out = choice.dtype or _output_dtype(recipe, like, weights[0])
        weights = weights if not kept else [weights[0]] * len(weights)
        tensors.append(
            TensorInputs(
                tensor_name,
                tuple(like.shape),
                out,
                weights[0] if has_base else None,
                tuple(weights[1:] if has_base else weights),
                found,
            )
        )
    if tensors:
        _merge(first, tensors, merged, recipe, chosen, threads, sink)
    return {name: merged[name] for name in names if name in merged}


def _choice(
    name: str, own: Mapping[str, Buffer], models: Mapping[str, Any], recipe: Recipe, has_base: bool
) -> buffers.Choice:
    """What is written for a tensor; own: by label, in the models that have it."""
    if len(own) == len(models) and not buffers.may_be_buffer(name):
        return buffers.PLAIN
    held = [
        buffers.Held(label, own[label].dtype, tuple(models[label][name].shape), _reader(own[label]))
        if label in own
        else None
        for label in models
    ]
    choice = buffers.choose(name, held, recipe.parameters.extra_tensors, has_base)
    if choice.action == buffers.MISSING:
        there, lacking = next(iter(own)), next(label for label in models if label not in own)
        raise InputError(
            f"{there} and {lacking} differ in the tensors they have: {name!r} is in one only; "
            "`extra_tensors: take`, `drop` or `average` merges the others"
        )
    if choice.reason:
        logger.info("%s: %s", choice.reason, name)
    return choice


def _reader(buffer: Buffer) -> Callable[[], np.ndarray]:
    """Reads its bytes into host memory."""
    return lambda: buffer.data.cpu().numpy() if resident.is_resident(buffer.data) else buffer.data


def _untrained(
    name: str, own: Mapping[str, Buffer], models: Mapping[str, Any], recipe: Recipe, choice: buffers.Choice
) -> Tensor:
    """A tensor that is taken from one model, or the mean of those that have it."""
    if choice.action == buffers.TAKE:
        taken = list(models.values())[choice.taken][name]
        return taken.copy() if isinstance(taken, np.ndarray) else taken.detach().clone()
    label, first = next(iter(own.items()))
    like = models[label][name]
    out = _output_dtype(recipe, like, first)
    data = buffers.average([(_reader(b)(), b.dtype) for b in own.values()], out)
    if resident.is_resident(first.data):
        data = resident.on_cpu(data).to(first.data.device)
    return array_like(like, data, out, tuple(like.shape))


Read = Callable[[Any, str], Buffer]  # a tensor and what an error calls it


def _serving(name: str, tensor: Any, origin: str) -> tuple[Backend, Read]:
    """The backend for tensors that are where this one is, and how it takes them."""
    device = device_of(tensor, origin)
    if device == "cpu":
        chosen = backends.select(name, "cpu" if name == "auto" else "auto")
        # Under the interpreter, torch's CPU tensors are on the backend's device.
        in_place = str(getattr(chosen, "device", "")) == "cpu" and not isinstance(tensor, np.ndarray)
    elif name in ("auto", "triton"):
        chosen, in_place = backends.select("triton", device), True
    else:
        chosen = backends.select(name)
        raise BackendError(
            f"{origin} is on {device}: the {chosen.NAME} backend works on the CPU; move it with .cpu()"
        )

    def read(other: Any, its_origin: str) -> Buffer:
        where = device_of(other, its_origin)
        if where != device:
            raise InputError(f"{its_origin} is on {where}, {origin} on {device}: move them to one device")
        return buffer_of(other, its_origin, in_place)

    return chosen, read


def _merge(
    first: Mapping[str, Tensor],
    tensors: list[TensorInputs],
    merged: dict[str, Tensor],
    recipe: Recipe,
    backend: Backend,
    threads: int | None,
    sink_of: type[MemorySink],
) -> None:
    """Merge the tensors that a backend computes, into `merged`.

    With T experts, the host waits for a device at most 3 T + 3 times per tensor whose densities are its own:
    for scores of the sample (T) and brackets (T); the merge's counts (1) and which candidates have a score in
    a bracket (T); thresholds (1); the counts of the candidates merged again (1).
    Densities over the model: the first two and the thresholds once for all tensors. A saliency mass: twice
    for each expert's threshold. Known thresholds: once per tensor.
    """
    on_device = tensors[0].is_resident
    survey = Survey(recipe, tensors, backend)
    device = tensors[0].experts[0].data.device if on_device else None
    with Inline(device) if on_device else Pool(threads or default_threads()) as pool:
        sink = sink_of(tensors)
        decisions = survey.decide_model(pool.run)
        engine = Engine(
            dict(enumerate(tensors)),
            sink,
            backend=backend,
            pool=pool,
            tile_elements=resident.TILE if on_device else TILE_ELEMENTS,
            survey=survey,
            decisions=decisions,
            store=Store(_UNLIMITED),
        )
        for _ in engine.run():
            pass
    for tensor, data in zip(tensors, sink.outputs, strict=True):
        merged[tensor.name] = array_like(first[tensor.name], data, tensor.out_dtype, tensor.shape)


def _recipe(
    has_base: bool,
    n: int,
    has_curvature: bool,
    method: str,
    out_dtype: str | None,
    parameters: dict[str, Any],
) -> Recipe:
    """The recipe of these arguments, checked like a file's."""
    own_keys = methods.get(method).model_parameters
    if "preconditioner_path" in parameters:
        raise RecipeError("`preconditioner_path` is for recipes: give the tensors as `curvatures`")
    if parameters.get("bias_correction"):
        raise RecipeError(
            "`bias_correction` reads a file's metadata: divide the curvatures by 1 - beta2^step instead"
        )
    if "lambda_" in parameters:
        parameters["lambda"] = parameters.pop("lambda_")
    whole, per_model = {}, [{} for _ in range(n)]
    for key, value in parameters.items():
        if key not in own_keys or not isinstance(value, (list, tuple)):
            whole[key] = value
            continue
        if len(value) != n:
            raise RecipeError(f"`{key}` has {len(value)} values for {n} experts")
        for own, one in zip(per_model, value, strict=True):
            own[key] = one
    if methods.get(method).curvature:
        if not has_curvature:
            whole.setdefault("missing_curvature", "uniform")
        for t, own in enumerate(per_model):
            own["preconditioner_path"] = f"curvatures[{t}]"
    models = [{"model": f"experts[{t}]", "parameters": own} for t, own in enumerate(per_model)]
    data: dict[str, Any] = {
        "merge_method": method,
        "models": models,
        "parameters": whole,
        "out_dtype": out_dtype,
    }
    if has_base:
        data["base_model"] = "base"
    return parse_recipe(data)


def _curvatures(
    name: str,
    shape: tuple[int, ...],
    n: int,
    curvatures: Sequence[Mapping[str, Tensor]] | None,
    recipe: Recipe,
    read: Read,
) -> tuple[bool, tuple[Curvature, ...]]:
    """(whether the base is kept, one curvature per expert) of one tensor."""
    uniform = (Uniform(),) * n
    if curvatures is None or not methods.get(recipe.merge_method).curvature:
        return False, uniform
    lacking = [t for t, c in enumerate(curvatures) if name not in c]
    if lacking and buffers.needs_no_curvature(name, shape):
        return False, uniform
    if lacking:
        policy = recipe.parameters.missing_curvature
        if policy == "error":
            raise InputError(
                f"curvatures[{lacking[0]}] has no {name!r}; "
                "`missing_curvature: uniform` or `base` merges without it"
            )
        return policy == "base", uniform
    found = []
    for t, c in enumerate(curvatures):
        origin = f"curvatures[{t}][{name!r}]"
        buffer = read(c[name], origin)
        if tuple(c[name].shape) != shape:
            raise InputError(f"{origin} has shape {list(c[name].shape)}, the tensor {list(shape)}")
        if buffer.dtype.name not in ("float32", "bfloat16", "float16"):
            raise InputError(f"{origin} is {buffer.dtype.name}; curvature is float32, bfloat16 or float16")
        found.append(Full(buffer))
    return False, tuple(found)


def _check_alike(name: str, like: Any, models: Mapping[str, Mapping[str, Any]]) -> None:
    for label, model in models.items():
        if tuple(model[name].shape) != tuple(like.shape):
            raise InputError(
                f"{label}[{name!r}] has shape {list(model[name].shape)}, another model {list(like.shape)}"
            )


def _agreed(name: str, like: Tensor, buffers: list[Buffer]) -> Tensor:
    first = buffers[0]
    for other in buffers[1:]:
        if other.dtype != first.dtype or not resident.is_equal(other.data, first.data):
            raise InputError(
                f"{other.origin} differs from {first.origin}; only floating-point tensors are merged"
            )
    return like.copy() if isinstance(like, np.ndarray) else like.clone()


def _output_dtype(recipe: Recipe, like: Tensor, own: Buffer) -> DType:
    if recipe.output_dtype is not None:
        dtype = BY_NAME[recipe.output_dtype]
        if isinstance(like, np.ndarray):
            numpy_dtype(like, dtype)  # raises before anything is merged
        return dtype
    if own.dtype.name not in OUTPUT_NAMES:
        raise InputError(
            f"{own.origin} is {own.dtype.name}, which a merge cannot be written in; give out_dtype"
        )
    return own.dtype
