"""The reference backend: plain torch, one tile at a time. It defines what the other backends must compute.

Decisions (scores, masks, trimming, elected signs) are float32 operations in the order written here and come
out bit-identical everywhere. Values are computed in float32 for 16-bit outputs and in float64 for wider ones.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ..tensors import log8
from ..tensors.buffer import Buffer
from ..tensors.curvature import Curvature, Full, Log8, LowRank, Rank1, Uniform
from ..tensors.dtypes import BY_NAME
from ..tensors.result import CENSUS, EXPONENTS, Candidates, MergeStats, NonFinite
from ..tensors.terms import ExpertTerms, Terms, score_bits
from ..tensors.tile import TensorInputs

NAME = "reference"


def verify() -> tuple[bool, str]:
    """(ok, reason): whether this backend can run here."""
    return True, f"torch {torch.__version__}"


def release() -> None:
    """Give up memory that is kept for the next tiles: none."""


def _decode(buffer: Buffer, dtype: torch.dtype) -> torch.Tensor:
    """The buffer's elements in a float type. Bytes are copied first: mapped tensors may be unaligned."""
    if len(buffer) == 0:  # numpy 2.4 gives it stride 0, which torch does not view as another type
        return torch.empty(0, dtype=dtype)
    stored = torch.from_numpy(buffer.data.copy()).view(getattr(torch, buffer.dtype.name))
    return stored.to(dtype)


def _places(c: Log8 | Rank1 | LowRank, n_columns: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each element."""
    index = torch.arange(c.start, c.start + n)
    return index // n_columns, index % n_columns


def _levels(codes: torch.Tensor) -> torch.Tensor:
    """The float32 that log8 codes stand for, before they are scaled; see ota_kernels.log8."""
    c = codes.int()
    m = c & 3
    bits = ((32 * c - (m * (45 - 11 * m) >> 2)) << 16) + (log8.BIAS << 23)
    return torch.where(c > 0, bits.view(torch.float32), torch.zeros(()))


def curvature(c: Curvature, n: int) -> torch.Tensor:
    """h_t of a tile: float32[n]."""
    if isinstance(c, Uniform):
        return torch.ones(n)
    if isinstance(c, Full):
        return _decode(c.values, torch.float32)
    if isinstance(c, Log8):
        row, _ = _places(c, c.columns, n)
        return _levels(torch.tensor(c.codes.data)) * torch.tensor(c.scales)[row]
    if isinstance(c, Rank1):
        row, column = _places(c, c.columns.size, n)
        return torch.tensor(c.rows)[row] * torch.tensor(c.columns)[column]
    row, column = _places(c, c.right.shape[1], n)
    left, right = torch.from_numpy(c.left), torch.from_numpy(c.right)
    h = torch.zeros(n)
    for r in range(c.right.shape[0]):
        h = h + left[row, r] * right[r, column]
    return torch.where(h > 0, h, torch.zeros(()))


def score(h: torch.Tensor, d: torch.Tensor | None, score_scale: float) -> torch.Tensor:
    """s = (h k) (2^16 d)^2 in float32; h k without a base (d None). Shapes [n]."""
    scaled = h * torch.tensor(score_scale, dtype=torch.float32)
    return scaled if d is None else scaled * ((d * 65536.0) * (d * 65536.0))


def _bad_curvature(h: torch.Tensor) -> torch.Tensor:
    return ~(torch.isfinite(h) & (h >= 0))


def _count(role: str, t: int, bad: torch.Tensor) -> tuple[NonFinite, ...]:
    count = int(bad.sum())
    return (NonFinite(role, t, count, int(bad.nonzero()[0])),) if count else ()


def merge(tile: TensorInputs, terms: Terms, out: np.ndarray) -> MergeStats:
    """Merge one tile into `out` (uint8, the tile's elements in its out_dtype)."""
    f = terms.formula
    n = tile.numel
    acc = torch.float64 if tile.out_dtype.itemsize >= 4 else torch.float32
    has_base = tile.base is not None
    base = _decode(tile.base, acc) if has_base else torch.zeros(n, dtype=acc)
    unusable = ~torch.isfinite(base.float())
    nonfinite = _count("base", -1, unusable)

    weights, edits, masks, trimmed, counted, usable_scores = [], [], [], [], [], []
    undecided = torch.zeros(n, dtype=torch.bool)
    for t, e in enumerate(terms.experts):
        w, h = _decode(tile.experts[t], acc), curvature(tile.curvatures[t], n)
        nonfinite += _count("weights", t, ~torch.isfinite(w.float()))
        nonfinite += _count("curvature", t, _bad_curvature(h))
        bad = ~torch.isfinite(base.float()) | ~torch.isfinite(w.float()) | _bad_curvature(h)
        unusable = unusable | bad
        d32 = w.float() - base.float()
        s = score(h, d32 if has_base else None, e.score_scale)
        masks.append(s >= e.threshold if f.masked else torch.ones(n, dtype=torch.bool))
        counted.append(masks[-1] & ~bad if f.repair_nonfinite else masks[-1])
        undecided |= _in_bracket(s, e)
        usable_scores.append(torch.where((s > 0) & ~bad, s, torch.zeros(())))  # no -0: its bits are not 0's
        a = torch.full((n,), e.weight_scale, dtype=acc)
        weights.append(h.to(acc) ** f.power * a + terms.epsilon if f.curvature_weights else a)
        edits.append(e.edit_scale * (w - base))
        trimmed.append(torch.where(masks[-1] & (d32.abs() >= e.trim), np.float32(e.edit_scale) * d32, 0.0))

    if f.elect_signs:
        elected = sum(trimmed)
        keeps = [(x != 0) & (torch.sign(x) == torch.sign(elected)) for x in trimmed]
    else:
        keeps = masks
    zero = torch.zeros((), dtype=acc)
    numerator = sum(torch.where(k, p * d, zero) for k, p, d in zip(keeps, weights, edits, strict=True))
    if f.denominator is not None:
        denominator = torch.full((n,), f.denominator, dtype=acc)
    elif f.mask_weights:
        denominator = sum(torch.where(m, p, zero) for m, p in zip(masks, weights, strict=True))
    else:
        denominator = sum(weights)

    nobody = ~torch.stack(masks).any(0)
    mean = sum(_decode(w, acc) for w in tile.experts) / len(tile.experts)
    fallback = base if f.fallback_to_base and has_base else mean
    merged = base + f.lambda_ * (numerator / denominator)
    merged = torch.where(nobody | (denominator == 0), fallback, merged)
    if f.repair_nonfinite:
        merged = torch.where(unusable, base, merged)
    steps = tuple(_steps(s, e) for s, e in zip(usable_scores, terms.experts, strict=True))
    written = merged.to(getattr(torch, tile.out_dtype.name))
    out[:] = written.view(torch.uint8).numpy()
    return MergeStats(
        kept=tuple(int((m & ~undecided).sum()) for m in counted),
        reached=tuple(int(m.sum()) for m in counted),
        unkept=int((nobody & ~undecided).sum()),
        overflow=int((~torch.isfinite(written) & ~undecided).sum()),
        repaired=int((unusable & ~undecided).sum()) if f.repair_nonfinite else 0,
        nonfinite=nonfinite,
        candidates=_gather(tile, undecided, steps) if any(e.span for e in terms.experts) else None,
        censuses=tuple(
            _census(s[~_in_bracket(s, e)], e) if e.census else None
            for s, e in zip(usable_scores, terms.experts, strict=True)
        ),
    )


def _bits(s: torch.Tensor) -> torch.Tensor:
    return s.view(torch.int32).long()


def _in_bracket(s: torch.Tensor, e: ExpertTerms) -> torch.Tensor:
    if not e.span:
        return torch.zeros(s.shape, dtype=torch.bool)
    steps = _bits(s) - score_bits(e.threshold)
    return (steps >= 0) & (steps < e.span)


def _steps(s: torch.Tensor, e: ExpertTerms) -> np.ndarray:
    return (_bits(s[_in_bracket(s, e)]) - score_bits(e.threshold)).numpy().astype(np.uint32)


def _census(s: torch.Tensor, e: ExpertTerms) -> np.ndarray:
    bits = _bits(s)
    above = bits >= score_bits(e.threshold) + max(e.span, 1)
    exponent = bits >> 23
    significand = (bits & 0x7FFFFF) + torch.where(exponent > 0, 1 << 23, 0)
    sums = torch.zeros(CENSUS, dtype=torch.int64)
    sums.index_add_(0, exponent + EXPONENTS * above, significand)
    sums[-1] = above.sum()
    return sums.numpy()


def _gather(tile: TensorInputs, wanted: torch.Tensor, steps: tuple[np.ndarray, ...]) -> Candidates:
    positions = wanted.nonzero().reshape(-1).numpy()
    operands = tile.gather(positions)

    def widened(c: Curvature) -> Curvature:
        if not isinstance(c, Full):
            return c
        h = curvature(c, len(positions)).numpy()
        return Full(Buffer(h.view(np.uint8), BY_NAME["float32"], c.values.origin), c.bias_correction)

    curvatures = tuple(widened(c) for c in operands.curvatures)
    return Candidates(positions.astype(np.uint32), replace(operands, curvatures=curvatures), steps)


def _scores(
    tile: TensorInputs, t: int, terms: ExpertTerms
) -> tuple[torch.Tensor, torch.Tensor, tuple[NonFinite, ...]]:
    """Task vector and scores of expert t, both 0 where an input is not usable."""
    w, h = _decode(tile.experts[t], torch.float32), curvature(tile.curvatures[t], tile.numel)
    base = None if tile.base is None else _decode(tile.base, torch.float32)
    nonfinite = _count("weights", t, ~torch.isfinite(w)) + _count("curvature", t, _bad_curvature(h))
    usable = torch.isfinite(w) & ~_bad_curvature(h)
    if base is not None:
        nonfinite = _count("base", -1, ~torch.isfinite(base)) + nonfinite
        usable = usable & torch.isfinite(base)
    d = w if base is None else w - base
    s = score(h, None if base is None else d, terms.score_scale)
    usable_score = usable & ~s.isnan()  # a curvature above 2^96 times an edit of 0
    zero = torch.zeros(())
    return torch.where(usable, d, zero), torch.where(usable_score, s, zero), nonfinite


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
    d, s, nonfinite = _scores(tile, t, terms)
    x = torch.where(s >= terms.threshold, d, torch.zeros(())) if of_edits else s
    bits = x.view(torch.int32) & 0x7FFFFFFF
    high, low = bits >> 16, bits & 0xFFFF
    if prefix >= 0:
        counts += torch.bincount(low[high == prefix], minlength=counts.size).numpy()
    else:
        counts += torch.bincount(high, minlength=counts.size).numpy()
        torch.from_numpy(lows).index_add_(0, high, low.long())
    return nonfinite


def scores(tile: TensorInputs, t: int, terms: ExpertTerms) -> tuple[np.ndarray, tuple[NonFinite, ...]]:
    """The scores s_t of expert t, float32[n], 0 where an input is not usable."""
    _, s, nonfinite = _scores(tile, t, terms)
    return s.numpy(), nonfinite


def edits(tile: TensorInputs, t: int, terms: ExpertTerms) -> tuple[np.ndarray, tuple[NonFinite, ...]]:
    """The masked edits m_t d_t of expert t, float32[n]."""
    d, s, nonfinite = _scores(tile, t, terms)
    return torch.where(s >= terms.threshold, d, torch.zeros(())).numpy(), nonfinite


def power_sum(tile: TensorInputs, t: int, power: float) -> tuple[float, tuple[NonFinite, ...]]:
    """The sum of h_t^power over the tile, in float64."""
    h = curvature(tile.curvatures[t], tile.numel)
    bad = _bad_curvature(h)
    return float((torch.where(bad, 0.0, h).double() ** power).sum()), _count("curvature", t, bad)
