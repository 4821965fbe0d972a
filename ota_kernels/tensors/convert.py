"""A caller's torch tensors and numpy arrays as buffers, and results as the kind of array they came as."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import BackendError, InputError, RecipeError
from .array import Array, is_resident, on_cpu, raw
from .buffer import Buffer
from .dtypes import BY_NAME, DType

_DEVICES = ("cpu", "cuda")  # torch's names of types; ROCm's is cuda


def device_of(tensor: Any, origin: str) -> str:
    """Where it is: "cpu" or "cuda:N". Raises InputError for what is no array, BackendError for a device that
    no backend serves."""
    if isinstance(tensor, np.ndarray):
        return "cpu"
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{origin} is a {type(tensor).__name__}, not a torch tensor or numpy array")
    if type(tensor).__name__ == "DTensor":
        raise InputError(
            f"{origin} is a DTensor, of which this process has a part: give its .full_tensor(), or merge "
            "files by several processes"
        )
    if tensor.device.type not in _DEVICES:
        raise BackendError(
            f"{origin} is on {tensor.device}: no backend serves that device; move it with .cpu()"
        )
    return str(tensor.device)


def buffer_of(tensor: Any, origin: str, resident: bool = False) -> Buffer:
    """A flat view of a tensor's bytes (a copy where it is not contiguous). resident: of a tensor on the CPU
    too, for a backend that works on tensors there; of one on a GPU always."""
    on_gpu = device_of(tensor, origin) != "cpu"
    if isinstance(tensor, np.ndarray):
        dtype = _dtype(tensor.dtype.name, origin, tensor.dtype)
        native = np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("="))
        data = native.reshape(-1).view(np.uint8)
        return Buffer(on_cpu(data) if resident else data, dtype, origin)
    import torch

    if tensor.layout != torch.strided:
        raise InputError(f"{origin} is {tensor.layout}; make it dense with .to_dense()")
    dtype = _dtype(str(tensor.dtype).removeprefix("torch."), origin, tensor.dtype)
    dense = tensor.detach().resolve_neg().contiguous()
    # A tensor of one element or none may have any stride, but only stride 1 can be viewed as bytes.
    data = raw(dense.as_strided((dense.numel(),), (1,)))
    return Buffer(data if on_gpu or resident else data.numpy(), dtype, origin)


def _dtype(name: str, origin: str, given: Any) -> DType:
    if name not in BY_NAME:
        raise InputError(f"{origin}: elements of type {given} are not supported")
    return BY_NAME[name]


def numpy_dtype(like: np.ndarray, dtype: DType) -> np.dtype:
    """numpy's type of that name: its own, or one that `like` brings along (ml_dtypes)."""
    if like.dtype.name == dtype.name:
        return like.dtype.newbyteorder("=")
    try:
        return np.dtype(dtype.name)
    except TypeError:
        raise RecipeError(
            f"numpy has no {dtype.name}: choose another out_dtype, or give torch tensors"
        ) from None


def array_like(tensor: Any, data: Array, dtype: DType, shape: tuple[int, ...]) -> Any:
    """Result bytes, uint8, as the kind of array that `tensor` is, of another type and shape."""
    if isinstance(tensor, np.ndarray):
        return data.view(numpy_dtype(tensor, dtype)).reshape(shape)
    import torch

    own = getattr(torch, dtype.name)
    if is_resident(data):
        return data.view(own).reshape(shape)
    if data.size == 0:  # numpy 2.4 gives it stride 0, which torch does not view as another type
        return torch.empty(shape, dtype=own)
    return torch.from_numpy(data).view(own).reshape(shape)
