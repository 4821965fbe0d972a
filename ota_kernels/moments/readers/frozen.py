"""Which parameters training changed: those that differ from the base's. The others may have been frozen."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from ...io.reader import Checkpoint
from ...tensors.buffer import Buffer
from .adapter import is_adapter
from .naming import stored_names
from .request import Request

_ELEMENTS = 1 << 22


def changed_names(names: Iterable[str], request: Request) -> frozenset[str] | None:
    """Those of `names` some of whose stored elements differ from the base's; None without both models, and
    for an adapter, which its base has nothing of.

    Reads both models where their names agree; stops at the first difference of each tensor.
    """
    if request.base is None or request.model is None or is_adapter(request.model.tensors):
        return None
    stored = stored_names(names, request.model)
    return frozenset(
        name
        for name, tensors in stored.items()
        if any(not _equal(tensor, request.model, request.base) for tensor in tensors)
    )


def _equal(name: str, model: Checkpoint, base: Checkpoint) -> bool:
    if name not in model.tensors or name not in base.tensors:
        return False
    if model.tensors[name].shape != base.tensors[name].shape:
        return False
    one, other = model.buffer(name), base.buffer(name)
    for start in range(0, len(one), _ELEMENTS):
        stop = min(start + _ELEMENTS, len(one))
        if not _equal_values(one.slice(start, stop), other.slice(start, stop)):
            return False
    return True


def _equal_values(one: Buffer, other: Buffer) -> bool:
    if one.dtype == other.dtype:
        return np.array_equal(one.data, other.data)
    # A frozen weight may have been saved in another type: then it equals the base's rounded to it.
    narrow = min((one.dtype, other.dtype), key=lambda dtype: dtype.itemsize)
    rounded = [_tensor(buffer).to(getattr(torch, narrow.name)) for buffer in (one, other)]
    return bool(torch.equal(*rounded))


def _tensor(buffer: Buffer) -> torch.Tensor:
    return torch.from_numpy(buffer.data.copy()).view(getattr(torch, buffer.dtype.name))
