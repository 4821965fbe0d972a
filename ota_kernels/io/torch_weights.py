"""Weights that torch.save wrote (`pytorch_model.bin`, `.pt`, `.pth`, `.ckpt`), as headers: where the bytes of
each tensor lie in the file, which then is mapped like any other. Nothing that a file names is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..tensors.dtypes import BY_NAME
from . import torchfile
from .header import Header, quoted
from .signature import check_real
from .table import Table, TensorInfo

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_INNER = "state_dict"  # training frameworks save one beside other things


def read_torch_header(path: Path) -> Header:
    """The tensors of a torch file: a dictionary of them by name, or what stands under `state_dict` in one.

    Unlike those of a safetensors file, they may overlap (tied weights share bytes), and there are gaps.
    InputError, naming file, entry and fact, for anything else.
    """
    check_real(path)
    content, address, size = torchfile.load_located(path)
    if isinstance(content, Mapping) and isinstance(content.get(_INNER), Mapping):
        content = content[_INNER]
    if not isinstance(content, Mapping):
        raise InputError(
            f"{path}: holds {_named(content)}, not a dictionary of tensors: torch.save its state_dict()"
        )
    return Header(Table(_info(name, x, address, path) for name, x in content.items()), {}, 0, size)


def _info(name: Any, tensor: Any, address: int, path: Path) -> TensorInfo:
    if not isinstance(name, str) or not torchfile.is_plain(tensor):
        raise InputError(
            f"{path}: holds {quoted(name)} ({_named(tensor)}), which is no plain contiguous tensor: "
            "torch.save a state_dict() alone"
        )
    dtype = BY_NAME.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise InputError(f"{path}: {quoted(name)} is {tensor.dtype}, which cannot be merged")
    begin = tensor.data_ptr() - address if tensor.nbytes else 0
    return TensorInfo(name, dtype, tuple(tensor.shape), begin, begin + tensor.nbytes)


def _named(value: Any) -> str:
    return getattr(value, "path", None) or type(value).__name__
