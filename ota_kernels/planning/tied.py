"""Which stored tensors are copies of others: output matrices tied to the embeddings, and aliases.

A name proves nothing: a reward model's `score`, a layer's `attention.output` or the head of a language model
inside of a larger one are tensors of their own. A stored tensor counts as a copy only when configuration and
values, or all values, say so.

Functions take models (planning/models.py): `tensors`, `config` and `source(name)` are used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..io.pages import advise
from ..io.table import say
from ..io.ties import is_head, tie_in_config
from ..tensors import array as resident
from ..tensors.computed import Source, is_computed
from .models import Model
from .roles import EMBEDDING, role_of

_NUMBER = re.compile(r"(^|\.)\d+\.")

_SAMPLES, _SAMPLE_BYTES = 256, 64
_WHOLE_BYTES = 1 << 20  # tensors up to this size are compared as a whole
_STEP_BYTES = 1 << 24
_MOST_ALIASES = 64  # more tensors that some models lack are no aliases: the models differ


def embedding_of(head: str, tensors: Mapping[str, Any], shape: tuple[int, ...] | None = None) -> str | None:
    """The embedding that the output matrix `head` shares its weights with where it is tied.

    shape: of the output matrix, where it is known; an embedding of another shape then is none. Of several,
    the one whose modules are nearest; None where there is none or two are as near.
    """
    if not is_head(head):
        return None
    found = [
        name
        for name in say(tensors, _outside_layers)
        if name != head
        and role_of(name, tensors[name].shape) == EMBEDDING
        and shape in (None, tuple(tensors[name].shape))
    ]
    near = [_shared_modules(head, name) for name in found]
    best = [name for name, shared in zip(found, near, strict=True) if shared == max(near)]
    return best[0] if len(best) == 1 else None


def _outside_layers(names: Iterable[str]) -> list[str]:
    return [name for name in names if not _NUMBER.search(name)]


def _shared_modules(first: str, second: str) -> int:
    shared = 0
    for one, other in zip(first.split("."), second.split("."), strict=False):
        if one != other:
            break
        shared += 1
    return shared


def head_source(
    model: Model, head: str, shape: tuple[int, ...] | None, others_lack_it: bool
) -> tuple[str | None, bool]:
    """(where the model has the values of an output matrix, whether that is its embedding).

    shape: of the matrix in a model that stores it; others_lack_it: some model stores none. A stored matrix is
    the model's own unless it is a copy of the embedding: config.json says so and the values agree wherever
    they are looked at, or config.json is silent, another model stores none, and all values agree.
    """
    said = tie_in_config(model.config, head)
    if head in model.tensors:
        shape = tuple(model.tensors[head].shape)
        embedding = None if said is False else embedding_of(head, model.tensors, shape)
        if embedding is None or model.tensors[head].dtype != model.tensors[embedding].dtype:
            return head, False
        if said is None and not others_lack_it:
            return head, False
        same = _same(model, head, embedding, look=bool(said))
        return (embedding, True) if same else (head, False)
    if said is False:
        return None, False
    embedding = embedding_of(head, model.tensors, shape) or embedding_of(head, model.tensors)
    return embedding, embedding is not None


def are_equal(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two arrays of bytes (uint8[n]) are equal; reads them up to the first difference, and lets go of
    the pages of files."""
    if first.size != second.size:
        return False
    for start in range(0, first.size, _STEP_BYTES):
        pair = [data[start : start + _STEP_BYTES] for data in (first, second)]
        same = np.array_equal(*pair)
        for data in pair:
            advise(data, "dontneed")
        if not same:
            return False
    return True


def look_equal(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two arrays of bytes agree: all of them up to 1 MiB, at 256 places beyond."""
    if first.size != second.size or first.size <= _WHOLE_BYTES:
        return are_equal(first, second)
    last = first.size - _SAMPLE_BYTES
    places = (last * i // (_SAMPLES - 1) for i in range(_SAMPLES))
    return all(np.array_equal(first[p : p + _SAMPLE_BYTES], second[p : p + _SAMPLE_BYTES]) for p in places)


def aliases(models: Sequence[Model], sources: Mapping[str, tuple[str | None, ...]]) -> dict[str, str]:
    """Tensors that some models lack and that are, in every model that has them, copies of one tensor that all
    models have: name -> that tensor. Matrices only, value by value; constant ones are none.

    sources: output name -> its name in each model, None where a model lacks it.
    """
    lacking = [name for name, found in sources.items() if None in found]
    if len(lacking) > _MOST_ALIASES:
        return {}
    shared = [name for name, found in sources.items() if None not in found]
    found = {name: _copied_from(models, name, shared, sources) for name in lacking}
    return {name: source for name, source in found.items() if source is not None}


def _copied_from(
    models: Sequence[Model], name: str, shared: Iterable[str], sources: Mapping[str, tuple[str | None, ...]]
) -> str | None:
    owners = [t for t, own in enumerate(sources[name]) if own is not None]
    first = models[owners[0]]
    info = first.tensors[sources[name][owners[0]]]
    if len(info.shape) < 2:
        return None
    source = first.source(sources[name][owners[0]])
    if len(source) == 0 or _is_constant(source):
        return None
    for other in shared:
        like = first.tensors[sources[other][owners[0]]]
        if (like.shape, like.dtype) == (info.shape, info.dtype) and all(
            _holds_copy(models[t], sources[name][t], sources[other][t]) for t in owners
        ):
            return other
    return None


def _holds_copy(model: Model, name: str, other: str) -> bool:
    return _same(model, name, other, look=True) and _same(model, name, other, look=False)


def _is_constant(source: Source) -> bool:
    """Whether all elements are the same, bit for bit."""
    data, size = source.slice(0, len(source)).data, source.dtype.itemsize
    compare = resident.is_equal if resident.is_resident(data) else are_equal
    return compare(data[size:], data[:-size])


def _same(model: Model, name: str, other: str, look: bool) -> bool:
    """Whether two tensors of a model have the same values; look: at some places of large ones only."""
    one, two = model.source(name), model.source(other)
    if is_computed(one) or is_computed(two):
        return _same_computed(one, two, look)
    if resident.is_resident(one.data):
        return resident.is_equal(one.data, two.data)
    return look_equal(one.data, two.data) if look else are_equal(one.data, two.data)


def _same_computed(one: Source, two: Source, look: bool) -> bool:
    """As `_same`, of what is computed where it is asked for, such as a matrix with an adapter on it."""
    if len(one) != len(two) or one.dtype != two.dtype:
        return False
    n = len(one)
    step = _SAMPLE_BYTES if look and n > _WHOLE_BYTES else _STEP_BYTES // 4
    starts = range(0, n, step)
    if look and n > _WHOLE_BYTES:
        starts = ((n - step) * i // (_SAMPLES - 1) for i in range(_SAMPLES))
    return all(
        np.array_equal(one.slice(s, min(s + step, n)).data, two.slice(s, min(s + step, n)).data)
        for s in starts
    )
