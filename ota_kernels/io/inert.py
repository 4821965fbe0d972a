"""Torch files read without importing or calling anything that they name.

A pickle is a program: it names classes and functions, and calls them. Here tensors, numbers and containers
are built by code of this module, and whatever else a file names becomes an `Inert`, a stand-in that keeps
what it was given and does nothing. So a run's arguments, random states and paths beside an optimizer's state
cost nothing, and a hostile file can do nothing.

A torch file is a zip archive of stored entries: PREFIX/data.pkl, and one entry PREFIX/data/KEY per storage.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

_PICKLE = "data.pkl"
_LOCAL_HEADER_BYTES = 30
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_NUMBER = re.compile(r"[fiu][1248]|b1")


class Inert:
    """Stands in for an object of a class, or the result of a function, that a file names.

    path: the name, "argparse.Namespace"; args: what it was called with; state: what it was given besides;
    items: what was put into it.
    """

    path = "unknown"

    def __new__(cls, *args: Any, **named: Any) -> Inert:
        self = super().__new__(cls)
        self.args, self.named, self.state, self.items = args, named, None, []
        return self

    def __init__(self, *args: Any, **named: Any) -> None:
        pass

    def __call__(self, *args: Any, **named: Any) -> Inert:
        return type(self)(*args, **named)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        self.items.append(item)

    def add(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Any) -> None:
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __repr__(self) -> str:
        return f"<{self.path}>"

    @property
    def attributes(self) -> dict[str, Any]:
        """By name, as the object's __dict__ and slots would hold them."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)
        return {name: value for part in parts if isinstance(part, dict) for name, value in part.items()}


class InertUnpickler(pickle.Unpickler):
    """Builds containers, numbers, types and tensors; all else is `Inert`. storage: bytes of a tensor's
    storage by its key and size."""

    def __init__(
        self, stream: BinaryIO, storage: Callable[[str, int], torch.UntypedStorage] | None = None
    ) -> None:
        super().__init__(stream, encoding="utf-8")
        self._storage = storage
        self._storages: dict[str, torch.UntypedStorage] = {}
        self._classes: dict[tuple[str, str], type[Inert]] = {}
        # Bound methods: a pickle can neither replace nor change what they do.
        self._built: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("collections", "defaultdict"): self._dict,
            ("collections", "Counter"): self._dict,
            ("builtins", "set"): set,
            ("builtins", "frozenset"): frozenset,
            ("builtins", "complex"): complex,
            ("_codecs", "encode"): self._bytes,
            ("torch", "Size"): self._size,
            ("torch", "device"): self._device,
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_v3,
            ("torch._utils", "_rebuild_parameter"): self._first,
            ("torch._utils", "_rebuild_parameter_with_state"): self._first,
            ("torch._tensor", "_rebuild_from_type_v2"): self._of_type,
        }

    def find_class(self, module: str, name: str) -> Any:
        """What stands for MODULE.NAME; never imports."""
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if module in ("torch", "torch.storage", "torch.cuda") and name in _DTYPES:
            return _StorageType(_DTYPES[name])
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "scalar":
            return self._numpy_scalar
        return self._built.get((module, name)) or self.inert(module, name)

    def inert(self, module: str, name: str) -> type[Inert]:
        """The stand-in class of MODULE.NAME, one for this file."""
        path = f"{module}.{name}"
        return self._classes.setdefault((module, name), type("Inert", (Inert,), {"path": path}))

    def persistent_load(self, saved: Any) -> Any:
        """The storage of a tensor, ("storage", type, key, device, elements)."""
        kind, storage_type, key, _, numel = saved
        if kind != "storage" or self._storage is None or not isinstance(storage_type, _StorageType):
            return self.inert("torch", "UnknownStorage")()  # of a quantized tensor
        if key not in self._storages:
            self._storages[key] = self._storage(str(key), int(numel) * storage_type.dtype.itemsize)
        return _Storage(self._storages[key], storage_type.dtype)

    def _tensor(self, storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Any:
        if not isinstance(storage, _Storage):
            return self.inert("torch", "UnknownTensor")(storage)
        return _view(storage, offset, size, stride, storage.dtype)

    def _tensor_v3(
        self, storage: Any, offset: int, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
    ) -> Any:
        if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
            return self.inert("torch", "UnknownTensor")(storage)
        return _view(storage, offset, size, stride, dtype)

    def _of_type(self, function: Any, kind: Any, args: Any, state: Any) -> Any:
        """A tensor with attributes, or of a subclass, which stays inert with its parts in `attributes`."""
        if isinstance(kind, type) and issubclass(kind, Inert) and kind.path != "torch.Tensor":
            if kind.path in ("torch.nn.parameter.Parameter", "torch.nn.Parameter"):
                return function(*args)
            made = kind(function, *args)
            made.__setstate__(state)
            return made
        return function(*args)

    def _first(self, data: Any, *_: Any) -> Any:
        return data

    def _dict(self, *_: Any) -> dict[Any, Any]:
        return _Dict()

    def _size(self, sizes: Any = ()) -> tuple[int, ...]:
        return tuple(sizes)

    def _device(self, *args: Any) -> str:
        return ":".join(map(str, args))

    def _bytes(self, text: str, encoding: str = "latin1") -> bytes:
        return text.encode("latin1") if isinstance(text, str) and encoding == "latin1" else b""

    def _numpy_scalar(self, dtype: Any, data: Any = b"") -> Any:
        """A number that numpy saved, as a number of Python."""
        made = self.inert("numpy", "scalar")(dtype, data)
        code = dtype.args[0] if isinstance(dtype, Inert) and dtype.args else None
        if not isinstance(code, str) or not _NUMBER.fullmatch(code):
            return made
        order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "<"
        data = data.encode("latin1") if isinstance(data, str) else data
        number = np.dtype(code).newbyteorder(order if order in ("<", ">") else "<")
        if not isinstance(data, bytes) or len(data) != number.itemsize:
            return made
        return np.frombuffer(data, number)[0].item()


class _Dict(dict):
    """A dict of a class of its own, so that a pickle may give it attributes."""


class _StorageType:
    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Storage:
    __slots__ = ("bytes", "dtype")

    def __init__(self, data: torch.UntypedStorage, dtype: torch.dtype) -> None:
        self.bytes, self.dtype = data, dtype


def _view(storage: _Storage, offset: Any, size: Any, stride: Any, dtype: Any) -> torch.Tensor:
    """The tensor, a view of its storage. Raises UnpicklingError where it would reach beyond that."""
    size, stride = tuple(map(int, size)), tuple(map(int, stride))
    if len(size) != len(stride) or min((offset, *size, *stride)) < 0:
        raise pickle.UnpicklingError("a tensor with sizes below zero")
    reach = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if (offset + reach) * dtype.itemsize > storage.bytes.nbytes():
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return torch.empty(0, dtype=dtype).set_(storage.bytes, offset, size, stride)


def load_inert(source: Path | bytes) -> Any:
    """The content of a torch file: its tensors are views of the mapped file (of a copy, for bytes).

    Raises whatever a damaged archive or pickle makes zipfile and pickle raise.
    """
    return load_located(source)[0]


def load_located(source: Path | bytes) -> tuple[Any, int, int]:
    """(the content, the address at which the file's first byte is mapped, its size): a tensor's address tells
    where in the file it lies. Otherwise as `load_inert`."""
    with zipfile.ZipFile(source if isinstance(source, Path) else io.BytesIO(source)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        # A compressed entry, mapped, would be read as if its bytes were the tensor's.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise zipfile.BadZipFile
        found = [name for name in entries if name == _PICKLE or name.endswith(f"/{_PICKLE}")]
        if len(found) != 1:
            raise zipfile.BadZipFile
        prefix = found[0].removesuffix(_PICKLE)
        order = entries.get(f"{prefix}byteorder")
        if order is not None and archive.read(order).strip() == b"big":
            raise pickle.UnpicklingError("its tensors are big-endian")
        whole = _bytes_of(source)

        def storage(key: str, nbytes: int) -> torch.UntypedStorage:
            entry = entries[f"{prefix}data/{key}"]
            begin = _data_start(archive, entry)
            if nbytes > entry.file_size or begin + nbytes > whole.nbytes():
                raise zipfile.BadZipFile
            return whole[begin : begin + nbytes]

        content = InertUnpickler(io.BytesIO(archive.read(found[0])), storage).load()
        return content, whole.data_ptr(), whole.nbytes()


def _bytes_of(source: Path | bytes) -> torch.UntypedStorage:
    if isinstance(source, Path):
        return torch.UntypedStorage.from_file(os.fspath(source), False, os.path.getsize(source))
    return torch.frombuffer(bytearray(source), dtype=torch.uint8).untyped_storage()


def _data_start(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """The first byte of an entry's data: behind its own header, whose padding the directory does not give."""
    archive.fp.seek(entry.header_offset)
    header = archive.fp.read(_LOCAL_HEADER_BYTES)
    name, extra = struct.unpack("<HH", header[26:30])
    return entry.header_offset + _LOCAL_HEADER_BYTES + name + extra
