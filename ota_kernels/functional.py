"""Merging tensors in memory: torch tensors or numpy arrays in, the same kind out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from . import backends, methods
from .backends import native
from .candidates import Store
from .dtypes import BY_NAME, OUTPUT_NAMES, DType
from .engine import Engine
from .errors import BackendError, InputError, RecipeError
from .planning import TILE_ELEMENTS
from .pool import Pool, default_threads
from .recipe import Recipe, parse_recipe
from .survey import Survey
from .tensors import Buffer, Curvature, Full, TensorInputs, Uniform
from .tiling import Segment

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

    Returns a new tensor like the first input, in out_dtype (default: the base's, or first expert's, type).
    Raises RecipeError for a wrong parameter, InputError for tensors that do not fit or are not finite,
    BackendError for a device that no backend serves.
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

    Arguments and errors as for `merge_tensors`; all dictionaries have the same names. Tensors that are not
    floating point are copied when all models agree. A name without curvature is an error unless
    `missing_curvature` says otherwise.
    """
    recipe = _recipe(base is not None, len(experts), curvatures is not None, method, out_dtype, parameters)
    return _merge_models(base, experts, curvatures, recipe, backend, threads, _MemorySink)


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
    merged = _merge_models(base, [expert], curvatures or None, recipe, backend, threads, _GraftSink)
    return merged if whole else merged["weight"]


def _merge_models(
    base: Mapping[str, Tensor] | None,
    experts: Sequence[Mapping[str, Tensor]],
    curvatures: Sequence[Mapping[str, Tensor]] | None,
    recipe: Recipe,
    backend: str,
    threads: int | None,
    sink: type[_MemorySink],
) -> dict[str, Tensor]:
    if threads is not None and threads < 1:
        raise RecipeError(f"threads must be at least 1, not {threads}")
    if curvatures is not None and len(curvatures) != len(experts):
        raise InputError(f"{len(experts)} experts but {len(curvatures)} curvatures")
    has_base = base is not None and methods.get(recipe.merge_method).base != "unused"
    models = {"base": base} if has_base else {}
    models |= {f"experts[{t}]": expert for t, expert in enumerate(experts)}
    first_label, first = next(iter(models.items()))
    for label, model in models.items():
        if odd := set(first) ^ set(model):
            raise InputError(
                f"{label} and {first_label} differ in the tensors they have: {min(odd)!r} is in one only"
            )

    merged: dict[str, Tensor] = {}
    tensors = []
    for tensor_name, like in first.items():
        buffers = [
            buffer_of(model[tensor_name], f"{label}[{tensor_name!r}]") for label, model in models.items()
        ]
        _check_alike(tensor_name, like, models)
        if not all(b.dtype.is_float for b in buffers):
            merged[tensor_name] = _agreed(tensor_name, like, buffers)
            continue
        kept, found = _curvatures(tensor_name, tuple(like.shape), len(experts), curvatures, recipe)
        weights = buffers if not kept else [buffers[0]] * len(buffers)
        out = _output_dtype(recipe, like, buffers[0])
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
    return (
        {name: merged[name] for name in first}
        if not tensors
        else _merge(first, tensors, merged, recipe, backend, threads, sink(tensors))
    )


def _merge(
    first: Mapping[str, Tensor],
    tensors: list[TensorInputs],
    merged: dict[str, Tensor],
    recipe: Recipe,
    backend: str,
    threads: int | None,
    sink: _MemorySink,
) -> dict[str, Tensor]:
    chosen = backends.select(backend)
    survey = Survey(recipe, tensors, chosen)
    with Pool(threads or default_threads()) as pool:
        decisions = survey.decide_model(pool.run)
        engine = Engine(
            dict(enumerate(tensors)),
            sink,
            backend=chosen,
            pool=pool,
            tile_elements=TILE_ELEMENTS,
            survey=survey,
            decisions=decisions,
            store=Store(_UNLIMITED),
        )
        for _ in engine.run():
            pass
    for tensor, data in zip(tensors, sink.outputs, strict=True):
        merged[tensor.name] = _like(first[tensor.name], data, tensor)
    return {name: merged[name] for name in first}


class _MemorySink:
    """Tiles are merged straight into the results."""

    def __init__(self, tensors: list[TensorInputs]) -> None:
        self._sizes = [t.out_dtype.itemsize for t in tensors]
        self.outputs = [np.empty(t.numel * t.out_dtype.itemsize, np.uint8) for t in tensors]

    def room(self, segment: Segment, nbytes: int) -> np.ndarray:
        begin = segment.start * self._sizes[segment.index]
        return self.outputs[segment.index][begin : begin + nbytes]

    def write(self, segment: Segment, merged: np.ndarray) -> None:
        pass

    def patch(self, segment: Segment, positions: np.ndarray, merged: np.ndarray) -> None:
        size = (segment.stop - segment.start) * self._sizes[segment.index]
        native.scatter(self.room(segment, size), positions, merged, self._sizes[segment.index])

    def done_with(self, tile: TensorInputs) -> None:
        pass


class _GraftSink(_MemorySink):
    """Kept edits of the one expert become its own bits: w_0 + (w_t - w_0) is rounded."""

    def __init__(self, tensors: list[TensorInputs]) -> None:
        super().__init__(tensors)
        self._tensors = tensors

    def write(self, segment: Segment, merged: np.ndarray) -> None:
        _restore_bits(*self._weights(segment), merged)

    def patch(self, segment: Segment, positions: np.ndarray, merged: np.ndarray) -> None:
        base, expert = self._weights(segment)
        _restore_bits(base.gather(positions), expert.gather(positions), merged)
        super().patch(segment, positions, merged)

    def _weights(self, segment: Segment) -> tuple[Buffer, Buffer]:
        tile = self._tensors[segment.index].slice(segment.start, segment.stop)
        return tile.base, tile.experts[0]


def _restore_bits(base: Buffer, expert: Buffer, merged: np.ndarray) -> None:
    """Put the expert's elements where merged (uint8, in the base's type) is not the base.

    That is where an edit is kept: w_0 + (w_t - w_0) is w_0 only if w_t is.
    """
    if expert.dtype != base.dtype:
        return
    elements = f"u{base.dtype.itemsize}"
    out = merged.view(elements)
    np.copyto(out, expert.data.view(elements), where=out != base.data.view(elements))


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
) -> tuple[bool, tuple[Curvature, ...]]:
    """(whether the base is kept, one curvature per expert) of one tensor."""
    uniform = (Uniform(),) * n
    if curvatures is None or not methods.get(recipe.merge_method).curvature:
        return False, uniform
    lacking = [t for t, c in enumerate(curvatures) if name not in c]
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
        buffer = buffer_of(c[name], origin)
        if tuple(c[name].shape) != shape:
            raise InputError(f"{origin} has shape {list(c[name].shape)}, the tensor {list(shape)}")
        if buffer.dtype.name not in ("float32", "bfloat16", "float16"):
            raise InputError(f"{origin} is {buffer.dtype.name}; curvature is float32, bfloat16 or float16")
        found.append(Full(buffer))
    return False, tuple(found)


def buffer_of(tensor: Any, origin: str) -> Buffer:
    """A flat view of a tensor's bytes (a copy where it is not contiguous)."""
    if isinstance(tensor, np.ndarray):
        dtype = BY_NAME.get(tensor.dtype.name)
        if dtype is None:
            raise InputError(f"{origin}: elements of type {tensor.dtype} are not supported")
        native = np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("="))
        return Buffer(native.reshape(-1).view(np.uint8), dtype, origin)
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{origin} is a {type(tensor).__name__}, not a torch tensor or numpy array")
    if tensor.layout != torch.strided:
        raise InputError(f"{origin} is {tensor.layout}; make it dense with .to_dense()")
    if tensor.device.type != "cpu":
        raise BackendError(
            f"{origin} is on {tensor.device}: no backend serves that device; move it with .cpu()"
        )
    dtype = BY_NAME.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise InputError(f"{origin}: elements of type {tensor.dtype} are not supported")
    dense = tensor.detach().resolve_neg().contiguous()
    # A tensor of one element or none may have any stride, but only stride 1 can be viewed as bytes.
    flat = dense.as_strided((dense.numel(),), (1,))
    return Buffer(flat.view(torch.uint8).numpy(), dtype, origin)


def _check_alike(name: str, like: Any, models: Mapping[str, Mapping[str, Any]]) -> None:
    for label, model in models.items():
        if tuple(model[name].shape) != tuple(like.shape):
            raise InputError(
                f"{label}[{name!r}] has shape {list(model[name].shape)}, another model {list(like.shape)}"
            )


def _agreed(name: str, like: Tensor, buffers: list[Buffer]) -> Tensor:
    first = buffers[0]
    for other in buffers[1:]:
        if other.dtype != first.dtype or not np.array_equal(other.data, first.data):
            raise InputError(
                f"{other.origin} differs from {first.origin}; only floating-point tensors are merged"
            )
    return like.copy() if isinstance(like, np.ndarray) else like.clone()


def _output_dtype(recipe: Recipe, like: Tensor, own: Buffer) -> DType:
    if recipe.output_dtype is not None:
        dtype = BY_NAME[recipe.output_dtype]
        if isinstance(like, np.ndarray):
            _numpy_dtype(like, dtype)  # raises before anything is merged
        return dtype
    if own.dtype.name not in OUTPUT_NAMES:
        raise InputError(
            f"{own.origin} is {own.dtype.name}, which a merge cannot be written in; give out_dtype"
        )
    return own.dtype


def _numpy_dtype(like: np.ndarray, dtype: DType) -> np.dtype:
    """numpy's type of that name: its own, or one that `like` brings along (ml_dtypes)."""
    if like.dtype.name == dtype.name:
        return like.dtype.newbyteorder("=")
    try:
        return np.dtype(dtype.name)
    except TypeError:
        raise RecipeError(
            f"numpy has no {dtype.name}: choose another out_dtype, or give torch tensors"
        ) from None


def _like(tensor: Tensor, data: np.ndarray, inputs: TensorInputs) -> Tensor:
    """Result bytes as the kind of array that `tensor` is."""
    if isinstance(tensor, np.ndarray):
        return data.view(_numpy_dtype(tensor, inputs.out_dtype)).reshape(inputs.shape)
    import torch

    dtype = getattr(torch, inputs.out_dtype.name)
    if data.size == 0:  # numpy 2.4 gives it stride 0, which torch does not view as another type
        return torch.empty(inputs.shape, dtype=dtype)
    return torch.from_numpy(data).view(dtype).reshape(inputs.shape)
