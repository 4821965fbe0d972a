"""Whether models may be merged: what differs between them is an error, or a note where that is allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..io.assets import home
from ..io.tokenizer import files_in, read_json
from .compare import (
    LAYERS,
    VOCABULARY,
    config_differences,
    contradictions,
    unknown_differences,
    vocabulary_rows,
)
from .roles import EMBEDDING, OUTPUT, role_of
from .tokens import token_differences

_SHOWN = 4


def config_of(folder: Path) -> dict[str, Any] | None:
    """config.json of a folder, None where it has none."""
    found = files_in(folder, ["config.json"])
    return read_json(found["config.json"]) if found else None


def shape_advice(name: str, shapes: Sequence[tuple[int, ...]]) -> str:
    """The end of an error about one tensor's shapes: what kind of difference it is, and what to do."""
    if len({len(shape) for shape in shapes}) > 1 or not shapes[0]:
        return ""
    if role_of(name, shapes[0]) in (EMBEDDING, OUTPUT):
        widths = {shape[1:] for shape in shapes}
        if len(widths) == 1:
            return "; the vocabularies differ: resize the models' embeddings to one tokenizer first"
        shown = " and ".join(str(width[0]) for width in sorted(widths))
        return (
            f"; the models are of other sizes (hidden sizes {shown}): only models of one size can be merged"
        )
    return ""


def differences(
    folders: Mapping[str, Path],
    shapes: Mapping[str, tuple[int, ...]],
    tokenizer: Path | None,
    parts: Iterable[str] = (),
    edit: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config,
    restacked: bool = False,
) -> list[str]:
    """What differs between models of equal shapes, in lines: configurations, then the written configuration
    against the written tensors, then vocabularies.

    folders: by label, the first gives the configuration; shapes: of the output's tensors; tokenizer: the
    folder whose tokenizer is written, None where vocabularies are aligned or cut; parts: subfolders
    with a model of their own; edit: makes the written configuration of the first one; restacked: layers are
    taken from models of any number of them.
    """
    configs = {label: config_of(home(folder)) for label, folder in folders.items()}
    ignored = (VOCABULARY if tokenizer is None else frozenset()) | (LAYERS if restacked else frozenset())
    found = config_differences(configs, ignored)
    donor = next(iter(configs))
    written = configs[donor] and edit(configs[donor])
    found += [f"config.json of {donor}: {line}" for line in contradictions(written, shapes)]
    for part in parts:
        configs = {label: config_of(folder / part) for label, folder in folders.items()}
        found += [f"{part.rstrip('/')}: {line}" for line in config_differences(configs)]
    rows = vocabulary_rows(shapes)
    if rows and tokenizer is not None:
        owners = {label: home(folder) for label, folder in folders.items()}
        if tokenizer not in owners.values():
            owners[str(tokenizer)] = tokenizer
        found += token_differences(owners, max(rows.values()), tokenizer)
    return found


def remarks(folders: Mapping[str, Path]) -> list[str]:
    """A note where configurations differ in keys of which nothing is known here."""
    found = unknown_differences({label: config_of(home(folder)) for label, folder in folders.items()})
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    text = f"config.json differs in keys that are not compared: {'; '.join(found[:_SHOWN])}{more}"
    return [f"{text}: the first model's are written"] if found else []


def compare(
    folders: Mapping[str, Path],
    shapes: Mapping[str, tuple[int, ...]],
    tokenizer: Path | None,
    allow: bool = False,
    **more: Any,
) -> list[str]:
    """`differences` as notes where they are allowed; else InputError where there are any."""
    found = differences(folders, shapes, tokenizer, **more)
    if found and not allow:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise InputError(
            f"the models differ in what they compute: {'; '.join(found[:_SHOWN])}{more}: give models of one "
            "kind and vocabulary, or add --allow-crimes to merge them all the same"
        )
    return [f"the models differ, merged all the same: {line}" for line in found]
