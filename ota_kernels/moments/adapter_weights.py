"""An adapter's weights, added to those of its base in memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import InputError
from ..io.header import quoted
from ..io.reader import Checkpoint
from .readers.adapter import PREFIX, SUFFIXES, config_of, scaling

_A, _B = SUFFIXES[:2]


def add_adapter(parameters: Mapping[str, torch.nn.Parameter], adapter: Checkpoint) -> None:
    """W += s B A for every module of the adapter, and whole weights where it saves them, in the type of W.

    parameters: of the base, by the names of its files. Raises InputError for what the base does not have, and
    for what is neither of the two (DoRA, embeddings of LoRA).
    """
    config = config_of(adapter.root)
    for name in adapter.tensors:
        if name.endswith(f".{_A}"):
            _add_product(name.removesuffix(f".{_A}"), parameters, adapter, config)
        elif not name.endswith(f".{_B}"):
            target = _target(name.removeprefix(PREFIX), parameters, adapter, name)
            _assign(target, _tensor(adapter, name), adapter, name)


def _add_product(
    module: str, parameters: Mapping[str, torch.nn.Parameter], adapter: Checkpoint, config: dict
) -> None:
    target = _target(f"{module.removeprefix(PREFIX)}.weight", parameters, adapter, module)
    if f"{module}.{_B}" not in adapter.tensors:
        raise InputError(f"{adapter.label}: lacks {quoted(f'{module}.{_B}')}")
    a, b = (_tensor(adapter, f"{module}.{part}") for part in (_A, _B))
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise InputError(
            f"{adapter.label}: {quoted(module)}: {list(b.shape)} x {list(a.shape)} is no product"
        )
    product = scaling(config, a.shape[0], module) * (b @ a)
    product = product.T if config.get("fan_in_fan_out") else product
    _assign(
        target,
        target.detach().float().cpu() + product if product.shape == target.shape else product,
        adapter,
        module,
    )


def _target(
    name: str, parameters: Mapping[str, torch.nn.Parameter], adapter: Checkpoint, of: str
) -> torch.nn.Parameter:
    if name not in parameters:
        raise InputError(
            f"{adapter.label}: {quoted(of)} is of no parameter of the base: only LoRA's A and B, and whole "
            "weights, can be added to it"
        )
    return parameters[name]


def _assign(target: torch.nn.Parameter, values: torch.Tensor, adapter: Checkpoint, of: str) -> None:
    if values.shape != target.shape:
        raise InputError(
            f"{adapter.label}: {quoted(of)} makes {list(values.shape)}, the base has {list(target.shape)}"
        )
    with torch.no_grad():
        target.copy_(values)


def _tensor(adapter: Checkpoint, name: str) -> torch.Tensor:
    buffer = adapter.buffer(name)
    found = torch.from_numpy(buffer.data.copy()).view(getattr(torch, buffer.dtype.name))
    return found.float().reshape(adapter.tensors[name].shape)
