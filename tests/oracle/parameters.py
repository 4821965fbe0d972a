"""A method as a row: its function, its parameters with their defaults, and which models it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .tensors import Merged, Tensor

REQUIRED = object()


@dataclass(frozen=True)
class Settings:
    """Parameters as they hold for one tensor. shared: of the merge; own: one mapping per expert that has the
    tensor, with `position`, the expert's place in the recipe (from 0, the base not counted)."""

    shared: dict[str, Any]
    own: tuple[dict[str, Any], ...]

    def __getitem__(self, key: str) -> Any:
        return self.shared[key]

    def each(self, key: str) -> list:
        """One value per expert."""
        return [o[key] for o in self.own]


Model = dict[str, Tensor]
Evaluation = Callable[[Model, dict[str, Settings]], dict[str, Merged]]


@dataclass(frozen=True)
class Method:
    """One merge method.

    base: required, optional, or ignored (a base that is an input stands among the experts); least, most: how
    many experts; edits: adds edits to a base, so that `lambda`, `layers`, `match_norm` and origins have a
    meaning; absent: what becomes of a tensor that some models lack (`absent.py`); check: raises ValueError
    for values out of range.
    """

    evaluate: Evaluation
    shared: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    base: str = "required"
    least: int = 0
    most: int | None = None
    edits: bool = True
    absent: str = "merge"
    check: Callable[[Settings], None] = lambda settings: None


def one_by_one(evaluate: Callable[[Tensor, Settings], Merged]) -> Evaluation:
    """A method that sees one tensor at a time."""

    def evaluate_all(model: Model, settings: dict[str, Settings]) -> dict[str, Merged]:
        found = {}
        for name, tensor in model.items():
            try:
                found[name] = evaluate(tensor, settings[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return found

    return evaluate_all


def resolve(name: str, method: Method, parameters: dict[str, Any], n_experts: int) -> Settings:
    """The parameters of a method, defaults filled in. A key of one model is one value, or a list of T values.
    ValueError: unknown, missing, or out of range."""
    shared = ({"lambda": 1.0} if method.edits else {}) | method.shared
    unknown = parameters.keys() - shared.keys() - method.own.keys()
    if unknown:
        raise ValueError(f"{name} does not know {', '.join(sorted(unknown))}")
    values = shared | method.own | parameters
    missing = [key for key, value in values.items() if value is REQUIRED]
    if missing and (n_experts or missing[0] in shared):
        raise ValueError(f"{name} needs {missing[0]}")
    for key in method.own:
        if isinstance(values[key], list | tuple) and len(values[key]) != n_experts:
            raise ValueError(f"{key} has {len(values[key])} values for {n_experts} experts")
    own = tuple(
        {key: _of_expert(values[key], t) for key in method.own} | {"position": t} for t in range(n_experts)
    )
    settings = Settings({key: values[key] for key in shared}, own)
    method.check(settings)
    return settings


def places(settings: dict[str, Settings]) -> dict[int, list[tuple[str, int]]]:
    """(tensor, index among its experts) of each expert, tensors in the model's order; by position."""
    found: dict[int, list[tuple[str, int]]] = {}
    for name, of_tensor in settings.items():
        for t, own in enumerate(of_tensor.own):
            found.setdefault(own["position"], []).append((name, t))
    return found


def same_everywhere(settings: dict[str, Settings], where: list[tuple[str, int]], key: str) -> Any:
    """A parameter of one expert that decides over the whole model; ValueError if it differs by tensor."""
    values = [settings[name].own[t][key] for name, t in where]
    if any(value != values[0] for value in values):
        raise ValueError(f"{key} counts over the whole model: it cannot differ between tensors")
    return values[0]


def _of_expert(value: Any, t: int) -> Any:
    return value[t] if isinstance(value, list | tuple) else value
