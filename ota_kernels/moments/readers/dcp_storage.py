"""A torch distributed checkpoint on disk: its metadata read without running code, its tensors box by box."""

from __future__ import annotations

import io
import math
import os
import pathlib
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ...errors import InputError
from ...io.header import quoted
from ...io.inert import InertUnpickler, load_inert

LABEL = "checkpoint"
METADATA_FILE = ".metadata"

Box = tuple[tuple[int, ...], tuple[int, ...]]

_CLASSES: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("collections", "OrderedDict"): OrderedDict,
    # The folder that the checkpoint was written to.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
    ("pathlib", "WindowsPath"): pathlib.PureWindowsPath,
    ("pathlib._local", "WindowsPath"): pathlib.PureWindowsPath,
    **{
        (dcp_metadata.__name__, name): getattr(dcp_metadata, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
}


class _MetadataUnpickler(InertUnpickler):
    """Builds the classes that torch writes into .metadata; all else is inert."""

    def find_class(self, module: str, name: str) -> Any:
        return _CLASSES.get((module, name)) or super().find_class(module, name)


class _BoxPlanner(DefaultLoadPlanner):
    """Reads one box of one tensor, or one object."""

    def __init__(self, target: torch.Tensor | None = None) -> None:
        super().__init__()
        self.target = target
        self.value: Any = None

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        assert self.target is not None
        box = self.target
        for dimension, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            box = box.narrow(dimension, start, length)
        return box

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.value = load_inert(value.read())


class Storage:
    """The checkpoint in `folder`.

    shapes: of its tensors by key; objects: keys of what is no tensor.
    Raises InputError for metadata that is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.where = f"{LABEL}: {folder}"
        self._folder = folder
        self._metadata = _read_metadata(folder / METADATA_FILE)
        entries = self._metadata.state_dict_metadata
        self.shapes = {
            key: tuple(entry.size)
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.objects = {key for key, entry in entries.items() if isinstance(entry, BytesStorageMetadata)}

    def dtype(self, key: str) -> str:
        """The name of a tensor's type; float32 where the metadata, of an older torch, does not say it."""
        found = getattr(self._metadata.state_dict_metadata[key].properties, "dtype", None)
        return str(found).removeprefix("torch.") if isinstance(found, torch.dtype) else "float32"

    def boxes(self, key: str) -> list[Box]:
        """(offsets, sizes) of the stored parts of a tensor.

        Raises InputError where they do not add up to the tensor, or a file is missing or too short for one.
        """
        what = f"{self.where}: {quoted(key)}"
        boxes = [(tuple(c.offsets), tuple(c.sizes)) for c in self._metadata.state_dict_metadata[key].chunks]
        shape = self.shapes[key]
        for offsets, sizes in boxes:
            if not _lies_within(shape, offsets, sizes):
                raise InputError(
                    f"{what}: a part of size {list(sizes)} at {list(offsets)} is not in {list(shape)}"
                )
            self._check_file(MetadataIndex(key, offsets), what)
        stored = sum(math.prod(sizes) for _, sizes in boxes)
        if stored != math.prod(shape):
            raise InputError(f"{what}: its parts have {stored} elements, its shape is {list(shape)}")
        return boxes

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> np.ndarray:
        """A box of a tensor as float32 of shape `sizes`, NaN where no stored part covers it.

        Needs the memory of the box and of one stored part. Raises InputError for damaged files.
        """
        box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        entry = self._metadata.state_dict_metadata[key]
        planner = _BoxPlanner(torch.full(sizes, torch.nan, dtype=torch.float32))
        self._run(planner, create_read_items_for_chunk_list(key, entry, [box]), key)
        return planner.target.numpy()

    def read_object(self, key: str) -> Any:
        """What torch.save was given for `key`, inert where it is no number or container. Raises InputError
        for damaged files."""
        index = MetadataIndex(key)
        self._check_file(index, f"{self.where}: {quoted(key)}")
        nowhere = torch.Size((0,))
        item = ReadItem(LoadItemType.BYTE_IO, index, nowhere, index, nowhere, nowhere)
        planner = _BoxPlanner()
        self._run(planner, [item], key)
        return planner.value

    def _run(self, planner: _BoxPlanner, items: list[ReadItem], key: str) -> None:
        reader = FileSystemReader(self._folder)
        reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        try:
            reader.read_data(LoadPlan(items), planner).wait()
        except Exception as error:
            # Damaged bytes can fail anywhere inside torch, with any exception.
            raise InputError(
                f"{self.where}: {quoted(key)}: cannot be read ({type(error).__name__}): a file is damaged"
            ) from error

    def _check_file(self, index: MetadataIndex, what: str) -> None:
        info = self._metadata.storage_data.get(index)
        if not isinstance(info, _StorageInfo):
            raise InputError(f"{what}: {METADATA_FILE} does not say where it is stored")
        path = self._folder / info.relative_path
        size = os.path.getsize(path) if os.path.isfile(path) else None
        if size is None:
            raise InputError(f"{what}: {path}: no such file: copy the files of all ranks into one folder")
        if info.offset + info.length > size:
            raise InputError(
                f"{what}: {path}: has {size} bytes, not {info.offset + info.length}: is cut short"
            )


def _lies_within(shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    return len(offsets) == len(sizes) == len(shape) and all(
        min(start, size) >= 0 and start + size <= whole
        for start, size, whole in zip(offsets, sizes, shape, strict=True)
    )


def _read_metadata(path: Path) -> Metadata:
    try:
        with path.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except Exception as error:
        # A hostile pickle can fail with any exception.
        raise InputError(
            f"{LABEL}: {path}: cannot be read ({type(error).__name__}): it is damaged, copy the folder again"
        ) from error
    if (
        not isinstance(metadata, Metadata)
        or not isinstance(metadata.state_dict_metadata, dict)
        or not isinstance(metadata.storage_data, dict)
    ):
        raise InputError(f"{LABEL}: {path}: is not the metadata of a torch distributed checkpoint")
    return metadata
