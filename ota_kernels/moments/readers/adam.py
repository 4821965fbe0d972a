"""Adam and its kin (AdamW, NAdam, RAdam): exp_avg_sq, one value per element, as it is stored."""

from __future__ import annotations

from ..source import Moment
from .state import State, pieces

_KEY = "exp_avg_sq"


def fits(state: State) -> bool:
    return _KEY in state


def shape(state: State) -> tuple[int, ...]:
    """The parameter's shape."""
    return state.shape(_KEY)


def moment(state: State, name: str, beta2: float | None) -> Moment:
    """Raises InputError for a tensor that is not of floating point, or not plain."""
    return Moment(name, shape(state), pieces(state.buffer(_KEY)), state.step, beta2)
