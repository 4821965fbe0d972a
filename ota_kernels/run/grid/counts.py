"""What one read of the model counts, by high half, by group, and by low half where that is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

BINS = 1 << 16
ENTRY_BYTES = 256  # Python's share of one collected tile


class Collected:
    """Keeps the low halves, 2 bytes each, so that thresholds and groups follow from one pass. Gives up beyond
    `room` bytes."""

    def __init__(self, experts: int, groups: int, room: int) -> None:
        self._parts: list[list[tuple[int, np.ndarray, np.ndarray]]] | None = [[] for _ in range(experts)]
        self._groups, self._room = groups, room

    def add(self, t: int, group: int, offsets: np.ndarray, lows: np.ndarray) -> None:
        """lows: uint16, ascending within each slot; slot j of expert t is lows[offsets[j]:offsets[j + 1]]."""
        if self._parts is None:
            return
        self._room -= lows.nbytes + offsets.nbytes + ENTRY_BYTES
        if self._room < 0:
            self._parts = None
        else:
            self._parts[t].append((group, offsets, lows))

    def low_counts(self, t: int, slot: int) -> np.ndarray | None:
        """Counts by low half, int64[65536]; None where that is not known."""
        if self._parts is None:
            return None
        parts = [lows[offsets[slot] : offsets[slot + 1]] for _, offsets, lows in self._parts[t]]
        return np.bincount(np.concatenate([*parts, np.zeros(0, np.uint16)]), minlength=BINS)

    def at_least(self, t: int, slot: int, low: int) -> np.ndarray | None:
        """Elements of each group whose low half is `low` or more, int64[groups]; None where not known."""
        if self._parts is None:
            return None
        kept = np.zeros(self._groups, np.int64)
        for group, offsets, lows in self._parts[t]:
            kept[group] += _count_from(lows[offsets[slot] : offsets[slot + 1]], low)
        return kept


class Counted:
    """Counts the low halves in a fixed amount of memory: by value over the whole model, and by group from the
    thresholds on that are known already."""

    def __init__(
        self, wanted: Sequence[np.ndarray], groups: int, known: Iterable[tuple[int, int, int]]
    ) -> None:
        """known: (expert, slot, low half) of thresholds."""
        self._counts = [np.zeros(w.size * BINS, np.int64) for w in wanted]
        self._kept = {key: np.zeros(groups, np.int64) for key in known}

    def add(self, t: int, group: int, offsets: np.ndarray, lows: np.ndarray) -> None:
        slots = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
        np.add.at(self._counts[t], slots * BINS + lows, 1)
        for (expert, slot, low), kept in self._kept.items():
            if expert == t:
                kept[group] += _count_from(lows[offsets[slot] : offsets[slot + 1]], low)

    def low_counts(self, t: int, slot: int) -> np.ndarray:
        return self._counts[t][slot * BINS : (slot + 1) * BINS].copy()

    def at_least(self, t: int, slot: int, low: int) -> np.ndarray | None:
        return self._kept.get((t, slot, low))


def _count_from(ascending: np.ndarray, low: int) -> int:
    return ascending.size - int(np.searchsorted(ascending, np.uint16(low)))


@dataclass
class Pass:
    """What one read of the model counted, per expert t: wanted[t], the high halves it looked into (uint32,
    ascending; a slot is a place in it); above[t], int64[groups, slots], scores with a higher half; counts[t]
    and lows[t], the histogram of all high halves."""

    wanted: list[np.ndarray]
    above: list[np.ndarray]
    counts: list[np.ndarray]
    lows: list[np.ndarray]
    sink: Collected | Counted

    def slot(self, t: int, prefix: int) -> int | None:
        place = int(np.searchsorted(self.wanted[t], prefix))
        return place if place < self.wanted[t].size and self.wanted[t][place] == prefix else None


def low_halves(scores: np.ndarray, wanted: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The low halves of scores above 0 whose high half is wanted: (offsets int32[slots + 1], uint16), those
    of slot j in ascending order at [offsets[j], offsets[j + 1])."""
    bits = scores.view(np.uint32)
    chosen = member.take(bits >> 16)
    if member[0]:
        chosen &= bits > 0
    found = np.sort(bits[chosen])
    offsets = np.append(np.searchsorted(found, wanted << 16), found.size).astype(np.int32)
    return offsets, (found & 0xFFFF).astype(np.uint16)
