"""The formulas of the merge, one function each (README, "How it works"; arXiv 2509.11167).

Elements are blocks in registers. Scores and decisions are float32 operations in the order written here; the
launchers forbid contraction to FMA (`enable_fp_fusion=False`), so that masks come out as in the reference,
and `tl.fma` stands where csrc/formulas.hpp has std::fma.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rank1(row_sum, column_share):
    """h = R_i C_j / sum(R); column_share: C_j / sum(R)."""
    return row_sum * column_share


@triton.jit
def log8(code, scale):
    """h of an 8-bit code and its row's scale (ota_kernels/log8.py): integers, and one exact product."""
    c = code.to(tl.int32)
    m = c & 3
    pattern = ((32 * c - ((m * (45 - 11 * m)) >> 2)) << 16) + (64 << 23)
    return tl.where(c > 0, pattern.to(tl.float32, bitcast=True), 0.0) * scale


@triton.jit
def saliency(h, d, k):
    """s = (h k) (2^16 d)^2 in float32, the saliency h d^2 times 2^64 where k is 2^32."""
    scaled = d * 65536.0
    return (h * k) * (scaled * scaled)


@triton.jit
def score(h, d, k, has_base: tl.constexpr):
    """What a threshold is compared with: the saliency, or without a base the curvature alone."""
    return saliency(h, d, k) if has_base else h * k


@triton.jit
def bits(s):
    """The bits of a float32, which order like the numbers from 0 upwards; NaN and negative numbers above."""
    return s.to(tl.uint32, bitcast=True)


@triton.jit
def in_bracket(s, lowest, span):
    """Whether s is one of the `span` float32 numbers from `lowest` upwards."""
    return bits(s) - bits(lowest) < span


@triton.jit
def negated(flags):
    """Where flags are not set: the interpreter of triton 3.2 has no `~` for them."""
    return flags == 0


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def is_curvature(h):
    """Whether h is finite and not negative."""
    return (h >= 0) & (h < float("inf"))


@triton.jit
def is_suspect(s):
    """Whether a saliency tells that some input is not usable: with usable ones it is finite and not negative,
    unless it overflows or is -0. One comparison in place of five."""
    return bits(s) >= 0x7F800000


@triton.jit
def usable_score(s, usable):
    """s, and 0 where an input is not usable; s may be -0, or NaN (a curvature above 2^96, an edit of 0)."""
    return tl.where(usable & (s > 0), s, 0.0)


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
def divide(x, y):
    """Rounded to nearest: `/` of float32 is an approximation."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


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
def weight(h, a, epsilon, p, power: tl.constexpr):
    """P = a h^p + epsilon, or a where power is "none": the weights ignore curvature. Scalars in h's type."""
    if power == "none":
        weight = tl.zeros_like(h) + a
    else:
        weight = tl.fma(power_of(h, p, power), tl.zeros_like(h) + a, tl.zeros_like(h) + epsilon)
    return weight


@triton.jit
def agrees(x, elected):
    """Whether a trimmed edit x has the sign of the sum of all (TIES)."""
    return ((x > 0) & (elected > 0)) | ((x < 0) & (elected < 0))
