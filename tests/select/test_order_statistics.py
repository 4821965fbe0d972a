"""Scores by rank against sorting, wherever the rank is and whatever the scores are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ota_kernels.backends import native
from ota_kernels.select import order_statistics as ranks
from ota_kernels.tensors import array as resident

SCORES = {
    "wide": lambda g, n: np.exp(8 * g.standard_normal(n)),
    "alike in rows": lambda g, n: np.repeat(np.exp(3 * g.standard_normal(-(-n // 16))), 16)[:n],
    "constant": lambda g, n: np.full(n, 2.5),
    "mostly zero": lambda g, n: g.random(n) * (g.random(n) < 0.3),
    "few values": lambda g, n: g.integers(0, 4, n),
    "ascending": lambda g, n: np.arange(n),
    "infinite": lambda g, n: np.where(g.random(n) < 0.4, np.inf, g.random(n)),
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("n", [1, 2, 17, 4096, 4097, 20_011, 90_112])
def test_every_rank_is_the_sorted_one(kind, n):
    scores = SCORES[kind](np.random.default_rng(n), n).astype(np.float32)
    expected = np.append(np.sort(scores)[::-1], np.float32(0))  # 0 beyond the last
    for near in (0.0, 0.3 * n, float(n)):
        ranked = ranks.Ranks(scores, near)
        for place in {0, n // 100, *(int(near) + i for i in (-300, -1, 0, 1, 300)), n // 2, n - 1, n}:
            place = min(max(place, -1), n)
            assert ranked.at(np.float64(place)) == expected[max(place, 0)]
        for lowest, highest in itertools.combinations_with_replacement(expected[:: n // 5 + 1][::-1], 2):
            assert ranked.count(lowest, highest) == np.sum((scores >= lowest) & (scores <= highest))


def test_a_rank_that_is_near_sorts_no_more_than_its_surroundings(monkeypatch):
    scores = np.random.default_rng(0).random(100_000, np.float32)
    ranked = ranks.Ranks(scores, 30_000.0)
    monkeypatch.setattr(ranks.resident, "from_top", None)
    expected = np.sort(scores)[::-1]
    for place in range(26_000, 34_000, 500):
        assert ranked.at(np.float64(place)) == expected[place]
    with pytest.raises(TypeError):
        ranked.at(np.float64(50_000))


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 64])
@pytest.mark.parametrize("columns", [1, 16, 100])
def test_differences_within_pairs_of_rows(rows, columns):
    values = np.random.default_rng(rows).random((rows, columns), np.float32)
    counts = np.count_nonzero(values >= 0.4, axis=1)[: rows // 2 * 2].reshape(-1, 2)
    expected = int(((counts[:, 0] - counts[:, 1]) ** 2).sum())
    assert ranks.squared_differences(values, np.float32(0.4)) == expected
    assert resident.squared_differences(np.count_nonzero(values >= 0.4, axis=1)) == expected
    assert ranks.squared_differences(torch.from_numpy(values), torch.tensor(0.4)) == expected


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("n", [0, 1, 7, 16, 33, 5000])
def test_between_is_what_numpy_selects(isa, n, monkeypatch):
    monkeypatch.setattr(native, "instruction_set", lambda: isa)
    values = np.random.default_rng(n).integers(-5, 6, n).astype(np.float32)
    for low, high in ((-2.0, 3.0), (-np.inf, 0.0), (0.0, np.inf), (2.0, 2.0), (-9.0, 9.0), (3.0, -3.0)):
        inside, above = native.between(values, low, high)
        np.testing.assert_array_equal(inside, values[(values >= low) & (values < high)])
        assert above == np.count_nonzero(values >= high)
