"""Which tensor of each model becomes which tensor of the output: prefixes, and heads that are tied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ..errors import InputError
from ..io.curvature import Held
from ..io.ties import is_head, tie_in_config
from ..tensors.computed import Source
from . import tied
from .models import Info, Model, Moments
from .prefixes import Renaming, renaming

_LISTED = 8  # names a line lists before it says how many more there are


class Renamed:
    """A Model under the names that another one has. own: the name that is stored, by the other's."""

    def __init__(self, model: Model, own: Mapping[str, str]) -> None:
        self.label, self._model, self._own = model.label, model, dict(own)
        self.config, self.tied_embeddings = model.config, model.tied_embeddings
        self.fingerprint, self.close = model.fingerprint, model.close
        self.tensors: dict[str, Info] = {name: model.tensors[stored] for name, stored in own.items()}

    def source(self, name: str, stands_for: str | None = None) -> Source:
        return self._model.source(self._own[name], stands_for)

    def bytes_per_element(self, name: str) -> int:
        return self._model.bytes_per_element(self._own[name])

    def what(self, name: str) -> str:
        return self._model.what(self._own.get(name, name))


class RenamedMoments:
    """Second moments of a model that is renamed: its own names hold, and the others too."""

    def __init__(self, moments: Moments, own: Mapping[str, str]) -> None:
        self._moments, self._own = moments, own

    def held(self, name: str, bias_correction: bool = False) -> Held | None:
        return self._moments.held(self._stored(name), bias_correction)

    def what(self, name: str) -> str:
        return self._moments.what(self._stored(name))

    @property
    def where(self) -> str:
        return self._moments.where

    @property
    def source_format(self) -> str:
        return self._moments.source_format

    def _stored(self, name: str) -> str:
        own = self._own.get(name, name)
        return name if self._moments.held(own) is None else own


class Prefixes(NamedTuple):
    """How the names of several models differ from the first one's. own: by model, the stored name of each
    name, of those that are renamed; unsafe: by label, changes that may be other modules; notes: of the
    others."""

    own: dict
    unsafe: dict[str, Renaming]
    notes: list[str]


def prefixes_of(models: Mapping[object, Model]) -> Prefixes:
    """Compare names with the first model's."""
    found = Prefixes({}, {}, [])
    first = next(iter(models.values()), None)
    for key, model in models.items():
        change = None if model is first else renaming(first.tensors, model.tensors)
        if change is None:
            continue
        if not change.safe:
            found.unsafe[model.label] = change
            continue
        found.own[key] = {change.names.get(name, name): name for name in model.tensors}
        found.notes.append(f"{model.label}: its names have {change}: matched with those of {first.label}")
    return found


class Head(NamedTuple):
    """An output matrix. sources: per model the tensor with its values, None where it has none; tied: per
    model whether that is the model's embedding; untied: models that tie it on paper only."""

    sources: list[str | None]
    tied: list[bool]
    untied: list[Model]


def head_of(models: Sequence[Model], names: Sequence[str]) -> Head | None:
    """Where each model has the values of an output matrix; names: its own name in each model. None where no
    name is that of one, or no model stores it."""
    if not any(map(is_head, set(names))):
        return None
    stored = [i for i, (model, name) in enumerate(zip(models, names, strict=True)) if name in model.tensors]
    if not stored or not is_head(names[stored[0]]):
        return None
    shape = tuple(models[stored[0]].tensors[names[stored[0]]].shape)
    lacked = len(stored) < len(models)
    found = [tied.head_source(model, name, shape, lacked) for model, name in zip(models, names, strict=True)]
    untied = [
        model
        for model, (source, is_embedding) in zip(models, found, strict=True)
        if source is not None and not is_embedding and _tied_on_paper(model, source)
    ]
    return Head([source for source, _ in found], [is_embedding for _, is_embedding in found], untied)


def _tied_on_paper(model: Model, head: str) -> bool:
    shape = tuple(model.tensors[head].shape)
    return (
        bool(tie_in_config(model.config, head)) and tied.embedding_of(head, model.tensors, shape) is not None
    )


def lacking_error(
    lacking: Mapping[str, Sequence[str]], renamed: Mapping[str, Renaming], first: str, advice: str = ""
) -> InputError:
    """The error about tensors that some models lack: by name, with the labels of the models. Where a change
    of prefix explains all of them, the error is about that."""
    name, labels = next(iter(lacking.items()))
    explained = {n for change in renamed.values() for pair in change.names.items() for n in pair}
    if explained.issuperset(lacking):
        shown = "; ".join(f"{label} has {change} of {first}" for label, change in renamed.items())
        return InputError(
            f"names differ by a prefix: {shown}: these may be other modules, so that nothing is matched; "
            f"rename the tensors where they are the same ({len(lacking)} names, such as {name})"
        )
    more = f" ({len(lacking)} such tensors: {listing(lacking)})" if len(lacking) > 1 else ""
    changes = "".join(
        f"; names differ by a prefix: {label} has {change}" for label, change in renamed.items()
    )
    return InputError(
        f"{', '.join(labels)}: has no tensor {name}, which other models have{more}{changes}; "
        f"`extra_tensors: take`, `drop` or `average` merges without it{advice}"
    )


def listing(names: Iterable[str]) -> str:
    """Names of an error: the first eight, and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown}, and {len(names) - _LISTED} more"
