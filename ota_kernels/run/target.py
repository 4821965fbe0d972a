"""A caller's tensors that a merge is written into, in place where that is possible."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import InputError
from ..planning.outputs import OutputTensor
from ..tensors import array as resident
from ..tensors.array import Array
from ..tensors.convert import buffer_of, device_of
from ..tensors.dtypes import OUTPUT_NAMES
from ..tensors.tile import TensorInputs


class Target:
    """Tensors by name. outputs: those that are merged into them, in their types; of several names of one
    memory (tied parameters) the first one. InputError where names, shapes, types or tied inputs do not
    fit."""

    def __init__(self, tensors: Mapping[str, Any], outputs: Sequence[OutputTensor]) -> None:
        self._tensors = tensors
        self._places = {name: _place(name, tensor) for name, tensor in tensors.items()}
        self._own: set[str] = set()  # merged in memory of their own
        self.outputs: list[OutputTensor] = []
        first: dict[tuple, OutputTensor] = {}
        for output in outputs:
            if output.name not in tensors:
                raise InputError(f"out has no tensor {output.name!r}, which the merge has")
            place = self._places[output.name]
            if place in first and output.numel:
                _check_tied(first[place], output)
            else:
                first[place] = output
                self.outputs.append(self._fitted(output))
        for name, place in self._places.items():
            if place not in first:
                raise InputError(f"out[{name!r}] is in no model, so nothing is merged into it")
        self._check_apart(first)

    def _fitted(self, output: OutputTensor) -> OutputTensor:
        tensor, what = self._tensors[output.name], f"out[{output.name!r}]"
        if tuple(tensor.shape) != output.shape:
            raise InputError(f"{what} has shape {list(tensor.shape)}, the merge {list(output.shape)}")
        dtype = buffer_of(tensor[:0] if tensor.ndim else tensor, what).dtype
        if output.is_computed and dtype.name not in OUTPUT_NAMES:
            raise InputError(f"{what} is {dtype.name}, which a merge cannot be written in")
        if (
            not output.is_computed
            and dtype != output.dtype
            and not (dtype.is_float and output.dtype.is_float)
        ):
            raise InputError(f"{what} is {dtype.name}, the merge {output.dtype.name}")
        return replace(output, dtype=dtype) if output.is_computed else output

    def _check_apart(self, places: Mapping[tuple, OutputTensor]) -> None:
        """Memory is one tensor's, or the same under several names."""
        ordered = sorted((place, output.name) for place, output in places.items() if output.numel)
        for (one, first), (other, second) in itertools.pairwise(ordered):
            if one[0] == other[0] and other[1] < one[2]:
                raise InputError(f"out[{first!r}] and out[{second!r}] overlap in memory: give each its own")

    def rooms(self, tensors: Sequence[TensorInputs]) -> list[Array | None]:
        """Where each tensor is merged, uint8; None: in memory of its own."""
        read = sorted({(_address(b.data), b.data.nbytes) for t in tensors for b in t.buffers})
        starts = [start for start, _ in read]
        ends = np.maximum.accumulate([start + size for start, size in read]) if read else []

        def room(tensor: TensorInputs) -> Array | None:
            target = self._tensors[tensor.name]
            like = tensor.experts[0].data
            if not _is_written_in_place(target, like):
                return None
            data = buffer_of(target, tensor.name, resident.is_resident(like)).data
            begin = _address(data)
            before = bisect.bisect_left(starts, begin + data.nbytes) - 1
            return None if before >= 0 and ends[before] > begin else data

        found = [room(tensor) for tensor in tensors]
        self._own = {t.name for t, data in zip(tensors, found, strict=True) if data is None}
        return found

    def filled(self, merged: Mapping[str, Any]) -> dict[str, Any]:
        """The caller's tensors, after what was merged elsewhere is copied into them."""
        computed = {output.name for output in self.outputs if output.is_computed}
        for name, tensor in merged.items():
            if name in self._own or name not in computed:
                _copy(self._tensors[name], tensor)
        return dict(self._tensors)


def _place(name: str, tensor: Any) -> tuple[str, int, int, tuple, tuple]:
    """Where it lies: its device, first byte and end, shape and strides."""
    what = f"out[{name!r}]"
    device = device_of(tensor, what)
    if isinstance(tensor, np.ndarray):
        if not tensor.flags.writeable:
            raise InputError(f"{what} is read-only: give an array that can be written")
        return device, *_span(_address(tensor), tensor.shape, tensor.strides, tensor.itemsize)
    if type(tensor).__name__ not in ("Tensor", "Parameter", "Buffer"):
        raise InputError(f"{what} is a {type(tensor).__name__}: merge into plain tensors")
    if str(tensor.layout) != "torch.strided":
        raise InputError(f"{what} is {tensor.layout}: merge into a dense tensor")
    size = tensor.element_size()
    return device, *_span(tensor.data_ptr(), tensor.shape, [size * step for step in tensor.stride()], size)


def _span(
    address: int, shape: Sequence[int], strides: Sequence[int], size: int
) -> tuple[int, int, tuple, tuple]:
    """First byte, end, shape and strides in bytes; nothing where it is empty."""
    steps = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    low = address + sum(step for step in steps if step < 0)
    high = address + sum(step for step in steps if step > 0) + size
    return low, low if 0 in shape else high, tuple(shape), tuple(strides)


def _address(data: Array) -> int:
    return data.data_ptr() if resident.is_resident(data) else data.__array_interface__["data"][0]


def _is_written_in_place(target: Any, like: Array) -> bool:
    """Whether kernels that read `like` can write a tensor."""
    if isinstance(target, np.ndarray):
        return not resident.is_resident(like) and target.flags.c_contiguous and target.dtype.isnative
    device = str(like.device) if resident.is_resident(like) else "cpu"
    return str(target.device) == device and target.is_contiguous() and not target.is_neg()


def _copy(target: Any, merged: Any) -> None:
    if isinstance(target, np.ndarray):
        target[...] = merged
        return
    import torch

    with torch.no_grad():
        target.copy_(merged)


def _check_tied(first: OutputTensor, other: OutputTensor) -> None:
    """Names of one memory take the same from every model."""
    pairs = zip(first.sources, other.sources, strict=True)
    if first.action != other.action or not all(
        a.source.dtype == b.source.dtype and resident.is_equal(a.source.data, b.source.data) for a, b in pairs
    ):
        raise InputError(
            f"{other.name!r} and {first.name!r} are one memory in `out`, but differ in the models: untie them"
        )
