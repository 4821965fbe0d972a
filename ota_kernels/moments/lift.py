"""Lift: second moments of LoRA's matrices to an estimate of those of the full matrices.

W = W_0 + s B A with B [m, r], A [r, n]. For the gradient G of W, B's is s G A^T and A's is s B^T G, so

    R_i = sum_k v_B[i, k]     grows with row i of v,       C_j = sum_k v_A[k, j]     with column j of v

and v ~ S r_i c_j with r = R / sum(R), c = C / sum(C). Were the elements of G independent,
sum(R) = s^2 S sum_j c_j a_j with a_j = sum_k A_kj^2, which gives the scale S. It is taken from B alone: A
changes little from its first values, while v_A is a mean over steps at the first of which B was 0.

An estimate: the best rank-1 form of full second moments follows their logarithm with correlation 0.93, this
one with 0.84, as measured. What it knows is which rows and columns matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..io.header import quoted
from ..io.new_file import check_new_file
from ..io.reader import FILE_SUFFIX, Checkpoint
from .extraction import renamed
from .readers import formats
from .readers.adapter import PREFIX, SUFFIXES, config_of, scaling
from .readers.request import Request
from .source import FactoredMoment, Moment, Source, only
from .stored_moments import stored_source
from .writing import write_moments

SOURCE_FORMAT = "lora-lift (an estimate)"
_A, _B = SUFFIXES[:2]


@dataclass(frozen=True)
class Summary:
    """tensors: matrices that curvature was made for; nbytes: of the file; parameters: how many tensors the
    base has; skipped: states of the adapter that were not used, with the reason; scaled: whether the
    adapter's own weights gave the scale."""

    tensors: int
    nbytes: int
    parameters: int
    skipped: dict[str, str]
    scaled: bool


def lift(
    states: str | Path,
    out: str | Path,
    model: str | Path,
    adapter: str | Path | None = None,
    overwrite: bool = False,
) -> Summary:
    """Write rank-1 curvature of the base's full matrices, estimated from an adapter's second moments.

    states: what `extract` wrote of the adapter, or its checkpoint; model: the base, whose names and shapes
    OUT has; adapter: its folder, for the scale (else the one of `states`, where it holds one; else the scale
    is that of PEFT's first values, with alpha = r). Raises InputError where the states are not of LoRA, or do
    not fit the base; OutputError as `extract` does.
    """
    path, target = Path(states), Path(out)
    check_new_file(target, overwrite=overwrite)
    where = f"adapter states: {path}"
    base = Checkpoint.open(Path(model), "model")
    weights = _open_adapter(path, adapter)
    source = _read(path, weights, base, where)
    pairs = dict(_pairs(source))
    if not pairs:
        raise InputError(
            f"{where}: holds no second moments of lora_A and lora_B: extract them by --model ADAPTER"
        )
    config = {} if weights is None else config_of(weights.root)
    if config.get("use_dora"):
        raise InputError(f"{where}: is of DoRA, whose matrices are scaled by column: it cannot be lifted")
    moments, used = [], set()
    for module, (a, b) in pairs.items():
        moments.append(_lifted(module, a, b, base, weights, config, where))
        used |= {a.name, b.name}
    skipped = {m.name: "no pair of lora_A and lora_B" for m in source.moments if m.name not in used}
    lifted = Source(SOURCE_FORMAT, tuple(moments), {})
    step, beta2 = only(m.step for m in moments), only(m.beta2 for m in moments)
    written = write_moments(lifted, target, step, beta2, where)
    return Summary(len(moments), written.nbytes, len(base.tensors), skipped, weights is not None)


def _open_adapter(path: Path, adapter: str | Path | None) -> Checkpoint | None:
    if adapter is not None:
        return Checkpoint.open(Path(adapter), "adapter")
    folder = path if path.is_dir() else path.parent
    file = folder / "adapter_model.safetensors"
    return Checkpoint.open(file, "adapter") if file.is_file() else None


def _read(path: Path, adapter: Checkpoint | None, base: Checkpoint, where: str) -> Source:
    if path.suffix == FILE_SUFFIX:
        return stored_source(path, where)
    found, row = formats.choose(path, formats.AUTO)
    return renamed(row.read(found, Request(adapter, base)), adapter, where)


def _pairs(source: Source) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """By module: the moments of its two matrices."""
    by_name = {moment.name: moment for moment in source.moments}
    for name, moment in by_name.items():
        module = name.removesuffix(f".{_A}")
        other = by_name.get(f"{module}.{_B}")
        if module != name and other is not None:
            yield module, (moment, other)


def _lifted(
    module: str,
    a: Moment | FactoredMoment,
    b: Moment | FactoredMoment,
    base: Checkpoint,
    weights: Checkpoint | None,
    config: dict[str, Any],
    where: str,
) -> FactoredMoment:
    name = f"{module.removeprefix(PREFIX)}.weight"
    (rank, n), (m, other) = a.shape, b.shape
    info = base.tensors.get(name)
    if info is None or rank != other or sorted(info.shape) != sorted((m, n)):
        found = "lacks it" if info is None else f"holds {list(info.shape)}"
        raise InputError(
            f"{where}: {quoted(module)} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, of "
            f"{quoted(name)} [{m}, {n}], but {base.root} {found}: give --model the adapter's base"
        )
    rows, columns = partial(_sums, b, 1), partial(_sums, a, 0)
    scale = _Scale(
        rows, columns, rank, _adapter_norms(weights, module, a.shape), scaling(config, rank, module)
    )
    # Conv1D of GPT-2 keeps its matrices transposed.
    transposed = bool(config.get("fan_in_fan_out")) or info.shape != (m, n)
    parts = (scale.rows, scale.columns)
    one, two = reversed(parts) if transposed else parts
    return FactoredMoment(name, info.shape, one, two, only({a.step, b.step}), only({a.beta2, b.beta2}))


@dataclass(frozen=True)
class _Scale:
    """Row and column sums of S r_i c_j: both sum to S. norms: a_j, None for PEFT's first values."""

    row_profile: Any
    column_profile: Any
    rank: int
    norms: np.ndarray | None
    scaling: float

    def _total(self, rows: np.ndarray, columns: np.ndarray) -> float:
        if not rows.sum() or not columns.sum():
            return 0.0
        shares = columns / columns.sum()
        # Uniform in +- 1/sqrt(n), so that r squares of a column sum to r / 3n.
        norms = self.rank / (3 * columns.size) if self.norms is None else float(shares @ self.norms)
        return float(rows.sum()) / (self.scaling**2 * norms) if norms else 0.0

    def rows(self) -> np.ndarray:
        rows, columns = self.row_profile(), self.column_profile()
        total = self._total(rows, columns)
        return (rows * (total / rows.sum() if total else 0.0)).astype(np.float32)

    def columns(self) -> np.ndarray:
        rows, columns = self.row_profile(), self.column_profile()
        total = self._total(rows, columns)
        return (columns * (total / columns.sum() if total else 0.0)).astype(np.float32)


def _sums(moment: Moment | FactoredMoment, axis: int) -> np.ndarray:
    """Sums over an axis of a matrix of second moments, float64."""
    if isinstance(moment, FactoredMoment):
        return (moment.rows if axis else moment.columns)().astype(np.float64)
    values = np.empty(moment.shape, np.float32).reshape(-1)
    for piece in moment.pieces:
        values[piece.start : piece.start + piece.numel] = piece.read()
    return values.reshape(moment.shape).sum(axis, dtype=np.float64)


def _adapter_norms(weights: Checkpoint | None, module: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """a_j: sums of squares of A's columns."""
    name = f"{module}.{_A}"
    if weights is None or name not in weights.tensors or weights.tensors[name].shape != shape:
        return None
    return np.square(weights.buffer(name).float32().astype(np.float64)).reshape(shape).sum(0)
