"""The recipe to begin with: OTA with FFG that needs no tuning (bench/quality shows what it gives)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# The edits that hold 99 % of an expert's saliency, in weights of one unit for all, as long as if none had
# been averaged away.
ADVISED = {"saliency_mass": 0.99, "power": 1.0, "normalise": "model", "lambda": "auto"}


def advised(base: str, experts: Sequence[str], moments: Sequence[str | None]) -> dict[str, Any]:
    """A recipe, as YAML holds it. moments: files of the experts' second moments; without any, saliency is the
    squared edit and the average a plain one."""
    models: list[dict[str, Any]] = [{"model": expert} for expert in experts]
    for model, path in zip(models, moments, strict=True):
        if path is not None:
            model["parameters"] = {"preconditioner_path": path}
    parameters: dict[str, Any] = dict(ADVISED)
    if None in moments:
        parameters["missing_curvature"] = "uniform"
    return {"merge_method": "ota", "base_model": base, "models": models, "parameters": parameters}
