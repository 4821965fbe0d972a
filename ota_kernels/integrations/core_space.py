"""LoRA adapters merged in their core space into one adapter (arXiv 2509.17786): nothing of a model's size is
made.

    U = orth([B_1 .. B_T]) (m x k),  V = orth([A_1; ..; A_T]^T) (n x l);   M_t = s_t (U^T B_t)(A_t V)
    M = a merge of the M_t, edits from 0;   new adapter: s = 1, B A = U M V^T, or its leading singular triples

Ranks may differ. s_t B_t A_t = U M_t V^T exactly, so that methods of whole matrices (`tsv`, `iso_c`,
`covariance`) and linear ones give what they give on the products. Those that look at elements (`ties`) look
at those of M_t, in the basis of the singular vectors of the factors side by side.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError, OutputError, RecipeError
from ..io.adapter import CONFIG, WEIGHTS, AdapterFile
from ..io.hub import resolve_model
from ..planning.adapters import Change, changes, factor
from ..planning.models import Info

_NULL = 2.0**-40  # singular values below this share of the largest are rounding
# A module's LoRA depends on them, and one configuration has one value.
_SAME = ("fan_in_fan_out", "base_model_name_or_path", "task_type")
_REFUSED = {"use_dora": "DoRA", "lora_bias": "a bias beside B", "modules_to_save": "modules_to_save"}


class Module(NamedTuple):
    """What one adapter adds to one module: s B A. a: float64[r, n], b: float64[m, r]; keys, shapes: of A and
    B."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    keys: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


class Core(NamedTuple):
    """A module in core space: bases of both sides, and the M_t, float64."""

    left: np.ndarray
    right: np.ndarray
    each: list[np.ndarray]


def modules_of(adapter: AdapterFile) -> dict[str, Module]:
    """By name. InputError for what is more than pairs of factors."""
    where = f"{adapter.label}: {adapter.folder}"
    for key, what in _REFUSED.items():
        if adapter.config.get(key):
            raise InputError(
                f"{where}: uses {what} (`{key}`), which has no core space: merge it into its model"
            )
    if adapter.config.get("bias", "none") != "none":
        raise InputError(
            f"{where}: trains biases (`bias`), which have no core space: merge it into its model"
        )
    names = {key.split(".lora_")[0] for key in adapter.tensors if ".lora_" in key}
    found = {}
    for name, change in changes(adapter, {f"{n}.weight": Info((0, 0), None) for n in names}).items():
        found[name.removesuffix(".weight")] = _module(adapter, change, where)
    return found


def _module(adapter: AdapterFile, change: Change, where: str) -> Module:
    if change.a is None or change.own is not None or change.magnitude is not None:
        raise InputError(f"{where}: holds more than the factors of LoRA: merge it into its model")
    a, b = adapter.tensors[change.a], adapter.tensors[change.b]
    for key, tensor in ((change.a, a), (change.b, b)):
        if not np.isfinite(factor(tensor, "float64")).all():
            raise InputError(f"{where}: {key} has values that are not finite")
    return Module(
        factor(a, "float64"), factor(b, "float64"), change.scale, (change.a, change.b), (a.shape, b.shape)
    )


def _basis(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Singular vectors of matrices side by side, without null directions: float64[m, k]."""
    side = np.concatenate(columns, axis=1)
    q, r = np.linalg.qr(side)
    u, s, _ = np.linalg.svd(r)
    kept = int((s > (s[0] if len(s) else 0) * _NULL).sum())
    return q @ u[:, : max(kept, 1)]


def core_of(each: Sequence[Module | None]) -> Core:
    """None: an adapter that leaves the module as it is."""
    there = [module for module in each if module is not None]
    left, right = _basis([m.b for m in there]), _basis([m.a.T for m in there])
    zero = np.zeros((left.shape[1], right.shape[1]))
    cores = [zero if m is None else m.scale * ((left.T @ m.b) @ (m.a @ right)) for m in each]
    return Core(left, right, cores)


class Factors(NamedTuple):
    """A merged module: b[m, r], a[r, n]; lost: the squared length of what a smaller rank leaves out."""

    b: np.ndarray
    a: np.ndarray
    lost: float
    whole: float


def factors_of(core: Core, merged: np.ndarray, rank: int | None) -> Factors:
    """B and A of equal lengths; rank: at most, None for all directions."""
    u, s, vt = np.linalg.svd(merged, full_matrices=False)
    kept = int((s > (s[0] if len(s) else 0) * _NULL).sum())
    kept = kept if rank is None else min(kept, rank)
    root = np.sqrt(s[:kept])
    b, a = (core.left @ u[:, :kept]) * root, (root[:, None] * vt[:kept]) @ core.right.T
    return Factors(b, a, float((s[kept:] ** 2).sum()), float((s**2).sum()))


def merge_adapters(
    folders: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    method: str = "linear",
    rank: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    **parameters: Any,
) -> dict[str, Any]:
    """Merge LoRA adapters of one base model into one adapter that PEFT loads.

    folders: of adapters, or hub ids, of any ranks; out: the new adapter's folder; method, parameters: as for
    `merge_state_dicts`, without second moments: the edits are what the adapters add. rank: of the new adapter
    at most; None keeps everything. dtype: "float32", "bfloat16" or "float16", None for the first adapter's.

    Returns {"modules", "rank", "lost"}: lost is the relative length of what a smaller rank left out. Raises
    InputError for folders that are no LoRA adapters, or that differ in more than ranks; RecipeError for
    parameters; OutputError where `out` is not empty and `overwrite` is not given.
    """
    from ..api import merge_state_dicts

    if rank is not None and rank < 1:
        raise RecipeError(f"rank must be at least 1, not {rank}")
    if len(folders) < 1:
        raise RecipeError("there are no adapters to merge: name their folders")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise RecipeError(f"dtype is {dtype!r}: it must be float32, bfloat16 or float16")
    target = _checked(Path(out).resolve(), overwrite)
    adapters = [AdapterFile(resolve_model(str(f)), str(f)) for f in folders]
    try:
        _check_alike(adapters)
        each = [modules_of(adapter) for adapter in adapters]
        names = list(dict.fromkeys(name for modules in each for name in modules))
        cores = {name: core_of([modules.get(name) for modules in each]) for name in names}
        base = {f"{name}.weight": np.zeros(core.each[0].shape) for name, core in cores.items()}
        experts = [{f"{name}.weight": core.each[t] for name, core in cores.items()} for t in range(len(each))]
        merged = merge_state_dicts(base, experts, method=method, **parameters)
        found = {name: factors_of(core, merged[f"{name}.weight"], rank) for name, core in cores.items()}
        first = {name: next(m[name] for m in each if name in m) for name in names}
        config = adapters[0].config
        stored = adapters[0].tensors[first[names[0]].keys[0]].buffer.dtype.name
        widest = max(f.b.shape[1] for f in found.values()) or 1
    finally:
        for adapter in adapters:
            adapter.close()
    _write(target, overwrite, found, first, config, widest, dtype or stored)
    whole = sum(f.whole for f in found.values())
    lost = (sum(f.lost for f in found.values()) / whole) ** 0.5 if whole else 0.0
    return {"modules": len(names), "rank": widest, "lost": lost}


def _check_alike(adapters: Sequence[AdapterFile]) -> None:
    for other in adapters[1:]:
        for key in _SAME:
            one, two = adapters[0].config.get(key), other.config.get(key)
            if one != two and None not in (one, two):
                raise InputError(f"{other.label}: `{key}` is {two!r}, and {one!r} in {adapters[0].label}")


def _checked(out: Path, overwrite: bool) -> Path:
    if out.exists() and not out.is_dir():
        raise OutputError(f"the output {out} is a file; name a folder")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise OutputError(f"the output {out} is not empty: choose another folder, or add --overwrite")
    return out


def _write(
    out: Path,
    overwrite: bool,
    found: Mapping[str, Factors],
    first: Mapping[str, Module],
    config: Mapping[str, Any],
    rank: int,
    dtype: str,
) -> None:
    """Factors are padded to one rank by zeros, which add nothing. OUT appears complete."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, factors in found.items():
        like = first[name]
        pad = rank - factors.b.shape[1]
        a = np.pad(factors.a, ((0, pad), (0, 0))).reshape(rank, *like.shapes[0][1:])
        b = np.pad(factors.b, ((0, 0), (0, pad))).reshape(like.shapes[1][0], rank, *like.shapes[1][2:])
        for key, values in zip(like.keys, (a, b), strict=True):
            tensors[f"base_model.model.{key}"] = (
                torch.from_numpy(values).to(getattr(torch, dtype)).contiguous()
            )
    written = {
        **config,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "target_modules": sorted(found),
        "exclude_modules": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "inference_mode": True,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        save_file(tensors, work / WEIGHTS, metadata={"format": "pt"})
        (work / CONFIG).write_text(json.dumps(written, indent=2) + "\n")
        work.chmod(0o755)
        if out.exists():
            if overwrite:
                shutil.rmtree(out)
            else:
                out.rmdir()
        os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
