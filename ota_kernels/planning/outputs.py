"""One output tensor: what it is made from, and by which settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..recipe.methods import EXTRA_TENSORS
from ..recipe.recipe import Slice
from ..recipe.settings import Settings
from ..tensors.computed import Source
from ..tensors.curvature import Curvature
from ..tensors.dtypes import DType
from ..tensors.tile import TensorInputs
from .models import Info, Model

MERGE, COPY, KEEP_BASE, TAKE, AVERAGE = "merge", "copy", "keep base", "take", "average"


class Part(NamedTuple):
    """A tensor of a model. stands_for: the output matrix that a tied embedding is taken for; origin: what its
    edit is counted from, None for the base."""

    model: Model
    name: str
    stands_for: str | None = None
    origin: Part | None = None

    @property
    def source(self) -> Source:
        """Its elements."""
        return self.model.source(self.name, self.stands_for)

    @property
    def info(self) -> Info:
        """Its shape, and its type as it is stored."""
        return self.model.tensors[self.name]

    @property
    def what(self) -> str:
        """What errors call it."""
        return self.model.what(self.name)

    def as_dict(self) -> dict[str, Any]:
        """Its model and its name there."""
        origin = {} if self.origin is None else {"origin": self.origin.as_dict()}
        return {"model": self.model.label, "tensor": self.name, **origin}


def with_origins(part: Slice, parts: list[Part]) -> list[Part]:
    """Base and experts, which know their origins, of the parts of all sources of a slice."""
    entries, rest = part.entries, iter(parts[len(part.entries) :])
    return [
        p if e.origin is None else p._replace(origin=next(rest)) for e, p in zip(entries, parts, strict=False)
    ]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One output tensor.

    dtype: of the output; action: MERGE; COPY of the only source, or of several that must agree (integers,
    booleans); KEEP_BASE where the base's values are taken (`missing_curvature: base`); TAKE: one model's
    values as they are, in their own type; AVERAGE: the mean over the models that have the tensor. base: None
    where the method has none; experts, positions: those that take part, and their numbers in the recipe;
    curvatures: one per expert; settings: None where nothing is merged.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    action: str
    base: Part | None
    experts: tuple[Part, ...]
    positions: tuple[int, ...]
    settings: Settings | None
    curvatures: tuple[Curvature, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_computed(self) -> bool:
        """Whether it goes through a backend."""
        return self.action in (MERGE, KEEP_BASE)

    @property
    def sources(self) -> tuple[Part, ...]:
        """Base and experts."""
        return self.experts if self.base is None else (self.base, *self.experts)

    @property
    def origins(self) -> tuple[Part | None, ...]:
        """What the experts' edits are counted from, None for the base; nothing where that holds for all."""
        found = tuple(part.origin for part in self.experts)
        return found if any(found) else ()

    @property
    def bytes_per_element(self) -> int:
        """Input bytes that one element reads."""
        own = (part for part in self.origins if part is not None)
        read = (self.base,) if self.action == KEEP_BASE else (*self.sources, *own)
        size = sum(part.model.bytes_per_element(part.name) for part in read)
        return size + sum(buffer.dtype.itemsize for c in self.curvatures for buffer in c.buffers)

    def as_dict(self) -> dict[str, Any]:
        """What is done, as `ota-merge plan --tensors --json` prints it; parameters that are not set are left
        out."""
        found: dict[str, Any] = {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype.name,
            "action": self.action,
        }
        if self.base is not None:
            found["base"] = self.base.as_dict()
        found["sources"] = [part.as_dict() for part in self.experts]
        if self.settings is not None:
            found["parameters"] = _set(self.settings.shared)
            for source, own in zip(found["sources"], self.settings.experts, strict=True):
                source["parameters"] = _set(own)
        return found

    def inputs(self) -> TensorInputs:
        """What a backend receives of a tensor that it computes. Under KEEP_BASE every expert is the base
        itself."""
        base = None if self.base is None else self.base.source
        kept = self.action == KEEP_BASE
        experts = tuple(base if kept else part.source for part in self.experts)
        origins = () if kept else tuple(None if part is None else part.source for part in self.origins)
        return TensorInputs(self.name, self.shape, self.dtype, base, experts, self.curvatures, origins)


def _set(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {k: value for k, value in parameters.items() if value is not None and k != EXTRA_TENSORS.key}
