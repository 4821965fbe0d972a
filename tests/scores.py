"""Arrays of scores and their sorted answers, and what a graft must be: what the tests of topk_threshold and
graft share, wherever the tensors are."""

from __future__ import annotations

import math

import numpy as np
import torch

from ota_kernels.select.thresholds import total_mass


def masses(census: np.ndarray | None) -> tuple[int, ...] | None:
    """What a census says: the exact sums of scores up to a bracket and above it, and how many are above."""
    return None if census is None else (*map(total_mass, np.split(census[:-1], 2)), int(census[-1]))


DTYPES = ("float32", "bfloat16", "float16", "float64")
LARGE = 300_000


def rows_of_different_scales(rng) -> np.ndarray:
    """Rows over twelve orders of magnitude, in blocks: a sample of runs sees few of them."""
    scales = 10.0 ** rng.uniform(-6, 6, 300)
    return rng.normal(size=(300, 1000)) * scales[:, None]


def one_row_on_top(rng) -> np.ndarray:
    """The largest thousandth lies together, where a sample may miss it."""
    x = rng.normal(size=LARGE)
    x[123_456:123_756] += 100
    return x


CASES = {
    "normal": lambda rng: rng.normal(size=LARGE),
    "lognormal": lambda rng: np.exp(rng.normal(0, 5, LARGE)),
    "rows": rows_of_different_scales,
    "one-row-on-top": one_row_on_top,
    "ascending": lambda rng: np.arange(LARGE, dtype=np.float64),
    "five-values": lambda rng: rng.integers(-2, 3, LARGE).astype(np.float64),
    "mostly-zero": lambda rng: rng.normal(size=LARGE) * (rng.random(LARGE) < 0.02),
    "all-equal": lambda rng: np.full(LARGE, -1.5),
    "all-zero": lambda rng: np.zeros(LARGE),
    "two-zeros": lambda rng: np.where(rng.random(LARGE) < 0.5, 0.0, -0.0),
    "one-outlier": lambda rng: np.where(np.arange(LARGE) == 77_777, 6e4, rng.normal(0, 1e-3, LARGE)),
    "infinities": lambda rng: rng.choice([-np.inf, -1.0, 2.0, np.inf], LARGE),
}


def tensor_of(case: str, dtype: str) -> torch.Tensor:
    return torch.as_tensor(CASES[case](np.random.default_rng(1))).to(getattr(torch, dtype))


def ranks(n: int) -> list[int]:
    """Both ends, a few near them, and within."""
    wanted = {0, 1, 2, 100, n // 1000, n // 5, n // 2, n - n // 5, n - 100, n - 1, n}
    return sorted(k for k in wanted if 0 <= k <= n)


def sorted_answers(scores: torch.Tensor, wanted: list[int], largest: bool) -> list[float]:
    ordered = np.sort(scores.double().numpy(), axis=None)
    ordered = ordered[::-1] if largest else ordered
    return [float(ordered[k - 1]) if k else (math.inf if largest else -math.inf) for k in wanted]


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().reshape(-1, tensor.dtype.itemsize)


def assert_grafted(grafted, base, expert, mask) -> None:
    """The expert's bits where the mask keeps, the base's elsewhere."""
    assert grafted.dtype == base.dtype
    assert grafted.shape == base.shape
    expected = np.where(mask.reshape(-1, 1), bits(expert), bits(base))
    np.testing.assert_array_equal(bits(grafted), expected)
