"""Tiles and terms for tests of the words (tensors/terms.py), and the words evaluated in plain numpy.

Decisions in float32 in the order of terms.py, values in float64. Nothing of the package computes here but
what decodes compressed curvature; random numbers are the oracle's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from oracle import philox

from ota_kernels.tensors.buffer import Buffer
from ota_kernels.tensors.curvature import Curvature, Full, Log8, LowRank, Rank1, Uniform
from ota_kernels.tensors.dtypes import BY_NAME
from ota_kernels.tensors.terms import ExpertTerms, Terms, Words, score_bits, score_of_bits, score_scale
from ota_kernels.tensors.tile import TensorInputs

NAME = "model.layers.0.weight"
F32 = np.float32


def encoded(values: np.ndarray, dtype: str, unaligned: bool = False) -> Buffer:
    """Values rounded to a type, from an odd address where asked for."""
    tensor = torch.from_numpy(np.array(values)).to(getattr(torch, dtype))
    data = tensor.view(torch.uint8).numpy().reshape(-1) if tensor.numel() else np.zeros(0, np.uint8)
    if unaligned:
        data = np.concatenate([np.zeros(1, np.uint8), data])[1:]
    return Buffer(data, BY_NAME[dtype])


def decoded(data: np.ndarray, dtype: str) -> np.ndarray:
    """Elements as float64."""
    if data.size == 0:
        return np.zeros(0)
    return torch.from_numpy(data.copy()).view(getattr(torch, dtype)).double().numpy()


def _curvature(rng: np.random.Generator, form: str, start: int, n: int, columns: int) -> Curvature:
    rows = (start + n) // columns + 1
    if form == "uniform":
        return Uniform()
    if form == "log8":
        codes = Buffer(rng.integers(0, 256, n).astype(np.uint8), BY_NAME["uint8"])
        return Log8(codes, rng.uniform(1e-9, 1e-8, rows).astype(F32), columns, start)
    if form == "rank1":
        return Rank1(rng.uniform(1e-6, 1e-5, rows).astype(F32), rng.random(columns).astype(F32), start)
    if form == "low rank":
        left, right = rng.normal(size=(rows, 3)) * 1e-6, rng.random((3, columns))
        return LowRank(left.astype(F32), right.astype(F32), start)
    return Full(encoded(1e-11 * rng.random(n) ** 4, form))


def tile(
    rng: np.random.Generator,
    experts: int = 3,
    n: int = 700,
    columns: int = 50,
    start: int = 100,
    weights: tuple[str, ...] = ("bfloat16",),
    out: str = "bfloat16",
    form: str = "float32",
    base: bool = True,
    origins: bool = False,
    gathered: bool = False,
    unaligned: bool = False,
) -> TensorInputs:
    """A tile from flat index `start` on. Edits are multiples of one number, so that many scores are equal."""
    types = [weights[t % len(weights)] for t in range(experts + 1)]
    w_0 = np.round(rng.normal(size=n) * 64) / 1024
    edits = np.round(rng.normal(size=(experts, n)) * 3) / 1024 * (rng.random((experts, n)) < 0.9)
    given = tuple(encoded(w_0 + d, t, unaligned) for d, t in zip(edits, types, strict=False))
    own = (None, *(encoded(w_0 + rng.normal(size=n) / 256, t) for t in types[2:]))
    found = TensorInputs(
        NAME,
        ((start + n) // columns + 1, columns),
        BY_NAME[out],
        encoded(w_0, types[-1], unaligned) if base else None,
        given,
        tuple(_curvature(rng, form, start, n, columns) for _ in range(experts)),
        own[:experts] if origins else (),
        start,
    )
    return found.gather(np.sort(rng.permutation(n)[: n // 2])) if gathered else found


@dataclass(frozen=True)
class Evaluated:
    """out: float64[n], NaN where nothing finite is due; masks, added: bool[T, n], m_t and g_t; scores:
    float32[T, n]; d32: float32[T, n]; operand: float64[n], the largest magnitude that is added up."""

    out: np.ndarray
    masks: np.ndarray
    added: np.ndarray
    scores: np.ndarray
    d32: np.ndarray
    operand: np.ndarray


@dataclass(frozen=True)
class Inputs:
    """The elements of a tile. w, origin: float64[T, n]; base: float64[n]; h: float32[T, n]; index: int64."""

    w: np.ndarray
    origin: np.ndarray
    base: np.ndarray
    h: np.ndarray
    index: np.ndarray
    columns: int

    @classmethod
    def of(cls, given: TensorInputs, words: Words) -> Inputs:
        n = given.numel
        everything = np.arange(n)
        base = np.zeros(n) if given.base is None else decoded(given.base.data, given.base.dtype.name)
        curvatures = [c if words.curvature else Uniform() for c in given.curvatures]
        h = [np.ones(n) if isinstance(c, Uniform) else c.gather(everything).float32() for c in curvatures]
        own = given.origins or (None,) * len(given.experts)
        return cls(
            np.array([decoded(b.data, b.dtype.name) for b in given.experts]),
            np.array([base if o is None else decoded(o.data, o.dtype.name) for o in own]),
            base,
            np.array(h, F32),
            given.start + everything if given.index is None else given.index,
            given.shape[-1],
        )

    @property
    def d32(self) -> np.ndarray:
        return self.w.astype(F32) - self.origin.astype(F32)

    @property
    def usable(self) -> np.ndarray:
        """bool[T, n]: all inputs of the expert's element."""
        with np.errstate(invalid="ignore"):
            finite = np.isfinite(self.w.astype(F32)) & np.isfinite(self.origin.astype(F32))
            return finite & np.isfinite(self.base.astype(F32)) & np.isfinite(self.h) & (self.h >= 0)


def scores(x: Inputs, terms: Terms) -> np.ndarray:
    """s_t, float32[T, n]."""
    word, d = terms.words.score, x.d32
    big = F32(65536)
    k = np.array([[e.score_scale] for e in terms.experts], F32)
    if word == "saliency":
        return (x.h * k) * ((d * big) * (d * big))
    if word == "curvature":
        return x.h * k
    if word == "magnitude":
        return np.abs(d)
    if word == "row magnitude":
        return np.abs(d * big) * np.array([e.row_scores[x.index // x.columns] for e in terms.experts])
    if word == "spread":
        e = d * big - d[0] * big
        mean = np.zeros_like(d[0])
        for one in e[1:]:
            mean = mean + one
        mean = mean * F32(1 / len(d))
        found = np.zeros_like(mean)
        for one in e:
            found = found + (one - mean) * (one - mean)
        return np.broadcast_to(found, d.shape)
    return np.zeros_like(d)


def uniforms(terms: Terms, position: int, index: np.ndarray) -> np.ndarray:
    stop = int(index.max(initial=-1)) + 1
    return philox.uniforms(terms.seed, NAME, position, 0, stop)[index]


def _rank_probability(d32: np.ndarray, e: ExpertTerms, length: int, apart: int) -> np.ndarray:
    if length == 1:
        return np.full(d32.shape, F32(e.probability))
    rows = np.abs(d32).reshape(-1, length, apart)
    rank = np.argsort(np.argsort(rows, axis=1, kind="stable"), axis=1, kind="stable")
    return ((e.probability - e.spread) + 2 * e.spread * rank / (length - 1)).astype(F32).reshape(-1)


def chances(x: Inputs, terms: Terms) -> np.ndarray:
    """What edits are divided by, float32[T, n]."""
    if terms.words.edit != "by chance":
        return np.ones_like(x.d32)
    return np.array(
        [_rank_probability(d, e, *terms.ranked) for d, e in zip(x.d32, terms.experts, strict=True)]
    )


def masks(x: Inputs, terms: Terms, s: np.ndarray) -> np.ndarray:
    """m_t, bool[T, n]."""
    word, found = terms.words.select, []
    for t, e in enumerate(terms.experts):
        threshold, upper = F32(e.threshold), F32(e.upper)
        tied = (x.index >= e.first) & (x.index <= e.last)
        at_least = (s[t] > threshold) | ((s[t] == threshold) & tied)
        if word == "all":
            m = np.ones(s[t].shape, bool)
        elif word == "at least":
            m = at_least
        elif word == "between":
            m = at_least & ((s[t] < upper) | ((s[t] == upper) & (x.index <= e.upto)))
        elif word == "above":
            m = s[t] > threshold
        elif word == "random":
            m = uniforms(terms, e.position, x.index) < F32(e.probability)
        else:
            m = uniforms(terms, e.position, x.index) < _rank_probability(x.d32[t], e, *terms.ranked)
        found.append(m)
    return np.array(found)


def _added(x: Inputs, terms: Terms, kept: np.ndarray) -> np.ndarray:
    """g_t, bool[T, n]."""
    word = terms.words.elect
    kept = kept & (np.abs(x.d32) >= np.array([[e.trim] for e in terms.experts], F32))
    v = np.array([[e.vote] for e in terms.experts], F32) * (x.d32 / chances(x, terms))
    if word == "none":
        return kept
    if word == "largest":
        size = np.where(kept, np.abs(v), F32(-1))[::-1]
        winner = len(v) - 1 - np.argmax(size, axis=0)
        return kept & (np.arange(len(v))[:, None] == winner)
    total = np.zeros_like(v[0])
    for m, one in zip(kept, np.sign(v) if word == "count" else v, strict=True):
        total = total + np.where(m, one, F32(0))
    if word == "agreement":
        agreeing = kept & (np.abs(v) > F32(terms.agreement) * np.abs(total - v))
        return kept & (agreeing.sum(0) >= terms.needed)
    sign = np.where(total == 0, F32(terms.tie), np.sign(total))
    return kept & (v != 0) & (np.sign(v) == sign)


def _weights(x: Inputs, terms: Terms, added: np.ndarray) -> np.ndarray:
    """P_t, float64[T, n]."""
    word = terms.words.weigh
    a = np.array([[e.weight_scale] for e in terms.experts])
    if word == "curvature":
        return x.h.astype(np.float64) ** terms.power * a + terms.epsilon
    if word in ("by row", "by column"):
        at = x.index // x.columns if word == "by row" else x.index % x.columns
        return np.array([e.weights[at] for e in terms.experts])
    if word == "alone":
        factor = np.array([[e.alone] for e in terms.experts])
        return np.where(added.sum(0) == 1, a * factor, a)
    return np.broadcast_to(a, x.w.shape)


def evaluate(given: TensorInputs, terms: Terms) -> Evaluated:
    """What a merge must give."""
    words, x = terms.words, Inputs.of(given, terms.words)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        s = scores(x, terms)
        kept = masks(x, terms, s)
        added = _added(x, terms, kept)
        d = x.w - x.origin
        y = np.clip(terms.clip / np.maximum(np.abs(d), 1e-6), 0, 1) * d if words.edit == "clipped" else d
        y = y / chances(x, terms).astype(np.float64)
        p = _weights(x, terms, added)
        edits = np.array([[e.edit_scale] for e in terms.experts]) * y
        numerator = np.where(added, p * edits, 0).sum(0)
        denominator = {
            "number": np.full(given.numel, float(terms.denominator)),
            "weights": p.sum(0),
            "kept weights": np.maximum(np.where(added, p, 0).sum(0), terms.least),
            "kept count": np.maximum(added.sum(0), 1).astype(np.float64),
        }[words.divide]
        if terms.zero == "one":
            denominator = np.where(denominator == 0, 1.0, denominator)
        mean = x.w.sum(0) / len(x.w)
        fallback = x.base if terms.fallback == "base" and given.base is not None else mean
        out = x.base + terms.lambda_ * (numerator / denominator)
        out = np.where(~kept.any(0) | (denominator == 0), fallback, out)
        if terms.repair:
            out = np.where(x.usable.all(0), out, x.base)
        parts = np.abs(terms.lambda_ * p * edits / denominator)
        parts = np.where(added & (denominator != 0), parts, 0).max(0)
        operand = np.maximum(np.abs([x.base, *x.w]).max(0), parts)
    return Evaluated(out, kept, added, s, x.d32, operand)


def terms_of(rng: np.random.Generator, given: TensorInputs, words: Words, **numbers) -> Terms:
    """Terms with numbers that matter for every word: some scores and edits equal their bounds."""
    experts, columns = [], given.shape[-1]
    for t in range(len(given.experts)):
        e = ExpertTerms(
            score_scale=score_scale(given.base is not None),
            weight_scale=float(rng.uniform(0.3, 2)) * (2.0**20 if words.weigh == "curvature" else 1),
            edit_scale=float(rng.choice([1.0, 1.3])),
            vote=float(rng.choice([1.0, 0.7])),
            trim=float(rng.choice([0.0, 1 / 1024])),
            alone=float(rng.uniform(1, 2)),
            probability=0.4,
            spread=0.2,
            position=t + 2,
            weights=rng.uniform(0.2, 1, given.shape[0] if words.weigh == "by row" else columns),
            row_scores=rng.random(given.shape[0]).astype(F32),
        )
        experts.append(e)
    defaults = {
        "epsilon": 1e-3,
        "lambda_": 0.8,
        "denominator": 2.5,
        "least": 0.5,
        "clip": 2 / 1024,
        "tie": 1.0,
    }
    defaults |= {"agreement": 0.4, "needed": 1, "seed": 11, "name_hash": philox.name_hash(NAME)}
    defaults |= {"ranked": (max(columns, 1), 1)}
    terms = Terms(words, tuple(experts), **(defaults | numbers))
    x = Inputs.of(given, words)
    with np.errstate(invalid="ignore", over="ignore"):
        found = scores(x, terms)
    bounded = []
    for e, s in zip(experts, found, strict=True):
        usual = np.sort(s[np.isfinite(s)]) if np.isfinite(s).any() else np.zeros(1, F32)
        low, high = usual[int(0.4 * (usual.size - 1))], usual[int(0.9 * (usual.size - 1))]
        middle = int(x.index[x.index.size // 2]) if x.index.size else 0
        exact = words.select == "between" or rng.random() < 0.3
        bounds = {"first": middle - 150, "last": middle + 100, "upto": middle + 50} if exact else {}
        bounded.append(replace(e, threshold=float(low), upper=float(high), **bounds))
    return replace(terms, experts=tuple(bounded))


def with_brackets(terms: Terms, found: np.ndarray, census: bool = False) -> Terms:
    """Thresholds that are only known to lie between two of the scores (float32[T, n])."""
    experts = []
    for e, s in zip(terms.experts, found, strict=True):
        usual = np.sort(s[np.isfinite(s) & (s > 0)])
        low, high = (usual[int(q * (usual.size - 1))] for q in (0.5, 0.6)) if usual.size else (F32(1), F32(1))
        span = score_bits(high) - score_bits(low) + 1
        experts.append(
            replace(e, threshold=float(low), span=span, census=census, first=0, last=(1 << 63) - 1)
        )
    return replace(terms, experts=tuple(experts))


def closed_in_the_middle(terms: Terms) -> tuple[Terms, list[int]]:
    """Terms with thresholds inside of the brackets, and how far above the lowest score they lie."""
    steps = [e.span // 2 for e in terms.experts]
    experts = tuple(
        replace(e, threshold=score_of_bits(score_bits(e.threshold) + step), span=0, census=False)
        for e, step in zip(terms.experts, steps, strict=True)
    )
    return replace(terms, experts=experts), steps
