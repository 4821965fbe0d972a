"""One vocabulary for all models: the rows of embeddings and output matrices, of weights and of curvature, are
gathered where they are needed, so that every method sees aligned rows."""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, RecipeError
from ..io.curvature import Held
from ..io.ties import is_head
from ..io.vocabulary import Tokens, joined, read_tokens, stripped, written
from ..recipe.reference import Reference
from ..recipe.vocabulary import TokenRule, Vocabulary
from ..tensors.buffer import Buffer
from ..tensors.computed import Computed, Source
from ..tensors.curvature import Curvature, Full, Uniform
from ..tensors.dtypes import BY_NAME
from .models import Info, Model, Moments
from .roles import EMBEDDING, role_of
from .tied import head_source

logger = logging.getLogger(__name__)

_VOCABULARY = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embeddings?|shared|lm_head|embed_out|output|"
    r"output_layer|score|predictions\.decoder|vocab_projector)\.(weight|bias)$|(^|\.)cls\.predictions\.bias$"
)
_ABSENT, _MEAN = -1, -2  # in an index: the token's default row, and the mean of all rows


@dataclass(frozen=True)
class Place:
    """A row of a model."""

    model: Reference
    row: int


class Alignment:
    """The joined vocabulary. first: the model whose ids are kept, unless another is asked for, and whose rows
    come first where a token is missing. ids: of its tokens; size: rows of its matrices; index: by model, its
    own row for each output row, or _ABSENT, or _MEAN; defaults: for rows that some model lacks, the places
    that are averaged, none for zeros; files: the tokenizer's."""

    def __init__(
        self,
        asked: Vocabulary,
        models: Mapping[Reference, Model],
        folders: Mapping[str, Path],
        first: Reference,
    ) -> None:
        self.asked, self.models = asked, models
        references = list(models)
        found = {r: read_tokens(folders[r.label]) for r in references}
        self._limits = {r: vocabulary_rows(models[r]) for r in references}
        base, whole = self._base(first, found, folders)
        limit = self._limits.get(base, math.inf)
        kept = stripped(whole, limit) if self._strips else whole
        others = [(t, self._limits[r]) for r, t in found.items() if t is not None and r != base]
        self.ids, new = joined(kept, others if asked.source == "union" else [], asked.tokens)
        self.files = written(kept, new, kept is not whole)
        count = max(self.ids.values(), default=-1) + 1
        self.count, self.size = count, -(-count // asked.multiple) * asked.multiple
        for r in references:
            if found[r] is None:
                logger.warning("%s has no tokenizer.json: its tokens are taken to be the base's", r.label)
        tokens = {r: (t or whole).ids for r, t in found.items()}
        self._base_reference = first
        self._places(tokens)
        self._fingerprint = [t.fingerprint for t in (whole, *found.values()) if t is not None]

    @property
    def _strips(self) -> bool:
        return self.asked.source in ("base", "union")

    def _base(
        self,
        first: Reference,
        found: Mapping[Reference, Tokens | None],
        folders: Mapping[str, Path],
    ) -> tuple[Reference, Tokens]:
        """The model whose ids are kept, and its tokens."""
        source = self.asked.source
        base = first if isinstance(source, str) else source
        tokens = found[base] if base in found else read_tokens(folders[base.label])
        if tokens is None:
            raise RecipeError(
                f"tokenizer: {base.label} has no tokenizer.json: save it with transformers' AutoTokenizer, "
                "which writes one"
            )
        return base, tokens

    def _places(self, tokens: Mapping[Reference, Mapping[str, int]]) -> None:
        """Each model's rows, and the default rows."""
        self.index = {r: np.full(self.size, _MEAN, np.int64) for r in self.models}
        self.defaults: dict[int, list[Place]] = {}
        nobody = []
        for token, i in self.ids.items():
            rule = self.asked.tokens.get(token, TokenRule())
            owners = [
                Place(r, tokens[r][token])
                for r in self.models
                if tokens[r].get(token, math.inf) < self._limits[r]
            ]
            for r in self.models:
                self.index[r][i] = _ABSENT
            if not rule.force:
                for place in owners:
                    self.index[place.model][i] = place.row
            if rule.force or len(owners) < len(self.models):
                self.defaults[i] = self._default(token, rule, owners, tokens)
                if not owners and rule.kind == "default":
                    nobody.append(token)
        named = [token for token in nobody if token in self.asked.tokens]
        if named:
            raise RecipeError(f"tokenizer: no model has the token {named[0]!r}: give it a `source`")
        if nobody:
            logger.warning(
                "tokenizer: no model has rows for %d tokens, %s first: zeros", len(nobody), repr(nobody[0])
            )

    def _default(
        self, token: str, rule: TokenRule, owners: list[Place], tokens: Mapping[Reference, Mapping[str, int]]
    ) -> list[Place]:
        if rule.kind == "zero":
            return []
        if rule.kind == "default":
            own = [place for place in owners if place.model == self._base_reference]
            return own or owners
        if rule.model not in self.models:
            raise RecipeError(
                f"tokenizer: the row of {token!r} is to come from {rule.model.label}, which is no input"
            )
        row = rule.index if rule.index is not None else tokens[rule.model].get(rule.token or token)
        if row is None or row >= self._limits[rule.model]:
            which = rule.index if rule.index is not None else rule.token or token
            raise RecipeError(
                f"tokenizer: {rule.model.label} has no row for {which!r}, of which that of {token!r} is made"
            )
        return [Place(rule.model, row)]

    def edited_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """With the number of rows."""
        return with_rows(config, self.size)

    def fingerprint(self) -> list:
        """Changes with the tokenizers."""
        return list(self._fingerprint)


def with_rows(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """config.json of a model whose vocabulary has so many rows."""
    inner = config.get("text_config")
    if "vocab_size" not in config and isinstance(inner, Mapping) and "vocab_size" in inner:
        return config | {"text_config": dict(inner) | {"vocab_size": rows}}
    return config | {"vocab_size": rows}


def vocabulary_rows(model: Model) -> int:
    """From which id on a token has no row."""
    config = model.config or {}
    inner = config.get("text_config")
    said = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, Mapping) else None)
    rows = [i.shape[0] for name, i in model.tensors.items() if role_of(name, tuple(i.shape)) == EMBEDDING]
    known = [n for n in (said, *rows) if type(n) is int]
    if not known:
        raise InputError(
            f"{model.label}: has no embeddings and no vocab_size, so that no vocabulary can be aligned"
        )
    return min(known)


def is_vocabulary(name: str, info: Info) -> bool:
    """Whether a tensor has a row for each token, as far as its name tells."""
    return _VOCABULARY.search(name) is not None and bool(info.shape) and info.dtype.is_float


class Aligned:
    """A Model: another one whose vocabulary tensors have the rows of the alignment."""

    def __init__(self, model: Model, reference: Reference, alignment: Alignment) -> None:
        self.label, self._model, self.reference, self._alignment = model.label, model, reference, alignment
        self.config, self.tied_embeddings = model.config, model.tied_embeddings
        self.what, self.fingerprint, self.close = model.what, model.fingerprint, model.close
        self.bytes_per_element = model.bytes_per_element
        self.rows = {
            name: i.shape[0]
            for name, i in model.tensors.items()
            if is_vocabulary(name, i) and i.shape[0] >= vocabulary_rows(model)
        }
        self.tensors = {
            name: Info((alignment.size, *i.shape[1:]) if name in self.rows else tuple(i.shape), i.dtype)
            for name, i in model.tensors.items()
        }

    def source(self, name: str, stands_for: str | None = None) -> Source:
        stored = self._model.source(name)
        if name not in self.rows:
            return stored
        index = self._alignment.index[self.reference]
        shape = self.tensors[name].shape
        columns = max(1, math.prod(shape[1:]))
        if (index == np.arange(len(index))).all():  # only cut
            return stored if len(index) == self.rows[name] else stored.slice(0, len(index) * columns)
        wide = self.tensors[name].dtype.name == "float64"
        others = self._defaults(stands_for or name)
        return Gathered(shape, stored, index, others, "float64" if wide else "float32", self.what(name))

    def _defaults(self, name: str) -> dict[int, list[tuple[Source, int]]]:
        """For each row that this model lacks, the rows that are averaged."""
        sources: dict[Reference, Source] = {}
        found = {}
        for i in np.flatnonzero(self._alignment.index[self.reference] == _ABSENT).tolist():
            found[i] = []
            for place in self._alignment.defaults[i]:
                if place.model not in sources:
                    sources[place.model] = self._other(place.model, name)
                found[i].append((sources[place.model], place.row))
        return found

    def _other(self, reference: Reference, name: str) -> Source:
        model = self._alignment.models[reference]
        own = name if name in model.tensors else None
        if is_head(name):
            shape = tuple(model.tensors[name].shape) if own else None
            own, _ = head_source(model, name, shape, False)
        if own is None:
            raise InputError(
                f"{model.label}: has no tensor {name}, from which rows of {self.label} are to be made"
            )
        return model.source(own)


class Gathered(Computed):
    """A matrix whose rows are those of another by an index, and made of others' rows where it says so."""

    def __init__(
        self,
        shape: tuple[int, ...],
        stored: Source | Curvature,
        index: np.ndarray,
        defaults: Mapping[int, list[tuple[Source | Curvature, int]]],
        dtype: str,
        origin: str,
    ) -> None:
        super().__init__(shape, BY_NAME[dtype], origin, BY_NAME[dtype].itemsize)
        self._stored, self._index, self._of_others = stored, index, defaults

    @classmethod
    def first(cls, stored: Computed, shape: tuple[int, ...]) -> Gathered:
        """The first rows of what is computed."""
        dtype = "float64" if stored.dtype.name == "float64" else "float32"
        return cls(shape, stored, np.arange(shape[0]), {}, dtype, stored.origin)

    def rows(self, first: int, stop: int) -> np.ndarray:
        index = self._index[first:stop]
        out = np.zeros((stop - first, self.columns), self.dtype.name)
        own = np.flatnonzero(index >= 0)
        if own.size:
            out[own] = self._taken(self._stored, index[own])
        for i in np.flatnonzero(index == _ABSENT).tolist():
            places = self._of_others[first + i]
            for source, row in places:
                # Second moments are divided by one correction, the own one.
                own_scale, scale = (getattr(x, "bias_correction", 1.0) for x in (self._stored, source))
                out[i] += self._taken(source, np.array([row]))[0] * (own_scale / scale / len(places))
        padding = np.flatnonzero(index == _MEAN)
        if padding.size:
            out[padding] = self._mean
        return out

    def _taken(self, source: Source | Curvature, rows: np.ndarray) -> np.ndarray:
        """Rows of a matrix, as floats."""
        if (np.diff(rows) == 1).all():
            part = source.slice(int(rows[0]) * self.columns, (int(rows[-1]) + 1) * self.columns)
            if isinstance(part, Buffer):
                return _floats(part, self.dtype.name).reshape(rows.size, self.columns)
        positions = (rows[:, None] * self.columns + np.arange(self.columns)).reshape(-1)
        part = source.gather(positions)
        if isinstance(part, Uniform):
            return np.ones((rows.size, self.columns), self.dtype.name)
        values = part.values if isinstance(part, Full) else part
        return _floats(values, self.dtype.name).reshape(rows.size, self.columns)

    @functools.cached_property
    def _mean(self) -> np.ndarray:
        """Of the rows that are tokens'."""
        total, count = np.zeros(self.columns, np.float64), 0
        tokens = np.flatnonzero(self._index != _MEAN)
        for run in np.array_split(tokens, max(1, tokens.size * self.columns >> 18)):
            if run.size and run[-1] - run[0] == run.size - 1:
                total += self.rows(int(run[0]), int(run[-1]) + 1).sum(axis=0, dtype=np.float64)
            else:
                for i in run.tolist():
                    total += self.rows(i, i + 1)[0]
            count += run.size
        return (total / max(count, 1)).astype(self.dtype.name)

    def parts(self, first: int, stop: int) -> Iterator[Buffer]:
        own = self._index[first:stop]
        own = own[own >= 0]
        if own.size and isinstance(self._stored, Buffer):
            yield self._stored.slice(int(own.min()) * self.columns, (int(own.max()) + 1) * self.columns)


def _floats(buffer: Buffer, dtype: str) -> np.ndarray:
    if buffer.dtype.name == "float64":
        return buffer.data.copy().view(np.float64).astype(dtype)
    return np.array(buffer.float32(), dtype)


class AlignedMoments:
    """The second moments of a model whose vocabulary is aligned. Rows that it lacks have those of the models
    that they come from, 0 where these have none."""

    def __init__(
        self,
        file: Moments,
        reference: Reference,
        aligned: Mapping[Reference, Aligned],
        alignment: Alignment,
        files: Mapping[Reference, Moments],
    ) -> None:
        self.where, self.what = file.where, file.what
        self._file, self._reference, self._aligned = file, reference, aligned
        self._alignment, self._files = alignment, files

    @property
    def source_format(self) -> str | None:
        """Where they are from, as the file says."""
        return self._file.source_format

    def held(self, name: str, bias_correction: bool = False) -> Held | None:
        found = self._file.held(name, bias_correction)
        rows = self._aligned[self._reference].rows.get(name)
        if found is None or rows is None:
            return found
        if found.shape[0] != rows:
            return found  # of another shape than the tensor: an error where it is paired
        index = self._alignment.index[self._reference]
        shape = (len(index), *found.shape[1:])
        columns = max(1, math.prod(shape[1:]))
        if (index == np.arange(len(index))).all():
            whole = len(index) == rows
            return Held(shape, found.curvature if whole else found.curvature.slice(0, len(index) * columns))
        defaults: dict[int, list[tuple[Curvature, int]]] = {}
        for i in np.flatnonzero(index == _ABSENT).tolist():
            held = [(self._of(p.model, name, bias_correction), p.row) for p in self._alignment.defaults[i]]
            defaults[i] = [(curvature, row) for curvature, row in held if curvature is not None]
        values = Gathered(shape, found.curvature, index, defaults, "float32", self.what(name))
        return Held(shape, Full(values, found.curvature.bias_correction))

    @functools.lru_cache(64)  # noqa: B019 (as many as there are models and vocabulary tensors)
    def _of(self, reference: Reference, name: str, bias_correction: bool) -> Curvature | None:
        file = self._files.get(reference)
        found = None if file is None else file.held(name, bias_correction)
        return None if found is None else found.curvature
