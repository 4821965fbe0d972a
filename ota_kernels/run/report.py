"""What merge_report.json says."""

from __future__ import annotations

import io
import json
import logging
import platform
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import __version__
from ..planning.inputs import Inputs
from ..planning.outputs import MERGE
from ..planning.plan import Plan
from ..planning.second_moments import moments_key
from ..recipe.recipe import ModelEntry
from ..select.thresholds import count_of_density
from ..tensors.found import Selection
from .bundles import Bundle, by_output
from .decide import Decider
from .found import ModelFound
from .state import State

logger = logging.getLogger(__name__)

REPORT_NAME = "merge_report.json"
_SHORT = 6  # items of an object that are written in one line

# Merged edits of a length between these, in mean lengths of the experts' edits, are nothing to remark upon.
_SHORT, _LONG = 0.7, 3.0


def build_report(
    inputs: Inputs,
    plan: Plan,
    decider: Decider,
    state: State,
    fingerprint: str,
    seconds: dict[str, float],
    bundles: Mapping[int, Bundle],
) -> dict:
    """Per expert and per tensor what was kept, and how the merge ran. backend: the one that finished it;
    backends: all that took part, where a merge was resumed.

    Thresholds are saliencies; an expert's is None where it differs between tensors, or where everything or
    nothing is kept. left_out: stored tensors that are not written, with the reason. ties: edits kept beyond
    an expert's density because they equal the threshold; missing: edits that it asks for and that have no
    score above 0.
    """
    merged = {i: e for i, e in enumerate(inputs.entries) if e.action == MERGE and state.counts[i] is not None}
    whole = {i: replace(e, shape=bundles[i].inputs.shape) if i in bundles else e for i, e in merged.items()}
    counted = [(e, state.counts[i]) for i, e in whole.items()]
    overflow = sum(counts.overflow for _, counts in counted)
    if overflow:
        logger.warning("%d merged values exceed the range of the output type and became infinite", overflow)
    return {
        "fingerprint": fingerprint,
        "method": inputs.recipe.merge_method,
        "experts": [
            _expert(model.model, _of_expert(model.number, counted), decider)
            | {"curvature": _curvature(inputs, model)}
            for model in inputs.recipe.models
        ],
        "tensors": {
            entry.name: {
                "elements": entry.numel,
                "kept": counts.kept,
                "unkept": counts.unkept,
                "thresholds": counts.thresholds,
            }
            for entry, counts in by_output(inputs.entries, state.counts, bundles)
        },
        "not_merged": {e.name: e.action for e in inputs.entries if e.action != MERGE},
        "left_out": inputs.pairing.left_out,
        "lambda": _scale(decider, state.found),
        "unkept": sum(counts.unkept for _, counts in counted),
        "overflow": overflow,
        "repaired": sum(counts.repaired for _, counts in counted),
        "bytes_read": plan.bytes_in,
        "bytes_written": plan.bytes_out,
        "passes": plan.passes,
        "repeats": state.repeats + sum(counts.repeats for _, counts in counted),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "backend": plan.backend,
        "backends": state.backends,
        "threads": plan.threads,
        "tile_elements": plan.tile_elements,
        "resumed": not state.fresh,
        "versions": {
            "ota_kernels": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
    }


def _scale(decider: Decider, found: ModelFound) -> dict | None:
    """used: the factor of the merged edit, None where tensors differ in it; auto, match_norm: the factors
    that those keys would find (run/scale.py); length: ||merged edit|| / mean_t ||d_t||; norms: each
    ||d_t||; sampled: of so many elements. None where the method has no factor, or a sample does not tell."""
    if found.scale is None:
        return None
    settings = [decider.settings(tensor) for tensor in decider.tensors]
    factor = found.scale.factor(settings[0])
    used = {s.lambda_ * factor * (s.shared.get("layers") or 1.0) for s in settings}
    return {
        "used": used.pop() if len(used) == 1 else None,
        "auto": found.scale.auto,
        "match_norm": found.scale.match_norm,
        "length": float(f"{factor * found.scale.length:.4g}"),
        "norms": list(found.scale.norms),
        "sampled": found.scale.elements,
    }


def length_note(scale: dict | None, experts: int) -> list[str]:
    """A line where a merged edit is much shorter or longer than those of the experts."""
    if scale is None or experts < 2 or _SHORT <= scale["length"] <= _LONG or not scale["length"]:
        return []
    much = "short" if scale["length"] < _SHORT else "long"
    return [
        f"the merged edit is {much}: {scale['length']:.2g} times the mean length of the experts' edits; "
        f"`lambda: auto` would be {scale['auto']:.3g} here"
    ]


def _curvature(inputs: Inputs, model: ModelEntry) -> str | None:
    """Where an expert's second moments are from: "lora-lift (an estimate)" is no optimizer's."""
    file = inputs.moments.get(moments_key(model))
    return None if file is None else file.source_format


def _of_expert(number: int, counted: list) -> list[tuple]:
    """(output tensor, its counts, the expert's place there) where the expert of this number takes part."""
    return [(e, counts, e.positions.index(number)) for e, counts in counted if number in e.positions]


def _expert(model: str, counted: list[tuple], decider: Decider) -> dict:
    kept = sum(counts.kept[t] for _, counts, t in counted)
    total = sum(entry.numel for entry, _, _ in counted)
    thresholds = {counts.thresholds[t] for entry, counts, t in counted if entry.numel}
    places = {t for _, _, t in counted}
    shares = [_share(decider, t, {e.name: c.kept[t] for e, c, own in counted if own == t}) for t in places]
    missing = sum(share.missing for share in shares)
    if missing:
        logger.warning(
            "%s: its density asks for %d edits more than the %d that have a saliency above 0: those are kept",
            model, missing, kept,
        )  # fmt: skip
    return {
        "model": model,
        "threshold": thresholds.pop() if len(thresholds) == 1 else None,
        "kept": kept,
        "total": total,
        "density": kept / total if total else 1.0,
        "ties": sum(share.beyond for share in shares),
        "missing": missing,
    }


class _Share(NamedTuple):
    """Edits kept beyond the k of a density, because they tie with the k-th; and those missing to it, because
    no more have a score above 0."""

    beyond: int
    missing: int


def _share(decider: Decider, t: int, kept: Mapping[str, int]) -> _Share:
    """Of expert t; kept: by tensor name."""
    tensors = [x for x in decider.tensors if x.name in kept]
    taking_part = [[x for x in tensors if decider.takes_part(x)]]
    groups = taking_part if decider.model_scope else [[x] for x in tensors]
    beyond = missing = 0
    for group in groups:
        selection = decider.selections(group[0])[t] if group else Selection("all")
        if selection.rule == "density":
            k = count_of_density(selection.value, sum(x.numel for x in group))
            more = sum(kept[x.name] for x in group) - k
            beyond, missing = beyond + max(0, more), missing + max(0, -more)
    return _Share(beyond, missing)


def as_text(report: Mapping[str, Any]) -> bytes:
    """The report as JSON, with a line for each tensor."""
    text = io.BytesIO()  # which gives its bytes without a copy
    for piece in _lines(report, ""):
        text.write(piece.encode())
    text.write(b"\n")
    return text.getvalue()


def _lines(value: Any, indent: str) -> Iterator[str]:
    """JSON, cut at the items of objects that hold more than a few numbers."""
    items = value if isinstance(value, Mapping) else {}
    if len(items) <= _SHORT and not any(isinstance(item, Mapping | str) for item in items.values()):
        yield json.dumps(value, allow_nan=False)
        return
    comma = "{"
    for key, item in items.items():
        yield f"{comma}\n{indent}  {json.dumps(key)}: "
        yield from _lines(item, indent + "  ")
        comma = ","
    yield f"\n{indent}}}"


def published_report(out: Path) -> dict:
    """The report in an output folder; empty where there is none that can be read."""
    try:
        report = json.loads((out / REPORT_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}
