"""Random experts, and one merge of them with everything it decided: what the tests of the formulas share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import oracle
import torch

from ota_kernels.planning.resolve import Resolver
from ota_kernels.planning.roles import role_of
from ota_kernels.recipe.schema import Recipe, parse_recipe
from ota_kernels.run.decide import Decider
from ota_kernels.run.pool import IN_PLACE, Pool
from ota_kernels.run.rules import RULES, Rules
from ota_kernels.select.pending import Pending, Store
from ota_kernels.select.settle import Group
from ota_kernels.tensors.buffer import Buffer
from ota_kernels.tensors.curvature import Curvature, Full, Log8, Uniform
from ota_kernels.tensors.dtypes import BY_NAME
from ota_kernels.tensors.result import Candidates, Counts, MergeStats
from ota_kernels.tensors.segment import Segment
from ota_kernels.tensors.terms import Terms, close, is_open
from ota_kernels.tensors.tile import TensorInputs

INPUT_DTYPES = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2")
OUTPUT_DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Experts:
    """One tensor of every model, as torch tensors. curvatures None: curvature 1."""

    base: torch.Tensor | None
    experts: tuple[torch.Tensor, ...]
    curvatures: tuple[torch.Tensor, ...] | None

    def inputs(
        self, out_dtype: str, name: str = "weight", bias_corrections: Sequence[float] | None = None
    ) -> TensorInputs:
        """What a backend receives."""
        corrections = bias_corrections or (1.0,) * len(self.experts)
        found = (Uniform(),) * len(self.experts)
        if self.curvatures is not None:
            found = tuple(Full(buffer(h), c) for h, c in zip(self.curvatures, corrections, strict=True))
        return TensorInputs(
            name,
            tuple(self.experts[0].shape),
            BY_NAME[out_dtype],
            None if self.base is None else buffer(self.base),
            tuple(map(buffer, self.experts)),
            found,
        )

    def exact(self, name: str = "weight", bias_corrections: Sequence[float] | None = None) -> oracle.Tensor:
        """The same values for the float64 evaluation."""
        return oracle.Tensor(
            None if self.base is None else self.base.double().numpy(),
            tuple(w.double().numpy() for w in self.experts),
            None if self.curvatures is None else tuple(h.float().numpy() for h in self.curvatures),
            role_of(name, tuple(self.experts[0].shape)),
            None if bias_corrections is None else tuple(bias_corrections),
        )


def buffer(tensor: torch.Tensor, origin: str = "") -> Buffer:
    """A tensor's bytes, as a reader would map them."""
    if tensor.numel() == 0:  # numpy 2.4 gives it stride 0, which torch does not view as another type
        data = np.zeros(0, np.uint8)
    else:
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return Buffer(data, BY_NAME[str(tensor.dtype).removeprefix("torch.")], origin)


def decode(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Result bytes as float64[shape]."""
    if data.size == 0:  # torch does not view an empty numpy array as another type
        return np.zeros(shape)
    return torch.from_numpy(data).view(getattr(torch, dtype)).double().numpy().reshape(shape)


def random_experts(
    seed: int,
    shape: tuple[int, ...],
    n_experts: int = 3,
    *,
    dtypes: Sequence[str] = ("bfloat16",),
    base_dtype: str | None = "bfloat16",
    curvature_dtypes: Sequence[str] | None = ("float32",),
) -> Experts:
    """Weights near 0.05; edits a tenth of that, one in eight 0; curvature log-uniform, one in sixteen 0.
    Expert t has the type dtypes[t mod len]; base_dtype and curvature_dtypes None: without."""
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 0.05, shape)
    experts, curvatures = [], []
    for t in range(n_experts):
        edit = rng.normal(0, 0.005, shape) * (rng.random(shape) > 1 / 8)
        experts.append(torch.as_tensor(base + edit).to(getattr(torch, dtypes[t % len(dtypes)])))
        if curvature_dtypes is not None:
            dtype = curvature_dtypes[t % len(curvature_dtypes)]
            least = -5.0 if dtype == "float16" else -14.0  # float16 ends at 6e-8
            h = 10.0 ** rng.uniform(least, least + 8, shape) * (rng.random(shape) > 1 / 16)
            curvatures.append(torch.as_tensor(h).to(getattr(torch, dtype)))
    return Experts(
        None if base_dtype is None else torch.as_tensor(base).to(getattr(torch, base_dtype)),
        tuple(experts),
        None if curvature_dtypes is None else tuple(curvatures),
    )


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


def with_buffers(tile: TensorInputs, change: Callable[[Buffer], Buffer]) -> TensorInputs:
    """The same tile with other buffers of the same elements; factors are shared."""

    def curvature(c: Curvature) -> Curvature:
        if isinstance(c, Full):
            return replace(c, values=change(c.values))
        return replace(c, codes=change(c.codes)) if isinstance(c, Log8) else c

    return replace(
        tile,
        base=None if tile.base is None else change(tile.base),
        experts=tuple(map(change, tile.experts)),
        curvatures=tuple(map(curvature, tile.curvatures)),
    )


def merge_tile(tile: TensorInputs, terms: Terms, backend: ModuleType) -> tuple[np.ndarray, MergeStats]:
    """One call of a backend, into memory that holds NaN."""
    out = np.full(tile.numel * tile.out_dtype.itemsize, 0xFF, np.uint8)
    return out, backend.merge(tile, terms, out)


def masks_of(tile: TensorInputs, terms: Terms, backend: ModuleType) -> np.ndarray:
    """m_t as the scores and thresholds say: bool[T, *shape]."""
    masks = np.ones((len(terms.experts), *tile.shape), bool)
    if terms.words.select != "all":
        for t, e in enumerate(terms.experts):
            scores, _ = backend.scores(tile, t, terms)
            masks[t] = (scores >= np.float32(e.threshold)).reshape(tile.shape)
    return masks


def undecided(candidates: Candidates) -> np.ndarray:
    """The positions of candidates and alternatives, ascending."""
    alternatives = (a.positions & np.uint32((1 << 31) - 1) for a in candidates.alternatives)
    return np.sort(np.concatenate([candidates.positions, *alternatives]))
