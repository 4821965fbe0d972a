"""The element types: safetensors tags, torch names, sizes, and the codes that csrc uses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """One element type.

    name: the torch name ("bfloat16"), tag: the safetensors name ("BF16"), itemsize: bytes, 0 for types whose
    elements are parts of a byte; code: the number csrc/formulas.hpp knows it by, or None for types that are
    copied, never merged; bits: of an element that is a part of a byte, else 0.
    """

    name: str
    tag: str
    itemsize: int
    code: int | None = None
    bits: int = 0

    def nbytes(self, numel: int) -> int:
        """Bytes of `numel` elements."""
        return -(-numel * self.bits // 8) if self.bits else numel * self.itemsize

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
    DType("uint8", "U8", 1),
    DType("int8", "I8", 1),
    DType("uint16", "U16", 2),
    DType("int16", "I16", 2),
    DType("uint32", "U32", 4),
    DType("int32", "I32", 4),
    DType("uint64", "U64", 8),
    DType("int64", "I64", 8),
    DType("complex64", "C64", 8),
    DType("float8_e8m0fnu", "F8_E8M0", 1),  # powers of two: scales of quantised weights
    DType("float8_e4m3fnuz", "F8_E4M3FNUZ", 1),
    DType("float8_e5m2fnuz", "F8_E5M2FNUZ", 1),
)

BY_NAME = {d.name: d for d in _ALL}
BY_TAG = {d.tag: d for d in _ALL}

# Types of which files may hold tensors that nothing here reads or writes.
_PACKED = (
    DType("float4_e2m1fn", "F4", 0, bits=4),
    DType("float6_e2m3fn", "F6_E2M3", 0, bits=6),
    DType("float6_e3m2fn", "F6_E3M2", 0, bits=6),
)
PACKED_BY_TAG = {d.tag: d for d in _PACKED}

# Types a merged tensor can be written in. float8 has no scale in a safetensors file, so a merge into it
# would silently lose most of each edit.
OUTPUT_NAMES = ("bfloat16", "float16", "float32", "float64")
