"""Folders of several models: sentence-transformers stacks and diffusers pipelines, merged part by part; and
the names of weight files, which stay."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import random_tensors, save_model
from safetensors.torch import load_file, save_file

from ota_kernels import InputError, merge, plan

BERT = {"embeddings.word_embeddings.weight": (12, 4), "encoder.layer.0.output.dense.weight": (4, 4)}
DENSE = {"linear.weight": (3, 4), "linear.bias": (3,)}
UNET = {"conv_in.weight": (4, 3, 1, 1), "mid.w": (4, 4)}


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def stack(root, seed, modules=("", "1_Pooling", "2_Dense")):
    """A sentence-transformers model; its tensors by file."""
    weights = {"": random_tensors(BERT, seed), "2_Dense": random_tensors(DENSE, seed + 9)}
    save_model(root, weights[""], config={"model_type": "bert", "torch_dtype": "float32"})
    (root / "2_Dense").mkdir()
    save_file(weights["2_Dense"], root / "2_Dense" / "model.safetensors")
    put(root / "modules.json", [{"idx": i, "path": path, "type": "x"} for i, path in enumerate(modules)])
    put(root / "1_Pooling" / "config.json", {"pooling_mode_cls_token": True})
    put(root / "2_Dense" / "config.json", {"in_features": 4, "out_features": 3})
    put(root / "config_sentence_transformers.json", {})
    put(root / "sentence_bert_config.json", {"max_seq_length": 12})
    return weights


def pipeline(root, seed):
    weights = {"unet": random_tensors(UNET, seed), "text_encoder": random_tensors(BERT, seed + 9)}
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        put(root / part / "config.json", {"_class_name": part, "torch_dtype": "float32"})
        save_file(weights[part], root / part / f"{stem}.safetensors")
    put(root / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    put(root / "scheduler" / "scheduler_config.json", {"beta_start": 0.1})
    put(root / "tokenizer" / "vocab.json", {"a": 0})
    return weights


def linear(root, *names, **more):
    return {"merge_method": "linear", "models": [{"model": str(root / name)} for name in names]} | more


def check_mean(path, *models):
    found = load_file(path)
    assert found.keys() == models[0].keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, sum(m[name] for m in models) / len(models), rtol=0, atol=1e-7)


def test_a_sentence_transformers_model_is_merged_module_by_module(tmp_path):
    a, b = stack(tmp_path / "a", 1), stack(tmp_path / "b", 2)
    report = merge(linear(tmp_path, "a", "b", dtype="float32"), tmp_path / "out")
    check_mean(tmp_path / "out" / "model.safetensors", a[""], b[""])
    check_mean(tmp_path / "out" / "2_Dense" / "model.safetensors", a["2_Dense"], b["2_Dense"])
    copied = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
    for name in (*copied, "1_Pooling/config.json", "2_Dense/config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads(
            (tmp_path / "a" / name).read_text()
        )
    assert set(report["tensors"]) == {*BERT, *(f"2_Dense/{name}" for name in DENSE)}
    assert report["notes"] == []


def test_a_transformer_in_a_folder_of_its_own(tmp_path):
    for seed, name in enumerate("ab"):
        stack(tmp_path / name, seed, ("0_Transformer", "1_Pooling"))
        (tmp_path / name / "0_Transformer").mkdir()
        (tmp_path / name / "model.safetensors").rename(
            tmp_path / name / "0_Transformer" / "model.safetensors"
        )
    merge(linear(tmp_path, "a", "b"), tmp_path / "out")
    assert load_file(tmp_path / "out" / "0_Transformer" / "model.safetensors").keys() == BERT.keys()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_module_with_weights_in_another_format_is_refused(tmp_path):
    for seed, name in enumerate("ab"):
        stack(tmp_path / name, seed)
        (tmp_path / name / "2_Dense" / "model.safetensors").rename(
            tmp_path / name / "2_Dense" / "consolidated.00.pth"
        )
    with pytest.raises(InputError, match=r"2_Dense holds consolidated\.00\.pth: convert it to safetensors"):
        plan(linear(tmp_path, "a", "b"))


@pytest.mark.parametrize("path", ["../x", "/etc", "a\\b", 3])
def test_modules_stay_inside(tmp_path, path):
    for seed, name in enumerate("ab"):
        stack(tmp_path / name, seed, ("", path))
    with pytest.raises(InputError, match=r"modules\.json: the path .* leaves the folder"):
        plan(linear(tmp_path, "a", "b"))


def test_a_module_whose_weights_are_missing_is_refused(tmp_path):
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    for seed, name in enumerate("ab"):
        stack(tmp_path / name, seed)
        modules = [
            {"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()
        ]
        put(tmp_path / name / "modules.json", modules)
    assert plan(linear(tmp_path, "a", "b")).tensors == len(BERT) + len(DENSE)
    for name in "ab":
        (tmp_path / name / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"incomplete: modules\.json names 2_Dense \(Dense\), which holds no"
    ):
        plan(linear(tmp_path, "a", "b"))


def test_a_component_whose_weights_are_missing_is_refused(tmp_path):
    index = {
        "_class_name": "X",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
    }
    for seed, name in enumerate("ab"):
        pipeline(tmp_path / name, seed)
        put(tmp_path / name / "model_index.json", index)
    with pytest.raises(InputError, match=r"incomplete: model_index\.json names vae \(AutoencoderKL\)"):
        plan(linear(tmp_path, "a", "b"))


def test_a_stack_and_a_plain_model_do_not_fit(tmp_path):
    stack(tmp_path / "a", 1)
    save_model(tmp_path / "b", random_tensors(BERT, 2), config={"model_type": "bert"})
    with pytest.raises(InputError, match=r"has no tensor 2_Dense/linear\.(weight|bias)"):
        plan(linear(tmp_path, "a", "b"))


def test_a_pipeline_is_merged_component_by_component(tmp_path):
    a, b = pipeline(tmp_path / "a", 1), pipeline(tmp_path / "b", 2)
    merge(linear(tmp_path, "a", "b", dtype="float32"), tmp_path / "out")
    unet = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"
    check_mean(unet, a["unet"], b["unet"])
    check_mean(tmp_path / "out" / "text_encoder" / "model.safetensors", a["text_encoder"], b["text_encoder"])
    for name in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_the_configuration_of_each_component_states_its_type(tmp_path):
    for seed, name in enumerate("ab"):
        pipeline(tmp_path / name, seed)
    merge(linear(tmp_path, "a", "b", dtype="bfloat16"), tmp_path / "out")
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        assert json.loads((tmp_path / "out" / part / "config.json").read_text())["torch_dtype"] == "bfloat16"
        tensors = load_file(tmp_path / "out" / part / f"{stem}.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "torch_dtype" not in (tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text()


def test_components_of_another_kind_are_refused(tmp_path):
    for seed, name in enumerate("ab"):
        pipeline(tmp_path / name, seed)
    put(tmp_path / "b" / "text_encoder" / "config.json", {"hidden_act": "quick_gelu", "model_type": "clip"})
    put(tmp_path / "a" / "text_encoder" / "config.json", {"hidden_act": "gelu", "model_type": "clip"})
    with pytest.raises(InputError, match="text_encoder: hidden_act: 'gelu' in"):
        plan(linear(tmp_path, "a", "b"))


def test_parts_in_shards_have_an_index_each(tmp_path):
    a, b = pipeline(tmp_path / "a", 1), pipeline(tmp_path / "b", 2)
    merge(linear(tmp_path, "a", "b"), tmp_path / "out", shard_size=64)
    folder = tmp_path / "out" / "unet"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == UNET.keys()
    for name, file in index["weight_map"].items():
        found = load_file(folder / file)[name]
        torch.testing.assert_close(found, (a["unet"][name] + b["unet"][name]) / 2, rtol=0, atol=1e-7)
    # What was written is a pipeline again.
    again = merge(linear(tmp_path, "out", "out"), tmp_path / "again")
    check_mean(tmp_path / "again" / "unet" / "diffusion_pytorch_model.safetensors", a["unet"], b["unet"])
    assert again["left_out"] == {}


@pytest.mark.parametrize(
    ("file", "written"),
    [
        ("model", "model"),
        ("diffusion_pytorch_model", "diffusion_pytorch_model"),
        ("diffusion_pytorch_model.fp16", "diffusion_pytorch_model.fp16"),
        ("consolidated", "consolidated"),
        ("flux1-dev", "flux1-dev"),
    ],
)
def test_a_folder_keeps_the_name_of_its_weights(tmp_path, file, written):
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        save_file(random_tensors(UNET, seed), tmp_path / name / f"{file}.safetensors")
    merge(linear(tmp_path, "a", "b"), tmp_path / "out")
    assert load_file(tmp_path / "out" / f"{written}.safetensors").keys() == UNET.keys()


def test_a_file_becomes_a_model(tmp_path):
    for seed, name in enumerate("ab"):
        save_file(random_tensors(UNET, seed), tmp_path / f"{name}.safetensors")
    merge(linear(tmp_path, "a.safetensors", "b.safetensors"), tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == UNET.keys()


def test_custom_code_is_copied_where_it_is_told_and_named_otherwise(tmp_path):
    for seed, name in enumerate("ab"):
        save_model(
            tmp_path / name, random_tensors(UNET, seed), config={"auto_map": {"AutoModel": "modeling_x.X"}}
        )
        put(tmp_path / name / "modeling_x.py", "class X: pass")
    report = merge(linear(tmp_path, "a", "b"), tmp_path / "out")
    assert not (tmp_path / "out" / "modeling_x.py").exists()
    assert any("modeling_x.py" in note for note in report["notes"])
    report = merge(linear(tmp_path, "a", "b"), tmp_path / "told", trust_remote_code=True)
    assert (tmp_path / "told" / "modeling_x.py").read_text() == "class X: pass"
    assert report["notes"] == []


class Stopped:
    """A progress at which somebody loses patience."""

    def stage(self, name, total_bytes):
        pass

    def advance(self, nbytes):
        if nbytes:
            raise KeyboardInterrupt


def test_a_stopped_merge_of_a_pipeline_goes_on(tmp_path):
    for seed, name in enumerate("ab"):
        pipeline(tmp_path / name, seed)
    recipe = linear(tmp_path, "a", "b")
    with pytest.raises(KeyboardInterrupt):
        merge(recipe, tmp_path / "out", progress=Stopped(), shard_size=64)
    assert not (tmp_path / "out").exists()
    assert merge(recipe, tmp_path / "out", resume=True, shard_size=64)["resumed"]
    merge(recipe, tmp_path / "whole", shard_size=64)
    files = {p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.safetensors*")}
    assert len(files) > 4
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
