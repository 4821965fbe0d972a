"""Weights of a float8 tensor with scales, w = code x scale, made tile by tile."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import InputError
from ..tensors.array import raw
from ..tensors.buffer import Buffer
from ..tensors.computed import Computed
from ..tensors.dtypes import BY_NAME
from .quantised import Scaled

_FORMS = {"float8_e4m3fn": (4, 3, 7), "float8_e5m2": (5, 2, 15)}  # bits of exponent and mantissa, bias


@functools.cache
def code_values(dtype: str) -> np.ndarray:
    """The value of each of the 256 codes of a float8 type, float32[256]; NaN and infinity where they are."""
    exponent_bits, mantissa_bits, bias = _FORMS[dtype]
    codes = np.arange(256)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    normal = np.ldexp(1 + mantissa, exponent - bias)
    values = np.where(exponent == 0, np.ldexp(mantissa, 1 - bias), normal)
    if dtype == "float8_e5m2":
        values[exponent == 31] = np.nan
        values[(exponent == 31) & (mantissa == 0)] = np.inf
    else:
        values[codes & 0x7F == 0x7F] = np.nan
    return np.where(codes < 128, values, -values).astype(np.float32)


def scale_values(scales: Buffer) -> np.ndarray:
    """Scales as float32[n]: float32, bfloat16, float16, or float8_e8m0fnu (powers of two)."""
    if scales.dtype.name == "float8_e8m0fnu":
        codes = np.asarray(scales.data, np.int32)
        with np.errstate(over="ignore"):
            return np.where(codes == 255, np.nan, np.ldexp(np.float64(1), codes - 127)).astype(np.float32)
    if scales.dtype.name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"{scales.origin}: scales of type {scales.dtype.name} are not known")
    return scales.float32()


def source_of(model: Any, name: str, scaled: Scaled) -> ScaledFloat8:
    """The weights of a model's float8 tensor, as `quantised.quantisation_of` found it."""
    shape = tuple(model.tensors[name].shape)
    return ScaledFloat8(model.buffer(name), shape, model.buffer(scaled.name), scaled.block)


class ScaledFloat8(Computed):
    """A float8 tensor whose elements are multiplied by scales; each product is rounded once, to float32.

    codes: the tensor's elements, float8_e4m3fn or float8_e5m2; shape: of the tensor; scales: one per block;
    block: elements along each axis that share a scale, as `quantised.block_shape` has them. An axis whose
    size is no multiple of its block ends with a smaller one.
    """

    def __init__(self, codes: Buffer, shape: tuple[int, ...], scales: Buffer, block: tuple[int, ...]) -> None:
        size = 1 + scales.data.nbytes / max(len(codes), 1)
        super().__init__(tuple(shape), BY_NAME["float32"], codes.origin, size)
        self.codes, self.block = codes, tuple(block)
        counts = [-(-size // of) if of else 0 for size, of in zip(self.shape, self.block, strict=True)]
        values = scale_values(scales)
        if values.size != math.prod(counts):
            raise InputError(
                f"{scales.origin}: {values.size} scales for blocks of {list(block)} in {list(shape)}: they "
                "do not fit"
            )
        self._width = self.shape[-1] if self.shape else 1
        self._scales = values.reshape(-1, counts[-1] if counts else 1)
        self._counts = counts

    def rows(self, first: int, stop: int) -> np.ndarray:
        values = self._elements(first * self.columns, stop * self.columns)
        return values.reshape(stop - first, self.columns)

    def parts(self, first: int, stop: int) -> Iterator[Buffer]:
        yield self.codes.slice(first * self.columns, stop * self.columns)

    def slice(self, start: int, stop: int) -> Buffer:
        """Elements [start, stop) as float32, a copy."""
        return Buffer(raw(self._elements(start, stop)), self.dtype, self.origin)

    def _elements(self, start: int, stop: int) -> np.ndarray:
        if stop <= start:
            return np.empty(0, np.float32)
        first, last = start // self._width, -(-stop // self._width)
        codes = self.codes.slice(first * self._width, last * self._width)
        values = code_values(self.codes.dtype.name)[np.asarray(codes.data)].reshape(-1, self._width)
        rows = self._scale_rows(np.arange(first, last))
        width = self.block[-1] if self.block else 1
        # The rows of a block share a row of scales, which is spread over the columns once.
        cuts = np.flatnonzero(np.diff(rows)) + 1
        for begin, end in zip([0, *cuts], [*cuts, len(rows)], strict=True):
            spread = np.repeat(self._scales[rows[begin]], width)[: self._width]
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                values[begin:end] *= spread
        return values.reshape(-1)[start - first * self._width : stop - first * self._width]

    def _scale_rows(self, rows: np.ndarray) -> np.ndarray:
        """For each row of the flattened tensor, the row of the flattened scales that holds its own."""
        found = np.zeros(len(rows), np.int64)
        factor = 1
        for size, of, count in reversed(list(zip(self.shape, self.block, self._counts, strict=True))[:-1]):
            rows, place = np.divmod(rows, size)
            found += place // of * factor
            factor *= count
        return found
