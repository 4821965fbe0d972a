"""Which density to take: thresholds, kept counts and their split for a whole grid, from one read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

from ... import backends
from ...errors import RecipeError
from ...planning.inputs import Inputs
from ...planning.plan import memory_limit_of, worker_threads
from ...processors import default_threads
from ...recipe.schema import Recipe
from ...tensors.terms import saliency_of_score
from ..job import Options, Progress, Silent, as_recipe
from ..pool import Pool
from .search import READING, Reading, Search, Target

DEFAULT_GRID = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
DEFAULT_MASSES = (0.5, 0.8, 0.9, 0.95, 0.99)


def densities(
    recipe: Recipe | str | os.PathLike | dict,
    grid: Iterable[float | str] = DEFAULT_GRID,
    masses: Iterable[float | str] = DEFAULT_MASSES,
    *,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    memory_limit: int | str | None = None,
    progress: Progress | None = None,
    reading: Reading = READING,
) -> dict:
    """What each density of `grid` keeps of every expert of an `ota` recipe, with one threshold per expert
    over the whole model; the recipe's own densities and thresholds play no part. Exact: ties are kept.

    recipe: a YAML file, a mapping of the same form, or a Recipe; grid, masses: numbers in (0, 1]; backend,
    device, threads, memory_limit: as in `job.Options`; reading: see search.py. Returns a dict that JSON can
    hold:

    elements: how many take part; always_kept: elements of tensors without curvature beside others that have
    it (`missing_curvature: uniform`), which every density keeps and no count below includes; roles, layers:
    elements by what a tensor is ("q", "norms", ...) and by layer ("0", "1", ..., "none"); passes: reads of
    the inputs after the sample; experts: per expert `model`, and
      densities: by grid value, ascending: density, threshold (a saliency, for `precond_threshold`; None
      where nothing is kept, 0 where everything is), kept (elements), roles and layers (kept elements of
      each);
      masses: by share of the expert's total saliency: mass, threshold, kept, density (kept / elements).

    Raises RecipeError (not an `ota` recipe, a bad grid, too little memory), InputError or BackendError.
    """
    recipe = as_recipe(recipe)
    if recipe.merge_method != "ota":
        raise RecipeError(
            f"merge_method: {recipe.merge_method} selects no edits, so that no density is to be chosen: "
            "give an `ota` recipe"
        )
    grid, masses = _shares("grid", grid), _shares("masses", masses)
    options = Options.of(backend=backend, device=device, threads=threads, memory_limit=memory_limit)
    with Inputs(recipe, allow_differences=True) as inputs:
        chosen = backends.for_files(
            options.backend,
            options.device,
            nbytes=inputs.total_bytes,
            threads=options.threads or default_threads(),
        )
        limit = memory_limit_of(options.memory_limit, chosen)
        try:
            with Pool(worker_threads(options.threads, chosen)) as pool:
                search = Search(inputs, grid, masses, chosen, limit, pool, progress or Silent(), reading)
                search.run()
                return _table(search, inputs)
        finally:
            chosen.release()


def _shares(name: str, values: Iterable[float | str]) -> list[float]:
    """Distinct numbers in (0, 1], ascending."""
    found: list[float] = []
    for value in values:
        try:
            share = float(value)
        except (TypeError, ValueError):
            share = math.nan
        if not 0 < share <= 1:
            raise RecipeError(f"{name}: {value!r} is not a number in (0, 1]; write it like 0.01,0.1,0.5")
        if share in found:
            raise RecipeError(f"{name}: {value} is given twice")
        found.append(share)
    if not found:
        raise RecipeError(f"{name}: no values; write it like 0.01,0.1,0.5")
    return sorted(found)


def _table(search: Search, inputs: Inputs) -> dict:
    """What `densities` returns."""
    groups = search.groups
    return {
        "method": inputs.recipe.merge_method,
        "backend": search.backend.NAME,
        "passes": search.passes,
        "elements": search.elements,
        "always_kept": search.always_kept,
        "grid": search.grid,
        "masses": search.masses,
        "roles": groups.by_role(groups.sizes),
        "layers": groups.by_layer(groups.sizes),
        "experts": [_of_expert(search, t, m.model) for t, m in enumerate(inputs.recipe.models)],
    }


def _of_expert(search: Search, t: int, model: str) -> dict:
    mine = [target for target in search.targets if target.expert == t]
    by_density, by_mass = mine[: len(search.grid)], mine[len(search.grid) :]
    return {
        "model": model,
        "densities": [
            {
                "density": target.selection.value,
                **_outcome(target),
                "roles": search.groups.by_role(target.kept),
                "layers": search.groups.by_layer(target.kept),
            }
            for target in by_density
        ],
        "masses": [
            {
                "mass": target.selection.value,
                **_outcome(target),
                "density": int(target.kept.sum()) / max(search.elements, 1),
            }
            for target in by_mass
        ],
    }


def _outcome(target: Target) -> dict:
    nothing = math.isnan(target.threshold)
    return {
        "threshold": None if nothing else saliency_of_score(target.threshold),
        "kept": int(target.kept.sum()),
    }
