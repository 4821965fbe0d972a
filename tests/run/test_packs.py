"""Packed experts: every form against its formula in float64, packs as models, and what is refused."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from checkpoints import (
    assert_same_tensors,
    digests,
    edited,
    load_merged,
    make_set,
    model_digests,
    random_tensors,
    raw,
    save_model,
)
from safetensors import safe_open
from safetensors.torch import load_file

from ota_kernels import InputError, OutputError, RecipeError, graft, merge, merge_state_dicts
from ota_kernels.io.pack import PackFile
from ota_kernels.run.packing import pack, unpack

# Tensors of several tiles, of a part of one, of none; roles that BitDelta tells apart; integers and a buffer.
SHAPES = {
    "embed_tokens.weight": (50, 16),
    "layers.0.mlp.weight": (330, 701),
    "layers.0.norm.weight": (17,),
    "scale": (),
    "empty": (0, 5),
}


def with_integers(tensors, value):
    return tensors | {
        "layers.0.steps": torch.tensor([1, value], dtype=torch.int64),
        "layers.0.rotary_emb.inv_freq": torch.arange(4, dtype=torch.float32),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("models"), SHAPES, config={"vocab_size": 50})


def packed(models, out, t=0, **how):
    return pack([models.expert_folders[t]], out, base=models.base_folder, **how)


def unpacked(path, out):
    unpack(path, out)
    return load_merged(out)


def edits(base, expert):
    """float64, flat, by name."""
    return {n: (expert[n].double() - base[n].double()).reshape(-1).numpy() for n in base}


def assert_rounded(found, base, edit):
    """found: w_0 + edit in float32, rounded once to the base's type."""
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        wanted = base[name].float() + torch.from_numpy(edit[name].astype(np.float32)).reshape(tensor.shape)
        assert raw(tensor) == raw(wanted.to(tensor.dtype)), name


class TestExact:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("how", [{"density": 0.05}, {"saliency_mass": 0.9}, {"density": 1.0}], ids=str)
    def test_bit_for_bit_the_graft(self, tmp_path, dtype, how):
        models = make_set(tmp_path / "m", SHAPES, experts=1, dtype=dtype)
        packed(models, tmp_path / "e.pack", **how)
        assert_same_tensors(
            unpacked(tmp_path / "e.pack", tmp_path / "out"),
            graft(models.base, models.experts[0], None, **how),
        )

    @pytest.mark.parametrize("scope", ["model", "tensor"])
    def test_by_saliency(self, models, tmp_path, scope):
        packed(
            models, tmp_path / "e.pack", density=0.1, moments=models.curvature_files[0], density_scope=scope
        )
        wanted = graft(models.base, models.experts[0], models.curvatures[0], density=0.1, density_scope=scope)
        assert_same_tensors(unpacked(tmp_path / "e.pack", tmp_path / "out"), wanted)

    def test_the_reference_keeps_the_same(self, models, tmp_path):
        """Whose undecided elements wait apart from the others."""
        for backend in ("native", "reference"):
            packed(models, tmp_path / f"{backend}.pack", density=0.05, options={"backend": backend})
        assert digests(tmp_path)["native.pack"] == digests(tmp_path)["reference.pack"]

    def test_weights_far_below_the_base(self, tmp_path):
        """w_0 + (w_t - w_0) is not w_t there; the pack's bits are."""
        base = {"w": torch.full((70000,), 3.0, dtype=torch.bfloat16)}
        expert = {"w": base["w"].clone()}
        expert["w"][::7] = 1e-9
        for name, tensors in (("base", base), ("expert", expert)):
            save_model(tmp_path / name, tensors)
        pack([tmp_path / "expert"], tmp_path / "e.pack", base=tmp_path / "base", density=0.5)
        assert_same_tensors(unpacked(tmp_path / "e.pack", tmp_path / "out"), expert)

    def test_integers_and_buffers_are_the_experts(self, tmp_path):
        base = with_integers(random_tensors(SHAPES, 0, torch.bfloat16), 2)
        expert = with_integers(edited(random_tensors(SHAPES, 0, torch.bfloat16), 1), 3)
        save_model(tmp_path / "base", base), save_model(tmp_path / "expert", expert)
        pack([tmp_path / "expert"], tmp_path / "e.pack", base=tmp_path / "base", form="bitdelta")
        found = unpacked(tmp_path / "e.pack", tmp_path / "out")
        for name in ("layers.0.steps", "layers.0.rotary_emb.inv_freq"):
            assert raw(found[name]) == raw(expert[name])

    def test_an_expert_of_another_type_is_rounded_once(self, tmp_path):
        base = random_tensors({"w": (300, 300)}, 0, torch.bfloat16)
        expert = edited(base, 1, torch.float32)
        save_model(tmp_path / "base", base), save_model(tmp_path / "expert", expert)
        pack([tmp_path / "expert"], tmp_path / "e.pack", base=tmp_path / "base", density=1.0)
        found = unpacked(tmp_path / "e.pack", tmp_path / "out")
        assert raw(found["w"]) == raw(expert["w"].bfloat16())


class TestForms:
    """A dozen lines of float64 each."""

    def test_ffg_signs(self, models, tmp_path):
        packed(models, tmp_path / "e.pack", density=0.1, values="sign")
        kept = graft(models.base, models.experts[0], None, density=0.1)
        d, wanted = edits(models.base, models.experts[0]), {}
        for name in d:
            mask = (kept[name] != models.base[name]).reshape(-1).numpy()
            rms = math.sqrt((d[name][mask] ** 2).mean()) if mask.any() else 0.0
            wanted[name] = np.where(mask, np.sign(d[name]) * rms, 0.0)
        assert_rounded(unpacked(tmp_path / "e.pack", tmp_path / "out"), models.base, wanted)

    def test_compeft(self, models, tmp_path):
        packed(models, tmp_path / "e.pack", form="compeft", density=0.1, alpha=2.0)
        d = edits(models.base, models.experts[0])
        whole = np.concatenate(list(d.values()))
        threshold = np.sort(np.abs(whole))[-math.floor(0.1 * whole.size)]
        size = 2.0 * whole.std(ddof=1)
        wanted = {n: np.where(np.abs(x) >= threshold, np.sign(x) * size, 0.0) for n, x in d.items()}
        assert_rounded(unpacked(tmp_path / "e.pack", tmp_path / "out"), models.base, wanted)

    def test_tswitch(self, models, tmp_path):
        packed(models, tmp_path / "e.pack", form="tswitch")
        wanted = {}
        for name, d in edits(models.base, models.experts[0]).items():
            mask = np.zeros(d.size, bool)
            for side in (1, -1):
                own = side * d
                k = math.floor(0.4 * (own > 0).sum())
                if k:
                    mask |= own >= np.sort(own[own > 0])[-k]
            size = math.sqrt((d[mask] ** 2).sum()) / math.sqrt(mask.sum()) if mask.any() else 0.0
            wanted[name] = np.where(mask, np.sign(d) * size, 0.0)
        assert_rounded(unpacked(tmp_path / "e.pack", tmp_path / "out"), models.base, wanted)

    def test_bitdelta(self, models, tmp_path):
        packed(models, tmp_path / "e.pack", form="bitdelta")
        found = unpacked(tmp_path / "e.pack", tmp_path / "out")
        d = edits(models.base, models.experts[0])
        name = "layers.0.mlp.weight"
        wanted = d | {name: np.where(d[name] < 0, -1, 1) * np.abs(d[name]).mean()}
        assert_rounded({name: found[name]}, {name: models.base[name]}, wanted)
        for name in SHAPES:
            if name != "layers.0.mlp.weight":
                assert raw(found[name]) == raw(models.experts[0][name])

    def test_emr(self, models, tmp_path):
        pack(models.expert_folders, tmp_path / "packs", base=models.base_folder, form="emr")
        each = [edits(models.base, expert) for expert in models.experts]
        shared, masks = {}, [{} for _ in each]
        for name in SHAPES:
            d = np.stack([x[name] for x in each])
            g = np.where(d.sum(axis=0) > 0, 1.0, -1.0)
            agree = d * g > 0
            e = g * np.where(agree, np.abs(d), 0).max(axis=0)
            shared[name] = torch.from_numpy(e).bfloat16().double().numpy()
            for t in range(len(each)):
                masks[t][name] = agree[t]
        with safe_open(tmp_path / "packs" / "shared.pack", "pt") as file:
            for name in SHAPES:
                stored = file.get_tensor(f"shared/{name}")
                assert np.array_equal(stored.double().reshape(-1).numpy(), shared[name])
        for t, own in enumerate(each):
            some = [n for n in SHAPES if own[n].size]
            factor = sum(np.abs(own[n]).mean() for n in some)
            factor /= sum((np.abs(shared[n]) * masks[t][n]).mean() for n in some)
            wanted = {n: np.float32(factor) * (shared[n] * masks[t][n]).astype(np.float32) for n in SHAPES}
            found = unpacked(tmp_path / "packs" / f"expert{t}.pack", tmp_path / f"out{t}")
            assert_rounded(found, models.base, wanted)


def entropy(p):
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


class TestSizes:
    @pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.3, 0.5])
    def test_within_five_percent_of_the_entropy(self, tmp_path, density):
        """Of what is kept: at a threshold that many share, more than asked for."""
        models = make_set(tmp_path / "m", {"w": (1200, 1000) if density > 0.01 else (6000, 1000)}, experts=1)
        for values, stored in (("exact", 16), ("sign", 1)):
            found = packed(models, tmp_path / f"{values}.pack", density=density, values=values)
            (kept,) = found["kept"]
            wanted = entropy(kept) + stored * kept
            assert density <= kept < 1.2 * density
            assert wanted * 0.98 < found["bits_per_parameter"] < wanted * 1.05

    def test_bitdelta_is_one_bit(self, tmp_path):
        models = make_set(tmp_path / "m", {"w": (1200, 1000)}, experts=1)
        assert packed(models, tmp_path / "e.pack", form="bitdelta")["bits_per_parameter"] < 1.05

    def test_emr_is_one_bit_and_a_share(self, tmp_path):
        models = make_set(tmp_path / "m", {"w": (1200, 1000)}, experts=4)
        found = pack(models.expert_folders, tmp_path / "packs", base=models.base_folder, form="emr")
        assert found["bits_per_parameter"] < 1.05 * (1 + 16 / 4)


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """Packs of the experts, and the same unpacked."""
    root = tmp_path_factory.mktemp("packs")
    for t in range(3):
        packed(models, root / f"e{t}.pack", t, density=0.2)
        unpack(root / f"e{t}.pack", root / f"e{t}")
    return root


class TestAsModels:
    def recipes(self, models, folders, method, **parameters):
        for suffix in (".pack", ""):
            recipe = models.recipe(method, **parameters)
            for t, entry in enumerate(recipe["models"]):
                entry["model"] = str(folders / f"e{t}{suffix}")
            yield recipe

    @pytest.mark.parametrize(
        ("method", "parameters"),
        [
            ("ota", {"density": 0.1}),
            ("ota", {"density": 0.1, "density_scope": "tensor"}),
            ("ties", {"density": 0.5, "weight": 1.0}),
            ("linear", {}),
            ("dare_linear", {"density": 0.5, "weight": 1.0}),
            ("della_linear", {"density": 0.5, "epsilon": 0.2, "weight": 1.0}),
            ("task_arithmetic", {"weight": 0.4}),
        ],
        ids=str,
    )
    def test_a_merge_of_packs_is_that_of_the_experts(self, models, folders, tmp_path, method, parameters):
        for out, recipe in zip(("a", "b"), self.recipes(models, folders, method, **parameters), strict=True):
            if method == "linear":
                del recipe["base_model"]
            merge(recipe, tmp_path / out, tile_elements=50000)
        assert model_digests(tmp_path / "a") == model_digests(tmp_path / "b")

    def test_on_the_reference(self, models, folders, tmp_path):
        for out, recipe in zip(("a", "b"), self.recipes(models, folders, "ota", density=0.1), strict=True):
            merge(recipe, tmp_path / out, backend="reference")
        assert model_digests(tmp_path / "a") == model_digests(tmp_path / "b")

    def test_signs_are_merged_in_float32(self, models, tmp_path):
        """Not rounded to the base's 16 bits before they are merged."""
        for t in range(2):
            packed(models, tmp_path / f"e{t}.pack", t, form="bitdelta")
        recipe = {
            "merge_method": "task_arithmetic",
            "base_model": str(models.base_folder),
            "models": [{"model": str(tmp_path / f"e{t}.pack")} for t in range(2)],
            "parameters": {"weight": 0.5},
            "dtype": "float32",
        }
        merge(recipe, tmp_path / "out")
        name = "layers.0.mlp.weight"
        base, wanted = models.base[name].double(), models.base[name].double().clone()
        for t in range(2):
            d = models.experts[t][name].double() - base
            size = torch.where(d < 0, -1.0, 1.0) * d.abs().mean()
            wanted += 0.5 * ((base.float() + size.float()).double() - base)
        found = load_merged(tmp_path / "out")[name].double()
        assert (found - wanted).abs().max() <= 2.0**-24 * wanted.abs().max()

    def test_in_memory(self, models, folders):
        own = [load_merged(folders / f"e{t}") for t in range(3)]
        wanted = merge_state_dicts(models.base, own, method="localize_stitch", density=0.1)
        packs = [folders / f"e{t}.pack" for t in range(3)]
        assert_same_tensors(
            merge_state_dicts(models.base, packs, method="localize_stitch", density=0.1), wanted
        )
        mixed = [packs[0], own[1], str(packs[2])]
        assert_same_tensors(
            merge_state_dicts(models.base, mixed, method="localize_stitch", density=0.1), wanted
        )

    def test_files_beside_the_weights(self, tmp_path):
        """The expert's, which the base has otherwise or not at all."""
        models = make_set(tmp_path / "m", SHAPES, experts=1, config={"vocab_size": 50})
        expert = models.expert_folders[0]
        (expert / "chat_template.jinja").write_text("{{ messages }}")
        (expert / "config.json").write_text(json.dumps({"vocab_size": 50, "eos_token_id": 7}))
        packed(models, tmp_path / "e.pack", density=0.1)
        unpack(tmp_path / "e.pack", tmp_path / "out")
        assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
        assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 7

    def test_the_plan_counts_the_bytes_of_packs(self, models, folders, ota_merge):
        recipe = next(self.recipes(models, folders, "linear"))
        path = folders / "recipe.yaml"
        path.write_text(json.dumps(recipe))
        code, printed, _ = ota_merge("plan", path, "--json")
        read = json.loads(printed)["bytes_in"]
        size = sum(x.numel() * x.element_size() for x in models.base.values())
        stored = sum((folders / f"e{t}.pack").stat().st_size for t in range(3))
        assert code == 0
        assert size < read < size + stored


class TestRefused:
    @pytest.fixture
    def path(self, models, tmp_path):
        packed(models, tmp_path / "e.pack", density=0.2)
        return tmp_path / "e.pack"

    def test_another_base(self, models, path, tmp_path, refused_command):
        save_model(tmp_path / "other", edited(models.base, 9), config={"vocab_size": 50})
        facts = ("e.pack", "is packed against", "is another", "base_model")
        refused_command("unpack", path, tmp_path / "out", "--base", tmp_path / "other", "-q", facts=facts)

    def test_a_base_that_differs_in_one_element(self, models, tmp_path):
        """Which a few tiles need not tell: all of them are looked at when they are read, and nothing is
        published."""
        shapes = {f"layers.{i}.weight": (70, 1000) for i in range(70)}
        models = make_set(tmp_path / "m", shapes, experts=1)
        packed(models, tmp_path / "e.pack", density=0.01)
        for i in range(70):
            other = {name: tensor.clone() for name, tensor in models.base.items()}
            other[f"layers.{i}.weight"][69, 999] += 1
            if i in (3, 50):
                save_model(tmp_path / f"other{i}", other)
                with pytest.raises(InputError, match="base"):
                    unpack(tmp_path / "e.pack", tmp_path / f"out{i}", base=tmp_path / f"other{i}")
                recipe = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / f"other{i}")}
                recipe["models"] = [{"model": str(tmp_path / "e.pack"), "parameters": {"weight": 1.0}}]
                with pytest.raises(InputError, match=f"not the base that it was packed .* layers.{i}"):
                    merge(recipe, tmp_path / f"out{i}")
                assert not (tmp_path / f"out{i}").exists()

    def test_a_base_that_moved(self, tmp_path, refused_command, ota_merge):
        models = make_set(tmp_path / "m", SHAPES, experts=1)
        packed(models, tmp_path / "e.pack", density=0.2)
        (tmp_path / "m" / "base").rename(tmp_path / "m" / "moved")
        refused_command("unpack", tmp_path / "e.pack", tmp_path / "out", facts=("is packed against", "base"))
        code, _, errors = ota_merge(
            "unpack", tmp_path / "e.pack", tmp_path / "out", "--base", tmp_path / "m" / "moved"
        )
        assert code == 0, errors

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
    def test_a_truncated_file(self, path, tmp_path, refused_command, share):
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        refused_command("unpack", path, tmp_path / "out", "-q", facts=("e.pack",))

    def test_a_flipped_bit(self, models, path, tmp_path):
        with safe_open(path, "pt") as file:
            assert file.metadata()["form"] == "ffg"
        content = bytearray(path.read_bytes())
        content[-200] ^= 4  # of the last tensor's records
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"is damaged: tile \d+ of"):
            unpack(path, tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == ["e.pack"]

    def test_no_pack(self, models, tmp_path, refused_command):
        other = tmp_path / "e.pack"
        other.write_bytes((models.base_folder / "model.safetensors").read_bytes())
        refused_command("unpack", other, tmp_path / "out", "-q", facts=("is no pack",))
        refused_command("unpack", models.base_folder, tmp_path / "out", "-q", facts=("is no pack",))

    def test_a_later_version(self, path, tmp_path, refused_command):
        path.write_bytes(path.read_bytes().replace(b'"version":"2"', b'"version":"3"', 1))
        refused_command("unpack", path, tmp_path / "out", "-q", facts=("version '3'", "update"))

    def test_a_shared_edit_of_others(self, models, tmp_path):
        for name, chosen in (("a", [0, 1]), ("b", [1, 2])):
            pack(
                [models.expert_folders[t] for t in chosen],
                tmp_path / name,
                base=models.base_folder,
                form="emr",
            )
        unpack(tmp_path / "a" / "expert0.pack", tmp_path / "out")
        (tmp_path / "b" / "shared.pack").replace(tmp_path / "a" / "shared.pack")
        with pytest.raises(InputError, match="shared edit of other experts"):
            unpack(tmp_path / "a" / "expert0.pack", tmp_path / "out2")
        (tmp_path / "a" / "shared.pack").unlink()
        with pytest.raises(InputError, match="cannot be read"):
            unpack(tmp_path / "a" / "expert0.pack", tmp_path / "out2")

    @pytest.mark.parametrize(
        ("options", "fact"),
        [
            ({}, "--density and --saliency-mass"),
            ({"density": 0.1, "saliency_mass": 0.1}, "--density and --saliency-mass"),
            ({"form": "compeft"}, "--density"),
            ({"form": "compeft", "density": 0.1, "values": "sign"}, "--values"),
            ({"form": "bitdelta", "density": 0.1}, "--density"),
            ({"form": "tswitch", "density": 1.5}, "--density"),
            ({"form": "emr"}, "two experts"),
            ({"form": "zip"}, "zip"),
            ({"density": 2.0}, "density"),
        ],
        ids=str,
    )
    def test_options_that_do_not_go_together(self, models, tmp_path, options, fact):
        with pytest.raises(RecipeError, match=fact):
            packed(models, tmp_path / "e.pack", **options)
        assert os.listdir(tmp_path) == []

    def test_the_base_itself(self, models, tmp_path):
        with pytest.raises(RecipeError, match="only the base model"):
            pack([models.base_folder], tmp_path / "e.pack", base=models.base_folder, density=0.1)

    def test_names_that_are_taken_or_wrong(self, models, path, tmp_path):
        with pytest.raises(OutputError, match="exists"):
            packed(models, path, density=0.2)
        with pytest.raises(OutputError, match=r"\.pack"):
            packed(models, tmp_path / "e.safetensors", density=0.2)
        packed(models, path, density=0.3, overwrite=True)
        assert PackFile(path, "e").settings["density"] == 0.3

    def test_weights_that_are_not_finite(self, tmp_path):
        models = make_set(tmp_path / "m", {"w": (300, 300)}, experts=1)
        models.experts[0]["w"][299, 299] = math.nan
        models.save()
        for how in ({"density": 0.1}, {"form": "tswitch"}):
            with pytest.raises(InputError, match="not finite"):
                packed(models, tmp_path / "e.pack", **how)
        assert os.listdir(tmp_path) == ["m"]


class TestStopped:
    def test_a_full_disk_leaves_nothing(self, models, tmp_path, monkeypatch):
        def refuse(fd, *_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("ota_kernels.io.new_file.write_at", refuse)
        with pytest.raises(OutputError, match="No space left"):
            packed(models, tmp_path / "e.pack", density=0.1)
        assert os.listdir(tmp_path) == []

    def test_a_killed_pack_is_no_pack(self, models, tmp_path):
        """Whatever it was doing: afterwards there is none, or a whole one."""
        command = [sys.executable, "-c", "from ota_kernels.cli import main; main()"]
        command += ["pack", models.expert_folders[0], tmp_path / "e.pack", "--base", models.base_folder]
        command += ["--density", "0.1", "-q", "--overwrite"]
        subprocess.run(command, check=True)
        whole = load_file(tmp_path / "e.pack")
        for pause in (0.3, 0.6):
            (tmp_path / "e.pack").unlink(missing_ok=True)
            process = subprocess.Popen(command)
            time.sleep(pause)
            process.send_signal(signal.SIGKILL)
            process.wait()
            if (tmp_path / "e.pack").exists():
                assert_same_tensors(load_file(tmp_path / "e.pack"), whole)
        subprocess.run(command, check=True)
        assert os.listdir(tmp_path) == ["e.pack"]


def test_the_command_line(models, tmp_path, ota_merge):
    base = ("--base", models.base_folder)
    code, printed, errors = ota_merge(
        "pack", models.expert_folders[0], tmp_path / "e.pack", *base, "--density", "0.1", "--json"
    )
    assert code == 0, errors
    assert json.loads(printed)["kept"] == [pytest.approx(0.1, abs=0.01)]
    code, printed, errors = ota_merge("pack", *models.expert_folders, tmp_path / "packs", *base)
    assert code == 0, errors
    assert "bits per parameter" in printed
    code, printed, errors = ota_merge("unpack", tmp_path / "e.pack", tmp_path / "out")
    assert code == 0, errors
    assert ota_merge("inspect", tmp_path / "e.pack")[1].count("a pack (ffg)") == 1


def test_an_expert_of_many_small_tensors_is_packed(tmp_path):
    base = {f"layers.{i}.norm": torch.arange(4.0) + i for i in range(64)}
    save_model(tmp_path / "base", base)
    expert = {name: x + 0.5 * (torch.arange(4) == 2) for name, x in base.items()}
    save_model(tmp_path / "expert", expert)
    pack([tmp_path / "expert"], tmp_path / "e.pack", base=tmp_path / "base", density=0.5)
    unpack(tmp_path / "e.pack", tmp_path / "out")
    assert_same_tensors(load_merged(tmp_path / "out"), expert)
