"""Tensors whose thresholds a device finds while it merges them: shares of elements, over one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..select import thresholds
from ..select.bracket import reach_of
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
