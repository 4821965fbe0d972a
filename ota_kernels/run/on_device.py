"""Thresholds that a device finds while it merges: shares of elements, over one tensor or all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..select import thresholds
from ..select.bracket import Bracket, reach_of
from ..select.sample import runs_of_tensor
from ..tensors.found import Selection, Threshold
from ..tensors.terms import Sample
from ..tensors.tile import TensorInputs

if TYPE_CHECKING:
    from .decide import Decider


def finds(decider: Decider, tensor: TensorInputs) -> bool:
    """Whether a tensor that is merged as one tile is one of them."""
    if not (decider.brackets and tensor.is_resident) or decider.model_scope or decider.keeps_base(tensor):
        return False
    shares = all(s.rule != "mass" for s in decider.selections(tensor))
    plain = shares and not tensor.origins and decider.rules.on_device
    return plain and decider.backend.finds(decider.score_terms(tensor).words)


def finds_together(decider: Decider) -> bool:
    """Whether the thresholds over the model are such, and all its tiles are given at once."""
    if not (decider.brackets and decider.model_scope and decider.rules.on_device) or decider.needs.matrices:
        return False
    shares = all(s.rule != "mass" for s in decider.selections())
    return shares and all(
        tensor.is_resident
        and not tensor.origins
        and decider.backend.finds(decider.score_terms(tensor).words, together=True)
        for tensor in decider.tensors
    )


def bracketed(bracket: Bracket, selection: Selection, elements: int) -> Threshold:
    """The threshold over the model that is to be found in the bracket, of so many elements."""
    count = thresholds.count_of_density(selection.value, elements)
    return Threshold(bracket.lowest, max(bracket.span, 1), wanted=count)


def wanted(selection: Selection, tensor: TensorInputs) -> Threshold | None:
    """The threshold that is to be found, or known where nothing is kept; None where a selection is no
    density."""
    if selection.rule != "density":
        return None
    count = thresholds.count_of_density(selection.value, tensor.numel)
    return Threshold(wanted=count) if count else Threshold(thresholds.KEEP_NOTHING)


def sample_of(decider: Decider, tensor: TensorInputs) -> Sample | None:
    """What tells where thresholds lie; None: all elements do."""
    if tensor.numel <= decider.rules.direct:
        return None
    starts: Sequence[int] = runs_of_tensor(tensor, decider.rules.clusters(tensor.numel))
    return Sample(starts, reach_of(len(starts)))
