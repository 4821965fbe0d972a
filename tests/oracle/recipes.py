"""A recipe's mapping and its models' tensors in, merged values out: the recipe language (METHODS section 9).

Written from the text, with no part of the package: levels (model, slice, module, global), conditions,
gradients, slices that restack layers, and who is an input. Vocabularies and adapters are not in it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from . import METHODS, Merged, Tensor, evaluate
from .parameters import REQUIRED

LAYER = re.compile(r"(?P<prefix>.*?\blayers\.)(?P<number>\d+)(?P<rest>\..*)")
BEFORE = re.compile(r"embed_tokens")

Weights = Mapping[str, np.ndarray]


class _Input(NamedTuple):
    """One model where it takes part: its label, first layer, and own parameters."""

    model: str
    first: int
    parameters: Mapping[str, Any]


class _Place(NamedTuple):
    """One output tensor: its name, that in a model (by the number that its layers are moved by), and t."""

    name: str
    position: float
    number: int | None
    moved: int


def merge_recipe(recipe: Mapping[str, Any], models: Mapping[str, Weights]) -> dict[str, Merged]:
    """models: float64 tensors by the label that the recipe gives. Raises ValueError as `evaluate` does."""
    method = METHODS[recipe["merge_method"]]
    module = next(iter(recipe["modules"].values())) if "modules" in recipe else {}
    levels = [module.get("parameters") or {}, recipe.get("parameters") or {}]
    body = module or recipe
    slices = body.get("slices") or [_whole(body["models"], recipe.get("base_model"))]
    model: dict[str, Tensor] = {}
    settings: dict[str, dict[str, Any]] = {}
    number = 0
    for i, part in enumerate(slices):
        base = part.get("base_model") or recipe.get("base_model")
        inputs = [_Input(s["model"], *_range(s)[:1], s.get("parameters") or {}) for s in part["sources"]]
        experts = inputs
        if method.base != "ignored" and base is not None:
            experts = [x for x in inputs if x.model != base]
        here = [part.get("parameters") or {}, *levels]
        for place in _places(part, inputs, models, number, i == 0, i == len(slices) - 1):
            names = {x.model: _name_in(place, x) for x in inputs}
            own = None
            if len(experts) < len(inputs):
                own = models[base][names[base]]
            tensors = tuple(models[x.model][names[x.model]] for x in experts)
            model[place.name] = Tensor(own, tensors, layer=place.number)
            settings[place.name] = _settings(method, place, experts, names, here)
        size = _range(part["sources"][0])
        number += 0 if size[1] is None else size[1] - size[0]
    found: dict[str, Merged] = {}
    for count in {len(tensor.experts) for tensor in model.values()}:  # slices may have unlike numbers
        own = {name: tensor for name, tensor in model.items() if len(tensor.experts) == count}
        found |= evaluate(own, recipe["merge_method"], {name: settings[name] for name in own})
    return found


def _whole(listed: list[Mapping[str, Any]], base: str | None) -> dict[str, Any]:
    """`models` as the one slice that they are; a base that is not listed is one more input."""
    sources = [dict(entry) for entry in listed]
    if base is not None and all(entry["model"] != base for entry in sources):
        sources.append({"model": base})
    return {"sources": sources}


def _range(source: Mapping[str, Any]) -> tuple[int, int | None]:
    return tuple(source.get("layer_range") or (0, None))


def _places(
    part: Mapping[str, Any],
    inputs: list[_Input],
    models: Mapping[str, Weights],
    number: int,
    first: bool,
    last: bool,
) -> list[_Place]:
    names = models[inputs[0].model]
    begin, end = _range(part["sources"][0])
    if end is None:
        end = 1 + max(int(m["number"]) for m in map(LAYER.fullmatch, names) if m)
    found = []
    for name in names:
        match = LAYER.fullmatch(name)
        if match is None:
            if first if BEFORE.search(name) else last:
                found.append(_Place(name, 0.0, None, 0))
            continue
        layer = int(match["number"]) - begin
        if 0 <= layer < end - begin:
            t = layer / (end - begin - 1) if end - begin > 1 else 1.0
            output = f"{match['prefix']}{number + layer}{match['rest']}"
            found.append(_Place(output, t, number + layer, layer))
    return found


def _name_in(place: _Place, model: _Input) -> str:
    match = LAYER.fullmatch(place.name)
    if match is None:
        return place.name
    return f"{match['prefix']}{model.first + place.moved}{match['rest']}"


def _settings(
    method, place: _Place, experts: list[_Input], names: Mapping[str, str], levels
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, default in (({"lambda": 1.0} if method.edits else {}) | method.shared).items():
        value = _look_up(key, levels, place.name, place.position)
        if value is not None or default is REQUIRED:
            found[key] = value
    for key, default in method.own.items():
        values = [_look_up(key, [x.parameters, *levels], names[x.model], place.position) for x in experts]
        found[key] = [default if v is None else v for v in values]
    return {key: value for key, value in found.items() if value is not None}


def _look_up(key: str, levels: list[Mapping[str, Any]], name: str, t: float) -> Any:
    """None where no level says anything about the tensor."""
    for level in levels:
        if key not in level:
            continue
        given = level[key]
        conditions = (
            given if isinstance(given, list) and (not given or isinstance(given[0], dict)) else [given]
        )
        for condition in conditions:
            if not isinstance(condition, dict):
                return _at(condition, t)
            if condition.get("filter") in (None, "*") or condition["filter"] in name:
                return _at(condition["value"], t)
    return None


def _at(value: Any, t: float) -> Any:
    if not isinstance(value, list):
        return float(value) if isinstance(value, str) else value
    x = t * (len(value) - 1)
    low = math.floor(x)
    if isinstance(value[0], bool):
        return value[low]
    high = min(low + 1, len(value) - 1)
    return value[low] + (x - low) * (value[high] - value[low])
