"""Vocabularies of unlike sizes without tokenizers: each matrix is cut to the fewest rows that a model has."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Mapping
from typing import TypeVar

from ..io.curvature import Held
from ..recipe.reference import Reference
from ..tensors.buffer import Buffer
from ..tensors.computed import Computed, Source
from .models import Info, Model
from .pairing import Moments
from .vocabulary import Gathered, is_vocabulary

logger = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)


def cut(
    models: Mapping[Reference, Model], moments: Mapping[Key, Moments]
) -> tuple[dict[Reference, Model], dict[Key, Moments], int | None]:
    """(models, moments, rows): those whose vocabulary tensors have the fewest rows of any model, with one
    warning; as they are, and None, where all have the same."""
    rows: dict[str, int] = {}
    differ = set()
    for model in models.values():
        for name, info in model.tensors.items():
            if is_vocabulary(name, info):
                if rows.setdefault(name, info.shape[0]) != info.shape[0]:
                    differ.add(name)
                rows[name] = min(rows[name], info.shape[0])
    if not differ:
        return dict(models), dict(moments), None
    least = min(rows[name] for name in differ)
    fewest = dict.fromkeys(rows, least)
    logger.warning("vocabularies are cut to %d rows: tokens beyond them are lost", least)
    return (
        {reference: _Cut(model, fewest) for reference, model in models.items()},
        {key: _CutMoments(file, fewest) for key, file in moments.items()},
        least,
    )


class _Cut:
    """A Model whose vocabulary tensors have fewer rows."""

    def __init__(self, model: Model, rows: Mapping[str, int]) -> None:
        self._model, self._rows = model, rows
        self.label, self.config, self.tied_embeddings = model.label, model.config, model.tied_embeddings
        self.what, self.fingerprint, self.close = model.what, model.fingerprint, model.close
        self.bytes_per_element = model.bytes_per_element
        self.tensors = {
            name: Info((rows[name], *i.shape[1:]) if name in rows else tuple(i.shape), i.dtype)
            for name, i in model.tensors.items()
        }

    def source(self, name: str, stands_for: str | None = None) -> Source:
        stored = self._model.source(name, stands_for)
        if name not in self._rows:
            return stored
        return _first_rows(stored, self.tensors[name].shape)


def _first_rows(stored: Source, shape: tuple[int, ...]) -> Source:
    if isinstance(stored, Buffer):
        return stored.slice(0, math.prod(shape))
    assert isinstance(stored, Computed)
    return Gathered.first(stored, shape)


class _CutMoments:
    """Second moments whose vocabulary tensors have fewer rows."""

    def __init__(self, file: Moments, rows: Mapping[str, int]) -> None:
        self.where, self.what = file.where, file.what
        self._file, self._rows = file, rows

    @property
    def source_format(self) -> str | None:
        """Where they are from, as the file says."""
        return self._file.source_format

    def held(self, name: str, bias_correction: bool = False) -> Held | None:
        found = self._file.held(name, bias_correction)
        if found is None or name not in self._rows or found.shape[0] < self._rows[name]:
            return found
        shape = (self._rows[name], *found.shape[1:])
        return Held(shape, found.curvature.slice(0, math.prod(shape)))
