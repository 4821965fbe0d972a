"""Tiles of the Triton backend: which parts of them go to the device, tiles that are there already, and a tile
in two halves. As in test_triton.py, kernels run on a GPU, or in a process of their own under the interpreter.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from alone import passes_interpreted
from scores import masses
from test_triton import log8_of, terms_of
from tiles import decode, merge_tile, random_experts, with_buffers
from tolerances import assert_close

from ota_kernels.backends import native, reference, triton
from ota_kernels.tensors.buffer import Buffer
from ota_kernels.tensors.curvature import LowRank, Rank1, Uniform
from ota_kernels.tensors.result import Candidates, MergeStats, NonFinite
from ota_kernels.tensors.terms import Words, score_bits
from ota_kernels.tensors.tile import TensorInputs

RUNS_HERE = triton.verify()[0]

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 34.00 MiB."


@pytest.mark.skipif(RUNS_HERE, reason="the tests below run in this process")
def test_under_the_interpreter():
    passes_interpreted(__file__, "OnTheDevice")


def stats_of(**changes) -> MergeStats:
    return replace(MergeStats((3, 5), (4, 6), 2, 1, 0, ()), **changes)


class TestHalves:
    @pytest.mark.parametrize("n", [2, 901])
    def test_are_the_whole(self, n):
        """By a backend that merges any tile: masks, values, counts, candidates and censuses."""
        from ota_kernels.backends.triton.halves import merge_in_halves

        experts = random_experts(30, (n,), dtypes=("bfloat16", "float16"))
        tile = experts.inputs("bfloat16")
        origin = random_experts(31, (n,), 1).inputs("bfloat16").experts[0]
        tile = replace(tile, curvatures=(*tile.curvatures[:2], Uniform()), origins=(None, origin, None))
        terms = with_brackets(tile, terms_of(tile))
        expected, truth = merge_tile(tile, terms, reference)
        sizes = []

        def merged(part, terms, out):
            sizes.append(part.numel)
            return reference.merge(part, terms, out)

        out = np.full_like(expected, 0xFF)
        assert_same_stats(merge_in_halves(merged, tile, terms, out), truth)
        assert out.tobytes() == expected.tobytes()
        assert sizes == [n // 2, n - n // 2]

    def test_ranks_are_of_whole_rows(self):
        """Rows stay together where an element's rank in its row decides."""
        from ota_kernels.backends.triton.halves import merge_in_halves

        tile = random_experts(31, (7, 90)).inputs("bfloat16")
        words = Words(score="none", select="random by rank", weigh="constant", divide="number")
        terms = terms_of(tile, words, probability=0.4, spread=0.3)
        expected, truth = merge_tile(tile, terms, reference)
        out = np.full_like(expected, 0xFF)
        assert merge_in_halves(reference.merge, tile, terms, out, 90) == truth
        assert out.tobytes() == expected.tobytes()

    def test_unusable_inputs_keep_the_order_of_backends(self):
        from ota_kernels.backends.triton.halves import joined_stats

        first = stats_of(nonfinite=(NonFinite("weights", 1, 2, 7),))
        second = stats_of(
            nonfinite=(
                NonFinite("base", -1, 1, 0),
                NonFinite("curvature", 0, 4, 5),
                NonFinite("weights", 1, 3, 9),
            )
        )
        assert joined_stats(first, second, 100).nonfinite == (
            NonFinite("base", -1, 1, 100),
            NonFinite("curvature", 0, 4, 105),
            NonFinite("weights", 1, 5, 7),
        )


def with_brackets(tile: TensorInputs, terms):
    """Brackets from each threshold to the highest score but nine, and sums of what is outside."""
    experts = []
    for t, e in enumerate(terms.experts):
        scores = np.sort(reference.scores(tile, t, terms)[0])
        span = score_bits(float(scores[-min(10, len(scores))])) - score_bits(e.threshold)
        experts.append(replace(e, span=max(span, 1), census=True))
    return replace(terms, experts=tuple(experts))


def assert_same_stats(found: MergeStats, truth: MergeStats) -> None:
    for name in ("kept", "reached", "unkept", "overflow", "repaired", "nonfinite"):
        assert getattr(found, name) == getattr(truth, name), name
    assert [masses(c) for c in found.censuses] == [masses(c) for c in truth.censuses]
    assert_same_candidates(found.candidates, truth.candidates)


def assert_same_candidates(found: Candidates, truth: Candidates) -> None:
    np.testing.assert_array_equal(found.positions, truth.positions)
    for one, other in zip(found.steps, truth.steps, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(found.operands.index, truth.operands.index)
    for one, other in zip(found.operands.buffers, truth.operands.buffers, strict=True):
        assert (one.dtype, one.data.tobytes()) == (other.dtype, other.data.tobytes())


class TestOperands:
    """What of a tile's curvature by rows goes to the device."""

    @pytest.mark.parametrize("form", ["rank1", "log8", "low rank"])
    @pytest.mark.parametrize(("start", "stop"), [(0, 70), (7, 8), (9, 11), (15, 55), (30, 30)])
    def test_only_rows_of_the_tile(self, form, start, stop):
        from ota_kernels.backends.triton.tiles import device_curvature, in_place, written_out

        rng = np.random.default_rng(8)
        values = np.float32(rng.random((7, 10)) + 0.1)
        whole = {
            "rank1": Rank1(values[:, 0].copy(), values[0].copy()),
            "log8": log8_of(values),
            "low rank": LowRank(values[:, :2].copy(), values[:2].copy()),
        }[form]
        part = whole.slice(start, stop)
        sizes = []

        n, cpu = stop - start, torch.device("cpu")

        def load(arrays):
            sizes.extend(len(a) for a in arrays)
            return in_place(cpu)(arrays)

        found = written_out(device_curvature(part, n, load), n, cpu).numpy()
        everywhere = whole.gather(np.arange(70)).float32()
        np.testing.assert_array_equal(found, everywhere[start:stop])
        rows = len({i // 10 for i in range(start, stop)})
        assert {"rank1": sizes[0], "log8": sizes[-1], "low rank": sizes[0]}[form] == rows


def resident(tile: TensorInputs, device: torch.device) -> TensorInputs:
    """The tile with its buffers on the device."""

    def moved(b: Buffer) -> Buffer:
        return replace(b, data=torch.from_numpy(b.data.copy()).to(device))

    return with_buffers(tile, moved)


class TestResidentTilesOnTheDevice:
    __test__ = RUNS_HERE

    @pytest.fixture
    def backend(self, monkeypatch):
        """Its ring must not be used."""
        found = triton.on()

        def used(work):
            raise AssertionError("copied through the ring")

        monkeypatch.setattr(found._ring, "run", used)
        return found

    @pytest.fixture(params=["full", "log8", "rank1"])
    def tile(self, request):
        """Elements from within the second row on."""
        tile = random_experts(40, (2, 700), 2, dtypes=("bfloat16", "float16")).inputs("bfloat16")
        rows, columns = np.float32([1e-9, 3e-9]), np.float32(np.linspace(0.1, 1, 700))
        forms = {"log8": log8_of(np.outer(rows, columns)), "rank1": Rank1(rows, columns)}
        if request.param != "full":
            tile = replace(tile, curvatures=(forms[request.param],) * 2)
        return tile.slice(720, 1400)

    def test_merge(self, backend, tile):
        terms = with_brackets(tile, terms_of(tile))
        expected, truth = merge_tile(tile, terms, reference)
        there = resident(tile, backend.device)
        out = torch.full((len(expected),), 0xFF, dtype=torch.uint8, device=backend.device)
        stats = backend.merge(there, terms, out)
        found = stats.candidates
        devices = {x.device.type for x in (found.positions, *found.steps)}
        devices |= {b.data.device.type for b in found.operands.buffers}
        assert devices == {backend.device.type}
        on_host = replace(with_buffers(found.operands, on_the_host), index=found.operands.index.cpu().numpy())
        host = Candidates(found.positions.cpu().numpy(), on_host, tuple(s.cpu().numpy() for s in found.steps))
        assert_same_stats(replace(stats, candidates=host), truth)
        final = np.ones(tile.numel, bool)
        final[truth.candidates.positions] = False
        one, other = (decode(x, "bfloat16", (tile.numel,))[final] for x in (out.cpu().numpy(), expected))
        operand = np.full(tile.numel, 0.5)[final]
        assert_close("bfloat16", one, other, operand, 2)

    @pytest.mark.parametrize("quantile", [0.0, 0.7, 0.95])
    def test_lists_without_room_for_all_are_merged_again(self, backend, quantile):
        """Programs of three blocks each have room for one block of undecided elements."""
        tile = random_experts(44, (5 * 1024 + 7,), 1).inputs("bfloat16")
        terms = terms_of(tile, quantile=quantile)
        terms = replace(terms, experts=tuple(replace(e, span=1 << 30) for e in terms.experts))
        truth = merge_tile(tile, terms, reference)[1]
        out = torch.zeros(2 * tile.numel, dtype=torch.uint8, device=backend.device)
        found = backend.merge(resident(tile, backend.device), terms, out).candidates
        np.testing.assert_array_equal(found.positions.cpu().numpy(), truth.candidates.positions)
        np.testing.assert_array_equal(found.steps[0].cpu().numpy(), truth.candidates.steps[0])
        weights = found.operands.experts[0].data.cpu().numpy()
        assert weights.tobytes() == truth.candidates.operands.experts[0].data.tobytes()

    def test_surveys(self, backend, tile):
        there = resident(tile, backend.device)
        terms = terms_of(tile)
        for name in ("scores", "edits"):
            values, bad = getattr(backend, name)(there, 1, terms)
            assert values.device.type == backend.device.type
            np.testing.assert_array_equal(values.cpu().numpy(), getattr(reference, name)(tile, 1, terms)[0])
            assert bad == ()
        found, expected = (np.zeros((2, 1 << 16), np.int64) for _ in range(2))
        backend.histogram(there, 1, terms, False, -1, *found)
        reference.histogram(tile, 1, terms, False, -1, *expected)
        np.testing.assert_array_equal(found, expected)
        total, _ = backend.power_sum(there, 1, 0.5)
        assert total == pytest.approx(reference.power_sum(tile, 1, 0.5)[0], rel=1e-12)

    def test_row_and_column_sums(self, backend):
        tile = random_experts(41, (3, 50), 1).inputs("bfloat16")
        found, expected = ([np.zeros(3), np.ones(50)] for _ in range(2))
        backend.row_column_sums(resident(tile, backend.device).curvatures[0], *found)
        native.row_column_sums(tile.curvatures[0], *expected)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-14)

    def test_sums_of_a_row_of_many_columns(self, backend, monkeypatch):
        """One axis of programs has room for as many blocks of columns as there are."""
        from ota_kernels.backends.triton import survey

        grids = []
        launch = survey.launch

        def noted(kernel, grid, *arguments, **constants):
            grids.append(grid)
            launch(kernel, grid, *arguments, **constants)

        monkeypatch.setattr(survey, "launch", noted)
        rows, columns = survey.row_column_sums(torch.ones(130, 300))
        assert grids == [(9,)]
        assert torch.equal(rows, torch.full((130,), 300.0, dtype=torch.float64))
        assert torch.equal(columns, torch.full((300,), 130.0, dtype=torch.float64))

    def test_nothing_is_copied(self, backend):
        from ota_kernels.backends.triton.tiles import device_tile, in_place

        tile = random_experts(42, (50,), 2).inputs("float32")
        there = resident(tile, backend.device).slice(6, 40)
        found = device_tile(there, in_place(backend.device))
        places = [x.data_ptr() for x in (found.base, *found.experts, *found.curvatures)]
        assert places == [b.data.data_ptr() for b in there.buffers]

    def test_negative_zeros_of_curvature_are_no_reason_to_look_closer(self, backend, monkeypatch):
        from ota_kernels.backends.triton import outcome

        experts = random_experts(45, (1100,), 2)
        for h in experts.curvatures:
            h[::7] = -0.0
        tile = experts.inputs("bfloat16")
        terms = terms_of(tile)
        monkeypatch.setattr(outcome, "nonfinite", lambda tile: pytest.fail("plain torch has looked"))
        out = torch.zeros(2 * tile.numel, dtype=torch.uint8, device=backend.device)
        stats = backend.merge(resident(tile, backend.device), terms, out)
        truth = merge_tile(tile, terms, reference)[1]
        assert (stats.kept, stats.nonfinite) == (truth.kept, ())

    def test_what_found_no_room_is_remembered(self, backend, failing_launches, monkeypatch):
        from ota_kernels.backends.triton import backend as module

        monkeypatch.setattr(module, "_SMALLEST_TILE", 100)
        backend = triton.on()
        launched = []

        def fault(number, elements):
            launched.append(elements)
            if elements > 350:
                raise torch.OutOfMemoryError(OUT_OF_MEMORY)

        failing_launches += [fault]
        tile = random_experts(46, (600,), 2).inputs("bfloat16")
        terms, there = terms_of(tile), resident(tile, backend.device)
        truth = merge_tile(tile, terms, reference)[1]

        def merged():
            out = torch.zeros(1200, dtype=torch.uint8, device=backend.device)
            assert backend.merge(there, terms, out).kept == truth.kept

        merged()
        merged()
        rooms = [torch.zeros(1200, dtype=torch.uint8, device=backend.device) for _ in range(3)]
        stats = backend.merge_all([(there, terms, room) for room in rooms])
        assert [s.kept for s in stats] == [truth.kept] * 3
        assert launched == [600, 300, 300, 300, 300, *[300, 300] * 3]
        backend.release()
        merged()
        assert launched[-3:] == [600, 300, 300]

    def test_without_room_are_halved(self, backend, failing_launches, monkeypatch):
        from ota_kernels.backends.triton import backend as module

        monkeypatch.setattr(module, "_SMALLEST_TILE", 100)

        def fault(number, elements):
            if number == 1:
                raise torch.OutOfMemoryError(OUT_OF_MEMORY)

        failing_launches += [fault]
        tile = random_experts(43, (600,), 2).inputs("bfloat16")
        terms = with_brackets(tile, terms_of(tile))
        out = torch.zeros(1200, dtype=torch.uint8, device=backend.device)
        stats = backend.merge(resident(tile, backend.device), terms, out)
        truth = merge_tile(tile, terms, reference)[1]
        assert (stats.kept, stats.reached) == (truth.kept, truth.reached)
        np.testing.assert_array_equal(stats.candidates.positions.cpu().numpy(), truth.candidates.positions)


def on_the_host(b: Buffer) -> Buffer:
    return replace(b, data=b.data.cpu().numpy())
