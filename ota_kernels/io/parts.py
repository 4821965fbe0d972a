"""The models inside a folder: one, or the modules of a sentence-transformers model, or the components of a
diffusers pipeline; and the files beside them that make the whole."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import InputError
from .folder import (
    FILE_SUFFIX,
    INDEX_SUFFIX,
    MODEL,
    PIPELINE,
    STACK,
    contents_of,
    foreign_weights,
    unfinished,
    where,
)
from .signature import check_real
from .sizes import read_settings
from .tokenizer import read_json

_ROOT_FILES = {
    STACK: ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
    PIPELINE: ("model_index.json",),
}
# Weights, in whatever format: what is merged is written anew, the rest would be another model's.
_WEIGHTS = (FILE_SUFFIX, INDEX_SUFFIX, ".bin", ".pt", ".pth", ".ckpt", ".bin.index.json", ".h5", ".msgpack")
_WEIGHTS += (".onnx", ".onnx_data", ".gguf", ".npz", ".xml", ".mlmodel", ".tflite", ".ot")
_WEIGHTED_MODULE = re.compile(r"Transformer|Dense|CNN|LSTM|WeightedLayerPooling")
_WEIGHTED_COMPONENT = re.compile(
    r"Model$|Autoencoder|Transformer\d?D|UNet|ControlNet|SafetyChecker$|WithProjection$"
)
_MOST_BYTES = 256 << 20  # a tokenizer has 30 MB; more is weights under another name


@dataclass(frozen=True)
class Part:
    """One model of a folder. prefix: what the names of its tensors begin with: "" or "unet/"; files: an index
    or weight files; stem: what their names begin with."""

    prefix: str
    files: tuple[Path, ...]
    stem: str = "model"


def parts_of(path: Path, label: str) -> list[Part]:
    """The models at `path`, a folder or a file; of a folder of several, every one that has weights.

    Raises InputError where the folder is no model, or a module's weights are in another format.
    """
    if not os.path.isdir(path):
        return []
    found = contents_of(path, label)
    if found.kind == MODEL:
        return [Part("", found.weights, found.stem)]
    if found.kind not in _ROOT_FILES:
        return []
    parts = [Part("", found.weights, found.stem)] if found.weights else []
    for name in _inner(path, found.kind, label):
        inside = contents_of(path / name, label)
        if inside.weights:
            parts.append(Part(f"{name}/", inside.weights, inside.stem))
        elif lost := foreign_weights(path / name):
            raise InputError(f"{where(label, path)}: {name} holds {lost}")
    there = {part.prefix.rstrip("/") for part in parts}
    for name, what in _with_weights(path, found.kind):
        if name not in there:
            listed = _ROOT_FILES[found.kind][0]
            raise InputError(
                f"{where(label, path)}: incomplete: {listed} names {name or 'the folder'} ({what}), which "
                f"holds no weights; fetch it again{unfinished(path / name)}"
            )
    return parts


def part_patterns(folder: Path) -> list[str]:
    """Of a folder whose parts are still to be fetched from the hub: the patterns of their weight files."""
    if (folder / "model_index.json").is_file():
        return [f"*/*{FILE_SUFFIX}"]
    if not (folder / "modules.json").is_file():
        return []
    return [f"{path}/*{FILE_SUFFIX}" for path in _module_paths(folder / "modules.json") if path]


def _with_weights(folder: Path, kind: str) -> list[tuple[str, str]]:
    """(subfolder, class) of the parts that have weights, as the list of modules or components says."""
    if kind == STACK:
        modules = json.loads(read_settings(folder / "modules.json"))
        named = [(module["path"], str(module.get("type")).rpartition(".")[2]) for module in modules]
        return [pair for pair in named if _WEIGHTED_MODULE.fullmatch(pair[1])]
    check_real(folder / "model_index.json")
    named = [
        (name, str(value[1]))
        for name, value in read_json(folder / "model_index.json").items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2
    ]
    return [pair for pair in named if _WEIGHTED_COMPONENT.search(pair[1])]


def _inner(folder: Path, kind: str, label: str) -> list[str]:
    """Subfolders that belong to the whole: those that modules.json names, or all of a pipeline."""
    if kind == PIPELINE:
        names = sorted(os.listdir(folder))
    else:
        names = [path for path in _module_paths(folder / "modules.json") if path]
    return [name for name in names if not name.startswith(".") and (folder / name).is_dir()]


def _module_paths(path: Path) -> list[str]:
    check_real(path)
    try:
        modules = json.loads(read_settings(path))
        paths = [module["path"] for module in modules]
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not a list of modules with a path: restore the file") from error
    for inner in paths:
        if (
            not isinstance(inner, str)
            or "\\" in inner
            or ".." in PurePosixPath(inner).parts
            or inner[:1] == "/"
        ):
            raise InputError(f"{path}: the path {str(inner)[:80]!r} leaves the folder")
    return paths


def whole_files(folder: Path) -> dict[str, Path]:
    """Files that make the whole of a stack or pipeline, by name relative to `folder`: its list of modules,
    and what lies in their folders but for weights. Empty for a folder that is one model."""
    names = set(os.listdir(folder)) if folder.is_dir() else set()
    kind = next((k for k, files in _ROOT_FILES.items() if files[0] in names), None)
    if kind is None:
        return {}
    found = {name: folder / name for name in _ROOT_FILES[kind] if name in names}
    for inner in _inner(folder, kind, str(folder)):
        for path in sorted((folder / inner).rglob("*")):
            name = path.relative_to(folder).as_posix()
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if not hidden and path.is_file() and not is_weights(path):
                found[name] = path
    for path in found.values():
        check_real(path)
    return found


def is_weights(path: Path) -> bool:
    """Whether a file holds weights, or an index of them, in some format."""
    return path.name.endswith(_WEIGHTS) or path.stat().st_size > _MOST_BYTES
