"""How a merge goes about its thresholds, and when it saves what it has: time and memory, never the result.

The defaults were measured; tests take others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..select.bracket import Bracket, bracket_of, cluster_count
from ..select.sample import are_cached
from ..select.settle import BATCH, FEW
from ..tensors.array import Array
from ..tensors.buffer import Buffer
from ..tensors.found import Selection
from ..tensors.segment import CHUNK, Segment


@dataclass(frozen=True)
class Rules:
    """bracket: from sampled scores to a bracket; clusters: how many are sampled of so many elements; cached:
    whether the page cache holds files; direct: elements of a tensor that is selected from directly, since a
    sample would be most of it; on_device: whether a device finds thresholds while it merges, where it can;
    mapped: elements up to which a sampled tensor's pages stay mapped until it is
    merged.

    few, batch: as in settle.py; clock: in seconds; checkpoint_seconds: how much work a kill may undo (those
    undecided are a tenth of what is read: spilling them takes no time); batch_seconds: settled tiles of so
    much time are recorded together, which waits for the disk; copy_bytes: of tensors that are copied, at a
    time.

    before: told of each step before it is taken, by the thread that takes it: "tile" (a kernel, on a
    segment), "patch" (a segment's undecided elements), "missed" (thresholds outside their brackets are looked
    for, segment None).
    """

    bracket: Callable[[Selection, Array], Bracket | None] = bracket_of
    clusters: Callable[[int], int] = cluster_count
    cached: Callable[[Sequence[Buffer]], bool] = are_cached
    direct: int = 1 << 15
    on_device: bool = True
    mapped: int = 4 * CHUNK
    few: int = FEW
    batch: int = BATCH
    clock: Callable[[], float] = time.monotonic
    checkpoint_seconds: float = 10.0
    batch_seconds: float = 1.0
    copy_bytes: int = 1 << 24
    before: Callable[[str, Segment | None], None] = lambda step, segment: None


RULES = Rules()
