"""safetensors headers: every lie is an InputError that names file and fact; what is written can be read."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ota_kernels.errors import InputError
from ota_kernels.io.header import (
    DATA_ALIGNMENT,
    MAX_HEADER_BYTES,
    PREFIX_BYTES,
    build_header,
    parse_header,
    read_header,
)
from ota_kernels.tensors.dtypes import BY_NAME, BY_TAG

F32 = BY_NAME["float32"]


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def raw_file(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def json_file(header: object, data_bytes: int = 0) -> bytes:
    return raw_file(json.dumps(header).encode(), b"\0" * data_bytes)


BAD_FILES = {
    "empty file": (b"", "0 bytes are too few"),
    "no length": (b"\x02\0\0", "3 bytes are too few"),
    "header longer than the file": (
        struct.pack("<Q", 1000) + b"{}",
        "1000 is longer than the file (10 bytes)",
    ),
    "header over the cap": (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "over the limit"),
    "header length 2^64 - 1": (b"\xff" * 8 + b"{}", "over the limit"),
    "header of no bytes": (raw_file(b""), "not a JSON object"),
    "not UTF-8": (raw_file(b'{"\xff":1}'), "not UTF-8 (byte 2)"),
    "byte-order mark": (raw_file(b"\xef\xbb\xbf{}"), "not a JSON object"),
    "not JSON": (raw_file(b'{"w":'), "not valid JSON"),
    "blank before the object": (raw_file(b" {}"), "not a JSON object"),
    "a list": (raw_file(b"[]"), "not a JSON object"),
    "nested beyond the stack": (
        raw_file(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "not valid JSON",
    ),
    "number of 5000 digits": (raw_file(b'{"w":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "duplicate tensor": (
        raw_file(b'{"w":%b,"w":%b}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 8),
        "duplicate key 'w'",
    ),
    "duplicate field": (raw_file(b'{"w":{"dtype":"F32","dtype":"F32"}}'), "duplicate key 'dtype'"),
    "half a surrogate pair": (json_file({"\ud800": entry()}, 8), "not valid Unicode"),
    "entry is a number": (json_file({"w": 3}), "needs exactly dtype, shape and data_offsets"),
    "no shape": (json_file({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, 8), "needs exactly"),
    "unknown field": (json_file({"w": entry() | {"scale": 2}}, 8), "needs exactly"),
    "unknown dtype": (json_file({"w": entry("F7")}, 8), "unknown dtype 'F7'; known: F32, BF16"),
    "dtype is a list": (json_file({"w": entry(["F32"])}, 8), "unknown dtype ['F32']"),
    "shape is a number": (json_file({"w": entry() | {"shape": 2}}, 8), "shape 2 is not a list"),
    "negative size": (json_file({"w": entry(shape=(-2,))}, 8), "shape [-2] is not a list"),
    "bool size": (json_file({"w": entry("U8", (True,), (0, 1))}, 1), "shape [True] is not a list"),
    "float size": (json_file({"w": entry(shape=(2.0,))}, 8), "shape [2.0] is not a list"),
    "string size": (json_file({"w": entry(shape=("2",))}, 8), "shape ['2'] is not a list"),
    "size over 64 bits": (json_file({"w": entry(shape=(2**63, 0), offsets=(0, 0))}), "from 0 to 2^63 - 1"),
    "product over 64 bits": (json_file({"w": entry(shape=(2**32, 2**32))}, 8), "overflows 64 bits"),
    "offsets is a number": (json_file({"w": entry() | {"data_offsets": 8}}, 8), "data_offsets 8 is not two"),
    "one offset": (json_file({"w": entry(offsets=(8,))}, 8), "data_offsets [8] is not two"),
    "three offsets": (json_file({"w": entry(offsets=(0, 4, 8))}, 8), "data_offsets [0, 4, 8] is not two"),
    "negative offset": (json_file({"w": entry(offsets=(-8, 0))}, 8), "data_offsets [-8, 0] is not two"),
    "bool offset": (json_file({"w": entry("U8", (1,), (False, True))}, 1), "is not two integers"),
    "float offset": (json_file({"w": entry(offsets=(0, 8.0))}, 8), "data_offsets [0, 8.0] is not two"),
    "offset over 64 bits": (json_file({"w": entry(offsets=(0, 2**63))}, 8), "is not two integers"),
    "end before begin": (json_file({"w": entry(offsets=(8, 0))}, 8), "end before they begin: [8, 0]"),
    "too few bytes for the shape": (
        json_file({"w": entry(shape=(3,))}, 8),
        "F32 of shape [3] takes 12 bytes, but its offsets hold 8",
    ),
    "too many bytes for the shape": (json_file({"w": entry(shape=(1,))}, 8), "takes 4 bytes"),
    "bytes for an empty tensor": (json_file({"w": entry(shape=(0, 5))}, 8), "takes 0 bytes"),
    "data starts late": (json_file({"w": entry(offsets=(4, 12))}, 12), "a gap of 4 bytes lies before it"),
    "gap": (json_file({"v": entry(), "w": entry(offsets=(10, 18))}, 18), "'w': a gap of 2 bytes"),
    "overlap": (
        json_file({"v": entry(), "w": entry(offsets=(6, 14))}, 14),
        "'w': overlaps the tensor before it",
    ),
    "same range twice": (
        json_file({"v": entry(), "w": entry()}, 8),
        "overlaps the tensor before it by 8 bytes",
    ),
    "empty tensor inside another": (
        json_file({"v": entry(), "w": entry(shape=(0,), offsets=(4, 4))}, 8),
        "'w': overlaps",
    ),
    "truncated": (json_file({"v": entry(), "w": entry(offsets=(8, 16))}, 11), "(5 bytes are missing)"),
    "truncated by whole tensors": (
        json_file({"v": entry(), "w": entry(offsets=(8, 16))}, 2),
        "(14 bytes are",
    ),
    "trailing bytes": (json_file({"w": entry()}, 11), "3 bytes follow the last tensor"),
    "trailing bytes, no tensors": (json_file({}, 5), "5 bytes follow the last tensor"),
    "metadata is a list": (json_file({"__metadata__": ["pt"]}), "must map strings to strings"),
    "metadata is a number": (json_file({"__metadata__": 0}), "must map strings to strings"),
    "metadata value is a number": (json_file({"__metadata__": {"step": 3}}), "__metadata__['step'] must be"),
    "metadata value is no text": (json_file({"__metadata__": {"a": "\ud800"}}), "not valid Unicode"),
}


@pytest.mark.parametrize(("content", "fact"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_lying_file_is_refused_in_one_line(tmp_path, content, fact):
    path = tmp_path / "lie.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_header(path)
    message = str(caught.value)
    assert str(path) in message
    assert fact in message
    assert "\n" not in message
    assert len(message) < 1000


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.safetensors: cannot be read: No such file"):
        read_header(tmp_path / "none.safetensors")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a regular file"):
        read_header(tmp_path)


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(InputError, match="not a regular file"):
        read_header(tmp_path / "pipe.safetensors")


@pytest.mark.parametrize("cut", [1, 3, 8, 40])
def test_every_truncation_of_a_real_file_is_refused(tmp_path, cut):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.arange(6.0), "v": torch.ones(3, 2)}, path)
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    with pytest.raises(InputError, match=rf"\({cut} bytes are missing\)"):
        read_header(path)


@pytest.mark.parametrize("dtype", BY_TAG.values(), ids=lambda dtype: dtype.name)
def test_reads_what_safetensors_writes_in_every_dtype(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    written = torch.arange(6).reshape(2, 3).to(getattr(torch, dtype.name))
    save_file({"w": written}, path, metadata={"format": "pt", "note": "ü"})
    header = read_header(path)
    info = header.tensors["w"]
    assert (info.dtype, info.shape, info.numel, info.nbytes) == (dtype, (2, 3), 6, 6 * dtype.itemsize)
    assert header.metadata == {"format": "pt", "note": "ü"}
    assert header.file_size == path.stat().st_size == info.end
    stored = path.read_bytes()[info.begin : info.end]
    assert stored == written.view(torch.uint8).numpy().tobytes()


def test_tensors_come_in_file_order(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        json_file({"a": entry(offsets=(8, 16)), "b": entry(), "c": entry("U8", (0,), (16, 16))}, 16)
    )
    assert list(read_header(path).tensors) == ["b", "a", "c"]


def test_scalars_empty_tensors_and_empty_files_are_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        json_file({"s": entry(shape=(), offsets=(0, 4)), "e": entry(shape=(0, 7), offsets=(4, 4))}, 4)
    )
    tensors = read_header(path).tensors
    assert (tensors["s"].numel, tensors["s"].nbytes) == (1, 4)
    assert (tensors["e"].numel, tensors["e"].nbytes) == (0, 0)
    path.write_bytes(json_file({}))
    assert read_header(path).tensors == {}


def test_an_offset_beyond_2_gib_is_exact():
    count = 2**30 + 1
    header, ranges = build_header([("big", F32, (count,)), ("last", F32, (1,))], {})
    assert ranges == [
        (len(header), len(header) + 4 * count),
        (len(header) + 4 * count, len(header) + 4 * count + 4),
    ]
    parsed = parse_header(header[PREFIX_BYTES:], ranges[-1][1], Path("big.safetensors"))
    assert parsed.tensors["last"].begin == ranges[1][0] > 2**31


@pytest.mark.parametrize("name", ["w", "__metadata__"])
def test_a_taken_name_is_not_written(name):
    with pytest.raises(ValueError, match=f"{name}.* is taken"):
        build_header([("w", F32, (1,)), (name, F32, (1,))], {})


def test_safetensors_reads_what_is_written(tmp_path):
    arrays = {
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
        "odd": np.arange(3, dtype=np.uint8),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 4), np.float16),
        'ü "quoted"\n': np.arange(4, dtype=np.int64),
    }
    header, ranges = build_header(
        [(name, BY_NAME[array.dtype.name], array.shape) for name, array in arrays.items()],
        {"format": "pt", "ü": "y\n"},
    )
    path = tmp_path / "model.safetensors"
    path.write_bytes(header + b"".join(array.tobytes() for array in arrays.values()))
    assert len(header) % DATA_ALIGNMENT == 0
    assert ranges[0][0] == len(header)
    assert ranges[-1][1] == path.stat().st_size
    loaded = safetensors.numpy.load_file(path)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array, strict=True)
    with safetensors.safe_open(path, framework="numpy") as opened:
        assert opened.metadata() == {"format": "pt", "ü": "y\n"}


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
layouts = st.dictionaries(
    text.filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(list(BY_TAG.values())), shapes),
    max_size=6,
)


@given(layouts, st.dictionaries(text, text, max_size=3))
def test_any_layout_survives_a_round_trip(layout, metadata):
    header, ranges = build_header([(name, dtype, shape) for name, (dtype, shape) in layout.items()], metadata)
    end = ranges[-1][1] if ranges else len(header)
    parsed = parse_header(header[PREFIX_BYTES:], end, Path("any.safetensors"))
    assert parsed.metadata == metadata
    assert parsed.data_start == len(header)
    assert parsed.tensors.keys() == layout.keys()
    for (name, (dtype, shape)), (begin, stop) in zip(layout.items(), ranges, strict=True):
        info = parsed.tensors[name]
        assert (info.dtype, info.shape, info.begin, info.end) == (dtype, shape, begin, stop)
        assert stop - begin == math.prod(shape) * dtype.itemsize
    assert dict(safetensors.deserialize(header + bytes(end - len(header)))).keys() == layout.keys()


def file_of(layout) -> bytes:
    header, ranges = build_header([(name, *rest) for name, rest in layout.items()], {"format": "pt"})
    return header + bytes(ranges[-1][1] - len(header) if ranges else 0)


def refused_or_sound(path: Path, content: bytes) -> None:
    """InputError and nothing else, or a file that the safetensors library reads in the same way."""
    path.write_bytes(content)
    try:
        parsed = read_header(path)
    except InputError:
        return
    read = dict(safetensors.deserialize(content))
    assert read.keys() == parsed.tensors.keys()
    for name, info in parsed.tensors.items():
        assert (read[name]["dtype"], tuple(read[name]["shape"])) == (info.dtype.tag, info.shape)
        assert bytes(read[name]["data"]) == content[info.begin : info.end]


# Without "-": Python reads -0 as 0, safetensors refuses it, and neither harms.
patches = st.one_of(
    st.binary(max_size=3).filter(lambda patch: b"-" not in patch),
    st.sampled_from([b"0", b"9", b'"', b"[", b"}", b"null", b"1e9"]),
)


@given(layouts, st.data())
def test_damaged_bytes_are_refused_or_harmless(tmp_path_factory, layout, data):
    content = bytearray(file_of(layout))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        removed = data.draw(st.integers(0, 3))
        content[position : position + removed] = data.draw(patches)
    refused_or_sound(tmp_path_factory.getbasetemp() / "damaged.safetensors", bytes(content))


# Values that are nearly right come first; anything that JSON can say comes last.
near_misses = st.one_of(
    st.integers(-1, 9),
    st.lists(st.integers(0, 9), max_size=3),
    st.sampled_from(["F32", "U8", "f32", "F2"]),
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text)
json_values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner))


@given(layouts.filter(bool), st.one_of(near_misses, near_misses, json_values), st.integers(-3, 3), st.data())
def test_a_lie_in_any_field_is_refused_or_harmless(tmp_path_factory, layout, lie, size_change, data):
    content = file_of(layout)
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[PREFIX_BYTES : PREFIX_BYTES + length])
    tensor = header[data.draw(st.sampled_from(list(layout)))]
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    if field != "dtype" and tensor[field] and data.draw(st.booleans()):
        tensor[field][data.draw(st.integers(0, len(tensor[field]) - 1))] = lie
    else:
        tensor[field] = lie
    data_bytes = max(0, len(content) - PREFIX_BYTES - length + size_change)
    path = tmp_path_factory.getbasetemp() / "lying.safetensors"
    refused_or_sound(path, raw_file(json.dumps(header).encode(), bytes(data_bytes)))
