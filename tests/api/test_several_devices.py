"""Models whose tensors lie on several devices: two that are the CPU, by Triton's interpreter. Which tensor
lies where is told by the storage of its own."""

from __future__ import annotations

import pytest
import torch
from alone import passes_interpreted

import ota_kernels
from ota_kernels import InputError, merge_state_dicts
from ota_kernels.backends import triton

RUNS_HERE = triton.interpreted()


@pytest.mark.skipif(RUNS_HERE, reason="the tests below run in this process")
def test_under_the_interpreter():
    passes_interpreted(__file__, "Several")


def test_distributed_tensors_are_refused_in_a_line():
    class DTensor(torch.Tensor):
        """By its name, as torch's, which takes a group of processes."""

    one = torch.ones(4).as_subclass(DTensor)
    with pytest.raises(InputError, match=r"experts\[0\]\['a'\] is a DTensor.*full_tensor"):
        merge_state_dicts({"a": torch.ones(4)}, [{"a": one}], method="linear")


SHAPES = {"a": (40, 30), "b": (30,), "c": (2, 700), "d": (25, 31)}


def models_of() -> tuple:
    random = torch.Generator().manual_seed(3)

    def draw(scale: float) -> dict[str, torch.Tensor]:
        return {name: scale * torch.randn(shape, generator=random) for name, shape in SHAPES.items()}

    base = draw(1.0)
    experts = [{name: base[name] + edit for name, edit in draw(1e-2).items()} for _ in range(2)]
    return base, experts, [{name: h.abs() for name, h in draw(1e-6).items()} for _ in range(2)]


class TestSeveral:
    __test__ = RUNS_HERE

    @pytest.fixture
    def devices(self, monkeypatch):
        """(puts a tensor on the second device; names of the tensors that each one's kernels have merged)."""
        from ota_kernels import merger
        from ota_kernels.backends.triton.backend import Triton
        from ota_kernels.tensors import array

        second, merged = set(), {"cpu": [], "second": []}

        def place(data: torch.Tensor) -> str:
            return "second" if data.untyped_storage().data_ptr() in second else "cpu"

        class Fake(Triton):
            def __init__(self, where: str) -> None:
                super().__init__("cpu")
                self.where = where

            def merge_all(self, given):
                for tile, _, _ in given:
                    assert {place(buffer.data) for buffer in tile.buffers} == {self.where}
                    merged[self.where].append(tile.name)
                return super().merge_all(given)

        def select(name, device):
            return Fake(device)

        def put(model, names):
            for name in names:
                second.add(model[name].untyped_storage().data_ptr())

        monkeypatch.setattr(array, "place", place)
        triton_devices = pytest.importorskip("ota_kernels.backends.triton.devices")
        monkeypatch.setattr(triton_devices, "place", place)
        real = merger.backends.select

        def chosen(name, device="auto", **options):
            return select(name, device) if device in merged else real(name, device, **options)

        monkeypatch.setattr(merger.backends, "select", chosen)
        return put, merged

    @pytest.mark.parametrize(
        "options",
        [
            {"precond_threshold": 1e-11},
            {"density": 0.3, "density_scope": "tensor"},
            {"density": 0.3},
            {"density": 0.3, "normalise": "model"},
            {"saliency_mass": 0.8},
            {"method": "ties", "density": 0.5, "weight": 1.0},
        ],
        ids=str,
    )
    def test_are_merged_where_they_lie_into_the_same_bytes(self, devices, options):
        put, merged = devices
        base, experts, curvatures = models_of()
        if "method" in options:
            curvatures = None
        expected = merge_state_dicts(base, experts, curvatures, backend="triton", **options)
        for model in (base, *experts, *(curvatures or ())):
            put(model, ("b", "c"))
        found = merge_state_dicts(base, experts, curvatures, backend="triton", **options)
        assert {"b", "c"} == set(merged["second"])
        assert {"a", "d"} == set(merged["cpu"])
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name

    def test_of_one_name_must_be_on_one(self, devices):
        put, _ = devices
        base, experts, curvatures = models_of()
        put(experts[1], ("c",))
        with pytest.raises(
            InputError, match=r"experts\[1\]\['c'\] is on second, base\['c'\] on cpu: move them"
        ):
            merge_state_dicts(base, experts, curvatures, backend="triton", density=0.3)

    def test_sampled_together(self, devices, monkeypatch):
        """Brackets over the model from samples of both devices."""
        from dataclasses import replace

        from ota_kernels.run import decide

        rules = replace(decide.RULES, direct=100, clusters=lambda elements: 4)
        monkeypatch.setattr(ota_kernels.merger.Decider.__init__, "__kwdefaults__", None)
        defaults = list(ota_kernels.merger.Decider.__init__.__defaults__)
        defaults[defaults.index(decide.RULES)] = rules
        monkeypatch.setattr(ota_kernels.merger.Decider.__init__, "__defaults__", tuple(defaults))
        put, merged = devices
        base, experts, curvatures = models_of()
        expected = merge_state_dicts(base, experts, curvatures, backend="triton", density=0.3)
        for model in (base, *experts, *curvatures):
            put(model, ("a", "c"))
        found = merge_state_dicts(base, experts, curvatures, backend="triton", density=0.3)
        assert set(merged["second"]) == {"a", "c"}
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
