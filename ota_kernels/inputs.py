"""Opens everything a recipe names and checks that it fits together. Reads headers, and what compressed
curvature has beside its elements."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import methods
from .dtypes import OUTPUT_NAMES, DType
from .errors import InputError
from .io.assets import tokenizer_folder
from .io.curvature import CurvatureFile
from .io.header import TensorInfo
from .io.hub import resolve_file, resolve_model
from .io.quantised import quantisation_of, refuse_quantised
from .io.reader import Checkpoint, open_model
from .models import buffers
from .models.check import compare, shape_advice
from .models.identity import twins, without_base
from .models.match import lacking_error, listing, match
from .models.precision import Precision
from .recipe import Recipe
from .tensors import Curvature, Rank1, TensorInputs, Uniform

MERGE, COPY, KEEP_BASE, TAKE, AVERAGE = "merge", "copy", "keep base", "take", "average"


@dataclass(frozen=True)
class TensorEntry:
    """One output tensor.

    action: MERGE; COPY where the models must agree (integers, booleans); KEEP_BASE where the base's values
    are taken (`missing_curvature: base`); TAKE: one checkpoint's values as they are; AVERAGE: the mean over
    those that have the tensor. sources: the tensor's name in each checkpoint that is read; dtype: the
    output's.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    action: str
    sources: tuple[str | None, ...]

    @property
    def is_computed(self) -> bool:
        """Whether it goes through a backend."""
        return self.action in (MERGE, KEEP_BASE)

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n


class Inputs:
    """The open files of a recipe. allow_crimes: what differs between models is a note, not an error.

    recipe: without models that are the base itself; checkpoints: the base first where the method uses one,
    then the experts; entries: output tensors in the order of the first checkpoint; matched: how tensors were
    paired, and what is left out; untied: the output has an output matrix of its own although some model ties
    it to the embeddings; notes: what a user should know of what was understood; model_folders: every folder
    by its name in the recipe, the base first.
    """

    def __init__(self, recipe: Recipe, allow_crimes: bool = False) -> None:
        self.recipe = recipe
        self.method = methods.get(recipe.merge_method)
        self.has_base = recipe.base_model is not None and self.method.base != "unused"
        self._files = contextlib.ExitStack()
        try:
            self._open()
            self.matched = match(self.checkpoints)
            self.untied = self.matched.untied
            self.notes = [*twins(self.experts), *self.matched.notes]
            self._precision = Precision(self.checkpoints, recipe.dtype, recipe.out_dtype)
            self.entries = self._entries()
            self.notes += self._precision.notes(listing)
            shapes = {entry.name: entry.shape for entry in self.entries}
            source = tokenizer_folder(self.model_folders, recipe.tokenizer_source)
            self.notes += compare(self.model_folders, shapes, source, allow_crimes, filter(None, self.stems))
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        recipe = self.recipe
        labels = [recipe.base_model] if recipe.base_model is not None else []
        labels += [m.model for m in recipe.models]
        self.model_folders: dict[str, Path] = {label: resolve_model(label) for label in labels}
        used = labels if self.has_base else [m.model for m in recipe.models]
        self.checkpoints = [
            self._files.enter_context(contextlib.closing(open_model(self.model_folders[label], label)))
            for label in used
        ]
        if self.has_base:
            base, *experts = self.checkpoints
            self.recipe, kept = without_base(recipe, base, experts)
            self.checkpoints = [base, *(experts[t] for t in kept)]
        for checkpoint in self.checkpoints:
            quantised = quantisation_of(checkpoint)
            if quantised is not None:
                raise refuse_quantised(checkpoint.label, quantised)
        self.curvatures = [
            self._open_curvature(m.parameters.preconditioner_path, m.model) if self.method.curvature else None
            for m in self.recipe.models
        ]

    def _open_curvature(self, path: str | None, label: str) -> CurvatureFile | None:
        if path is None:
            return None
        file = CurvatureFile.open(resolve_file(path), label)
        return self._files.enter_context(contextlib.closing(file))

    def close(self) -> None:
        """Unmap and close everything."""
        self._files.close()

    def __enter__(self) -> Inputs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def stems(self) -> dict[str, str]:
        """What names of output files begin with, by part of the model: as the first checkpoint has them."""
        return self.checkpoints[0].stems

    @property
    def experts(self) -> list[Checkpoint]:
        return self.checkpoints[1:] if self.has_base else self.checkpoints

    @functools.cached_property
    def bytes_per_element(self) -> list[int]:
        """Input bytes that one element of each entry reads."""
        return [self._bytes_per_element(entry) for entry in self.entries]

    def _bytes_per_element(self, entry: TensorEntry) -> int:
        if entry.action == KEEP_BASE:
            return self.checkpoints[0].tensors[entry.sources[0]].dtype.itemsize
        pairs = [pair for pair in zip(self.checkpoints, entry.sources, strict=True) if pair[1] is not None]
        size = sum(checkpoint.tensors[source].dtype.itemsize for checkpoint, source in pairs)
        if entry.action == MERGE:
            names = [self._curvature_name(t, entry) for t in range(len(self.experts))]
            if None not in names:
                size += sum(f.bytes_per_element(n) for f, n in zip(self.curvatures, names, strict=True))
        return size

    @property
    def total_bytes(self) -> int:
        """Bytes that one pass over the inputs reads."""
        return sum(e.numel * size for e, size in zip(self.entries, self.bytes_per_element, strict=True))

    def fingerprint(self) -> list:
        """Names, sizes and times of all input files."""
        files = [c.fingerprint() for c in self.checkpoints]
        return files + [f.fingerprint() for f in self.curvatures if f is not None]

    def buffers(self, entry: TensorEntry) -> list:
        """The tensor in every checkpoint that is read, mapped."""
        pairs = zip(self.checkpoints, entry.sources, strict=True)
        return [c.buffer(source) for c, source in pairs if source is not None]

    def tensor(self, entry: TensorEntry) -> TensorInputs:
        """The mapped inputs of an entry that is computed. Under KEEP_BASE every expert is the base itself."""
        found = self.buffers(entry)
        if entry.action == KEEP_BASE:
            found = [found[0]] * len(found)
        base = found[0] if self.has_base else None
        experts = tuple(found[1:] if self.has_base else found)
        return TensorInputs(
            entry.name, entry.shape, entry.dtype, base, experts, self._tensor_curvatures(entry)
        )

    def _tensor_curvatures(self, entry: TensorEntry) -> tuple[Curvature, ...]:
        names = [self._curvature_name(t, entry) for t in range(len(self.experts))]
        if (
            entry.action == KEEP_BASE or None in names
        ):  # `missing_curvature: uniform`: no expert's curvature can be compared with 1
            return (Uniform(),) * len(names)
        correct = self.recipe.parameters.bias_correction
        return tuple(file.curvature(name, correct) for file, name in zip(self.curvatures, names, strict=True))

    def _curvature_name(self, t: int, entry: TensorEntry) -> str | None:
        """The name under which expert t's curvature file knows the tensor: its own, or that of the embeddings
        it is tied to."""
        file = self.curvatures[t]
        if file is None:
            return None
        source = entry.sources[t + self.has_base]
        return next((name for name in (entry.name, source) if file.find(name) is not None), None)

    def _entries(self) -> list[TensorEntry]:
        sources = self.matched.sources
        choices = {name: self._choice(name, found) for name, found in sources.items()}
        self._check_present({n: s for n, s in sources.items() if choices[n].action == buffers.MISSING})
        self._note(choices)
        entries = [
            self._entry(name, found, choices[name])
            for name, found in sources.items()
            if choices[name].action != buffers.DROP
        ]
        return self._with_curvature(entries)

    def _choice(self, name: str, sources: tuple[str | None, ...]) -> buffers.Choice:
        if None not in sources and not buffers.may_be_buffer(name):
            return buffers.PLAIN
        held = [
            None if source is None else self._held(checkpoint, source)
            for checkpoint, source in zip(self.checkpoints, sources, strict=True)
        ]
        return buffers.choose(name, held, self.recipe.parameters.extra_tensors, self.has_base)

    @staticmethod
    def _held(checkpoint: Checkpoint, source: str) -> buffers.Held:
        info = checkpoint.tensors[source]
        return buffers.Held(checkpoint.label, info.dtype, info.shape, lambda: checkpoint.buffer(source).data)

    def _note(self, choices: Mapping[str, buffers.Choice]) -> None:
        """One note for all tensors of one reason."""
        reasons: dict[str, list[str]] = {}
        for name, choice in choices.items():
            if choice.reason:
                reasons.setdefault(choice.reason, []).append(name)
            if choice.action == buffers.DROP:
                self.matched.left_out[name] = choice.reason
        self.notes += [f"{reason}: {listing(names)}" for reason, names in reasons.items()]

    def _check_present(self, sources: Mapping[str, tuple[str | None, ...]]) -> None:
        """InputError where tensors that some models lack are left."""
        lacking = {
            name: [c.label for c, source in zip(self.checkpoints, found, strict=True) if source is None]
            for name, found in sources.items()
            if None in found
        }
        if lacking:
            raise lacking_error(lacking, self.matched.renamed, self.checkpoints[0].label)

    def _entry(self, name: str, sources: tuple[str | None, ...], choice: buffers.Choice) -> TensorEntry:
        if choice.action == buffers.TAKE:
            info = self.checkpoints[choice.taken].tensors[sources[choice.taken]]
            only = tuple(source if t == choice.taken else None for t, source in enumerate(sources))
            return TensorEntry(name, info.shape, info.dtype, TAKE, only)
        pairs = zip(self.checkpoints, sources, strict=True)
        infos = [c.tensors[source] for c, source in pairs if source is not None]
        if choice.action == buffers.AVERAGE:
            dtype = self._output_dtype(name, infos)
            return TensorEntry(name, infos[0].shape, dtype, AVERAGE, sources)
        shapes = [info.shape for info in infos]
        if len(set(shapes)) > 1:
            self._raise_shapes(name, shapes)
        floats = [info.dtype.is_float for info in infos]
        if (any(floats) and not all(floats)) or (not any(floats) and len({i.dtype for i in infos}) > 1):
            listed = ", ".join(
                f"{c.label}: {i.dtype.name}" for c, i in zip(self.checkpoints, infos, strict=True)
            )
            raise InputError(f"{name}: types that cannot be merged ({listed})")
        if not all(floats):
            return TensorEntry(name, shapes[0], infos[0].dtype, COPY, sources)
        dtype = choice.dtype or self._output_dtype(name, infos)
        return TensorEntry(name, shapes[0], dtype, MERGE, sources)

    def _raise_shapes(self, name: str, shapes: list[tuple[int, ...]]) -> None:
        listed = ", ".join(
            f"{c.label}: {list(shape)}" for c, shape in zip(self.checkpoints, shapes, strict=True)
        )
        raise InputError(f"{name}: shapes differ ({listed}){shape_advice(name, shapes)}")

    def _output_dtype(self, name: str, infos: Sequence[TensorInfo]) -> DType:
        asked = self._precision.of(name, [info.dtype for info in infos])
        if asked is not None:
            return asked
        own = infos[0].dtype
        if own.name not in OUTPUT_NAMES:
            raise InputError(
                f"{self.checkpoints[0].label}: {name} is {own.name}, which a merge cannot be written in; "
                "set `dtype: bfloat16` in the recipe"
            )
        return own

    def _with_curvature(self, entries: list[TensorEntry]) -> list[TensorEntry]:
        if not self.method.curvature:
            return entries
        policy = self.recipe.parameters.missing_curvature
        missing: dict[str, list[str]] = {}
        checked = []
        for entry in entries:
            lacking = self._check_curvature(entry) if entry.is_computed else []
            if lacking and buffers.needs_no_curvature(entry.name, entry.shape):
                lacking = []  # all experts weigh alike there
            if lacking:
                missing[entry.name] = lacking
            kept = lacking and policy == "base"
            checked.append(replace(entry, action=KEEP_BASE) if kept else entry)
        if missing and policy == "error":
            labels = sorted({label for lacking in missing.values() for label in lacking})
            raise InputError(
                f"no curvature for {len(missing)} tensors in the files of {', '.join(labels)}: "
                f"{', '.join(missing)}; `missing_curvature: uniform` or `base` merges without it"
            )
        return checked

    def _check_curvature(self, entry: TensorEntry) -> list[str]:
        """Labels of the experts without curvature for the tensor; InputError for one that does not fit."""
        lacking = []
        for t, expert in enumerate(self.experts):
            name = self._curvature_name(t, entry)
            if name is None:
                lacking.append(expert.label)
                continue
            file = self.curvatures[t]
            found = file.curvature(name, self.recipe.parameters.bias_correction)
            if tuple(file.shape(name)) != entry.shape:
                raise InputError(
                    f"{file.path}: the curvature of {entry.name} has shape {list(file.shape(name))}, "
                    f"the tensor {list(entry.shape)}"
                )
            if self.recipe.models[t].parameters.rank and isinstance(found, Rank1):
                raise InputError(
                    f"{file.path}: holds row and column sums of {entry.name}, which have rank 1: leave out "
                    "`rank`, or give a file of all second moments"
                )
        return lacking
