"""The whole job from a recipe to a published folder: plan, work folder, merge, report, publish.

.OUT.ota-merge/        hidden sibling of OUT; what a killed merge leaves, and what --resume continues
    lock               held while a merge runs
    journal.jsonl      fingerprint, decisions, finished ranges
    files/             the output folder, renamed to OUT when everything is on the disk
    replaced/          the former OUT, for the moment between two renames (--overwrite)
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import yaml

from . import __version__, backends, methods
from .card import model_card
from .engine import Tally, merge_tensors
from .errors import InputError, OtaError, OutputError, RecipeError, RunError
from .inputs import COPY, KEEP_BASE, MERGE, Inputs
from .io import journal
from .io.assets import Asset, plan_assets, recipe_asset, write_assets
from .io.reader import advise
from .io.writer import ShardWriter
from .plan import DEFAULT_MEMORY_LIMIT, Plan, make_plan
from .pool import Pool, default_threads
from .recipe import Recipe, load_recipe, parse_recipe
from .survey import ModelDecisions, Survey
from .tensors import Full, TensorInputs
from .tiling import Segment
from .units import format_bytes, parse_size

logger = logging.getLogger(__name__)

_COPY_BYTES = 1 << 24
_SPARE_BYTES = 64 << 20  # room asked for beside the tensors: config, tokenizer, report, journal
REPORT_NAME = "merge_report.json"


class Progress(Protocol):
    """Told how far a merge is. Called from one thread at a time."""

    def stage(self, name: str, total_bytes: int) -> None: ...

    def advance(self, nbytes: int) -> None: ...


class Silent:
    """A Progress that shows nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stage(self, name: str, total_bytes: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass


@dataclass(frozen=True)
class Options:
    """How a merge runs; what it computes is the recipe's.

    memory_limit: bytes resident at most; shard_size: bytes of one output file at most; threads: None for
    every processor; seed: of methods that draw random numbers; tile_elements: None for what fits the limit.
    """

    backend: str = "auto"
    device: str = "auto"
    memory_limit: int = DEFAULT_MEMORY_LIMIT
    threads: int | None = None
    shard_size: int = 5_000_000_000
    seed: int = 0
    overwrite: bool = False
    resume: bool = False
    tile_elements: int | None = None

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu"):
            raise RecipeError(f"unknown device {self.device!r}: choose auto or cpu")
        if self.threads is not None and self.threads < 1:
            raise RecipeError(f"--threads must be at least 1, not {self.threads}")
        if self.overwrite and self.resume:
            raise RecipeError("--overwrite starts again and --resume goes on: give one of them")


def as_recipe(recipe: Recipe | str | os.PathLike | dict) -> Recipe:
    """A recipe from a file, a mapping, or as it is."""
    if isinstance(recipe, Recipe):
        return recipe
    return parse_recipe(recipe) if isinstance(recipe, dict) else load_recipe(recipe)


def plan(
    recipe: Recipe | str | os.PathLike | dict,
    *,
    out: str | os.PathLike | None = None,
    memory_limit: int | str = DEFAULT_MEMORY_LIMIT,
    shard_size: int | str = 5_000_000_000,
    **options,
) -> Plan:
    """What `merge` with the same arguments would do; writes nothing. Reads headers only.

    With `out`, checks too that `merge` could write there. Raises as `merge` does.
    """
    sizes = {"memory_limit": parse_size(memory_limit), "shard_size": parse_size(shard_size)}
    with _Merge(as_recipe(recipe), Options(**sizes, **options)) as job:
        job.assets()
        if out is not None:
            job.check_output(Path(os.path.abspath(out)))
        return job.plan


def merge(
    recipe: Recipe | str | os.PathLike | dict,
    out: str | os.PathLike,
    *,
    progress: Progress | None = None,
    memory_limit: int | str = DEFAULT_MEMORY_LIMIT,
    shard_size: int | str = 5_000_000_000,
    **options,
) -> dict:
    """Merge the models of a recipe into the folder `out`; returns what merge_report.json says.

    recipe: a YAML file, a mapping of the same form, or a Recipe. Sizes are bytes or text ("5GB", "512MiB");
    options: the fields of `Options`. Raises RecipeError, InputError, OutputError or BackendError before
    anything is written, InputError for values that are not finite, RunError (resumable) while running.
    """
    sizes = {"memory_limit": parse_size(memory_limit), "shard_size": parse_size(shard_size)}
    with _Merge(as_recipe(recipe), Options(**sizes, **options)) as job:
        return job.run(Path(out), progress or Silent())


class _Merge:
    """One merge: open inputs, its plan, and `run`."""

    def __init__(self, recipe: Recipe, options: Options) -> None:
        self.recipe, self.options = recipe, options
        self.backend = backends.select(options.backend)
        self.inputs = Inputs(recipe)
        self.merged = [i for i, e in enumerate(self.inputs.entries) if e.action != COPY]
        self.tensors = [self.inputs.tensor(self.inputs.entries[i]) for i in self.merged]
        self.survey = Survey(recipe, self.tensors, self.backend, _release)
        self.plan = make_plan(
            self.inputs,
            self.tensors,
            self.survey,
            self.backend,
            threads=options.threads or default_threads(),
            memory_limit=options.memory_limit,
            shard_size=options.shard_size,
            tile_elements=options.tile_elements,
        )

    def __enter__(self) -> _Merge:
        return self

    def __exit__(self, *_: object) -> None:
        self.inputs.close()

    def fingerprint(self) -> str:
        """Changes whenever the output's bytes might: recipe, inputs, layout, seed, version."""
        parts = [
            __version__,
            self.recipe.as_dict(),
            self.options.seed,
            self.inputs.fingerprint(),
            [asdict(shard) | {"header": shard.header.hex()} for shard in self.plan.layout.shards],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def assets(self) -> list[Asset]:
        return [
            *plan_assets(
                self.inputs.model_folders,
                tokenizer_source=self.recipe.tokenizer_source,
                dtype=self.recipe.output_dtype,
                untied=self.inputs.untied,
            ),
            recipe_asset(self.recipe.as_dict()),
        ]

    def run(self, out: Path, progress: Progress) -> dict:
        out = Path(os.path.abspath(out))
        finished = self.check_output(out)
        if finished is not None:
            return finished
        assets = self.assets()
        with _WorkFolder(out, self.options, self.plan.bytes_out + _SPARE_BYTES) as work:
            try:
                report = self._run_in(work, assets, progress)
            except InputError:
                work.remove()  # nothing to resume: the inputs themselves must change
                raise
            work.publish()
        return report

    def check_output(self, out: Path) -> dict | None:
        """Raise OutputError where `out` cannot be used. With --resume, the report of a merge that is complete."""
        target = out.resolve()
        for label, folder in self.inputs.model_folders.items():
            source = folder.resolve()
            if target == source or source in target.parents or target in source.parents:
                raise OutputError(f"the output {out} and the input {label} lie inside each other")
        if out.exists() and not out.is_dir():
            raise OutputError(f"the output {out} is a file; name a folder")
        if not out.exists() or not any(out.iterdir()) or self.options.overwrite:
            return None
        if not self.options.resume:
            raise OutputError(
                f"the output {out} is not empty: choose another folder, or --overwrite to replace it"
            )
        try:
            report = json.loads((out / REPORT_NAME).read_text())
        except (OSError, ValueError):
            report = {}
        if report.get("fingerprint") != self.fingerprint():
            raise OutputError(f"{out} holds something else than this merge: --overwrite replaces it")
        logger.info("%s is complete already", out)
        return report

    def _run_in(self, work: _WorkFolder, assets: list[Asset], progress: Progress) -> dict:
        started = time.perf_counter()
        state = _State(work.journal_records(self.fingerprint()), len(self.inputs.entries))
        writer = ShardWriter(work.files, self.plan.layout)
        log = journal.Journal(work.path, writer.sync)
        seconds = {}
        try:
            if state.fresh:
                log.append({"fingerprint": self.fingerprint()})
            with Pool(self.plan.threads) as pool:
                if state.decisions is None:
                    progress.stage("survey", 0)
                    state.decisions = self.survey.decide_model(pool.run)
                    log.append({"decisions": asdict(state.decisions)})
                seconds["survey"] = time.perf_counter() - started
                progress.stage("merge", self.inputs.total_bytes)
                progress.advance(state.done_bytes(self.inputs.entries, self._bytes_per_element))
                for unit in self._units(state, writer, pool):
                    log.append({"unit": [[*segment, asdict(tally)] for segment, tally in unit]})
                    for segment, tally in unit:
                        state.add(segment, tally)
                        progress.advance(
                            (segment.stop - segment.start) * self._bytes_per_element(segment.index)
                        )
            seconds["merge"] = time.perf_counter() - started - seconds["survey"]
            progress.stage("sync", 0)
        finally:
            try:
                log.close()
            finally:
                writer.close()
        seconds["sync"] = time.perf_counter() - started - seconds["survey"] - seconds["merge"]
        report = self._report(state, seconds)
        write_assets(work.files, [*assets, self._card(assets, report), _json_asset(REPORT_NAME, report)])
        writer.write_index(work.files)
        return report

    def _units(self, state: _State, writer: ShardWriter, pool: Pool) -> Iterator:
        yield from self._copy(state, writer)
        todo = (
            (k, start, stop)
            for k, index in enumerate(self.merged)
            for start, stop in state.gaps(index, self.inputs.entries[index].numel)
        )
        sink = _FileSink(writer, [self.plan.layout.tensors[i] for i in self.merged])
        for unit in merge_tensors(
            self.tensors,
            sink,
            backend=self.backend,
            pool=pool,
            tile_elements=self.plan.tile_elements,
            survey=self.survey,
            decisions=state.decisions,
            todo=todo,
        ):
            yield [(Segment(self.merged[k], start, stop), tally) for (k, start, stop), tally in unit]

    def _copy(self, state: _State, writer: ShardWriter) -> Iterator:
        """Tensors that are not floating point: equal in all models, or an error."""
        for index, entry in enumerate(self.inputs.entries):
            if entry.action != COPY or not state.gaps(index, entry.numel):
                continue
            first, *others = self.inputs.buffers(entry)
            for buffer in others:
                if not np.array_equal(first.data, buffer.data):
                    raise InputError(
                        f"{buffer.origin}: {entry.name} ({entry.dtype.name}) differs from {first.origin}; "
                        "only floating-point tensors are merged"
                    )
            size = entry.dtype.itemsize
            for begin in range(0, first.data.size, _COPY_BYTES):
                piece = first.data[begin : begin + _COPY_BYTES]
                writer.write(self.plan.layout.tensors[index], begin // size, piece)
            yield [(Segment(index, 0, entry.numel), Tally([]))]

    def _bytes_per_element(self, index: int) -> int:
        entry = self.inputs.entries[index]
        size = sum(b.dtype.itemsize for b in self.inputs.buffers(entry))
        if entry.action == MERGE:
            tensor = self.inputs.tensor(entry)
            size += sum(c.values.dtype.itemsize for c in tensor.curvatures if isinstance(c, Full))
        return size

    def _card(self, assets: list[Asset], report: dict) -> Asset:
        has_config = any(a.name == "config.json" for a in assets)
        formula = methods.get(self.recipe.merge_method).formula
        card = model_card(self.recipe.as_dict(), report, __version__, formula=formula, has_config=has_config)
        return Asset("README.md", card.encode())

    def _report(self, state: _State, seconds: dict) -> dict:
        counted = [(e, state.tallies[i]) for i, e in enumerate(self.inputs.entries) if e.action == MERGE]
        total = sum(e.numel for e, _ in counted)
        experts = []
        for t, model in enumerate(self.recipe.models):
            kept = sum(tally.kept[t] for _, tally in counted)
            thresholds = {tally.thresholds[t] for e, tally in counted if e.numel}
            experts.append(
                {
                    "model": model.model,
                    "threshold": thresholds.pop() if len(thresholds) == 1 else None,
                    "kept": kept,
                    "total": total,
                    "density": kept / total if total else 1.0,
                }
            )
        overflow = sum(tally.overflow for _, tally in counted)
        if overflow:
            logger.warning(
                "%d merged values exceed the range of the output type and became infinite", overflow
            )
        return {
            "fingerprint": self.fingerprint(),
            "method": self.recipe.merge_method,
            "experts": experts,
            "tensors": {
                e.name: {
                    "kept": tally.kept,
                    "unkept": tally.unkept,
                    "elements": e.numel,
                    "thresholds": tally.thresholds,
                }
                for e, tally in counted
            },
            "copied": [e.name for e in self.inputs.entries if e.action in (COPY, KEEP_BASE)],
            "unkept": sum(tally.unkept for _, tally in counted),
            "overflow": overflow,
            "repaired": sum(tally.repaired for _, tally in counted),
            "bytes_read": self.plan.bytes_in,
            "bytes_written": self.plan.bytes_out,
            "passes": self.plan.passes,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "backend": self.backend.NAME,
            "threads": self.plan.threads,
            "tile_elements": self.plan.tile_elements,
            "resumed": not state.fresh,
            "versions": {
                "ota_kernels": __version__,
                "python": platform.python_version(),
                "numpy": np.__version__,
                "yaml": yaml.__version__,
            },
        }


def _json_asset(name: str, content: dict) -> Asset:
    return Asset(name, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def _release(tile: TensorInputs) -> None:
    """Let go of a tile's mapped pages: resident memory stays what is in flight."""
    for buffer in (tile.base, *tile.experts):
        if buffer is not None:
            advise(buffer.data, "dontneed")
    for curvature in tile.curvatures:
        if isinstance(curvature, Full):
            advise(curvature.values.data, "dontneed")


class _FileSink:
    """Merged tiles go to the shards; each thread merges into one buffer of its own."""

    def __init__(self, writer: ShardWriter, tensors: list) -> None:
        self._writer, self._tensors = writer, tensors
        self._local = threading.local()

    def room(self, segment: Segment, nbytes: int) -> np.ndarray:
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or buffer.size < nbytes:
            buffer = self._local.buffer = np.empty(nbytes, np.uint8)
        return buffer[:nbytes]

    def write(self, segment: Segment, merged: np.ndarray) -> None:
        self._writer.write(self._tensors[segment.index], segment.start, merged)

    def done_with(self, tile: TensorInputs) -> None:
        _release(tile)


class _State:
    """What is done: decisions, ranges on the disk and their tallies, from a journal's records."""

    def __init__(self, records: list[dict], tensors: int) -> None:
        self.fresh = not records
        self.decisions: ModelDecisions | None = None
        self.tallies: list[Tally | None] = [None] * tensors
        self._ranges: dict[int, list[tuple[int, int]]] = {}
        for record in records:
            if "decisions" in record:
                self.decisions = ModelDecisions(**{k: tuple(v) for k, v in record["decisions"].items()})
            for index, start, stop, tally in record.get("unit", ()):
                self.add(Segment(index, start, stop), Tally(**tally))

    def add(self, segment: Segment, tally: Tally) -> None:
        self._ranges.setdefault(segment.index, []).append((segment.start, segment.stop))
        if self.tallies[segment.index] is None:
            self.tallies[segment.index] = tally
        else:
            self.tallies[segment.index].add(tally)

    def gaps(self, index: int, numel: int) -> list[tuple[int, int]]:
        """The ranges of a tensor that are not done; an empty tensor has one empty range until it is done."""
        done = sorted(self._ranges.get(index, ()))
        if numel == 0:
            return [] if done else [(0, 0)]
        gaps, position = [], 0
        for start, stop in [*done, (numel, numel)]:
            if position < start:
                gaps.append((position, start))
            position = max(position, stop)
        return gaps

    def done_bytes(self, entries: list, bytes_per_element) -> int:
        return sum(
            (stop - start) * bytes_per_element(index)
            for index, done in self._ranges.items()
            for start, stop in done
        )


class _WorkFolder:
    """The hidden sibling of OUT; locked while in use."""

    def __init__(self, out: Path, options: Options, needed_bytes: int) -> None:
        self.out = out
        self.path = out.parent / f".{out.name}.ota-merge"
        self.files = self.path / "files"
        self._options, self._needed_bytes = options, needed_bytes
        self._lock = -1

    def __enter__(self) -> _WorkFolder:
        if self.path.exists() and not (self._options.resume or self._options.overwrite):
            raise OutputError(
                f"an unfinished merge into {self.out} is there ({self.path}): --resume goes on, --overwrite starts again"
            )
        self._check_room()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if self._options.overwrite:
                self._empty()
            self.files.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write to {self.path}: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock >= 0:
            os.close(self._lock)

    def _check_room(self) -> None:
        parent = next(p for p in self.path.parents if p.exists())
        free = shutil.disk_usage(parent).free
        allocated = sum(f.stat().st_blocks * 512 for f in self.files.glob("*.safetensors"))
        if free + allocated < self._needed_bytes:
            raise OutputError(
                f"the merge needs {format_bytes(self._needed_bytes)} in {parent}, where {format_bytes(free)} "
                "are free: free some room or name another folder"
            )

    def _take_lock(self) -> None:
        import fcntl

        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"another merge is writing {self.out}: wait for it, or name another folder"
            ) from error

    def _empty(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()

    def journal_records(self, fingerprint: str) -> list[dict]:
        """The journal of the merge to resume; empty for a new one. OutputError when it is another merge's."""
        records = journal.read(self.path)
        if records and records[0].get("fingerprint") != fingerprint:
            raise OutputError(
                f"the unfinished merge in {self.path} had another recipe, inputs or options: --overwrite starts again"
            )
        return records

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def publish(self) -> None:
        """Rename the finished files to OUT; what was there before is deleted last."""
        try:
            if self.out.exists() and any(self.out.iterdir()):
                os.rename(self.out, self.path / "replaced")
            os.rename(self.files, self.out)
            parent = os.open(self.out.parent, os.O_RDONLY)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)
        except OSError as error:
            raise RunError(
                f"cannot move the result to {self.out}: {error.strerror}; it is in {self.files}"
            ) from error
        self.remove()


__all__ = ["Options", "OtaError", "Progress", "Silent", "as_recipe", "merge", "plan"]
