"""The element types: safetensors tags, torch names, sizes, and the codes that csrc uses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """One element type.

    name: the torch name ("bfloat16"), tag: the safetensors name ("BF16"), itemsize: bytes,
    code: the number csrc/formulas.hpp knows it by, or None for types that are copied, never merged.
    """

    name: str
    tag: str
    itemsize: int
    code: int | None = None

    @property
    def is_float(self) -> bool:
        """Whether tensors of this type are merged; others are copied when all models agree."""
        return self.code is not None


_ALL = (
    DType("float32", "F32", 4, 0),
    DType("bfloat16", "BF16", 2, 1),
    DType("float16", "F16", 2, 2),
    DType("float64", "F64", 8, 3),
    DType("float8_e4m3fn", "F8_E4M3", 1, 4),
    DType("float8_e5m2", "F8_E5M2", 1, 5),
    DType("bool", "BOOL", 1),
    DType("float8_e8m0fnu", "F8_E8M0", 1),  # powers of two: scales of quantised weights
    DType("uint8", "U8", 1),
    DType("int8", "I8", 1),
    DType("uint16", "U16", 2),
    DType("int16", "I16", 2),
    DType("uint32", "U32", 4),
    DType("int32", "I32", 4),
    DType("uint64", "U64", 8),
    DType("int64", "I64", 8),
)

BY_NAME = {d.name: d for d in _ALL}
BY_TAG = {d.tag: d for d in _ALL}

# Types a merged tensor can be written in. float8 has no scale in a safetensors file, so a merge into it
# would silently lose most of each edit.
OUTPUT_NAMES = ("bfloat16", "float16", "float32", "float64")
