"""The functional API on tensors of a device against the same calls on the CPU: equal thresholds and counts.

Merges run on a GPU where there is one, else under Triton's interpreter, where the CPU is the device: then one
test runs this file in a process of its own, since the interpreter must be chosen before Triton is imported.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from alone import passes_interpreted
from models import Experts, decider_of, random_experts, with_buffers
from scores import CASES, DTYPES, assert_grafted, ranks, sorted_answers
from streams import Streamed, inputs_of, recipe_of, run_engine, stream
from tolerances import assert_close

import ota_kernels
import ota_kernels.merger as functional
import ota_kernels.tensors.array as resident
import ota_kernels.topk as selection
from ota_kernels import graft, merge_state_dicts, merge_tensors, topk_threshold
from ota_kernels.backends import native, triton
from ota_kernels.errors import BackendError, InputError
from ota_kernels.run import on_device
from ota_kernels.run.decide import Decider
from ota_kernels.run.rules import Rules
from ota_kernels.run.sinks import Inline, MemorySink
from ota_kernels.select.bracket import Bracket, bracket_of
from ota_kernels.tensors.buffer import Buffer
from ota_kernels.tensors.convert import buffer_of
from ota_kernels.tensors.tile import TensorInputs

RUNS_HERE = triton.verify()[0]
SHAPE = (25, 38)  # one block of the kernels: the interpreter takes half a second for a few
SMALL = (30,)
DENSITY = {"density": 0.3}


@pytest.mark.skipif(RUNS_HERE, reason="the tests below run in this process")
def test_under_the_interpreter():
    passes_interpreted(__file__, "TestSelections or TestMerge")


@functools.cache
def device() -> torch.device:
    return triton.on().device


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What nobody writes is NaN in every float type."""
    empty = resident.empty

    def poisoned(nbytes, like):
        found = empty(nbytes, like)
        found[:] = 0xFF
        return found

    monkeypatch.setattr(resident, "empty", poisoned)


# Tensors of a block are sampled and bracketed as large ones are.
BRACKETED = Rules(direct=100, clusters=lambda elements: 4)


def put(x):
    """Tensors in dictionaries and sequences, on the device."""
    if isinstance(x, torch.Tensor):
        return x.to(device())
    if isinstance(x, dict):
        return {name: put(value) for name, value in x.items()}
    return None if x is None else [put(value) for value in x]


def moved(tensor: TensorInputs) -> TensorInputs:
    """The inputs on the device."""

    def buffer(given: Buffer) -> Buffer:
        return replace(given, data=torch.from_numpy(given.data.copy()).to(device()))

    return with_buffers(tensor, buffer)


def stream_on_cpu(recipe, tensors, tile: int = 20_000) -> Streamed:
    return stream(recipe, tensors, native, tile, rules=BRACKETED)


def stream_on_device(recipe, tensors, tile: int = resident.TILE, rules: Rules = BRACKETED) -> Streamed:
    """The same for inputs that are moved first."""
    tensors = list(map(moved, tensors))
    sink = MemorySink(tensors)
    with Inline(device()) as pool:
        decider = decider_of(recipe, tensors, triton.on(), pool, rules)
        counts, waiting, repeats = run_engine(decider, sink, tile, budget=0)
    outputs = [out.cpu().numpy().tobytes() for out in sink.outputs]
    return Streamed(outputs, counts, waiting, repeats)


def assert_same(found: Streamed, expected: Streamed, by_device: bool = False) -> None:
    """Equal counts and thresholds; float32 results within a unit in the last place. by_device: the device
    finds thresholds over the model, so that no tile waits for the host."""
    assert found.counts == expected.counts
    assert found.waiting == ([] if by_device else expected.waiting)
    for one, other in zip(found.outputs, expected.outputs, strict=True):
        np.testing.assert_array_max_ulp(np.frombuffer(one, np.float32), np.frombuffer(other, np.float32))


def _few_values(shape, rng) -> Experts:
    """Ties everywhere, and scores of 0."""
    edits = rng.integers(-3, 4, (3, *shape)) / 1024
    return Experts(torch.zeros(shape), tuple(torch.from_numpy(np.float32(edits))), (torch.ones(shape),) * 3)


def _overflowing(shape, rng) -> Experts:
    """One score in twenty is infinite."""
    huge = rng.random((3, *shape)) < 0.05
    edits = np.where(huge, 1e10, rng.normal(size=(3, *shape)))
    curvatures = np.where(huge, 1e38, rng.random((3, *shape)))
    parts = (tuple(torch.from_numpy(np.float32(x))) for x in (edits, curvatures))
    return Experts(torch.zeros(shape), *parts)


def tensors_of(kind: str) -> list[TensorInputs]:
    rng = np.random.default_rng(len(kind))
    if kind == "random":
        return inputs_of([random_experts(seed, shape) for seed, shape in enumerate((SHAPE, SMALL, (1,)))])
    make = {"few values": _few_values, "overflowing": _overflowing}[kind]
    return inputs_of([make(shape, rng) for shape in (SHAPE, SMALL)])


N = SHAPE[0] * SHAPE[1]
SELECTIONS = {
    "density": ({"density": 0.3}, {"density": 0.05}, {"density": 0.6}),
    "mixed": ({"density": 0.3}, {"precond_threshold": 2.0**-30}, {"saliency_mass": 0.8}),
    "mass": ({"saliency_mass": 0.9}, {"saliency_mass": 1e-9}, {"saliency_mass": 1.0}),
    # Nothing; one; all but one.
    "ends": ({"density": 0.0}, {"density": 1.5 / N}, {"density": (N - 0.5) / N}),
    "everything": ({"density": 1.0}, {"density": 1.0}, {"density": 0.3}),
}


def _out_of_memory(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory")


class TestSelections:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize(
        ("kind", "chosen", "scope"),
        [
            ("random", "density", "tensor"),
            ("random", "density", "model"),
            ("random", "mixed", "tensor"),
            ("random", "mass", "model"),
            ("random", "ends", "tensor"),
            ("random", "everything", "model"),
            ("few values", "density", "tensor"),
            ("few values", "mixed", "model"),
            ("overflowing", "mixed", "tensor"),
        ],
    )
    def test_thresholds_and_counts(self, kind, chosen, scope):
        tensors, recipe = tensors_of(kind), recipe_of(SELECTIONS[chosen], density_scope=scope)
        expected = stream_on_cpu(recipe, tensors)
        if (kind, chosen, scope) == ("random", "density", "model"):
            assert 0 < dict(expected.waiting)[0] < N / 2
        by_device = scope == "model" and chosen in ("density", "everything")
        assert_same(stream_on_device(recipe, tensors), expected, by_device)

    @pytest.mark.parametrize("scope", ["tensor", "model"])
    def test_of_several_tiles(self, scope):
        tensors, recipe = tensors_of("random"), recipe_of(SELECTIONS["density"], density_scope=scope)
        found = stream_on_device(recipe, tensors, 400)
        assert_same(found, stream_on_cpu(recipe, tensors, 400), by_device=scope == "model")

    @pytest.mark.parametrize("scope", ["tensor", "model"])
    @pytest.mark.parametrize("bad", ["too high", "too low"])
    def test_a_bracket_that_misses_costs_time_only(self, bad, scope):
        tensors, recipe = tensors_of("random")[:1], recipe_of([DENSITY] * 3, density_scope=scope)
        expected = stream_on_cpu(recipe, tensors)

        def beside(given, scores) -> Bracket:
            right = bracket_of(given, scores)
            return Bracket(right.lowest * (4.0 if bad == "too high" else 0.25), right.span // 8)

        rules = replace(BRACKETED, bracket=beside, on_device=False)
        found = stream_on_device(recipe, tensors, rules=rules)
        assert found.repeats == 1
        assert found.numbers() == expected.numbers()
        assert [found.scores(t) for t in range(3)] == [expected.scores(t) for t in range(3)]

    @pytest.mark.parametrize("bad", ["misleads", "tells little"])
    def test_a_sample_that_is_of_no_use_costs_time_only(self, monkeypatch, bad):
        """One run again and again, by which each threshold seems to be known; a bracket of all scores, for
        which lists have no room."""
        size = SHAPE if bad == "misleads" else (5, 1030)
        tensors = inputs_of([random_experts(seed, shape) for seed, shape in enumerate((size, SMALL))])
        recipe = recipe_of([DENSITY] * 3, density_scope="tensor")
        expected = stream_on_cpu(recipe, tensors)
        if bad == "misleads":
            monkeypatch.setattr(on_device, "runs_of_tensor", lambda tensor, count: np.zeros(64, np.int32))
        monkeypatch.setattr(on_device, "reach_of", lambda clusters: 0.0 if bad == "misleads" else 1e6)
        found = stream_on_device(recipe, tensors)
        assert found.counts[0].repeats == 1
        assert found.counts[1].repeats == 0
        assert found.numbers() == expected.numbers()
        assert [found.scores(t) for t in range(3)] == [expected.scores(t) for t in range(3)]

    @pytest.mark.parametrize("bad", ["misleads", "tells little", "no memory"])
    def test_thresholds_over_the_model_that_are_not_found_cost_time_only(self, monkeypatch, bad):
        """A bracket beside the threshold, and one of all scores, for which lists have no room."""
        tensors = inputs_of([random_experts(seed, shape) for seed, shape in enumerate(((5, 1030), SMALL))])
        recipe = recipe_of([DENSITY] * 3, density_scope="model")
        expected = stream_on_cpu(recipe, tensors)

        def beside(given, scores) -> Bracket:
            right = bracket_of(given, scores)
            far = 1 << 29 if bad == "tells little" else right.span // 8
            return Bracket(right.lowest * (4.0 if bad == "misleads" else 2.0**-60), far)

        if bad == "no memory":
            from ota_kernels.backends.triton import density

            monkeypatch.setattr(density, "merge_all", _out_of_memory)
        found = stream_on_device(recipe, tensors, rules=replace(BRACKETED, bracket=beside))
        triton.on().release()
        assert [counts.repeats for counts in found.counts] == [1, 1]
        assert found.numbers() == expected.numbers()
        assert [found.scores(t) for t in range(3)] == [expected.scores(t) for t in range(3)]

    def test_only_statistics_cross_to_the_host(self, monkeypatch):
        """The package reads a few numbers of the device at a time, and as seldom as it says."""
        tensors = tensors_of("random")[:1]
        recipe = recipe_of([DENSITY] * 3, density_scope="tensor")
        crossed, package = [], str(Path(ota_kernels.__file__).parent)

        def watch(name):
            method = getattr(torch.Tensor, name)

            def watched(self, *arguments, **options):
                if sys._getframe(1).f_code.co_filename.startswith(package):
                    crossed.append(self.numel())
                return method(self, *arguments, **options)

            monkeypatch.setattr(torch.Tensor, name, watched)

        stream_on_device(recipe, tensors)  # has compiled and cached what it needs
        for name in ("cpu", "tolist", "item", "__int__", "__float__", "__bool__", "__index__"):
            watch(name)
        found = stream_on_device(recipe, tensors)
        monkeypatch.undo()
        assert found.counts[0].repeats == 0
        assert max(crossed) <= 6 * 3 + 6  # counts of a merge with brackets and three experts
        assert len(crossed) <= 2 * 3 + 3  # and once for each expert inside of torch


class TestMerge:
    """What the engine is given, and what comes back."""

    __test__ = RUNS_HERE

    @pytest.mark.parametrize(
        ("dtypes", "base_dtype", "curvature_dtypes", "out_dtype"),
        [
            (("bfloat16",), "bfloat16", ("float32",), None),
            (("float16", "float32"), "float16", ("bfloat16", "float16"), "float64"),
            (("float8_e4m3fn", "bfloat16"), "float32", ("float32",), None),
            (("float64",), "float64", None, "float16"),
            (("bfloat16",), None, ("float32",), "float32"),
        ],
    )
    def test_types(self, dtypes, base_dtype, curvature_dtypes, out_dtype):
        e = random_experts(
            1, (10, 20), dtypes=dtypes, base_dtype=base_dtype, curvature_dtypes=curvature_dtypes
        )
        merged = merge_tensors(
            put(e.base),
            put(e.experts),
            put(e.curvatures),
            out_dtype=out_dtype,
            backend="triton",
            density=[0.3, 0.5, 0.1],
        )
        name = out_dtype or base_dtype
        assert (merged.device.type, merged.dtype) == (device().type, getattr(torch, name))
        truth = oracle.evaluate({"weight": e.exact()}, density=[0.3, 0.5, 0.1])["weight"]
        assert_close(name, merged.cpu().double().numpy(), truth.out, truth.operand, 3)

    @pytest.mark.parametrize(
        "parameters",
        [
            {"normalise": "global"},
            {"normalise": "model", "density_scope": "model"},
            {"rescale": True},
            {"rescale": True, "approximate_norm": True},
            {"masked_task_vector_merge_method": "ties", "ties_density": 0.5},
            {"rank1_approx": True},
            {"rank": 2},
        ],
        ids=str,
    )
    def test_other_surveys(self, parameters):
        e = random_experts(2, (20, 12), dtypes=("float32",), base_dtype="float32")
        shared = DENSITY | parameters
        merged = merge_tensors(put(e.base), put(e.experts), put(e.curvatures), backend="triton", **shared)
        expected = merge_tensors(e.base, e.experts, e.curvatures, backend="native", **shared)
        np.testing.assert_array_max_ulp(merged.cpu().numpy(), expected.numpy(), 4)
        assert (expected != e.base).any()

    def test_dictionaries(self):
        """Of tensors of any size, and integers, which are copied."""
        shapes = {"matrix": (10, 20), "scale": (), "empty": (0, 4), "bias": (12,)}
        model = {name: random_experts(seed, shape) for seed, (name, shape) in enumerate(shapes.items())}
        index = torch.arange(5)
        base = {name: e.base for name, e in model.items()} | {"index": index}
        experts = [{name: e.experts[t] for name, e in model.items()} | {"index": index} for t in range(3)]
        curvatures = [{name: e.curvatures[t] for name, e in model.items()} for t in range(3)]
        merged = merge_state_dicts(put(base), put(experts), put(curvatures), backend="triton", **DENSITY)
        truth = oracle.evaluate({name: e.exact(name) for name, e in model.items()}, **DENSITY)
        assert list(merged) == [*shapes, "index"]
        assert torch.equal(merged["index"].cpu(), index)
        for name, shape in shapes.items():
            assert (merged[name].device.type, merged[name].shape) == (device().type, shape)
            values = merged[name].cpu().double().numpy()
            assert_close("bfloat16", values, truth[name].out, truth[name].operand, 3)
        experts[1]["index"] = index + 1
        with pytest.raises(InputError, match=r"experts\[1\]\['index'\] differs from base\['index'\]"):
            merge_state_dicts(put(base), put(experts), put(curvatures), backend="triton", **DENSITY)

    def test_tensors_of_any_layout(self):
        e = random_experts(3, (14, 10))
        expected = merge_tensors(put(e.base), put(e.experts), put(e.curvatures), backend="triton", **DENSITY)
        a, b, c = (put(w) for w in e.experts)
        views = [a.t().contiguous().t(), b.repeat_interleave(2, dim=1)[:, ::2], (-c).conj()]
        views[2] = torch._neg_view(views[2])
        parameters = (put(e.base).requires_grad_(), [v.requires_grad_() for v in views])
        before = [x.detach().clone() for x in views]
        merged = merge_tensors(*parameters, put(e.curvatures), backend="triton", **DENSITY)
        assert torch.equal(merged, expected)
        assert not merged.requires_grad
        assert all(map(torch.equal, views, before))

    def test_values_that_are_not_finite(self):
        e = random_experts(4, (6, 100))
        e.experts[1].view(-1)[[70, 599]] = float("nan")
        arguments = put(e.base), put(e.experts), put(e.curvatures)
        with pytest.raises(InputError, match=r"experts\[1\]\['weight'\]: weight: 2 of 600 .* flat index 70;"):
            merge_tensors(*arguments, backend="triton")
        merged = merge_tensors(*arguments, backend="triton", on_nonfinite="base")
        assert torch.equal(merged.view(-1)[[70, 599]].cpu(), e.base.view(-1)[[70, 599]])

    @pytest.mark.parametrize("parameters", [DENSITY, {"precond_threshold": 1e-12}, {"density": 0}], ids=str)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_graft_has_the_bits_of_base_and_expert(self, monkeypatch, parameters, dtype):
        """Edits are rounded: a weight and its edit differ by many powers of two."""
        monkeypatch.setattr(functional, "Decider", functools.partial(Decider, rules=BRACKETED))
        rng, own = np.random.default_rng(5), getattr(torch, dtype)
        base, expert = (torch.as_tensor(rng.lognormal(0, 8, SHAPE)).to(own) for _ in range(2))
        e = Experts(base, (expert,), (torch.as_tensor(rng.lognormal(-30, 9, SHAPE)).float(),))
        assert (base.float() + (expert.float() - base.float()) != expert.float()).float().mean() > 0.01
        grafted = graft(put(e.base), put(e.experts[0]), put(e.curvatures[0]), backend="triton", **parameters)
        mask = oracle.evaluate({"weight": e.exact()}, **parameters)["weight"].masks[0]
        assert 0 < mask.mean() < 1 or parameters == {"density": 0}
        assert_grafted(grafted.cpu(), e.base, e.experts[0], mask)

    def test_the_callers_autocast_changes_nothing(self):
        e = random_experts(9, (20, 12), dtypes=("float32",), base_dtype="float32")
        given = put(e.base), put(e.experts), put(e.curvatures)
        options = DENSITY | {"rescale": True, "approximate_norm": True}
        expected = merge_tensors(*given, backend="triton", **options)
        with torch.autocast(device().type, dtype=torch.bfloat16):
            found = merge_tensors(*given, backend="triton", **options)
        assert torch.equal(found, expected)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_the_current_stream_is_used(self):
        """Inputs that are still being computed when the merge is called."""
        e = random_experts(6, (300, 400))
        base, experts, curvatures = put(e.base), put(e.experts), put(e.curvatures)
        expected = merge_tensors(base, experts, curvatures, **DENSITY)
        late = torch.full_like(base, torch.nan)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(100_000_000)
            late.copy_(base)
            assert torch.equal(merge_tensors(late, experts, curvatures, **DENSITY), expected)


ONES = torch.ones(3)


@pytest.fixture
def elsewhere(monkeypatch):
    """Tensors on devices that need not be there: where each is said to be."""
    places = {}
    device_of = functional.device_of
    monkeypatch.setattr(
        functional, "device_of", lambda tensor, origin: places.get(id(tensor)) or device_of(tensor, origin)
    )
    return places


def test_tensors_on_a_device_and_on_the_host(elsewhere, monkeypatch):
    """On two devices: test_devices.py."""
    monkeypatch.setattr(functional.backends, "select", lambda name, device: triton)
    base, expert = torch.ones(3), torch.ones(3)
    elsewhere |= {id(base): "cuda:0", id(expert): "cuda:0"}
    with pytest.raises(InputError, match=r"experts\[0\]\['weight'\] is on cpu, base\['weight'\] on cuda:0"):
        merge_tensors(base, [torch.ones(3)])
    with pytest.raises(InputError, match=r"experts\[0\]\['weight'\] is on cuda:0, base\['weight'\] on cpu"):
        merge_tensors(np.ones(3, np.float32), [expert])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_backend_of_the_cpu_for_tensors_of_a_gpu(elsewhere, backend):
    base = torch.ones(3)
    elsewhere[id(base)] = "cuda:0"
    with pytest.raises(BackendError, match=rf"base\['weight'\] is on cuda:0: .* {backend} .* with .cpu\(\)"):
        merge_tensors(base, [ONES], backend=backend)


def test_auto_is_triton_for_tensors_of_a_gpu(elsewhere, monkeypatch):
    asked = []
    select = functional.backends.select

    def noted(name, device="auto"):
        asked.append((name, device))
        return select("native")

    monkeypatch.setattr(functional.backends, "select", noted)
    base, expert = torch.ones(3), torch.ones(3)
    elsewhere |= {id(base): "cuda:1"}
    for name in ("auto", "triton"):
        merge_tensors(ONES, [ONES], backend=name)
        with pytest.raises(InputError, match=r"is on cpu, .* on cuda:1"):
            merge_tensors(base, [expert], backend=name)
    assert asked == [("auto", "cpu"), ("triton", "cuda:1"), ("triton", "auto"), ("triton", "cuda:1")]


class TestThresholds:
    """topk_threshold on the device's tensors; any tensor of torch will do."""

    @pytest.fixture(autouse=True)
    def _resident(self, monkeypatch):
        monkeypatch.setattr(selection, "buffer_of", functools.partial(buffer_of, resident=True))
        small = functools.partial(selection.at_positions, device_block=100_000)
        monkeypatch.setattr(selection, "at_positions", small)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("case", CASES)
    def test_is_the_sorted_score(self, case, dtype):
        scores = torch.as_tensor(CASES[case](np.random.default_rng(1))).to(getattr(torch, dtype))
        wanted = [*ranks(scores.numel()), *range(1, 8)]
        for largest, some in ((True, wanted), (False, wanted[::2])):
            found = topk_threshold(scores, some, largest=largest)
            assert found == sorted_answers(scores, some, largest)
            assert all(type(x) is float for x in found)

    @pytest.mark.parametrize("n", [0, 1, 255, 70_000])
    def test_any_size(self, n):
        scores = torch.randn(n, generator=torch.Generator().manual_seed(n))
        for k in ranks(n):
            assert topk_threshold(scores, k) == sorted_answers(scores, [k], True)[0]

    @pytest.mark.parametrize("n", [1000, 300_000])
    def test_nan_is_an_error(self, n):
        scores = torch.randn(n)
        scores[[n // 2, n - 1]] = torch.nan
        with pytest.raises(InputError, match=rf"^score: 2 of {n} values are NaN, .* flat index {n // 2}:"):
            topk_threshold(scores, 5)
