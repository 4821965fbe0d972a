"""Which part of a model a tensor is of, told by its name, where a recipe merges parts apart (`modules`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..errors import RecipeError
from ..recipe.recipe import Module

# What recipes call a part, and the modules that checkpoints keep it in.
_VISION = ("vision_tower", "vision_model", "visual", "vision_encoder")
_MODULES: dict[str, tuple[str, ...]] = {
    "text_decoder": ("language_model", "text_model", "text_decoder"),
    "multi_modal_projector": ("multi_modal_projector", "mm_projector", "connector", "embed_vision"),
    "vision_tower": _VISION,
    "vision_model": _VISION,
    "audio_tower": ("audio_tower", "audio_encoder"),
    "encoder": ("encoder",),
    "decoder": ("decoder",),
    "shared": ("shared",),
}
_PART_OF = {word: part for part, words in _MODULES.items() for word in words} | dict.fromkeys(
    _VISION, "vision"
)
# Parts that what no module's name tells belongs to: the last layers and the output matrix.
_REST = ("decoder", "text_decoder")
WHOLE = (None, "default")  # the names of a module that is the whole model


def parts_of(modules: Sequence[Module], names: Iterable[str]) -> Mapping[str, str | None]:
    """Name of a tensor -> the module of the recipe that it is of; None: of none of them.

    The first word of a name that a part is called by tells the part: `vision_tower.vision_model.encoder.x` is
    of the vision tower. What none tells is of the decoder, or the text decoder. A module that no part is
    called by takes the tensors whose names hold its own. RecipeError for one that has no tensor.
    """
    names = list(names)
    if len(modules) == 1 and modules[0].name in WHOLE:
        return dict.fromkeys(names, modules[0].name)
    told = {name: _told(name) for name in names}
    rest = next((part for part in _REST if part in told.values()), _REST[-1])
    parts = {name: part or rest for name, part in told.items()}
    found: dict[str, str | None] = dict.fromkeys(names)
    for module in modules:
        own = [n for n in names if found[n] is None and _is_of(n, parts[n], module.name)]
        if not own:
            there = sorted({"vision_tower" if p == "vision" else p for p in parts.values()})
            raise RecipeError(
                f"`modules` names {module.name!r}, of which the models have no tensor: they have "
                f"{', '.join(there)}"
            )
        found |= dict.fromkeys(own, module.name)
    return found


def _told(name: str) -> str | None:
    return next((_PART_OF[word] for word in name.split(".") if word in _PART_OF), None)


def _is_of(name: str, part: str, module: str) -> bool:
    if module in _PART_OF:
        return part == _PART_OF[module]
    return f".{module}." in f".{name}."
