"""Merger and merge_into: the results of merge_state_dicts, from what was kept and where it is wanted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import random_experts

from ota_kernels import InputError, Merger, RecipeError, merge_into, merge_state_dicts, merger
from ota_kernels.backends import native
from ota_kernels.recipe import methods

SHAPES = {"embed_tokens.weight": (60, 32), "layers.0.weight": (260, 160), "norm.weight": (33,), "scale": ()}
MODEL = {name: random_experts(seed, shape) for seed, (name, shape) in enumerate(SHAPES.items())}
BASE = {name: e.base for name, e in MODEL.items()}
EXPERTS = [{name: e.experts[t] for name, e in MODEL.items()} for t in range(3)]
CURVATURES = [{name: e.curvatures[t] for name, e in MODEL.items()} for t in range(3)]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


# Each call after the first differs in values, in masks, in scores, or not at all.
CALLS = {
    "ota": [
        {"density": 0.3},
        {"density": 0.3, "lambda_": 0.5},
        {"density": [0.1, 0.3, 0.2]},
        {"density": 0.3, "density_scope": "tensor"},
        {"density": 0.3, "density_scope": "tensor", "lambda_": 0.5},
        {"saliency_mass": 0.8, "normalise": "model"},
        {"saliency_mass": 0.8, "normalise": "model", "mask_weights": False},
        {"density": 0.3, "rescale": True, "rank": 2},
        {"density": 0.3},
    ],
    "ties": [
        {"density": 0.2, "weight": 1.0},
        {"density": 0.2, "weight": [0.5, 1, 2], "lambda_": 0.7},
        {"density": 0.4, "weight": 1.0},
    ],
    "sce": [{"select_topk": 0.2}, {"select_topk": 0.2, "lambda_": 1.3}, {"select_topk": 0.5}],
    "ramplus": [{}, {"r": 0.5, "alpha": 2}, {"epsilon": 1e-4}],
    "multislerp": [{"weight": [1, 2, 3]}, {"weight": [3, 2, 1]}],
    "karcher": [{}, {"max_iter": 3}],
    "linear": [{"weight": [1, 2, 3]}, {"weight": 1.0}],
}


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_call_is_the_merge_whatever_was_kept(backend):
    merger = Merger(BASE, EXPERTS, CURVATURES, backend=backend)
    for method, calls in CALLS.items():
        for parameters in calls:
            expected = merge_state_dicts(
                BASE, EXPERTS, CURVATURES, method=method, backend=backend, **parameters
            )
            assert_same(merger(method=method, **parameters), expected)


@pytest.mark.parametrize("method", [m for m in methods.names() if m in CALLS])
def test_what_affects_values_only_finds_nothing_anew(monkeypatch, method):
    """The second of two such calls asks the kernels for merges only, none of which waits for a threshold."""
    merger = Merger(BASE, EXPERTS, CURVATURES, backend="native")
    first, second, *_ = CALLS[method]
    merger(method=method, **first)
    spied = {
        name: getattr(native, name)
        for name in ("scores", "run_scores", "histogram", "gram", "masked_sums", "power_sum", "edits")
    }
    calls: list[str] = []
    for name, kernel in spied.items():
        monkeypatch.setattr(
            native, name, lambda *a, _k=kernel, _n=name, **b: (calls.append(_n), _k(*a, **b))[1]
        )
    merge = native.merge

    def merging(tile, terms, out):
        calls.extend("open" for e in terms.experts if e.span or e.census)
        return merge(tile, terms, out)

    monkeypatch.setattr(native, "merge", merging)
    merger(method=method, **second)
    assert calls == []


def test_another_density_samples_nothing_anew(monkeypatch):
    taken = []
    from ota_kernels.run import decide

    sample = decide.sample
    monkeypatch.setattr(decide, "sample", lambda *a, **b: (taken.append(a[2]), sample(*a, **b))[1])
    merger = Merger(BASE, EXPERTS, CURVATURES)
    merger(density=[0.3, 0.3, 1.0])
    merger(density=0.1)
    merger(density=0.2)
    assert taken == [[0, 1], [2]]


def test_kept_surveys_are_few(monkeypatch):
    monkeypatch.setattr("ota_kernels.run.surveys._MOST", 2)
    merger = Merger(BASE, EXPERTS, CURVATURES)
    for density in (0.1, 0.2, 0.3, 0.1):
        assert_same(merger(density=density), merge_state_dicts(BASE, EXPERTS, CURVATURES, density=density))
    assert len(merger._kept._surveys) == 2


class TestOut:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_in_place(self, dtype):
        out = {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in SHAPES.items()}
        places = {name: tensor.data_ptr() for name, tensor in out.items()}
        found = Merger(BASE, EXPERTS, CURVATURES)(density=0.3, out=out)
        assert all(found[name] is out[name] and out[name].data_ptr() == places[name] for name in out)
        name = str(dtype).removeprefix("torch.")
        assert_same(out, merge_state_dicts(BASE, EXPERTS, CURVATURES, density=0.3, out_dtype=name))

    def test_types_of_their_own(self):
        out = {name: torch.empty(shape) for name, shape in SHAPES.items()}
        out["norm.weight"] = torch.empty(33, dtype=torch.float16)
        Merger(BASE, EXPERTS)(method="linear", out=out)
        full = merge_state_dicts(None, EXPERTS, method="linear", out_dtype="float32")
        half = merge_state_dicts(None, EXPERTS, method="linear", out_dtype="float16")
        assert_same(out, full | {"norm.weight": half["norm.weight"]})

    def test_not_contiguous(self):
        out = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()}
        out["layers.0.weight"] = torch.empty(160, 260, dtype=torch.bfloat16).T
        Merger(BASE, EXPERTS, CURVATURES)(density=0.3, out=out)
        assert_same(out, merge_state_dicts(BASE, EXPERTS, CURVATURES, density=0.3))

    def test_an_input(self):
        """Tiles that are merged a second time must still find the inputs."""
        base = {name: tensor.clone() for name, tensor in BASE.items()}
        expected = merge_state_dicts(BASE, EXPERTS, CURVATURES, density=0.3)
        Merger(base, EXPERTS, CURVATURES)(density=0.3, out=base)
        assert_same(base, expected)

    def test_of_numpy(self):
        arrays = [
            {"w": np.random.default_rng(seed).normal(size=(7, 5)).astype(np.float32)} for seed in range(3)
        ]
        out = {"w": np.zeros((5, 7), np.float32).T}
        Merger(arrays[0], arrays[1:])(method="task_arithmetic", weight=1.0, out=out)
        assert np.array_equal(
            out["w"], merge_state_dicts(arrays[0], arrays[1:], method="task_arithmetic", weight=1.0)["w"]
        )

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda out: out.pop("scale"), "out has no tensor 'scale'"),
            (lambda out: out.update(more=torch.zeros(3)), r"out\['more'\] is in no model"),
            (lambda out: out.update(scale=torch.zeros(3)), r"out\['scale'\] has shape \[3\], the merge \[\]"),
            (lambda out: out.update(scale=torch.zeros((), dtype=torch.int64)), r"out\['scale'\] is int64"),
            (lambda out: out.update({"norm.weight": out["layers.0.weight"][0, :33]}), "overlap in memory"),
        ],
        ids=["lacking", "more", "shape", "type", "overlapping"],
    )
    def test_refused(self, change, words):
        out = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        change(out)
        before = {name: tensor.clone() for name, tensor in out.items()}
        with pytest.raises(InputError, match=words):
            Merger(BASE, EXPERTS)(method="linear", out=out)
        assert_same(out, before)

    def test_a_read_only_array(self):
        arrays = [{"w": np.ones(3, np.float32)}] * 2
        out = np.zeros(3, np.float32)
        out.flags.writeable = False
        with pytest.raises(InputError, match="read-only"):
            Merger(None, arrays)(method="linear", out={"w": out})

    def test_out_and_out_dtype(self):
        with pytest.raises(RecipeError, match="`out` and `out_dtype` exclude each other"):
            Merger(BASE, EXPERTS)(method="linear", out=BASE, out_dtype="float32")


class Net(torch.nn.Module):
    """Tied like a language model, with a buffer."""

    def __init__(self, seed: int, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(11, 6)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.norm = torch.nn.LayerNorm(6, dtype=torch.bfloat16)
        self.register_buffer("steps", torch.arange(3))
        if tied:
            self.head.weight = self.embed.weight


class TestModules:
    def test_a_live_module(self):
        """Its parameters stay the objects that an optimizer holds."""
        base, *experts = (Net(seed) for seed in range(3))
        live = Net(9)
        parameters = dict(live.named_parameters())
        merge_into(live, base, experts, method="task_arithmetic", weight=[0.5, 0.25])
        assert dict(live.named_parameters()) == parameters
        expected = merge_state_dicts(
            base.state_dict(),
            [e.state_dict() for e in experts],
            method="task_arithmetic",
            weight=[0.5, 0.25],
        )
        assert_same(live.state_dict(), expected)
        assert live.head.weight is live.embed.weight

    def test_the_base_itself(self):
        base, *experts = (Net(seed) for seed in range(3))
        states = [e.state_dict() for e in experts]
        expected = merge_state_dicts(base.state_dict(), states, method="task_arithmetic", weight=0.5)
        expected = {name: tensor.clone() for name, tensor in expected.items()}
        merge_into(base, base, experts, method="task_arithmetic", weight=0.5)
        assert_same(base.state_dict(), expected)

    def test_tied_names_are_merged_once(self, monkeypatch):
        merged = []
        merge = native.merge
        monkeypatch.setattr(native, "merge", lambda tile, *a: (merged.append(tile.name), merge(tile, *a))[1])
        live, *models = (Net(seed) for seed in range(3))
        merge_into(live, None, models, method="linear", backend="native")
        assert sorted(merged) == ["embed.weight", "norm.bias", "norm.weight"]

    def test_files_without_the_copy(self):
        live, *models = (Net(seed) for seed in range(3))
        stored = [{n: t for n, t in m.state_dict().items() if n != "head.weight"} for m in models]
        merge_into(live, None, stored, method="linear")
        assert torch.equal(live.head.weight, merge_state_dicts(None, stored, method="linear")["embed.weight"])

    def test_inputs_that_are_not_tied(self):
        live, *models = (Net(seed, tied=seed == 0) for seed in range(3))
        with pytest.raises(InputError, match=r"'head.weight' and 'embed.weight' are one memory in `out`"):
            merge_into(live, None, models, method="linear")


def test_on_the_devices_of_the_model():
    """Parameters on another device than the inputs are copied there. `meta` has no memory to write."""
    from ota_kernels import BackendError

    live = Net(0).to("meta")
    with pytest.raises(BackendError, match="is on meta"):
        merge_into(live, None, [Net(1), Net(2)], method="linear")


def test_wrong_arguments():
    with pytest.raises(RecipeError, match="threads must be at least 1"):
        Merger(BASE, EXPERTS, threads=0)
    with pytest.raises(InputError, match="3 experts but 2 curvatures"):
        Merger(BASE, EXPERTS, CURVATURES[:2])
    with pytest.raises(RecipeError, match="`density` is not used by `linear`"):
        Merger(BASE, EXPERTS)(method="linear", density=0.3)
    assert merger.Merger is Merger
