"""What a merge launches while a CUDA graph is captured: pretended, under Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from alone import passes_interpreted

import ota_kernels
from ota_kernels.backends import triton

RUNS_HERE = triton.interpreted()
PLAIN = {"precond_threshold": 1e-11, "on_nonfinite": "base"}


@pytest.mark.skipif(RUNS_HERE, reason="the tests below run in this process")
def test_under_the_interpreter():
    passes_interpreted(__file__, "OnTheDevice")


def models_of(*shapes: tuple[int, ...]):
    random = np.random.default_rng(3)

    def draw(scale: float) -> dict[str, torch.Tensor]:
        return {
            f"{i}.weight": torch.from_numpy(random.normal(size=s).astype(np.float32) * scale)
            for i, s in enumerate(shapes)
        }

    base = draw(1.0)
    experts = [{name: base[name] + d for name, d in draw(1e-2).items()} for _ in range(2)]
    return base, experts, [{name: h.abs() for name, h in draw(1e-6).items()} for _ in range(2)]


@pytest.fixture
def captured(monkeypatch):
    """Calls a function as if its stream were captured, where nothing may cross between host and device;
    returns (result, costs)."""
    from launches import counted

    from ota_kernels.backends.triton import backend, table
    from ota_kernels.tensors import array

    def fails(*arguments, **options):
        raise AssertionError("a CUDA graph cannot hold this")

    def call(function):
        with monkeypatch.context() as patch:
            for module in (array, backend, table):
                patch.setattr(module, "is_captured", array.is_resident)
            patch.setattr(torch, "from_numpy", fails)
            with counted(patch) as costs:
                found = function()
            assert costs.waits.total() == 0, costs
        return found, costs

    return call


class TestCaptureOnTheDevice:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("shapes", [[(1100,)], [(33, 32), (1024,), (7,), (1100,)]])
    def test_nothing_crosses(self, captured, shapes):
        """As many launches for many tensors as for one, and a number that is not finite is repaired."""
        models = models_of(*shapes)
        models[1][0]["0.weight"].view(-1)[5] = float("nan")
        found, costs = captured(lambda: ota_kernels.merge_state_dicts(*models, backend="triton", **PLAIN))
        expected = ota_kernels.merge_state_dicts(*models, backend="native", **PLAIN)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=0)
        assert dict(costs.kernels) == {"_merge_kernel": 2}
        assert costs.of_torch["_foreach_add_"] == 1
        assert costs.launches <= 6, costs

    def test_operators(self, captured):
        from ota_kernels.integrations import torch_ops

        models = models_of((1100,), (7,))
        call = {"backend": "triton", **PLAIN}
        found, costs = captured(lambda: torch_ops.merge_state_dicts(*models, **call))
        for name, tensor in ota_kernels.merge_state_dicts(*models, **call).items():
            assert found[name].equal(tensor)
        assert dict(costs.kernels) == {"_merge_kernel": 2}

    def test_methods_whose_results_show_what_is_not_finite(self, captured):
        models = models_of((40,))
        models[1][1]["0.weight"][7] = float("inf")
        options = {"method": "task_arithmetic", "weight": 0.5, "backend": "triton"}
        found, _ = captured(lambda: ota_kernels.merge_state_dicts(*models[:2], **options))
        assert torch.isfinite(found["0.weight"]).logical_not().nonzero().tolist() == [[7]]

    def test_a_merger_that_knows_its_thresholds(self, captured):
        options = {"density": 0.3, "on_nonfinite": "base"}
        for scope in ("tensor", "model"):
            merger = ota_kernels.Merger(*models_of((1100,), (40,)), backend="triton")
            expected = merger(density_scope=scope, **options)
            found, _ = captured(lambda: merger(density_scope=scope, **options))  # noqa: B023 - called at once
            for name, tensor in expected.items():
                assert found[name].equal(tensor)

    @pytest.mark.parametrize(
        "options",
        [
            {"precond_threshold": 1e-11},
            {"density": 0.3, "on_nonfinite": "base"},
            {"density": 0.3, "on_nonfinite": "base", "density_scope": "tensor"},
            {"saliency_mass": 0.9, "on_nonfinite": "base"},
            {**PLAIN, "rank1_approx": True},
            {"method": "ties", "density": 0.5, "weight": 1.0},
            {"method": "consensus"},
        ],
        ids=str,
    )
    def test_what_the_host_decides(self, captured, options):
        models = models_of((40, 30))
        if "method" in options:
            models = models[:2]
        with pytest.raises(ota_kernels.BackendError, match="on_nonfinite='base', or outside"):
            captured(lambda: ota_kernels.merge_state_dicts(*models, backend="triton", **options))
