"""safetensors headers: read as hostile input, written with every byte range known before the first byte.

A file is `<u64 little-endian n> <n bytes of JSON> <tensor data>`; the JSON maps each tensor's name to dtype,
shape and [begin, end) within the data, and `__metadata__` to strings.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NoReturn
from weakref import WeakValueDictionary

from ..errors import InputError
from ..tensors.dtypes import BY_TAG, PACKED_BY_TAG, DType
from .quantised import FOREIGN_TAGS
from .signature import HEAD_BYTES, not_weights
from .table import Table, TensorInfo

PREFIX_BYTES = 8
# The cap of the safetensors library: a longer header is a lie or an attack, never a model.
MAX_HEADER_BYTES = 100_000_000
# Tensor data starts on a cache line; the format asks for 8 bytes.
DATA_ALIGNMENT = 64
_METADATA_KEY = "__metadata__"
_place = itemgetter(TensorInfo._fields.index("begin"), TensorInfo._fields.index("end"))
# Sizes beyond a signed 64-bit integer overflow in the kernels and in every other reader.
_MAX_SIZE = 2**63 - 1
# What errors quote of a hostile value: bounded in length and depth.
_REPR = reprlib.Repr()
_REPR.maxstring, _REPR.maxlist, _REPR.maxlevel = 200, 16, 3


@dataclass(frozen=True)
class Header:
    """A checked header: its tensors, in file order, fill [data_start, file_size) without gap or overlap."""

    tensors: Table
    metadata: dict[str, str]
    data_start: int
    file_size: int


# By digest of the text and size of the file: the files of a model's fine-tunes mostly have the same ones.
_known: WeakValueDictionary[tuple[bytes, int], Header] = WeakValueDictionary()


def read_header(path: Path) -> Header:
    """Read and check the header of the safetensors file `path`; no tensor data is read.

    Raises InputError, naming file, tensor and fact, for anything that is not a complete safetensors file.
    """
    try:
        # Opening a pipe would wait for its writer.
        if os.path.exists(path) and not os.path.isfile(path):
            raise InputError(f"{path}: not a regular file")
        with path.open("rb") as stream:
            return _read_header_from(stream, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def parse_header(text: bytes, file_size: int, path: Path) -> Header:
    """Check the JSON part of a header against the size of its file, in bytes.

    Raises InputError, naming `path`, tensor and fact, on any contradiction.
    """
    key = hashlib.sha256(text).digest(), file_size
    known = _known.get(key)
    if known is None:
        _known[key] = known = _parsed(text, file_size, path)
    return known


def _parsed(text: bytes, file_size: int, path: Path) -> Header:
    # The format demands "{" first, so leading blanks and byte-order marks are not skipped.
    if not text.startswith(b"{"):
        raise InputError(f"{path}: the header is not a JSON object: not a safetensors file, or a damaged one")
    entries = parse_json_object(text, f"{path}: the header")
    metadata = _check_metadata(entries.pop(_METADATA_KEY, None), path)
    data_start = PREFIX_BYTES + len(text)
    if b"\\u" in text:  # without escapes, what is UTF-8 is valid Unicode
        for name in entries:
            _check_encodable(name, path)
    shapes: dict[tuple[int, ...], tuple[tuple[int, ...], int]] = {}
    tensors = [_parse_entry(name, entry, data_start, shapes, path) for name, entry in entries.items()]
    del entries
    tensors.sort(key=_place)
    _check_layout(tensors, data_start, file_size, path)
    return Header(Table(tensors), metadata, data_start, file_size)


def build_header(
    tensors: Iterable[tuple[str, DType, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, list[tuple[int, int]]]:
    """Lay tensors (name, dtype, shape) out one after another, in the order given.

    Returns the whole header, padded with spaces to a multiple of DATA_ALIGNMENT bytes, and the absolute
    byte range [begin, end) of each tensor. Raises ValueError if a name occurs twice or is reserved.
    """
    entries: dict[str, Any] = {_METADATA_KEY: metadata} if metadata else {}
    ranges = []
    end = 0
    for name, dtype, shape in tensors:
        if name in entries or name == _METADATA_KEY:
            raise ValueError(f"tensor name {name!r} is taken")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": dtype.tag, "shape": list(shape), "data_offsets": [begin, end]}
        ranges.append((begin, end))
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(PREFIX_BYTES + len(text)) % DATA_ALIGNMENT)
    data_start = PREFIX_BYTES + len(text)
    header = struct.pack("<Q", len(text)) + text
    return header, [(data_start + begin, data_start + end) for begin, end in ranges]


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `text`; InputError, naming `where`, for anything else, duplicate keys included."""
    try:
        value = _loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where} is not a JSON object")
    return value


def quoted(value: object) -> str:
    """`repr` on one line, shortened where a hostile value would fill the screen or the stack."""
    return _REPR.repr(value).replace("\n", " ")


def _read_header_from(stream: BinaryIO, path: Path) -> Header:
    file_size = os.fstat(stream.fileno()).st_size
    instead = not_weights(stream.read(HEAD_BYTES), file_size)
    if instead is not None:
        raise InputError(f"{path}: is {instead}")
    stream.seek(0)
    prefix = stream.read(PREFIX_BYTES)
    if len(prefix) < PREFIX_BYTES:
        raise InputError(f"{path}: {file_size} bytes are too few for a safetensors file; fetch it again")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise InputError(
            f"{path}: header length {length} is over the limit of {MAX_HEADER_BYTES} bytes: "
            "not a safetensors file, or a damaged one"
        )
    if PREFIX_BYTES + length > file_size:
        raise InputError(
            f"{path}: header length {length} is longer than the file ({file_size} bytes): "
            "it is truncated or damaged; fetch it again"
        )
    return parse_header(stream.read(length), file_size, path)


def _loads(text: str) -> Any:
    """json.loads; ValueError for a key that is there twice. A hook for each object would take several times
    as long: without escapes, as many colons stand outside of strings as there are keys, if none is lost."""
    if "\\" in text:
        return json.loads(text, object_pairs_hook=_unique_pairs)
    value = json.loads(text)
    if _colons(value) == text.count(":"):
        return value
    return json.loads(text, object_pairs_hook=_unique_pairs)


def _colons(value: Any) -> int:
    """How many the text of an object has at least, without escapes: one for each key of it and of the objects
    in it, and those in its keys and metadata."""
    if type(value) is not dict:
        return 0
    inner = [item for item in value.values() if type(item) is dict]
    count = len(value) + sum(map(len, inner)) + "".join(value).count(":")
    metadata = value.get(_METADATA_KEY)
    return count + (str(metadata).count(":") - len(metadata) if type(metadata) is dict else 0)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {quoted(twice)}")
    return result


def _check_metadata(metadata: Any, path: Path) -> dict[str, str]:
    if metadata is None:  # some writers say null where they have none
        return {}
    if not isinstance(metadata, dict):
        raise InputError(f"{path}: {_METADATA_KEY} must map strings to strings, not {quoted(metadata)}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise InputError(f"{path}: {_METADATA_KEY}[{quoted(key)}] must be a string, not {quoted(value)}")
        _check_encodable(key, path)
        _check_encodable(value, path)
    return metadata


def _check_encodable(text: str, path: Path) -> None:
    """JSON can spell half a surrogate pair, which is no character and could not be written again."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{path}: {quoted(text)} in the header is not valid Unicode") from error


def _parse_entry(
    name: str,
    entry: Any,
    data_start: int,
    shapes: dict[tuple[int, ...], tuple[tuple[int, ...], int]],
    path: Path,
) -> TensorInfo:
    """shapes: those that were met before, with their elements."""
    try:
        if len(entry) != 3:
            raise ValueError(f"needs exactly dtype, shape and data_offsets, not {quoted(entry)}")
        tag, sizes, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        dtype = BY_TAG.get(tag) if type(tag) is str else None
        dtype = dtype or _parse_dtype(tag)
        shape, numel = _parse_shape(sizes, shapes)
        begin, end = _parse_offsets(offsets)
        expected = dtype.nbytes(numel) if dtype.bits else dtype.itemsize * numel
        if end - begin != expected:
            raise ValueError(
                f"{dtype.tag} of shape {quoted(list(shape))} takes {expected} bytes, "
                f"but its offsets hold {end - begin}"
            )
    # What a tensor is called is quoted only here: a large model has hundreds of thousands of them.
    except (KeyError, TypeError):
        fact = f"needs exactly dtype, shape and data_offsets, not {quoted(entry)}"
        raise InputError(f"{path}: tensor {quoted(name)}: {fact}") from None
    except ValueError as error:
        raise InputError(f"{path}: tensor {quoted(name)}: {error}") from None
    return TensorInfo(name, dtype, shape, data_start + begin, data_start + end)


def _parse_dtype(tag: Any) -> DType:
    dtype = BY_TAG.get(tag) or PACKED_BY_TAG.get(tag) if isinstance(tag, str) else None
    if dtype is None and isinstance(tag, str) and tag in FOREIGN_TAGS:
        raise ValueError(
            f"is quantised, of {FOREIGN_TAGS[tag]} (type {tag}), which cannot be merged: give the model in "
            "16 or 32 bits that it was made from"
        )
    if dtype is None:
        raise ValueError(f"unknown dtype {quoted(tag)}; known: {', '.join(BY_TAG)}")
    return dtype


def _parse_shape(
    shape: Any, known: dict[tuple[int, ...], tuple[tuple[int, ...], int]]
) -> tuple[tuple[int, ...], int]:
    """The shape and its number of elements, refused as soon as the running product passes 64 bits."""
    if type(shape) is not list:
        raise ValueError(f"shape {quoted(shape)} is not a list of integers from 0 to 2^63 - 1")
    for size in shape:
        if type(size) is not int or not 0 <= size <= _MAX_SIZE:
            raise ValueError(f"shape {quoted(shape)} is not a list of integers from 0 to 2^63 - 1")
    key = tuple(shape)
    if key not in known:
        numel = 1
        for size in key:
            numel *= size
            if numel > _MAX_SIZE:
                raise ValueError(f"shape {quoted(shape)} overflows 64 bits")
        known[key] = key, numel
    return known[key]


def _parse_offsets(offsets: Any) -> tuple[int, int]:
    if type(offsets) is list and len(offsets) == 2:
        begin, end = offsets
        if type(begin) is int and type(end) is int and 0 <= begin <= _MAX_SIZE and 0 <= end <= _MAX_SIZE:
            if begin > end:
                raise ValueError(f"data_offsets end before they begin: {quoted(offsets)}")
            return begin, end
    raise ValueError(f"data_offsets {quoted(offsets)} is not two integers from 0 to 2^63 - 1")


def _check_layout(tensors: list[TensorInfo], data_start: int, file_size: int, path: Path) -> None:
    """The ranges, sorted, must follow one another from the start of the data to the end of the file."""
    position = data_start
    for info in tensors:
        if info.begin != position or info.end > file_size:
            _raise_layout(info, position, tensors[-1].end, file_size, f"{path}: tensor {quoted(info.name)}")
        position = info.end
    if position < file_size:
        raise InputError(f"{path}: {file_size - position} bytes follow the last tensor")


def _raise_layout(info: TensorInfo, position: int, last: int, file_size: int, where: str) -> NoReturn:
    if info.begin < position:
        raise InputError(f"{where}: overlaps the tensor before it by {position - info.begin} bytes")
    if info.begin > position:
        raise InputError(f"{where}: a gap of {info.begin - position} bytes lies before it")
    raise InputError(
        f"{where}: ends {info.end - file_size} bytes beyond the end of the file: "
        f"it is truncated ({last - file_size} bytes are missing); fetch it again"
    )
