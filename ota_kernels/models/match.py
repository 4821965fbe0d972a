"""Which tensor of each model becomes which tensor of the output: prefixes, tied heads, copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..io.ties import is_head, tie_in_config
from . import tied
from .prefixes import Renaming, renaming

_LISTED = 8  # names a line lists before it says how many more there are


@dataclass(frozen=True)
class Matched:
    """Tensors of several models, paired by name.

    sources: output name -> its name in each model, None where a model has no such tensor; left_out: stored
    tensors that are not written, with the reason; untied: the output has an output matrix of its own although
    some model ties it to the embeddings; renamed: per model how its names differ from the first one's where
    that could not be undone safely; notes: what a user should know.
    """

    sources: dict[str, tuple[str | None, ...]]
    left_out: dict[str, str] = field(default_factory=dict)
    untied: bool = False
    renamed: dict[str, Renaming] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def match(models: Sequence[Any]) -> Matched:
    """Pair the tensors of models (see `tied` for what a model is), in the order of the first one's."""
    names, unsafe, notes = _renamed(models)
    ordered = dict.fromkeys(name for own in names for name in own)
    sources = {name: tuple(own.get(name) for own in names) for name in ordered}
    left_out: dict[str, str] = {}
    untied = False
    for head in [name for name in sources if is_head(name)]:
        found = _head(models, head, sources[head])
        if all(is_embedding for _, is_embedding in found):
            left_out[head] = f"a copy of {found[0][0]}, to which it is tied"
            del sources[head]
            continue
        sources[head] = tuple(source for source, _ in found)
        if any(is_embedding for _, is_embedding in found):
            untied = True
        for model, (source, is_embedding) in zip(models, found, strict=True):
            if source is not None and not is_embedding and _tied_on_paper(model, source):
                untied = True
                notes.append(
                    f"{model.label}: config.json ties {head} to the embeddings, but its values are its own: "
                    "it is merged, and the output is not tied"
                )
    for name, source in tied.aliases(models, sources).items():
        left_out[name] = f"a copy of {source} in every model that stores it"
        del sources[name]
    notes += [f"{name} is left out: {reason}" for name, reason in left_out.items()]
    return Matched(sources, left_out, untied, unsafe, tuple(notes))


def _renamed(models: Sequence[Any]) -> tuple[list[dict[str, str]], dict[str, Renaming], list[str]]:
    """Per model, output name -> its own name; changes of prefix that are not safe; notes on the others."""
    first = models[0].tensors
    names: list[dict[str, str]] = []
    unsafe: dict[str, Renaming] = {}
    notes: list[str] = []
    for model in models:
        change = None if model is models[0] else renaming(first, model.tensors)
        if change is not None and not change.safe:
            unsafe[model.label] = change
            change = None
        own = change.names if change is not None else {}
        names.append({own.get(name, name): name for name in model.tensors})
        if change is not None:
            notes.append(f"{model.label}: its names have {change}: matched with those of {models[0].label}")
    return names, unsafe, notes


def _tied_on_paper(model: Any, head: str) -> bool:
    shape = tuple(model.tensors[head].shape)
    return bool(tie_in_config(model.config)) and tied.embedding_of(head, model.tensors, shape) is not None


def _head(models: Sequence[Any], head: str, found: tuple[str | None, ...]) -> list[tuple[str | None, bool]]:
    """Per model, where the values of an output matrix are, and whether that is the model's embedding."""
    stored = next((m, name) for m, name in zip(models, found, strict=True) if name is not None)
    shape = tuple(stored[0].tensors[stored[1]].shape)
    lacked = None in found
    return [
        tied.head_source(model, name or head, shape, lacked)
        for model, name in zip(models, found, strict=True)
    ]


def lacking_error(
    lacking: Mapping[str, Sequence[str]], renamed: Mapping[str, Renaming], first: str
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
        "`extra_tensors: take`, `drop` or `average` merges without it"
    )


def listing(names) -> str:
    """Names of an error: the first eight, and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown}, and {len(names) - _LISTED} more"
