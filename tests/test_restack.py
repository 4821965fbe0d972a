"""config.json of restacked layers."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from checkpoints import save_model

from ota_kernels import merge
from ota_kernels.planning.restack import restacked

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 8,
    "rope": [1, 2],
    "eos_token_id": [0, 2, 1],
}


def test_count_and_lists_per_layer():
    types = {"layer_types": ["full", "sliding", "linear"]}
    other = {"num_hidden_layers": 2, "layer_types": ["x", "y"]}
    config = LLAMA | types
    found = restacked(config, [(config, 2), (config, 0), (other, 1), (None, 1)])
    assert found["num_hidden_layers"] == 4
    assert found["layer_types"] == ["linear", "full", "y", "sliding"]
    assert found["hidden_size"] == 8
    assert found["rope"] == [1, 2]
    assert config == LLAMA | types


def test_numbers_of_layers_follow_their_layers():
    config = {"num_hidden_layers": 4, "mlp_only_layers": [1, 3], "no_rope_layers": [1, 1, 0, 1]}
    found = restacked(config, [(config, 3), (config, 0), (config, 1), (config, 3), (config, 2)])
    assert found["mlp_only_layers"] == [0, 2, 3]
    assert found["no_rope_layers"] == [1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"n_layer": 2}, {"n_layer": 3}),
        ({"n_layer": 2, "num_hidden_layers": 2}, {"n_layer": 3, "num_hidden_layers": 3}),
        (
            {
                "text_config": {"num_hidden_layers": 2, "layer_types": ["a", "b"]},
                "vision_config": {"depth": 2},
            },
            {
                "text_config": {"num_hidden_layers": 3, "layer_types": ["b", "b", "a"]},
                "vision_config": {"depth": 2},
            },
        ),
    ],
    ids=["gpt2", "both", "nested"],
)
def test_where_the_count_stands(config, expected):
    assert restacked(config, [(config, 1), (config, 1), (config, 0)]) == expected


def test_no_count_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert restacked({"a": 1}, [(None, 0)]) == {"a": 1}
    assert "the output has 1" in caplog.messages[0]


def test_the_merged_folder(tmp_path):
    tensors = {f"model.layers.{n}.w": torch.full((2,), float(n)) for n in range(3)}
    config = {
        "num_hidden_layers": 3,
        "layer_types": ["a", "b", "c"],
        "architectures": ["X"],
        "torch_dtype": "float32",
    }
    save_model(tmp_path / "a", tensors | {"model.norm.weight": torch.ones(2)}, config=config)
    source = {"model": {"model": {"path": str(tmp_path / "a")}, "override_architecture": "Y"}}
    slices = [{"sources": [source | {"layer_range": [n, n + 1]}]} for n in (2, 2, 0)]
    merge(
        {"merge_method": "passthrough", "slices": slices, "dtype": "bfloat16"},
        tmp_path / "out",
        backend="reference",
    )
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found == {
        "num_hidden_layers": 3,
        "layer_types": ["c", "c", "a"],
        "architectures": ["Y"],
        "torch_dtype": "bfloat16",
    }
