"""One function for each word of tensors/terms.py, over blocks in registers.

Scores and decisions are float32 operations in the order written there; the launchers forbid contraction to
FMA (`enable_fp_fusion=False`), so that masks come out as in the reference."""

from __future__ import annotations

import triton
import triton.language as tl

from . import loads

# Score.


@triton.jit
def saliency(h, d32, k):
    """s = (h k) (2^16 d)^2 in float32, the saliency h d^2 times 2^64 where k is 2^32."""
    scaled = d32 * 65536.0
    return (h * k) * (scaled * scaled)


@triton.jit
def row_magnitude(d32, of_row):
    """s = |2^16 d| row_scores[row]."""
    return tl.abs(d32 * 65536.0) * of_row


@triton.jit
def spread(
    table,
    offset,
    lane,
    inside,
    base,
    n_experts: tl.constexpr,
    weights: tl.constexpr,
    origins: tl.constexpr,
    aligned: tl.constexpr,
    unroll: tl.constexpr,
):
    """s = sum_t (e_t - m)^2 with e_t = 2^16 d_t - 2^16 d_1 and their mean m: one score for all experts."""
    _, _, d32, _ = loads.edit_of(
        table, 0, offset, lane, inside, base, tl.float32, n_experts, weights, origins, aligned
    )
    first = d32 * 65536.0
    total, s = tl.zeros_like(first), tl.zeros_like(first)
    for t in tl.range(0, n_experts, loop_unroll_factor=unroll):
        _, _, d32, _ = loads.edit_of(
            table, t, offset, lane, inside, base, tl.float32, n_experts, weights, origins, aligned
        )
        total += d32 * 65536.0 - first
    mean = total * (1.0 / n_experts)
    for t in tl.range(0, n_experts, loop_unroll_factor=unroll):
        _, _, d32, _ = loads.edit_of(
            table, t, offset, lane, inside, base, tl.float32, n_experts, weights, origins, aligned
        )
        x = (d32 * 65536.0 - first) - mean
        s += x * x
    return s


@triton.jit
def score(
    table,
    numbers,
    t,
    h,
    d32,
    of_all,
    inside,
    row,
    wrapped,
    has_next,
    word: tl.constexpr,
    n_experts: tl.constexpr,
    place: tl.constexpr,
):
    """s_t of the block, float32. of_all: the `spread` of its experts."""
    if word == "saliency":
        s = saliency(h, d32, loads.number(numbers, t, loads.SCORE_SCALE).to(tl.float32))
    elif word == "curvature":
        s = h * loads.number(numbers, t, loads.SCORE_SCALE).to(tl.float32)
    elif word == "magnitude":
        s = tl.abs(d32)
    elif word == "row magnitude":
        rows = loads.pointer(table, loads.ROW_SCORES * n_experts + t, tl.float32, False)
        s = row_magnitude(d32, loads.by_row(rows, inside, row, wrapped, has_next, place))
    elif word == "spread":
        s = of_all
    else:
        s = tl.zeros_like(d32)
    return s


@triton.jit
def bits(s):
    """The bits of a float32, which order like the numbers from 0 upwards; NaN and negative numbers above."""
    return s.to(tl.uint32, bitcast=True)


@triton.jit
def in_bracket(s, lowest, span):
    """Whether s is one of the `span` float32 numbers from `lowest` upwards."""
    return bits(s) - bits(lowest) < span


@triton.jit
def usable_score(s, usable):
    """s, and 0 where an input is not usable; s may be -0, or NaN (a curvature above 2^96, an edit of 0)."""
    return tl.where(usable & (s > 0), s, 0.0)


# Select.


@triton.jit
def at_least(s, threshold, table, t, index, n_experts: tl.constexpr, indexed: tl.constexpr):
    """s > threshold, or s = threshold at one of the flat indices first .. last; indexed: whether some expert
    has such bounds."""
    if indexed:
        first, last = (
            loads.integer(table, t, n_experts, loads.FIRST),
            loads.integer(table, t, n_experts, loads.LAST),
        )
        found = (s > threshold) | ((s == threshold) & (index >= first) & (index <= last))
    else:
        found = s >= threshold
    return found


@triton.jit
def below(s, upper, table, t, index, n_experts: tl.constexpr, indexed: tl.constexpr):
    """s < upper, or s = upper up to the flat index upto."""
    if indexed:
        found = (s < upper) | ((s == upper) & (index <= loads.integer(table, t, n_experts, loads.UPTO)))
    else:
        found = s <= upper
    return found


@triton.jit
def _words(table, t, group, n_experts: tl.constexpr):
    """The four words of Philox for groups of 4 neighbours (int64), by tensors/random.py."""
    low = group.to(tl.uint32)
    expert = low * 0 + loads.integer(table, t, n_experts, loads.POSITION).to(tl.uint32)
    name = low * 0 + loads.scalar(table, n_experts, loads.NAME).to(tl.uint32)
    key = loads.scalar(table, n_experts, loads.KEY)
    return tl.philox(key, low, (group >> 32).to(tl.uint32), expert, name, n_rounds=10)


@triton.jit
def _uniform(word):
    """u of a word of Philox, float32."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def uniform(table, t, index, n_experts: tl.constexpr):
    """u_t of tensors/random.py at these flat indices, float32."""
    a, b, c, d = _words(table, t, index >> 2, n_experts)
    which = index & 3
    return _uniform(tl.where(which < 2, tl.where(which == 0, a, b), tl.where(which == 2, c, d)))


@triton.jit
def draw(table, numbers, offset, n_experts: tl.constexpr, keepers: tl.constexpr, block_size: tl.constexpr):
    """Whether u_t < probability_t, in bit 4 t + j of the group of each element, where j is an element's place
    in its group: each of Philox's counters serves four neighbours. The tile begins at a group."""
    group = ((loads.scalar(table, n_experts, loads.START) + offset) >> 2) + tl.arange(0, block_size // 4)
    drawn = tl.zeros((block_size // 4,), keepers)
    for t in tl.range(0, n_experts, loop_unroll_factor=n_experts):
        p = loads.number(numbers, t, loads.PROBABILITY).to(tl.float32)
        a, b, c, d = _words(table, t, group, n_experts)
        of_t = tl.where(_uniform(a) < p, 1, 0) + tl.where(_uniform(b) < p, 2, 0)
        of_t += tl.where(_uniform(c) < p, 4, 0) + tl.where(_uniform(d) < p, 8, 0)
        drawn |= of_t.to(keepers) << (4 * t)
    twice = tl.interleave(drawn, drawn)
    return tl.interleave(twice, twice)


@triton.jit
def select(
    table,
    numbers,
    t,
    s,
    offset,
    lane,
    inside,
    index,
    drawn,
    word: tl.constexpr,
    n_experts: tl.constexpr,
    indexed: tl.constexpr,
    quads: tl.constexpr,
):
    """m_t of the block. index: flat, of each element, where the words ask for it; drawn: where quads."""
    if word == "at least" or word == "between":
        threshold = loads.number(numbers, t, loads.THRESHOLD).to(tl.float32)
        keep = at_least(s, threshold, table, t, index, n_experts, indexed)
        if word == "between":
            upper = loads.number(numbers, t, loads.UPPER).to(tl.float32)
            keep &= below(s, upper, table, t, index, n_experts, indexed)
    elif word == "above":
        keep = s > loads.number(numbers, t, loads.THRESHOLD).to(tl.float32)
    elif word == "random":
        if quads:
            keep = ((drawn >> (4 * t + (lane & 3)).to(drawn.dtype)) & 1) != 0
        else:
            p = loads.number(numbers, t, loads.PROBABILITY).to(tl.float32)
            keep = uniform(table, t, index, n_experts) < p
    elif word == "random by rank":
        p = loads.elements(table, loads.CHANCES * n_experts + t, offset, lane, inside, tl.float32, True)
        keep = uniform(table, t, index, n_experts) < p
    else:
        keep = lane >= 0
    return keep


# Elect.


@triton.jit
def chance(table, t, offset, lane, inside, n_experts: tl.constexpr):
    """p_t of `random by rank`, float32; 1 outside."""
    p = loads.elements(table, loads.CHANCES * n_experts + t, offset, lane, inside, tl.float32, True)
    return tl.where(inside, p, 1.0)


@triton.jit
def vote_of(table, numbers, t, d32, offset, lane, inside, edit: tl.constexpr, n_experts: tl.constexpr):
    """v_t: float32(vote_t) d32_t, of d32_t / p_t with "by chance"."""
    if edit == "by chance":
        d32 = tl.div_rn(d32, chance(table, t, offset, lane, inside, n_experts))
    return loads.number(numbers, t, loads.VOTE).to(tl.float32) * d32


@triton.jit
def vote(v, survive, elected, winner, t, word: tl.constexpr):
    """What all experts' votes come to, with that of expert t: E, or with "largest" the largest magnitude so
    far and whose it is."""
    if word == "largest":
        wins = survive & (tl.abs(v) >= elected)
        elected = tl.where(wins, tl.abs(v), elected)
        winner = tl.where(wins, t, winner)
    elif word == "count":
        elected += tl.where(survive & (v > 0), 1.0, 0.0) - tl.where(survive & (v < 0), 1.0, 0.0)
    else:
        elected += tl.where(survive, v, 0.0)
    return elected, winner


@triton.jit
def agrees(v, elected, share, tie, word: tl.constexpr):
    """Whether a vote has the sign of the sum of all, or with "agreement" enough of its size."""
    if word == "agreement":
        found = tl.abs(v) > share * tl.abs(elected - v)
    else:
        sign = tl.where(elected == 0, tie, elected)
        found = ((v > 0) & (sign > 0)) | ((v < 0) & (sign < 0))
    return found


@triton.jit
def agreeing(
    table,
    numbers,
    offset,
    lane,
    inside,
    base,
    survives,
    elected,
    edit: tl.constexpr,
    word: tl.constexpr,
    n_experts: tl.constexpr,
    weights: tl.constexpr,
    origins: tl.constexpr,
    aligned: tl.constexpr,
    keepers: tl.constexpr,
    width: tl.constexpr,
    unroll: tl.constexpr,
):
    """Fields of g_t: the survivors that agree with the sum of all, or with "agreement" all survivors where
    enough of them do."""
    share = loads.shared(numbers, n_experts, loads.AGREEMENT).to(tl.float32)
    tie = loads.shared(numbers, n_experts, loads.TIE).to(tl.float32)
    number, found = lane * 0, survives & 0
    for t in tl.range(0, n_experts, loop_unroll_factor=unroll):
        _, _, d32, _ = loads.edit_of(
            table, t, offset, lane, inside, base, tl.float32, n_experts, weights, origins, aligned
        )
        v = vote_of(table, numbers, t, d32, offset, lane, inside, edit, n_experts)
        of_t = (((survives >> (t * width)) & 1) != 0) & agrees(v, elected, share, tie, word)
        number += of_t.to(tl.int32)
        found |= of_t.to(keepers) << (t * width)
    if word == "agreement":
        needed = loads.shared(numbers, n_experts, loads.NEEDED).to(tl.int32)
        found = tl.where(number >= needed, survives, 0)
    return found


# Edit, weigh and divide: values, in the type of the sums.


@triton.jit
def clipped(d, clip):
    """y = clip(clip / max(|d|, 1e-6), 0, 1) d."""
    share = divide(tl.zeros_like(d) + clip, tl.maximum(tl.abs(d), 1e-6))
    return tl.minimum(tl.maximum(share, 0.0), 1.0) * d


@triton.jit
def divide(x, y):
    """float32: within 2 units in the last place, of results that 16 bits round to 1 of 2^13 of those."""
    return x / y


@triton.jit
def power_of(h, p, power: tl.constexpr):
    """h^p. power: "half", "one" or "general" (float64, within a few units in its last place)."""
    if power == "one":
        x = h
    elif power == "half":
        x = square_root(h)
    else:
        x = general_power(h.to(tl.float64), p).to(h.dtype)
    return x


@triton.jit
def square_root(x):
    """The root of x >= 0. In float32 within 1 unit in the last place: a root that is rounded to nearest takes
    12 instructions and a branch, 5 of them a merged element. The scale keeps subnormal x, which the hardware
    takes for 0."""
    if x.dtype == tl.float64:
        root = tl.sqrt(x)
    else:
        small = x < 1.0
        root = tl.sqrt(tl.where(small, x * 4294967296.0, x))  # 2^32
        root = tl.where(small, root * 0.0000152587890625, root)  # 2^-16
    return root


@triton.jit
def general_power(h, p):
    """h^p of float64 h >= 0, p > 0. h = 2^e m, and the exponent p e is split into a whole number and a rest
    that keeps its low bits: an h of 2^-100 would lose six of them."""
    pattern = h.to(tl.int64, bitcast=True)
    e = ((pattern >> 52) - 1023).to(tl.float64)
    m = ((pattern & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    product = p * e
    whole = tl.floor(product)
    rest = (product - whole) + tl.fma(p, e, -product)
    x = tl.exp2(rest + p * tl.log2(m)) * tl.exp2(whole)
    return tl.where(h > 0, x, 0.0)


@triton.jit
def weigh(
    table,
    numbers,
    t,
    h,
    is_alone,
    inside,
    row,
    column,
    wrapped,
    has_next,
    zero,
    word: tl.constexpr,
    power: tl.constexpr,
    n_experts: tl.constexpr,
    place: tl.constexpr,
    acc: tl.constexpr,
):
    """P_t of the block. power: as in `power_of`, or "scaled": the root of the score's own product h k, whose
    root of k the weight's scale lacks: one instruction instead of six."""
    if word == "curvature":
        epsilon = zero + loads.shared(numbers, n_experts, loads.EPSILON).to(acc)
        if power == "scaled":
            x = tl.sqrt(h * loads.number(numbers, t, loads.SCORE_SCALE).to(tl.float32))
        else:
            x = power_of(h.to(acc), loads.shared(numbers, n_experts, loads.POWER).to(tl.float64), power)
        weight = tl.fma(x, zero + loads.number(numbers, t, loads.WEIGHT_SCALE).to(acc), epsilon)
    elif word == "by row":
        values = loads.pointer(table, loads.PLACE_WEIGHTS * n_experts + t, acc, False)
        weight = zero + loads.by_row(values, inside, row, wrapped, has_next, place)
    elif word == "by column":
        values = loads.pointer(table, loads.PLACE_WEIGHTS * n_experts + t, acc, False)
        weight = tl.load(values + column, mask=inside, other=0)
    else:
        weight = zero + loads.number(numbers, t, loads.WEIGHT_SCALE).to(acc)
        if word == "alone":
            weight = tl.where(is_alone, weight * loads.number(numbers, t, loads.ALONE).to(acc), weight)
    return weight


@triton.jit
def share_of_divisor(weight, kept_weight, added, word: tl.constexpr):
    """What an expert adds to D."""
    if word == "weights":
        part = weight
    elif word == "kept weights":
        part = kept_weight
    elif word == "kept count":
        part = tl.where(added, 1.0, 0.0).to(weight.dtype)
    else:
        part = tl.zeros_like(weight)
    return part


@triton.jit
def divisor(
    numbers,
    found,
    word: tl.constexpr,
    floored: tl.constexpr,
    zero: tl.constexpr,
    n_experts: tl.constexpr,
    acc: tl.constexpr,
):
    """D. found: what the experts have added; floored: whether it is `least` at least."""
    if word == "number":
        found = tl.zeros_like(found) + loads.shared(numbers, n_experts, loads.DENOMINATOR).to(acc)
    elif word == "kept count":
        found = tl.maximum(found, 1.0)
    elif word == "kept weights" and floored:
        found = tl.maximum(found, loads.shared(numbers, n_experts, loads.LEAST).to(acc))
    if zero == "one":
        found = tl.where(found == 0, 1.0, found)
    return found
