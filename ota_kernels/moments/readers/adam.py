"""Adam and its kin (AdamW, AMSGrad, NAdam, LAMB, ScheduleFree): exp_avg_sq, one value per element."""

from __future__ import annotations

from .state import State
from .values import Values

_KEY = "exp_avg_sq"


def shape(state: State) -> tuple[int, ...]:
    """The parameter's shape."""
    return state.shape(_KEY)


def values(state: State) -> Values:
    """Raises InputError for a tensor that is not of floating point, or not plain."""
    return state.values(_KEY)
