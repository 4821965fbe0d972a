"""What merges of the same tensors found before they merged, kept for the next ones.

A parameter says what depends on it (recipe/parameters.py): settings that differ in "length" only measure the
same merged edit, and those that differ in "values" find the same; those that differ in "masks" score alike,
and share a sample of the scores.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..planning.outputs import OutputTensor
from ..recipe.methods import Method
from ..recipe.settings import Settings
from ..tensors.array import Array

_MOST = 32  # statistics of rows are as large as a column of each matrix
# What samples of scores, what is found, and what is measured of merged edits depend on.
_SCORED, _FOUND, _EDIT = ("scores",), ("scores", "masks"), ("scores", "masks", "values")

Key = tuple
Result = TypeVar("Result")


@dataclass
class Surveys:
    """What was found by settings that find the same, under keys that say of what. decided: exact thresholds
    of groups, by the number of the tensor, None for the model; samples: of scores; edits: what was measured
    of merged edits, by what they depend on, of which `edit` is asked for."""

    samples: dict[Key, Array] = field(default_factory=dict)
    found: dict[str | None, Any] = field(default_factory=dict)
    decided: dict[int | None, list[float | None]] = field(default_factory=dict)
    edits: OrderedDict[Key, Any] = field(default_factory=OrderedDict)
    edit: Key = ()

    def of(self, name: str | None, find: Callable[[], Result]) -> Result:
        """What was found of a tensor, or of the model (None)."""
        if name not in self.found:
            self.found[name] = find()
        return self.found[name]

    def measured(self, elements: int, measure: Callable[[], Result]) -> Result:
        """What a sample of so many elements says of the merged edit, whatever its factor."""
        return _taken(self.edits, (*self.edit, elements), measure)

    def keep(self, decided: dict[int | None, list[float | None]]) -> None:
        """Thresholds that a merge has decided."""
        self.decided.update(decided)

    def sampled(
        self, scope: Key, experts: Sequence[int], take: Callable[[Sequence[int]], list[Array]]
    ) -> list[Array]:
        """The samples of experts; those that are known are not taken again."""
        missing = [t for t in experts if (*scope, t) not in self.samples]
        if missing:
            self.samples.update(zip(((*scope, t) for t in missing), take(missing), strict=True))
        return [self.samples[(*scope, t)] for t in experts]


class Once(Surveys):
    """Of a merge that is the only one: nothing is kept, so that nothing grows with the model."""

    def of(self, name: str | None, find: Callable[[], Result]) -> Result:
        return find()

    def measured(self, elements: int, measure: Callable[[], Result]) -> Result:
        return measure()

    def keep(self, decided: dict[int | None, list[float | None]]) -> None:
        pass

    def sampled(
        self, scope: Key, experts: Sequence[int], take: Callable[[Sequence[int]], list[Array]]
    ) -> list[Array]:
        return take(experts)


class _Counted:
    """What several merges ask for, each once: made by the first, and dropped after the last."""

    def __init__(self, uses: int, is_worker: Callable[[], bool]) -> None:
        self._uses, self._is_worker = uses, is_worker
        self._lock = threading.Lock()
        self._entries: dict[Key, _Entry] = {}

    def of(self, key: Key, make: Callable[[], Result]) -> Result:
        with self._lock:
            entry = self._entries.setdefault(key, _Entry(self._uses))
        # A worker does not wait: whoever makes it may need that worker.
        if not entry.lock.acquire(blocking=not self._is_worker()):
            return make()
        try:
            if not entry.made:
                entry.value, entry.made = make(), True
            entry.left -= 1
            value = entry.value
            if entry.left <= 0:
                with self._lock:
                    self._entries.pop(key, None)
            return value
        finally:
            entry.lock.release()


@dataclass
class _Entry:
    left: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    made: bool = False
    value: Any = None


class Shared(Surveys):
    """Of merges that run at once. edits: of those that measure the same; found: of those that find the same;
    scores: of those that score alike; first: of the first merge that finds the same, None where it is this
    one. told: set when that one's thresholds are known, or never will be."""

    def __init__(
        self, edits: _Counted, found: _Counted, scores: _Counted, first: Shared | None = None
    ) -> None:
        super().__init__()
        self._edits, self._found, self._scores, self.is_first = edits, found, scores, first is None
        self.told = threading.Event() if first is None else first.told
        if first is not None:
            self.decided = first.decided

    def keep(self, decided: dict[int | None, list[float | None]]) -> None:
        if self.is_first:
            self.decided.update(decided)
            self.told.set()

    def of(self, name: str | None, find: Callable[[], Result]) -> Result:
        return self._found.of((name,), find)

    def measured(self, elements: int, measure: Callable[[], Result]) -> Result:
        return self._edits.of((elements,), measure)

    def sampled(
        self, scope: Key, experts: Sequence[int], take: Callable[[Sequence[int]], list[Array]]
    ) -> list[Array]:
        return self._scores.of((*scope, *experts), lambda: take(experts))

    @staticmethod
    def among(
        merges: Sequence[tuple[Method, Sequence[OutputTensor]]], is_worker: Callable[[], bool]
    ) -> list[Shared]:
        """One for each merge."""

        def counted(affects: tuple[str, ...]) -> list[_Counted]:
            keys = [_key(method, outputs, affects) for method, outputs in merges]
            each = {key: _Counted(n, is_worker) for key, n in Counter(keys).items()}
            return [each[key] for key in keys]

        firsts: dict[int, Shared] = {}
        made = []
        for edits, found, scores in zip(counted(_EDIT), counted(_FOUND), counted(_SCORED), strict=True):
            made.append(Shared(edits, found, scores, firsts.get(id(found))))
            firsts.setdefault(id(found), made[-1])
        return made


class Kept:
    """Surveys of merges of the same inputs, of the last settings that differ in what they find."""

    def __init__(self) -> None:
        self._surveys: OrderedDict[Key, Surveys] = OrderedDict()
        self._samples: OrderedDict[Key, dict[Key, Array]] = OrderedDict()

    def of(self, method: Method, outputs: Sequence[OutputTensor]) -> Surveys:
        """What is known for these outputs; empty at first."""
        scores, masks, edit = (_key(method, outputs, affects) for affects in (_SCORED, _FOUND, _EDIT))
        samples = _taken(self._samples, scores, dict)
        surveys = _taken(self._surveys, masks, lambda: Surveys(samples))
        surveys.edit = edit
        return surveys


def _taken(kept: OrderedDict, key: Key, make):
    """The last used of `_MOST` values stay."""
    if key not in kept:
        kept[key] = make()
        while len(kept) > _MOST:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


def _key(method: Method, outputs: Sequence[OutputTensor], affects: tuple[str, ...]) -> Key:
    """What of the outputs' settings has these effects. Equal keys: the same is found."""
    shared = [p.key for p in method.shared if p.affects in affects]
    own = [p.key for p in method.own if p.affects in affects and p.key != "preconditioner_path"]

    def chosen(settings: Settings) -> Key:
        of_experts = tuple(tuple(e[key] for key in own) for e in settings.experts)
        # A table of weights is not kept as a key: it stands in the weights.
        return settings.has_base, tuple(settings.shared.get(key) for key in shared), of_experts

    of_settings = {id(o.settings): chosen(o.settings) for o in outputs}
    return (method.name, *((o.name, o.action, o.positions, of_settings[id(o.settings)]) for o in outputs))
