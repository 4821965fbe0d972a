"""Formulas of whole matrices against singular value decompositions in float64."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from alone import alone
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import spectral as oracle

from ota_kernels.spectral import formulas
from ota_kernels.spectral.algebra import one_thread, polar

FORMULAS = {
    "tsv": (formulas.tsv, oracle.tsv),
    "iso_c": (formulas.iso_c, oracle.iso_c),
    "iso_cts": (
        lambda edits: formulas.iso_cts(edits, 8 * min(edits.shape) // 10),
        lambda d: oracle.iso_cts(d, 0.8),
    ),
    "covariance": (
        lambda edits: formulas.covariance(edits, by_norm=False),
        lambda d: oracle.covariance(d, "equal"),
    ),
    "covariance by norm": (
        lambda edits: formulas.covariance(edits, by_norm=True),
        lambda d: oracle.covariance(d, "norm"),
    ),
    "opcm": (lambda edits: formulas.opcm(edits, 0.5), lambda d: oracle.opcm(d, 0.5)),
    "svc": (
        lambda edits: formulas.svc(sum(edits), edits, 1 / len(edits)),
        lambda d: oracle.svc(sum(d), d, 1 / len(d)),
    ),
}


class Edits(list):
    """In memory; new arrays whenever one is asked for, as a merge reads them."""

    @property
    def shape(self):
        return super().__getitem__(0).shape

    def __getitem__(self, t):
        return torch.from_numpy(super().__getitem__(t)).clone()

    def __iter__(self):
        return (self[t] for t in range(len(self)))


def error(name: str, d: list[np.ndarray]) -> tuple[float, float]:
    """(relative error of the edit, its condition)."""
    ours, theirs = FORMULAS[name]
    expected, condition = theirs(d)
    found = ours(Edits(d)).numpy()
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-300), condition


def drawn(shape: tuple[int, int], count: int, seed: int, rank: int | None = None) -> list[np.ndarray]:
    """Edits of falling singular values, as trained ones have; of a rank where one is given."""
    rng = np.random.default_rng(seed)
    r = min(shape)
    found = []
    for _ in range(count):
        u = np.linalg.qr(rng.normal(size=(shape[0], r)))[0]
        v = np.linalg.qr(rng.normal(size=(shape[1], r)))[0]
        s = 0.01 * 0.9 ** np.arange(r)
        s[r if rank is None else rank :] = 0
        found.append((u * s) @ v.T)
    return found


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("shape", [(24, 24), (17, 40), (40, 17), (33, 5)], ids=str)
@pytest.mark.parametrize("rank", [None, 3])
def test_values(name, shape, rank):
    """T = 3 does not divide all of r; rank 3: adapters, whose null directions take no part. Where covariances
    are singular, roundings are divided by the ridge."""
    relative, condition = error(name, drawn(shape, 3, 1, rank))
    assert relative < (1e-4 if name.startswith("covariance") and condition > 1e9 else 1e-6)
    assert relative <= 1e3 * 2.0**-52 * condition


@st.composite
def edits(draw) -> list[np.ndarray]:
    shape = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    count = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    found = []
    for _ in range(count):
        kind = draw(st.sampled_from(["full", "low", "zero", "duplicate", "rounded"]))
        x = rng.normal(size=shape) * draw(st.sampled_from([1.0, 1e-3]))
        if kind == "low":
            rank = draw(st.integers(1, min(shape)))
            x = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
        elif kind == "zero":
            x = np.zeros(shape)
        elif kind == "duplicate" and found:
            x = found[0].copy()
        elif kind == "rounded":
            x = np.round(x * 4) / 4
        found.append(x)
    return found


@pytest.mark.parametrize("name", FORMULAS)
@given(d=edits())
def test_any_edits(name, d):
    """Tall, wide, square, rank-deficient, zero, one expert, duplicates: as far as the conditions allow."""
    relative, condition = error(name, d)
    assume(condition < 1e8)
    assert relative <= 1e4 * 2.0**-52 * condition


def test_one_expert_is_itself():
    """All its directions are kept, at their lengths."""
    (d,) = drawn((9, 14), 1, 0)
    for name in ("tsv", "svc"):
        np.testing.assert_allclose(FORMULAS[name][0](Edits([d])), d, rtol=0, atol=1e-12)
    np.testing.assert_allclose(FORMULAS["covariance"][0](Edits([d.T])), d.T, rtol=0, atol=1e-9)


def test_a_duplicate_changes_nothing():
    """Of tsv: the same triples twice, orthogonalised, are half of each."""
    (d,) = drawn((12, 9), 1, 3)
    u, s, vt = np.linalg.svd(d, full_matrices=False)
    k = 4
    np.testing.assert_allclose(formulas.tsv(Edits([d, d])), (u[:, :k] * s[:k]) @ vt[:k], atol=1e-10)


@pytest.mark.parametrize("by_norm", [False, True])
def test_covariance_is_the_minimum(by_norm):
    """The gradient of sum_t g_t ||(X - d_t) d_t^T||^2 is 0: WUDI's loss with g_t = 1 / ||d_t||^2."""
    d = drawn((8, 11), 3, 5)
    x = formulas.covariance(Edits(d), by_norm, ridge=1e-14).numpy()
    g = [1 / np.square(e).sum() if by_norm else 1.0 for e in d]
    gradient = sum(w * (x - e) @ e.T @ e for w, e in zip(g, d, strict=True))
    scale = sum(w * np.linalg.norm(e) ** 3 for w, e in zip(g, d, strict=True))
    assert np.linalg.norm(gradient) < 1e-10 * scale


def test_lengths_of_iso_c_are_one():
    x = formulas.iso_c(Edits(drawn((10, 15), 3, 2)))
    s = torch.linalg.svdvals(x)
    torch.testing.assert_close(s, s.mean().expand(10))


@alone
def test_results_do_not_depend_on_threads():
    """The same bits alone and beside three others, under any setting of torch's threads, which stays."""
    d = drawn((150, 220), 3, 4)

    def run(_=None) -> bytes:
        with one_thread():
            return formulas.tsv(Edits(d)).numpy().tobytes()

    before = torch.get_num_threads()
    expected = run()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            with ThreadPoolExecutor(4) as pool:
                assert set(pool.map(run, range(4))) == {expected}
            assert torch.get_num_threads() == threads
            seen = []
            other = threading.Thread(target=lambda seen=seen: seen.append(torch.get_num_threads()))
            other.start()
            other.join()
            assert seen == [threads]
    finally:
        torch.set_num_threads(before)


@alone
def test_a_thread_that_leaves_changes_nothing_for_those_inside():
    seen, entered, left = [], threading.Event(), threading.Event()

    def other():
        with one_thread():
            entered.set()
            left.wait()
            seen.append(torch.get_num_threads())

    torch.set_num_threads(4)
    thread = threading.Thread(target=other)
    with one_thread():
        thread.start()
        entered.wait()
    left.set()
    thread.join()
    assert seen == [1]
    with one_thread():
        pass
    assert torch.get_num_threads() == 4


def test_polar_of_nothing():
    assert not polar(torch.zeros(3, 5, dtype=torch.float64)).any()
    assert polar(torch.zeros(3, 0, dtype=torch.float64)).shape == (3, 0)
