"""The whole job from a recipe to a published folder: plan, work folder, merge, report, publish."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .. import __version__, backends
from ..backends import Backend
from ..errors import BackendError, InputError, OutputError, RecipeError, RunError, StoppedError
from ..io.assets import Asset, plan_assets, recipe_asset, write_assets
from ..io.leftovers import asset_notes
from ..io.pages import release, watched
from ..io.workfolder import WorkFolder
from ..io.writer import ShardWriter, layout, write_index
from ..planning.inputs import Inputs
from ..planning.outputs import OutputTensor
from ..planning.plan import Plan, make_plan, memory_limit_of, thread_choices
from ..processors import default_threads
from ..recipe import methods
from ..recipe.schema import Recipe, load_recipe, parse_recipe
from ..tensors.tile import TensorInputs
from .bundles import Bundle, bundles_of, can_be_bundled, places_of
from .card import model_card
from .decide import Decider
from .devices import take_device
from .merging import Done, Merging
from .options import Options, Progress, Silent
from .pool import IN_PLACE, Pool
from .ranks import ALONE, Ranks, of_environment
from .readahead import ReadAhead
from .report import REPORT_NAME, as_text, build_report, length_note, published_report
from .rules import RULES, Rules
from .state import FORMAT
from .sums_writing import SUMS, Earlier, Summing, base_probes, planes, uniform_tensors
from .surveys import Once, Surveys

logger = logging.getLogger(__name__)

_SPARE_BYTES = 64 << 20  # room asked for beside the tensors: config, tokenizer, report, journal


def as_recipe(recipe: Recipe | str | os.PathLike | dict) -> Recipe:
    """A recipe from a file, a mapping, or as it is."""
    if isinstance(recipe, Recipe):
        return recipe
    return parse_recipe(recipe) if isinstance(recipe, dict) else load_recipe(recipe)


def plan(
    recipe: Recipe | str | os.PathLike | dict,
    *,
    out: str | os.PathLike | None = None,
    **options: Any,
) -> Plan:
    """What `merge` with the same arguments would do; writes nothing. Reads headers only.

    With `out`, checks too that `merge` could write there. Raises as `merge` does.
    """
    with Job(as_recipe(recipe), Options.of(**options)) as job:
        job.assets()
        if out is not None:
            job.check_output(Path(out).resolve())
        return replace(job.plan, notes=tuple(job.notes))


def merge(
    recipe: Recipe | str | os.PathLike | dict,
    out: str | os.PathLike,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> dict:
    """Merge the models of a recipe into the folder `out`; returns what merge_report.json says.

    recipe: a YAML file, a mapping of the same form, or a Recipe. options: the fields of `Options`, sizes in
    bytes or as text ("5GB", "512MiB"). Several processes that torchrun has started merge together, and all
    return the report. Raises RecipeError, InputError, OutputError or BackendError before
    anything is written, InputError for values that are not finite, RunError (resumable) while running.
    """
    with of_environment() as ranks, Job(as_recipe(recipe), Options.of(**options), ranks=ranks) as job:
        return job.run(Path(out), progress or Silent())


class Job:
    """One merge: open inputs, its plan, and `run`."""

    surveys: Surveys = Once()  # what merges beside this one find too
    bundles_small = True  # whether small neighbouring tensors may merge as one

    def __init__(self, recipe: Recipe, options: Options, rules: Rules = RULES, ranks: Ranks = ALONE) -> None:
        self.options, self.rules, self.ranks = options, rules, ranks
        self.inputs = self._open(recipe)
        self.recipe = self.inputs.recipe
        try:
            self.backend = self._backend()
            self._prepare()
        except BaseException:
            self.inputs.close()
            raise

    def _open(self, recipe: Recipe, **more: Any) -> Inputs:
        options = self.options
        return Inputs(
            recipe,
            allow_crimes=options.allow_crimes,
            truncate=options.unsafe_truncate_embeddings,
            lora_dtype=options.lora_merge_dtype,
            pack_base=options.pack_base,
            **more,
        )

    def _backend(self) -> Backend:
        options = self.options
        return backends.for_files(
            "native" if _keeps_sums(self.recipe) and options.backend == "auto" else options.backend,
            take_device(options.device),
            self.recipe.method.python,
            nbytes=self.inputs.total_bytes,
            threads=options.threads or default_threads(),
        )

    def _prepare(self) -> None:
        options = self.options
        entries = self.inputs.entries
        self.tensors: dict[int, TensorInputs] = {}
        self.bundles: dict[int, Bundle] = {}
        self.read_ahead = ReadAhead([])
        tensors = [(e.name, e.dtype, e.shape) for e in entries]
        stems = self.inputs.stems
        if _keeps_sums(self.recipe):
            tensors, stems = tensors + planes(entries), stems | {SUMS: SUMS.rstrip("/")}
        output = layout(tensors, options.shard_size, stems, self._metadata())
        written = output.tensors[: len(entries)]
        may = functools.partial(self._may_be_bundled, self.decider(IN_PLACE))
        self.tensors, self.bundles = bundles_of(entries, written, may)
        self.places = places_of(written, self.bundles)
        self.read_ahead = ReadAhead(list(self.tensors.values()))
        self.plan = make_plan(
            self.inputs,
            output,
            self.decider(IN_PLACE),
            self.backend,
            threads=thread_choices(options.threads, self.backend),
            memory_limit=memory_limit_of(options.memory_limit, self.backend),
            tile_elements=options.tile_elements,
            candidates_memory=options.candidates_memory,
            sums=_keeps_sums(self.recipe),
        )

    def summing(self, writer: ShardWriter) -> Summing | None:
        """What merges where sums are written beside the merge, None without."""
        if not _keeps_sums(self.recipe):
            return None
        named = [entry.name for entry in self.inputs.entries if entry.is_computed]
        own = iter(self.plan.layout.tensors[len(self.inputs.entries) :])
        return Summing(writer, dict(zip(named, zip(own, own, strict=True), strict=True)), self._earlier)

    _earlier: Earlier | None = None  # sums that it goes on with

    def _metadata(self) -> dict[str, str]:
        """What the output's headers say besides."""
        return {}

    def _may_be_bundled(self, decider: Decider, entry: OutputTensor, tensor: TensorInputs) -> bool:
        method = self.inputs.method
        apart = not self.bundles_small or _keeps_sums(self.recipe)
        if apart or method.python or method.whole(entry.settings):
            return False
        return can_be_bundled(method, entry.settings, decider.score_terms(tensor).words)

    def decider(self, pool: Pool) -> Decider:
        """What decides for the tensors that are merged."""
        tensors = list(self.tensors.values())
        of_each = {e.name: e.settings for e in self.inputs.entries if e.is_computed}
        return Decider(
            self.inputs.method,
            tensors,
            of_each,
            self.backend,
            pool,
            release,
            self.read_ahead,
            positions={e.name: e.positions for e in self.inputs.entries if e.is_computed},
            bundles=self.bundles.values(),
            seed=self.options.seed,
            rules=self.rules,
            surveys=self.surveys,
            ranks=self.ranks,
        )

    def pool(self) -> Pool:
        """What merges, a context manager."""
        return Pool(self.plan.threads, self.ranks.check)

    def release(self, tile: TensorInputs) -> None:
        """The pages of a tile that is merged may go."""
        release(tile)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.read_ahead.close()
        self.inputs.close()
        self.backend.release()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes whenever the merge does: recipe, inputs, layout, seed, versions. Not with the backend: one
        may go on where another was stopped, since masks are the same on all of them."""
        shards = [asdict(shard) | {"header": shard.header.hex()} for shard in self.plan.layout.shards]
        return self._digest(shards)

    def _digest(self, *more: Any) -> str:
        parts = [
            __version__,
            FORMAT,
            self.recipe.as_dict(),
            self.recipe.method.identity,
            self.options.seed,
            self.options.allow_crimes,
            self.options.unsafe_truncate_embeddings,
            self.options.trust_remote_code,
            self.options.lora_merge_dtype,
            self.inputs.fingerprint(),
            *more,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def assets(self) -> list[Asset]:
        return [
            *plan_assets(
                self.inputs.model_folders,
                tokenizer_source=self.recipe.tokenizer_source,
                dtype=self.recipe.output_dtype,
                untied=self.inputs.untied,
                edit=self.inputs.edited_config,
                chat_template=self.recipe.chat_template,
                tokenizer=self._tokenizer_files(),
                copy_code=self.options.trust_remote_code,
            ),
            recipe_asset(self.recipe.as_dict()),
        ]

    def _tokenizer_files(self) -> dict | None:
        """Of a tokenizer that was built; None for those of `tokenizer_source`."""
        if not self.options.copy_tokenizer:
            return {}
        return None if self.inputs.alignment is None else self.inputs.alignment.files

    @functools.cached_property
    def notes(self) -> list[str]:
        """What was understood of the inputs and is not self-evident."""
        names = [asset.name for asset in self.assets()]
        source = self.recipe.tokenizer_source if self.inputs.alignment is None else "base"
        read = [path for checkpoint in self.inputs.checkpoints.values() for path in checkpoint.files]
        return [*self.inputs.notes, *asset_notes(self.inputs.model_folders, names, source, read)]

    def run(self, out: Path, progress: Progress) -> dict:
        if _keeps_sums(self.recipe) and self.backend.NAME != "native":
            raise RecipeError(f"`keep_sums` is computed by the backend native, not by {self.backend.NAME}")
        ranks, out = self.ranks, out.resolve()
        self._check_agreement()
        is_first = ranks.rank == 0
        finished = ranks.tell(lambda: self.check_output(out))
        work = self._work_folder(out)
        if finished is not None:
            if is_first:
                work.remove_if_published()
            return finished
        assets = self.assets()
        self.notes  # noqa: B018 - of the folders as they are now
        with work if is_first else contextlib.nullcontext():
            try:
                with watched():
                    done = Merging(self, work, progress).run()
                self._check_unchanged()
                ranks.wait()
                report = ranks.tell(lambda: self._finish(work, assets, done))
            except (InputError, StoppedError) as error:
                if is_first and (isinstance(error, InputError) or error.of_input):
                    work.remove()  # nothing to resume: the inputs themselves must change
                raise
            except BackendError as error:
                raise RunError(
                    f"{error}; the journal is kept: --resume with --backend native goes on on the CPU"
                ) from error
            if is_first:
                work.publish()
            ranks.wait()
        return report

    @functools.cached_property
    def sources_seen(self) -> dict[str, list[int]]:
        """[bytes, time in ns] of each file of weights and moments, by path, when this was first asked."""
        return {str(path): _stamp(path) for path in self._files()}

    def _files(self) -> list[Path]:
        weights = (path for checkpoint in self.inputs.checkpoints.values() for path in checkpoint.files)
        moments = (file.path for file in self.inputs.moments_files)
        packs = (model.pack.path for model in self.inputs.packs.values())
        return list(dict.fromkeys([*weights, *moments, *packs]))

    def _check_unchanged(self) -> None:
        """InputError for a file that was written to while it was merged."""
        for path, before in self.sources_seen.items():
            if _stamp(Path(path)) != before:
                raise InputError(f"{path}: has changed while it was merged: merge again when it is whole")

    def _check_agreement(self) -> None:
        """RunError where another rank was given something else than rank 0, or sees other inputs."""
        own = [self.fingerprint, self.sources_seen]
        fingerprint, seen = self.ranks.tell(lambda: own)
        if [fingerprint, seen] == own:
            return
        unlike = [path for path in seen.keys() | own[1].keys() if seen.get(path) != own[1].get(path)]
        what = f"has another {min(unlike)}" if unlike else "was given another recipe or other options"
        raise RunError(f"rank {self.ranks.rank} {what} than rank 0: all must see and be told the same")

    def _work_folder(self, out: Path) -> WorkFolder:
        options = self.options
        return WorkFolder(out, self.needed_bytes, resume=options.resume, overwrite=options.overwrite)

    @property
    def needed_bytes(self) -> int:
        """Room that the output takes on the disk, and what waits for thresholds."""
        return self.plan.bytes_out + self.plan.spilled_bytes + _SPARE_BYTES

    def check_output(self, out: Path) -> dict | None:
        """OutputError where `out` (resolved) cannot be used. With --resume, the report of a merge that is
        complete."""
        for label, path in self._sources().items():
            source = path.resolve()
            if out == source or source in out.parents or out in source.parents:
                raise OutputError(
                    f"the output {out} and the input {label} lie inside each other: name another folder"
                )
        if out.exists() and not out.is_dir():
            raise OutputError(f"the output {out} is a file; name a folder")
        if os.path.ismount(out):
            raise OutputError(
                f"the output {out} is a mount point, which cannot be replaced: name a folder in it"
            )
        if out.exists() and any(out.iterdir()):
            report = published_report(out) if self.options.resume else {}
            if report.get("fingerprint") == self.fingerprint:
                logger.info("%s is complete already", out)
                return report
            if not self.options.overwrite:
                found = "holds something else than this merge" if self.options.resume else "is not empty"
                raise OutputError(f"the output {out} {found}: choose another folder, or add --overwrite")
        self._work_folder(out).check()
        return None

    def _sources(self) -> dict[str, Path]:
        """Everything that is read, by what an error calls it."""
        sources = self.inputs.model_folders | self.inputs.adapter_folders
        sources |= {str(file.path): file.path for file in self.inputs.moments_files}
        sources |= {str(model.pack.path): model.pack.path for model in self.inputs.packs.values()}
        tokenizer = self.recipe.tokenizer_source
        if tokenizer not in ("base", "union"):
            sources.setdefault(tokenizer, Path(os.path.expanduser(tokenizer)))
        return sources

    def _finish(self, work: WorkFolder, assets: list[Asset], done: Done) -> dict:
        """Write everything beside the shards; returns the report."""
        report = build_report(
            self.inputs, self.plan, done.decider, done.state, self.fingerprint, done.seconds, self.bundles
        )
        report |= {"options": self.options.of_result(), "found": done.state.model_found()}
        lengths = length_note(report["lambda"], len(self.recipe.models))
        report |= {
            "notes": [*self.notes, *lengths],
            "processes": self.ranks.size,
            "checksums": done.checksums.as_dict(),
        }
        report = self._completed(report)
        work.check_written({shard.name: shard.size for shard in self.plan.layout.shards})
        write_index(work.files, self.plan.layout)
        cards = [self._card(assets, report)] if self.options.write_model_card else []
        write_assets(work.files, [*assets, *cards, Asset(REPORT_NAME, as_text(report))])
        return report

    def _completed(self, report: dict[str, Any]) -> dict[str, Any]:
        """The report with what is said of the sums that are kept."""
        if not _keeps_sums(self.recipe):
            return report
        probes = base_probes(self.tensors.values())
        return report | {"sums": {"uniform": uniform_tensors(self.inputs.entries), "base": probes}}

    def _card(self, assets: list[Asset], report: dict) -> Asset:
        has_config = any(a.name == "config.json" for a in assets)
        formula = methods.get(self.recipe.merge_method).formula
        card = model_card(self.recipe.as_dict(), report, __version__, formula=formula, has_config=has_config)
        return Asset("README.md", card.encode())


def _keeps_sums(recipe: Recipe) -> bool:
    return bool(recipe.parameters.get("keep_sums"))


def _stamp(path: Path) -> list[int]:
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return [found.st_size, found.st_mtime_ns]
