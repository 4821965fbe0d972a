"""What a merge did with its experts' edits: one more read of the inputs, tensor by tensor.

d_t: expert t's edit; k_t = m_t d_t: what the merge kept of it; h_t: its second moments; e: the merged edit.
Sums are float64, over fixed chunks folded in order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..planning.roles import detailed_role, layer_of
from ..recipe.schema import load_recipe
from ..spectral.algebra import one_thread
from ..tensors import array as resident
from ..tensors.curvature import Uniform
from ..tensors.dtypes import BY_NAME
from ..tensors.segment import CHUNK
from ..tensors.terms import Terms, close, is_open, score_of_saliency
from ..tensors.tile import TensorInputs
from .decide import Decider
from .job import Job, Options
from .report import REPORT_NAME, published_report
from .state import as_found

# The smaller side of a matrix whose singular values are found: a minute for a billion parameters of those.
_LARGEST_SIDE = 1024


@dataclass
class _Sums:
    """Over some tensors. elements; changed, kept: per expert, elements; merged: ||lambda e||^2; product: of
    that edit with all k_t; squares: sum_t ||k_t||^2; keepers: elements by how many experts keep them;
    both: [s, t] elements that both keep; opposed: of those, with unlike signs; gram: <d_s, d_t>; moments:
    <h_s, h_t>."""

    elements: int
    changed: np.ndarray
    kept: np.ndarray
    merged: float
    product: float
    squares: float
    keepers: np.ndarray
    both: np.ndarray
    opposed: np.ndarray
    gram: np.ndarray
    moments: np.ndarray

    @classmethod
    def none(cls, n: int) -> _Sums:
        pairs = [np.zeros((n, n)) for _ in range(4)]
        return cls(
            0, np.zeros(n, np.int64), np.zeros(n, np.int64), 0.0, 0.0, 0.0, np.zeros(n + 1, np.int64), *pairs
        )

    def add(self, other: _Sums) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def analyse(out: Path, **options: Any) -> dict[str, Any]:
    """A merged folder's report, its recipe, and what became of the edits: over the model (`overall`), by
    layer and role (`groups`), and effective ranks of matrices (`ranks`). options: as of `merge`.

    Raises InputError for a folder that is no merge, and as `merge` does where inputs are not there any more.
    """
    report, path = published_report(out), out / "merge_recipe.yaml"
    if "tensors" not in report or "found" not in report or not path.is_file():
        raise InputError(f"{out} is no merge of this version: it has no {REPORT_NAME} with its recipe")
    recipe = load_recipe(path)
    given = {key: value for key, value in options.items() if value is not None}
    with Job(recipe, Options.of(**report["options"] | given)) as job, job.pool() as pool:
        names = {
            tensor.name: job.bundles[i].members[0].name if i in job.bundles else tensor.name
            for i, tensor in job.tensors.items()
        }
        decider = job.decider(pool)
        work = _Work(decider, as_found(report["found"]), report["tensors"], names, len(report["experts"]))
        parts = list(pool.run(work.of_tensor, job.tensors.values()))
    return {"report": report, "recipe": recipe.as_dict()} | _summary(parts, report)


@dataclass(frozen=True)
class _Work:
    decider: Decider
    found: Any
    merged: dict[str, dict]
    names: dict[str, str]  # of a bundle, its first member's
    experts: int

    def of_tensor(self, tensor: TensorInputs) -> tuple[str, _Sums, list[tuple[float, float]]]:
        """(name, sums, per expert the effective ranks of edit and mask where it is a small matrix)."""
        prepared = self.decider.prepare(tensor)
        terms = self._closed(prepared)
        total = _Sums.none(self.experts)
        places = list(self.decider.positions(prepared))
        step = max(CHUNK // terms.whole, 1) * terms.whole
        kept: list[list[np.ndarray]] = []
        for start in range(0, tensor.numel, step):
            tile = prepared.slice(start, min(start + step, tensor.numel))
            one, pieces = self._of_tile(tile, terms, places)
            total.add(one)
            if _is_small(tensor):
                kept.append(pieces)
        ranks = []
        if kept:
            whole = [np.concatenate(parts).reshape(tensor.shape) for parts in zip(*kept, strict=True)]
            ranks = [(effective_rank(x), effective_rank((x != 0).astype(np.float32))) for x in whole]
        return self.names[tensor.name], total, ranks

    def _closed(self, tensor: TensorInputs) -> Terms:
        terms = self.decider.terms(tensor, self.found)
        if not any(map(is_open, terms.experts)):
            return terms
        known = self.merged[self.names[tensor.name]]["thresholds"]
        return close(terms, [math.nan if x is None else score_of_saliency(x) for x in known])

    def _of_tile(self, tile: TensorInputs, terms: Terms, places: list[int]) -> tuple[_Sums, list[np.ndarray]]:
        sums = _Sums.none(self.experts)
        backend, n = self.decider.backend, len(tile.experts)
        every = replace(terms, words=replace(terms.words, score="none", select="all", edit="difference"))
        edits = [resident.host(backend.edits(tile, t, every)[0]) for t in range(n)]
        kept = [resident.host(backend.edits(tile, t, terms)[0]) for t in range(n)]
        masks = [k != 0 for k in kept]
        wide = replace(tile, out_dtype=BY_NAME["float64"])
        sums.elements = tile.numel
        if (
            self.decider.matrices.shape(tile) is None
        ):  # what becomes of whole matrices is no sum over elements
            merged = _merged(self.decider, wide, terms) - _merged(
                self.decider, wide, replace(terms, lambda_=0.0)
            )
            sums.merged = float(np.square(merged).sum())
            signed = [
                np.copysign(e.edit_scale, e.weight_scale) * k.astype(np.float64)
                for e, k in zip(terms.experts, kept, strict=True)
            ]
            sums.product = sum(float(np.dot(merged, k)) for k in signed)
            sums.squares = sum(float(np.dot(k, k)) for k in signed)
        count = np.sum(masks, axis=0)
        sums.keepers[: n + 1] = np.bincount(count, minlength=n + 1)
        moments = [None if isinstance(c, Uniform) else _values(c, tile.numel) for c in tile.curvatures]
        for s in range(n):
            a = places[s]
            sums.changed[a] = np.count_nonzero(edits[s])
            sums.kept[a] = np.count_nonzero(masks[s])
            for t in range(s + 1):
                b = places[t]
                pair = masks[s] & masks[t]
                for table, value in (
                    (sums.both, np.count_nonzero(pair)),
                    (sums.opposed, np.count_nonzero(pair & ((kept[s] > 0) != (kept[t] > 0)))),
                    (sums.gram, float(np.dot(edits[s].astype(np.float64), edits[t]))),
                    (
                        sums.moments,
                        0.0 if moments[s] is None or moments[t] is None else _dot(moments[s], moments[t]),
                    ),
                ):
                    table[a, b] = table[b, a] = value
        return sums, kept


def _dot(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.dot(x.astype(np.float64), y.astype(np.float64)))


def _values(curvature: Any, numel: int) -> np.ndarray:
    """float32[numel] of second moments in whatever form."""
    from ..backends import reference

    return reference.curvature(curvature, numel).numpy()


def _merged(decider: Decider, tile: TensorInputs, terms: Terms) -> np.ndarray:
    room = resident.empty(8 * tile.numel, tile.experts[0].data)
    decider.backend.merge(tile, terms, room)
    return resident.host(room).view(np.float64)


def _is_small(tensor: TensorInputs) -> bool:
    return len(tensor.shape) == 2 and 1 < min(tensor.shape) <= _LARGEST_SIDE and tensor.numel <= 1 << 24


def effective_rank(matrix: np.ndarray) -> float:
    """exp of the entropy of the singular values' shares: between 1 and the smaller side; 0 of nothing."""
    import torch

    with one_thread():  # workers that do a matrix each would wait for each other's threads
        x = torch.from_numpy(matrix).double()
        squares = torch.linalg.eigvalsh(x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x)
    values = squares.clamp(min=0).sqrt().numpy()
    total = values.sum()
    if not total:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _summary(parts: list[tuple[str, _Sums, list]], report: dict) -> dict[str, Any]:
    n = len(report["experts"])
    overall, groups, ranks = _Sums.none(n), {}, []
    for name, sums, of_experts in parts:
        overall.add(sums)
        layer, role = layer_of(name), detailed_role(name)
        key = ("none" if layer is None else str(layer), role)
        groups.setdefault(key, _Sums.none(n)).add(sums)
        if of_experts:
            ranks.append(
                {"tensor": name, "edits": [a for a, _ in of_experts], "masks": [b for _, b in of_experts]}
            )
    return {
        "overall": _plain(overall),
        "automatic": _automatic(overall, report),
        "groups": [{"layer": layer, "role": role, **_plain(s)} for (layer, role), s in _ordered(groups)],
        "ranks": ranks,
    }


def _automatic(sums: _Sums, report: dict) -> float | None:
    """What `lambda: auto` is by all elements (run/scale.py); None where tensors differ in lambda."""
    used = (report["lambda"] or {}).get("used")
    if not used or not sums.merged or len(report["experts"]) == 1:
        return None
    factor = math.sqrt(sums.squares / sums.merged)
    return abs(used) * (min(factor, sums.squares / sums.product) if sums.product > 0 else factor)


def _ordered(groups: dict) -> Iterator[tuple[tuple[str, str], _Sums]]:
    yield from sorted(
        groups.items(), key=lambda g: (g[0][0] == "none", int(g[0][0]) if g[0][0] != "none" else 0)
    )


def _plain(sums: _Sums) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(sums).items()}


def as_json(found: dict[str, Any]) -> str:
    """What `analyse` found, for programs."""
    return json.dumps({k: v for k, v in found.items() if k != "recipe"}, indent=2, allow_nan=False)
