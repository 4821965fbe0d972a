"""The names of the output's tensors: of whole models, of stacked layers, of parts that `modules` names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ..errors import RecipeError
from ..recipe.recipe import Module, Recipe, Slice
from ..recipe.reference import Reference
from . import layers
from .models import Model
from .modules import WHOLE, parts_of


class Named(NamedTuple):
    """An output tensor of which only names are known. names: of the tensor in each model of the slice, in the
    order of `Slice.sources`; position: of its layer in the slice, 0 to 1."""

    name: str
    part: Slice
    names: tuple[str, ...]
    position: float


class Naming:
    """The names of a recipe's output tensors, in the order in which they are written.

    has_layers: whether numbers in names are those of layers. named; unnamed: names of the models that no
    module of the recipe is; donors: by module, for each of its output layers where layers are restacked, its
    model and its number there.
    """

    def __init__(self, recipe: Recipe, models: Mapping[Reference, Model], *, has_layers: bool = True) -> None:
        self._models, self._has_layers = models, has_layers
        self._known: dict[int, list[Model]] = {}
        self._stacks: dict[tuple[int, str | None], layers.Stack] = {}
        self.donors: dict[str | None, list[tuple[Model, int]]] = {}
        everything = (n for part in recipe.slices for model in self._merged(part) for n in model.tensors)
        self._module_of = parts_of(recipe.modules, dict.fromkeys(everything))
        whole = recipe.modules[0].name in WHOLE
        self.unnamed = [] if whole else [n for n, module in self._module_of.items() if module is None]
        self.named = [named for module in recipe.modules for named in self._of_module(module)]

    def models_of(self, part: Slice) -> list[Model]:
        """The models of a slice, in the order of `Slice.sources`."""
        if id(part) not in self._known:
            self._known[id(part)] = [self._models[entry.reference] for entry in part.sources]
        return self._known[id(part)]

    def _merged(self, part: Slice) -> list[Model]:
        """Those that are merged, without the ones that edits are counted from."""
        return self.models_of(part)[: len(part.entries)]

    def _of_module(self, module: Module) -> Iterator[Named]:
        if module.slices[0].whole:
            yield from self._whole(module.slices[0], module.name)
        else:
            yield from self._restacked(module.slices, module.name)

    def _names(self, model: Model, module: str | None) -> list[str]:
        if module in WHOLE:
            return list(model.tensors)
        return [name for name in model.tensors if self._module_of.get(name) == module]

    def _whole(self, part: Slice, module: str | None) -> Iterator[Named]:
        models = self.models_of(part)
        names = dict.fromkeys(name for model in self._merged(part) for name in self._names(model, module))
        stacks = layers.stacks(names) if self._has_layers else {}
        for name in names:
            yield Named(name, part, (name,) * len(models), layers.position(name, stacks))

    def _restacked(self, slices: Sequence[Slice], module: str | None) -> Iterator[Named]:
        """What comes before the layers is the first slice's, what comes after them the last one's."""
        at = "slices" if module is None else f"modules.{module}.slices"
        stacks = [self._stacks_of(part, module, f"{at}[{i}]") for i, part in enumerate(slices)]
        donors = self.donors.setdefault(module, [])
        first, last = slices[0], slices[-1]
        for name in dict.fromkeys(name for stack in stacks[0][: len(first.entries)] for name in stack.before):
            yield Named(name, first, (name,) * len(stacks[0]), 0.0)
        for part, of_part in zip(slices, stacks, strict=True):
            starts = [entry.layers[0] for entry in part.sources]
            size = part.entries[0].layers[1] - starts[0]
            for j in range(size):
                prefixes = [f"{s.prefix}{start + j}." for s, start in zip(of_part, starts, strict=True)]
                here = zip(of_part, starts[: len(part.entries)], strict=False)
                for rest in dict.fromkeys(rest for s, start in here for rest in s.layers[start + j]):
                    names = tuple(prefix + rest for prefix in prefixes)
                    output = f"{stacks[0][0].prefix}{len(donors)}.{rest}"
                    yield Named(output, part, names, layers.relative(j, size))
                donors.append((self.models_of(part)[0], starts[0] + j))
        for name in dict.fromkeys(name for stack in stacks[-1][: len(last.entries)] for name in stack.after):
            yield Named(name, last, (name,) * len(stacks[-1]), 0.0)

    def _stacks_of(self, part: Slice, module: str | None, where: str) -> list[layers.Stack]:
        found = []
        for entry, model in zip(part.sources, self.models_of(part), strict=True):
            stack = self._stack(model, module)
            if entry.layers[1] > len(stack.layers):
                raise RecipeError(
                    f"`{where}`: {entry.model} has {len(stack.layers)} layers, so `layer_range: "
                    f"{list(entry.layers)}` ends "
                    "beyond them"
                )
            found.append(stack)
        return found

    def _stack(self, model: Model, module: str | None) -> layers.Stack:
        key = id(model), module
        if key not in self._stacks:
            self._stacks[key] = _found_stack(model.label, self._names(model, module))
        return self._stacks[key]


def _found_stack(label: str, names: Sequence[str]) -> layers.Stack:
    found = layers.stacks(names)
    if len(found) != 1:
        listed = ", ".join(f"{prefix}0 to {size - 1}" for prefix, size in found.items()) or "none"
        raise RecipeError(
            f"`slices` restack the layers of models with one stack of them; {label} has {listed}; `modules` "
            "tells parts apart"
        )
    ((prefix, size),) = found.items()
    return layers.Stack.of(names, prefix, size)
