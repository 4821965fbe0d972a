"""Small tensors for tests of the oracle, and of what is compared with it."""

from __future__ import annotations

import numpy as np

from . import Tensor, evaluate

ELECTING = ["ties", "dare_ties", "breadcrumbs_ties", "della"]
LINEAR_ROWS = ["task_arithmetic", "dare_linear", "breadcrumbs", "della_linear"]
SHAPES = [(12, 17), (1, 40), (40, 1), (203,), (3, 5, 7), (), (0, 4)]


def tensor(shape=(12, 17), n_experts=3, seed=0, *, has_base=True, step=0.005, **more) -> Tensor:
    """float32 weights near 0.05; edits of one tenth of that, one in eight 0."""
    rng = np.random.default_rng(seed)

    def stored(x):
        return np.asarray(np.float32(x), np.float64)

    base = stored(rng.normal(0, 0.05, shape))
    experts = tuple(
        stored(base + rng.normal(0, step, shape) * (rng.random(shape) > 1 / 8)) for _ in range(n_experts)
    )
    return Tensor(base if has_base else None, experts, **more)


def vectors(base, *experts, **more) -> Tensor:
    """A tensor from lists."""
    arrays = [None if x is None else np.array(x, np.float64) for x in (base, *experts)]
    return Tensor(arrays[0], tuple(arrays[1:]), **more)


def merge(x: Tensor, method: str, **parameters):
    return evaluate({"w": x}, method, **parameters)["w"]


def close(actual, expected, atol=1e-15):
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=atol)
