"""Merges that go on: sums that are kept, experts that are added bit for bit, and taken out within
rounding."""

from __future__ import annotations

import json
import os

import pytest
import torch
from checkpoints import (
    assert_same_tensors,
    edited,
    load_merged,
    make_set,
    model_digests,
    raw,
    save_model,
    second_moments,
    shard_files,
    write_recipe,
)
from jobs import Interrupt
from safetensors.torch import load_file, save_file

from ota_kernels import InputError, RecipeError, merge
from ota_kernels.run import sums as going_on
from ota_kernels.run.rules import Rules
from ota_kernels.run.sums import add, remove

SHAPES = {
    "embed_tokens.weight": (50, 16),
    "layers.0.mlp.weight": (130, 70),
    "layers.0.norm.weight": (17,),
    "scale": (),
    "empty": (0, 5),
}
VARIANTS = {
    "density": {"density": 0.3},
    "per tensor": {"saliency_mass": 0.7, "density_scope": "tensor", "normalise": "global"},
    "all": {"epsilon": 0.0, "power": 1.0},
    "unmasked weights": {"density": 0.2, "mask_weights": False, "power": 0.7},
    "linear": {"density": 0.2, "masked_task_vector_merge_method": "linear"},
    "rank 1": {"precond_threshold": 1e-16, "rank1_approx": True, "lambda": 1.3},
    "rescale": {"density": 0.4, "rescale": True, "masked_task_vector_merge_method": "linear"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    models = make_set(tmp_path_factory.mktemp("models"), SHAPES, experts=4, config={"vocab_size": 50})
    for moments in models.curvatures:  # nothing to weigh by: a mean of 0
        moments["layers.0.norm.weight"].zero_()
    for tensors in models.experts:  # what nobody changes, and the zeros that have a sign
        tensors["layers.0.mlp.weight"][:20] = models.base["layers.0.mlp.weight"][:20]
    models.base["layers.0.norm.weight"][:5] = -0.0
    return models.save(config={"vocab_size": 50})


def recipe_of(models, experts, **parameters):
    recipe = models.recipe(keep_sums=True, **parameters)
    return recipe | {"models": [recipe["models"][t] for t in experts]}


def added(models, out, new, t, **parameters):
    own = {"preconditioner_path": str(models.curvature_files[t])}
    return add(out, models.expert_folders[t], new, parameters=own | parameters)


def all_files(folder):
    """Weights and sums, by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_as_if_it_had_been_there_from_the_start(models, tmp_path, variant):
    parameters = VARIANTS[variant]
    merge(recipe_of(models, [0, 1], **parameters), tmp_path / "two", tile_elements=1500)
    added(models, tmp_path / "two", tmp_path / "three", 2)
    added(models, tmp_path / "three", tmp_path / "four", 3)
    merge(recipe_of(models, [0, 1, 2, 3], **parameters), tmp_path / "all")
    assert all_files(tmp_path / "four") == all_files(tmp_path / "all")
    plain = models.recipe(**parameters)
    merge(plain, tmp_path / "plain")  # which goes on with nothing, by brackets and the common kernel
    assert_same_tensors(load_merged(tmp_path / "four"), load_merged(tmp_path / "plain"))
    one, other = (json.loads((tmp_path / x / "merge_report.json").read_text()) for x in ("four", "all"))
    for key in ("experts", "tensors", "unkept", "sums"):
        assert one[key] == other[key], key
    assert one["found"] | {"scale": other["found"]["scale"]} == other["found"]
    for name in ("merge_recipe.yaml", "config.json"):
        assert (tmp_path / "four" / name).read_text() == (tmp_path / "all" / name).read_text()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_other_types(tmp_path, dtype):
    models = make_set(tmp_path / "m", SHAPES, dtype=dtype)
    merge(recipe_of(models, [0, 1], density=0.3), tmp_path / "two")
    added(models, tmp_path / "two", tmp_path / "three", 2)
    merge(recipe_of(models, [0, 1, 2], density=0.3), tmp_path / "all")
    assert all_files(tmp_path / "three") == all_files(tmp_path / "all")


def test_the_sums_are_those_of_the_formula(models, tmp_path):
    """N and D of float64; the sign of D where nobody keeps the element."""
    merge(recipe_of(models, [0, 1], precond_threshold=1e-16, epsilon=0.0), tmp_path / "out")
    sums = load_file(tmp_path / "out" / "sums" / "sums.safetensors")
    name = "layers.0.mlp.weight"
    base, numerator, denominator = models.base[name].double(), 0.0, 0.0
    for t in range(2):
        d = models.experts[t][name].double() - base
        h = models.curvatures[t][name].double()
        p = torch.where(h * d * d >= 1e-16, h.sqrt(), 0.0)
        numerator, denominator = numerator + p * d, denominator + p
    found = sums[f"denominator/{name}"]
    assert found.dtype == torch.float32
    assert torch.equal(found.signbit(), denominator == 0)
    assert (found.double().abs() - denominator).abs().max() <= 1e-6 * denominator.max()
    assert (sums[f"numerator/{name}"].double() - numerator).abs().max() <= 1e-6 * numerator.abs().max()


def test_what_all_experts_share_holds_for_the_new_one(models, tmp_path):
    recipe = recipe_of(models, [0, 1])
    for entry in recipe["models"]:
        entry["parameters"]["density"] = 0.25
    merge(recipe, tmp_path / "two")
    added(models, tmp_path / "two", tmp_path / "three", 2)
    added(models, tmp_path / "two", tmp_path / "other", 2, saliency_mass=0.5)
    for out, own in (("three", {"density": 0.25}), ("other", {"saliency_mass": 0.5})):
        whole = recipe_of(models, [0, 1, 2])
        for entry, parameters in zip(whole["models"], ({"density": 0.25},) * 2 + (own,), strict=True):
            entry["parameters"] |= parameters
        merge(whole, tmp_path / f"{out}_all")
        assert model_digests(tmp_path / out) == model_digests(tmp_path / f"{out}_all")


class TestRemoved:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_within_rounding(self, models, tmp_path, variant):
        parameters = VARIANTS[variant]
        merge(recipe_of(models, [0, 1, 2], **parameters), tmp_path / "three")
        remove(tmp_path / "three", models.expert_folders[1], tmp_path / "two")
        merge(recipe_of(models, [0, 2], **parameters), tmp_path / "wanted")
        wanted = load_merged(tmp_path / "wanted")
        for name, found in load_merged(tmp_path / "two").items():
            operands = [tensors[name].double().abs() for tensors in (models.base, *models.experts)]
            limit = 2.0**-7 * torch.stack(operands).amax(0)
            assert ((found.double() - wanted[name].double()).abs() <= limit).all(), name
            # Of bfloat16 hardly any element shows what float32 sums have lost.
            assert (found != wanted[name]).sum() <= 0.01 * found.numel() + 1
        report = json.loads((tmp_path / "two" / "merge_report.json").read_text())
        assert [e["model"] for e in report["experts"]] == [str(models.expert_folders[t]) for t in (0, 2)]

    def test_what_the_expert_alone_had_kept_is_the_base_again(self, models, tmp_path):
        merge(recipe_of(models, [0, 1], density=0.1), tmp_path / "two")
        remove(tmp_path / "two", models.expert_folders[1], tmp_path / "one")
        merge(recipe_of(models, [0], density=0.1), tmp_path / "wanted")
        wanted = load_merged(tmp_path / "wanted")
        name = "layers.0.mlp.weight"
        untouched = wanted[name] == models.base[name]
        assert raw(load_merged(tmp_path / "one")[name][untouched]) == raw(models.base[name][untouched])

    def test_added_again(self, models, tmp_path):
        """The sums go on after a removal, too."""
        merge(recipe_of(models, [0, 1], density=0.3), tmp_path / "two")
        remove(tmp_path / "two", models.expert_folders[1], tmp_path / "one")
        report = added(models, tmp_path / "one", tmp_path / "again", 1)
        assert [e["model"] for e in report["experts"]] == list(map(str, models.expert_folders[:2]))


class TestRefused:
    @pytest.fixture
    def out(self, models, tmp_path):
        merge(recipe_of(models, [0, 1], density=0.3), tmp_path / "two")
        return tmp_path / "two"

    def test_a_merge_without_sums(self, models, tmp_path, refused_command):
        merge(models.recipe(density=0.3), tmp_path / "out")
        arguments = (tmp_path / "out", models.expert_folders[3], tmp_path / "new", "-q")
        refused_command("add", *arguments, facts=("keep_sums: true",))
        refused_command("remove", *arguments, facts=("keep_sums: true",))

    def test_an_expert_that_is_not_there(self, models, out, tmp_path, refused_command):
        new, facts = tmp_path / "new", ("expert3", "expert0")
        refused_command("remove", out, models.expert_folders[3], new, "-q", facts=facts)
        refused_command("add", out, tmp_path / "none", new, "-q", facts=("none",))

    def test_another_base(self, tmp_path):
        models = make_set(tmp_path / "m", SHAPES)
        merge(recipe_of(models, [0, 1], density=0.3), tmp_path / "two")
        save_model(models.base_folder, edited(models.base, 7))
        with pytest.raises(InputError, match="is not the base of"):
            added(models, tmp_path / "two", tmp_path / "new", 2)

    def test_curvature_that_only_some_have(self, models, out, tmp_path):
        own = tmp_path / "v.safetensors"
        moments = second_moments(models.base, 5)
        del moments["layers.0.mlp.weight"]
        save_file(moments, own)
        recipe = recipe_of(models, [0, 1], density=0.3, missing_curvature="uniform")
        merge(recipe, tmp_path / "uniform")
        with pytest.raises(InputError, match=r"mlp\.weight has curvature in some experts only"):
            add(
                tmp_path / "uniform",
                models.expert_folders[2],
                tmp_path / "new",
                parameters={"preconditioner_path": str(own)},
            )

    @pytest.mark.parametrize(
        ("parameters", "fact"),
        [
            ({"masked_task_vector_merge_method": "ties"}, "ties"),
            ({"fallback_to_base": False}, "fallback_to_base"),
            ({"on_nonfinite": "base"}, "on_nonfinite"),
            ({"lambda": "auto"}, "lambda"),
            ({"match_norm": "mean"}, "match_norm"),
            ({"calibrate": "svc"}, "calibrate"),
        ],
        ids=str,
    )
    def test_what_does_not_add_up(self, models, tmp_path, parameters, fact):
        with pytest.raises(RecipeError, match=fact):
            merge(recipe_of(models, [0, 1], **parameters), tmp_path / "out")
        assert os.listdir(tmp_path) == []

    def test_another_backend(self, models, tmp_path):
        with pytest.raises(RecipeError, match="native"):
            merge(recipe_of(models, [0, 1], density=0.3), tmp_path / "out", backend="reference")

    def test_sums_that_are_damaged(self, models, out, tmp_path):
        path = out / "sums" / "sums.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(InputError, match=r"sums\.safetensors"):
            added(models, out, tmp_path / "new", 2)


def test_an_interrupt_is_resumed(models, tmp_path, monkeypatch):
    merge(recipe_of(models, [0, 1], density=0.3), tmp_path / "two")
    own = {"parameters": {"preconditioner_path": str(models.curvature_files[2])}, "tile_elements": 1500}
    with monkeypatch.context() as patch:
        patch.setattr(going_on, "RULES", Rules(before=Interrupt("tile", 4)))
        with pytest.raises(KeyboardInterrupt):
            add(tmp_path / "two", models.expert_folders[2], tmp_path / "new", **own)
    assert not (tmp_path / "new").exists()
    add(tmp_path / "two", models.expert_folders[2], tmp_path / "new", resume=True, **own)
    merge(recipe_of(models, [0, 1, 2], density=0.3), tmp_path / "all")
    assert all_files(tmp_path / "new") == all_files(tmp_path / "all")


def test_the_command_line(models, tmp_path, ota_merge):
    path = write_recipe(tmp_path / "r.yaml", recipe_of(models, [0, 1], density=0.3))
    two, three, less = (tmp_path / name for name in ("two", "three", "less"))
    assert ota_merge("run", path, two, "-q")[0] == 0
    moments = ("--moments", models.curvature_files[2])
    code, printed, errors = ota_merge("add", two, models.expert_folders[2], three, *moments)
    assert (code, "expert2" in printed) == (0, True), errors
    code, _, errors = ota_merge("verify", three)
    assert code == 0, errors
    code, printed, errors = ota_merge("remove", three, models.expert_folders[0], less)
    assert (code, "expert0" in printed) == (0, False), errors


def test_shards(models, tmp_path):
    """Sums are sharded like the model."""
    merge(recipe_of(models, [0, 1], density=0.3), tmp_path / "two", shard_size=9000)
    assert len(shard_files(tmp_path / "two")) > 1
    assert len(list((tmp_path / "two" / "sums").glob("sums-*.safetensors"))) > 1
    added(models, tmp_path / "two", tmp_path / "three", 2)
    merge(recipe_of(models, [0, 1, 2], density=0.3), tmp_path / "all", shard_size=9000)
    assert all_files(tmp_path / "three") == all_files(tmp_path / "all")
    assert load_merged(tmp_path / "three")["scale"].isfinite()
