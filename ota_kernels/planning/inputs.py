"""Opens everything a recipe names, and pairs it. Reads headers only."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..io.adapter import AdapterFile
from ..io.assets import tokenizer_folder
from ..io.curvature import CurvatureFile
from ..io.hub import resolve_file, resolve_model
from ..io.pack import PackFile, is_pack
from ..io.quantised import quantisation_of, refuse_quantised
from ..io.reader import Checkpoint, open_model
from ..io.vocabulary import read_tokens
from ..recipe.recipe import ModelEntry, Recipe
from ..recipe.reference import Reference
from ..recipe.vocabulary import Vocabulary
from .adapters import Adapted
from .check import compare, config_of, remarks
from .identity import twins, without_base
from .match import Renamed, RenamedMoments, prefixes_of
from .models import Dequantised, Model, Moments, Stored
from .outputs import OutputTensor
from .packed import BaseTiles, Packed, beside_weights, other_base, raise_other_base, shared_edit_of
from .pairing import Pairing
from .restack import restacked
from .roles import EMBEDDING, role_of
from .second_moments import moments_key
from .tables import table_of
from .truncation import cut
from .unscaled import Unscaled
from .vocabulary import Aligned, AlignedMoments, Alignment, with_rows

_ADVICE = "; --allow-crimes merges what there is"
_ADVICE_ON_FILES = "; -i leaves such tensors out, -u merges each over the files that have it"


class Inputs:
    """The open files of a recipe; a context manager. allow_crimes: models may differ in what they have and in
    what they compute, and notes say so; allow_differences: in what they compute; truncate: vocabulary tensors
    are cut to the fewest rows of any model; files: models are single files, whatever lies beside them, and
    which names are merged (pairing.py); lora_dtype: the type that models with adapters are rounded to;
    pack_base: the base of packs, None for the recipe's or where they say it is; unscaled: factors by which
    the edits of some models were multiplied, by their names: they are divided by them.

    recipe: without models that are the base itself; entries: output tensors in the order in which they are
    written; models: by their references; checkpoints: the files of each; untied: the output has an output
    matrix of its own although some model ties it to the embeddings; model_folders: every folder by its name
    in the recipe, the base first; notes: what a user should know of what was understood; differences: how
    many of the last notes are about models that differ in what they compute.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        allow_crimes: bool = False,
        allow_differences: bool = False,
        truncate: bool = False,
        files: str | None = None,
        lora_dtype: str | None = None,
        pack_base: str | None = None,
        unscaled: Mapping[str, float] | None = None,
    ) -> None:
        self.recipe, self._single, self._lora_dtype = recipe, files, lora_dtype
        self._pack_base, self._unscaled = pack_base, unscaled or {}
        self.method = recipe.method
        self._files = contextlib.ExitStack()
        self.notes: list[str] = []
        try:
            self._open()
            self._rename()
            self._align()
            self._cut_rows: int | None = None
            if truncate and self.alignment is None:
                self.models, self.moments, self._cut_rows = cut(self.models, self.moments)
            self.pairing = Pairing(
                self.recipe,
                self.models,
                self.moments,
                allow_crimes,
                _ADVICE if files is None else _ADVICE_ON_FILES,
                self._prefixes.unsafe,
                files,
                self.table,
            )
            self.notes += self.pairing.notes
            if files is None:
                self._compare(allow_crimes or allow_differences)
        except BaseException:
            self.close()
            raise
        self.untied = self.pairing.untied

    @property
    def entries(self) -> list[OutputTensor]:
        """The output tensors, in the order in which they are written."""
        return self.pairing.outputs

    def _open(self) -> None:
        recipe = self.recipe
        resolve = resolve_model if self._single is None else resolve_file
        self.model_folders: dict[str, Path] = {r.label: resolve(r.model.label) for r in recipe.references}
        self.adapter_folders: dict[str, Path] = {}
        used = dict.fromkeys(entry.reference for part in recipe.slices for entry in part.sources)
        self.checkpoints: dict[Reference, Checkpoint] = {}
        self.packs: dict[Reference, Packed] = {}
        self._opened: dict[str, tuple[Model, Checkpoint]] = {}
        self._base_tiles: dict[int, BaseTiles] = {}
        # Models whose tensors are read for themselves, or by a pack already.
        self._read = {reference.label for reference in used if reference.adapter is None}
        models = {reference: self._model(reference) for reference in used}
        files = self.checkpoints | {reference: model.pack for reference, model in self.packs.items()}
        plain = {r: file for r, file in files.items() if r.adapter is None}
        self.recipe = recipe = without_base(recipe, plain)
        kept = dict.fromkeys(entry.reference for part in recipe.slices for entry in part.sources)
        self.models: dict[Reference, Model] = {reference: models[reference] for reference in kept}
        experts = dict.fromkeys(e.reference for part in recipe.slices for e in part.experts)
        self.notes += twins([plain[reference] for reference in experts if reference in plain])
        self.moments: dict[tuple[int, str], Moments] = {}
        for part in recipe.slices:
            for entry in part.experts:
                self._open_moments(entry)
        self.moments_files = list(self.moments.values())
        self.table = table_of(recipe)

    def _model(self, reference: Reference) -> Model:
        path = self.model_folders[reference.label]
        if is_pack(path):
            model: Model = self._packed(reference, path)
        else:
            model, self.checkpoints[reference] = self._stored(path, reference.label)
            if reference.label in self._unscaled:
                label = self.recipe.base.label
                base, _ = self._stored(self.model_folders[label], label)
                model = Unscaled(model, base, self._unscaled[reference.label])
        if reference.adapter is None:
            return model
        name = reference.adapter_label
        self.adapter_folders[name] = folder = resolve_model(name)
        adapter = self._files.enter_context(contextlib.closing(AdapterFile(folder, reference.label)))
        adapted = Adapted(model, adapter, reference.label, self._lora_dtype)
        return self._files.enter_context(contextlib.closing(adapted))

    def _stored(self, path: Path, label: str) -> tuple[Model, Checkpoint]:
        """A model of weights, opened once."""
        key = os.path.realpath(path)
        if key in self._opened and self._opened[key][0].label == label:
            return self._opened[key]
        checkpoint = open_model(path, label, self._single is not None)
        model: Model = Stored(checkpoint)
        self._files.enter_context(contextlib.closing(model))
        quantised = quantisation_of(checkpoint)
        if quantised is not None:
            if not quantised.scaled:
                raise refuse_quantised(label, quantised)
            model = Dequantised(checkpoint, quantised)
            self.notes.append(f"{label}: {quantised.note}")
        self._opened[key] = model, checkpoint
        return model, checkpoint

    def _packed(self, reference: Reference, path: Path) -> Packed:
        """An expert that is packed, on its base: the recipe's, or where the pack says that it is."""
        pack = self._files.enter_context(contextlib.closing(PackFile(path, reference.label)))
        named = self.recipe.base
        tried = [] if named is None or named.adapter is not None else [(named.label, named.model.label)]
        said = (pack.base.path, pack.base.model) if self._pack_base is None else (self._pack_base,)
        tried += [(label, label) for label in dict.fromkeys(said) if label]
        reasons: dict[str, str] = {}
        for label, place in tried:
            try:
                folder = resolve_model(place)
                if is_pack(folder) or os.path.realpath(folder) in reasons:
                    continue
                base, checkpoint = self._stored(folder, label)
                tiles = self._base_tiles.setdefault(id(base), BaseTiles(base))
                reason = other_base(pack, base, tiles)
            except InputError as error:
                reasons.setdefault(place, str(error))
                continue
            if reason is None:
                break
            reasons[os.path.realpath(folder)] = f"{folder} {reason}"
        else:
            raise_other_base(pack, list(reasons.values()))
        view = Path(self._files.enter_context(tempfile.TemporaryDirectory(prefix="ota-pack-")))
        beside_weights(pack, folder, view)
        self.checkpoints.setdefault(reference, checkpoint)
        self.model_folders[reference.label] = view
        shared = shared_edit_of(pack)
        if shared is not None:
            self._files.enter_context(contextlib.closing(shared))
        model = Packed(base, pack, config_of(view), shared, label not in self._read, tiles)
        self._read.add(label)
        self.packs[reference] = model
        return model

    def _rename(self) -> None:
        """Give all models the names of the first one, where only prefixes differ that say nothing."""
        parts = self.recipe.slices
        entries = [e for part in parts for e in part.sources] if all(part.whole for part in parts) else []
        models = {e.reference: self.models[e.reference] for e in entries}
        self._prefixes = prefixes_of(models)
        self.notes += self._prefixes.notes
        for reference, own in self._prefixes.own.items():
            self.models[reference] = Renamed(self.models[reference], own)
            for entry in (e for part in parts for e in part.experts):
                if entry.reference == reference and moments_key(entry) in self.moments:
                    key = moments_key(entry)
                    self.moments[key] = RenamedMoments(self.moments[key], own)

    def _align(self) -> None:
        """Give all models one vocabulary, where one is asked for. Without a tokenizer.json or embeddings,
        tokenizers are only compared and copied, as io/assets.py does it."""
        asked, self.alignment = self.recipe.vocabulary, None
        if asked is None:
            return
        first = self.recipe.references[0] if isinstance(asked.source, str) else asked.source
        folders = dict(self.model_folders)
        if first.label not in folders:
            folders[first.label] = resolve_model(first.model.label)
        plain = asked == Vocabulary(asked.source)
        embeds = any(map(_embeds, self.models.values()))
        if plain and (not embeds or read_tokens(folders[first.label]) is None):
            return
        ordered = {r: self.models[r] for r in self.recipe.references if r in self.models}
        self.alignment = alignment = Alignment(asked, ordered, folders, self.recipe.references[0])
        aligned = {r: Aligned(model, r, alignment) for r, model in ordered.items()}
        owners = {moments_key(e): e.reference for part in self.recipe.slices for e in part.experts}
        files = {owners[key]: file for key, file in self.moments.items()}
        self.models = dict(aligned)
        self.moments = {
            key: AlignedMoments(file, owners[key], aligned, alignment, files)
            for key, file in self.moments.items()
        }

    def _compare(self, allow: bool) -> None:
        """Whether models of equal shapes compute the same, but for what layers and a vocabulary change."""
        shapes = {entry.name: entry.shape for entry in self.entries}
        source = None
        if self.alignment is None and self._cut_rows is None:
            source = tokenizer_folder(self.model_folders, self.recipe.tokenizer_source)
        self.notes += remarks(self.model_folders)
        found = compare(
            self.model_folders,
            shapes,
            source,
            allow,
            parts=filter(None, self.stems),
            edit=self.edited_config,
            restacked=bool(self.pairing.donors),
        )
        self.differences = len(found)
        self.notes += found

    @property
    def stems(self) -> dict[str, str]:
        """What names of output files begin with, by part of the model: as the first model has them."""
        first = self.recipe.references[0]
        return (self.checkpoints.get(first) or next(iter(self.checkpoints.values()))).stems

    def _open_moments(self, entry: ModelEntry) -> None:
        path, key = entry.parameters.get("preconditioner_path"), moments_key(entry)
        if path is not None and key not in self.moments:
            file = CurvatureFile.open(resolve_file(path), entry.model)
            self.moments[key] = self._files.enter_context(contextlib.closing(file))

    def again(self, recipe: Recipe) -> Inputs:
        """These files, which stay this one's to close, under a recipe that differs in parameters only."""
        other = copy.copy(self)
        other.__dict__.pop("bytes_per_element", None)
        other._files = contextlib.ExitStack()
        plain = {r: file for r, file in self.checkpoints.items() if r.adapter is None}
        other.recipe = without_base(recipe, plain)
        unsafe = self._prefixes.unsafe
        other.pairing = Pairing(
            other.recipe, self.models, self.moments, self.pairing.allow_crimes, _ADVICE, unsafe
        )
        other.untied = other.pairing.untied
        return other

    def close(self) -> None:
        """Unmap and close everything."""
        self._files.close()

    def __enter__(self) -> Inputs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @functools.cached_property
    def bytes_per_element(self) -> list[float]:
        """Input bytes that one element of each entry reads."""
        return [entry.bytes_per_element for entry in self.entries]

    @property
    def total_bytes(self) -> int:
        """Bytes that one pass over the inputs reads."""
        return int(sum(e.numel * size for e, size in zip(self.entries, self.bytes_per_element, strict=True)))

    def edited_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """What config.json of the output says beside types and ties, from that of the model that gives it."""
        found = config
        for module, donors in self.pairing.donors.items():
            found = restacked(found, [(model.config, number) for model, number in donors], module)
        found = found if self.alignment is None else self.alignment.edited_config(found)
        found = found if self._cut_rows is None else with_rows(found, self._cut_rows)
        architecture = self.recipe.references[0].architecture
        return found if architecture is None else found | {"architectures": [architecture]}

    def fingerprint(self) -> list:
        """Names, sizes and times of all input files."""
        files = [model.fingerprint() for model in self.models.values()]
        files += [file.fingerprint() for file in self.moments_files]
        files += [] if self.table is None else [self.table]
        return files + ([] if self.alignment is None else self.alignment.fingerprint())


def _embeds(model: Model) -> bool:
    """Whether the model has rows for tokens."""
    return any(role_of(name, tuple(info.shape)) == EMBEDDING for name, info in model.tensors.items())
