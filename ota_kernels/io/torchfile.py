"""Files that torch.save wrote: loaded without running code, their tensors left in the mapped file."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..tensors.buffer import Buffer
from ..tensors.dtypes import BY_NAME
from .folder import where
from .pages import MappedMemory

if TYPE_CHECKING:
    import torch


def load(path: Path, label: str) -> Any:
    """The content of a torch file; its tensors are views of the mapped file, on the CPU.

    label: what errors call the file. Raises InputError for a file that is missing, damaged, compressed, in
    the format of torch < 1.6, or that names anything besides what torch allows with `weights_only=True`.
    """
    import torch

    if not os.path.isfile(path):
        raise InputError(f"{where(label, path)}: no such file")
    try:
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # A hostile pickle or archive can fail anywhere inside torch or zipfile, with any exception.
        raise InputError(f"{where(label, path)}: {_load_failure(error)}") from error


def load_stored(path: Path, label: str) -> Any:
    """As `load`, but what a file names besides tensors and containers becomes an inert stand-in (inert.py):
    nothing is imported or called, so a training run's own objects do no harm."""
    from .inert import load_inert

    if not os.path.isfile(path):
        raise InputError(f"{label}: {path}: no such file")
    try:
        return load_inert(path)
    except Exception as error:  # as above
        raise InputError(f"{label}: {path}: {_load_failure(error)}") from error


def load_located(path: Path) -> tuple[Any, int, int]:
    """(content, address, size) of a file, as inert.py gives them. Errors as those of `load_stored`."""
    from .inert import load_located as located

    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    try:
        return located(path)
    except Exception as error:  # as above
        raise InputError(f"{path}: {_load_failure(error)}") from error


def is_plain(tensor: Any) -> bool:
    """Whether `tensor` is dense, on the CPU and in one piece, so that `buffer` can view it."""
    import torch

    dense = type(tensor) is torch.Tensor and tensor.layout is torch.strided and tensor.device.type == "cpu"
    return dense and not tensor.is_quantized and tensor.is_contiguous()


def buffer(tensor: torch.Tensor, path: Path) -> Buffer:
    """A zero-copy view of a plain tensor that `load` found in `path`."""
    mapped = np.asarray(MappedMemory(tensor, tensor.data_ptr(), tensor.nbytes))
    return Buffer(mapped, BY_NAME[str(tensor.dtype).removeprefix("torch.")], str(path))


def _check_archive(path: Path) -> None:
    """BadZipFile unless all entries are stored: torch may map compressed bytes and call them tensors."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise zipfile.BadZipFile


def _load_failure(error: Exception) -> str:
    text = str(error)
    refused = re.search(r"(?:unsupported GLOBAL|Unsupported global: GLOBAL) (\S+)", text)
    if refused:
        return f"would run code to load ({refused[1]}): save plain tensors, or use safetensors"
    if isinstance(error, zipfile.BadZipFile):
        return "not a complete, uncompressed torch file: torch.save it again, or use safetensors"
    return f"cannot be read, it is damaged or no torch file ({type(error).__name__}): save it again"
