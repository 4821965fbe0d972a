"""What a merge counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..tensors.result import MergeStats


@dataclass
class Tally:
    """What a merge counted for one tensor or a part of it: per expert the kept edits and the saliency
    threshold (None where everything is kept). repeats: how often a tensor of one tile was merged again
    because a threshold lay outside its bracket."""

    kept: list[int]
    unkept: int = 0
    overflow: int = 0
    repaired: int = 0
    thresholds: list[float | None] = field(default_factory=list)
    repeats: int = 0

    @classmethod
    def of(cls, stats: MergeStats, thresholds: list[float | None]) -> Tally:
        return cls(list(stats.kept), stats.unkept, stats.overflow, stats.repaired, thresholds)

    def add(self, other: Tally, times: int = 1) -> None:
        """Count another part of the same tensor (times -1: no longer)."""
        self.kept = [a + times * b for a, b in zip(self.kept, other.kept, strict=True)]
        self.unkept += times * other.unkept
        self.overflow += times * other.overflow
        self.repaired += times * other.repaired
        self.repeats += times * other.repeats
        self.thresholds = other.thresholds
