"""Opens everything a recipe names, and pairs it. Reads headers only."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

from ..io.curvature import CurvatureFile
from ..io.hub import resolve_file, resolve_model
from ..io.reader import Checkpoint
from ..recipe.recipe import ModelEntry, Recipe
from ..recipe.reference import Reference
from .models import Model, Stored
from .pairing import OutputTensor, Pairing, moments_key


class Inputs:
    """The open files of a recipe; a context manager. allow_crimes: models may differ in what they have.

    entries: output tensors in the order in which they are written; models: by their references; untied: the
    output has an output matrix of its own although some model ties it to the embeddings; model_folders: every
    folder by its name in the recipe, the base first.
    """

    def __init__(self, recipe: Recipe, *, allow_crimes: bool = False) -> None:
        self.recipe = recipe
        self.method = recipe.method
        self._files = contextlib.ExitStack()
        try:
            self._open()
            self.pairing = Pairing(recipe, self.models, self.moments, allow_crimes)
        except BaseException:
            self.close()
            raise
        self.entries: list[OutputTensor] = self.pairing.outputs
        self.untied = self.pairing.untied

    def _open(self) -> None:
        recipe = self.recipe
        self.model_folders: dict[str, Path] = {r.label: resolve_model(r.label) for r in recipe.references}
        used = dict.fromkeys(entry.reference for part in recipe.slices for entry in part.entries)
        self.models: dict[Reference, Model] = {reference: self._model(reference) for reference in used}
        self.moments: dict[tuple[int, str], CurvatureFile] = {}
        for part in recipe.slices:
            for entry in part.experts:
                self._open_moments(entry)

    def _model(self, reference: Reference) -> Model:
        checkpoint = Checkpoint.open(self.model_folders[reference.label], reference.label)
        return self._files.enter_context(contextlib.closing(Stored(checkpoint)))

    def _open_moments(self, entry: ModelEntry) -> None:
        path, key = entry.parameters.get("preconditioner_path"), moments_key(entry)
        if path is not None and key not in self.moments:
            file = CurvatureFile.open(resolve_file(path), entry.model)
            self.moments[key] = self._files.enter_context(contextlib.closing(file))

    def close(self) -> None:
        """Unmap and close everything."""
        self._files.close()

    def __enter__(self) -> Inputs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @functools.cached_property
    def bytes_per_element(self) -> list[int]:
        """Input bytes that one element of each entry reads."""
        return [entry.bytes_per_element for entry in self.entries]

    @property
    def total_bytes(self) -> int:
        """Bytes that one pass over the inputs reads."""
        return sum(e.numel * size for e, size in zip(self.entries, self.bytes_per_element, strict=True))

    def fingerprint(self) -> list:
        """Names, sizes and times of all input files."""
        files = [model.fingerprint() for model in self.models.values()]
        return files + [file.fingerprint() for file in self.moments.values()]
