"""What is found once for the whole model, and the terms by which scores are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..select.bracket import Bracket
from ..tensors.found import Selection, Threshold
from ..tensors.terms import ExpertTerms, Terms, Words, score_scale
from ..tensors.tile import TensorInputs
from .order import Located

if TYPE_CHECKING:
    from .scale import Scale


@dataclass(frozen=True)
class ModelFound:
    """What is found once for the whole model, per expert: the score threshold (None where it is decided
    elsewhere), or the bracket in which it is expected; the mean weight that `normalise: model` divides by.
    spread: how large tensors are sampled. A tensor may be sampled again, by a process that resumes: it must
    find the same bracket, whatever the page cache holds then. sums: masked sums (tensors.found.SUMS), at:
    what stands at the ranks of each expert's scores, signs: how many more sums of votes are positive than
    negative; where a method needs them; scale: of the merged edit, where one was found (run/scale.py)."""

    thresholds: tuple[float | None, ...]
    brackets: tuple[Bracket | None, ...]
    mean_weights: tuple[float | None, ...]
    spread: bool
    sums: tuple[tuple[float, ...], ...] | None = None
    scale: Scale | None = None
    at: tuple[tuple[Located, ...], ...] | None = None
    signs: int | None = None


def open_threshold(bracket: Bracket, selection: Selection) -> Threshold:
    """Until it is known."""
    census = selection.rule == "mass" or bracket.span == 0
    return Threshold(bracket.lowest, bracket.span, census)


def open_thresholds(model: ModelFound, selections: Sequence[Selection]) -> list[Threshold | None]:
    """Those of the whole model that are settled after the merge, by expert."""
    pairs = zip(model.brackets, selections, strict=True)
    return [None if bracket is None else open_threshold(bracket, s) for bracket, s in pairs]


def scores_of(experts: int, tile: TensorInputs) -> Terms:
    """By which the saliencies of a tile's experts are computed, whatever a recipe selects."""
    scales = [score_scale(tile.base is not None, c.bias_correction) for c in tile.curvatures]
    words = Words(score="curvature" if tile.base is None else "saliency")
    return Terms(words, tuple(ExpertTerms(score_scale=scales[t]) for t in range(experts)))
