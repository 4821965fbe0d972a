"""Launches and waits of merges on a device, counted under Triton's interpreter, for which the CPU is one.

The interpreter must be chosen before Triton is imported: one test runs the others in a process of their own.
"""

from __future__ import annotations

import pytest
import torch
from alone import passes_interpreted

import ota_kernels
from ota_kernels.backends import triton

RUNS_HERE = triton.interpreted()


@pytest.mark.skipif(RUNS_HERE, reason="the tests below run in this process")
def test_under_the_interpreter():
    passes_interpreted(__file__, "OnTheDevice")


def models_of(shapes: list[tuple[int, ...]], experts: int = 2):
    """bfloat16 models with float32 curvature: (base, experts, curvatures)."""
    random = torch.Generator().manual_seed(7)
    draw = [[torch.randn(shape, generator=random) for shape in shapes] for _ in range(1 + 2 * experts)]
    base, edits, second = draw[0], draw[1 : 1 + experts], draw[1 + experts :]
    names = [f"layers.{i}.weight" for i in range(len(shapes))]

    def model(tensors):
        return dict(zip(names, tensors, strict=True))

    return (
        model([b.bfloat16() for b in base]),
        [model([(b + 1e-2 * d).bfloat16() for b, d in zip(base, of, strict=True)]) for of in edits],
        [model([1e-6 * h.abs() for h in of]) for of in second],
    )


@pytest.fixture
def costs_of(monkeypatch):
    """merge_state_dicts by the device, and what it cost: (merged, expected by `native`, costs)."""
    from launches import counted

    def merged(models, **options):
        with counted(monkeypatch) as costs:
            found = ota_kernels.merge_state_dicts(*models, backend="triton", **options)
        return found, ota_kernels.merge_state_dicts(*models, backend="native", **options), costs

    return merged


def assert_same(found, expected) -> None:
    """Equal masks, and values within a unit in the last place of bfloat16, which the interpreter cuts off."""
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=2.0**-7, atol=0)


DENSITIES = {
    "whole": ([(30,), (33, 20), (1025,)], {}),
    "sampled": ([(33, 1000), (100, 330), (999,)], {}),
    "rank-1": ([(33, 1000), (30,)], {"rank1_approx": True}),
    "float32": ([(33, 1000), (30,)], {"out_dtype": "float32"}),
}


class TestCostsOnTheDevice:
    __test__ = RUNS_HERE

    def test_thresholds_of_any_number_of_tensors(self, costs_of):
        """Full blocks and tails of all tensors, totals added up by tensor; one wait."""
        shapes = [*[(30,)] * 280, *[(33, 32), (1024,)] * 10]
        found, expected, costs = costs_of(models_of(shapes), precond_threshold=1e-11)
        assert_same(found, expected)
        assert dict(costs.kernels) == {"_merge_kernel": 2}
        assert costs.launches <= 4, costs
        assert costs.waits.total() == 1, costs

    def test_forms_of_tensors(self, costs_of):
        """Rank-1 curvature of matrices, full curvature of others: two launches of each."""
        shapes = [(30,), (33, 32), (1025,), (64, 64)]
        found, expected, costs = costs_of(models_of(shapes), precond_threshold=1e-11, rank1_approx=True)
        assert_same(found, expected)
        assert costs.kernels["_merge_kernel"] == 4

    def test_inputs_that_are_not_finite_are_named(self, costs_of):
        models = models_of([(40,), (40,), (1100,)])
        models[1][1]["layers.2.weight"][1050] = float("nan")
        with pytest.raises(ota_kernels.InputError, match=r"layers.2.weight.*1050"):
            costs_of(models, precond_threshold=1e-11)

    @pytest.mark.parametrize("kind", DENSITIES)
    def test_densities_of_each_tensor(self, costs_of, kind):
        """As many launches as for one tensor, and one wait: nothing of a threshold crosses to the host."""
        shapes, options = DENSITIES[kind]
        models = models_of(shapes)
        found, expected, costs = costs_of(models, density=[0.3, 0.02], density_scope="tensor", **options)
        assert_same(found, expected)
        if "rank1_approx" not in options:  # whose sums of rows are each tensor's
            assert costs.launches <= 60, costs
            assert costs.waits.total() <= 2, costs

    def test_densities_over_the_model(self, costs_of):
        """The host waits for the sample's ranks and its brackets, then once for all tensors."""
        waits = []
        for shapes in ([(33, 1000), (40,)], [(33, 1000), (40,), (1100,), (64, 32), (33, 33)]):
            models = models_of(shapes)
            found, expected, costs = costs_of(models, density=[0.3, 0.02], density_scope="model")
            assert_same(found, expected)
            waits.append(costs.waits.total())
        assert waits[0] == waits[1] <= 5, waits
