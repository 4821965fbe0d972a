"""Hostile files: whatever stands in a folder, a recipe or a journal, only this package's errors come out.

OTA_FUZZ=5000 takes so many examples of each kind, other ones every time; without it a few, always the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import save_model, write_recipe
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jobs import Interrupt, merge
from safetensors.torch import save_file

from ota_kernels import InputError, OtaError, plan
from ota_kernels.io.reader import Checkpoint
from ota_kernels.io.sizes import MAX_JSON_BYTES
from ota_kernels.run.rules import Rules

FUZZ = int(os.environ.get("OTA_FUZZ", 0))
FILES = {
    "header": "a/model-00001-of-00002.safetensors",
    "moments": "v.safetensors",
    "index": "a/model.safetensors.index.json",
    "config": "a/config.json",
    "tokenizer": "a/tokenizer.json",
    "tokenizer config": "a/tokenizer_config.json",
    "generation config": "a/generation_config.json",
    "adapter config": "lora/adapter_config.json",
    "adapter": "lora/adapter_model.safetensors",
    "recipe": "recipe.yaml",
}
HOSTILE = st.recursive(
    st.sampled_from(
        [None, True, False, 0, -1, 1 << 62, 1 << 70, 1e308, float("nan"), "", "../../x", "\0", "\ud800"]
    )
    | st.integers(-3, 70)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def build(root: Path) -> None:
    """Two models and an adapter, an index, moments and a recipe that names all."""
    q = "model.layers.0.self_attn.q_proj"
    shapes = {"model.embed_tokens.weight": (10, 4), f"{q}.weight": (6, 4), "model.norm.weight": (4,)}
    tensors = {name: torch.full(shape, 0.5) for name, shape in shapes.items()}
    config = {"model_type": "llama", "vocab_size": 10, "tie_word_embeddings": True, "architectures": ["X"]}
    vocabulary = {letter: i for i, letter in enumerate("abcdefgh")}
    tokens = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    for name in "ab":
        folder = save_model(root / name, tensors, shards=2, config=config)
        (folder / "tokenizer.json").write_text(json.dumps(tokens))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "X", "bos_token": "a"}))
        (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "max_length": 20}))
    (root / "lora").mkdir()
    adapter = {
        f"base_model.model.{q}.lora_A.weight": torch.ones(2, 4),
        f"base_model.model.{q}.lora_B.weight": torch.ones(6, 2),
    }
    save_file(adapter, root / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (root / "lora" / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: torch.full(shape, 1e-8) for name, shape in shapes.items()}, root / "v.safetensors")
    own = {"preconditioner_path": "./v.safetensors"}
    models = [
        {"model": "./a", "parameters": own | {"density": 0.5}},
        {"model": "./b+./lora", "parameters": own | {"scaling_factor": [1, 2]}},
    ]
    recipe = {"merge_method": "ota", "base_model": "./b", "models": models, "dtype": "float32"}
    recipe |= {"tokenizer": {"source": "union", "tokens": {"a": {"source": "./a", "force": True}}}}
    write_recipe(root / "recipe.yaml", recipe)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    root = tmp_path_factory.mktemp("healthy")
    build(root)
    assert plan(root / "recipe.yaml").tensors == 3
    return root


def examples(test):
    few = settings(
        max_examples=FUZZ or 8,
        derandomize=not FUZZ,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),  # a busy machine is slow
        phases=[Phase.generate],  # an example is small, and says all: nothing is to be shrunk
    )
    return few(test)


def change_bytes(content: bytes, dice: random.Random) -> bytes:
    """A few bytes flipped, cut out, doubled, or a cut end."""
    data = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        if not data:
            break
        begin = dice.randrange(min(len(data), dice.choice([12, 400, len(data)])))
        end = min(len(data), begin + dice.randint(0, 9))
        how = dice.randrange(5)
        if how == 0:
            data[begin] ^= 1 << dice.randrange(8)
        elif how == 1:
            del data[begin:end]
        elif how == 2:
            data[begin:begin] = data[begin:end]
        elif how == 3:
            data[begin] = dice.choice(b'\0\xff{}[]",:0-\n')
        else:
            del data[begin:]
    return bytes(data)


def changed(value, hostile, dice: random.Random):
    """With something hostile in one place of a JSON value."""
    if dice.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return hostile
    if isinstance(value, dict):
        key = dice.choice(sorted(value, key=str))
        how = dice.randrange(4)
        rest = {k: v for k, v in value.items() if k != key}
        if how == 0:
            return rest
        if how == 1 and not isinstance(hostile, dict | list):
            return rest | {str(hostile): value[key]}
        return value | {key: changed(value[key], hostile, dice)}
    place = dice.randrange(len(value))
    return [changed(x, hostile, dice) if i == place else x for i, x in enumerate(value)]


def spoil(path: Path, hostile, seed: int) -> None:
    """Change a file: by bytes, or by what stands in it."""
    dice, content = random.Random(seed), path.read_bytes()
    if dice.random() < 0.4:
        path.write_bytes(change_bytes(content, dice))
    elif path.suffix == ".safetensors":
        (size,) = struct.unpack("<Q", content[:8])
        header = json.dumps(changed(json.loads(content[8 : 8 + size]), hostile, dice)).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
    elif path.suffix == ".yaml":
        whole = changed(yaml.safe_load(content), hostile, dice)
        path.write_bytes(json.dumps(whole).encode())  # which is YAML
    else:
        path.write_bytes(json.dumps(changed(json.loads(content), hostile, dice)).encode())


@pytest.mark.parametrize("kind", FILES)
def test_whatever_stands_in_a_file(healthy, kind):
    @examples
    @given(HOSTILE, st.integers(0, 1 << 32))
    def check(hostile, seed):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "set"
            shutil.copytree(healthy, root)
            spoil(root / FILES[kind], hostile, seed)
            before = sorted(os.listdir(root.parent))
            with contextlib.suppress(OtaError):
                plan(root / "recipe.yaml")
            assert sorted(os.listdir(root.parent)) == before  # nothing has left the folder

    check()


@pytest.fixture
def unfinished(healthy, tmp_path):
    """A merge that was stopped, with elements that wait; its work folder lies in `kept`, too."""
    root = tmp_path / "set"
    shutil.copytree(healthy, root)
    stop = Rules(before=Interrupt("tile", 3), direct=1)
    with pytest.raises(KeyboardInterrupt):
        merge(root / "recipe.yaml", root / "out", stop, tile_elements=16, candidates_memory=0, threads=1)
    shutil.copytree(root / ".out.ota-merge", root / "kept")
    merge(root / "recipe.yaml", root / "expected")
    return root


def test_whatever_stands_in_a_journal(unfinished):
    """Damage is found by checksums: the merge goes on from before it, to the same bytes."""
    root, work = unfinished, unfinished / ".out.ota-merge"

    def shards(name):
        return [p.read_bytes() for p in sorted((root / name).glob("*.safetensors"))]

    @examples
    @given(st.integers(0, 1 << 32))
    def check(seed):
        for folder in (root / "out", work):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(root / "kept", work)
        journal = work / "journal.jsonl"
        journal.write_bytes(change_bytes(journal.read_bytes(), random.Random(seed)))
        merge(root / "recipe.yaml", root / "out", resume=True)
        assert shards("out") == shards("expected")

    check()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_json_that_is_too_large_is_not_read(healthy, tmp_path, name):
    shutil.copytree(healthy, tmp_path / "set")
    os.truncate(tmp_path / "set" / "a" / name, MAX_JSON_BYTES + 1)
    with pytest.raises(InputError, match=rf"{name}.* bytes are more than"):
        plan(tmp_path / "set" / "recipe.yaml")


def test_names_of_hostile_models_are_escaped_in_card_and_report(tmp_path):
    name = "<script>|x`y](http://z)"
    tensors = {'w"\\\n<b>': torch.ones(3, 4), "v": torch.ones(2)}
    for model in (name, "other"):
        save_model(tmp_path / model, tensors)
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path / m)} for m in (name, "other")]}
    recipe["parameters"] = {"weight": 1.0}
    merge(recipe, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert set(report["tensors"]) == set(tensors)
    table = (tmp_path / "out" / "README.md").read_text().split("## Recipe")[0]
    for dangerous in ("<script>|", "`y]", "](http"):
        assert dangerous not in table
    assert set(Checkpoint.open(tmp_path / "out", "merged").tensors) == set(tensors)
