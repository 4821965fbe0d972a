"""The whole job from recipe to folder: the values that merging in memory gives, the same bytes however it is
cut, and nothing in the folder, or beside it, that should not be there."""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
import yaml
from checkpoints import (
    SHAPES,
    ModelSet,
    assert_same_tensors,
    digests,
    edited,
    load_merged,
    make_set,
    model_digests,
    random_tensors,
    raw,
    save_model,
    save_sharded,
    second_moments,
    shard_files,
)
from safetensors import safe_open
from safetensors.torch import save_file
from tolerances import assert_close

from ota_kernels import InputError, merge, merge_state_dicts, merge_tensors
from ota_kernels.io.reader import Checkpoint
from ota_kernels.io.writer import ShardWriter, layout
from ota_kernels.run import job
from ota_kernels.run.rules import Rules
from ota_kernels.tensors.dtypes import BY_NAME
from ota_kernels.tensors.segment import CHUNK

# Every way to decide and to combine, each with a base and, but for the last, with curvature.
VARIANTS = {
    "plain": {},
    "density model": {"density": 0.2},
    "density tensor": {"density": [0.1, 0.25, 0.5], "density_scope": "tensor"},
    "mass model": {"saliency_mass": 0.9},
    "mass tensor": {"saliency_mass": 0.7, "density_scope": "tensor"},
    "threshold": {"precond_threshold": [1e-16, 0.0, 1e-15]},
    "rank1": {"rank1_approx": True, "density": 0.3},
    "rank": {"rank": 2},
    "linear": {"density": 0.3, "masked_task_vector_merge_method": "linear", "rescale": True},
    "ties": {"masked_task_vector_merge_method": "ties", "ties_density": 0.4, "saliency_mass": 0.9},
    "normalise model": {"normalise": "model", "lambda": 1.3, "scaling_factor": [0.5, 1.0, 2.0]},
    "normalise global": {"normalise": "global", "density": 0.5, "mask_weights": False},
    "fall back to the mean": {"density": 0.05, "fallback_to_base": False, "power": 1.0},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Small tensors of every role, in bfloat16, shared by tests that only read them."""
    return make_set(tmp_path_factory.mktemp("models"))


def merged_in_memory(models: ModelSet, method="ota", **parameters):
    """merge_state_dicts of the same tensors; a model's lists become its arguments as they are."""
    curvatures = models.curvatures if method == "ota" else None
    return merge_state_dicts(models.base, models.experts, curvatures, method=method, **parameters)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Its second tensor spans two survey chunks, and many tiles of every size that is tried."""
    shapes = {"small": (37, 11), "large": (1031, 1153), "bias": (1031,)}
    assert np.prod(shapes["large"]) > CHUNK
    return make_set(tmp_path_factory.mktemp("large"), shapes, dtype=torch.float16)


class TestValues:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_a_folder_holds_what_merging_in_memory_gives(self, models, tmp_path, variant):
        parameters = VARIANTS[variant]
        merge(models.recipe(**parameters), tmp_path / "out")
        found = load_merged(tmp_path / "out")
        assert_same_tensors(found, merged_in_memory(models, **parameters))
        name = "layers.0.mlp.weight"
        assert raw(found[name]) != raw(models.base[name])

    def test_linear(self, models, tmp_path):
        weights = [0.5, 1.0, 2.5]
        merge(models.recipe("linear", weight=weights), tmp_path / "out")
        found = load_merged(tmp_path / "out")
        assert_same_tensors(found, merged_in_memory(models, "linear", weight=weights))
        name = "layers.1.mlp.weight"
        total = sum(w * e[name].double() for w, e in zip(weights, models.experts, strict=True))
        expected = total / sum(weights)
        torch.testing.assert_close(found[name].double(), expected, rtol=2**-8, atol=2**-12)

    @pytest.mark.parametrize("variant", ["plain", "density model", "ties", "rank1"])
    def test_backends_keep_the_same_edits_and_agree_on_values(self, models, tmp_path, variant):
        reports = {
            backend: merge(models.recipe(**VARIANTS[variant]), tmp_path / backend, backend=backend)
            for backend in ("native", "reference")
        }
        native, reference = reports.values()
        assert [report["backend"] for report in reports.values()] == ["native", "reference"]
        assert native["tensors"] == reference["tensors"]
        assert native["experts"] == reference["experts"]
        expected = load_merged(tmp_path / "reference")
        for name, tensor in load_merged(tmp_path / "native").items():
            operands = [m[name].double().abs() for m in (models.base, *models.experts)]
            assert_close(
                "bfloat16",
                tensor.double().numpy(),
                expected[name].double().numpy(),
                torch.stack(operands).amax(0).numpy(),
                len(models.experts),
            )

    def test_experts_may_differ_in_type_from_the_base_and_each_other(self, tmp_path):
        shapes = {"a": (33, 17), "b": (9,)}
        base = random_tensors(shapes, 0, torch.bfloat16)
        types = (torch.float32, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
        experts = [edited(base, 10 + t, dtype) for t, dtype in enumerate(types)]
        moments = [second_moments(base, 20 + t) for t in range(len(types))]
        moments[1] = {name: v.to(torch.bfloat16) for name, v in moments[1].items()}
        models = ModelSet(tmp_path, base, experts, moments).save()
        for out_dtype in ("bfloat16", "float32"):
            recipe = models.recipe(density=0.5) | {"dtype": out_dtype}
            merge(recipe, tmp_path / out_dtype)
            expected = merged_in_memory(models, density=0.5, out_dtype=out_dtype)
            assert expected["a"].dtype == getattr(torch, out_dtype)
            assert_same_tensors(load_merged(tmp_path / out_dtype), expected)

    def test_no_base(self, models, tmp_path):
        recipe = models.recipe(normalise="global", precond_threshold=1e-11)
        del recipe["base_model"]
        merge(recipe, tmp_path / "out")
        expected = merge_state_dicts(
            None, models.experts, models.curvatures, normalise="global", precond_threshold=1e-11
        )
        assert_same_tensors(load_merged(tmp_path / "out"), expected)


class TestSameBytes:
    """What a merge computes does not depend on how it is cut or who computes it."""

    @pytest.mark.parametrize(
        "variant", ["density model", "density tensor", "mass model", "rank1", "normalise model", "ties"]
    )
    def test_for_any_threads_tiles_and_memory(self, large, tmp_path, variant):
        runs = [
            {"threads": 1},
            {"threads": 2, "tile_elements": 70_001},
            {"threads": 4, "tile_elements": 333_333},
            {"threads": 3, "tile_elements": 1 << 19},
            {"threads": 2, "memory_limit": "215MB"},
        ]
        written, tiles = set(), set()
        for number, options in enumerate(runs):
            report = merge(large.recipe(**VARIANTS[variant]), tmp_path / str(number), **options)
            written.add(tuple(model_digests(tmp_path / str(number)).items()))
            tiles.add(report["tile_elements"])
        assert len(written) == 1
        assert len(tiles) >= 4  # the runs did differ
        assert raw(load_merged(tmp_path / "0")["large"]) != raw(large.base["large"])

    @pytest.mark.parametrize("tile_elements", [1, 7, 100])
    def test_for_tiny_tiles(self, models, tmp_path, tile_elements):
        recipe = models.recipe(**VARIANTS["mass tensor"])
        merge(recipe, tmp_path / "whole")
        merge(recipe, tmp_path / "tiles", tile_elements=tile_elements, threads=2)
        assert model_digests(tmp_path / "tiles") == model_digests(tmp_path / "whole")

    def test_for_the_reference_backend_too(self, models, tmp_path):
        recipe = models.recipe(**VARIANTS["density model"])
        for name, options in {"a": {"threads": 1}, "b": {"threads": 4, "tile_elements": 77}}.items():
            merge(recipe, tmp_path / name, backend="reference", **options)
        assert model_digests(tmp_path / "a") == model_digests(tmp_path / "b")

    def test_for_inputs_in_any_number_of_shards(self, models, tmp_path):
        merge(models.recipe(density=0.3), tmp_path / "single")
        sharded = make_set(tmp_path / "sharded", shards=3)
        merge(sharded.recipe(density=0.3), tmp_path / "out")
        assert_same_tensors(load_merged(tmp_path / "out"), load_merged(tmp_path / "single"))


class TestShards:
    def test_shards_hold_the_single_file_s_tensors(self, models, tmp_path):
        recipe = models.recipe(density=0.3)
        merge(recipe, tmp_path / "single")
        merge(recipe, tmp_path / "sharded", shard_size=1500)
        single, sharded = load_merged(tmp_path / "single"), load_merged(tmp_path / "sharded")
        assert [p.name for p in shard_files(tmp_path / "single")] == ["model.safetensors"]
        assert not (tmp_path / "single" / "model.safetensors.index.json").exists()
        assert_same_tensors(sharded, single)

        files = shard_files(tmp_path / "sharded")
        names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        assert [p.name for p in files] == names
        assert len(files) > 2
        index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(len(raw(t)) for t in single.values())
        assert index["weight_map"].keys() == single.keys()
        for path in files:
            with safe_open(path, "pt") as file:
                assert file.metadata() == {"format": "pt"}
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            assert {name for name, shard in index["weight_map"].items() if shard == path.name} == held.keys()
            # A shard is over the limit only where one tensor alone is.
            assert sum(len(raw(t)) for t in held.values()) <= 1500 or len(held) == 1

    def test_tensors_are_aligned_to_their_size(self, tmp_path):
        shapes = {"half": (3,), "wide": (5,)}
        base = {
            "byte": torch.arange(3, dtype=torch.uint8),
            **random_tensors({"half": shapes["half"]}, 0, torch.bfloat16),
            **random_tensors({"wide": shapes["wide"]}, 1, torch.float64),
        }
        models = ModelSet(tmp_path, base, [edited(base, 5), edited(base, 6)], [second_moments(base, 7)] * 2)
        models.save(shards=3)  # three bytes come first
        merge(models.recipe(), tmp_path / "out")
        checkpoint = Checkpoint.open(tmp_path / "out", "merged")
        assert len(checkpoint.tensors) == 3
        for info in checkpoint.tensors.values():
            assert info.begin % info.dtype.itemsize == 0
        checkpoint.close()

    def test_an_offset_beyond_2_gib_is_read_and_written_exactly(self, tmp_path):
        skipped = (1 << 31) + 12_345
        if shutil.disk_usage(tmp_path).free < 2 * skipped:
            pytest.skip("needs 4.3 GB of disk for a moment")
        values = np.arange(1000, dtype=np.float32)
        byte = BY_NAME["uint8"]
        plan = layout([("before", byte, (skipped,)), ("after", byte, (4 * values.size,))], 1 << 40)
        writer = ShardWriter(tmp_path, plan)
        after = plan.tensors[1]
        assert after.begin > 1 << 31
        writer.write(after, 2000, values[500:].view(np.uint8))
        writer.write(after, 0, values[:500].view(np.uint8))
        writer.close()
        checkpoint = Checkpoint.open(tmp_path, "written")
        assert np.array_equal(checkpoint.buffer("after").data.view(np.float32), values)
        assert not checkpoint.buffer("before").data[-4096:].any()
        checkpoint.close()

    @pytest.mark.parametrize("is_mapped", [True, False])
    def test_patches_change_their_elements_only(self, tmp_path, monkeypatch, is_mapped):
        if not is_mapped:
            monkeypatch.setattr("ota_kernels._native.scatter_in_file", lambda *arguments: False)
        tensors = [
            ("a", BY_NAME["bfloat16"], (5001,)),
            ("b", BY_NAME["float32"], (7,)),
            ("c", BY_NAME["bfloat16"], (0,)),
        ]
        plan = layout(tensors, 1 << 40)
        writer = ShardWriter(tmp_path, plan)
        expected = {"a": np.arange(5001, dtype=np.uint16), "b": np.arange(7, dtype=np.uint32)}
        for tensor, values in zip(plan.tensors, expected.values(), strict=False):
            writer.write(tensor, 0, values.view(np.uint8))
        for name, start, stop in [("a", 0, 5001), ("a", 3, 5), ("a", 2047, 4097), ("b", 6, 7)]:
            tensor = next(t for t in plan.tensors if t.name == name)
            positions = np.arange(0, stop - start, 3, dtype=np.uint32)
            merged = (expected[name][start:stop][positions] + 1000).astype(expected[name].dtype)
            expected[name][start:stop][positions] = merged
            writer.patch(tensor, start, stop, positions, merged.view(np.uint8))
        writer.patch(plan.tensors[2], 0, 0, np.zeros(0, np.uint32), np.zeros(0, np.uint8))
        writer.sync()
        writer.close()
        checkpoint = Checkpoint.open(tmp_path, "written")
        for name, values in expected.items():
            assert checkpoint.buffer(name).data.tobytes() == values.tobytes()
        checkpoint.close()


class TestSizes:
    def test_ten_thousand_tiny_tensors(self, tmp_path):
        shapes = {f"layers.{i}.scale": (1 + i % 4,) for i in range(10_000)}
        models = make_set(tmp_path, shapes, experts=1)
        report = merge(models.recipe(precond_threshold=2e-16), tmp_path / "out")
        # The formula knows no neighbours: the same as all of them in one tensor.
        inputs = (models.base, models.experts[0], models.curvatures[0])
        base, expert, curvature = (torch.cat(list(tensors.values())) for tensors in inputs)
        expected = merge_tensors(base, [expert], [curvature], precond_threshold=2e-16)
        found = load_merged(tmp_path / "out")
        assert {name: tuple(t.shape) for name, t in found.items()} == shapes
        assert raw(torch.cat([found[name] for name in shapes])) == raw(expected)
        assert len(report["tensors"]) == 10_000

    def test_nothing_but_empty_tensors(self, tmp_path):
        models = make_set(tmp_path, {"a": (0,), "b": (3, 0)}, experts=2)
        for variant in ("plain", "density model", "mass tensor"):
            report = merge(models.recipe(**VARIANTS[variant]), tmp_path / variant)
            assert_same_tensors(load_merged(tmp_path / variant), models.base)
            assert [e["total"] for e in report["experts"]] == [0, 0]

    def test_one_expert_is_a_graft(self, tmp_path):
        models = make_set(tmp_path, experts=1)
        report = merge(models.recipe(density=0.25), tmp_path / "out")
        found = load_merged(tmp_path / "out")
        assert_same_tensors(found, merged_in_memory(models, density=0.25))
        total = sum(t.numel() for t in models.base.values())
        taken = sum(int((found[name] != models.base[name]).sum()) for name in found)
        assert 0 < taken <= report["experts"][0]["kept"] == total // 4


class TestBuffers:
    """Integers and booleans."""

    BUFFERS = {  # noqa: RUF012
        "position_ids": torch.arange(7).reshape(1, 7),
        "mask": torch.tensor([[True, False], [False, True]]),
        "step": torch.tensor(3, dtype=torch.int32),
        "none": torch.zeros(0, dtype=torch.uint8),
    }

    def make(self, root):
        base = random_tensors({"weight": (5, 3)}, 0) | self.BUFFERS
        experts = [edited(base, 1), edited(base, 2)]
        return ModelSet(root, base, experts, [second_moments(base, 3), second_moments(base, 4)])

    def test_are_copied_when_all_models_agree(self, tmp_path):
        models = self.make(tmp_path).save()
        report = merge(models.recipe(), tmp_path / "out")
        found = load_merged(tmp_path / "out")
        assert_same_tensors({name: found[name] for name in self.BUFFERS}, self.BUFFERS)
        assert_same_tensors(found, merged_in_memory(models))
        assert report["tensors"].keys() == {"weight"}
        assert report["not_merged"].keys() == self.BUFFERS.keys()

    @pytest.mark.parametrize("pieces", [1, 4], ids=["in one piece", "in several pieces"])
    def test_that_differ_are_an_error_and_leave_nothing(self, tmp_path, pieces):
        models = self.make(tmp_path)
        models.experts[1]["position_ids"] = models.base["position_ids"].clone()
        models.experts[1]["position_ids"][0, 6] += 1
        models.save()
        with pytest.raises(InputError, match="position_ids") as caught:
            jobs.merge(models.recipe(), tmp_path / "out", Rules(copy_bytes=56 // pieces))
        assert str(models.expert_folders[1]) in str(caught.value)
        assert sorted(os.listdir(tmp_path)) == ["base", "expert0", "expert1"]


class TestTiedEmbeddings:
    SHAPES = {"model.embed_tokens.weight": (19, 6), "model.norm.weight": (6,)}  # noqa: RUF012
    HEAD = "lm_head.weight"

    def make(self, root, *, untied=()):
        """Three models, tied but for those of `untied` (0: the base), which have heads of their own."""
        base = random_tensors(self.SHAPES, 0)
        tensors = [base, edited(base, 1), edited(base, 2)]
        moments = [second_moments(base, 3), second_moments(base, 4)]
        for i in untied:
            tensors[i][self.HEAD] = random_tensors({self.HEAD: (19, 6)}, 30 + i)[self.HEAD]
            if i > 0:
                moments[i - 1][self.HEAD] = second_moments(tensors[i], 40 + i)[self.HEAD]
        models = ModelSet(root, tensors[0], tensors[1:], moments).save()
        for i, folder in enumerate([models.base_folder, *models.expert_folders]):
            config = {"model_type": "llama", "tie_word_embeddings": i not in untied, "torch_dtype": "float32"}
            (folder / "config.json").write_text(json.dumps(config))
        return models

    def test_all_tied_stays_tied(self, tmp_path):
        models = self.make(tmp_path)
        merge(models.recipe(density=0.5), tmp_path / "out")
        assert_same_tensors(load_merged(tmp_path / "out"), merged_in_memory(models, density=0.5))
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True

    def test_a_stored_copy_of_a_tied_head_is_left_out(self, tmp_path):
        models = self.make(tmp_path)
        copy = {self.HEAD: models.experts[0]["model.embed_tokens.weight"].clone()}
        save_model(models.expert_folders[0], models.experts[0] | copy)
        merge(models.recipe(), tmp_path / "out")
        assert load_merged(tmp_path / "out").keys() == self.SHAPES.keys()

    @pytest.mark.parametrize("untied", [(1,), (0,), (0, 2), (1, 2)], ids=str)
    def test_mixed_is_untied_and_says_so(self, tmp_path, untied):
        models = self.make(tmp_path, untied=untied)
        merge(models.recipe(density=0.5), tmp_path / "out")
        whole = self.with_heads(models)
        assert_same_tensors(load_merged(tmp_path / "out"), merged_in_memory(whole, density=0.5))
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False

    def with_heads(self, models):
        """The same models with the heads spelled out that are tied."""
        embeddings = "model.embed_tokens.weight"
        order = lambda t: {n: t[n] for n in (*self.SHAPES, self.HEAD)}  # noqa: E731
        return ModelSet(
            models.root,
            order({self.HEAD: models.base[embeddings]} | models.base),
            [order({self.HEAD: e[embeddings]} | e) for e in models.experts],
            [order({self.HEAD: c[embeddings]} | c) for c in models.curvatures],
        )


class TestCurvatureFiles:
    """The same second moments in other clothes give the same model."""

    def put_suffixed(self, models, folder):
        for t, curvature in enumerate(models.curvatures):
            save_file({f"{n}.exp_avg_sq": v for n, v in curvature.items()}, folder / f"{t}.safetensors")
        return [folder / f"{t}.safetensors" for t in range(len(models.curvatures))]

    def put_sharded(self, models, folder):
        return [save_sharded(folder / str(t), c, 3) for t, c in enumerate(models.curvatures)]

    def put_torch(self, models, folder):
        files = [folder / f"{t}.pt" for t in range(len(models.curvatures))]
        for file, curvature in zip(files, models.curvatures, strict=True):
            torch.save({"state": {n: {"exp_avg_sq": v, "step": 7} for n, v in curvature.items()}}, file)
        return files

    @pytest.mark.parametrize("put", [put_suffixed, put_sharded, put_torch], ids=lambda put: put.__name__)
    def test_same_bytes(self, models, tmp_path, put):
        recipe = models.recipe(density=0.3)
        merge(recipe, tmp_path / "plain")
        for model, path in zip(recipe["models"], put(self, models, tmp_path), strict=True):
            model["parameters"]["preconditioner_path"] = str(path)
        merge(recipe, tmp_path / "out")
        assert model_digests(tmp_path / "out") == model_digests(tmp_path / "plain")

    def test_bias_correction_divides_by_what_the_metadata_says(self, models, tmp_path):
        # 1 - 0.5^1 is 1/2, and float32 doubles exactly: the same as storing 2 v.
        corrected = ModelSet(tmp_path, models.base, models.experts, models.curvatures).save()
        save_file(models.curvatures[1], corrected.curvature_files[1], metadata={"step": "1", "beta2": "0.5"})
        for t in (0, 2):
            # 0.5^60 is below float32's precision: divides by 1.
            save_file(
                models.curvatures[t], corrected.curvature_files[t], metadata={"step": "60", "beta2": "0.5"}
            )
        merge(corrected.recipe(precond_threshold=2e-16, bias_correction=True), tmp_path / "out")
        doubled = [dict(c) for c in models.curvatures]
        doubled[1] = {name: 2 * v for name, v in doubled[1].items()}
        found = load_merged(tmp_path / "out")
        kwargs = {"precond_threshold": 2e-16}
        assert_same_tensors(found, merge_state_dicts(models.base, models.experts, doubled, **kwargs))
        merge(corrected.recipe(precond_threshold=2e-16), tmp_path / "uncorrected")
        assert model_digests(tmp_path / "uncorrected") != model_digests(tmp_path / "out")

    @pytest.mark.parametrize("policy", ["uniform", "base"])
    def test_missing_curvature(self, models, tmp_path, policy):
        missing = {"layers.0.mlp.weight", "scale"}
        moments = [dict(c) for c in models.curvatures]
        moments[1] = {name: v for name, v in moments[1].items() if name not in missing}
        partial = ModelSet(tmp_path, models.base, models.experts, moments).save()
        parameters = {"density": 0.3, "missing_curvature": policy}
        report = merge(partial.recipe(**parameters), tmp_path / "out")
        found = load_merged(tmp_path / "out")
        assert_same_tensors(found, merged_in_memory(partial, **parameters))
        for name in missing:
            assert (raw(found[name]) == raw(models.base[name])) == (policy == "base")
        assert report["not_merged"].keys() == (missing if policy == "base" else set())

    def test_no_curvature_at_all(self, models, tmp_path):
        recipe = models.recipe(density=0.3, missing_curvature="uniform")
        for model in recipe["models"]:
            del model["parameters"]["preconditioner_path"]
        merge(recipe, tmp_path / "out")
        expected = merge_state_dicts(models.base, models.experts, density=0.3)
        assert_same_tensors(load_merged(tmp_path / "out"), expected)


def float32_scores(models: ModelSet) -> list[dict[str, np.ndarray]]:
    """Per expert and tensor, saliency h d^2 times 2^64 in float32."""
    found = []
    for expert, curvature in zip(models.experts, models.curvatures, strict=True):
        scores = {}
        for name, base in models.base.items():
            d = (expert[name].float() - base.float()).numpy() * np.float32(2.0**16)
            scores[name] = (curvature[name].float().numpy() * np.float32(2.0**32)) * (d * d)
        found.append(scores)
    return found


class TestReport:
    def recount(self, models, thresholds, report):
        """Assert kept, total, density and unkept against masks made here; thresholds: scores, per expert and
        tensor."""
        scores = float32_scores(models)
        total = sum(t.numel() for t in models.base.values())
        masks = [{n: s[n] >= thresholds[t][n] for n in s} for t, s in enumerate(scores)]
        for t, expert in enumerate(report["experts"]):
            kept = sum(int(m.sum()) for m in masks[t].values())
            assert 0 < kept < total
            assert (expert["kept"], expert["total"]) == (kept, total)
            assert expert["density"] == pytest.approx(kept / total)
            assert expert["model"] == str(models.expert_folders[t])
        unkept = 0
        for name, entry in report["tensors"].items():
            assert entry["elements"] == models.base[name].numel()
            assert entry["kept"] == [int(m[name].sum()) for m in masks]
            nobody = int((~np.logical_or.reduce([m[name] for m in masks])).sum())
            assert entry["unkept"] == nobody
            unkept += nobody
        assert report["unkept"] == unkept > 0
        assert report["tensors"].keys() == models.base.keys()

    def test_of_thresholds(self, models, tmp_path):
        thresholds = [2e-16, 1e-16, 5e-16]
        report = merge(models.recipe(precond_threshold=thresholds), tmp_path / "out")
        scores = [np.float32(theta * 2.0**64) for theta in thresholds]
        self.recount(models, [dict.fromkeys(models.base, s) for s in scores], report)
        assert [e["threshold"] for e in report["experts"]] == thresholds
        assert json.loads((tmp_path / "out" / "merge_report.json").read_text()) == report

    def test_of_a_density_over_the_model(self, models, tmp_path):
        report = merge(models.recipe(density=0.2), tmp_path / "out", tile_elements=100)
        thresholds = []
        for scores in float32_scores(models):
            flat = np.sort(np.concatenate([s.reshape(-1) for s in scores.values()]))
            thresholds.append(flat[flat.size - flat.size * 2 // 10])
        self.recount(models, [dict.fromkeys(models.base, s) for s in thresholds], report)
        assert [e["threshold"] * 2.0**64 for e in report["experts"]] == thresholds

    def test_of_a_density_over_each_tensor(self, models, tmp_path):
        report = merge(models.recipe(density=0.2, density_scope="tensor"), tmp_path / "out")
        thresholds = []
        for scores in float32_scores(models):
            own = {}
            for name, s in scores.items():
                k = s.size * 2 // 10
                own[name] = np.sort(s.reshape(-1))[s.size - k] if k else np.float32(np.inf)
            thresholds.append(own)
        self.recount(models, thresholds, report)
        for name, entry in report["tensors"].items():
            expected = [None if t[name] == np.inf else t[name] * 2.0**-64 for t in thresholds]
            assert entry["thresholds"] == expected
        assert {e["threshold"] for e in report["experts"]} == {None}  # they differ between tensors

    def test_of_a_merge_that_keeps_everything(self, models, tmp_path):
        report = merge(models.recipe(), tmp_path / "out")
        assert {(e["density"], e["threshold"]) for e in report["experts"]} == {(1.0, None)}
        assert report["unkept"] == 0

    @pytest.mark.parametrize("threshold", [1e19, 1e30, 3e38], ids=str)
    def test_of_a_threshold_beyond_every_score(self, models, tmp_path, threshold):
        report = merge(models.recipe(precond_threshold=threshold), tmp_path / "out")
        assert_same_tensors(load_merged(tmp_path / "out"), models.base)
        assert {(e["kept"], e["threshold"]) for e in report["experts"]} == {(0, threshold)}

    def test_of_saliencies_beyond_float32(self, models, tmp_path):
        moments = [{name: torch.full_like(v, 1e38) for name, v in c.items()} for c in models.curvatures]
        huge = ModelSet(tmp_path, models.base, models.experts, moments).save()
        report = merge(huge.recipe(density=0.5), tmp_path / "out")
        assert all(np.isfinite(e["threshold"]) for e in report["experts"])

    def test_of_how_it_ran(self, models, tmp_path):
        report = merge(models.recipe(density=0.2), tmp_path / "out", threads=2, tile_elements=1000)
        written = sum(p.stat().st_size for p in shard_files(tmp_path / "out"))
        elements = sum(t.numel() for t in models.base.values())
        one_pass = elements * (2 + 3 * (2 + 4))  # a bfloat16 base; three experts and their float32 curvature
        assert report["bytes_written"] == written
        assert (report["passes"], report["repeats"]) == (1, 0)
        assert report["bytes_read"] == one_pass
        assert (report["threads"], report["tile_elements"]) == (2, 1000)
        assert report["versions"]["numpy"] == np.__version__
        assert report["seconds"].keys() == {"survey", "merge", "sync"}
        assert all(seconds >= 0 for seconds in report["seconds"].values())
        assert report["resumed"] is False

    def test_of_values_that_the_output_type_cannot_hold(self, tmp_path, caplog):
        big = {"weight": torch.full((4,), 60_000.0)}
        models = ModelSet(tmp_path, {"weight": torch.zeros(4)}, [big], [{"weight": torch.ones(4)}]).save()
        recipe = models.recipe(**{"lambda": 2.0}) | {"dtype": "float16"}
        report = merge(recipe, tmp_path / "out")
        assert report["overflow"] == 4
        assert "4 merged values" in caplog.text

    def test_of_repaired_elements(self, models, tmp_path):
        broken = ModelSet(tmp_path, models.base, [dict(e) for e in models.experts], models.curvatures)
        name = "layers.0.mlp.weight"
        broken.experts[0][name] = broken.experts[0][name].clone()
        broken.experts[0][name][2, 3] = float("nan")
        report = merge(broken.save().recipe(density=0.4, on_nonfinite="base"), tmp_path / "out")
        found = load_merged(tmp_path / "out")[name]
        assert report["repaired"] == 1
        assert found[2, 3] == models.base[name][2, 3]
        assert torch.isfinite(found).all()


class TestFolder:
    """What lands in OUT, and what does not."""

    def make(self, root):
        models = make_set(root, config={"model_type": "toy", "torch_dtype": "bfloat16", "hidden_size": 16})
        (models.base_folder / "generation_config.json").write_text('{"max_new_tokens": 5}')
        vocabulary = {"model": {"type": "WordLevel", "vocab": {"a": 0}}}
        (models.base_folder / "tokenizer.json").write_text(json.dumps(vocabulary))
        (models.base_folder / "chat_template.jinja").write_text("{{ messages }}")
        (models.base_folder / "training_args.bin").write_bytes(b"not for the merged model")
        return models

    def test_holds_the_model_and_what_belongs_to_it(self, tmp_path):
        models = self.make(tmp_path)
        out = tmp_path / "merged" / "deep"
        merge(models.recipe(density=0.3) | {"dtype": "float32"}, out)
        assert set(os.listdir(out)) == {
            "README.md",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "merge_recipe.yaml",
            "merge_report.json",
            "model.safetensors",
            "tokenizer.json",
        }
        assert json.loads((out / "config.json").read_text()) == {
            "model_type": "toy",
            "torch_dtype": "float32",
            "hidden_size": 16,
        }
        for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
            assert (out / name).read_bytes() == (models.base_folder / name).read_bytes()
        card = (out / "README.md").read_text()
        assert all(folder.name in card for folder in models.expert_folders)
        assert "density: 0.3" in card

    def test_its_recipe_runs_again_to_the_same_bytes(self, tmp_path):
        models = self.make(tmp_path)
        merge(models.recipe_file(saliency_mass=0.8, normalise="model"), tmp_path / "first")
        recipe = tmp_path / "first" / "merge_recipe.yaml"
        merge(recipe, tmp_path / "second")
        assert model_digests(tmp_path / "second") == model_digests(tmp_path / "first")
        assert yaml.safe_load((tmp_path / "second" / "merge_recipe.yaml").read_text()) == yaml.safe_load(
            recipe.read_text()
        )

    def test_nothing_is_left_beside_it_and_the_inputs_are_as_before(self, tmp_path):
        models = self.make(tmp_path / "inputs")
        before = digests(models.root)
        (tmp_path / "place").mkdir()
        merge(models.recipe(density=0.3), tmp_path / "place" / "out")
        assert os.listdir(tmp_path / "place") == ["out"]
        assert digests(models.root) == before

    def test_an_empty_folder_may_be_there_already(self, models, tmp_path):
        (tmp_path / "out").mkdir()
        merge(models.recipe(), tmp_path / "out")
        assert load_merged(tmp_path / "out").keys() == SHAPES.keys()
        assert os.listdir(tmp_path) == ["out"]

    def test_a_link_to_a_folder_is_followed(self, models, tmp_path):
        (tmp_path / "disk" / "real").mkdir(parents=True)
        (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
        merge(models.recipe(), tmp_path / "out")
        assert load_merged(tmp_path / "disk" / "real").keys() == SHAPES.keys()
        assert (tmp_path / "out").is_symlink()
        assert os.listdir(tmp_path / "disk") == ["real"]

    def test_overwrite_replaces_the_folder_and_its_stale_files(self, models, tmp_path):
        merge(models.recipe(), tmp_path / "out", shard_size=1000)
        (tmp_path / "out" / "notes.txt").write_text("of the former model")
        merge(models.recipe(density=0.3), tmp_path / "out", overwrite=True)
        merge(models.recipe(density=0.3), tmp_path / "new")
        assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "new"))
        assert model_digests(tmp_path / "out") == model_digests(tmp_path / "new")
        assert sorted(os.listdir(tmp_path)) == ["new", "out"]

    def test_a_relative_output_starts_at_the_current_folder(self, models, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        merge(models.recipe(), "out")
        assert load_merged(tmp_path / "out").keys() == SHAPES.keys()


class Recorder:
    """A Progress that notes what it is told."""

    def __init__(self):
        self.stages, self.advanced = [], []

    def stage(self, name, total_bytes):
        self.stages.append((name, total_bytes))

    def advance(self, nbytes):
        self.advanced.append(nbytes)


def test_progress_reaches_its_total(models, tmp_path):
    recorder = Recorder()
    merge(models.recipe(density=0.3), tmp_path / "out", progress=recorder, tile_elements=100)
    assert [name for name, _ in recorder.stages] == ["survey", "merge", "sync"]
    elements = sum(t.numel() for t in models.base.values())
    assert dict(recorder.stages)["merge"] == sum(recorder.advanced) == elements * (2 + 3 * (2 + 4))


def open_files() -> tuple[int, int]:
    """Descriptors of this process, and maps of safetensors files."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    return len(os.listdir("/proc/self/fd")), sum(line.endswith(".safetensors") for line in maps)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
class TestLeaks:
    def test_a_merge_leaves_no_descriptor_and_no_map(self, models, tmp_path):
        before = open_files()
        merge(models.recipe(density=0.3, rank1_approx=True), tmp_path / "out", shard_size=1000)
        job.plan(models.recipe())
        assert open_files() == before

    def test_inputs_are_closed_at_once(self, models, tmp_path):
        """Not when Python's collector looks for circles of references."""
        before = open_files()
        gc.disable()
        try:
            merge(models.recipe(density=0.3, rank1_approx=True), tmp_path / "out")
            assert len(os.listdir("/proc/self/fd")) == before[0]
        finally:
            gc.enable()

    def test_neither_does_a_merge_that_fails(self, models, tmp_path):
        broken = ModelSet(tmp_path, models.base, [dict(e) for e in models.experts], models.curvatures)
        broken.experts[2]["scale"] = torch.tensor(float("inf"), dtype=torch.bfloat16)
        recipe = broken.save().recipe(density=0.3)
        short = models.recipe() | {"base_model": str(tmp_path / "nothing")}
        before = open_files()
        for bad in (recipe, short):
            with pytest.raises(InputError):
                merge(bad, tmp_path / "out")
        with pytest.raises(job.OutputError):
            merge(models.recipe(), models.root)
        assert open_files() == before


def test_a_density_that_zero_saliencies_cannot_fill_is_said(tmp_path, caplog):
    """Half of the moments are 0: a density of 0.7 keeps the other half, and says what is missing."""
    models = make_set(tmp_path / "models", {"w": (10, 20)}, experts=2)
    models.curvatures[0]["w"].view(-1)[::2] = 0.0
    models.save()
    report = merge(models.recipe(density=0.7), tmp_path / "out")
    first, second = report["experts"]
    edits = models.experts[0]["w"].double() - models.base["w"].double()
    salient = int(((edits != 0) & (models.curvatures[0]["w"] > 0)).sum())
    assert (first["kept"], first["missing"]) == (salient, 140 - salient)
    assert second["missing"] == 0
    assert (
        f"asks for {140 - salient} edits more than the {salient} that have a saliency above 0" in caplog.text
    )
