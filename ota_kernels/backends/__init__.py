"""The backends, and which of them runs.

A backend is a module with four functions over one tile of one tensor (ota_kernels.tensors.TensorInputs):
`merge`, and for surveys `histogram`, `edits` and `power_sum`; `verify()` answers (ok, reason).
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

from ..errors import BackendError

logger = logging.getLogger(__name__)

NAMES = ("native", "reference")


def select(name: str = "auto") -> ModuleType:
    """The backend of that name, or for "auto" the fastest that runs here.

    Raises BackendError with the reason when a backend that was asked for cannot run.
    """
    if name != "auto" and name not in NAMES:
        raise BackendError(f"unknown backend {name!r}: choose auto, {' or '.join(NAMES)}")
    reasons = []
    for candidate in NAMES if name == "auto" else (name,):
        backend = importlib.import_module(f"{__name__}.{candidate}")
        ok, reason = backend.verify()
        if ok:
            logger.info("backend: %s (%s)", candidate, reason)
            return backend
        reasons.append(f"{candidate}: {reason}")
    raise BackendError(f"no backend can run here ({'; '.join(reasons)})")
