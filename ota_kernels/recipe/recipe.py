"""A recipe as it was understood: everything is slices, and all levels of parameters are one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import methods
from .levels import dumped
from .methods import Method
from .parameters import Value
from .reference import Reference
from .vocabulary import Vocabulary


@dataclass(frozen=True)
class ModelEntry:
    """One model where it takes part. layers: the first one and the end, None for the whole model; number: its
    place among the recipe's models, from 0; parameters: its own, by key, with those of all levels and the
    defaults in them; keys that are not set are left out; origin: what its edit is counted from, None for the
    base."""

    reference: Reference
    parameters: Mapping[str, Value]
    number: int = 0
    layers: tuple[int, int] | None = None
    origin: Reference | None = None

    @property
    def model(self) -> str:
        """What reports and errors call the model."""
        return self.reference.label


@dataclass(frozen=True)
class Slice:
    """Layers of the output and the models they are merged from, all of them where no entry has `layers`.
    base: where edits are taken from, None without; shared: the parameters of the slice, by key."""

    experts: tuple[ModelEntry, ...]
    shared: Mapping[str, Value]
    base: ModelEntry | None = None

    @property
    def entries(self) -> tuple[ModelEntry, ...]:
        """Base and experts."""
        return self.experts if self.base is None else (self.base, *self.experts)

    @property
    def sources(self) -> tuple[ModelEntry, ...]:
        """Base and experts, and then the origins of those experts that have one."""
        own = (e for e in self.experts if e.origin is not None)
        return (*self.entries, *(ModelEntry(e.origin, {}, e.number, e.layers) for e in own))

    @property
    def whole(self) -> bool:
        """Whether it is all layers of its models."""
        return self.entries[0].layers is None


@dataclass(frozen=True)
class Module:
    """A part of the model by its name, None where the recipe names none."""

    name: str | None
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Recipe:
    """A whole merge, checked: every value is in range, every default filled in.

    base: the base_model; also the first giver of config and tokenizer; dtype and out_dtype: torch names or
    None; vocabulary: what is asked of it, None for that of the first giver;
    chat_template: "auto", the name of a known one, Jinja text, or None for the tokenizer's own.
    """

    merge_method: str
    modules: tuple[Module, ...]
    base: Reference | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    vocabulary: Vocabulary | None = None
    chat_template: str | None = None

    @property
    def method(self) -> Method:
        """The row of its method."""
        return methods.get(self.merge_method)

    @property
    def base_model(self) -> str | None:
        """The base's label."""
        return None if self.base is None else self.base.label

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Of all modules."""
        return tuple(s for module in self.modules for s in module.slices)

    @property
    def models(self) -> tuple[ModelEntry, ...]:
        """The models that are merged, each where it stands first, in order of their numbers; without the base
        where the method uses one."""
        first: dict[int, ModelEntry] = {}
        for part in self.slices:
            for entry in part.experts:
                first.setdefault(entry.number, entry)
        return tuple(first[number] for number in sorted(first))

    @property
    def parameters(self) -> Mapping[str, Value]:
        """The shared parameters of the first slice: of the whole merge, where they do not vary."""
        return self.modules[0].slices[0].shared

    @property
    def references(self) -> tuple[Reference, ...]:
        """Every model, the base first, each once."""
        found = [] if self.base is None else [self.base]
        found += [e.reference for part in self.slices for e in part.sources]
        return tuple(dict.fromkeys(found))

    @property
    def tokenizer_source(self) -> str:
        """ "base", "union", or a model."""
        source = "base" if self.vocabulary is None else self.vocabulary.source
        return source if isinstance(source, str) else source.label

    @property
    def output_dtype(self) -> str | None:
        """The torch name of the type that is written; None means the base's (or first model's) own."""
        return self.out_dtype or self.dtype

    def as_dict(self) -> dict[str, Any]:
        """The canonical mapping, defaults written out; parse_recipe makes an equal Recipe from it."""
        whole = {
            "merge_method": self.merge_method,
            "base_model": None if self.base is None else self.base.as_yaml(),
            **_dump_modules(self.modules),
            "dtype": self.dtype,
            "out_dtype": self.out_dtype,
            **_dump_vocabulary(self.vocabulary),
            "chat_template": self.chat_template,
        }
        return {key: value for key, value in whole.items() if value is not None}


def _dump_vocabulary(vocabulary: Vocabulary | None) -> dict[str, Any]:
    if vocabulary is None:
        return {}
    found = vocabulary.as_yaml()
    return {"tokenizer_source": found["source"]} if found.keys() == {"source"} else {"tokenizer": found}


def _dump_modules(modules: tuple[Module, ...]) -> dict[str, Any]:
    if modules[0].name is None:
        return _dump_module(modules[0])
    return {"modules": {module.name: _dump_module(module) for module in modules}}


def _dump_module(module: Module) -> dict[str, Any]:
    first = module.slices[0]
    if first.whole:
        models = [_dump_entry(entry) for entry in first.experts or first.entries]
        return {"models": models, "parameters": dumped(first.shared)}
    return {"slices": [_dump_slice(part) for part in module.slices]}


def _dump_slice(part: Slice) -> dict[str, Any]:
    base = {} if part.base is None else {"base_model": part.base.reference.as_yaml()}
    return base | {"sources": [_dump_entry(e) for e in part.entries], "parameters": dumped(part.shared)}


def _dump_entry(entry: ModelEntry) -> dict[str, Any]:
    layers = {} if entry.layers is None else {"layer_range": list(entry.layers)}
    origin = {} if entry.origin is None else {"origin": entry.origin.as_yaml()}
    return {"model": entry.reference.as_yaml(), **origin, **layers, "parameters": dumped(entry.parameters)}
