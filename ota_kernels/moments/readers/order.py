"""The order of a model's parameters, which optimizers number them in.

safetensors files and their indexes are sorted by name, so no file holds the order: only the model's code
does. transformers builds it from config.json on the meta device, without memory for weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ...io.header import quoted
from ...io.reader import Checkpoint
from ..arrangement import Arrangement
from .adapter import adapter_order, is_adapter
from .decay import decay_rules
from .matching import Shape
from .transformers_layout import UnknownOrderError, build, stored_layout

__all__ = ["Order", "UnknownOrderError", "parameter_order"]


@dataclass(frozen=True)
class Order:
    """shapes: of the parameters by name, in the order of `named_parameters`, tied ones once; source: what
    notes call it; decaying: the names with weight decay, by each rule that some version of the Hugging Face
    Trainer had."""

    shapes: dict[str, Shape]
    source: str
    decaying: list[frozenset[str]] = field(default_factory=list)


def parameter_order(model: Checkpoint, base: Checkpoint | None = None) -> Order:
    """The order of the model's parameters, as transformers builds it, or of an adapter's for `base`.

    Raises UnknownOrderError without transformers, without a config.json of a class that it knows, or where
    that class does not store the tensors that the files hold.
    """
    if is_adapter(model.tensors):
        return Order(adapter_order(model, base), "the order in which PEFT puts an adapter into its base")
    built = build(model)
    shapes = {name: tuple(p.shape) for name, p in built.named_parameters()}
    lacking = {n: s for n, s in shapes.items() if n not in model.tensors or model.tensors[n].shape != s}
    if lacking:
        _check_stored(lacking, stored_layout(built), model)
    return Order(shapes, "the order in which transformers builds the model", decay_rules(built))


def _check_stored(lacking: dict[str, Shape], layout: dict[str, Arrangement], model: Checkpoint) -> None:
    """Raise UnknownOrderError for a parameter that the files do not hold as transformers would save it."""
    stored = {source: name for name, one in layout.items() for source in one.sources if name != source}
    wrong = {
        source
        for name, one in layout.items()
        for source in one.sources
        if name not in model.tensors or model.tensors[name].shape != one.shape
    }
    for name, shape in lacking.items():
        if name in wrong or name not in stored:
            found = model.tensors.get(name)
            fault = "lack it" if found is None else f"hold {list(found.shape)}"
            raise UnknownOrderError(
                f"transformers builds parameter {quoted(name)} {list(shape)} from {model.root}/config.json, "
                f"but the files {fault}: {_advice(model)}"
            )


def _advice(model: Checkpoint) -> str:
    """What to do where the installed transformers does not build what the files hold."""
    import transformers

    written = (model.config or {}).get("transformers_version")
    if isinstance(written, str) and written != transformers.__version__:
        return f"config.json is of transformers {written[:20]}, {transformers.__version__} is installed"
    return "config.json is of another model than the files"
