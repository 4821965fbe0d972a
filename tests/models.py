"""Random experts, and one merge of them with everything it decided: what the tests of the formulas share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
from tiles import (  # noqa: F401 (for the tests of whole tensors)
    INPUT_DTYPES,
    OUTPUT_DTYPES,
    Experts,
    buffer,
    decode,
    merge_tile,
    random_experts,
    undecided,
    with_buffers,
)

from ota_kernels.recipe.schema import Recipe, parse_recipe
from ota_kernels.run.counts import Tally
from ota_kernels.run.survey import Survey
from ota_kernels.select.pending import Store
from ota_kernels.select.settle import Group, Part
from ota_kernels.tensors.dtypes import BY_NAME
from ota_kernels.tensors.result import MergeStats
from ota_kernels.tensors.segment import Segment
from ota_kernels.tensors.terms import Terms, close, is_open
from ota_kernels.tensors.tile import TensorInputs


def make_recipe(n_experts: int, has_base: bool = True, method: str = "ota", **parameters) -> Recipe:
    """A recipe of these parameters; a list or tuple holds one value per expert."""
    own = {k: v for k, v in parameters.items() if isinstance(v, list | tuple)}
    shared = {k: v for k, v in parameters.items() if k not in own}
    if method == "ota":
        own["preconditioner_path"] = ["exp_avg_sq.safetensors"] * n_experts
    data = {
        "merge_method": method,
        "models": [
            {"model": f"expert{t}", "parameters": {k: v[t] for k, v in own.items()}} for t in range(n_experts)
        ],
        "parameters": shared,
    }
    return parse_recipe(data | {"base_model": "base"} if has_base else data)


@dataclass(frozen=True)
class Outcome:
    """One merged tensor. tile: what was merged; out: float64[shape]; data: its bytes; masks: bool[T, *shape],
    as the scores and thresholds say."""

    tile: TensorInputs
    terms: Terms
    out: np.ndarray
    data: np.ndarray
    stats: MergeStats
    masks: np.ndarray


def merge_model(
    recipe: Recipe,
    tensors: Sequence[TensorInputs],
    backend: ModuleType,
    out_dtypes: Sequence[str] | None = None,
) -> dict[str, list[Outcome]]:
    """Survey, decide, and merge each tensor in one tile: for each of out_dtypes, or its own out_dtype."""
    survey = Survey(recipe, tensors, backend)
    decisions = survey.decide_model(map)
    found = {}
    ready = [survey.prepare(tensor, map) for tensor in tensors]
    terms_of = [survey.terms(prepared, decisions, map) for prepared in ready]
    groups = [range(len(ready))] if survey.model_scope else [[i] for i in range(len(ready))]
    for members in groups:
        close_group(survey, ready, terms_of, members, backend)
    for tensor, prepared, terms in zip(tensors, ready, terms_of, strict=True):
        masks = masks_of(prepared, terms, backend)
        found[tensor.name] = []
        for dtype in out_dtypes or [tensor.out_dtype.name]:
            tile = replace(prepared, out_dtype=BY_NAME[dtype])
            data, stats = merge_tile(tile, terms, backend)
            survey.check(tile, 0, stats.nonfinite)
            outcome = Outcome(tile, terms, decode(data, dtype, tile.shape), data, stats, masks)
            found[tensor.name].append(outcome)
    return found


def close_group(
    survey: Survey,
    tensors: Sequence[TensorInputs],
    terms_of: list[Terms],
    members: Sequence[int],
    backend: ModuleType,
) -> None:
    """Put exact thresholds in place of the brackets of a group's terms."""
    waiting = [i for i in members if any(map(is_open, terms_of[i].experts))]
    if not waiting:
        return
    elements = survey.elements if survey.model_scope else tensors[waiting[0]].numel
    store = Store(1 << 30)
    group = Group(survey.selections, elements, backend, store)
    for i in waiting:
        _, stats = merge_tile(tensors[i], terms_of[i], backend)
        segment = Segment(i, 0, tensors[i].numel)
        part = Part.of(segment, tensors[i], terms_of[i], stats, Tally.of(stats, []))
        part.held = store.put(part.held.owned().memory)
        group.parts.append(part)
    thresholds, missed = group.thresholds(map)
    whole = None if survey.model_scope else tensors[waiting[0]]
    exact = survey.exact_thresholds(whole, terms_of[waiting[0]], missed, map)
    for i in waiting:
        terms_of[i] = close(close(terms_of[i], thresholds), exact)


def merge_one(
    recipe: Recipe, experts: Experts, backend: ModuleType, out_dtype: str, name: str = "weight"
) -> Outcome:
    """`merge_model` of one tensor and one output type."""
    return merge_model(recipe, [experts.inputs(out_dtype, name)], backend)[name][0]


def masks_of(tile: TensorInputs, terms: Terms, backend: ModuleType) -> np.ndarray:
    """m_t as the scores and thresholds say: bool[T, *shape]."""
    masks = np.ones((len(terms.experts), *tile.shape), bool)
    if terms.formula.masked:
        for t, e in enumerate(terms.experts):
            scores, _ = backend.scores(tile, t, e)
            masks[t] = (scores >= np.float32(e.threshold)).reshape(tile.shape)
    return masks
