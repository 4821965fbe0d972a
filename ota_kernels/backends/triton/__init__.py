"""The Triton backend: the same formulas as `reference`, in one fused pass on a GPU.

The functions here take host tiles like those of the other backends: they copy a tile to the device, run and
copy back. `merge_kernel` and `survey_kernels` work on tensors that are on the device already.

TRITON_INTERPRET=1 (set before Triton is imported) runs the kernels on the CPU, element by element: for tests.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace

import numpy as np

from ...formula import ExpertTerms, Terms
from ...tensors import Buffer, Curvature, Full, Log8, LowRank, Rank1, TensorInputs
from ..stats import Candidates, MergeStats, NonFinite

NAME = "triton"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def verify() -> tuple[bool, str]:
    """(ok, reason): whether this backend can run here."""
    try:
        import torch
        import triton
    except ImportError as error:
        return False, f"{error}; install triton"
    if _interpreted():
        return True, f"triton {triton.__version__}, interpreted on the CPU"
    if not torch.cuda.is_available():
        return False, "no CUDA or ROCm device is available"
    return True, f"triton {triton.__version__} on {torch.cuda.get_device_name()}"


@functools.cache
def device():
    """The torch.device that host tiles are copied to."""
    import torch

    return torch.device("cpu" if _interpreted() else "cuda")


def _tensor(data: np.ndarray, dtype: str):
    """A copy of the bytes on the device, aligned, as elements of a torch type."""
    import torch

    found = torch.empty(data.nbytes, dtype=torch.uint8, pin_memory=device().type == "cuda")
    found.numpy()[:] = data.reshape(-1).view(np.uint8)
    return found.to(device(), non_blocking=True).view(getattr(torch, dtype))


def _buffer(buffer: Buffer):
    return _tensor(buffer.data, buffer.dtype.name)


def _curvature(c: Curvature, n: int):
    from . import tiles

    if isinstance(c, Full):
        return _buffer(c.values)
    if isinstance(c, Log8):
        return tiles.Log8(_buffer(c.codes), _tensor(c.scales, "float32"), c.columns, c.start)
    if isinstance(c, Rank1):
        return tiles.Rank1(_tensor(c.rows, "float32"), _tensor(c.columns, "float32"), c.start)
    if isinstance(c, LowRank):
        left, right = _tensor(c.left, "float32"), _tensor(c.right, "float32")
        return tiles.low_rank(left.view(c.left.shape), right.view(c.right.shape), c.start, n)
    return None


def _device_tile(tile: TensorInputs):
    from .tiles import DeviceTile

    return DeviceTile(
        None if tile.base is None else _buffer(tile.base),
        tuple(map(_buffer, tile.experts)),
        tuple(_curvature(c, tile.numel) for c in tile.curvatures),
    )


def _bytes(x) -> np.ndarray:
    """A device tensor's bytes on the host."""
    import torch

    return x.cpu().view(torch.uint8).numpy()


def merge(tile: TensorInputs, terms: Terms, out: np.ndarray) -> MergeStats:
    """Merge one tile into `out` (uint8, the tile's elements in its out_dtype)."""
    import torch

    from .merge_kernel import merge as launch

    inputs = _device_tile(tile)
    merged = torch.empty(tile.numel, dtype=getattr(torch, tile.out_dtype.name), device=device())
    launched = launch(inputs, terms, merged)
    stats = launched.stats()
    out[:] = _bytes(merged)
    wanted = [e.census for e in terms.experts]
    sums = launched.censuses.cpu().numpy() if any(wanted) else wanted
    return replace(
        stats,
        candidates=_candidates(tile, launched.undecided()) if any(e.span for e in terms.experts) else None,
        censuses=tuple(census if w else None for census, w in zip(sums, wanted, strict=True)),
    )


def _candidates(tile: TensorInputs, undecided) -> Candidates:
    positions, operands, steps = undecided
    rows = (operands.base, *operands.experts, *operands.curvatures)
    empty = np.zeros(0, np.uint8)
    columns = [empty if x is None else _bytes(x) for x in rows]
    return Candidates.of(tile, [_bytes(positions), *columns], [_bytes(s) for s in steps])


def _one(tile: TensorInputs, t: int):
    """Expert t's part of the tile on the device."""
    return _device_tile(replace(tile, experts=tile.experts[t : t + 1], curvatures=tile.curvatures[t : t + 1]))


def _nonfinite(of_one, t: int, suspect: bool) -> tuple[NonFinite, ...]:
    from .tiles import nonfinite

    found = nonfinite(of_one) if suspect else ()
    return tuple(bad if bad.role == "base" else replace(bad, expert=t) for bad in found)


def scores(tile: TensorInputs, t: int, terms: ExpertTerms) -> tuple[np.ndarray, tuple[NonFinite, ...]]:
    """The scores s_t of expert t, float32[n], 0 where an input is not usable."""
    from . import survey_kernels

    inputs = _one(tile, t)
    found, suspect = survey_kernels.scores(inputs, terms)
    return found.cpu().numpy(), _nonfinite(inputs, t, suspect)


def edits(tile: TensorInputs, t: int, terms: ExpertTerms) -> tuple[np.ndarray, tuple[NonFinite, ...]]:
    """The masked edits m_t d_t of expert t, float32[n]."""
    from . import survey_kernels

    inputs = _one(tile, t)
    found, suspect = survey_kernels.edits(inputs, terms)
    return found.cpu().numpy(), _nonfinite(inputs, t, suspect)


def histogram(
    tile: TensorInputs,
    t: int,
    terms: ExpertTerms,
    of_edits: bool,
    prefix: int,
    counts: np.ndarray,
    lows: np.ndarray,
) -> tuple[NonFinite, ...]:
    """Add the counts of expert t's scores by their float32 bits; see `native.histogram`."""
    import torch

    from . import survey_kernels

    inputs = _one(tile, t)
    new = torch.zeros(2, len(counts), dtype=torch.int64, device=device())
    suspect = survey_kernels.histogram(inputs, terms, of_edits, prefix, new[0], new[1])
    counts += new[0].cpu().numpy()
    if prefix < 0:
        lows += new[1].cpu().numpy()
    return _nonfinite(inputs, t, suspect)


def power_sum(tile: TensorInputs, t: int, power: float) -> tuple[float, tuple[NonFinite, ...]]:
    """The sum of h_t^power over the tile, in float64."""
    from . import survey_kernels, tiles

    inputs = _one(tile, t)
    total = survey_kernels.power_sum(tiles.written_out(inputs.curvatures[0], inputs), power)
    return total, tuple(bad for bad in _nonfinite(inputs, t, True) if bad.role == "curvature")


def row_column_sums(matrix: Full | Log8, row_sums: np.ndarray, column_sums: np.ndarray) -> None:
    """Add the sums of whole rows of curvature: see `native.row_column_sums`."""
    from . import survey_kernels

    shape = len(row_sums), len(column_sums)
    of_rows, of_columns = survey_kernels.row_column_sums(_curvature(matrix, row_sums.size).view(shape))
    row_sums[:] = of_rows.cpu().numpy()
    column_sums += of_columns.cpu().numpy()
