"""What must hold of second moments before they may decide a merge."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..io.header import quoted
from ..io.reader import Checkpoint
from ..models.tied import embedding_of
from .source import Source


@dataclass(frozen=True)
class Coverage:
    """parameters: how many there should be second moments of; missing: those without, and the reason; extra:
    names that the model does not have."""

    parameters: int
    missing: dict[str, str]
    extra: tuple[str, ...]


def check_source(source: Source, model: Checkpoint | None, where: str) -> Coverage:
    """Compare names and shapes with the model; reads no moments.

    Without a model, `missing` is what the checkpoint itself knows of. Raises InputError where there are no
    second moments, a shape differs, or no parameter of the model is covered.
    """
    names = [moment.name for moment in source.moments]
    if not names:
        raise InputError(f"{where}: holds no second moments: extract from a checkpoint of Adam or Adafactor")
    if model is None:
        return Coverage(len(names) + len(source.skipped), source.skipped, ())
    for moment in source.moments:
        stored = model.tensors.get(moment.name)
        if stored is not None and stored.shape != moment.shape:
            raise InputError(
                f"{where}: second moments of {quoted(moment.name)} have shape {list(moment.shape)}, the "
                f"model's {list(stored.shape)}: give --model the folder of the model that was trained"
            )
    covered = set(names)
    expected = [
        name
        for name, info in model.tensors.items()
        if name in covered or (info.dtype.is_float and not _is_tied(name, model))
    ]
    if covered.isdisjoint(expected):
        raise InputError(
            f"{where}: has no second moments of any parameter of {model.root}; its names are like "
            f"{quoted(names[0])}: give --model the folder of the model that was trained"
        )
    return Coverage(
        len(expected),
        {name: source.skipped.get(name, "not in the optimizer") for name in expected if name not in covered},
        tuple(name for name in names if name not in model.tensors),
    )


class ValueCheck:
    """Whether the second moments of one parameter are finite and >= 0, seen piece by piece."""

    def __init__(self) -> None:
        self._seen = 0
        self._wrong = 0
        self._first: tuple[int, float] | None = None

    def add(self, values: np.ndarray) -> None:
        """The next elements, float32[n]."""
        # Comparisons with NaN are false.
        wrong = ~((values >= 0) & (values < np.inf))
        count = int(np.count_nonzero(wrong))
        if count and self._first is None:
            i = int(np.argmax(wrong))
            self._first = self._seen + i, float(values[i])
        self._wrong += count
        self._seen += values.size

    def finish(self, what: str) -> None:
        """Raise InputError, with count and first index, if some element was not finite or below zero."""
        if self._first is not None:
            index, value = self._first
            raise InputError(
                f"{what}: {self._wrong} of {self._seen} second moments are negative or not finite, "
                f"the first at element {index} ({value:g}): they cannot be used"
            )


def _is_tied(name: str, model: Checkpoint) -> bool:
    """Whether `name` is an output matrix that shares its values with the embedding."""
    shape = tuple(model.tensors[name].shape)
    return model.tied_embeddings and embedding_of(name, model.tensors, shape) is not None
