"""Accuracies as shares of the experts' own, and what a difference of two merges is worth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .merges import Scored

_DRAWS = 2000


class Scale:
    """What merges are measured by: each task's accuracy by its own expert, and by the base."""

    def __init__(self, base: Scored, experts: Mapping[str, Scored]) -> None:
        self.tasks = tuple(experts)
        self._own = {task: _bits(scored, task) for task, scored in experts.items()}
        self._base = {task: _bits(base, task) for task in self.tasks}

    def shares(self, scored: Scored) -> dict[str, float]:
        """Accuracy / the expert's, percent."""
        return {t: 100 * _bits(scored, t).mean() / self._own[t].mean() for t in scored.right}

    def mean(self, scored: Scored) -> float:
        return float(np.mean(list(self.shares(scored).values())))

    def worst(self, scored: Scored) -> float:
        return min(self.shares(scored).values())

    def difference(self, one: Scored, other: Scored) -> tuple[float, float, float]:
        """Of their means, and a paired 95 % bootstrap interval over texts; an expert's texts are drawn with
        theirs."""
        random, drawn = np.random.default_rng(0), np.zeros(_DRAWS)
        for task in self.tasks:
            change = _bits(one, task) - _bits(other, task)
            at = random.integers(0, len(change), (_DRAWS, len(change)))
            drawn += 100 * change[at].mean(1) / self._own[task][at].mean(1) / len(self.tasks)
        low, high = np.percentile(drawn, (2.5, 97.5))
        return self.mean(one) - self.mean(other), float(low), float(high)

    def gain(self, task: str, graft: Scored) -> float:
        """Of what an expert gained over the base on its task, percent that a graft has."""
        base, own = self._base[task].mean(), self._own[task].mean()
        return 100 * (_bits(graft, task).mean() - base) / (own - base)

    def gain_difference(
        self, ones: Mapping[str, Scored], others: Mapping[str, Scored]
    ) -> tuple[float, float, float]:
        """Of the mean gains of grafts by task, with a paired interval as in `difference`."""
        random, drawn = np.random.default_rng(0), np.zeros(_DRAWS)
        for task in self.tasks:
            change, reach = (
                _bits(ones[task], task) - _bits(others[task], task),
                self._own[task] - self._base[task],
            )
            at = random.integers(0, len(change), (_DRAWS, len(change)))
            drawn += 100 * change[at].mean(1) / np.maximum(reach[at].mean(1), 0.01) / len(self.tasks)
        means = [np.mean([self.gain(t, grafts[t]) for t in self.tasks]) for grafts in (ones, others)]
        low, high = np.percentile(drawn, (2.5, 97.5))
        return float(means[0] - means[1]), float(low), float(high)


def _bits(scored: Scored, task: str) -> np.ndarray:
    return np.frombuffer(scored.right[task].encode(), np.uint8).astype(float) - ord("0")
