"""The torch operators: torch's own checks, and that a traced call of the functional API is that call."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from models import Experts, random_experts
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import ota_kernels
from ota_kernels import errors, graft, merge_state_dicts, merge_tensors, topk_threshold
from ota_kernels.integrations import torch_ops as ops

CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_static",
    "test_aot_dispatch_dynamic",
)


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    torch._dynamo.reset()


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found, expected):
    """Trees of tensors with the same structure, types, shapes and bits."""
    (found, structure), (expected, expected_structure) = map(pytree.tree_flatten, (found, expected))
    assert structure == expected_structure
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.dtype, mine.shape, mine.device) == (theirs.dtype, theirs.shape, theirs.device)
        assert bits(mine) == bits(theirs)


def compiled(function, *, dynamic=None, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)


def merging(experts: Experts, method="ota", name="weight", **options):
    """The arguments of merge_state_dicts for one tensor."""
    return {
        "base": None if experts.base is None else {name: experts.base},
        "experts": [{name: expert} for expert in experts.experts],
        "curvatures": None if experts.curvatures is None else [{name: h} for h in experts.curvatures],
        "method": method,
        **options,
    }


def transposed(experts: Experts) -> Experts:
    """Views that require gradients."""

    def view(tensor):
        return tensor.clone().requires_grad_().t()

    return Experts(
        view(experts.base), *(tuple(map(view, each)) for each in (experts.experts, experts.curvatures))
    )


def dictionaries():
    """Two matrices, a number, nothing, and integers that lie in memory by columns."""
    shapes = {"a.weight": (9, 14), "b.weight": (14, 5), "scale": (), "none": (0, 3)}
    model = {name: random_experts(seed, shape, 2) for seed, (name, shape) in enumerate(shapes.items())}
    index = {"index": torch.arange(6).reshape(2, 3).t()}
    return {
        "base": {name: e.base for name, e in model.items()} | index,
        "experts": [index | {name: e.experts[t] for name, e in model.items()} for t in range(2)],
        "curvatures": [{name: e.curvatures[t] for name, e in model.items()} for t in range(2)],
        "method": "ota",
    }


DENSITY = {"density": 0.3}
MERGES = {
    "bfloat16": merging(random_experts(1, (12, 17)), **DENSITY),
    "float32": merging(random_experts(2, (12, 17), dtypes=("float32",), base_dtype="float32"), **DENSITY),
    "float16": merging(
        random_experts(3, (50,), dtypes=("float16",), base_dtype="float16"), saliency_mass=0.9
    ),
    "mixed": merging(random_experts(4, (50,), dtypes=("float16", "float64", "float32")), **DENSITY),
    "float8": merging(random_experts(14, (50,), dtypes=("float8_e5m2",)), **DENSITY),
    "out-dtype": merging(random_experts(5, (12, 17)), out_dtype="fp32", precond_threshold="1e-12"),
    "no-base": merging(random_experts(6, (50,), base_dtype=None), **DENSITY),
    "no-curvature": merging(random_experts(7, (50,), curvature_dtypes=None), density=[0.3, 0.1, 0.2]),
    "half-curvature": merging(random_experts(8, (50,), curvature_dtypes=("bfloat16", "float16"))),
    "linear": merging(random_experts(9, (12, 17)), method="linear", weight=[1, 2.5, 0.5], normalize=False),
    "ties": merging(
        random_experts(10, (12, 17)), masked_task_vector_merge_method="ties", rank=2, rescale=True, **DENSITY
    ),
    "scalar": merging(random_experts(11, ()), precond_threshold=1e-12),
    "empty": merging(random_experts(12, (0, 4)), **DENSITY),
    "transposed": merging(transposed(random_experts(13, (12, 17))), **DENSITY),
    "dictionaries": dictionaries() | {"density": 0.3, "normalise": "model", "out_dtype": "float16"},
}


def grafting(experts: Experts, **options):
    base, expert = experts.base, experts.experts[0]
    curvature = None if experts.curvatures is None else experts.curvatures[0]
    return {"base": base, "expert": expert, "curvature": curvature, **options}


def grafted_dictionaries():
    models = dictionaries()
    return {"base": models["base"], "expert": models["experts"][0], "curvature": models["curvatures"][0]}


GRAFTS = {
    "bfloat16": grafting(random_experts(21, (12, 17), 1), **DENSITY),
    "rounded": grafting(random_experts(22, (50,), 1, dtypes=("float32",)), saliency_mass=0.8),
    "no-curvature": grafting(random_experts(23, (50,), 1, curvature_dtypes=None), precond_threshold=1e-5),
    "scalar": grafting(random_experts(24, (), 1), precond_threshold=0.0),
    "empty": grafting(random_experts(25, (0,), 1), **DENSITY),
    "transposed": grafting(transposed(random_experts(26, (12, 17), 1)), rank=1, **DENSITY),
    "dictionaries": grafted_dictionaries() | {"density": 0.3, "density_scope": "tensor"},
}

SCORES = {
    "float32": (torch.linspace(-1, 1, 60).reshape(5, 12), [20]),
    "bfloat16": (torch.linspace(-1, 1, 60).bfloat16(), [60, 0, 1]),
    "float16": (torch.linspace(-1, 1, 60).half().reshape(5, 12).t().requires_grad_(), [7, 7]),
    "float64": (torch.linspace(-1, 1, 60).double(), []),
    "scalar": (torch.tensor(2.0), [1]),
    "empty": (torch.empty(0), [0]),
}

SAMPLES = {
    **{f"merge-{case}": ("merge", ops.packed(arguments)) for case, arguments in MERGES.items()},
    **{f"graft-{case}": ("graft", ops.packed(arguments)) for case, arguments in GRAFTS.items()},
    **{f"topk-{case}": ("topk_threshold", (*sample, True)) for case, sample in SCORES.items()},
}


def operator(name):
    return getattr(torch.ops.ota_kernels, name).default


# torch's schema check multiplies its inputs, which it cannot do with float8.
@pytest.mark.parametrize("case", [case for case in SAMPLES if case != "merge-float8"])
def test_opcheck(case):
    name, arguments = SAMPLES[case]
    found = torch.library.opcheck(operator(name), arguments, test_utils=CHECKS)
    assert found == dict.fromkeys(CHECKS, "SUCCESS")


@pytest.mark.parametrize("case", SAMPLES)
@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_fake_results_are_like_real_ones(case, device):
    """Same number, shapes, strides and types; on the device of the inputs, whatever it is."""
    name, arguments = SAMPLES[case]
    real = pytree.tree_leaves(operator(name)(*arguments))
    with FakeTensorMode():
        inputs = pytree.tree_map_only(
            torch.Tensor,
            lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device),
            arguments,
        )
        fake = pytree.tree_leaves(operator(name)(*inputs))
    assert [(f.shape, f.stride(), f.dtype, f.device.type) for f in fake] == [
        (r.shape, r.stride(), r.dtype, device) for r in real
    ]


@pytest.mark.parametrize("case", MERGES)
def test_the_merge_operator_is_the_merge(case):
    expected = merge_state_dicts(**MERGES[case])
    found = operator("merge")(*ops.packed(MERGES[case]))
    assert_same(dict(zip(expected, found, strict=True)), expected)


@pytest.mark.parametrize("case", GRAFTS)
def test_the_graft_operator_is_the_graft(case):
    expected = graft(**GRAFTS[case])
    expected = list(expected.values()) if isinstance(expected, dict) else [expected]
    assert_same(operator("graft")(*ops.packed(GRAFTS[case])), expected)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("case", SCORES)
def test_the_threshold_operator_is_the_threshold(case, largest):
    score, k = SCORES[case]
    found = operator("topk_threshold")(score, k, largest)
    assert found.dtype == torch.float64
    assert found.tolist() == topk_threshold(score, k, largest=largest)


@pytest.mark.parametrize("case", SAMPLES)
def test_results_are_detached_as_the_functional_api_detaches_them(case):
    name, arguments = SAMPLES[case]
    needing = pytree.tree_map_only(
        torch.Tensor,
        lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() and t.itemsize > 1 else t,
        arguments,
    )
    results = pytree.tree_leaves(operator(name)(*needing))
    assert [r for r in results if r.requires_grad] == []
    assert_same(results, pytree.tree_leaves(operator(name)(*arguments)))


@pytest.mark.parametrize(
    ("case", "dynamic"),
    [("bfloat16", False), ("out-dtype", True), ("no-base", False), ("linear", False), ("dictionaries", True)],
)
def test_compiled_merges(case, dynamic):
    """Between other operators of the same graph."""
    arguments = MERGES[case]

    def function(arguments):
        merged = ota_kernels.merge_state_dicts(**arguments)
        return merged, {name: tensor + 1 for name, tensor in merged.items()}

    assert_same(compiled(function, dynamic=dynamic)(arguments), function(arguments))


@pytest.mark.parametrize(
    ("case", "dynamic"), [("rounded", True), ("no-curvature", False), ("dictionaries", False)]
)
def test_compiled_grafts(case, dynamic):
    arguments = GRAFTS[case]
    assert_same(compiled(lambda a: graft(**a), dynamic=dynamic)(arguments), graft(**arguments))


def test_compiled_for_numbers_and_sizes_that_change():
    """Numbers are arguments: of another value, of another type, one per expert, one made of a size."""

    def function(base, experts, curvatures, density, power):
        threshold = topk_threshold(curvatures[0], base.shape[0] // 2)
        merged = merge_tensors(base, experts, curvatures, density=density, power=power)
        return merged, merged + 1, curvatures[0] >= threshold

    traced = compiled(function, dynamic=True)
    for rows, density, power in ((12, 0.3, 0.5), (15, 0.1, 1), (19, [0.1, 0.2, 1], 0.25)):
        e = random_experts(rows, (rows, 7))
        arguments = (e.base, list(e.experts), list(e.curvatures), density, power)
        assert_same(traced(*arguments), function(*arguments))


@pytest.mark.parametrize("k", [3, [0, 60], range(1, 4)], ids=str)
def test_compiled_thresholds(k):
    score, _ = SCORES["float32"]

    def function(score):
        return topk_threshold(score, k), topk_threshold(score, k, largest=False)

    expected = pytree.tree_map(lambda t: torch.tensor(t, dtype=torch.float64), function(score))
    assert_same(compiled(function)(score), expected)


def test_a_base_that_the_method_does_not_read():
    """Its names neither count nor set the order."""
    experts = [{"b": torch.ones(3), "a": torch.zeros(2)}, {"a": torch.ones(2), "b": torch.ones(3)}]

    def function(base, experts):
        return merge_state_dicts(base, experts, method="linear")

    found = compiled(function)({"other": torch.ones(1)}, experts)
    assert list(found) == ["b", "a"]
    assert_same(found, function(None, experts))


def test_gradients_flow_around_a_graft():
    base, expert = torch.zeros(6), torch.arange(6.0).requires_grad_()

    def function(expert):
        return graft(base, 2 * expert, None, density=0.5) * expert

    found = compiled(function)(expert)
    found.sum().backward()
    assert_same(found, function(expert))
    assert expert.grad.tolist() == [0, 0, 0, 6, 8, 10]  # the graft's three largest edits, constants


def test_inductor():
    """Without arithmetic around the operators, since no compiler is needed then."""
    e = random_experts(31, (12, 17), 1)

    def function(base, expert, curvature):
        threshold = topk_threshold(curvature, 50)
        return graft(base, expert, curvature, density=0.3), threshold, graft(expert, base, None, density=0.5)

    arguments = (e.base, e.experts[0], e.curvatures[0])
    grafted, threshold, back = compiled(function, backend="inductor")(*arguments)
    expected = function(*arguments)
    assert_same((grafted, back), (expected[0], expected[2]))
    assert threshold.item() == expected[1]


class Grafting(torch.nn.Module):
    """All its numbers are made of a size."""

    def forward(self, base, expert, curvature):
        rows = base.shape[0]
        kept = curvature >= topk_threshold(curvature, rows // 4)
        return {"grafted": graft(base, expert, curvature, density=2 / rows, rank=rows // 8), "kept": kept}


@pytest.mark.parametrize("strict", [True, False])
def test_exported(strict):
    rows = torch.export.Dim("rows")
    experts = [random_experts(size, (size, 4), 1) for size in (8, 20)]
    first, second = ((e.base, e.experts[0], e.curvatures[0]) for e in experts)
    program = torch.export.export(Grafting(), first, dynamic_shapes=({0: rows},) * 3, strict=strict)
    for arguments in (first, second):
        assert_same(program.module()(*arguments), Grafting()(*arguments))


@pytest.mark.skipif(not hasattr(torch.export, "draft_export"), reason="torch 2.6 keeps it private")
def test_an_export_that_runs_the_operators():
    """draft_export calls real operators while it traces."""
    e = random_experts(32, (8, 4), 1)
    arguments = (e.base, e.experts[0], e.curvatures[0])
    assert_same(torch.export.draft_export(Grafting(), arguments).module()(*arguments), Grafting()(*arguments))


ONES = torch.ones(3)
WRONG = {
    "range": lambda x: merge_tensors(x, [x], density=1.5),
    "unknown-key": lambda x: merge_tensors(x, [x], densty=0.5),
    "unknown-method": lambda x: merge_tensors(x, [x], method="liner"),
    "out-dtype": lambda x: merge_tensors(x, [x], out_dtype="int8"),
    "no-experts": lambda x: merge_tensors(x, []),
    "shapes": lambda x: merge_tensors(x, [x, x[:2]]),
    "curvature-count": lambda x: merge_tensors(x, [x, x], [x]),
    "names": lambda x: merge_state_dicts({"a": x, "b": x}, [{"a": x}]),
    "integers": lambda x: merge_state_dicts({"a": x.int()}, [{"a": x}]),
    "values": lambda x: merge_tensors(x, [x, x * torch.inf]),
    "complex": lambda x: merge_tensors(x.to(torch.complex64), [x]),
    "backend": lambda x: merge_tensors(x, [x], backend="nativ"),
    "graft-by-nothing": lambda x: graft(x, x, None),
    "graft-of-two-kinds": lambda x: graft(x, {"a": x}, None, density=0.1),
    "graft-unknown": lambda x: graft(x, x, None, density=0.1, power=1),
    "k-too-large": lambda x: topk_threshold(x, 4),
    "k-not-integer": lambda x: topk_threshold(x, [1, 2.5]),
    "k-switch": lambda x: topk_threshold(x, True),
    "score-type": lambda x: topk_threshold(x.int(), 1),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_are_those_of_the_functional_api(wrong):
    function = WRONG[wrong]
    with pytest.raises((errors.OtaError, TypeError)) as expected:
        function(ONES)
    with pytest.raises(type(expected.value)) as found:
        compiled(function, backend="eager")(ONES)
    assert str(found.value).startswith(str(expected.value))


def test_an_argument_that_has_no_text():
    """A torch type is its name; the error shows one that cannot be written."""
    merged = compiled(lambda x: merge_tensors(x, [x], out_dtype=torch.bfloat16))(ONES)
    assert merged.dtype == torch.bfloat16 == merge_tensors(ONES, [ONES], out_dtype=torch.bfloat16).dtype
    with pytest.raises(errors.RecipeError, match=r"`out_dtype` is 'torch\.complex64': it must be bfloat16"):
        compiled(lambda x: merge_tensors(x, [x], out_dtype=torch.complex64))(ONES)


def test_nothing_to_merge():
    """No result, so no call is left that could raise: torch reports it while it traces."""
    with pytest.raises(RuntimeError, match="`models` is missing or empty: list the models to merge"):
        compiled(lambda: merge_tensors(None, []))()


def test_one_input_on_meta_makes_results_meta():
    """Not memory that nobody has written."""
    meta = torch.ones(3, device="meta")
    for found in (
        compiled(lambda x, y: merge_tensors(x, [x, y]))(ONES, meta),
        compiled(lambda x, y: graft(x, y, None, density=0.5))(ONES, meta),
    ):
        assert found.is_meta


def test_operators_register_when_first_traced():
    code = """
import torch, ota_kernels
def function(x): return ota_kernels.graft(x, 2 * x, None, density=0.5)
assert not hasattr(torch.ops.ota_kernels, "graft")
x = torch.arange(4.0)
assert torch.compile(function, fullgraph=True, backend="eager")(x).equal(function(x))
assert hasattr(torch.ops.ota_kernels, "graft")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
