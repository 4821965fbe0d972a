"""Files that torch.save wrote: loaded without running code, their tensors left in the mapped file."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..dtypes import BY_NAME
from ..errors import InputError
from ..tensors import Buffer
from .folder import where
from .pages import MappedMemory

if TYPE_CHECKING:
    import torch


def load(path: Path, label: str, allowed: Sequence[Any] = ()) -> Any:
    """The content of a torch file; its tensors are views of the mapped file, on the CPU.

    label: what errors call the file; allowed: classes and functions that its pickle may name besides what
    torch allows with `weights_only=True`. Raises InputError for a file that is missing, damaged, compressed,
    in the format of torch < 1.6, or that names anything else.
    """
    import torch

    if not os.path.isfile(path):
        raise InputError(f"{where(label, path)}: no such file")
    try:
        _check_archive(path)
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # A hostile pickle or archive can fail anywhere inside torch or zipfile, with any exception.
        raise InputError(f"{where(label, path)}: {_load_failure(error)}") from error


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
    return f"torch cannot load it: {' '.join(text.split())[:200]}"
