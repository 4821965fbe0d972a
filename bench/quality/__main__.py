"""Merges of six experts of a real encoder, scored on real texts.

    python -m bench.quality                 everything: hours; what was scored before is not scored again
    python -m bench.quality --tables        print what the cache holds
    python -m bench.quality --methods ota,ties --sets b --threads 2

Weights and texts come from packages (README.md beside this file) and stay in the cache: $OTA_QUALITY_CACHE,
or ~/.cache/ota_kernels/quality.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from ota_kernels.errors import OtaError, RecipeError

from . import sources, tables
from .merges import DENSITIES, FIRST, PACKS, SECOND, Lab, Method, all_methods, failed, tasks_of
from .scores import Scale
from .tables import Results, settings_of

_HELD_OUT = 200  # texts of a task and set


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=sources.default_cache())
    parser.add_argument("--methods", help="labels of the table, by commas  [default: all]")
    parser.add_argument("--tasks", help="of these alone, by commas  [default: all six]")
    parser.add_argument("--sets", default="a,b")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tables", action="store_true", help="score nothing: print what the cache holds")
    parser.add_argument("--figure", type=Path, help="SVG to write")
    given = parser.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    try:
        run(given)
    except OtaError as error:
        raise SystemExit(f"error: {error}") from error


def run(given: argparse.Namespace) -> None:
    import torch

    from . import experts
    from .encoder import Encoder, base_folder
    from .tasks import load

    torch.set_num_threads(given.threads)
    tasks = load(given.cache)
    if given.tasks:
        tasks = {name: tasks[name] for name in given.tasks.split(",")}
    if not given.tables:
        experts.train_all(given.cache, tasks)
    base = base_folder(given.cache)
    encoder = Encoder(base, tasks)
    methods = _chosen(given.methods)
    results = {}
    for group in experts.SETS:
        folders = experts.folders(given.cache, group, tasks)
        trained = next(iter(folders.values())).parent.parent.name
        place = given.cache / "scores" / f"{trained} {'-'.join(tasks)}" / group
        lab = Lab(place, base, folders, encoder, tasks_of(tasks, group, _HELD_OUT))
        lab.frozen = given.tables or group not in given.sets.split(",")
        if found := _begun(lab):
            results[group] = found
    for step in _steps(methods):
        for found in results.values():
            step(found)
    print(f"\n{tables.overview(results, methods)}")
    for group, found in results.items():
        others = [results[name] for name in results if name != group]
        print(f"\n{tables.merges(group, found, others, methods)}")
        if found.grafts:
            print(f"\n{tables.grafts(group, found)}")
        if found.packs or found.merged_packs:
            print(f"\n{tables.packs(group, found)}")
    if given.figure and results:
        tables.figure(given.figure, results, methods)


def _chosen(labels: str | None) -> list[Method]:
    methods = all_methods()
    wanted = [m.label for m in methods] if labels is None else labels.split(",")
    if unknown := set(wanted) - {m.label for m in methods}:
        raise RecipeError(f"no such rows: {', '.join(sorted(unknown))}")
    return [m for m in methods if m.label in wanted]


def _begun(lab: Lab) -> Results | None:
    """A set's base and experts; None where a frozen lab does not know them."""
    base = lab.model("base", lab.base)
    own = {task: lab.model(f"expert {task}", folder) for task, folder in lab.experts.items()}
    return None if base is None or None in own.values() else Results(lab, Scale(base, own), base, own)


def _steps(methods: list[Method]) -> Iterator[Callable[[Results], None]]:
    """What is scored of each set, the most telling first: a bench that is stopped has that of all sets."""
    others = [m for m in methods if m.label not in FIRST]
    for method in methods:
        if method.label in FIRST:
            yield partial(_merge, method, settings_of(method))
    for method in others:
        if method.label in SECOND:
            yield partial(_merge, method, settings_of(method)[:2])
    yield _grafts
    for method in others:
        if method.label not in SECOND:
            yield partial(_merge, method, settings_of(method)[:2])
    for method in others:
        yield partial(_merge, method, settings_of(method)[2:])
    yield _packs


def _merge(method: Method, settings: list[tuple[float | None, dict]], found: Results) -> None:
    for times, parameters in settings:
        began = time.monotonic()
        try:
            scored = found.lab.merge(method, **parameters)
        except subprocess.CalledProcessError as error:
            print(f"{method.label} {parameters}: {failed(error)}", flush=True)
            continue
        if scored is None:
            continue
        found.merges.setdefault(method.label, {})[times] = scored
        if not found.lab.frozen:
            mean, took = found.scale.mean(scored), time.monotonic() - began
            print(f"{found.lab.name} {method.label} {parameters}: {mean:.1f}, {took:.0f} s", flush=True)


def _grafts(found: Results) -> None:
    for density in DENSITIES:
        for by in ("ffg", "magnitude"):
            grafts = {task: found.lab.graft(task, density, by) for task in found.lab.experts}
            if None not in grafts.values():
                found.grafts[by, density] = grafts


def _packs(found: Results) -> None:
    for label in PACKS:
        packs = {task: found.lab.packed(task, label) for task in found.lab.experts}
        if None not in packs.values():
            found.packs[label] = packs
    for label in ("experts", *PACKS):
        together = found.lab.merged_packs(label)
        if together is not None:
            found.merged_packs[label] = together


if __name__ == "__main__":
    main()
