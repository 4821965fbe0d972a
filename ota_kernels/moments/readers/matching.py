"""Which parameter is which in an optimizer state that is keyed by number: proved from shapes, never guessed.

An optimizer numbers its parameters group by group, and each group is filled in the model's order, whether it
is one of all parameters, two with and without weight decay, or more by layer. So the model's parameters, in
order, are an interleaving of the groups, with frozen ones left out where they are in no group. The shapes
decide which one: a mapping is taken only if no other one fits, or where the writer's own rule leaves one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ...errors import InputError
from ...io.header import quoted

Shape = tuple[int, ...]
Groups = Sequence[Sequence[Shape | None]]

# Positions within the groups that may be open at one parameter. One or two are usual; more than this many
# are of no use, because so many beginnings never leave a single mapping.
_MOST_OPEN = 10_000
_SKIPPED = -1


def match_in_order(
    groups: Groups,
    parameters: Mapping[str, Shape],
    where: str,
    rules: Sequence[Collection[str]] = (),
    trained: Collection[str] = (),
) -> list[list[str]]:
    """Names of each group's parameters, if exactly one interleaving of the groups fits the model.

    groups: shapes in the order of each group, None where unknown (a parameter that was never stepped);
    parameters: shapes by name in the model's order; where: what errors call the optimizer; rules: names of
    the first of two groups, by each rule that the writer may have followed: where several interleavings fit,
    all rules that fit must agree on one; trained: names that cannot be left out. Raises InputError where no
    mapping fits, AmbiguousError where more than one does.
    """
    spare = len(parameters) - sum(map(len, groups))
    if spare < 0:
        raise InputError(
            f"{where}: its optimizer has {len(parameters) - spare} parameters, the model {len(parameters)}: "
            "give --model the folder of the model that was trained"
        )
    fit = _fit(groups, parameters, trained)
    if fit.ways == 1:
        return fit.names
    if fit.ways == 0:
        raise InputError(
            f"{where}: the shapes of its optimizer state do not fit the model from parameter "
            f"{quoted(fit.stuck)} {list(parameters[fit.stuck])} on: "
            "give --model the folder of the model that was trained"
        )
    by_rule = [_fit_by_rule(groups, parameters, rule, trained) for rule in rules] if len(groups) == 2 else []
    fitting = [fit for fit in by_rule if fit.ways > 0]
    if not fitting or any(fit.ways > 1 or fit.names != fitting[0].names for fit in fitting):
        raise _ambiguous(where)
    return fitting[0].names


def match_group_by_group(groups: Groups, parameters: Mapping[str, Shape]) -> list[list[str]] | None:
    """Names where the groups follow one another in the model's order, or in its reverse: one group for each
    tensor or layer, as layer-wise rates make them. None where neither fits the shapes, or both do.

    An assumption, which shapes can refute but not prove.
    """
    sizes = list(map(len, groups))
    if sum(sizes) != len(parameters):
        return None
    names = list(parameters)
    fitting = []
    for backwards in (False, True):
        order = range(len(groups) - 1, -1, -1) if backwards else range(len(groups))
        named: list[list[str]] = [[] for _ in groups]
        at = 0
        for number in order:
            named[number] = names[at : at + sizes[number]]
            at += sizes[number]
        if named not in fitting and all(
            shape in (None, parameters[name])
            for group, taken in zip(groups, named, strict=True)
            for shape, name in zip(group, taken, strict=True)
        ):
            fitting.append(named)
    return fitting[0] if len(fitting) == 1 else None


def match_by_shape(
    groups: Groups, parameters: Mapping[str, Shape], where: str, missing: str
) -> list[list[str | None]]:
    """Names of each group's parameters where every shape occurs once; None where a shape is unknown.

    The way without the model's order. missing: what keeps that order from being known, with what to do about
    it; other arguments and errors as in `match_in_order`.
    """
    names: dict[Shape, list[str]] = {}
    for name, shape in parameters.items():
        names.setdefault(shape, []).append(name)
    taken = Counter(shape for group in groups for shape in group if shape is not None)
    for shape, count in taken.items():
        fitting = names.get(shape, [])
        if not fitting:
            raise InputError(
                f"{where}: its optimizer state has a parameter of shape {list(shape)}, the model has none: "
                "give --model the folder of the model that was trained"
            )
        if count > 1 or len(fitting) > 1:
            raise _ambiguous(where, f"; or, as the order of the model's parameters is unknown: {missing}")
    return [[None if shape is None else names[shape][0] for shape in group] for group in groups]


class AmbiguousError(InputError):
    """More than one mapping fits."""


@dataclass(frozen=True)
class _Fit:
    """ways: how many mappings there are, 2 for more; names: of each group, for a single way; stuck: the first
    parameter that fits nowhere, for none."""

    ways: int
    names: list[list[str]]
    stuck: str = ""


def _fit_by_rule(
    groups: Groups, parameters: Mapping[str, Shape], first: Collection[str], trained: Collection[str]
) -> _Fit:
    """Each group by itself, with the parameters that the rule gives it."""
    fits = [
        _fit(
            [group], {name: shape for name, shape in parameters.items() if (name in first) == chosen}, trained
        )
        for group, chosen in zip(groups, (True, False), strict=True)
    ]
    return _Fit(math.prod(fit.ways for fit in fits), [names for fit in fits for names in fit.names])


def _fit(groups: Groups, parameters: Mapping[str, Shape], trained: Collection[str]) -> _Fit:
    spare = len(parameters) - sum(map(len, groups))
    # Per parameter: positions (taken of each group) -> how many ways lead there (2 means several), and the
    # group that took the parameter on one of them.
    layers: list[dict[tuple[int, ...], tuple[int, int]]] = [{(0,) * len(groups): (1, _SKIPPED)}]
    for i, (name, shape) in enumerate(parameters.items()):
        found: dict[tuple[int, ...], tuple[int, int]] = {}
        for positions, (ways, _) in layers[-1].items():
            for group in _takers(
                groups, positions, shape, name not in trained and i - sum(positions) < spare
            ):
                after = _advanced(positions, group)
                found[after] = (min(2, ways + found.get(after, (0, 0))[0]), group)
        if not found:
            return _Fit(0, [], name)
        if len(found) > _MOST_OPEN:
            return _Fit(2, [])
        layers.append(found)
    end = tuple(map(len, groups))
    ways = layers[-1].get(end, (0, _SKIPPED))[0]
    return _Fit(ways, _trace(layers, list(parameters), end) if ways == 1 else [])


def _takers(groups: Groups, positions: tuple[int, ...], shape: Shape, may_skip: bool) -> list[int]:
    """The groups whose next parameter can be one of `shape`, and _SKIPPED where none need take it."""
    takers = [
        number
        for number, (group, position) in enumerate(zip(groups, positions, strict=True))
        if position < len(group) and group[position] in (None, shape)
    ]
    return [*takers, _SKIPPED] if may_skip else takers


def _advanced(positions: tuple[int, ...], group: int) -> tuple[int, ...]:
    if group == _SKIPPED:
        return positions
    return (*positions[:group], positions[group] + 1, *positions[group + 1 :])


def _trace(
    layers: list[dict[tuple[int, ...], tuple[int, int]]], names: list[str], positions: tuple[int, ...]
) -> list[list[str]]:
    """Follow the only way back from the end."""
    result: list[list[str]] = [[] for _ in positions]
    for layer, name in zip(reversed(layers[1:]), reversed(names), strict=True):
        group = layer[positions][1]
        if group != _SKIPPED:
            result[group].append(name)
            positions = (*positions[:group], positions[group] - 1, *positions[group + 1 :])
    return [taken[::-1] for taken in result]


def _ambiguous(where: str, otherwise: str = "") -> AmbiguousError:
    return AmbiguousError(
        f"{where}: its optimizer state is keyed by number, and more than one mapping to the model's "
        "parameters fits the shapes: add --base with the model that was trained from (what equals it was "
        "frozen), or --names with a file of the names in the model's order, a blank line between groups"
        f"{otherwise}"
    )
