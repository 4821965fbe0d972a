"""mergekit's own program with and without these methods in it. Runs where mergekit is installed:
`bash tools/test_mergekit.sh` makes an environment with it and runs this file."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from checkpoints import load_merged, make_set
from safetensors.torch import load_file

from ota_kernels import RecipeError, merge
from ota_kernels.integrations import mergekit

LAYER = {
    "input_layernorm": (8,),
    "mlp.down_proj": (8, 24),
    "mlp.gate_proj": (24, 8),
    "mlp.up_proj": (24, 8),
    "post_attention_layernorm": (8,),
    "self_attn.k_proj": (8, 8),
    "self_attn.o_proj": (8, 8),
    "self_attn.q_proj": (8, 8),
    "self_attn.v_proj": (8, 8),
}
SHAPES = {
    "model.embed_tokens.weight": (20, 8),
    **{f"model.layers.0.{name}.weight": shape for name, shape in LAYER.items()},
    "model.norm.weight": (8,),
    "lm_head.weight": (20, 8),
}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 20,
}


def test_without_mergekit_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mergekit.merge_methods", None)
    with pytest.raises(RecipeError, match=r"pip install 'ota-kernels\[mergekit\]'"):
        mergekit.register()


class TestOneTensor:
    """What needs no mergekit: the arguments that it hands over."""

    BASE, EXPERTS = torch.zeros(4), [torch.ones(4), 2 * torch.ones(4)]

    def merged(self, name, **values):
        row = mergekit.methods.get(name)
        return mergekit.merged(row, self.BASE, self.EXPERTS, ["a", "b"], "w", values)

    def test_values_of_models_and_of_all(self):
        found = self.merged("task_arithmetic", weight=[0.5, 1.0], **{"lambda": 2.0, "normalize": None})
        assert found.tolist() == [5.0] * 4

    @pytest.mark.parametrize(
        ("name", "values", "text"),
        [
            ("ota", {}, "`ota` needs each model's `preconditioner_path`, or"),
            ("ota", {"density": [0.5, None]}, "`density` is given for some models only"),
            (
                "ota",
                {"missing_curvature": "uniform", "density": [0.5] * 2},
                "give `density_scope: tensor`, or run",
            ),
            ("ramplus", {}, "takes sums over the whole model, and mergekit merges tensor by tensor"),
            ("opcm", {}, "takes the length of the merged edit over the whole model"),
        ],
        ids=["moments", "some", "scope", "sums", "length"],
    )
    def test_refused(self, name, values, text):
        with pytest.raises(RecipeError, match=text):
            self.merged(name, **values)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    pytest.importorskip("mergekit", reason="mergekit's own environment has it: bash tools/test_mergekit.sh")
    found = make_set(tmp_path_factory.mktemp("models"), SHAPES, experts=2, dtype=torch.float32)
    for folder in (found.base_folder, *found.expert_folders):
        (folder / "config.json").write_text(json.dumps(CONFIG))
    return found


def run(module: str, recipe: dict, out, *options: str):
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    command = [
        sys.executable,
        "-m",
        module,
        str(path),
        str(out),
        *options,
        "--no-copy-tokenizer",
        "--allow-crimes",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def read(folder) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in load_merged(folder).items()}


THEIRS = {
    "linear": {"weight": [0.25, 0.75]},
    "task_arithmetic": {"weight": [0.5, -0.25], "lambda": 0.8},
    "ties": {"weight": [1.0, 0.5], "density": 0.4},
    "breadcrumbs": {"weight": [1.0, 0.5], "density": 0.4, "gamma": 0.1},
    "sce": {"select_topk": 0.3},
    "multislerp": {"weight": [1.0, 2.0]},
    "nuslerp": {"weight": [1.0, 2.0]},
    "karcher": {},
    "ram": {},
}


# In one process: what is registered stays.
SCRIPT = """
import json, sys
from mergekit.merge_methods import merge_state_dicts
from safetensors.torch import load_file, save_file
from ota_kernels.integrations.mergekit import register
folders, cases, out = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
models = [load_file(f"{folder}/model.safetensors") for folder in folders]
for side in ("theirs", "ours"):
    for name, (parameters, base) in cases.items():
        given = models if base is not None else models[1:]
        merged = merge_state_dicts(given, name, parameters=parameters, base=base)
        save_file({k: v.contiguous() for k, v in merged.items()}, f"{out}/{name}-{side}.safetensors")
    names = register(replace=True)
assert set(cases) < set(names), names
"""


@pytest.fixture(scope="module")
def both_sides(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("both")
    folders = [str(folder) for folder in (models.base_folder, *models.expert_folders)]
    without_base = ("linear", "karcher", "nuslerp")
    cases = {name: (parameters, None if name in without_base else 0) for name, parameters in THEIRS.items()}
    command = [sys.executable, "-c", SCRIPT, json.dumps(folders), json.dumps(cases), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("name", THEIRS)
def test_replaced_methods_agree_with_mergekit(both_sides, name):
    expected, found = (load_file(both_sides / f"{name}-{side}.safetensors") for side in ("theirs", "ours"))
    assert found.keys() == expected.keys() == SHAPES.keys()
    assert any(not torch.equal(found[tensor], torch.zeros_like(found[tensor])) for tensor in found)
    for tensor in expected:
        torch.testing.assert_close(found[tensor], expected[tensor], rtol=2e-5, atol=1e-7)


def test_the_command_with_its_own_methods_replaced(models, tmp_path):
    recipe = models.recipe("ties", **THEIRS["ties"]) | {"dtype": "float32"}
    folders = []
    for module, options in (
        ("mergekit.scripts.run_yaml", ()),
        ("ota_kernels.integrations.mergekit", ("--replace",)),
    ):
        folders.append(tmp_path / f"out{len(folders)}")
        done = run(module, recipe, folders[-1], *options)
        assert done.returncode == 0, done.stderr[-2000:]
    theirs, ours = map(read, folders)
    for tensor in SHAPES:
        np.testing.assert_allclose(ours[tensor], theirs[tensor], rtol=2e-5, atol=1e-7)


OURS = {
    "ota": {"density": 0.3, "density_scope": "tensor", "lambda": 1.2},
    "consensus": {"q": 0.3},
    "tsv": {},
}


@pytest.mark.parametrize("name", OURS)
def test_added_methods_are_ota_merge(models, tmp_path, name):
    recipe = models.recipe(name, **OURS[name]) | {"dtype": "float32"}
    done = run("ota_kernels.integrations.mergekit", recipe, tmp_path / "ours")
    assert done.returncode == 0, done.stderr[-2000:]
    merge(recipe, tmp_path / "alone")
    found, expected = read(tmp_path / "ours"), read(tmp_path / "alone")
    for tensor in expected:
        np.testing.assert_allclose(found[tensor], expected[tensor], rtol=1e-6, atol=1e-9)


def test_registering_twice(models):
    first = mergekit.register()
    assert {"ota", "tsv", "consensus"} < set(first)
    assert "ties" not in first
    assert mergekit.register() == ()
