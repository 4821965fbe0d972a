"""What statistics say of one tensor: what a method's `terms` are made of, beside its settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
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


class Rank(NamedTuple):
    """A place, from 0, in the order of scores: descending, equal ones by ascending index, or ascending, equal
    ones by ascending index too."""

    place: int
    descending: bool = True


class At(NamedTuple):
    """The element at a rank: its score and its flat index in the tensor."""

    score: float
    index: int


class Threshold(NamedTuple):
    """An expert's threshold, or while it is not known the bracket that should hold it.

    threshold: a float32 score, or the bracket's lowest; span: how many float32 numbers the bracket holds (0:
    it is `threshold`, or the threshold is known); census: whether scores are summed; masks: whether it is a
    threshold at all: False where a selection keeps everything; wanted: as in ExpertTerms.
    """

    threshold: float = 0.0
    span: int = 0
    census: bool = False
    masks: bool = True
    wanted: int = 0


KEEP_ALL = Threshold(masks=False)


@dataclass
class Found:
    """Per expert of one tensor, in recipe order. positions: their numbers in the recipe; seed, name_hash: of
    random numbers; is_matrix: it consists of matrices, as planning/roles.py tells them; score_scales,
    bias_corrections: of its curvature; brackets: thresholds of scores; means: of g_t h_t^p; edit_scales: of
    masked edits; trims: least magnitudes.

    The rest is None until the statistic of that name was taken: gram: float64[T, T], or [groups, T, T]; sums:
    float64[T, len(SUMS)] over the tensor, model_sums over the model; row_scores: float32[rows] per expert;
    at: what stands at the ranks that were asked for, per expert; signs: of the sums of votes over the model,
    how many more are positive than negative.
    """

    name: str
    shape: tuple[int, ...]
    positions: list[int]
    score_scales: list[float]
    bias_corrections: list[float]
    brackets: list[Threshold]
    edit_scales: list[float]
    trims: list[float]
    seed: int = 0
    name_hash: int = 0
    is_matrix: bool = False
    means: list[float] | None = None
    gram: np.ndarray | None = None
    sums: np.ndarray | None = None
    model_sums: np.ndarray | None = None
    row_scores: list[np.ndarray] | None = None
    at: list[list[At]] | None = None
    signs: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)
