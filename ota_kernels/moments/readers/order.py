"""The order of a model's parameters, which optimizers number them in.

safetensors files and their indexes are sorted by name, so no file holds the order: only the model's code
does. transformers builds it from config.json on the meta device, without memory for weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...io.header import quoted
from ...io.reader import Checkpoint
from .decay import decay_rules
from .matching import Shape


class UnknownOrderError(Exception):
    """The order of a model's parameters cannot be had; its text says why and what to do."""


@dataclass(frozen=True)
class Order:
    """shapes: of the parameters by name, in the order of `named_parameters`, tied ones once; decaying: the
    names with weight decay, by each rule that some version of the Hugging Face Trainer had."""

    shapes: dict[str, Shape]
    decaying: list[frozenset[str]]


def parameter_order(model: Checkpoint) -> Order:
    """The order of the model's parameters, as transformers builds it.

    Raises UnknownOrderError without transformers, without a config.json of a class that it knows, or where
    that class does not have the parameters that the files hold.
    """
    built = _build(model)
    shapes = {name: tuple(p.shape) for name, p in built.named_parameters()}
    for name, shape in shapes.items():
        stored = model.tensors.get(name)
        if stored is None or stored.shape != shape:
            found = "lack it" if stored is None else f"hold {list(stored.shape)}"
            raise UnknownOrderError(
                f"transformers builds parameter {quoted(name)} {list(shape)} from {model.root}/config.json, "
                f"but the files {found}: use the transformers version that the model was trained with"
            )
    return Order(shapes, decay_rules(built))


def _build(model: Checkpoint) -> Any:
    """The model on the meta device, by the class that config.json names; the folder's own code never runs."""
    if model.config is None:
        raise UnknownOrderError(f"give --model a folder with config.json; {model.root} has none")
    try:
        import torch
        import transformers
    except ImportError:
        raise UnknownOrderError("install transformers (pip install transformers)") from None
    architectures = model.config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    known = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)):
        raise UnknownOrderError(
            f"transformers has no model class {quoted(name)}, which {model.root}/config.json names"
        )
    try:
        config = known.config_class.from_pretrained(model.root, local_files_only=True)
        with torch.device("meta"):
            return known(config)
    except Exception as error:
        # A config that does not fit its class fails anywhere inside transformers, with any exception.
        reason = " ".join(str(error).split())[:200]
        raise UnknownOrderError(f"transformers cannot build {name} from {model.root}: {reason}") from error
