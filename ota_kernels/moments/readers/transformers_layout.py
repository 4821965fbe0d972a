"""How transformers stores a model's parameters: renamed, split or stacked, by its own code run on no data.

transformers 5 trains fused experts and saves one tensor for each, and renames parts of vision models. Its own
`revert_weight_conversion` is run on tensors without memory, in which a slice is known by offset and strides.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from ...io.reader import Checkpoint
from ..arrangement import Arrangement, Part, whole
from ..quiet import quiet


class UnknownOrderError(Exception):
    """The order of a model's parameters cannot be had; its text says why and what to do."""


def build(model: Checkpoint) -> Any:
    """The model on the meta device, by the class that config.json names; the folder's own code never runs.

    Raises UnknownOrderError without transformers, or where it does not know or cannot build the class.
    """
    if model.config is None:
        raise UnknownOrderError(f"give --model a folder with config.json; {model.root} has none")
    try:
        with quiet():
            import transformers  # noqa: F401
    except ImportError:
        raise UnknownOrderError("install transformers (pip install transformers)") from None
    with quiet():
        return _build(str(model.root), json.dumps(model.config, sort_keys=True))


@functools.lru_cache(maxsize=2)
def _build(root: str, config_text: str) -> Any:
    import torch
    import transformers

    architectures = json.loads(config_text).get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    known = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)):
        raise UnknownOrderError(f"transformers has no model class {name!r}, which {root}/config.json names")
    try:
        config = known.config_class.from_pretrained(root, local_files_only=True)
        with torch.device("meta"):
            return known(config)
    except Exception as error:
        # A config that does not fit its class fails anywhere inside transformers, with any exception.
        raise UnknownOrderError(
            f"transformers cannot build {name} from {root}/config.json ({type(error).__name__}): "
            "its values do not fit that class"
        ) from error


def stored_layout(built: Any) -> dict[str, Arrangement]:
    """The tensors that transformers would save, by name, and the parameters that each is made of.

    One that it makes by more than moving elements is left out.
    """
    import torch

    empty = {n: torch.empty(p.shape, device="meta") for n, p in built.named_parameters()}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 saves what it trains
        return {name: whole(name, tuple(tensor.shape)) for name, tensor in empty.items()}
    names = {id(tensor): name for name, tensor in empty.items()}
    with quiet(), _moving_only() as joined:
        saved = revert_weight_conversion(built, dict(empty))
    found = {name: _arrangement(tensor, names, joined) for name, tensor in saved.items()}
    return {name: arrangement for name, arrangement in found.items() if arrangement is not None}


def _arrangement(tensor: Any, names: dict[int, str], joined: dict[int, tuple]) -> Arrangement | None:
    inputs, axis = joined.get(id(tensor), (None, [tensor], 0))[1:]
    parts = [_part(one, names) for one in inputs]
    if None in parts:
        return None
    return Arrangement(tuple(tensor.shape), tuple(parts), axis)


def _part(tensor: Any, names: dict[int, str]) -> Part | None:
    base = tensor if tensor._base is None else tensor._base
    name = names.get(id(base))
    if name is None:
        return None
    return Part(name, tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())


def _moving_only():
    """A mode in which copies are views, and joined tensors are remembered with their inputs, by id."""
    import torch
    from torch.overrides import TorchFunctionMode

    copies = {torch.Tensor.contiguous, torch.Tensor.clone, torch.clone, torch.Tensor.detach, torch.Tensor.to}

    class Moving(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.joined: dict[int, tuple] = {}

        def __enter__(self):
            super().__enter__()
            return self.joined

        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if function in copies:
                return args[0]
            result = function(*args, **kwargs)
            if function in (torch.cat, torch.concat, torch.concatenate, torch.stack):
                inputs = list(args[0] if args else kwargs["tensors"])
                axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
                axis %= result.dim()
                if function is torch.stack:
                    inputs = [one.unsqueeze(axis) for one in inputs]
                # The result is kept, so that its id stays its own.
                self.joined[id(result)] = (result, inputs, axis)
            return result

    return Moving()
