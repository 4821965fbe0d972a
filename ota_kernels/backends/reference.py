"""The reference backend: plain torch, one tile at a time. It defines what the other backends must compute.

The words and the order of operations stand in tensors/terms.py; each is a function of torch_words.py.
Decisions are float32 and come out bit-identical everywhere. Values are float32 for 16-bit outputs and float64
for wider ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..tensors.curvature import Uniform
from ..tensors.result import CENSUS, EXPONENTS, SUMS, Around, Candidates, MergeStats, NonFinite
from ..tensors.terms import ExpertTerms, Terms, score_bits
from ..tensors.tile import TensorInputs
from . import functions, torch_words

NAME = "reference"

curvature = torch_words.curvature


def verify() -> tuple[bool, str]:
    """(ok, reason): whether this backend can run here."""
    return True, f"torch {torch.__version__}"


def release() -> None:
    """Give up memory that is kept for the next tiles: none."""


def merge(tile: TensorInputs, terms: Terms, out: np.ndarray) -> MergeStats:
    """Merge one tile into `out` (uint8, the tile's elements in its out_dtype)."""
    if terms.function is not None:
        return functions.merge(tile, terms, out)
    words, place = terms.words, torch_words.Place.of(tile)
    acc = torch.float64 if tile.out_dtype.itemsize >= 4 else torch.float32
    has_base = tile.base is not None
    base = torch_words.decode(tile.base, acc) if has_base else torch.zeros(tile.numel, dtype=acc)
    nonfinite = torch_words.count("base", -1, ~torch.isfinite(base.float()))
    experts = []
    for t in range(len(tile.experts)):
        expert, bad = torch_words.expert(tile, t, base, words)
        experts.append(expert)
        nonfinite += bad
    unusable = ~torch.stack([torch.isfinite(base.float()), *(x.usable for x in experts)]).all(0)

    scores = torch_words.score_all(words.score, place, experts, terms)
    masks = [
        torch_words.select(words.select, terms, t, x, s, place)
        for t, (x, s) in enumerate(zip(experts, scores, strict=True))
    ]
    survive = [
        m & (x.d32.abs() >= torch.tensor(e.trim, dtype=torch.float32)) if e.trim else m
        for m, x, e in zip(masks, experts, terms.experts, strict=True)
    ]
    chances = [torch_words.chance(terms, t, x) for t, x in enumerate(experts)]
    votes = [
        torch.tensor(e.vote, dtype=torch.float32) * (x.d32 / p)
        for x, e, p in zip(experts, terms.experts, chances, strict=True)
    ]
    added = torch_words.elect(terms, survive, votes)

    zero = torch.zeros((), dtype=acc)
    weights = torch_words.with_alone(terms, added, torch_words.weigh(terms, experts, place))
    numerator = sum(
        torch.where(
            g,
            p
            * (
                e.edit_scale
                * (torch_words.clip(x.edit, terms.clip) if words.edit == "clipped" else x.edit / c.to(acc))
            ),
            zero,
        )
        for g, p, x, e, c in zip(added, weights, experts, terms.experts, chances, strict=True)
    )
    denominator = torch_words.divide(terms, added, weights)
    nobody = ~torch.stack(masks).any(0)
    mean = sum(x.w for x in experts) / len(experts)
    fallback = base if terms.fallback == "base" and has_base else mean
    merged = base + terms.lambda_ * (numerator / denominator)
    merged = torch.where(nobody | (denominator == 0), fallback, merged)
    if terms.repair:
        merged = torch.where(unusable, base, merged)
    written = merged.to(getattr(torch, tile.out_dtype.name))
    out[:] = written.view(torch.uint8).numpy()
    return _stats(tile, terms, experts, scores, masks, written, nonfinite)


def _stats(
    tile: TensorInputs,
    terms: Terms,
    experts: list[torch_words.Expert],
    scores: list[torch.Tensor],
    masks: list[torch.Tensor],
    written: torch.Tensor,
    nonfinite: tuple[NonFinite, ...],
) -> MergeStats:
    unusable = ~torch.stack([x.usable for x in experts]).all(0)
    counted = [m & x.usable if terms.repair else m for m, x in zip(masks, experts, strict=True)]
    # No -0: its bits are not 0's.
    usable = [
        torch.where((s > 0) & x.usable, s, torch.zeros(())) for s, x in zip(scores, experts, strict=True)
    ]
    pairs = list(zip(usable, terms.experts, strict=True))
    undecided = torch.stack([_in_bracket(s, e) for s, e in zip(scores, terms.experts, strict=True)]).any(0)
    nobody = ~torch.stack(masks).any(0)
    steps = tuple(_steps(s, e) for s, e in pairs)
    return MergeStats(
        kept=tuple(int((m & ~undecided).sum()) for m in counted),
        reached=tuple(int(m.sum()) for m in counted),
        unkept=int((nobody & ~undecided).sum()),
        overflow=int((~torch.isfinite(written) & ~undecided).sum()),
        repaired=int((unusable & ~undecided).sum()) if terms.repair else 0,
        nonfinite=nonfinite,
        candidates=_gather(tile, undecided, steps) if any(e.span for e in terms.experts) else None,
        censuses=tuple(_census(s[~_in_bracket(s, e)], e) if e.census else None for s, e in pairs),
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
    columns = [
        positions.astype(np.uint32),
        *(
            np.zeros(0, np.uint8) if b is None else b.data
            for b in (operands.base, *operands.experts, *operands.origins)
        ),
    ]
    columns += [
        np.zeros(0, np.uint8)
        if isinstance(c, Uniform)
        else torch_words.curvature(c, len(positions)).numpy().view(np.uint8)
        for c in operands.curvatures
    ]
    return Candidates.of(tile, columns, steps)


def _one(
    tile: TensorInputs, t: int, terms: Terms
) -> tuple[torch_words.Expert, torch.Tensor, tuple[NonFinite, ...]]:
    """Expert t's elements, its scores (0 where an input is not usable), and what is not usable."""
    base = torch.zeros(tile.numel) if tile.base is None else torch_words.decode(tile.base, torch.float32)
    nonfinite = torch_words.count("base", -1, ~torch.isfinite(base))
    every = range(len(tile.experts)) if terms.words.score == "spread" else [t]
    experts = []
    for other in every:
        expert, bad = torch_words.expert(tile, other, base, terms.words)
        nonfinite += bad if other == t else ()
        experts.append(expert)
    of = Terms(terms.words, tuple(terms.experts[other] for other in every))
    at = list(every).index(t)
    s = torch_words.score_all(terms.words.score, torch_words.Place.of(tile), experts, of)[at]
    x = experts[at]
    # Not a number: a curvature above 2^96 times an edit of 0.
    return x, torch.where(x.usable & ~s.isnan(), s, torch.zeros(())), nonfinite


def _kept_edits(tile: TensorInputs, t: int, terms: Terms) -> tuple[torch.Tensor, tuple[NonFinite, ...]]:
    x, s, nonfinite = _one(tile, t, terms)
    kept = torch_words.select(terms.words.select, terms, t, x, s, torch_words.Place.of(tile))
    return torch.where(kept & x.usable, x.d32, torch.zeros(())), nonfinite


def histogram(
    tile: TensorInputs,
    t: int,
    terms: Terms,
    of_edits: bool,
    prefix: int,
    counts: np.ndarray,
    lows: np.ndarray,
) -> tuple[NonFinite, ...]:
    """Add the counts of expert t's scores by their float32 bits; see `native.histogram`."""
    if of_edits:
        x, nonfinite = _kept_edits(tile, t, terms)
    else:
        _, x, nonfinite = _one(tile, t, terms)
    bits = x.view(torch.int32) & 0x7FFFFFFF
    high, low = bits >> 16, bits & 0xFFFF
    if prefix >= 0:
        counts += torch.bincount(low[high == prefix], minlength=counts.size).numpy()
    else:
        counts += torch.bincount(high, minlength=counts.size).numpy()
        torch.from_numpy(lows).index_add_(0, high, low.long())
    return nonfinite


def scores(tile: TensorInputs, t: int, terms: Terms) -> tuple[np.ndarray, tuple[NonFinite, ...]]:
    """The scores s_t of expert t, float32[n], 0 where an input is not usable."""
    _, s, nonfinite = _one(tile, t, terms)
    return s.numpy(), nonfinite


def around(
    tile: TensorInputs, t: int, terms: Terms, intervals: Sequence[tuple[float, float]]
) -> tuple[Around, tuple[NonFinite, ...]]:
    """Expert t's scores around places of their order: see Around."""
    found, nonfinite = scores(tile, t, terms)
    return Around.of(found, intervals), nonfinite


def edits(tile: TensorInputs, t: int, terms: Terms) -> tuple[np.ndarray, tuple[NonFinite, ...]]:
    """The masked edits m_t d_t of expert t, float32[n]."""
    found, nonfinite = _kept_edits(tile, t, terms)
    return found.numpy(), nonfinite


def power_sum(tile: TensorInputs, t: int, power: float) -> tuple[float, tuple[NonFinite, ...]]:
    """The sum of h_t^power over the tile, in float64."""
    h = torch_words.curvature(tile.curvatures[t], tile.numel)
    bad = torch_words.bad_curvature(h)
    return float((torch.where(bad, 0.0, h).double() ** power).sum()), torch_words.count("curvature", t, bad)


def _edits64(tile: TensorInputs, t: int) -> torch.Tensor:
    """d_t in float64 (w_t without a base)."""
    origin = (tile.origins[t] if tile.origins else None) or tile.base
    w = torch_words.decode(tile.experts[t], torch.float64)
    return w if origin is None else w - torch_words.decode(origin, torch.float64)


def gram(tile: TensorInputs, by: str = "tensor") -> np.ndarray:
    """Products of edits (of weights, without a base), sum_i d_s d_t in float64: float64[T, T], or
    [groups, T, T] by "row" or "column" of a tile of whole rows."""
    d = torch.stack([_edits64(tile, t) for t in range(len(tile.experts))])
    if by == "tensor":
        return (d @ d.T).numpy()
    columns = max(tile.shape[-1] if tile.shape else 1, 1)
    rows = d.reshape(len(d), tile.numel // columns, columns)
    return torch.einsum("src,trc->rst" if by == "row" else "src,trc->cst", rows, rows).numpy()


def masked_sums(tile: TensorInputs, terms: Terms) -> np.ndarray:
    """Sums over edits and masks, float64[T, 6]; columns as SUMS (tensors/result.py) names them. Where an
    expert's inputs are not usable it has no edit and keeps nothing."""
    masks, edits_ = [], []
    for t in range(len(tile.experts)):
        x, s, _ = _one(tile, t, terms)
        kept = torch_words.select(terms.words.select, terms, t, x, s, torch_words.Place.of(tile))
        masks.append(kept & x.usable)
        edits_.append(torch.where(x.usable, _edits64(tile, t), torch.zeros((), dtype=torch.float64)).abs())
    shared = torch.stack(masks).sum(0) > 1
    rows = []
    for m, d in zip(masks, edits_, strict=True):
        kept = d[m]
        found = {"kept": m.sum(), "l1": d.sum(), "kept_l1": kept.sum(), "kept_squares": (kept * kept).sum()}
        found |= {"shared": (m & shared).sum(), "unique": (m & ~shared).sum()}
        rows.append([float(found[name]) for name in SUMS])
    return np.array(rows, np.float64)


def row_divergence(tile: TensorInputs, t: int) -> np.ndarray:
    """KL(p | q) of each row, float64[rows]: p = softmax(w_t) + 1e-8, q = softmax(w_0) + 1e-8. Whole rows.

    As sum p (x - log1p(x)), x = q / p - 1: p and q have equal sums, so sum p x is 0, no term negative."""
    origin = (tile.origins[t] if tile.origins else None) or tile.base
    if origin is None:
        raise ValueError("a base, or an origin of the expert")
    columns = max(tile.shape[-1] if tile.shape else 1, 1)
    one, other = (
        torch_words.decode(b, torch.float64).reshape(-1, columns) for b in (tile.experts[t], origin)
    )
    p, q = (torch.softmax(w, -1) + 1e-8 for w in (one, other))
    x = (q - p) / p
    return (p * (x - torch.log1p(x)).clamp(min=0)).sum(-1).numpy()
