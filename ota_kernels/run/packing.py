"""`ota-merge pack` and `unpack`: an expert as its base plus a few bits, and back.

ffg, compeft: the engine grafts the expert onto the base (run/engine.py); a sink keeps what is kept -->
records. tswitch, bitdelta, emr: masks of their own (run/pack_forms.py), tile by tile --> records.
records and scales --> io/pack_writing.py --> one file, published whole
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, OutputError, RecipeError
from ..io import pack as packs
from ..io.assets import home
from ..io.new_file import check_new_file, new_file
from ..io.pack import SHARED, SIGN, Base, Entry, hash_of
from ..io.pack_codec import TILE
from ..io.pack_writing import Encoded, PackWriter, Spool
from ..io.tokenizer import files_in, read_bytes, tokenizer_files
from ..planning.outputs import OutputTensor
from ..recipe.schema import parse_recipe
from ..select.pending import Store
from ..tensors.buffer import Buffer
from ..tensors.computed import Computed, Source, is_computed
from ..tensors.dtypes import BY_NAME, DType
from ..tensors.tile import TensorInputs
from . import pack_forms as forms
from .engine import Engine
from .job import Job
from .options import Options, Progress, Silent
from .pack_asked import TAKES, Asked
from .pack_sink import PackSink
from .pool import Pool

SHARED_NAME = f"shared{packs.SUFFIX}"
_CONFIGS = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")


def pack(
    experts: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    base: str | os.PathLike,
    overwrite: bool = False,
    progress: Progress | None = None,
    options: Mapping[str, Any] | None = None,
    **asked: Any,
) -> dict[str, Any]:
    """Pack an expert against its base into the file OUT.pack; several with the form emr, into the folder
    OUT: a file each, named after it, and shared.pack.

    asked: fields of `Asked`; options: of `Options`: threads, backend, device, memory_limit, allow_crimes.
    Returns sizes: packs (file -> bytes), parameters, bits_per_parameter, kept (share of the edits kept, by
    file). Raises RecipeError, InputError and OutputError before anything is written; OUT appears only when
    it is complete.
    """
    if asked.get("moments") is not None:
        asked["moments"] = os.fspath(asked["moments"])
    how, target = Asked(**asked), Path(out).resolve()
    paths, names = [os.fspath(expert) for expert in experts], _names(experts, how, out)
    if how.form == "emr":
        _check_new_folder(target, overwrite)
    else:
        check_new_file(target, overwrite=overwrite, suffix=packs.SUFFIX, kind="pack")
    recipe = parse_recipe(how.recipe(paths, os.fspath(base)))
    with ExitStack() as stack:
        job = stack.enter_context(
            _Graft(recipe, Options.of(**{"tile_elements": forms.SEGMENT, **(options or {})}))
        )
        if len(job.recipe.models) != len(paths):
            raise RecipeError(f"an expert is the base {base} itself: there is nothing to pack")
        run = _Packing(job, how, stack.enter_context(closing(Spool(target.parent))), progress or Silent())
        run.read()
        if how.form != "emr":
            return run.summary([(target, run.write(0, target, ""))])
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        mark = run.write_shared(folder / SHARED_NAME)
        found = [(folder / name, run.write(t, folder / name, mark)) for t, name in enumerate(names)]
        found.append((folder / SHARED_NAME, (folder / SHARED_NAME).stat().st_size))
        if target.exists():
            shutil.rmtree(target)
        folder.chmod(0o755)
        os.rename(folder, target)
        return run.summary([(target / path.name, size) for path, size in found])


def _names(experts: Sequence[str | os.PathLike], how: Asked, out: str | os.PathLike) -> list[str]:
    if how.form != "emr":
        if len(experts) != 1:
            raise RecipeError(
                f"the form {how.form} packs one expert at a time; several share an edit with --form emr"
            )
        return []
    if len(experts) < 2:
        raise RecipeError("the form emr packs two experts or more: they share an edit")
    names = [f"{Path(expert).name or 'expert'}{packs.SUFFIX}" for expert in experts]
    if len({*names, SHARED_NAME}) <= len(names):
        raise RecipeError(
            f"the experts' folders need names of their own for {os.fspath(out)}: {', '.join(names)}"
        )
    return names


def _check_new_folder(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists: name another folder, or give --overwrite")
    if out.exists() and not (out / SHARED_NAME).is_file():
        raise OutputError(f"{out}: is no folder of packs, and is not replaced: name another folder")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: its folder does not exist: make it first")


class _Graft(Job):
    """What a pack's edits are found by; each tensor is packed by itself."""

    bundles_small = False


class _Packing:
    """The work between open inputs and files."""

    def __init__(self, job: Job, how: Asked, spool: Spool, progress: Progress) -> None:
        self._job, self._how, self._spool, self._progress = job, how, spool, progress
        self._experts = [entry.reference for entry in job.recipe.models]
        self._writers = [PackWriter(spool) for _ in self._experts]
        self._shared: dict[str, list[tuple[int, int]]] = {}
        # Per expert the sums over tensors of the means of |d|, and of the shared edit's magnitude where it is
        # taken.
        self._norms = np.zeros((len(self._experts), 2))
        self._tensors = {i: _flat(tensor) for i, tensor in job.tensors.items()}
        for index, entry in enumerate(job.inputs.entries):
            if index not in self._tensors:
                self._tensors[index] = self._copied(entry)
            base = self._tensors[index].base
            if is_computed(base) or base.dtype.name != entry.dtype.name:
                raise InputError(
                    f"{base.origin}: {entry.name} is not stored as it is merged: name a base of plain floats"
                )

    def _copied(self, entry: OutputTensor) -> TensorInputs:
        """A tensor that no merge computes, integers or a buffer: the base's and each expert's."""
        models = self._job.inputs.models
        found = []
        for reference in (self._job.recipe.base, *self._experts):
            model = models[reference]
            info = model.tensors.get(entry.name)
            if info is None or (tuple(info.shape), info.dtype) != (entry.shape, entry.dtype):
                raise InputError(
                    f"{model.label}: has no {entry.name} like {entry.dtype.name}{list(entry.shape)}"
                )
            found.append(model.source(entry.name))
        return TensorInputs(entry.name, entry.shape, entry.dtype, found[0], tuple(found[1:]), ())

    def read(self) -> None:
        """Everything, once; T-Switch each tensor three times."""
        job, entries = self._job, self._job.inputs.entries
        self._progress.stage("pack", job.inputs.total_bytes)
        with Pool(job.plan.threads) as pool:
            sink = self._graft(pool) if self._how.form in ("ffg", "compeft") else None
            for index, entry in enumerate(entries):
                for writer in self._writers:
                    writer.begin(entry.name, Entry(entry.shape, entry.dtype, self._how.stored(entry)))
                if entry.is_computed:
                    self._read(index, entry, sink, pool)
                else:
                    self._compare(self._tensors[index], pool)
                if sink is None:
                    self._progress.advance(int(entry.numel * job.inputs.bytes_per_element[index]))
        self._set_scales(sink)

    def _graft(self, pool: Pool) -> PackSink:
        """Graft the expert onto the base: exact thresholds, in one pass."""
        job = self._job
        tensors = {i: self._tensors[i] for i in job.tensors}
        sink = PackSink(tensors, self._spool, job.read_ahead, moments=self._how.form == "compeft")
        decider = job.decider(pool)
        with closing(Store(job.plan.candidates_memory)) as store:
            engine = Engine(
                tensors,
                sink,
                decider=decider,
                found=decider.decide_model(),
                tile_elements=job.plan.tile_elements,
                store=store,
            )
            for event in engine.run():
                for segment, _ in getattr(event, "done", ()):
                    size = job.inputs.bytes_per_element[segment.index]
                    self._progress.advance(int((segment.stop - segment.start) * size))
        return sink

    def _read(self, index: int, entry: OutputTensor, sink: PackSink | None, pool: Pool) -> None:
        tensor, form = self._tensors[index], self._how.form
        if sink is not None:

            def encoded(pair: tuple[int, int]) -> list[list[Encoded]]:
                tiles = range(pair[0] // TILE, -(-pair[1] // TILE))
                sizes = (min(TILE, tensor.numel - j * TILE) for j in tiles)
                hashes, values = sink.base_hashes[index], self._how.stored(entry)
                return [
                    [
                        forms.of_kept(sink.kept(index, j), n, tensor, values, int(hashes[j]))
                        for j, n in zip(tiles, sizes, strict=True)
                    ]
                ]

        elif form == "tswitch":
            positive, negative = forms.sides(tensor, self._how.share, pool.run)

            def encoded(pair: tuple[int, int]) -> list[list[Encoded]]:
                return [[forms.tswitch(part, positive, negative) for part in forms.parts(tensor, *pair)]]

        elif form == "bitdelta":

            def encoded(pair: tuple[int, int]) -> list[list[Encoded]]:
                return [[forms.bitdelta(part) for part in forms.parts(tensor, *pair)]]

        else:
            self._unify(tensor, pool)
            return
        self._collect(tensor, encoded, pool)

    def _collect(self, tensor: TensorInputs, encoded: Callable, pool: Pool) -> None:
        for of_experts in pool.run(encoded, forms.segments(tensor.numel)):
            for writer, tiles in zip(self._writers, of_experts, strict=True):
                writer.add(tensor.name, tiles)

    def _unify(self, tensor: TensorInputs, pool: Pool) -> None:
        """The edit that the experts share, and who takes it where."""
        dtype, places = shared_type(tensor.base.dtype), self._shared.setdefault(tensor.name, [])
        numel = max(tensor.numel, 1)

        def of_segment(pair: tuple[int, int]) -> list[tuple[np.ndarray, list[tuple[Encoded, float]]]]:
            found = []
            for part in forms.parts(tensor, *pair):
                shared, agree = forms.unified(part, dtype)
                found.append((shared, forms.emr(part, shared, dtype, agree)))
            return found

        for tiles in pool.run(of_segment, forms.segments(tensor.numel)):
            for shared, of_experts in tiles:
                places.append(self._spool.put(shared))
                for t, (tile, size) in enumerate(of_experts):
                    self._writers[t].add(tensor.name, [tile])
                    self._norms[t] += np.array([tile.sums[0], size]) / numel

    def _compare(self, tensor: TensorInputs, pool: Pool) -> None:
        """Of integers and buffers: what differs from the base's, as it is."""

        def encoded(pair: tuple[int, int]) -> list[list[Encoded]]:
            return [list(_differing(tensor, t, *pair)) for t in range(len(tensor.experts))]

        self._collect(tensor, encoded, pool)

    def _set_scales(self, sink: PackSink | None) -> None:
        sigma = 1.0
        if self._how.form == "compeft":
            n = sum(tensor.numel for i, tensor in self._tensors.items() if i in self._job.tensors)
            total, squares = sum((sink.sums[key] for key in sorted(sink.sums)), np.zeros(2)).tolist()
            sigma = self._how.alpha * math.sqrt(max(0.0, squares - total * total / n) / max(n - 1, 1))
        for t, writer in enumerate(self._writers):
            for name, entry in writer.entries.items():
                kept = writer.kept(name)
                if entry.values == SHARED:
                    own, shared = self._norms[t].tolist()
                    writer.scale(name, own / shared if shared else 0.0)
                elif entry.values == SIGN and kept:
                    sizes, squares = writer.totals(name)
                    means = {"bitdelta": sizes / kept, "compeft": sigma}
                    writer.scale(name, means.get(self._how.form, math.sqrt(squares / kept)))

    # Files

    def write(self, t: int, out: Path, mark: str) -> int:
        """The pack of expert t; its bytes. mark: of the shared edit, "" without one."""
        inputs, reference = self._job.inputs, self._experts[t]
        folder = inputs.model_folders[self._job.recipe.base.label]
        base = Base(str(folder.resolve()), self._job.recipe.base.label, self._writers[t].content())
        settings = {
            k: v for k, v in asdict(self._how).items() if k in TAKES[self._how.form] and v is not None
        }
        settings.pop("form", None)
        if self._how.form == "tswitch":
            settings["density"] = self._how.share
        beside = _beside(home(inputs.model_folders[reference.label]), home(folder))
        more = {"shared": {"file": SHARED_NAME, "mark": mark}} if mark else {}
        return self._writers[t].write(out, self._how.form, reference.label, settings, base, beside, **more)

    def write_shared(self, out: Path) -> str:
        """The file of the shared edit; a mark by which packs know it."""
        entries = [e for e in self._job.inputs.entries if e.name in self._shared]
        types = {e.name: shared_type(e.dtype) for e in entries}
        digest = hashlib.sha256()
        for place in (place for places in self._shared.values() for place in places):
            digest.update(self._spool.get(place))
        mark = digest.hexdigest()
        labels = ", ".join(reference.label for reference in self._experts)
        base = Base("", self._job.recipe.base.label, self._writers[0].content())
        said = packs.metadata("shared", labels, {}, base, {}, shared={"mark": mark})
        listed = [(packs.SHARED_EDIT + e.name, types[e.name], e.shape) for e in entries]
        with new_file(out, listed, said) as file:
            for entry in entries:
                at = 0
                for place in self._shared[entry.name]:
                    file.write(packs.SHARED_EDIT + entry.name, at, self._spool.get(place))
                    at += place[1] // 2
        return mark

    def summary(self, written: Sequence[tuple[Path, int]]) -> dict[str, Any]:
        parameters = sum(tensor.numel for tensor in self._tensors.values())
        files = {str(path): size for path, size in written}
        kept = [sum(map(w.kept, w.entries)) / max(parameters, 1) for w in self._writers]
        bits = 8 * sum(files.values()) / max(parameters * len(self._experts), 1)
        return {
            "form": self._how.form,
            "packs": files,
            "parameters": parameters,
            "bits_per_parameter": bits,
            "kept": kept,
            "notes": list(self._job.notes),
        }


def shared_type(dtype: DType) -> DType:
    """Of 16 bits, in which experts share an edit."""
    return dtype if dtype.name == "float16" else BY_NAME["bfloat16"]


class _Unrowed(Computed):
    """What is computed by rows, in ranges of any elements: a pack's tiles are no rows."""

    def __init__(self, source: Computed) -> None:
        super().__init__(source.shape, source.dtype, source.origin, source.bytes_per_element)
        self.columns, self._source = 1, source
        self.slice, self.gather = source.slice, source.gather

    def rows(self, first: int, stop: int) -> np.ndarray:
        return self.slice(first, stop).data.reshape(stop - first, -1)

    def parts(self, first: int, stop: int) -> Iterator[Buffer]:
        columns = self._source.columns
        return self._source.parts(first // columns, -(-stop // columns))


def _flat(tensor: TensorInputs) -> TensorInputs:
    experts: list[Source] = [_Unrowed(e) if is_computed(e) and e.columns > 1 else e for e in tensor.experts]
    return replace(tensor, experts=tuple(experts))


def _differing(tensor: TensorInputs, t: int, start: int, stop: int) -> Iterator[Encoded]:
    size = tensor.base.dtype.itemsize
    for at in range(start, stop, TILE):
        tile = tensor.slice(at, min(at + TILE, stop))
        base, expert = (b.data.reshape(-1, size) for b in (tile.base, tile.experts[t]))
        kept = np.flatnonzero((base != expert).any(axis=1))
        yield forms.exact(
            kept, tile.numel, expert[kept], tile.base.dtype, tile.base.dtype, hash_of(tile.base.data)
        )


def _beside(expert: Path, base: Path) -> dict[str, bytes]:
    """Files of the expert's folder that a model needs beside its weights, where the base has none or
    another one."""
    if not expert.is_dir():
        return {}
    found = files_in(expert, _CONFIGS) | tokenizer_files(expert)
    contents = {name: read_bytes(path) for name, path in found.items() if "/" not in name}
    own = files_in(base, contents) if base.is_dir() else {}
    return {name: data for name, data in contents.items() if name not in own or read_bytes(own[name]) != data}


def unpack(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write the expert of a pack as a folder.

    base: where the base is, None for where the pack says it is. options, errors and the report are those
    of `merge`.
    """
    data: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": os.fspath(path)}]}
    where = None if base is None else os.fspath(base)
    with Job(parse_recipe(data), Options.of(**options, pack_base=where)) as job:
        if not job.inputs.packs:
            raise InputError(f"{path}: is no pack: its name would end in {packs.SUFFIX}")
        return job.run(Path(out), progress or Silent())
