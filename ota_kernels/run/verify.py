"""Whether an output folder holds what its recipe makes of its inputs.

report, headers, index, sizes --> checksums of all that was written --> inputs, planned: the same layout?
--> a sample of it, or all, merged again by another backend --> compared with what is on the disk
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..errors import InputError, OutputError, RecipeError
from ..io.checksums import Leaves, complete
from ..io.header import parse_json_object, read_header
from ..io.offsets import read_at
from ..io.reader import FILE_SUFFIX, INDEX_SUFFIX
from ..io.writer import Layout, OutputTensor, Shard
from ..recipe.schema import load_recipe, parse_recipe
from ..select.pending import Store
from ..tensors.array import Array
from ..tensors.segment import CHUNK, Segment
from ..tensors.tile import TensorInputs
from . import scale
from .bundles import Bundle
from .copies import copied
from .engine import Engine, Range
from .job import Job
from .options import Options
from .pool import Pool
from .report import published_report
from .shares import ranges_of
from .state import as_found

ULPS = 2  # each backend is within one of the true value
_RECIPE = "merge_recipe.yaml"


@dataclass
class Verdict:
    """wrong: what is wrong, by tensor or file; done: what was looked at, a line each."""

    wrong: dict[str, str] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)


def verify(
    out: Path, *, share: float = 0.01, full: bool = False, inputs: Path | None = None, **options: Any
) -> Verdict:
    """Check the merged folder `out`. share: of the elements, merged again and compared, the model-wide
    numbers taken from the report; full: all of them, and those numbers found again; inputs: a folder that
    the recipe's folders were moved to; options: backend, device, memory_limit, threads.

    What was written is compared with its checksums in any case. Raises OutputError for a folder that is not a
    merge's output, InputError for inputs that cannot be read in a folder that was named.
    """
    report = published_report(out)
    if not isinstance(report.get("checksums"), dict) or not (out / _RECIPE).is_file():
        raise OutputError(f"{out} is not a complete merge of this version: it has no report with checksums")
    verdict = Verdict()
    written = _written(out, report, verdict)
    with Pool(Options.of(**options).threads or os.cpu_count() or 1) as pool:
        _compare_checksums(out, written, report["checksums"], verdict, pool)
    try:
        job = _job(out, report, inputs, options)
    except (InputError, RecipeError) as error:
        if inputs is not None:
            raise
        verdict.done.append(f"not merged again, since the inputs cannot be read: {error}")
        return verdict
    with job:
        _compare_with_inputs(job, out, written, report, 1.0 if full else share, full, verdict)
    return verdict


def _job(out: Path, report: dict, inputs: Path | None, options: dict) -> Job:
    """The merge of the folder's recipe, by a backend that has not written it."""
    recipe = load_recipe(out / _RECIPE)
    if inputs is not None:
        recipe = parse_recipe(_moved(recipe.as_dict(), inputs))
    given = {key: value for key, value in options.items() if value is not None}
    if given.get("backend", "auto") == "auto":
        given["backend"] = "reference" if "reference" not in report["backends"] else "native"
    return Job(recipe, Options.of(**report["options"] | given))


def _moved(value: Any, folder: Path) -> Any:
    """With absolute paths that are no more led to where `folder` has their longest end."""
    if isinstance(value, Mapping):
        return {key: _moved(item, folder) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_moved(item, folder) for item in value]
    if not isinstance(value, str) or not value.startswith("/"):
        return value
    parts = PurePosixPath(value).parts[1:]
    ends = (folder.joinpath(*parts[i:]) for i in range(len(parts)))
    found = next((end for end in ends if end.exists()), None)
    if found is None:
        raise InputError(
            f"{folder} holds nothing that {value} could be: name the folder that it was moved to"
        )
    return str(found)


# What lies there


def _written(out: Path, report: dict, verdict: Verdict) -> Layout:
    """The layout of the output's shards as they are, without those that are damaged."""
    tensors, shards = [], []
    expected = report["checksums"]["shards"]
    for name in expected:
        try:
            header = read_header(out / name)
            with (out / name).open("rb") as file:
                head = file.read(header.data_start)
        except (InputError, OSError) as error:
            verdict.wrong[name] = str(error) if isinstance(error, InputError) else f"{error.strerror}"
            continue
        prefix = _prefix(name)
        for own, info in header.tensors.items():
            tensors.append(
                OutputTensor(prefix + own, info.shape, info.dtype, len(shards), info.begin, info.end)
            )
        shards.append(Shard(name, head, header.file_size))
    for path in sorted(out.rglob(f"*{FILE_SUFFIX}")):
        name = path.relative_to(out).as_posix()
        if name not in expected:
            verdict.wrong[name] = "is not of this merge"
    layout = Layout(tuple(tensors), tuple(shards))
    _check_indices(out, layout, list(expected), verdict)
    verdict.done.append(f"{len(expected)} shards: headers, sizes and index")
    return layout


def _prefix(shard: str) -> str:
    """The part of a model (a folder) that a shard belongs to."""
    folder = PurePosixPath(shard).parent.as_posix()
    return "" if folder == "." else f"{folder}/"


def _check_indices(out: Path, layout: Layout, names: list[str], verdict: Verdict) -> None:
    """Of parts that are several shards."""
    stems: dict[str, list[str]] = {}
    for name in names:
        stem = re.sub(r"-\d{5}-of-\d{5}" + re.escape(FILE_SUFFIX) + "$", "", name)
        if stem != name:
            stems.setdefault(stem, []).append(name)
    for stem, shards in stems.items():
        prefix, path = _prefix(stem), out / f"{stem}{INDEX_SUFFIX}"
        own = [t for t in layout.tensors if layout.shards[t.shard].name in shards]
        expected = {
            t.name.removeprefix(prefix): layout.shards[t.shard].name.removeprefix(prefix) for t in own
        }
        try:
            index = parse_json_object(path.read_bytes(), str(path))
        except (InputError, OSError) as error:
            verdict.wrong[path.name] = str(error)
            continue
        size = sum(t.end - t.begin for t in own)
        if index.get("weight_map") != expected or index.get("metadata") != {"total_size": size}:
            verdict.wrong[path.relative_to(out).as_posix()] = "does not say what the shards hold"


class _Shards:
    """The shards of a layout, open for reading; a context manager."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._fds = [os.open(folder / shard.name, os.O_RDONLY) for shard in layout.shards]

    def read(self, tensor: OutputTensor, begin: int, end: int) -> np.ndarray:
        """Bytes [begin, end) of a tensor. Raises OSError."""
        data = np.empty(end - begin, np.uint8)
        if not read_at(self._fds[tensor.shard], tensor.begin + begin, data):
            raise OutputError(f"{tensor.name}: its shard became shorter while it was read")
        return data

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds:
            os.close(fd)


def _compare_checksums(out: Path, layout: Layout, expected: dict, verdict: Verdict, pool: Pool) -> None:
    leaves = Leaves(layout)
    with _Shards(out, layout) as shards:
        complete(leaves, shards.read, pool.run)
    found = leaves.sums()
    if len(layout.shards) == len(expected["shards"]):
        lost = expected["tensors"].keys() - found.tensors.keys()
        verdict.wrong |= dict.fromkeys(sorted(lost), "is missing")
    for kind in ("tensors", "shards"):
        of_kind = getattr(found, kind)
        wrong = {name for name, value in of_kind.items() if expected[kind].get(name) != value}
        if kind == "shards":  # named by their tensors, where those are wrong
            wrong = {name for name in wrong if not _names_of(layout, name) & verdict.wrong.keys()}
        verdict.wrong |= dict.fromkeys(sorted(wrong), "is not what was written: its checksum differs")
    verdict.done.append(f"checksums of {len(found.tensors)} tensors")


def _names_of(layout: Layout, shard: str) -> set[str]:
    return {t.name for t in layout.tensors if layout.shards[t.shard].name == shard}


# Merged again


def _compare_with_inputs(
    job: Job, out: Path, written: Layout, report: dict, share: float, full: bool, verdict: Verdict
) -> None:
    planned = job.plan.layout
    there = {shard.name: shard for shard in written.shards}
    for shard in planned.shards:
        if shard.name in there and there[shard.name] != shard:
            verdict.wrong[shard.name] = "has another header than the recipe gives it"
    if {s.name for s in planned.shards} != set(report["checksums"]["shards"]):
        verdict.wrong[_RECIPE] = "the inputs give other shards: they are not those of this merge"
    if any(shard != there.get(shard.name) for shard in planned.shards):
        return
    with _Shards(out, planned) as shards, Pool(job.plan.threads) as pool:
        compared = _Compared(shards, job.places)
        decider = job.decider(pool)
        found = scale.decide(decider, always=True) if full else as_found(report["found"])
        pieces = [(i, 0, e.numel) for i, e in enumerate(job.inputs.entries) if not e.is_computed]
        for index, tensor in job.tensors.items():
            pieces += ranges_of(decider, index, tensor, [(0, tensor.numel)], CHUNK)
        chosen = pieces if full else _sampled(pieces, share)
        engine = Engine(
            job.tensors,
            compared,
            decider=decider,
            found=found,
            tile_elements=job.plan.tile_elements,
            store=Store(job.plan.candidates_memory),
            bundles=job.bundles,
        )
        for _ in engine.run([piece for piece in chosen if piece[0] in job.tensors]):
            pass
        for index, _, _ in chosen:
            if index not in job.tensors:
                for start, piece in copied(job.backend, job.inputs.entries[index], 1 << 24):
                    compared.exactly(index, start, piece.data)
    verdict.wrong |= compared.wrong(job.bundles)
    elements = sum(stop - start for _, start, stop in chosen)
    total = sum(stop - start for _, start, stop in pieces)
    how = "everything" if full else f"{elements / max(total, 1):.2%} of the elements"
    verdict.done.append(f"{how} merged again by the {job.backend.NAME} backend")


def _sampled(pieces: list[Range], share: float) -> list[Range]:
    """Pieces drawn by chance, in order, of about this share of all elements; one at least."""
    wanted = share * sum(stop - start for _, start, stop in pieces)
    drawn: list[Range] = []
    for piece in random.sample(pieces, len(pieces)):
        if drawn and wanted <= 0:
            break
        drawn.append(piece)
        wanted -= piece[2] - piece[1]
    return sorted(drawn)


class _Compared:
    """A Sink that compares merged tiles with what shards hold."""

    def __init__(self, shards: _Shards, tensors: Iterable[OutputTensor]) -> None:
        self._shards, self._tensors = shards, list(tensors)
        self._differing: dict[Segment, np.ndarray] = {}

    def room(self, segment: Segment, nbytes: int) -> Array:
        return np.empty(nbytes, np.uint8)

    def write(self, segment: Segment, merged: Array, final: bool) -> None:
        self._differing[segment] = self._compare(segment, merged, slice(None))

    def patch(self, segment: Segment, positions: Array, merged: Array) -> None:
        wrong = self._compare(segment, merged, positions)
        before = np.setdiff1d(self._differing[segment], positions)
        self._differing[segment] = np.union1d(before, positions[wrong])

    def exactly(self, index: int, start: int, data: np.ndarray) -> None:
        """Elements of a tensor that is copied."""
        tensor, size = self._tensors[index], self._tensors[index].dtype.itemsize
        found = self._shards.read(tensor, start * size, start * size + len(data))
        unequal = np.flatnonzero((found != data).reshape(-1, size).any(axis=1))
        self._differing[Segment(index, start, start + len(data) // size)] = unequal

    def _compare(self, segment: Segment, merged: Array, chosen: slice | np.ndarray) -> np.ndarray:
        """Which elements differ by more than backends do."""
        tensor = self._tensors[segment.index]
        size = tensor.dtype.itemsize
        stored = self._shards.read(tensor, segment.start * size, segment.stop * size)
        a, b = (_ordered(x, size) for x in (stored, np.asarray(merged)))
        return np.flatnonzero(np.abs(a[chosen] - b) > ULPS)

    def wants(self, tensor: TensorInputs, segment: Segment) -> None:
        pass

    def done_with(self, tile: TensorInputs) -> None:
        pass

    def wrong(self, bundles: Mapping[int, Bundle]) -> dict[str, str]:
        """bundles: what stands for several tensors."""
        found: dict[str, list[int]] = {}
        for segment in sorted(self._differing):
            for place in (segment.start + self._differing[segment]).tolist():
                name, bundle = self._tensors[segment.index].name, bundles.get(segment.index)
                if bundle is not None:
                    member, place = bundle.member(place)
                    name = member.name
                found.setdefault(name, []).append(place)
        return {
            name: f"{len(places)} elements are not what the recipe gives, the first at flat index {places[0]}"
            for name, places in found.items()
        }


def _ordered(data: np.ndarray, size: int) -> np.ndarray:
    """Integers that order as the floating-point numbers do, neighbours 1 apart."""
    bits = data.view(f"i{size}").astype(np.int64)
    return np.where(bits < 0, -(bits & ((1 << (8 * size - 1)) - 1)), bits)
