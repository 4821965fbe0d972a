"""What merge_report.json says."""

from __future__ import annotations

import logging
import platform

import numpy as np

from . import __version__
from .inputs import MERGE, Inputs
from .ledger import Ledger
from .planning import Plan
from .survey import Survey

logger = logging.getLogger(__name__)

REPORT_NAME = "merge_report.json"


def build_report(
    inputs: Inputs,
    plan: Plan,
    survey: Survey,
    ledger: Ledger,
    fingerprint: str,
    seconds: dict[str, float],
) -> dict:
    """Per expert and per tensor what was kept, and how the merge ran. backend: the one that finished it;
    backends: all that took part, where a merge was resumed.

    Thresholds are saliencies; an expert's is None where it differs between tensors, or where everything or
    nothing is kept. left_out: stored tensors that are not written, with the reason. ties: edits kept beyond
    an expert's density because they equal the threshold.
    """
    counted = [(e, ledger.tallies[i]) for i, e in enumerate(inputs.entries) if e.action == MERGE]
    overflow = sum(tally.overflow for _, tally in counted)
    if overflow:
        logger.warning("%d merged values exceed the range of the output type and became infinite", overflow)
    return {
        "fingerprint": fingerprint,
        "method": inputs.recipe.merge_method,
        "experts": [
            _expert(t, model.model, counted)
            | {"ties": survey.ties(t, {e.name: tally.kept[t] for e, tally in counted})}
            for t, model in enumerate(inputs.recipe.models)
        ],
        "tensors": {
            entry.name: {
                "elements": entry.numel,
                "kept": tally.kept,
                "unkept": tally.unkept,
                "thresholds": tally.thresholds,
            }
            for entry, tally in counted
        },
        "not_merged": {e.name: e.action for e in inputs.entries if e.action != MERGE},
        "left_out": inputs.matched.left_out,
        "unkept": sum(tally.unkept for _, tally in counted),
        "overflow": overflow,
        "repaired": sum(tally.repaired for _, tally in counted),
        "bytes_read": plan.bytes_in,
        "bytes_written": plan.bytes_out,
        "passes": plan.passes,
        "repeats": ledger.repeats + sum(tally.repeats for _, tally in counted),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "backend": plan.backend,
        "backends": ledger.backends,
        "threads": plan.threads,
        "tile_elements": plan.tile_elements,
        "resumed": not ledger.fresh,
        "versions": {
            "ota_kernels": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
    }


def _expert(t: int, model: str, counted: list) -> dict:
    kept = sum(tally.kept[t] for _, tally in counted)
    total = sum(entry.numel for entry, _ in counted)
    thresholds = {tally.thresholds[t] for entry, tally in counted if entry.numel}
    return {
        "model": model,
        "threshold": thresholds.pop() if len(thresholds) == 1 else None,
        "kept": kept,
        "total": total,
        "density": kept / total if total else 1.0,
    }
