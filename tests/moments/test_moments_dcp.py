"""Distributed checkpoints: written by torch on two ranks, read without a process group."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from optimizers import assert_extracted
from torch import nn

from ota_kernels.errors import InputError
from ota_kernels.moments import extract
from ota_kernels.moments.readers.dcp import read_dcp, recognise_dcp

RANKS = 2
STEPS = 3
BETA2S = {"matrix": 0.99, "vector": 0.95}


class Model(nn.Module):
    """Rows that two ranks cannot share evenly, a matrix of one row, and a layer that the loss ignores."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.state = nn.Linear(6, 7)
        self.out = nn.Linear(7, 1, bias=False)
        self.idle = nn.Linear(6, 6, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.state(self.embed(tokens)))).mean()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "betas": (0.9, BETA2S["matrix"])},
            {"params": [p for p in parameters if p.dim() == 1], "betas": (0.9, BETA2S["vector"])},
        ],
        lr=1e-2,
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randint(0, 11, (8,), generator=generator)).backward()
        optimizer.step()


def write_checkpoints(rank: int, folder: str) -> None:
    """What one rank does: FSDP2 training, then a save in every layout; rank 0 keeps the gathered state."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (RANKS,))
    model = fully_shard(Model(), mesh=mesh)
    optimizer = adam(model)
    train(model, optimizer, rank)
    live = {
        name: optimizer.state[parameter]["exp_avg_sq"].full_tensor()
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }
    if rank == 0:
        torch.save(live, f"{folder}/live.pt")
    os.makedirs(f"{folder}/by_rank", exist_ok=True)
    torch.save(optimizer.state_dict(), f"{folder}/by_rank/optim_world_size_{RANKS}_rank_{rank}.pt")
    torch.save(model.state_dict(), f"{folder}/by_rank/model_world_size_{RANKS}_rank_{rank}.pt")
    nested = get_optimizer_state_dict(model, optimizer)
    flat = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
    )
    dcp.save({"optimizer": nested}, checkpoint_id=f"{folder}/accelerate/optimizer_0")
    dcp.save({"optimizer": flat, "model": model.state_dict()}, checkpoint_id=f"{folder}/titan")
    dcp.save(nested, checkpoint_id=f"{folder}/bare")
    columns = distribute_tensor(torch.arange(12.0).view(3, 4), mesh, [Shard(1)])
    dcp.save({"optim": {"state": {"w": {"exp_avg_sq": columns}}}}, checkpoint_id=f"{folder}/columns")
    dist.destroy_process_group()
    # The mesh keeps gloo's threads: one that drops the last tensor while Python ends would abort the process.
    os._exit(0)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dcp")
    mp.spawn(write_checkpoints, (str(folder),), nprocs=RANKS)
    return folder


@pytest.fixture
def saved(tmp_path) -> Path:
    """A small checkpoint of one process, to be damaged."""
    state = {"w": {"exp_avg_sq": torch.arange(6.0).view(2, 3), "step": torch.tensor(2.0)}}
    dcp.save({"optimizer": {"state": state}}, checkpoint_id=tmp_path / "saved")
    return tmp_path / "saved"


def values(moment) -> np.ndarray:
    ends = [0]
    for piece in moment.pieces:
        assert piece.start == ends[-1]
        ends.append(piece.start + piece.numel)
    assert ends[-1] == np.prod(moment.shape)
    return np.concatenate([piece.read() for piece in moment.pieces]).reshape(moment.shape)


@pytest.mark.parametrize("layout", ["accelerate", "titan", "bare"])
def test_moments_are_those_of_the_live_optimizer(written, layout):
    live = torch.load(written / "live.pt")
    assert recognise_dcp(written / layout)
    source = read_dcp(written / layout, None)
    assert source.format == "dcp"
    found = {moment.name: moment for moment in source.moments}
    assert set(found) == set(live)
    assert source.skipped == {"idle.weight": "never stepped"}
    for name, expected in live.items():
        np.testing.assert_array_equal(values(found[name]), expected.numpy())
        kind = "matrix" if expected.dim() > 1 else "vector"
        assert (found[name].step, found[name].beta2) == (STEPS, BETA2S[kind])


def test_shards_of_rows_are_read_one_by_one(written):
    (embed,) = (m for m in read_dcp(written / "bare", None).moments if m.name == "embed.weight")
    # 11 rows over two ranks: 6 and 5.
    assert [(piece.start, piece.numel) for piece in embed.pieces] == [(0, 36), (36, 30)]


def test_shards_of_columns_are_put_together(written):
    (moment,) = read_dcp(written / "columns", None).moments
    assert [piece.numel for piece in moment.pieces] == [12]
    np.testing.assert_array_equal(values(moment), np.arange(12, dtype=np.float32).reshape(3, 4))
    assert (moment.step, moment.beta2) == (None, None)


def test_param_groups_of_one_list(tmp_path, monkeypatch):
    """As torch < 2.4 stored them."""
    monkeypatch.setattr(dcp._version, "_derived_version", "2_3")
    state = {
        "state": {"a": {"exp_avg_sq": torch.ones(3, dtype=torch.bfloat16), "step": 4}},
        "param_groups": [{"params": ["a", "b"], "betas": (0.9, 0.98)}],
    }
    dcp.save(state, checkpoint_id=tmp_path)
    assert "param_groups" in dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    source = read_dcp(tmp_path, None)
    (moment,) = source.moments
    assert (moment.name, moment.step, moment.beta2) == ("a", 4, 0.98)
    assert values(moment).dtype == np.float32
    assert source.skipped == {"b": "never stepped"}


@pytest.mark.parametrize("name", ["empty", "file"])
def test_other_paths_are_not_recognised(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    assert not recognise_dcp(tmp_path / name)
    with pytest.raises(InputError, match=r"holds neither \.metadata nor optimizer_0/"):
        read_dcp(tmp_path / name, None)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "boom"))


def test_metadata_with_code_is_refused(saved, tmp_path):
    (saved / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with pytest.raises(InputError, match=r"\.metadata: is not the metadata") as error:
        read_dcp(saved, None)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "boom").exists()


def test_an_object_with_code_is_refused(tmp_path):
    state = {"state.a.exp_avg_sq": torch.ones(3), "state.a.step": Bomb(tmp_path / "boom")}
    dcp.save(state, checkpoint_id=tmp_path / "saved")
    with pytest.raises(InputError, match=r"state\['a'\]: step is not a number"):
        read_dcp(tmp_path / "saved", None)
    assert not (tmp_path / "boom").exists()


def test_metadata_of_another_kind_is_refused(saved):
    (saved / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": {}}))
    with pytest.raises(InputError, match="not the metadata of a torch distributed checkpoint"):
        read_dcp(saved, None)


def test_a_missing_shard_is_named(saved):
    (shard,) = saved.glob("*.distcp")
    shard.unlink()
    with pytest.raises(InputError, match=rf"{shard.name}: no such file: copy the files of all ranks"):
        read_dcp(saved, None)


def test_a_truncated_shard_is_named(saved):
    (shard,) = saved.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{shard.name}: has \d+ bytes, not \d+: is cut short"):
        read_dcp(saved, None)


def test_damaged_bytes_are_an_error_when_they_are_read(saved):
    (shard,) = saved.glob("*.distcp")
    content = bytearray(shard.read_bytes())
    metadata = dcp.FileSystemReader(saved).read_metadata()
    index = next(i for i in metadata.storage_data if i.fqn == "optimizer.state.w.exp_avg_sq")
    start = metadata.storage_data[index].offset
    content[start : start + 64] = bytes(64)
    shard.write_bytes(content)
    (moment,) = read_dcp(saved, None).moments
    with pytest.raises(InputError, match=r"exp_avg_sq.*cannot be read"):
        values(moment)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.chunks.clear(), "its parts have 0 elements"),
        (lambda entry: setattr(entry, "size", torch.Size((2, 2))), r"is not in \[2, 2\]"),
    ],
    ids=["no parts", "part outside"],
)
def test_parts_that_do_not_fit_are_refused(saved, change, message):
    metadata = dcp.FileSystemReader(saved).read_metadata()
    change(metadata.state_dict_metadata["optimizer.state.w.exp_avg_sq"])
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match=message):
        read_dcp(saved, None)


def test_parts_that_overlap_leave_nan(saved):
    """Two parts over each other add up to the tensor, but not every element has a value."""
    metadata = dcp.FileSystemReader(saved).read_metadata()
    key = "optimizer.state.w.exp_avg_sq"
    entry = metadata.state_dict_metadata[key]
    entry.chunks.append(entry.chunks[0])
    entry.size = torch.Size((4, 3))
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    (moment,) = read_dcp(saved, None).moments
    assert np.isnan(values(moment)[2:]).all()


def test_parameters_by_number_are_refused(tmp_path):
    dcp.save({"optimizer": {"state": {"0": {"exp_avg_sq": torch.ones(3)}}}}, checkpoint_id=tmp_path)
    with pytest.raises(InputError, match="keyed by number, not by name: add --model"):
        read_dcp(tmp_path, None)


def test_a_model_alone_is_refused(tmp_path):
    dcp.save({"model": {"w": torch.ones(3)}}, checkpoint_id=tmp_path)
    with pytest.raises(InputError, match="holds no optimizer state with exp_avg_sq"):
        read_dcp(tmp_path, None)


# A file for each rank.


@pytest.mark.parametrize("given", ["folder", "rank 0", "rank 1"])
def test_files_by_rank(written, tmp_path, given):
    """Named by the weights of the same ranks."""
    folder = written / "by_rank"
    path = folder if given == "folder" else folder / f"optim_world_size_{RANKS}_rank_{given[-1]}.pt"
    summary = extract(path, tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", torch.load(written / "live.pt"))
    assert summary.step == STEPS
    assert set(summary.missing) == {"idle.weight"}


def test_files_by_rank_that_are_not_all_there(written, tmp_path):
    name = f"optim_world_size_{RANKS}_rank_0.pt"
    shutil.copy(written / "by_rank" / name, tmp_path / name)
    with pytest.raises(InputError, match="lacks the file of rank 1"):
        extract(tmp_path, tmp_path / "v.safetensors")
    alone = tmp_path / "optim_alone.pt"
    (tmp_path / name).rename(alone)
    with pytest.raises(InputError, match="the parts in 1 files do not make"):
        extract(alone, tmp_path / "v.safetensors", names=names_of(tmp_path, written))


def names_of(folder, written):
    names = (
        [n for n, p in Model().named_parameters() if p.dim() > 1],
        [n for n, p in Model().named_parameters() if p.dim() == 1],
    )
    (folder / "names").write_text("\n\n".join("\n".join(group) for group in names))
    return folder / "names"


# Other writers.


def test_metadata_of_older_torch(saved, tmp_path):
    """Before 2.3 properties of tensors were a class of another module, and there were fewer fields."""
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    for field in ("storage_meta", "version", "planner_data"):
        vars(metadata).pop(field, None)
    for info in metadata.storage_data.values():
        vars(info).pop("transform_descriptors", None)
    text = pickle.dumps(metadata, protocol=2)
    new, old = b"torch.distributed.checkpoint.metadata", b"torch.distributed._shard.sharded_tensor.metadata"
    assert b"c" + new + b"\nTensorProperties\n" in text
    for name in (b"TensorProperties", b"MEM_FORMAT_ENCODING"):
        text = text.replace(b"c" + new + b"\n" + name, b"c" + old + b"\n" + name)
    (saved / ".metadata").write_bytes(text)
    extract(saved, tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", {"w": torch.arange(6.0).view(2, 3)})


def test_keys_of_megatron(tmp_path):
    """torch_dist of its distributed optimizer: the state before the parameter, all layers in one tensor."""
    names = ("decoder.layers.mlp.linear_fc1.weight", "embedding.word_embeddings.weight")
    moments = {name: torch.rand(2, 3, 4) for name in names}
    state = {f"optimizer.state.exp_avg_sq.{n}": v for n, v in moments.items()}
    state |= {f"optimizer.state.exp_avg.{n}": torch.randn(2, 3, 4) for n in names}
    state |= {f"optimizer.state.param.{n}": torch.randn(2, 3, 4) for n in names}
    state |= {f"model.{n}": torch.randn(2, 3, 4) for n in names}
    dcp.save(state, checkpoint_id=tmp_path / "iter_0000100")
    extract(tmp_path / "iter_0000100", tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", moments)


def test_eight_bit_and_factored_states(tmp_path):
    """As bitsandbytes nests its tensors, and Adafactor's factors."""
    codes, table = torch.randint(0, 256, (20, 30), dtype=torch.uint8), torch.rand(256)
    nested = {"state1": codes, "state2": codes, "qmap2": table, "absmax2": torch.tensor([0.5, 2.0, 3.0])}
    states = {
        "w": {"step": 3, "__bnb_optimizer_quant_state__": nested},
        "f": {"step": 3, "exp_avg_sq_row": torch.rand(4), "exp_avg_sq_col": torch.rand(5), "RMS": 0.1},
    }
    dcp.save({"optimizer": {"state": states}}, checkpoint_id=tmp_path / "saved")
    extract(tmp_path / "saved", tmp_path / "v.safetensors")
    scales = nested["absmax2"][torch.arange(600) // 256].view(20, 30)
    expected = {"w": table[codes.long()] * scales}
    expected |= {"f.exp_avg_sq_row": 5 * states["f"]["exp_avg_sq_row"]}
    expected |= {"f.exp_avg_sq_col": 4 * states["f"]["exp_avg_sq_col"]}
    assert_extracted(tmp_path / "v.safetensors", expected)


@pytest.mark.parametrize("given", ["weights in it", "--names", "nothing"])
def test_states_by_number(tmp_path, given):
    """What optimizer.state_dict() gives, saved as it is; the model's order is that of its weights."""
    torch.manual_seed(0)
    model = Model()
    optimizer = adam(model)
    train(model, optimizer, 0)
    state = {"optimizer": optimizer.state_dict()}
    if given == "weights in it":
        state["model"] = model.state_dict()
    dcp.save(state, checkpoint_id=tmp_path / "saved")
    expected = {
        n: optimizer.state[p]["exp_avg_sq"] for n, p in model.named_parameters() if p in optimizer.state
    }
    if given == "nothing":
        with pytest.raises(InputError, match="keyed by number, not by name: add --model"):
            extract(tmp_path / "saved", tmp_path / "v.safetensors")
        return
    names = names_of(tmp_path, None) if given == "--names" else None
    summary = extract(tmp_path / "saved", tmp_path / "v.safetensors", names=names)
    assert_extracted(tmp_path / "v.safetensors", expected)
    assert summary.missing == {"idle.weight": "never stepped"}


def test_an_optimizer_without_second_moments(tmp_path):
    state = {"w": {"exp_avg": torch.ones(3)}}
    dcp.save({"optimizer": {"state": state}}, checkpoint_id=tmp_path / "saved")
    with pytest.raises(
        InputError, match=r"holds no second moments, only \['exp_avg'\] \(it looks like Lion\)"
    ):
        extract(tmp_path / "saved", tmp_path / "v.safetensors")
