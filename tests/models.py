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

from ota_kernels.planning.resolve import Resolver
from ota_kernels.recipe.schema import Recipe, parse_recipe
from ota_kernels.run.decide import Decider
from ota_kernels.run.pool import IN_PLACE, Pool
from ota_kernels.run.rules import RULES, Rules
from ota_kernels.select.pending import Pending, Store
from ota_kernels.select.settle import Group
from ota_kernels.tensors.dtypes import BY_NAME
from ota_kernels.tensors.result import Counts, MergeStats
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


def decider_of(
    recipe: Recipe,
    tensors: Sequence[TensorInputs],
    backend: ModuleType,
    pool: Pool = IN_PLACE,
    rules: Rules = RULES,
) -> Decider:
    """The decider of a recipe of one slice; each tensor has one name in all models."""
    resolver = Resolver(recipe.slices[0], recipe.method, {})
    settings = {t.name: resolver.settings(t.name, [t.name] * len(t.experts), 0.0) for t in tensors}
    return Decider(recipe.method, tensors, settings, backend, pool, rules=rules)


def terms_of(recipe: Recipe, tensor: TensorInputs, backend: ModuleType) -> Terms:
    """Of one tensor, brackets in place of thresholds that follow after the merge."""
    decider = decider_of(recipe, [tensor], backend)
    return decider.terms(decider.prepare(tensor), decider.decide_model())


def merge_model(
    recipe: Recipe,
    tensors: Sequence[TensorInputs],
    backend: ModuleType,
    out_dtypes: Sequence[str] | None = None,
) -> dict[str, list[Outcome]]:
    """Decide, and merge each tensor in one tile: for each of out_dtypes, or its own out_dtype."""
    decider = decider_of(recipe, tensors, backend)
    model = decider.decide_model()
    found = {}
    ready = [decider.prepare(tensor) for tensor in tensors]
    terms_of = [decider.terms(prepared, model) for prepared in ready]
    groups = [range(len(ready))] if decider.model_scope else [[i] for i in range(len(ready))]
    for members in groups:
        close_group(decider, ready, terms_of, members)
    for tensor, prepared, terms in zip(tensors, ready, terms_of, strict=True):
        masks = masks_of(prepared, terms, backend)
        found[tensor.name] = []
        for dtype in out_dtypes or [tensor.out_dtype.name]:
            tile = replace(prepared, out_dtype=BY_NAME[dtype])
            data, stats = merge_tile(tile, terms, backend)
            decider.check(tile, stats.nonfinite)
            outcome = Outcome(tile, terms, decode(data, dtype, tile.shape), data, stats, masks)
            found[tensor.name].append(outcome)
    return found


def close_group(
    decider: Decider, tensors: Sequence[TensorInputs], terms_of: list[Terms], members: Sequence[int]
) -> None:
    """Put exact thresholds in place of the brackets of a group's terms."""
    waiting = [i for i in members if any(map(is_open, terms_of[i].experts))]
    if not waiting:
        return
    whole = None if decider.model_scope else tensors[waiting[0]]
    elements = decider.elements if whole is None else whole.numel
    store = Store(1 << 30)
    group = Group(decider.selections(whole), elements, decider.backend, store)
    for i in waiting:
        _, stats = merge_tile(tensors[i], terms_of[i], decider.backend)
        segment = Segment(i, 0, tensors[i].numel)
        pending = Pending.of(segment, tensors[i], stats, Counts.of(stats, []))
        group.add(store.put(pending.owned()), tensors[i], terms_of[i])
    thresholds, missed = group.thresholds(map)
    exact = decider.exact_thresholds(whole, missed)
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
    if terms.words.select != "all":
        for t, e in enumerate(terms.experts):
            scores, _ = backend.scores(tile, t, terms)
            masks[t] = (scores >= np.float32(e.threshold)).reshape(tile.shape)
    return masks
