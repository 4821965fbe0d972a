"""A parameter of a method: its kind, default and help, and its value for one tensor.

A value in a recipe is one of

    plain        a number, switch, word or path
    Gradient     a list of those, over the layers of a slice
    Conditions   {value, filter}, or a list of them: the first whose filter fits a tensor's name

and `value_at` makes the plain value of one tensor of it.
"""

from __future__ import annotations

import difflib
import math
import numbers
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..tensors.dtypes import OUTPUT_NAMES

_FLOAT32_MAX = (2 - 2**-23) * 2.0**127

# YAML 1.1 reads 1e-26 (no dot) as a string.
_NUMBER_TEXT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

# A whole number that was interpolated is off by rounding only.
_WHOLE = 1e-9

_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100


class _Required:
    """The default of a parameter that a recipe must give."""

    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()


@dataclass(frozen=True)
class Kind:
    """A kind of plain value. allowed: what may stand there, in words; parse: raises ValueError for anything
    else; between: how a gradient goes from one value to the next: "linear", "whole" (linear, and every value
    must be an integer) or "steps"."""

    allowed: str
    parse: Callable[[Any], Any]
    between: str = "steps"


@dataclass(frozen=True)
class Parameter:
    """One recipe key of a method.

    default: None where it is not set, REQUIRED where a recipe must give it; level: "shared" by the experts,
    or each "expert" has its own; varies: whether tensors may differ in it; affects: what depends on it:
    "scores" and everything else, "masks" (which of the scores are kept, and what is found of those),
    "values" alone, nothing that is found of the inputs before they merge, or the "length" of the merged edit.
    """

    key: str
    kind: Kind
    default: Any
    help: str
    level: str = "shared"
    varies: bool = True
    affects: str = "scores"


@dataclass(frozen=True)
class Gradient:
    """Values over the layers of a slice, the first layer's first."""

    ends: tuple[Any, ...]


@dataclass(frozen=True)
class Condition:
    """A value for the tensors whose name contains `filter`; None: for all."""

    filter: str | None
    value: Any

    def holds(self, name: str) -> bool:
        return self.filter is None or self.filter in name


@dataclass(frozen=True)
class Conditions:
    """The first condition that holds counts; none may."""

    items: tuple[Condition, ...]

    @property
    def complete(self) -> bool:
        """Whether one always holds."""
        return bool(self.items) and self.items[-1].filter is None


Value = Any  # plain, Gradient or Conditions


def suggest(word: str, known: Iterable[str]) -> str:
    """The end of an "unknown word" message: the nearest known word, or all of them if none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"


def show(value: Any) -> str:
    """A value of a message: one line, cut short."""
    try:
        return " ".join(_REPR.repr(value).split())
    except ValueError:  # an integer of more digits than Python prints
        return "a very large number"


def is_constant(value: Value) -> bool:
    """Whether it is the same for all tensors."""
    return not isinstance(value, Gradient | Conditions)


def value_text(value: Any) -> str:
    """As a recipe writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


# Kinds


def _parse_number(value: Any) -> float:
    if isinstance(value, str) and _NUMBER_TEXT.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError
    number = float(value)
    if not abs(number) <= _FLOAT32_MAX:  # NaN compares false
        raise ValueError
    return number


def number(
    allowed: str,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> Kind:
    """A float in an interval, or text that says one."""

    def parse(value: Any) -> float:
        found = _parse_number(value)
        if not (above < found < below and at_least <= found <= at_most):
            raise ValueError
        return found

    return Kind(allowed, parse, "linear")


def whole(allowed: str, *, at_least: int) -> Kind:
    """An integer, or its digits."""

    def parse(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch("[0-9]+", value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < at_least:
            raise ValueError
        return int(value)

    return Kind(allowed, parse, "whole")


def choice(*options: str) -> Kind:
    """One of some words."""

    def parse(value: Any) -> str:
        if not isinstance(value, str) or value not in options:
            raise ValueError
        return value

    return Kind(f"{', '.join(options[:-1])} or {options[-1]}", parse)


def _parse_switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _parse_text(value: Any) -> str:
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value


def _parse_dtype(value: Any) -> str | None:
    name = str(value).removeprefix("torch.")  # a torch.dtype too
    name = _DTYPE_ALIASES.get(name, name)
    if name == "auto":
        return None
    if name not in OUTPUT_NAMES:
        raise ValueError
    return name


FINITE = number("a finite float32 number")
NOT_NEGATIVE = number("a number >= 0", at_least=0)
POSITIVE = number("a number > 0", above=0)
SHARE = number("a number in [0, 1]", at_least=0, at_most=1)
POSITIVE_INTEGER = whole("an integer >= 1", at_least=1)
SWITCH = Kind("true or false", _parse_switch)
TEXT = Kind("a path or name (text)", _parse_text)
AUTO = "auto"


def _parse_lambda(value: Any) -> float | str:
    return AUTO if value == AUTO else FINITE.parse(value)


def _parse_mean(value: Any) -> str:
    if value != "mean":
        raise ValueError
    return value


_LAMBDA = Kind(f"{FINITE.allowed}, or {AUTO}", _parse_lambda, "linear")


def scale(default: float = 1.0) -> tuple[Parameter, ...]:
    """The parameters of a method whose merged edit has a factor."""
    return (
        Parameter(
            "lambda",
            _LAMBDA,
            default,
            "the factor of the merged edit; auto: so much that what averaging took from it is undone",
            affects="length",
        ),
        Parameter(
            "times", FINITE, 1.0, "a further factor, of an automatic `lambda` or any", affects="length"
        ),
        Parameter(
            "match_norm",
            Kind("mean", _parse_mean),
            None,
            "mean: scale the merged edit to the mean length of the experts' edits",
            varies=False,
            affects="length",
        ),
    )


SCALE = scale()
# Of rows whose merged edit no sample of elements tells.
LAMBDA = Parameter("lambda", FINITE, 1.0, "the factor of the merged edit", affects="length")
DTYPE = Kind(f"{', '.join(OUTPUT_NAMES)} or auto", _parse_dtype)


# Values of a recipe


def parse_plain(value: Any, name: str, kind: Kind) -> Any:
    """A plain value of this kind; RecipeError says what is allowed. name: what the error calls it."""
    try:
        return kind.parse(value)
    except (ValueError, OverflowError):
        raise RecipeError(f"{name} is {show(value)}: it must be {kind.allowed}") from None


def parse_value(value: Any, name: str, kind: Kind) -> Value:
    """What a recipe gives for a parameter, in the simplest form that means the same. RecipeError for anything
    else."""
    if isinstance(value, Mapping):
        return _simplified([_parse_condition(value, name, kind)])
    if not isinstance(value, list | tuple):
        return parse_plain(value, name, kind)
    if not any(isinstance(item, Mapping) for item in value):
        return Conditions(()) if not value else _parse_gradient(value, name, kind)
    for i, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise RecipeError(
                f"{name}[{i}] is {show(item)}: a list holds either values (a gradient over the layers) or "
                "mappings "
                "of `value` and `filter`"
            )
    return _simplified([_parse_condition(item, f"{name}[{i}]", kind) for i, item in enumerate(value)])


def _parse_gradient(values: list | tuple, name: str, kind: Kind) -> Value:
    ends = tuple(parse_plain(item, f"{name}[{i}]", kind) for i, item in enumerate(values))
    words = [end for end in ends if isinstance(end, str)]
    if words and kind.between != "steps" and len(set(ends)) > 1:
        raise RecipeError(
            f"{name} goes from {show(ends[0])} to {show(ends[-1])}: there is nothing between them"
        )
    return ends[0] if all(end == ends[0] for end in ends) else Gradient(ends)


def _parse_condition(data: Mapping[Any, Any], name: str, kind: Kind) -> Condition:
    for key in data:
        if key not in ("value", "filter"):
            hint = suggest(key if isinstance(key, str) else "", ("value", "filter"))
            raise RecipeError(f"unknown key {show(key)} (value {show(data[key])}) in {name}; {hint}")
    if "value" not in data:
        raise RecipeError(f"`value` is missing in {name}: give the value of the tensors that `filter` names")
    pattern = data.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        raise RecipeError(
            f"`filter` in {name} is {show(pattern)}: it must be a part of tensors' names (text)"
        )
    inner = data["value"]
    if isinstance(inner, Mapping) or (isinstance(inner, list | tuple) and not inner):
        raise RecipeError(
            f"`value` in {name} is {show(inner)}: it must be {kind.allowed}, or a list of those"
        )
    if isinstance(inner, list | tuple):
        value = _parse_gradient(inner, f"`value` in {name}", kind)
    else:
        value = parse_plain(inner, f"`value` in {name}", kind)
    return Condition(None if pattern in (None, "*", "") else pattern, value)


def _simplified(conditions: list[Condition]) -> Value:
    """Conditions without those that can never be reached; one that always holds is its value."""
    kept: list[Condition] = []
    for condition in conditions:
        kept.append(condition)
        if condition.filter is None:
            break
    return kept[0].value if kept and kept[0].filter is None else Conditions(tuple(kept))


def followed_by(inner: Value, outer: Value) -> Value:
    """The value of a level, and for tensors that it says nothing about, that of the next level."""
    if not isinstance(inner, Conditions) or inner.complete:
        return inner
    rest = outer.items if isinstance(outer, Conditions) else (Condition(None, outer),)
    return _simplified([*inner.items, *rest])


def dump_value(value: Value) -> Any:
    """As a recipe writes it; `parse_value` makes an equal value of it."""
    if isinstance(value, Gradient):
        return list(value.ends)
    if not isinstance(value, Conditions):
        return value
    return [
        ({} if c.filter is None else {"filter": c.filter}) | {"value": dump_value(c.value)}
        for c in value.items
    ]


def filters_of(value: Value) -> Iterator[str]:
    """The filters of a value's conditions."""
    if isinstance(value, Conditions):
        yield from (c.filter for c in value.items if c.filter is not None)


def value_at(parameter: Parameter, value: Value, name: str, position: float) -> Any:
    """The plain value for one tensor; None where no condition holds. name: the tensor's, which filters are
    parts of; position: of its layer in the slice, 0 to 1. RecipeError where an integer's gradient is not
    whole there."""
    if isinstance(value, Conditions):
        value = next((c.value for c in value.items if c.holds(name)), None)
    if not isinstance(value, Gradient):
        return value
    last = len(value.ends) - 1
    place = position * last
    low = min(int(place), last)
    if parameter.kind.between == "steps":
        return value.ends[low]
    first, second = value.ends[low], value.ends[min(low + 1, last)]
    share = place - low
    found = (1 - share) * first + share * second
    found = min(max(found, min(first, second)), max(first, second))
    if parameter.kind.between == "linear":
        return found
    if abs(found - round(found)) > _WHOLE:
        raise RecipeError(
            f"the gradient {list(value.ends)} of `{parameter.key}` is {found:.6g} at {name}: it must be a "
            "whole number "
            "in every layer"
        )
    return round(found)
