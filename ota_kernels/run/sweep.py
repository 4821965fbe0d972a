"""Several merges of the same models that differ in some parameters, with one read of the inputs."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import OutputError, RecipeError
from ..io.workfolder import WorkFolder
from ..planning.inputs import Inputs
from ..planning.outputs import OutputTensor
from ..planning.plan import memory_limit_of
from ..recipe.documents import load_documents
from ..recipe.parameters import show, value_text
from ..recipe.recipe import Recipe
from ..recipe.schema import parse_recipe
from ..recipe.setting import with_values
from ..tensors.tile import TensorInputs
from .gang import Gang
from .job import Job, Options, Progress, Silent
from .pool import IN_PLACE
from .rules import RULES
from .surveys import Shared

MOST = 64  # merges at once
_TILE_ELEMENTS = 1 << 18  # small enough that a tile stays in the cache from one merge to the next


def sweep(
    recipe: Mapping[str, Any] | str | os.PathLike,
    out: str | os.PathLike,
    values: Mapping[str, Sequence[Any]],
    *,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, dict]:
    """Merge the models of a recipe once for every combination of values, reading the inputs once.

    recipe: a YAML file of one merge, or a mapping; out: the folder that holds a complete model folder for
    each combination, called "density=0.1,lambda=0.6" in the order of `values`; values: of recipe keys
    (`{"lambda": [0.6, 1.0], "density": [0.1, 0.3]}`), which replace what the recipe gives for these keys
    anywhere; options: those of `merge`. With `resume`, folders that are complete stay, and the rest goes on.

    Returns the report of each merge by its folder's name. Errors as for `merge`, and RecipeError for keys
    that the method does not have.
    """
    data, folder = (
        (recipe, None) if isinstance(recipe, Mapping) else (_document(Path(recipe)), Path(recipe).parent)
    )
    given = Options.of(**options)
    recipes = {
        name: parse_recipe(with_values(data, chosen), folder) for name, chosen in combinations(values).items()
    }
    if len(recipes) > MOST:
        raise RecipeError(f"{len(recipes)} merges at once: at most {MOST}; sweep over fewer values")
    return _run(recipes, Path(out).resolve(), given, progress or Silent())


def _document(path: Path) -> Mapping[str, Any]:
    documents = load_documents(path)
    if len(documents) > 1 or not isinstance(documents[0], Mapping):
        raise RecipeError(f"{path}: a sweep is over one merge, not {len(documents)} documents")
    return documents[0]


def combinations(values: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Every choice of one value per key, by the name of its folder."""
    for key, each in values.items():
        if isinstance(each, str) or not each:
            raise RecipeError(f"the values of `{key}` are {show(each)}: give a list of one or more")
    if not values:
        raise RecipeError("nothing to sweep over: give values of at least one key")
    found = {}
    for chosen in itertools.product(*values.values()):
        named = dict(zip(values, chosen, strict=True))
        name = ",".join(f"{key}={value_text(value)}" for key, value in named.items())
        if "/" in name or name in found:
            raise RecipeError(f"the values of the sweep give the folder {name!r} twice, or no folder's name")
        found[name] = named
    return found


class _Combination(Job):
    """One merge of the sweep: of inputs that are open, with what others find."""

    bundles_small = False  # what is found goes by the names of tensors

    def __init__(self, recipe: Recipe, options: Options, inputs: Inputs, gang: Gang, k: int) -> None:
        self._shared, self._gang, self.number = inputs, gang, k
        super().__init__(recipe, options, RULES)

    def _open(self, recipe: Recipe) -> Inputs:
        return self._shared.again(recipe)

    @functools.cached_property
    def follows(self) -> bool:
        """Whether it begins when another merge has decided its thresholds: it reads the inputs once more,
        from the page cache, and has nothing undecided."""
        brackets = self.decider(IN_PLACE).brackets
        return brackets and not self.surveys.is_first and self.read_ahead.is_idle

    def pool(self) -> Any:
        return self._gang.members[self.number]

    def release(self, tile: TensorInputs) -> None:
        self._gang.release(tile)


class _Sum:
    """A Progress of several merges that run at once: the mean of theirs."""

    def __init__(self, progress: Progress, merges: int) -> None:
        self._progress, self._merges, self._lock = progress, merges, threading.Lock()
        self._stages: set[str] = set()
        self._rest = 0

    def stage(self, name: str, total_bytes: int) -> None:
        with self._lock:
            if name not in self._stages:
                self._stages.add(name)
                self._progress.stage(name, total_bytes)

    def advance(self, nbytes: int) -> None:
        with self._lock:
            whole, self._rest = divmod(self._rest + nbytes, self._merges)
            self._progress.advance(whole)


def _run(recipes: Mapping[str, Recipe], out: Path, options: Options, progress: Progress) -> dict[str, dict]:
    k = len(recipes)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(Job(next(iter(recipes.values())), options))
        if first.backend.NAME == "triton":
            raise RecipeError("a sweep runs on the CPU: give --backend native")
        held = min(options.candidates_memory, memory_limit_of(options.memory_limit, first.backend) // 4) // k
        each = replace(
            options,
            candidates_memory=held,
            tile_elements=options.tile_elements or min(first.plan.tile_elements, _TILE_ELEMENTS),
        )
        gang = stack.enter_context(Gang(first.plan.threads, k))
        jobs = {
            name: _Combination(recipe, each, first.inputs, gang, i)
            for i, (name, recipe) in enumerate(recipes.items())
        }
        merges = [(job.inputs.method, list(_computed(job))) for job in jobs.values()]
        for job, surveys in zip(
            jobs.values(), Shared.among(merges, lambda: gang.pool.is_worker), strict=True
        ):
            job.surveys, job.read_ahead = surveys, first.read_ahead
        _check_room(jobs.values(), out, options)
        shared = _Sum(progress, k)
        return _together(jobs, out, shared, gang)


def _computed(job: Job) -> Iterable[OutputTensor]:
    return (entry for entry in job.inputs.entries if entry.is_computed)


def _check_room(jobs: Iterable[Job], out: Path, options: Options) -> None:
    """Whether the disk has room for all that are not there."""
    missing = [job.needed_bytes for job in jobs]
    if out.exists() and not out.is_dir():
        raise OutputError(f"the output {out} is a file; name a folder")
    if not options.resume and not options.overwrite:
        WorkFolder(out / "sweep", sum(missing), resume=True, overwrite=False).check()


def _together(jobs: Mapping[str, _Combination], out: Path, progress: Progress, gang: Gang) -> dict[str, dict]:
    for name, job in jobs.items():
        job.check_output(out / name)  # before anything is written
    out.mkdir(parents=True, exist_ok=True)

    for job in jobs.values():
        if job.follows:
            gang.leave(job.number)

    def one(name: str) -> dict:
        job = jobs[name]
        try:
            if job.follows:
                job.surveys.told.wait()
                gang.join(job.number)
            return job.run(out / name, progress)
        except BaseException:
            gang.stop()
            raise
        finally:
            gang.leave(job.number)
            job.surveys.keep({})

    with ThreadPoolExecutor(len(jobs), thread_name_prefix="sweep") as threads:
        running = {name: threads.submit(one, name) for name in jobs}
        try:
            for future in running.values():
                future.exception()
        except KeyboardInterrupt:
            gang.stop()
            raise
    failed = [future.exception() for future in running.values() if future.exception() is not None]
    if failed:
        # The others were only told to stop.
        raise next((error for error in failed if not isinstance(error, KeyboardInterrupt)), failed[0])
    return {name: future.result() for name, future in running.items()}
