"""What folders and files are: kinds that are no models, incomplete and ambiguous weights, pointers."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import random_tensors, save_model, save_sharded
from safetensors.torch import save_file

from ota_kernels import InputError, plan
from ota_kernels.io import folder as folders
from ota_kernels.io.header import read_header
from ota_kernels.io.reader import open_model

TENSORS = random_tensors({"model.layers.0.w": (4, 3), "model.norm.weight": (3,)}, 0)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4943162336\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body></body></html>\n" * 20


def refusal(path, label=None) -> str:
    with pytest.raises(InputError) as caught:
        open_model(path, label or str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(folder: Path, **files: bytes | str | dict) -> Path:
    """Files by name, `__` standing for a dot."""
    folder.mkdir(exist_ok=True)
    for key, content in files.items():
        content = json.dumps(content) if isinstance(content, dict) else content
        data = content.encode() if isinstance(content, str) else content
        (folder / key.replace("__", ".")).write_bytes(data)
    return folder


class TestKinds:
    @pytest.mark.parametrize(
        ("config", "named"),
        [
            ({"peft_type": "LORA", "r": 4}, "a LoRA adapter"),
            ({"peft_type": "IA3"}, "an IA3 adapter"),
            ({"peft_type": "VERA"}, "a VERA adapter"),
            (None, "a LoRA adapter"),
        ],
    )
    def test_an_adapter(self, tmp_path, config, named):
        save_file(
            {"base_model.model.q.lora_A.weight": torch.ones(2, 3)}, tmp_path / "adapter_model.safetensors"
        )
        if config:
            write(tmp_path, adapter_config__json=config)
        assert folders.contents_of(tmp_path, "x").kind == folders.ADAPTER
        assert f"is {named}, not a full model: merge it into its base model" in refusal(tmp_path)

    @pytest.mark.parametrize("file", ["adapter_model.bin", "pytorch_lora_weights.safetensors"])
    def test_an_adapter_by_its_file_alone(self, tmp_path, file):
        save_file({"unet.q.lora.up.weight": torch.ones(2, 3)}, tmp_path / file)
        assert "a LoRA adapter, not a full model" in refusal(tmp_path)

    @pytest.mark.parametrize(
        ("named", "names"),
        [
            ("a LoRA adapter", ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight")),
            ("a LoRA adapter", ("lora_unet_mid.lora_down.weight", "lora_unet_mid.lora_up.weight", "q.alpha")),
            ("a LoHa or LoKr adapter", ("q.hada_w1_a", "q.hada_w1_b", "q.alpha")),
            ("an OFT adapter", ("base_model.model.q.oft_R",)),
            ("an IA3 adapter", ("base_model.model.mlp.ia3_l",)),
            (
                "a LoRA adapter of a ControlNet",
                ("lora_controlnet", "input_blocks.0.up", "input_blocks.0.down"),
            ),
            ("the embeddings of a prompt", ("prompt_embeddings",)),
            ("the embeddings of new tokens", ("emb_params",)),
            ("the embeddings of new tokens", ("clip_l", "clip_g")),
        ],
    )
    def test_a_file_that_is_no_model_by_the_names_of_its_tensors(self, tmp_path, named, names):
        path = tmp_path / "model.safetensors"
        save_file({name: torch.ones(2, 2) for name in names}, path)
        assert named in refusal(path)
        assert named in refusal(tmp_path)

    def test_a_model_beside_an_adapter_is_a_model(self, tmp_path):
        save_model(tmp_path, TENSORS)
        save_file({"q.lora_A.weight": torch.ones(2, 3)}, tmp_path / "adapter_model.safetensors")
        write(tmp_path, adapter_config__json={"peft_type": "LORA"})
        assert open_model(tmp_path, "x").tensors.keys() == TENSORS.keys()

    def test_a_model_with_a_few_names_like_an_adapter_is_a_model(self, tmp_path):
        save_model(tmp_path, TENSORS | {"attn.alpha": torch.ones(1)})
        assert "attn.alpha" in open_model(tmp_path, "x").tensors

    @pytest.mark.parametrize(
        "name", ["optimizer.pt", "optimizer_0.bin", "bf16_zero_pp_rank_0_optim_states.pt", "__0_0.distcp"]
    )
    def test_optimizer_states(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"\x80\x02")
        message = refusal(tmp_path)
        assert "optimizer states, not a model" in message
        assert "moments extract" in message

    def test_second_moments_in_place_of_weights(self, tmp_path):
        path = tmp_path / "v.safetensors"
        save_file({f"{n}.exp_avg_sq": t for n, t in TENSORS.items()}, path)
        assert "optimizer states, not a model" in refusal(path)

    @pytest.mark.parametrize(
        ("file", "fact"),
        [
            ("model-q4_k.gguf", "only GGUF files (llama.cpp): give the safetensors model"),
            ("model.onnx", "only ONNX files"),
            ("tf_model.h5", "only Keras files"),
            ("flax_model.msgpack", "only Flax files"),
            ("consolidated.00.pth", "only consolidated.00.pth: convert it to safetensors"),
            ("pytorch_model.bin", "pytorch_model.bin: not a complete, uncompressed torch file"),
        ],
    )
    def test_other_formats(self, tmp_path, file, fact):
        write(tmp_path, config__json={"model_type": "llama"})
        (tmp_path / file).write_bytes(b"x")
        assert fact in refusal(tmp_path)

    def test_a_file_of_another_format(self, tmp_path):
        (tmp_path / "x.gguf").write_bytes(b"GGUF")
        assert "GGUF files (llama.cpp): give the safetensors model" in refusal(tmp_path / "x.gguf")

    def test_a_folder_of_checkpoints_names_them(self, tmp_path):
        for step in (500, 1000):
            save_model(tmp_path / f"checkpoint-{step}", TENSORS)
        assert "its folders checkpoint-1000, checkpoint-500 do: name one" in refusal(tmp_path)

    def test_plan_says_so_too(self, tmp_path):
        save_model(tmp_path / "a", TENSORS)
        save_file({"q.lora_A.weight": torch.ones(2, 3)}, write(tmp_path / "b") / "adapter_model.safetensors")
        models = [{"model": str(tmp_path / name)} for name in "ab"]
        with pytest.raises(InputError, match=r"b: is a LoRA adapter"):
            plan({"merge_method": "linear", "models": models})

    def test_a_label_that_is_the_path_is_said_once(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        assert refusal(Path("empty"), "empty") == "empty: holds no .safetensors file"
        assert refusal(tmp_path / "empty", "empty").count("empty") == 1
        assert refusal(Path("empty"), "models[1]") == "models[1]: empty: holds no .safetensors file"


class TestCompleteness:
    def sharded(self, folder, count=3, index=False):
        save_sharded(folder, random_tensors({f"layers.{i}.w": (2, 2) for i in range(count)}, 1), count)
        if not index:
            (folder / "model.safetensors.index.json").unlink()
        return folder

    @pytest.mark.parametrize("missing", [(1,), (2,), (3,), (1, 3)], ids=str)
    def test_shards_missing_without_an_index(self, tmp_path, missing):
        self.sharded(tmp_path)
        names = [f"model-{i:05d}-of-00003.safetensors" for i in missing]
        for name in names:
            (tmp_path / name).unlink()
        message = refusal(tmp_path)
        assert f"incomplete: file names say 3 shards, {3 - len(missing)} are there" in message
        assert ", ".join(names) in message

    def test_shards_that_are_counted_from_0(self, tmp_path):
        for i in range(2):
            save_file({f"w{i}": torch.ones(2)}, tmp_path / f"model-0000{i}-of-00002.safetensors")
        assert open_model(tmp_path, "x").tensors.keys() == {"w0", "w1"}
        (tmp_path / "model-00001-of-00002.safetensors").unlink()
        assert "missing: model-00001-of-00002.safetensors" in refusal(tmp_path)

    @pytest.mark.parametrize("stem", ["weights", "diffusion_pytorch_model"])
    def test_of_other_names_too(self, tmp_path, stem):
        save_file(TENSORS, tmp_path / f"{stem}-00001-of-00002.safetensors")
        assert f"missing: {stem}-00002-of-00002.safetensors" in refusal(tmp_path)

    def test_all_there_without_an_index(self, tmp_path):
        assert len(open_model(self.sharded(tmp_path), "x").tensors) == 3

    def test_a_shard_that_the_index_names_and_a_part_of_it(self, tmp_path):
        self.sharded(tmp_path, index=True)
        shard = tmp_path / "model-00002-of-00003.safetensors"
        shard.rename(f"{shard}.part")
        message = refusal(tmp_path)
        assert "names shard 'model-00002-of-00003.safetensors', which is missing" in message
        assert "model-00002-of-00003.safetensors.part is of a download that was not finished" in message

    def test_the_leavings_of_the_hub(self, tmp_path):
        (tmp_path / ".cache/huggingface/download").mkdir(parents=True)
        (tmp_path / ".cache/huggingface/download/x.incomplete").write_bytes(b"")
        assert "x.incomplete is of a download that was not finished" in refusal(tmp_path)
        save_model(tmp_path, TENSORS)  # complete: old leavings are no matter
        assert open_model(tmp_path, "x").tensors.keys() == TENSORS.keys()

    def test_a_control_file_of_aria2(self, tmp_path):
        save_model(tmp_path, TENSORS)
        (tmp_path / "model.safetensors.aria2").write_bytes(b"")
        assert "the download of model.safetensors was not finished" in refusal(tmp_path)

    @pytest.mark.parametrize("index", [False, True], ids=["shards", "index"])
    def test_two_sets_side_by_side(self, tmp_path, index):
        self.sharded(tmp_path, index=index)
        save_file(TENSORS, tmp_path / "model.safetensors")
        assert "holds two sets of weights, model.safetensors and model" in refusal(tmp_path)
        assert open_model(tmp_path / "model.safetensors", "x").tensors.keys() == TENSORS.keys()

    def test_shards_of_two_sets(self, tmp_path):
        self.sharded(tmp_path, 3)
        self.sharded(tmp_path, 2)
        assert "shards of two sets of weights, of 00002 and of 00003" in refusal(tmp_path)
        self.sharded(tmp_path, 2, index=True)  # an index says which
        assert len(open_model(tmp_path, "x").tensors) == 2

    def test_files_of_other_tools_are_passed_over(self, tmp_path):
        self.sharded(tmp_path)
        save_file({"layers.0.w": torch.zeros(2, 2)}, tmp_path / "consolidated.safetensors")
        assert len(open_model(tmp_path, "x").tensors) == 3


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 600)
    return buffer.getvalue()


STAND_INS = {
    "lfs": (LFS, "a Git LFS pointer, not the file it stands for: run `git lfs pull`"),
    "annex": (b"/annex/objects/SHA256E-s12--abc.safetensors\n", "a git-annex pointer"),
    "html": (HTML, "an HTML page"),
    "html after a mark": (b"\xef\xbb\xbf\n<html>" + HTML, "an HTML page"),
}
INSTEAD = STAND_INS | {
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 600, "a GGUF file"),
    "torch": (zipped(), "a zip archive, as torch.save writes"),
    "gzip": (gzip.compress(b"x" * 999), "a gzip archive"),
    "numpy": (b"\x93NUMPY\x01\0" + b"\0" * 600, "a NumPy array"),
    "zeros": (b"\0" * 4096, "4096 bytes that begin with zeros: a download that was not finished"),
    "text": (b"Invalid username or password.", "a text file (it begins 'Invalid username or password.')"),
    "json": (b'{"error": "Entry not found"}', "a text file"),
}


@pytest.mark.parametrize(("content", "fact"), INSTEAD.values(), ids=INSTEAD.keys())
def test_weights_that_are_something_else(tmp_path, content, fact):
    save_model(tmp_path, TENSORS)
    (tmp_path / "model.safetensors").write_bytes(content)
    message = refusal(tmp_path)
    assert f"{tmp_path / 'model.safetensors'}: is {fact}" in message


@pytest.mark.parametrize("size", [0x280, 0x480, 0x4B50])
def test_a_header_whose_length_looks_like_another_format_is_read(tmp_path, size):
    """Its first bytes are those of a pickle, or of a zip archive."""
    text = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(size)
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", size) + text + b"\1")
    assert read_header(path).tensors["w"].shape == (1,)


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "tokenizer.model", "generation_config.json"]
)
@pytest.mark.parametrize(("content", "fact"), STAND_INS.values(), ids=STAND_INS.keys())
def test_stand_ins_are_never_copied(tmp_path, file, content, fact):
    for name in "ab":
        save_model(tmp_path / name, TENSORS, config={"model_type": "x"})
    (tmp_path / "a" / file).write_bytes(content)
    models = [{"model": str(tmp_path / name)} for name in "ab"]
    with pytest.raises(InputError) as caught:
        plan({"merge_method": "linear", "models": models})
    assert f"{tmp_path / 'a' / file} is {fact}" in str(caught.value)


def test_metadata_of_null_is_none(tmp_path):
    header = {"__metadata__": None, "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + np.ones(2, np.float32).tobytes())
    assert read_header(path).metadata == {}
