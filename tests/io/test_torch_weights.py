"""Models that torch.save wrote: read as they lie in the file, and never run."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict

import pytest
import torch
from checkpoints import load_merged, random_tensors, save_model

from ota_kernels import InputError, merge
from ota_kernels.io.reader import Checkpoint, open_model
from ota_kernels.planning.inputs import Inputs
from ota_kernels.recipe.schema import parse_recipe

SHAPES = {"model.embed_tokens.weight": (6, 3), "model.layers.0.w": (5, 7), "model.norm.weight": (3,)}
A, B = (random_tensors(SHAPES, seed) for seed in (1, 2))


def saved(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def bits(checkpoint, name) -> bytes:
    return bytes(checkpoint.buffer(name).data)


def stored(tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_type_shape_and_view_is_where_the_header_says(tmp_path):
    whole = torch.randn(10)
    content = {
        "matrix": torch.randn(5, 7),
        "half": torch.randn(3).to(torch.bfloat16),
        "view": whole[2:6],
        "float8": torch.randn(4).to(torch.float8_e4m3fn),
        "count": torch.tensor([1, 2]),
        "scalar": torch.tensor([2.5]).reshape(()),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "empty": torch.empty(0, 4),
    }
    checkpoint = open_model(saved(tmp_path / "pytorch_model.bin", content).parent, "m")
    assert list(checkpoint.tensors) == list(content)
    for name, tensor in content.items():
        assert bits(checkpoint, name) == stored(tensor.detach())
        assert tuple(checkpoint.tensors[name].shape) == tuple(tensor.shape)


def test_tied_tensors_share_their_bytes(tmp_path):
    content = OrderedDict(a=A["model.layers.0.w"], b=A["model.layers.0.w"])
    content._metadata = {"": {"version": 1}}  # as Module.state_dict() leaves it
    found = Checkpoint.open(saved(tmp_path / "m.pt", content), "m")
    assert found.tensors["a"].begin == found.tensors["b"].begin
    assert bits(found, "a") == bits(found, "b") == stored(A["model.layers.0.w"])


def test_under_state_dict_beside_other_things(tmp_path):
    pickled = {"state_dict": A, "global_step": 7, "seed": [1]}
    found = Checkpoint.open(saved(tmp_path / "last.ckpt", pickled), "m")
    assert {name: bits(found, name) for name in A} == {name: stored(t) for name, t in A.items()}


@pytest.mark.parametrize("form", ["single", "index", "shards"])
def test_a_merge_of_a_torch_folder_and_another(tmp_path, form):
    """The same model in another form is the same merge; what is written are safetensors."""
    folder = tmp_path / "a"
    config = {"model_type": "llama"}
    if form == "single":
        saved(folder / "pytorch_model.bin", A)
    else:
        names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        parts = dict(list(A.items())[:1]), dict(list(A.items())[1:])
        for name, part in zip(names, parts, strict=True):
            saved(folder / name, part)
        if form == "index":
            weight_map = {n: name for name, part in zip(names, parts, strict=True) for n in part}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    saved(folder / "training_args.bin", {"x": 1})
    save_model(tmp_path / "b", B, config=config)
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / x), "parameters": {"weight": 0.5}} for x in "ab"],
    }
    merge(recipe, tmp_path / "out", backend="reference")
    out = load_merged(tmp_path / "out")
    assert out.keys() == A.keys()
    for name, tensor in out.items():
        torch.testing.assert_close(tensor, ((A[name].double() + B[name].double()) / 2).float())
    assert {p.name for p in (tmp_path / "out").iterdir() if "model" in p.name} == {"model.safetensors"}


def test_a_changed_file_is_another_merge(tmp_path):
    path = saved(tmp_path / "a" / "pytorch_model.bin", A)
    save_model(tmp_path / "b", B)
    recipe = parse_recipe(
        {
            "merge_method": "linear",
            "models": [{"model": str(tmp_path / x), "parameters": {"weight": 1}} for x in "ab"],
        }
    )
    with Inputs(recipe) as inputs:
        before = inputs.fingerprint()
    saved(path, A | {"model.norm.weight": torch.ones(3, dtype=torch.float64)})
    with Inputs(recipe) as inputs:
        assert inputs.fingerprint() != before


class Runs:
    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ({"w": Runs()}, "'w' (io.open), which is no plain contiguous tensor"),
        ({"w": torch.ones(3), "step": 3}, "'step' (int), which is no plain contiguous tensor"),
        ({3: torch.ones(3)}, "holds 3 (Tensor)"),
        ({"w": torch.ones(3, 4).T}, "'w' (Tensor), which is no plain contiguous tensor"),
        ({"w": torch.ones(2).to_sparse()}, "'w' (torch"),
        ([torch.ones(3)], "holds list, not a dictionary of tensors"),
        (Runs(), "holds io.open, not a dictionary of tensors"),
    ],
    ids=["code", "number", "numbered", "transposed", "sparse", "list", "object"],
)
def test_refused_in_one_line_and_never_run(tmp_path, monkeypatch, content, fact):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "m" / "pytorch_model.bin", content)
    with pytest.raises(InputError) as caught:
        open_model(path.parent, "m")
    assert str(path) in str(caught.value)
    assert fact in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "legacy", "pickle", "pointer"])
def test_damaged_files(tmp_path, damage):
    path = saved(tmp_path / "pytorch_model.bin", A)
    if damage == "legacy":
        torch.save(A, path, _use_new_zipfile_serialization=False)
    elif damage == "pointer":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(A))
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else -100])
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*(torch\.save it again|Git LFS pointer)"):
        open_model(tmp_path, "m")


def test_missing_shards_and_two_sets(tmp_path):
    path = saved(tmp_path / "pytorch_model-00001-of-00002.bin", A)
    with pytest.raises(InputError, match=r"missing: pytorch_model-00002-of-00002\.bin"):
        open_model(tmp_path, "m")
    saved(tmp_path / "pytorch_model.bin", A)
    with pytest.raises(InputError, match=r"two sets of weights, pytorch_model\.bin and"):
        open_model(tmp_path, "m")
    path.unlink()
    save_model(tmp_path, B)
    assert [p.name for p in open_model(tmp_path, "m").files] == ["model.safetensors"]
