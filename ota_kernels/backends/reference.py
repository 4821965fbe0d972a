"""The reference backend: plain torch, one tile at a time. It defines what the other backends must compute.

The words and the order of operations stand in tensors/terms.py; here each is a function. Decisions are
float32 and come out bit-identical everywhere. Values are float32 for 16-bit outputs and float64 for wider
ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..tensors import log8, random
from ..tensors.buffer import Buffer
from ..tensors.curvature import Curvature, Full, Log8, LowRank, Rank1, Uniform
from ..tensors.result import CENSUS, EXPONENTS, Candidates, MergeStats, NonFinite
from ..tensors.terms import ExpertTerms, Terms, score_bits
from ..tensors.tile import TensorInputs
from . import torch_sums

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
    """The float32 that log8 codes stand for, before they are scaled; see tensors/log8.py."""
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


def _bad_curvature(h: torch.Tensor) -> torch.Tensor:
    return ~(torch.isfinite(h) & (h >= 0))


def _count(role: str, t: int, bad: torch.Tensor) -> tuple[NonFinite, ...]:
    count = int(bad.sum())
    return (NonFinite(role, t, count, int(bad.nonzero()[0])),) if count else ()


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tile's elements lie in their tensor: flat index, row and column, int64[n]; columns of a row."""

    index: torch.Tensor
    columns: int

    @classmethod
    def of(cls, tile: TensorInputs) -> _Place:
        if tile.index is None:
            index = torch.arange(tile.start, tile.start + tile.numel)
        else:
            index = torch.as_tensor(np.asarray(tile.index, np.int64))
        return cls(index, tile.shape[-1] if tile.shape else 1)

    @property
    def row(self) -> torch.Tensor:
        return self.index // max(self.columns, 1)

    @property
    def column(self) -> torch.Tensor:
        return self.index % max(self.columns, 1)


@dataclass(frozen=True, slots=True)
class _Expert:
    """One expert's elements: w and its edit in the type of the sums, the edit in float32, h in float32,
    whether all its inputs are usable."""

    w: torch.Tensor
    edit: torch.Tensor
    d32: torch.Tensor
    h: torch.Tensor
    usable: torch.Tensor


def _expert(tile: TensorInputs, t: int, base: torch.Tensor) -> tuple[_Expert, tuple[NonFinite, ...]]:
    """base: in the type of the sums, zeros without one."""
    w, h = _decode(tile.experts[t], base.dtype), curvature(tile.curvatures[t], tile.numel)
    origin = tile.origins[t] if tile.origins else None
    o = base if origin is None else _decode(origin, base.dtype)
    bad = ~torch.isfinite(w.float()) | ~torch.isfinite(o.float()) & (origin is not None)
    found = _count("weights", t, bad) + _count("curvature", t, _bad_curvature(h))
    usable = torch.isfinite(base.float()) & ~bad & ~_bad_curvature(h)
    return _Expert(w, w - o, w.float() - o.float(), h, usable), found


# Score: float32[n] per expert.


def score(h: torch.Tensor, d: torch.Tensor | None, score_scale: float) -> torch.Tensor:
    """s = (h k) (2^16 d)^2 in float32; h k without an edit (d None). Shapes [n]."""
    scaled = h * torch.tensor(score_scale, dtype=torch.float32)
    return scaled if d is None else scaled * ((d * 65536.0) * (d * 65536.0))


def _spread(experts: list[_Expert]) -> torch.Tensor:
    scaled = [x.d32 * 65536.0 for x in experts]
    e = [x - scaled[0] for x in scaled]
    zero = torch.zeros_like(scaled[0])
    mean = sum(e[1:], zero) * torch.tensor(1 / len(e), dtype=torch.float32)
    return sum(((x - mean) * (x - mean) for x in e), zero)


def _scored(word: str, place: _Place, experts: list[_Expert], terms: Terms) -> list[torch.Tensor]:
    pairs = list(zip(experts, terms.experts, strict=True))
    if word == "saliency":
        return [score(x.h, x.d32, e.score_scale) for x, e in pairs]
    if word == "curvature":
        return [score(x.h, None, e.score_scale) for x, e in pairs]
    if word == "magnitude":
        return [x.d32.abs() for x, _ in pairs]
    if word == "row magnitude":
        return [(x.d32 * 65536.0).abs() * torch.as_tensor(e.row_scores)[place.row] for x, e in pairs]
    if word == "spread":
        return [_spread(experts)] * len(experts)
    return [torch.zeros_like(x.d32) for x in experts]


# Select: bool[n] of one expert.


def _at_least(s: torch.Tensor, e: ExpertTerms, index: torch.Tensor) -> torch.Tensor:
    threshold = torch.tensor(e.threshold, dtype=torch.float32)
    return (s > threshold) | ((s == threshold) & (index >= e.first) & (index <= e.last))


def _between(s: torch.Tensor, e: ExpertTerms, index: torch.Tensor) -> torch.Tensor:
    upper = torch.tensor(e.upper, dtype=torch.float32)
    return _at_least(s, e, index) & ((s < upper) | ((s == upper) & (index <= e.upto)))


def _random(terms: Terms, e: ExpertTerms, index: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(random.uniform(terms.seed, terms.name_hash, e.position, index.numpy()))


def _by_rank(d32: torch.Tensor, e: ExpertTerms, length: int, stride: int) -> torch.Tensor:
    """p of each element of whole rows, by its rank in its row: `length` elements, `stride` apart."""
    if d32.numel() == 0:
        return d32
    rows = d32.abs().reshape(-1, length, stride)
    order = rows.argsort(dim=1, stable=True)
    places = torch.arange(length).reshape(1, length, 1).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    of_rank = random.probability_of_rank(e.probability, e.spread, np.arange(length), length)
    return torch.from_numpy(of_rank)[rank].reshape(-1)


def _selected(word: str, terms: Terms, t: int, x: _Expert, s: torch.Tensor, place: _Place) -> torch.Tensor:
    e = terms.experts[t]
    if word == "all":
        return torch.ones(s.shape, dtype=torch.bool)
    if word == "at least":
        return _at_least(s, e, place.index)
    if word == "between":
        return _between(s, e, place.index)
    if word == "above":
        return s > torch.tensor(e.threshold, dtype=torch.float32)
    if word == "random":
        return _random(terms, e, place.index) < torch.tensor(e.probability, dtype=torch.float32)
    return _random(terms, e, place.index) < _by_rank(x.d32, e, *terms.ranked)


# Elect: which of the selected edits are added.


def _large_enough(d32: torch.Tensor, trim: float) -> torch.Tensor:
    if trim == 0:
        return torch.ones(d32.shape, dtype=torch.bool)
    return d32.abs() >= torch.tensor(trim, dtype=torch.float32)


def _same_sign(v: torch.Tensor, elected: torch.Tensor, tie: float) -> torch.Tensor:
    sign = torch.where(elected == 0, torch.tensor(tie), torch.sign(elected))
    return (v != 0) & (torch.sign(v) == sign)


def _elected(terms: Terms, survive: list[torch.Tensor], votes: list[torch.Tensor]) -> list[torch.Tensor]:
    """g_t of the experts' surviving edits; votes: v_t, float32[n] each."""
    word, zero = terms.words.elect, torch.zeros(())
    pairs = list(zip(survive, votes, strict=True))
    if word == "none":
        return survive
    if word == "largest":
        largest, winner = torch.full_like(votes[0], -1.0), torch.full(votes[0].shape, -1)
        for t, (m, v) in enumerate(pairs):
            wins = m & (v.abs() >= largest)
            largest, winner = torch.where(wins, v.abs(), largest), torch.where(wins, t, winner)
        return [winner == t for t in range(len(votes))]
    if word == "count":
        elected = sum(torch.where(m, torch.sign(v), zero) for m, v in pairs)
    else:
        elected = sum(torch.where(m, v, zero) for m, v in pairs)
    if word == "agreement":
        share = torch.tensor(terms.agreement, dtype=torch.float32)
        agreeing = sum((m & (v.abs() > share * (elected - v).abs())).int() for m, v in pairs)
        return [m & (agreeing >= terms.needed) for m in survive]
    return [m & _same_sign(v, elected, terms.tie) for m, v in pairs]


# Edit, weigh and divide: values.


def _clipped(d: torch.Tensor, clip: float) -> torch.Tensor:
    return (clip / d.abs().clamp(min=1e-6)).clamp(0, 1) * d


def _weights(terms: Terms, experts: list[_Expert], place: _Place) -> list[torch.Tensor]:
    """P_t of every element, but for `alone`."""
    word = terms.words.weigh
    acc = experts[0].w.dtype
    if word == "curvature":
        return [
            x.h.to(acc) ** terms.power * e.weight_scale + terms.epsilon
            for x, e in zip(experts, terms.experts, strict=True)
        ]
    if word in ("by row", "by column"):
        at = place.row if word == "by row" else place.column
        return [torch.as_tensor(e.weights).to(acc)[at] for e in terms.experts]
    return [torch.full_like(x.w, e.weight_scale) for x, e in zip(experts, terms.experts, strict=True)]


def _alone(terms: Terms, added: list[torch.Tensor], weights: list[torch.Tensor]) -> list[torch.Tensor]:
    if terms.words.weigh != "alone":
        return weights
    alone = sum(g.int() for g in added) == 1
    return [torch.where(alone, p * e.alone, p) for p, e in zip(weights, terms.experts, strict=True)]


def _denominator(terms: Terms, added: list[torch.Tensor], weights: list[torch.Tensor]) -> torch.Tensor:
    word, zero = terms.words.divide, torch.zeros((), dtype=weights[0].dtype)
    if word == "number":
        found = torch.full_like(weights[0], terms.denominator)
    elif word == "weights":
        found = sum(weights)
    elif word == "kept weights":
        found = sum(torch.where(g, p, zero) for g, p in zip(added, weights, strict=True))
        found = found.clamp(min=terms.least) if terms.least > 0 else found
    else:
        found = sum(g.to(zero.dtype) for g in added).clamp(min=1)
    return torch.where(found == 0, zero + 1, found) if terms.zero == "one" else found


def merge(tile: TensorInputs, terms: Terms, out: np.ndarray) -> MergeStats:
    """Merge one tile into `out` (uint8, the tile's elements in its out_dtype)."""
    words, place = terms.words, _Place.of(tile)
    acc = torch.float64 if tile.out_dtype.itemsize >= 4 else torch.float32
    has_base = tile.base is not None
    base = _decode(tile.base, acc) if has_base else torch.zeros(tile.numel, dtype=acc)
    nonfinite = _count("base", -1, ~torch.isfinite(base.float()))
    experts = []
    for t in range(len(tile.experts)):
        expert, bad = _expert(tile, t, base)
        experts.append(expert)
        nonfinite += bad
    unusable = ~torch.stack([torch.isfinite(base.float()), *(x.usable for x in experts)]).all(0)

    scores = _scored(words.score, place, experts, terms)
    masks = [
        _selected(words.select, terms, t, x, s, place)
        for t, (x, s) in enumerate(zip(experts, scores, strict=True))
    ]
    survive = [
        m & _large_enough(x.d32, e.trim) for m, x, e in zip(masks, experts, terms.experts, strict=True)
    ]
    votes = [
        torch.tensor(e.vote, dtype=torch.float32) * x.d32 for x, e in zip(experts, terms.experts, strict=True)
    ]
    added = _elected(terms, survive, votes)

    zero = torch.zeros((), dtype=acc)
    weights = _alone(terms, added, _weights(terms, experts, place))
    numerator = sum(
        torch.where(
            g,
            p * (e.edit_scale * (_clipped(x.edit, terms.clip) if words.edit == "clipped" else x.edit)),
            zero,
        )
        for g, p, x, e in zip(added, weights, experts, terms.experts, strict=True)
    )
    denominator = _denominator(terms, added, weights)
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
    experts: list[_Expert],
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
    weights = (operands.base, *operands.experts, *operands.origins)
    columns = [
        positions.astype(np.uint32),
        *(np.zeros(0, np.uint8) if b is None else b.data for b in weights),
    ]
    columns += [
        np.zeros(0, np.uint8)
        if isinstance(c, Uniform)
        else curvature(c, len(positions)).numpy().view(np.uint8)
        for c in operands.curvatures
    ]
    return Candidates.of(tile, columns, steps)


def _one(tile: TensorInputs, t: int, terms: Terms) -> tuple[_Expert, torch.Tensor, tuple[NonFinite, ...]]:
    """Expert t's elements, its scores (0 where an input is not usable), and what is not usable."""
    base = torch.zeros(tile.numel) if tile.base is None else _decode(tile.base, torch.float32)
    nonfinite = _count("base", -1, ~torch.isfinite(base))
    every = range(len(tile.experts)) if terms.words.score == "spread" else [t]
    experts = []
    for other in every:
        expert, bad = _expert(tile, other, base)
        nonfinite += bad if other == t else ()
        experts.append(expert)
    of = Terms(terms.words, tuple(terms.experts[other] for other in every))
    at = list(every).index(t)
    s = _scored(terms.words.score, _Place.of(tile), experts, of)[at]
    x = experts[at]
    # Not a number: a curvature above 2^96 times an edit of 0.
    return x, torch.where(x.usable & ~s.isnan(), s, torch.zeros(())), nonfinite


def _kept_edits(tile: TensorInputs, t: int, terms: Terms) -> tuple[torch.Tensor, tuple[NonFinite, ...]]:
    x, s, nonfinite = _one(tile, t, terms)
    kept = _selected(terms.words.select, terms, t, x, s, _Place.of(tile))
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


def edits(tile: TensorInputs, t: int, terms: Terms) -> tuple[np.ndarray, tuple[NonFinite, ...]]:
    """The masked edits m_t d_t of expert t, float32[n]."""
    found, nonfinite = _kept_edits(tile, t, terms)
    return found.numpy(), nonfinite


def power_sum(tile: TensorInputs, t: int, power: float) -> tuple[float, tuple[NonFinite, ...]]:
    """The sum of h_t^power over the tile, in float64."""
    h = curvature(tile.curvatures[t], tile.numel)
    bad = _bad_curvature(h)
    return float((torch.where(bad, 0.0, h).double() ** power).sum()), _count("curvature", t, bad)


def _columns(tile: TensorInputs) -> int:
    return max(tile.shape[-1] if tile.shape else 1, 1)


def _all(tile: TensorInputs) -> list[_Expert]:
    """Every expert's elements, values in float64."""
    base = torch.zeros(tile.numel) if tile.base is None else _decode(tile.base, torch.float64)
    return [_expert(tile, t, base.double())[0] for t in range(len(tile.experts))]


def gram(tile: TensorInputs, by: str = "tensor") -> np.ndarray:
    """Products of edits, of weights without a base: see torch_sums.py."""
    return torch_sums.gram([x.edit for x in _all(tile)], _columns(tile), by)


def masked_sums(tile: TensorInputs, terms: Terms) -> np.ndarray:
    """Sums over edits and masks, float64[T, 6]; columns as SUMS (tensors/result.py) names them."""
    experts, place = _all(tile), _Place.of(tile)
    scores = _scored(terms.words.score, place, experts, terms)
    masks = [
        _selected(terms.words.select, terms, t, x, s, place)
        for t, (x, s) in enumerate(zip(experts, scores, strict=True))
    ]
    return torch_sums.masked_sums([x.edit for x in experts], masks)


def row_divergence(tile: TensorInputs, t: int) -> np.ndarray:
    """How far expert t's rows are from what its edit is taken from, float64[rows]: see torch_sums.py."""
    x = _all(tile)[t]
    return torch_sums.row_divergence(x.w, x.w - x.edit, _columns(tile))
