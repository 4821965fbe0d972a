"""What statistics say of one tensor: what a method's `terms` are made of, beside its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class Selection(NamedTuple):
    """How one expert's threshold is found. rule: "all", "threshold" (an absolute saliency), "density" (share
    of elements) or "mass" (share of the total saliency)."""

    rule: str
    value: float = 0.0

    @property
    def surveyed(self) -> bool:
        """Whether the threshold depends on the tensors."""
        return self.rule in ("density", "mass")


def selection_of(parameters: Mapping[str, Any]) -> Selection:
    """The selection that an expert's settings ask for; a density of 1 keeps everything."""
    if parameters.get("precond_threshold") is not None:
        return Selection("threshold", parameters["precond_threshold"])
    density = parameters.get("density")
    if density is not None:
        return Selection("all") if density >= 1 else Selection("density", density)
    if parameters.get("saliency_mass") is not None:
        return Selection("mass", parameters["saliency_mass"])
    return Selection("all")


class Threshold(NamedTuple):
    """An expert's threshold, or while it is not known the bracket that should hold it.

    threshold: a float32 score, or the bracket's lowest; span: how many float32 numbers the bracket holds (0:
    it is `threshold`, or the threshold is known); census: whether scores are summed; masks: whether it is a
    threshold at all: False where a selection keeps everything.
    """

    threshold: float = 0.0
    span: int = 0
    census: bool = False
    masks: bool = True


KEEP_ALL = Threshold(masks=False)


@dataclass
class Found:
    """Per expert of one tensor, in recipe order. score_scales, bias_corrections: of its curvature; brackets:
    thresholds of scores; means: of g_t h_t^p; edit_scales: of masked edits; trims: least magnitudes.

    The rest is None until the statistic of that name was taken: gram: float64[T, T], or by groups; sums:
    float64[T, columns of masked sums]; row_scores: float32[rows] per expert.
    """

    shape: tuple[int, ...]
    score_scales: list[float]
    bias_corrections: list[float]
    brackets: list[Threshold]
    edit_scales: list[float]
    trims: list[float]
    means: list[float] | None = None
    gram: np.ndarray | None = None
    sums: np.ndarray | None = None
    row_scores: list[np.ndarray] | None = None
    extra: dict = field(default_factory=dict)
