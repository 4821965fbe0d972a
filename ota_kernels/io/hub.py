"""What a recipe names: a local path, or a model or file on the Hugging Face hub (the `hub` extra)."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from types import ModuleType

from ..errors import InputError
from .folder import holds_weights
from .parts import part_patterns

_NAME = r"[A-Za-z0-9][\w.-]*"
# The first models of the hub have no organisation (gpt2); a revision may be a path (refs/pr/1).
_MODEL = re.compile(rf"(?P<repo>(?:{_NAME}/)?{_NAME})(?:@(?P<revision>\w[\w./-]*))?")
_FILE = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[\w.-]+))?[:/](?P<file>[^:@]+)")
_FILE_OF_REF = re.compile(rf"(?P<repo>{_NAME}/{_NAME})@(?P<revision>\w[\w./-]*):(?P<file>[^:@]+)")
_FILE_NAME = re.compile(
    r"[^/@]*\.(safetensors|bin|pt|pth|ckpt|gguf|json|ya?ml|npz|h5)"
)  # a file's, no model's
# Code is fetched to be named, or copied where that is told; none is run.
_MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "tokenizer*", "*.tiktoken", "*.py"]
_MODEL_FILES += ["LICENSE*", "NOTICE*", "USE_POLICY*"]
_TORCH_FILES = ["pytorch_model*.bin"]
# Copies of the same weights in the formats of other tools, each as large as the model.
_NOT_MODEL_FILES = ["*/*.safetensors", "consolidated*.safetensors"]


def resolve_model(text: str) -> Path:
    """The local folder or file `text`, or the cached snapshot of the hub model `org/name[@revision]`.

    Raises InputError if it is neither, or cannot be fetched.
    """
    path = os.path.expanduser(text)
    if os.path.exists(path):
        return Path(path)
    match = _model_id(text)
    if match is None:
        raise InputError(f"{text!r} is not a local folder, and not a hub id (org/name or org/name@revision)")
    hub = _import_hub(text, "folder")
    try:
        folder = Path(
            hub.snapshot_download(
                match["repo"],
                revision=match["revision"],
                allow_patterns=_MODEL_FILES,
                ignore_patterns=_NOT_MODEL_FILES,
            )
        )
        parts = part_patterns(folder)
        if parts:  # a stack or pipeline, whose weights are in folders
            hub.snapshot_download(
                match["repo"],
                revision=match["revision"],
                allow_patterns=parts,
                ignore_patterns=_NOT_MODEL_FILES[1:],
            )
        elif folder.is_dir() and not holds_weights(folder):  # an older model: torch.save wrote its weights
            hub.snapshot_download(
                match["repo"],
                revision=match["revision"],
                allow_patterns=_TORCH_FILES,
                ignore_patterns=_NOT_MODEL_FILES,
            )
        return folder
    except InputError:
        raise
    except Exception as error:  # the hub fails in the manner of many libraries: requests, OS, its own
        raise _not_fetched(text, "folder", error) from error


def _model_id(text: str) -> re.Match | None:
    """The parts of a hub id of a model; None for what is none."""
    match = _MODEL.fullmatch(text)
    good = match is not None and not _FILE_NAME.fullmatch(text) and ".." not in (match["revision"] or "")
    return match if good else None


def resolve_file(text: str) -> Path:
    """The local file or folder `text`, or the cached copy of a hub file.

    Hub files are `org/name/path/in/repo.safetensors` or `org/name:path`, with `@revision` after the name;
    `org/name` alone is the whole model. Raises InputError if it is none of these, or cannot be fetched.
    """
    path = os.path.expanduser(text)
    if os.path.exists(path):
        return Path(path)
    match = _FILE_OF_REF.fullmatch(text) or _FILE.fullmatch(text)
    model = _model_id(text)
    # A path after a revision is that of a file: org/name@v1/deep/v.pt.
    is_model = (
        model is not None and "/" in text and "/" not in (model["revision"] or "").removeprefix("refs/pr/")
    )
    if not is_model and (match is None or ".." in PurePosixPath(match["file"]).parts):
        raise InputError(f"{text!r} is not a local file, and not a hub file (org/name/path or org/name:path)")
    if os.path.isdir(os.path.dirname(path)):  # a name mistyped, not a name of the hub
        raise InputError(f"{text!r} is not a local file: its folder has none of that name")
    if is_model:
        return resolve_model(text)
    hub = _import_hub(text, "file")
    try:
        return Path(hub.hf_hub_download(match["repo"], match["file"], revision=match["revision"]))
    except Exception as error:  # as above
        raise _not_fetched(text, "file", error) from error


def _import_hub(text: str, kind: str) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(
            f"{text!r} is not a local {kind}; to fetch it from the hub: pip install 'ota-kernels[hub]'"
        ) from error
    return huggingface_hub


def _not_fetched(text: str, kind: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{text!r} is not a local {kind}, and the hub does not give it: {reason[:300]}")
