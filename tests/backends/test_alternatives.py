"""Elements that one expert's bracket alone leaves undecided: which they are, and what is listed of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from models import random_experts

from ota_kernels.backends import native
from ota_kernels.run import found
from ota_kernels.tensors.buffer import Buffer
from ota_kernels.tensors.curvature import Full
from ota_kernels.tensors.result import Candidates, dropped
from ota_kernels.tensors.terms import ExpertTerms, Terms, Words, score_bits, score_of_bits, score_scale
from ota_kernels.tensors.tile import TensorInputs

SHAPE = (23, 192)
ELEMENTS = SHAPE[0] * SHAPE[1]
PRECOND = Terms(Words(), ())
FORMULAS = {
    "precond": PRECOND,
    "weights of all": Terms(Words(divide="weights"), ()),
    "linear": Terms(Words(weigh="constant", divide="number"), (), denominator=3.0),
    "ties": Terms(Words(weigh="constant", divide="number", elect="sum"), ()),
    "mean where nobody keeps": Terms(Words(), (), fallback="mean"),
}


@pytest.fixture(params=native.instruction_sets())
def isa(request, monkeypatch):
    monkeypatch.setattr(native, "instruction_set", lambda: request.param)


def tile_of(out_dtype: str, n_experts: int = 3, base: bool = True) -> TensorInputs:
    made = random_experts(1, SHAPE, n_experts, dtypes=("bfloat16",), base_dtype="bfloat16").inputs(out_dtype)
    return made if base else replace(made, base=None)


def scores_of(tile: TensorInputs) -> list[np.ndarray]:
    terms = found.scores_of(len(tile.experts), tile)
    return [native.scores(tile, t, terms)[0] for t in range(len(tile.experts))]


def brackets_of(tile: TensorInputs, like: Terms, share: float) -> Terms:
    """Each expert's bracket holds this share of its scores, from their median on."""
    experts = []
    for scores in scores_of(tile):
        ascending = np.sort(scores)
        lowest = max(float(ascending[ELEMENTS // 2]), 1e-30)
        span = score_bits(float(ascending[int(ELEMENTS * (0.5 + share))])) - score_bits(lowest) + 1
        weight_scale = 2.0**40 if like.words.weigh == "curvature" else 1.0
        e = ExpertTerms(score_scale=score_scale(tile.base is not None), weight_scale=weight_scale)
        experts.append(replace(e, threshold=lowest, span=span))
    words = replace(like.words, score="curvature" if tile.base is None else "saliency")
    return replace(like, words=words, experts=tuple(experts), epsilon=1e-26 * 2.0**40)


def closed(terms: Terms, at_end: bool) -> Terms:
    """With thresholds at the ends of the brackets, or at their lowest."""
    ends = [score_of_bits(score_bits(e.threshold) + e.span) if at_end else e.threshold for e in terms.experts]
    experts = tuple(replace(e, threshold=x, span=0) for e, x in zip(terms.experts, ends, strict=True))
    return replace(terms, experts=experts)


def merge(tile: TensorInputs, terms: Terms) -> tuple[np.ndarray, Candidates | None]:
    out = np.zeros(ELEMENTS * tile.out_dtype.itemsize, np.uint8)
    candidates = native.merge(tile, terms, out).candidates
    return out.view(f"u{tile.out_dtype.itemsize}"), candidates


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("base", [True, False])
def test_are_those_of_one_bracket_with_both_values(formula, out_dtype, base):
    tile = tile_of(out_dtype, base=base)
    terms = brackets_of(tile, FORMULAS[formula], 0.1)
    bits = [scores.view(np.uint32).astype(np.int64) for scores in scores_of(tile)]
    steps = [b - score_bits(e.threshold) for b, e in zip(bits, terms.experts, strict=True)]
    inside = np.array([(s >= 0) & (s < e.span) for s, e in zip(steps, terms.experts, strict=True)])
    kept = np.array([s >= e.span for s, e in zip(steps, terms.experts, strict=True)])
    out, candidates = merge(tile, terms)
    lowest, at_ends = (merge(tile, closed(terms, at_end))[0] for at_end in (False, True))

    np.testing.assert_array_equal(candidates.positions, np.flatnonzero(inside.sum(axis=0) > 1))
    assert len(candidates.positions) > 0
    for t, alternatives in enumerate(candidates.alternatives):
        positions, alone = alternatives.positions & 0x7FFFFFFF, alternatives.positions >> 31
        np.testing.assert_array_equal(positions, np.flatnonzero(inside[t] & (inside.sum(axis=0) == 1)))
        np.testing.assert_array_equal(alone, ~kept[:, positions].any(axis=0))
        np.testing.assert_array_equal(alternatives.steps, steps[t][positions])
        np.testing.assert_array_equal(alternatives.merged.view(out.dtype), at_ends[positions])
        np.testing.assert_array_equal(out[positions], lowest[positions])
        assert 0 < len(positions) < ELEMENTS / 5


@pytest.mark.usefixtures("isa")
def test_equal_experts_have_none():
    tile = tile_of("bfloat16", 1)
    tile = replace(tile, experts=tile.experts * 3, curvatures=tile.curvatures * 3)
    terms = brackets_of(tile, PRECOND, 0.1)
    _, candidates = merge(tile, terms)
    assert [len(a.positions) for a in candidates.alternatives] == [0, 0, 0]
    assert ELEMENTS / 20 < len(candidates.positions) < ELEMENTS / 5


def changed(tile: TensorInputs, position: int, weights: list[float], curvatures: list[float]) -> TensorInputs:
    """With a base of 0 at `position`, and these weights and curvature."""

    def at_position(buffer: Buffer, value: float) -> Buffer:
        data = buffer.data.copy()
        bits = np.float32(value).view(np.uint32)
        size = buffer.dtype.itemsize
        data.view(f"u{size}")[position] = bits >> (32 - 8 * size)
        return replace(buffer, data=data)

    return replace(
        tile,
        base=at_position(tile.base, 0.0),
        experts=tuple(map(at_position, tile.experts, weights)),
        curvatures=tuple(
            Full(at_position(c.values, h)) for c, h in zip(tile.curvatures, curvatures, strict=True)
        ),
    )


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("beyond", ["weights", "the value with it", "the value without it"])
def test_what_overflows_or_is_not_finite_keeps_its_operands(beyond):
    """At one position, expert 0 waits. There, its own edit is too large, or averages a larger one away."""
    tile, position = tile_of("float16", 2), 100
    terms = brackets_of(tile, PRECOND, 0.1)
    first, second = terms.experts
    inside, above = (
        score_of_bits(score_bits(e.threshold) + n)
        for e, n in [(first, first.span // 2), (second, second.span)]
    )
    edits = (2.0**-6, 64.0) if beyond == "the value without it" else (64.0, 0.0)
    curvatures = [inside / 2.0**64 / edits[0] ** 2, 4 * above / 2.0**64 / 64.0**2]
    tile = changed(tile, position, [-edits[0], edits[1]], curvatures)

    out, before = merge(tile, terms)
    assert position in before.alternatives[0].positions & 0x7FFFFFFF
    if beyond == "weights":
        tile = changed(tile, position, [-edits[0], np.nan], curvatures)
        terms = replace(terms, repair=True)
    else:
        terms = replace(terms, lambda_=2000.0)
    out, candidates = merge(tile, terms)
    assert np.isinf(out.view(np.float16)[position]) == (beyond == "the value with it")
    assert np.isinf(merge(tile, closed(terms, True))[0].view(np.float16)[position]) == (
        beyond == "the value without it"
    )
    listed = np.concatenate([a.positions & 0x7FFFFFFF for a in candidates.alternatives])
    assert position not in listed
    assert position in candidates.positions


def test_dropped_are_those_below_the_step():
    tile = tile_of("bfloat16")
    _, candidates = merge(tile, brackets_of(tile, PRECOND, 0.1))
    steps = [int(np.median(a.steps)) for a in candidates.alternatives]
    total = sum(len(a.positions) for a in candidates.alternatives)
    positions, merged = np.empty(total, np.uint32), np.empty(2 * total, np.uint8)
    counts = dropped(candidates.alternatives, steps, 2, positions, merged)
    below = [a.steps < step for a, step in zip(candidates.alternatives, steps, strict=True)]
    taken = [
        (a.positions[b], a.merged.view(np.uint16)[b])
        for a, b in zip(candidates.alternatives, below, strict=True)
    ]
    n = sum(count for count, _ in counts)
    np.testing.assert_array_equal(positions[:n], np.concatenate([p & 0x7FFFFFFF for p, _ in taken]))
    np.testing.assert_array_equal(merged.view(np.uint16)[:n], np.concatenate([m for _, m in taken]))
    assert counts == [(len(p), int((p >> 31).sum())) for p, _ in taken]
    assert dropped(candidates.alternatives, [0, 0, 0], 2, positions, merged) == [(0, 0)] * 3
