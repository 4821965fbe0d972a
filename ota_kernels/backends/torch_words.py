"""The words of tensors/terms.py in plain torch, one function each: what `reference` is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..tensors import log8, random
from ..tensors.buffer import Buffer
from ..tensors.curvature import Curvature, Full, Log8, LowRank, Rank1, Uniform
from ..tensors.result import NonFinite
from ..tensors.terms import ExpertTerms, Terms, Words
from ..tensors.tile import TensorInputs


def decode(buffer: Buffer, dtype: torch.dtype) -> torch.Tensor:
    """The buffer's elements in a float type. Bytes are copied first: mapped tensors may be unaligned."""
    if len(buffer) == 0:  # numpy 2.4 gives it stride 0, which torch does not view as another type
        return torch.empty(0, dtype=dtype)
    stored = torch.from_numpy(buffer.data.copy()).view(getattr(torch, buffer.dtype.name))
    return stored.to(dtype)


def matrix_places(c: Log8 | Rank1 | LowRank, n_columns: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each element."""
    index = torch.arange(c.start, c.start + n)
    return index // n_columns, index % n_columns


def levels(codes: torch.Tensor) -> torch.Tensor:
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
        return decode(c.values, torch.float32)
    if isinstance(c, Log8):
        row, _ = matrix_places(c, c.columns, n)
        return levels(torch.tensor(c.codes.data)) * torch.tensor(c.scales)[row]
    if isinstance(c, Rank1):
        row, column = matrix_places(c, c.columns.size, n)
        return torch.tensor(c.rows)[row] * torch.tensor(c.columns)[column]
    row, column = matrix_places(c, c.right.shape[1], n)
    left, right = torch.from_numpy(c.left), torch.from_numpy(c.right)
    h = torch.zeros(n)
    for r in range(c.right.shape[0]):
        h = h + left[row, r] * right[r, column]
    return torch.where(h > 0, h, torch.zeros(()))


def bad_curvature(h: torch.Tensor) -> torch.Tensor:
    return ~(torch.isfinite(h) & (h >= 0))


def count(role: str, t: int, bad: torch.Tensor) -> tuple[NonFinite, ...]:
    count = int(bad.sum())
    return (NonFinite(role, t, count, int(bad.nonzero()[0])),) if count else ()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tile's elements lie in their tensor: flat index, row and column, int64[n]; columns of a row."""

    index: torch.Tensor
    columns: int

    @classmethod
    def of(cls, tile: TensorInputs) -> Place:
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
class Expert:
    """One expert's elements: w and its edit in the type of the sums, the edit in float32, h in float32,
    whether all its inputs are usable."""

    w: torch.Tensor
    edit: torch.Tensor
    d32: torch.Tensor
    h: torch.Tensor
    usable: torch.Tensor


def expert(
    tile: TensorInputs, t: int, base: torch.Tensor, words: Words
) -> tuple[Expert, tuple[NonFinite, ...]]:
    """base: in the type of the sums, zeros without one. Curvature that no word reads is 1."""
    w = decode(tile.experts[t], base.dtype)
    h = curvature(tile.curvatures[t] if words.curvature else Uniform(), tile.numel)
    origin = tile.origins[t] if tile.origins else None
    o = base if origin is None else decode(origin, base.dtype)
    bad = ~torch.isfinite(w.float()) | ~torch.isfinite(o.float()) & (origin is not None)
    found = count("weights", t, bad) + count("curvature", t, bad_curvature(h))
    usable = torch.isfinite(base.float()) & ~bad & ~bad_curvature(h)
    return Expert(w, w - o, w.float() - o.float(), h, usable), found


# Score: float32[n] per expert.


def score(h: torch.Tensor, d: torch.Tensor | None, score_scale: float) -> torch.Tensor:
    """s = (h k) (2^16 d)^2 in float32; h k without an edit (d None). Shapes [n]."""
    scaled = h * torch.tensor(score_scale, dtype=torch.float32)
    return scaled if d is None else scaled * ((d * 65536.0) * (d * 65536.0))


def spread(experts: list[Expert]) -> torch.Tensor:
    scaled = [x.d32 * 65536.0 for x in experts]
    e = [x - scaled[0] for x in scaled]
    zero = torch.zeros_like(scaled[0])
    mean = sum(e[1:], zero) * torch.tensor(1 / len(e), dtype=torch.float32)
    return sum(((x - mean) * (x - mean) for x in e), zero)


def score_all(word: str, place: Place, experts: list[Expert], terms: Terms) -> list[torch.Tensor]:
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
        return [spread(experts)] * len(experts)
    return [torch.zeros_like(x.d32) for x in experts]


# Select: bool[n] of one expert.


def at_least(s: torch.Tensor, e: ExpertTerms, index: torch.Tensor) -> torch.Tensor:
    threshold = torch.tensor(e.threshold, dtype=torch.float32)
    return (s > threshold) | ((s == threshold) & (index >= e.first) & (index <= e.last))


def between(s: torch.Tensor, e: ExpertTerms, index: torch.Tensor) -> torch.Tensor:
    upper = torch.tensor(e.upper, dtype=torch.float32)
    return at_least(s, e, index) & ((s < upper) | ((s == upper) & (index <= e.upto)))


def uniform(terms: Terms, e: ExpertTerms, index: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(random.uniform(terms.seed, terms.name_hash, e.position, index.numpy()))


def by_rank(d32: torch.Tensor, e: ExpertTerms, length: int, stride: int) -> torch.Tensor:
    """p of each element of whole rows, by its rank in its row: `length` elements, `stride` apart."""
    if d32.numel() == 0:
        return d32
    rows = d32.abs().reshape(-1, length, stride)
    order = rows.argsort(dim=1, stable=True)
    places = torch.arange(length).reshape(1, length, 1).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    of_rank = random.probability_of_rank(e.probability, e.spread, np.arange(length), length)
    return torch.from_numpy(of_rank)[rank].reshape(-1)


def chance(terms: Terms, t: int, x: Expert) -> torch.Tensor:
    """What edits are divided by: p_t(i) with "by chance", else 1."""
    return (
        by_rank(x.d32, terms.experts[t], *terms.ranked) if terms.words.edit == "by chance" else torch.ones(())
    )


def select(word: str, terms: Terms, t: int, x: Expert, s: torch.Tensor, place: Place) -> torch.Tensor:
    e = terms.experts[t]
    if word == "all":
        return torch.ones(s.shape, dtype=torch.bool)
    if word == "at least":
        return at_least(s, e, place.index)
    if word == "between":
        return between(s, e, place.index)
    if word == "above":
        return s > torch.tensor(e.threshold, dtype=torch.float32)
    if word == "random":
        return uniform(terms, e, place.index) < torch.tensor(e.probability, dtype=torch.float32)
    return uniform(terms, e, place.index) < by_rank(x.d32, e, *terms.ranked)


# Elect: which of the selected edits are added.


def same_sign(v: torch.Tensor, elected: torch.Tensor, tie: float) -> torch.Tensor:
    sign = torch.where(elected == 0, torch.tensor(tie), torch.sign(elected))
    return (v != 0) & (torch.sign(v) == sign)


def elect(terms: Terms, survive: list[torch.Tensor], votes: list[torch.Tensor]) -> list[torch.Tensor]:
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
    return [m & same_sign(v, elected, terms.tie) for m, v in pairs]


# Edit, weigh and divide: values.


def clip(d: torch.Tensor, clip: float) -> torch.Tensor:
    return (clip / d.abs().clamp(min=1e-6)).clamp(0, 1) * d


def weigh(terms: Terms, experts: list[Expert], place: Place) -> list[torch.Tensor]:
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


def with_alone(terms: Terms, added: list[torch.Tensor], weights: list[torch.Tensor]) -> list[torch.Tensor]:
    if terms.words.weigh != "alone":
        return weights
    alone = sum(g.int() for g in added) == 1
    return [torch.where(alone, p * e.alone, p) for p, e in zip(weights, terms.experts, strict=True)]


def divide(terms: Terms, added: list[torch.Tensor], weights: list[torch.Tensor]) -> torch.Tensor:
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
