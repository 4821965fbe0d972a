"""Work cut into pieces that can be taken one by one: by a process of several, or for a sample."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..tensors.tile import TensorInputs
from .decide import Decider
from .engine import Range


def ranges_of(
    decider: Decider, index: int, tensor: TensorInputs, gaps: Iterable[tuple[int, int]], elements: int
) -> list[Range]:
    """The gaps of tensor number `index` in ranges of about so many elements; in one piece, where something is
    found of the whole tensor before or after it merges."""
    gaps = list(gaps)
    local = decider.brackets and not decider.model_scope
    if decider.needs.of_tensor or local or tensor.numel <= elements:
        return [(index, start, stop) for start, stop in gaps]
    whole = math.lcm(decider.score_terms(tensor).whole, tensor.columns)
    step = max(elements // whole, 1) * whole
    return [
        (index, begin, min(begin + step, stop)) for start, stop in gaps for begin in range(start, stop, step)
    ]
