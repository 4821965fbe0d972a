"""The names of an optimizer's parameters: those it says, else what proves or orders its numbers.

    names in the state or its groups
    --names FILE                                       the model's order, or each group's
    weights in the same torch file, or beside it       a state dict keeps the model's order
    the model that transformers builds                 its own order
    shapes that occur once                             no order

An order is tried only if it fits every shape; `matching.py` takes a mapping only if it is the only one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...errors import InputError
from ...io.header import quoted
from .frozen import changed_names
from .matching import AmbiguousError, Shape, match_by_shape, match_group_by_group, match_in_order
from .order import UnknownOrderError, parameter_order
from .request import Request


@dataclass(frozen=True)
class Entry:
    """One parameter of a group. key: in the state; name: where the group says it; shape: None where it has no
    second moments."""

    key: int | str
    name: str | None
    shape: Shape | None


NAMED = "names are those of --names"
Named = list[list[str | None]]


def find_names(
    groups: Sequence[Sequence[Entry]],
    weights: Mapping[str, Shape],
    request: Request,
    where: str,
    *,
    by_trainer: bool = False,
) -> tuple[Named, list[str]]:
    """The name of each group's parameters, None where nobody can tell and none is needed; what was assumed.

    weights: shapes of the weights that the checkpoint holds, in the model's order. Raises InputError where
    it is not certain which parameter a state belongs to.
    """
    if request.names:
        return _by_given_names(groups, request, where)
    if all(entry.name is not None for group in groups for entry in group):
        return [[entry.name for entry in group] for group in groups], []
    if all(isinstance(entry.key, str) for group in groups for entry in group):
        return [[str(entry.key) for entry in group] for group in groups], []
    shapes = [[entry.shape for entry in group] for group in groups]
    failed: InputError | None = None
    if weights and not _is_sorted(weights):
        try:
            named, assumed = _in_order(shapes, weights, (), request, where)
            return named, ["numbers were named in the order of the checkpoint's own weights", *assumed]
        except InputError as error:
            if request.model is None:
                raise
            failed = error
    if request.model is None:
        raise InputError(
            f"{where}: its optimizer state is keyed by number, not by name: "
            "add --model with the folder of the model that was trained"
        )
    try:
        order = parameter_order(request.model, request.base)
    except UnknownOrderError as missing:
        stored = {name: info.shape for name, info in request.model.tensors.items() if info.dtype.is_float}
        changed = changed_names(stored, request)
        if changed is not None:
            stored = {name: shape for name, shape in stored.items() if name in changed}
        try:
            return match_by_shape(shapes, stored, where, str(missing)), []
        except InputError as error:
            raise failed or error from None
    named, assumed = _in_order(shapes, order.shapes, order.decaying if by_trainer else (), request, where)
    return named, [f"numbers were named in {order.source}", *assumed]


def _is_sorted(weights: Mapping[str, Shape]) -> bool:
    """Whether names are in the order of the alphabet, as converters leave them, where a model's would not be:
    of a module's parts, some name is no number."""
    names = list(weights)
    words = {part for name in names for part in name.split(".") if not part.isdigit()}
    return len(words) > 1 and names == sorted(names)


def _in_order(
    shapes: list[list[Shape | None]],
    parameters: Mapping[str, Shape],
    rules: Sequence[frozenset[str]],
    request: Request,
    where: str,
) -> tuple[Named, list[str]]:
    """Names in the order of `parameters`, and what was assumed."""
    changed = changed_names(parameters, request)
    notes = []
    if changed is not None:
        notes = ["parameters that equal the base's were taken to be frozen"]
        if len(changed) == sum(map(len, shapes)):
            parameters = {name: shape for name, shape in parameters.items() if name in changed}
    try:
        return match_in_order(shapes, parameters, where, rules, changed or ()), notes
    except AmbiguousError:
        named = match_group_by_group(shapes, parameters) if len(shapes) > 2 else None
        if named is None:
            raise
        return named, [*notes, "the groups were taken to follow one another as the model's layers do"]


def _by_given_names(
    groups: Sequence[Sequence[Entry]], request: Request, where: str
) -> tuple[Named, list[str]]:
    """By --names: group by group where it has groups, else in the model's order."""
    shapes = [[entry.shape for entry in group] for group in groups]
    given = [name for group in request.names for name in group]
    total = sum(map(len, groups))
    if len(request.names) > 1 or len(groups) == 1:
        sizes = list(map(len, groups))
        found = list(map(len, request.names))
        if found != sizes:
            raise InputError(
                f"{where}: its groups have {quoted(sizes)} parameters, --names {quoted(found)}: write one "
                "name for each parameter, and a blank line between groups"
            )
        return [list(group) for group in request.names], [NAMED]
    known = _known_shapes(given, groups, request, where)
    if total != len(given):
        raise InputError(f"{where}: has {total} parameters, --names {len(given)}: leave out what was frozen")
    named = match_in_order(shapes, known, where)
    return named, [NAMED]


def _known_shapes(
    given: list[str], groups: Sequence[Sequence[Entry]], request: Request, where: str
) -> dict[str, Shape]:
    """Shapes of the names, by the model. Raises InputError for a name that it lacks."""
    if request.model is None:
        raise InputError(
            f"{where}: has {len(groups)} groups: separate those of --names by blank lines, or add --model"
        )
    lacking = next((name for name in given if name not in request.model.tensors), None)
    if lacking is not None:
        raise InputError(f"{where}: --names has {quoted(lacking)}, which {request.model.root} does not hold")
    return {name: request.model.tensors[name].shape for name in given}
