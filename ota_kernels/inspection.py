"""What a model is, as a merge would understand it, and what differs between several: `ota-merge inspect`.

Every answer comes from the functions that `plan` and `run` call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from os import PathLike
from pathlib import Path
from typing import Any

from .errors import InputError, OtaError
from .io.assets import home
from .io.folder import contents_of
from .io.hub import resolve_model
from .io.pack import PackFile, is_pack
from .io.quantised import method_in_config, quantisation_of, refuse_quantised
from .io.reader import Checkpoint, open_model
from .io.ties import is_head, tie_in_config
from .io.tokenizer import has_tokenizer, tokenizer_files, vocabulary_of
from .planning import buffers, tied
from .planning.check import config_of, differences
from .planning.compare import contradictions, vocabulary_rows
from .planning.inputs import Inputs
from .planning.models import Stored
from .recipe.schema import parse_recipe


def inspect(paths: Sequence[str | PathLike]) -> dict[str, Any]:
    """What the models at `paths` (folders, files or hub ids) are; of several, what differs.

    Returns a dictionary that JSON can hold: models, a list with one dictionary each, whose `problem` says why
    it cannot be merged (None where it can); together, of several models, with `problem`, `differences` and
    `notes` of a linear merge. Reads headers and small files.
    """
    labels = [str(path) for path in paths]
    models = [_model(label) for label in labels]
    found: dict[str, Any] = {"models": models}
    if len(labels) > 1:
        found["together"] = _together(labels, all(model["problem"] is None for model in models))
    return found


def _model(label: str) -> dict[str, Any]:
    found: dict[str, Any] = {"model": label, "problem": None}
    try:
        path = resolve_model(label)
        if is_pack(path):
            return found | _of_pack(path, label)
        folder = home(path)
        found["kind"] = contents_of(path, label).named if path.is_dir() else "a file"
        checkpoint = open_model(path, label)
    except OtaError as error:
        return found | {"problem": str(error)}
    try:
        found |= _of_tensors(checkpoint) | _of_files(folder, checkpoint)
        quantised = quantisation_of(checkpoint)
        if quantised is not None:
            found["quantisation"] = quantised.format
            if not quantised.scaled:
                found["problem"] = str(refuse_quantised(label, quantised))
    except InputError as error:
        found["problem"] = str(error)
    finally:
        checkpoint.close()
    return found


def _of_pack(path: Path, label: str) -> dict[str, Any]:
    with closing(PackFile(path, label)) as pack:
        kind = f"a pack ({pack.form}) of {pack.expert} against {pack.base.model}"
        return {"kind": kind, "settings": pack.settings}


def _of_tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    infos = checkpoint.tensors
    types: Counter[str] = Counter()
    for info in infos.values():
        types[info.dtype.name] += info.numel
    kinds = Counter(kind for name, info in infos.items() if (kind := buffers.kind_of(name, info.shape)))
    return {
        "files": len(checkpoint.files),
        "parts": {prefix.rstrip("/") or ".": stem for prefix, stem in checkpoint.stems.items()},
        "tensors": len(infos),
        "elements": sum(types.values()),
        "bytes": checkpoint.total_bytes,
        "types": dict(types.most_common()),
        "buffers": dict(kinds),
        "output_matrices": {name: _head(checkpoint, name) for name in infos if is_head(name)},
        "tied_in_config": tie_in_config(checkpoint.config),
        "rows": vocabulary_rows({name: info.shape for name, info in infos.items()}),
    }


def _head(checkpoint: Checkpoint, name: str) -> str:
    source, is_embedding = tied.head_source(Stored(checkpoint), name, checkpoint.tensors[name].shape, False)
    return f"a copy of {source}" if is_embedding else "its own"


def _of_files(folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    config = config_of(folder) or {}
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    files = list(tokenizer_files(folder)) if folder.is_dir() else []
    return {
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures") or [],
        "claims_quantisation": method_in_config(config),
        "contradictions": contradictions(config, shapes),
        "tokenizer": files,
        "tokens": _tokens(folder) if files and has_tokenizer(folder) else None,
        "chat_template": any("chat_template" in name for name in files),
    }


def _tokens(folder: Path) -> int | None:
    try:
        tokens = vocabulary_of(folder)[1]()
    except InputError:
        return None
    return None if tokens is None else len(tokens)


def _together(labels: list[str], good: bool) -> dict[str, Any]:
    """What a linear merge of the models would say; `good`: each can be merged by itself."""
    found: dict[str, Any] = {"problem": None, "differences": [], "notes": []}
    if not good:
        return found | {"problem": "a model cannot be merged, see above"}
    recipe = parse_recipe({"merge_method": "linear", "models": [{"model": label} for label in labels]})
    try:
        with Inputs(recipe, allow_differences=True) as inputs:
            shapes = {entry.name: entry.shape for entry in inputs.entries}
            folders = inputs.model_folders
            first = home(next(iter(folders.values())))
            found["differences"] = differences(folders, shapes, first, filter(None, inputs.stems))
            found["notes"] = inputs.notes[: len(inputs.notes) - inputs.differences]
    except OtaError as error:
        found["problem"] = str(error)
    return found
