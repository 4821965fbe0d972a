"""Many small tensors: merged together, told apart in output, report and errors."""

from __future__ import annotations

import json
from dataclasses import replace

import jobs
import pytest
import torch
from checkpoints import load_merged
from safetensors.torch import save_file

from ota_kernels import merge, merge_state_dicts, plan
from ota_kernels.errors import InputError
from ota_kernels.planning import plan as planning
from ota_kernels.run.job import Job, Options, as_recipe
from ota_kernels.run.rules import RULES
from ota_kernels.run.verify import verify

N = 100
OTA = {"merge_method": "ota", "parameters": {"density": 0.3}}


def tensors(seed: int, scale: float, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = [(3,), (2, 2), (5, 1)]
    found = {
        f"layers.{i:03}.w": scale * torch.randn(shapes[i % 3], generator=random, dtype=torch.float64)
        for i in range(N)
    }
    found["large"] = scale * torch.randn(300, 200, generator=random, dtype=torch.float64)
    return {name: value.to(dtype) for name, value in found.items()}


@pytest.fixture
def models(tmp_path):
    """(base, experts, their moments), and the recipe of their files."""
    base = tensors(0, 1.0)
    experts = [{n: x + tensors(s, 0.05)[n] for n, x in base.items()} for s in (1, 2)]
    moments = [{n: x.float() ** 8 for n, x in tensors(s, 1e-2).items()} for s in (3, 4)]
    save_file(base, tmp_path / "base.safetensors")
    listed = []
    for t, (expert, of_expert) in enumerate(zip(experts, moments, strict=True)):
        save_file(expert, tmp_path / f"e{t}.safetensors")
        save_file(of_expert, tmp_path / f"v{t}.safetensors")
        path = str(tmp_path / f"v{t}.safetensors")
        listed.append(
            {"model": str(tmp_path / f"e{t}.safetensors"), "parameters": {"preconditioner_path": path}}
        )
    return (base, experts, moments), OTA | {
        "base_model": str(tmp_path / "base.safetensors"),
        "models": listed,
    }


def numbers(bundles) -> list[int]:
    return [len(bundle.members) for bundle in bundles.values()]


@pytest.mark.parametrize("tile", [None, 64])
def test_a_bundle_is_merged_as_its_members_would_be(models, tmp_path, tile):
    (base, experts, moments), recipe = models
    with Job(as_recipe(recipe), Options.of(tile_elements=tile)) as job:
        assert numbers(job.bundles) == [N]
        assert len(job.tensors) == 2
    report = merge(recipe, tmp_path / "out", tile_elements=tile)
    expected = merge_state_dicts(base, experts, moments, density=0.3)
    found = load_merged(tmp_path / "out")
    for name, value in expected.items():
        assert torch.equal(found[name].view(torch.int16), value.view(torch.int16)), name
        kept, edited = report["tensors"][name], found[name] != base[name]
        assert kept["elements"] == value.numel()
        assert kept["elements"] - kept["unkept"] >= int(edited.sum())
        assert max(kept["kept"]) <= kept["elements"] - kept["unkept"] <= sum(kept["kept"])
    for t, expert in enumerate(report["experts"]):
        assert sum(of_tensor["kept"][t] for of_tensor in report["tensors"].values()) == expert["kept"]
        assert expert["total"] == sum(x.numel() for x in base.values())
    assert sum(of_tensor["unkept"] for of_tensor in report["tensors"].values()) == report["unkept"]
    assert verify(tmp_path / "out", full=True).wrong == {}


def test_the_plan_counts_what_is_known_of_tensors(models, monkeypatch):
    """400 bytes for each input of each tensor, beside their elements."""
    _, recipe = models
    with_them = plan(recipe).peak_memory
    monkeypatch.setattr(planning, "SOURCE_BYTES", 0)
    assert with_them - plan(recipe).peak_memory == 400 * 5 * (N + 1)


def test_kept_edits_are_counted_by_the_definition(models, tmp_path):
    (base, experts, moments), recipe = models
    report = merge(recipe, tmp_path / "out")
    for t in range(2):
        threshold = report["experts"][t]["threshold"]
        for name, of_tensor in report["tensors"].items():
            edit = experts[t][name].double() - base[name].double()
            score = moments[t][name].double() * edit**2
            clear = (score - threshold).abs() > 1e-5 * threshold
            kept = int(((score >= threshold) & clear).sum())
            assert kept <= of_tensor["kept"][t] <= kept + int((~clear).sum()), name


def test_a_value_that_is_not_finite_is_named_by_its_own_tensor(models, tmp_path):
    (_, experts, _), recipe = models
    experts[1]["layers.041.w"].view(-1)[2] = float("nan")
    save_file(experts[1], tmp_path / "e1.safetensors")
    with pytest.raises(InputError, match=r"e1\.safetensors: layers\.041\.w: 1 of 5 weight .* flat index 2"):
        merge(recipe, tmp_path / "out")


def test_what_differs_is_named_by_its_own_tensor(models, tmp_path):
    _, recipe = models
    merge(recipe, tmp_path / "out")
    merged = load_merged(tmp_path / "out")
    merged["layers.041.w"].view(-1)[2] += 1
    path = next((tmp_path / "out").glob("*.safetensors"))
    save_file(merged, path, {"format": "pt"})
    assert list(verify(tmp_path / "out", full=True).wrong) == ["layers.041.w"]


def test_what_a_killed_merge_left_of_a_bundle_is_taken_up(models, tmp_path):
    _, recipe = models
    merge(recipe, tmp_path / "whole", tile_elements=64)
    stop = replace(RULES, before=jobs.Interrupt("patch", 3, after="tile"))
    with pytest.raises(KeyboardInterrupt):
        jobs.merge(recipe, tmp_path / "out", stop, tile_elements=64, threads=1)
    merge(recipe, tmp_path / "out", tile_elements=64, resume=True)
    one, other = (json.loads((tmp_path / x / "merge_report.json").read_text()) for x in ("whole", "out"))
    assert one["tensors"] == other["tensors"]
    assert one["checksums"] == other["checksums"]


@pytest.mark.parametrize(
    ("change", "bundled"),
    [
        ({"merge_method": "linear", "parameters": {"weight": 1}}, [N]),
        ({"parameters": {"density": 0.3, "density_scope": "tensor"}}, []),
        ({"parameters": {"density": 0.3, "on_nonfinite": "base"}}, []),
        ({"parameters": {"density": 0.3, "rescale": True}}, []),
        (
            {
                "merge_method": "linear",
                "parameters": {"weight": [{"filter": "02", "value": 2}, {"value": 1}]},
            },
            [70],
        ),
    ],
)
def test_what_is_bundled(models, change, bundled):
    """What needs a look at a tensor of its own is not, and neighbours of other settings are apart."""
    _, recipe = models
    given = recipe | change
    if given["merge_method"] == "linear":
        del given["base_model"]
        given["models"] = [{"model": m["model"]} for m in given["models"]]
    with Job(as_recipe(given), Options.of()) as job:
        assert numbers(job.bundles) == bundled
        assert sum(t.numel for t in job.tensors.values()) == sum(e.numel for e in job.inputs.entries)


def test_other_places_are_no_bundle(models, tmp_path):
    """Tensors must lie one after the other in every file; one of another type lies in front of all."""
    (base, experts, moments), recipe = models
    experts[0]["layers.050.w"] = experts[0]["layers.050.w"].float()
    save_file(experts[0], tmp_path / "e0.safetensors")
    with Job(as_recipe(recipe), Options.of()) as job:
        assert numbers(job.bundles) == [50, 49]
    merge(recipe, tmp_path / "out")
    found = load_merged(tmp_path / "out")
    for name, value in merge_state_dicts(base, experts, moments, density=0.3).items():
        assert torch.equal(found[name].view(torch.int16), value.view(torch.int16)), name
