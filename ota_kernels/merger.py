"""Models in memory that are merged, once or again and again: placed where kernels read them, what was found
of them kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from . import backends
from .arguments import recipe_of
from .backends import Backend
from .errors import BackendError, InputError, RecipeError
from .io.curvature import Held
from .io.pack import PackFile
from .planning.buffers import average
from .planning.models import Info
from .planning.outputs import COPY, TAKE, OutputTensor
from .planning.packed import BaseTiles, Packed, other_base, raise_other_base, shared_edit_of
from .planning.pairing import Pairing
from .planning.plan import TILE_ELEMENTS
from .planning.second_moments import moments_key
from .planning.tables import table_of
from .processors import default_threads
from .recipe.recipe import Recipe
from .run import scale
from .run.decide import Decider
from .run.engine import Engine
from .run.pool import Pool
from .run.sinks import Inline, MemorySink
from .run.surveys import Kept, Once, Surveys
from .run.target import Target
from .select.pending import Store
from .tensors import array as resident
from .tensors.buffer import Buffer
from .tensors.computed import is_computed
from .tensors.convert import array_like, buffer_of, device_of, numpy_dtype
from .tensors.curvature import Full

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_UNLIMITED = 1 << 62  # inputs in memory leave room for their few candidates

Tensor = TypeVar("Tensor")  # torch.Tensor or numpy.ndarray


class Merger:
    """Merges the same models again and again: the inner loop of a search over methods and their parameters.

        merger = ota_kernels.Merger(base, experts, curvatures)
        for density in (0.1, 0.3):
            merged = merger(density=density, lambda_=1.2, out=merged)

    base: a dictionary of tensors, a torch module, or None for methods that need none; experts: the same, in
    recipe order; curvatures, origins: of each expert as for `merge_state_dicts`, or None. backend, threads:
    as there. Tensors are placed once, and what one call finds of them (thresholds, order statistics,
    products, samples of scores) is kept for those that ask for the same: a call that differs in `lambda_` or
    `weight` only reads the inputs once, and nothing has to wait for a threshold. So they must not change.

    Raises InputError and RecipeError as `merge_state_dicts` does, some of it when it is called.
    """

    def __init__(
        self,
        base: torch.nn.Module | Mapping[str, Any] | None,
        experts: Sequence[torch.nn.Module | Mapping[str, Any]],
        curvatures: Sequence[Mapping[str, Any]] | None = None,
        *,
        origins: Sequence[torch.nn.Module | Mapping[str, Any] | None] | None = None,
        backend: str = "auto",
        threads: int | None = None,
    ) -> None:
        models = [_tensors_of(expert) for expert in experts]
        own = None if origins is None else [None if o is None else _tensors_of(o) for o in origins]
        self._placed = Placed(
            None if base is None else _tensors_of(base), models, curvatures, backend, threads, own
        )
        self._kept = Kept()

    def __call__(
        self,
        *,
        method: str = "ota",
        out: torch.nn.Module | Mapping[str, Any] | None = None,
        out_dtype: str | None = None,
        **parameters: Any,
    ) -> dict[str, Any]:
        """Merge by a method and its parameters, the recipe's keys (`density`, `lambda_` for `lambda`, ...).

        out: tensors to write into, a dictionary or a module as for `merge_into`, whose types are the
        result's; None: new tensors. Returns the merged tensors by name, those of `out` where they were given.
        """
        if out is not None and out_dtype is not None:
            raise RecipeError("`out` and `out_dtype` exclude each other: results have the types of `out`")
        recipe = self._placed.recipe(method, out_dtype, parameters)
        return self._placed.merge(recipe, None if out is None else _tensors_of(out), kept=self._kept)


def _tensors_of(model: Any) -> Mapping[str, Any] | str | PathLike:
    """A pack is its path."""
    return model if isinstance(model, Mapping | str | PathLike) else model.state_dict()


class Placed:
    """Dictionaries of tensors where the kernels of a backend read them. Each is placed when it is first
    used: methods may ignore a base."""

    def __init__(
        self,
        base: Mapping[str, Tensor] | None,
        experts: Sequence[Mapping[str, Tensor] | str | PathLike],
        curvatures: Sequence[Mapping[str, Tensor]] | None,
        backend: str,
        threads: int | None,
        origins: Sequence[Mapping[str, Tensor] | None] | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise RecipeError(f"threads must be at least 1, not {threads}")
        if curvatures is not None and len(curvatures) != len(experts):
            raise InputError(f"{len(experts)} experts but {len(curvatures)} curvatures")
        if origins is not None and len(origins) != len(experts):
            raise InputError(f"{len(experts)} experts but {len(origins)} origins: None stands for the base")
        self.base, self.experts, self.curvatures = base, experts, curvatures
        self._origins = {t: origin for t, origin in enumerate(origins or ()) if origin is not None}
        self._asked, self._threads = backend, threads
        self._served: tuple[Backend, Read] | None = None
        self._models: dict[str, _Dictionary | Packed] = {}
        self._moments: dict[int, _Moments] = {}

    def recipe(self, method: str, out_dtype: str | None, parameters: dict[str, Any]) -> Recipe:
        """The recipe of a merge of these models."""
        has_base, has_curvature = self.base is not None, self.curvatures is not None
        own = list(self._origins)
        return recipe_of(has_base, len(self.experts), has_curvature, method, out_dtype, parameters, own)

    def merge(
        self,
        recipe: Recipe,
        out: Mapping[str, Tensor] | None = None,
        *,
        sink: type[MemorySink] = MemorySink,
        kept: Kept | None = None,
    ) -> dict[str, Tensor]:
        """Merge as the recipe says, whose models are called "base" and "experts[t]". out: to write into, None
        for new tensors; kept: what earlier merges found."""
        given = {} if recipe.base is None else {recipe.base: self.base}
        given |= {entry.reference: expert for entry, expert in zip(recipe.models, self.experts, strict=True)}
        packed = {r: given.pop(r) for r, model in list(given.items()) if isinstance(model, str | PathLike)}
        if packed and not self.base:
            raise InputError(f"{next(iter(packed)).label} is a pack, which needs the tensors of its base")
        like = {name: tensor for model in reversed(given.values()) for name, tensor in model.items()}
        like = like or dict(self.base or {})
        if not like and not out:
            return {}
        first = self.base if packed and not given else out
        label, first = next(((r.label, model) for r, model in given.items() if model), ("base", first))
        backend, read = self._serving(label, *next(iter(first.items())))
        own = {e.origin: self._origins[t] for t, e in enumerate(recipe.models) if e.origin is not None}
        for reference, model in (given | own).items():
            self._models.setdefault(reference.label, _Dictionary(reference.label, model, read))
        for reference, path in packed.items():
            base = self._models.setdefault("base", _Dictionary("base", self.base, read))
            if reference.label not in self._models:
                self._models[reference.label] = _unpacked(reference.label, Path(path), base)
        moments = {
            moments_key(entry): self._moments.setdefault(t, _Moments(f"curvatures[{t}]", of_expert, read))
            for t, (entry, of_expert) in enumerate(zip(recipe.models, self.curvatures or (), strict=False))
        }
        models = {r: self._models[r.label] for r in (*given, *packed, *own)}
        pairing = Pairing(recipe, models, moments, table=table_of(recipe))
        for note in pairing.notes:
            logger.info("%s", note)
        outputs = pairing.outputs
        target = None
        if out is not None:
            target = Target(out, outputs)
            outputs, like = target.outputs, out
        by_label = {reference.label: model for reference, model in given.items()}
        merged = {o.name: _uncomputed(like[o.name], o, by_label) for o in outputs if not o.is_computed}
        backend = _of_places(backend, outputs)
        floats = [output for output in outputs if output.is_computed]
        for output in floats:
            if isinstance(like[output.name], np.ndarray):
                numpy_dtype(like[output.name], output.dtype)  # raises before anything is merged
        if floats:
            surveys = Once() if kept is None else kept.of(recipe.method, floats)
            merged |= self._merge(like, floats, recipe, backend, sink, surveys, target)
        if target is not None:
            return target.filled(merged)
        return {output.name: merged[output.name] for output in outputs}

    def _serving(self, label: str, name: str, tensor: Any) -> tuple[Backend, Read]:
        if self._served is None:
            self._served = serving(self._asked, tensor, f"{label}[{name!r}]")
        return self._served

    def _merge(
        self,
        like: Mapping[str, Tensor],
        outputs: Sequence[OutputTensor],
        recipe: Recipe,
        backend: Backend,
        sink_of: type[MemorySink],
        surveys: Surveys,
        target: Target | None,
    ) -> dict[str, Tensor]:
        """Merge the tensors that are floating point. like: a tensor of the kind that each output is to be.

        The host waits for a device once for all tensors whose thresholds are known, and once for as many
        tensors as fit into a tile whose densities are their own. Densities over the model, with T experts:
        T times for their sample, T for brackets, and once for all tensors. A saliency mass: so often for its
        sample and brackets, once for the counts of a tile's tensors, T + 2 times for undecided elements of
        each tensor, and twice for each expert's threshold.
        """
        tensors = [output.inputs() for output in outputs]
        of_each = {output.name: output.settings for output in outputs}
        on_device = tensors[0].is_resident
        if recipe.method.python and not on_device:
            backend = backends.select(self._asked, python=True)
        device = tensors[0].experts[0].data.device if on_device else None
        with Inline(device) if on_device else Pool(self._threads or default_threads()) as pool:
            sink = sink_of(tensors, [] if target is None else target.rooms(tensors))
            decider = Decider(recipe.method, tensors, of_each, backend, pool, surveys=surveys)
            engine = Engine(
                dict(enumerate(tensors)),
                sink,
                decider=decider,
                found=scale.decide(decider),
                tile_elements=resident.TILE if on_device else TILE_ELEMENTS,
                store=Store(_UNLIMITED),
                decided=surveys.decided,
            )
            for _ in engine.run():
                pass
            surveys.keep(engine.decided)
        return {
            t.name: array_like(like[t.name], data, t.out_dtype, t.shape)
            for t, data in zip(tensors, sink.outputs, strict=True)
        }


def _unpacked(label: str, path: Path, base: _Dictionary) -> Packed:
    """The Model that a pack on a caller's dictionary is."""
    if any(resident.is_resident(base.source(name).data) for name in base.tensors):
        raise InputError(f"{label}: packs are made on the host: give a base on the CPU, and backend native")
    pack, tiles = PackFile(path, label), BaseTiles(base)
    reason = other_base(pack, base, tiles)
    if reason is not None:
        raise_other_base(pack, [f"base {reason}"])
    return Packed(base, pack, None, shared_edit_of(pack), own_base=False, tiles=tiles)


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


def serving(name: str, tensor: Any, origin: str) -> tuple[Backend, Read]:
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
        if (where == "cpu") != (device == "cpu"):
            raise InputError(f"{its_origin} is on {where}, {origin} on {device}: move them to one device")
        return buffer_of(other, its_origin, in_place)

    return chosen, read


def _of_places(backend: Backend, outputs: Sequence[OutputTensor]) -> Backend:
    """The backend for tensors that may lie on several devices, those of one name on one."""
    places = {}
    for output in outputs:
        parts = [*output.sources, *(part for part in output.origins if part is not None)]
        buffers = [*(part.source for part in parts), *(b for c in output.curvatures for b in c.buffers)]
        if any(map(is_computed, buffers)) or not resident.is_resident(buffers[0].data):
            continue
        first, where = buffers[0], resident.place(buffers[0].data)
        for other in buffers:
            if resident.place(other.data) != where:
                raise InputError(
                    f"{other.origin} is on {resident.place(other.data)}, {first.origin} on {where}: "
                    "move them to one device"
                )
        places[where] = None
    if len(places) < 2:
        return backend
    from .backends.triton.devices import Devices

    return Devices({where: backends.select("triton", where) for where in places})


def _uncomputed(like: Tensor, output: OutputTensor, models: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """A tensor that is copied, taken from one model (by its label), or the mean of those that have it."""
    if output.action == COPY and output.dtype == output.sources[0].info.dtype:
        return _agreed(like, output)
    first = output.experts[0]
    if output.action == TAKE and isinstance(first.model, Packed):
        return array_like(like, first.source.slice(0, output.numel).data, output.dtype, output.shape)
    if output.action == TAKE:
        taken = models[first.model.label][first.name]
        return taken.copy() if isinstance(taken, np.ndarray) else taken.detach().clone()
    sources = [part.source.slice(0, output.numel) for part in output.experts]
    data = average([(resident.host(source.data), source.dtype) for source in sources], output.dtype)
    return array_like(like, resident.beside(data, sources[0].data), output.dtype, output.shape)


def _agreed(like: Tensor, output: OutputTensor) -> Tensor:
    first, *others = (part.source.slice(0, output.numel) for part in output.sources)
    for other in others:
        if not resident.is_equal(other.data, first.data):
            raise InputError(
                f"{other.origin} differs from {first.origin}; only floating-point tensors are merged"
            )
    return like.copy() if isinstance(like, np.ndarray) else like.clone()
