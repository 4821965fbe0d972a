"""Merging tensors in memory: torch tensors or numpy arrays in, the same kind out.

Tensors on a GPU are merged there: nothing of their size crosses to the host, and everything runs on the
calling thread's current stream.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from . import backends
from .backends import Backend
from .errors import BackendError, InputError, RecipeError
from .integrations.tracing import traceable
from .io.curvature import Held
from .planning.buffers import average
from .planning.models import Info
from .planning.outputs import COPY, TAKE, OutputTensor
from .planning.pairing import Pairing, moments_key
from .planning.plan import TILE_ELEMENTS
from .processors import default_threads
from .recipe import methods
from .recipe.schema import Recipe, parse_recipe
from .run.decide import Decider
from .run.engine import Engine
from .run.pool import Pool
from .run.sinks import GraftSink, Inline, MemorySink
from .select.pending import Store
from .tensors import array as resident
from .tensors.buffer import Buffer
from .tensors.convert import array_like, buffer_of, device_of, numpy_dtype
from .tensors.curvature import Full

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
    given = {} if recipe.base is None else {recipe.base: base}
    given |= {entry.reference: expert for entry, expert in zip(recipe.models, experts, strict=True)}
    like = {name: tensor for model in reversed(given.values()) for name, tensor in model.items()}
    if not like:
        return {}
    label, first = next((reference.label, model) for reference, model in given.items() if model)
    name, tensor = next(iter(first.items()))
    chosen, read = _serving(backend, tensor, f"{label}[{name!r}]")
    models = {reference: _Dictionary(reference.label, model, read) for reference, model in given.items()}
    moments = {
        moments_key(entry): _Moments(f"curvatures[{t}]", of_expert, read)
        for t, (entry, of_expert) in enumerate(zip(recipe.models, curvatures or (), strict=False))
    }
    pairing = Pairing(recipe, models, moments)
    for note in pairing.notes:
        logger.info("%s", note)
    outputs = pairing.outputs
    by_label = {reference.label: model for reference, model in given.items()}
    merged = {o.name: _uncomputed(like[o.name], o, by_label) for o in outputs if not o.is_computed}
    for output in outputs:
        if isinstance(like[output.name], np.ndarray) and output.is_computed:
            numpy_dtype(like[output.name], output.dtype)  # raises before anything is merged
    floats = [output for output in outputs if output.is_computed]
    if floats:
        merged |= _merge(like, floats, recipe, chosen, threads, sink)
    return {output.name: merged[output.name] for output in outputs}


class _Dictionary:
    """The Model that a caller's dictionary is."""

    config = None
    tied_embeddings = False

    def __init__(self, label: str, tensors: Mapping[str, Tensor], read: Read) -> None:
        self.label = label
        self._buffers = {name: read(tensor, self.what(name)) for name, tensor in tensors.items()}
        self.tensors = {
            name: Info(tuple(tensor.shape), self._buffers[name].dtype) for name, tensor in tensors.items()
        }

    def source(self, name: str, stands_for: str | None = None) -> Buffer:
        return self._buffers[name]

    def bytes_per_element(self, name: str) -> int:
        return self.tensors[name].dtype.itemsize

    def what(self, name: str) -> str:
        return f"{self.label}[{name!r}]"

    def fingerprint(self) -> list:
        return []

    def close(self) -> None:
        pass


class _Moments:
    """The second moments of an expert in a caller's dictionary."""

    def __init__(self, where: str, tensors: Mapping[str, Tensor], read: Read) -> None:
        self.where, self._tensors, self._read = where, tensors, read

    def held(self, name: str, bias_correction: bool = False) -> Held | None:
        if name not in self._tensors:
            return None
        buffer = self._read(self._tensors[name], self.what(name))
        if buffer.dtype.name not in ("float32", "bfloat16", "float16"):
            raise InputError(
                f"{self.what(name)} is {buffer.dtype.name}; curvature is float32, bfloat16 or float16"
            )
        return Held(tuple(self._tensors[name].shape), Full(buffer))

    def what(self, name: str) -> str:
        return f"{self.where}[{name!r}]"


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
    like: Mapping[str, Tensor],
    outputs: Sequence[OutputTensor],
    recipe: Recipe,
    backend: Backend,
    threads: int | None,
    sink_of: type[MemorySink],
) -> dict[str, Tensor]:
    """Merge the tensors that are floating point. like: a tensor of the kind that each output is to be.

    With T experts, the host waits for a device at most 3 T + 3 times per tensor whose densities are its own:
    for scores of the sample (T) and brackets (T); the merge's counts (1) and which candidates have a score in
    a bracket (T); thresholds (1); the counts of the candidates merged again (1).
    Densities over the model: the first two and the thresholds once for all tensors. A saliency mass: twice
    for each expert's threshold. Known thresholds: once per tensor.
    """
    tensors = [output.inputs() for output in outputs]
    of_each = {output.name: output.settings for output in outputs}
    on_device = tensors[0].is_resident
    device = tensors[0].experts[0].data.device if on_device else None
    with Inline(device) if on_device else Pool(threads or default_threads()) as pool:
        sink = sink_of(tensors)
        decider = Decider(recipe.method, tensors, of_each, backend, pool)
        engine = Engine(
            dict(enumerate(tensors)),
            sink,
            decider=decider,
            found=decider.decide_model(),
            tile_elements=resident.TILE if on_device else TILE_ELEMENTS,
            store=Store(_UNLIMITED),
        )
        for _ in engine.run():
            pass
    return {
        t.name: array_like(like[t.name], data, t.out_dtype, t.shape)
        for t, data in zip(tensors, sink.outputs, strict=True)
    }


def _recipe(
    has_base: bool,
    n: int,
    has_curvature: bool,
    method: str,
    out_dtype: str | None,
    parameters: dict[str, Any],
) -> Recipe:
    """The recipe of these arguments, checked like a file's."""
    row = methods.get(method)
    own_keys = {p.key for p in row.own}
    if "preconditioner_path" in parameters:
        raise RecipeError("`preconditioner_path` is for recipes: give the tensors as `curvatures`")
    if parameters.get("bias_correction"):
        raise RecipeError(
            "`bias_correction` reads a file's metadata: divide the curvatures by 1 - beta2^step instead"
        )
    for key in parameters:
        if key not in row.keys and any(key in methods.get(other).keys for other in methods.names()):
            raise RecipeError(f"`{key}` is not used by `{method}`: leave it out")
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
    if row.curvature:
        if not has_curvature and whole.get("missing_curvature", "error") == "error":
            whole["missing_curvature"] = "uniform"
        for t, own in enumerate(per_model):
            own["preconditioner_path"] = f"curvatures[{t}]"
    models = [{"model": f"experts[{t}]", "parameters": own} for t, own in enumerate(per_model)]
    data: dict[str, Any] = {
        "merge_method": method,
        "models": models,
        "parameters": whole,
        "out_dtype": out_dtype,
    }
    if has_base and row.base != "ignored":
        data["base_model"] = "base"
    return parse_recipe(data)


def _uncomputed(like: Tensor, output: OutputTensor, models: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """A tensor that is copied, taken from one model (by its label), or the mean of those that have it."""
    if output.action == COPY:
        return _agreed(like, output)
    first = output.experts[0]
    if output.action == TAKE:
        taken = models[first.model.label][first.name]
        return taken.copy() if isinstance(taken, np.ndarray) else taken.detach().clone()
    sources = [part.source for part in output.experts]
    data = average([(resident.host(source.data), source.dtype) for source in sources], output.dtype)
    return array_like(like, resident.beside(data, sources[0].data), output.dtype, output.shape)


def _agreed(like: Tensor, output: OutputTensor) -> Tensor:
    first, *others = (part.source for part in output.sources)
    for other in others:
        if not resident.is_equal(other.data, first.data):
            raise InputError(
                f"{other.origin} differs from {first.origin}; only floating-point tensors are merged"
            )
    return like.copy() if isinstance(like, np.ndarray) else like.clone()
