"""config.json of a model whose layers were restacked."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Sections that describe the language part of a multi-modal model.
_SECTIONS = ("text_config", "llm_config", "language_config")
_VISION = ((), ("vision_config", "vision_tower_config"), (*_COUNTS, "depth"))
# Of the parts that are no language part: keys of their own, or sections with keys of those.
_PARTS = {
    "encoder": (("encoder_layers", "num_layers", "num_hidden_layers"), (), ()),
    "decoder": (("decoder_layers", "num_decoder_layers"), (), ()),
    "vision_tower": _VISION,
    "vision_model": _VISION,
    "audio_tower": ((), ("audio_config",), (*_COUNTS, "encoder_layers")),
}
# Lists of the numbers of layers, not of one entry per layer.
_NUMBERS = ("_layers", "_layer_ids", "_layer_indices", "_layer_idxs", "_idxs", "_idx")


def restacked(
    config: Mapping[str, Any],
    origins: Sequence[tuple[Mapping[str, Any] | None, int]],
    module: str | None = None,
) -> dict[str, Any]:
    """A copy of `config` for a model of other layers. origins: of each output layer, the config of its model
    (None without) and its number there; module: the part whose layers they are, by the recipe's name. The
    number of layers, and lists with one entry per layer or with numbers of layers, are those of the output;
    other keys stay."""
    if module in _PARTS:
        return _of_part(config, origins, *_PARTS[module])
    section = next((key for key in _SECTIONS if _counts(config.get(key))), None)
    if _counts(config) or section is None:
        if not _counts(config):
            logger.warning(
                "config.json says nowhere how many layers there are; the output has %d", len(origins)
            )
        return _of_section(config, [(found or {}, number) for found, number in origins])
    inner = [((found or {}).get(section) or {}, number) for found, number in origins]
    return dict(config) | {section: _of_section(config[section], inner)}


def _of_part(
    config: Mapping[str, Any],
    origins: Sequence[tuple[Mapping[str, Any] | None, int]],
    own: Sequence[str],
    sections: Sequence[str],
    keys: Sequence[str],
) -> dict[str, Any]:
    """own: keys of the part's number of layers in `config` itself; keys: in one of its sections."""
    section = next((name for name in sections if _counts(config.get(name), keys)), None)
    counts = [key for key in own if key in config]
    if section is None and not counts:
        logger.warning("config.json says nowhere how many layers there are; the output has %d", len(origins))
    if section is None:
        return dict(config) | dict.fromkeys(counts, len(origins))
    inner = [((found or {}).get(section) or {}, number) for found, number in origins]
    return dict(config) | {section: _of_section(config[section], inner, keys)}


def _counts(config: Any, keys: Sequence[str] = _COUNTS) -> list[str]:
    return [key for key in keys if key in config] if isinstance(config, Mapping) else []


def _of_section(
    config: Mapping[str, Any],
    origins: Sequence[tuple[Mapping[str, Any], int]],
    keys: Sequence[str] = _COUNTS,
) -> dict[str, Any]:
    counts = _counts(config, keys)
    found = dict(config) | dict.fromkeys(counts, len(origins))
    layers = config[counts[0]] if counts else None
    for key, value in config.items():
        if not isinstance(value, list) or not value:
            continue
        if _are_numbers(key, value, layers):
            found[key] = [i for i, (own, number) in enumerate(origins) if number in own.get(key, value)]
        elif len(value) == layers:
            found[key] = [_entry(own.get(key), value, number) for own, number in origins]
    return found


def _are_numbers(key: str, values: list, layers: int | None) -> bool:
    """Whether a list holds numbers of layers: ascending, as many as there are or fewer."""
    return (
        key.endswith(_NUMBERS)
        and all(type(x) is int for x in values)
        and all(a < b for a, b in itertools.pairwise(values))
        and (layers is None or 0 <= values[0] <= values[-1] < layers)
        and (layers != 2 or values != [0, 1])  # more often a switch for each of two layers
    )


def _entry(own: Any, donors: list, number: int) -> Any:
    values = own if isinstance(own, list) and number < len(own) else donors
    return values[min(number, len(values) - 1)]
