"""What must hold of second moments before they may decide a merge."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..io.header import quoted
from ..io.reader import Checkpoint
from ..planning.tied import embedding_of
from .readers.content import BUFFER
from .readers.kinds import nothing
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
    second moments, a shape differs, no parameter of the model is covered, or where the checkpoint has second
    moments of parameters that the model lacks while the model has parameters without.
    """
    names = [moment.name for moment in source.moments]
    if not names:
        raise nothing(source.skipped.values(), where)
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
        if name in covered or (info.dtype.is_float and not _is_tied(name, model) and not BUFFER.search(name))
    ]
    if covered.isdisjoint(expected):
        raise InputError(
            f"{where}: has no second moments of any parameter of {model.root}; its names are like "
            f"{quoted(names[0])}: give --model the folder of the model that was trained"
        )
    missing = {n: source.skipped.get(n, "not in the optimizer") for n in expected if n not in covered}
    extra = tuple(name for name in names if name not in model.tensors)
    unknown = [name for name, reason in missing.items() if name not in source.skipped]
    if extra and unknown:
        raise InputError(
            f"{where}: covers {len(covered) - len(extra)} of {len(expected)} parameters of {model.root}: it "
            f"has {len(extra)} that the model lacks, like {quoted(extra[0])}, while the model has "
            f"{len(unknown)} without second moments, like {quoted(unknown[0])}: give --model the folder of "
            "the model that was trained, or --names with the names in the optimizer's order"
        )
    return Coverage(len(expected), missing, extra)


class ValueCheck:
    """Whether the second moments of one parameter are finite and >= 0, seen piece by piece.

    some: whether one is not 0.
    """

    def __init__(self) -> None:
        self.some = False
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
        self.some = self.some or bool(values.any())
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
