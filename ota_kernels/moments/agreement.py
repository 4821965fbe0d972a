"""How much of a mask survives compression: the same expert, grafted by two files of its second moments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike

import numpy as np

from .. import backends
from ..io.pages import release
from ..planning.inputs import Inputs
from ..processors import default_threads
from ..recipe.schema import parse_recipe
from ..run.found import scores_of
from ..run.grid.densities import densities as thresholds_of
from ..run.pool import Pool
from ..select import thresholds as decide
from ..tensors.curvature import Uniform
from ..tensors.segment import units
from ..tensors.terms import score_of_saliency
from ..tensors.tile import TensorInputs

DENSITIES = (0.1, 0.3, 0.6)
_TILE_ELEMENTS = 1 << 18


def mask_agreement(
    base: str | PathLike,
    expert: str | PathLike,
    source: str | PathLike,
    compressed: str | PathLike,
    densities: Sequence[float] = DENSITIES,
) -> dict[float, float]:
    """By density, the Jaccard index (kept by both / kept by either) of FFG's masks of `expert` by the second
    moments in `source` and in `compressed`; 1 where both keep nothing.

    Thresholds are exact and over the whole model; tensors without curvature take no part. Reads everything
    twice. Raises InputError for files that do not fit.
    """
    recipe = _recipe(base, expert, [source, compressed])
    found = thresholds_of(recipe, densities)
    grid = found["grid"]
    thresholds = [[_score(row["threshold"]) for row in e["densities"]] for e in found["experts"]]
    both, either = np.zeros(len(grid), np.int64), np.zeros(len(grid), np.int64)
    backend = backends.select()

    def of_unit(tiles: list[TensorInputs]) -> np.ndarray:
        counts = np.zeros((2, len(grid)), np.int64)
        for tile in tiles:
            scores = [backend.scores(tile, t, scores_of(2, tile))[0] for t in range(2)]
            release(tile)
            for i, pair in enumerate(zip(*thresholds, strict=True)):
                one, other = (s >= x for s, x in zip(scores, pair, strict=True))
                counts[:, i] += np.count_nonzero(one & other), np.count_nonzero(one | other)
        return counts

    with Inputs(parse_recipe(recipe)) as inputs, Pool(default_threads()) as pool:
        for counts in pool.run(of_unit, _tiles(inputs)):
            both += counts[0]
            either += counts[1]
    return {x: int(a) / int(b) if b else 1.0 for x, a, b in zip(grid, both, either, strict=True)}


def check_models(base: str | PathLike, expert: str | PathLike, source: str | PathLike) -> None:
    """Raise InputError where `mask_agreement` could not compare masks by `source`. Reads headers only."""
    with Inputs(parse_recipe(_recipe(base, expert, [source]))):
        pass


def _recipe(base: str | PathLike, expert: str | PathLike, paths: Sequence[str | PathLike]) -> dict:
    return {
        "merge_method": "ota",
        "base_model": str(base),
        "models": [{"model": str(expert), "parameters": {"preconditioner_path": str(p)}} for p in paths],
        "parameters": {"missing_curvature": "base"},
    }


def _score(threshold: float | None) -> np.float32:
    return np.float32(decide.KEEP_NOTHING if threshold is None else score_of_saliency(threshold))


def _tiles(inputs: Inputs) -> Iterator[list[TensorInputs]]:
    """Units of work over the tensors that model-wide thresholds are over."""
    tensors = [entry.inputs() for entry in inputs.entries if entry.is_computed]
    whole = all(isinstance(c, Uniform) for t in tensors for c in t.curvatures)
    taking_part = [whole or not any(isinstance(c, Uniform) for c in t.curvatures) for t in tensors]
    ranges = ((i, 0, t.numel) for i, t in enumerate(tensors) if taking_part[i])
    for unit in units(ranges, _TILE_ELEMENTS):
        yield [tensors[i].slice(start, stop) for i, start, stop in unit]
