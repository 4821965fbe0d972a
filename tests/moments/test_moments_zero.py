"""DeepSpeed ZeRO checkpoints: written here to DeepSpeed's layout from known tensors, and by DeepSpeed itself.

Padding is NaN, so that a value read from it shows.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import types
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from ota_kernels.errors import InputError
from ota_kernels.io.reader import Checkpoint
from ota_kernels.moments.readers import values as values_module
from ota_kernels.moments.readers.naming import rename
from ota_kernels.moments.readers.request import Request
from ota_kernels.moments.readers.zero import read_universal, read_zero, recognise_universal, recognise_zero

STEP = 5.0
GAP = "gap"
BETA2S = (0.99, 0.95)
GROUPS = (
    {"embed.weight": (5, 3), "mid.weight": (3, 3), "scale": ()},
    {"mid.bias": (3,), "norm.weight": (7,)},
)
DEEPSPEED = {
    "deepspeed.utils.tensor_fragment": "fragment_address",
    "deepspeed.runtime.zero.config": "ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler": "LossScaler",
}


def known_moments(groups=GROUPS) -> dict[str, torch.Tensor]:
    """Distinct values for every element of every parameter."""
    moments, count = {}, 0
    for group in groups:
        for name, shape in group.items():
            numel = math.prod(shape)
            moments[name] = torch.arange(count + 1.0, count + 1.0 + numel).view(shape)
            count += numel
    return moments


MOMENTS = known_moments()


@pytest.fixture(autouse=True)
def deepspeed_classes(monkeypatch):
    """Classes that pickle under DeepSpeed's names, importable while files are written."""
    made = {}
    for module, name in DEEPSPEED.items():
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            parent = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, parent, made.setdefault(parent, types.ModuleType(parent)))
        made[module].__dict__[name] = type(name, (), {"__module__": module})
    return made


@dataclass
class Writer:
    """Writes checkpoints into `folder` for `ranks` ranks; the options are those of DeepSpeed's versions.

    lean: padding is cut off (elastic_checkpoint); listed: with param_slice_mappings; padded: with
    group_paddings; gaps: elements of padding behind each parameter (parameter_alignment); frozen: what
    frozen_param_shapes says; config: ds_config.
    """

    folder: Path
    ranks: int
    classes: dict
    lean: bool = False
    listed: bool = True
    padded: bool = True
    gaps: int = 0
    frozen: dict | None = None
    config: dict | None = None
    dtype: torch.dtype = torch.float32
    prefix: str = ""

    def new(self, module: str, **attributes):
        instance = self.classes[module].__dict__[DEEPSPEED[module]]()
        instance.__dict__.update(attributes)
        return instance

    def save(self, content, name: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)

    def model_states(self, name: str, groups=GROUPS, **more) -> None:
        shapes = [OrderedDict((n, torch.Size(s)) for n, s in group.items()) for group in groups]
        common = {"buffer_names": ["steps"], "shared_params": {"head.weight": "embed.weight"}}
        self.save(common | {"param_shapes": shapes, "frozen_param_shapes": self.frozen} | more, name)

    def rank_file(self, rank: int, optimizer: dict, **more) -> None:
        common = {
            "loss_scaler": self.new("deepspeed.runtime.fp16.loss_scaler", dtype=torch.float16, cur_scale=1.0),
            "zero_stage": self.new("deepspeed.runtime.zero.config"),
            "partition_count": self.ranks if "fp32_flat_groups" in optimizer else [self.ranks] * 2,
        }
        content = {"optimizer_state_dict": common | optimizer | more, "ds_config": self.config or {}}
        self.save(content, f"{self.prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")

    def torch_state(self, partitions) -> dict:
        """The state dict of AdamW over one flat partition for each group."""
        return {
            "state": {i: {"step": torch.tensor(STEP), "exp_avg_sq": p} for i, p in enumerate(partitions)},
            "param_groups": [
                {"params": [i], "betas": (0.9, BETA2S[min(i, 1)]), "lr": 0.1} for i in range(len(partitions))
            ],
        }

    def stage_2(self, groups=GROUPS, moments=None, **more) -> None:
        """A group is one row, padded to a multiple of 2 ranks and cut into equal partitions."""
        moments = moments or MOMENTS
        rows = [self.row(group, moments) for group in groups]
        for rank in range(self.ranks):
            cuts = [(values.chunk(self.ranks)[rank], names[rank]) for values, names in rows]
            paddings = [names.count(None) for _, names in cuts]
            if self.lean:
                cuts = [
                    (values[: len(values) - padding], names)
                    for (values, names), padding in zip(cuts, paddings, strict=True)
                ]
            optimizer = {"base_optimizer_state": self.torch_state([values for values, _ in cuts])}
            if self.lean:
                optimizer["base_optimizer_state"] = [*optimizer["base_optimizer_state"]["state"].values()]
            if self.padded:
                optimizer["group_paddings"] = paddings
            if self.gaps:
                optimizer["param_alignment_paddings"] = [
                    [self.gaps] * (len(group) - 1) + [0] for group in groups
                ]
            if self.listed:
                optimizer["param_slice_mappings"] = [self.mapping(names) for _, names in cuts]
            self.rank_file(rank, optimizer, **more)
        self.model_states("mp_rank_00_model_states.pt", groups)

    def row(self, group, moments) -> tuple[torch.Tensor, list[list[str | None]]]:
        """A group's row, and by rank whose each element is: a parameter's name, GAP, or None for padding."""
        values, names = [], []
        for i, name in enumerate(group):
            gap = self.gaps if i < len(group) - 1 else 0
            values += [moments[name].flatten(), torch.full((gap,), torch.nan)]
            names += [name] * moments[name].numel() + [GAP] * gap
        padding = -len(names) % (2 * self.ranks)
        names += [None] * padding
        size = len(names) // self.ranks
        row = torch.cat([*values, torch.full((padding,), torch.nan)]).to(self.dtype)
        return row, [names[rank * size : (rank + 1) * size] for rank in range(self.ranks)]

    def mapping(self, names: list[str | None]) -> OrderedDict:
        return OrderedDict(
            (
                name,
                self.new("deepspeed.utils.tensor_fragment", start=names.index(name), numel=names.count(name)),
            )
            for name in dict.fromkeys(names)
            if name not in (None, GAP)
        )

    def stage_3(self, groups=GROUPS, **more) -> None:
        """A parameter is padded to a multiple of the ranks; a partition is one share of each parameter."""
        for rank in range(self.ranks):
            partitions = []
            for group in groups:
                shares = []
                for name in group:
                    flat = MOMENTS[name].flatten()
                    padding = torch.full((-len(flat) % self.ranks,), torch.nan)
                    shares.append(torch.cat([flat, padding]).view(self.ranks, -1)[rank])
                partitions.append(torch.cat(shares).to(self.dtype))
            optimizer = {"optimizer_state_dict": self.torch_state(partitions), "fp32_flat_groups": partitions}
            self.rank_file(rank, optimizer, **more)
            self.model_states(f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", groups)

    def universal(self, flat: bool) -> None:
        """As ds_to_universal.py writes from ZeRO-3 (flat) and from ZeRO-1 and 2."""
        for name, moment in MOMENTS.items():
            content = moment.flatten() if flat else {"param": moment, "cat_dim": 0}
            self.save(content, f"zero/{name}/exp_avg_sq.pt")
            if not flat:
                self.save(torch.tensor(STEP), f"zero/{name}/step.pt")
        base = self.torch_state([torch.zeros(1), torch.zeros(1)])
        common = {"zero_stage": self.new("deepspeed.runtime.zero.config")}
        common["param_groups"] = base["param_groups"]
        self.save(common | ({"optimizer_state_dict": base} if flat else {}), "zero/optimizer_state.pt")
        name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if flat else "mp_rank_00_model_states.pt"
        self.model_states(name, ds_config=self.config or {})


@pytest.fixture
def writer(tmp_path, deepspeed_classes):
    return lambda ranks=2, **options: Writer(tmp_path / "global_step5", ranks, deepspeed_classes, **options)


def values(moment) -> np.ndarray:
    end = 0
    for piece in moment.pieces:
        assert piece.start == end
        end += piece.numel
    assert end == math.prod(moment.shape)
    parts = [piece.read() for piece in moment.pieces]
    assert all(part.dtype == np.float32 for part in parts)
    return np.concatenate(parts).reshape(moment.shape)


def check_known(source, beta2s=BETA2S, step=STEP) -> None:
    """The moments are MOMENTS, bit for bit, with the step and beta2 of their group."""
    found = {moment.name: moment for moment in source.moments}
    assert set(found) == set(MOMENTS)
    for group, beta2 in zip(GROUPS, beta2s, strict=True):
        for name, shape in group.items():
            assert found[name].shape == shape
            assert (found[name].step, found[name].beta2) == (step, beta2)
            np.testing.assert_array_equal(values(found[name]), MOMENTS[name].numpy())


def model_with(tmp_path, **shapes) -> Checkpoint:
    from safetensors.torch import save_file

    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    return Checkpoint.open(tmp_path / "model.safetensors", "model")


def rank_path(folder: Path, rank: int) -> Path:
    return folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def edit(path: Path, change) -> None:
    content = torch.load(path, weights_only=False)
    change(content["optimizer_state_dict"])
    torch.save(content, path)


def refuses(folder: Path, message: str, read=read_zero, model=None) -> None:
    with pytest.raises(InputError, match=message) as error:
        read(folder, Request(model))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"listed": False},
        {"listed": False, "padded": False},
        {"prefix": "bf16_", "gaps": 2},
    ],
    ids=["0.19", "no places", "no paddings", "aligned"],
)
def test_stages_1_and_2(writer, ranks, options):
    written = writer(ranks, **options)
    written.stage_2()
    assert recognise_zero(written.folder)
    source = read_zero(written.folder, None)
    assert source.format == "deepspeed"
    check_known(source)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_elastic_checkpoints_have_no_padding(writer, ranks):
    written = writer(ranks, lean=True)
    written.stage_2()
    check_known(read_zero(written.folder, None), beta2s=(None, None))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_stage_3(writer, ranks):
    written = writer(ranks)
    written.stage_3()
    assert recognise_zero(written.folder)
    check_known(read_zero(written.folder, None))


def test_sub_groups_of_one_param_group(writer):
    """ZeRO-3 cuts a param_group into several flat groups."""
    written = writer()
    written.stage_3()
    for rank in range(2):
        edit(
            rank_path(written.folder, rank),
            lambda content: content["optimizer_state_dict"].update(
                param_groups=[{"params": [0, 1], "betas": (0.9, 0.9)}]
            ),
        )
    check_known(read_zero(written.folder, None), beta2s=(0.9, 0.9))


def test_moments_of_16_bit_are_widened(writer):
    written = writer(dtype=torch.bfloat16)
    written.stage_3()
    # Integers up to 37 are exact in bfloat16.
    check_known(read_zero(written.folder, None))


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_eight_bit_states(writer, nested):
    """Of bitsandbytes, in the flat partitions; here a code is its value."""
    written = writer()
    written.stage_2()

    def change(content):
        for state in content["base_optimizer_state"]["state"].values():
            values = state.pop("exp_avg_sq")
            state.pop("exp_avg", None)
            blocks = -(-values.numel() // 256)
            kept = {
                "state1": values.to(torch.uint8),
                "state2": values.to(torch.uint8),
                "qmap2": torch.arange(256.0) / 255,
                "absmax2": torch.full((blocks,), 255.0),
            }
            state.update({"__bnb_optimizer_quant_state__": kept} if nested else kept)

    for rank in range(2):
        edit(rank_path(written.folder, rank), change)
    check_known(read_zero(written.folder, None))


def test_pieces_are_bounded(writer, monkeypatch):
    monkeypatch.setattr(values_module, "PIECE_ELEMENTS", 4)
    written = writer()
    written.stage_2()
    source = read_zero(written.folder, None)
    assert max(piece.numel for moment in source.moments for piece in moment.pieces) == 4
    check_known(source)


def test_step_of_the_group(writer):
    """Apex's FusedAdam keeps it beside the hyperparameters."""
    written = writer()
    written.stage_2()

    def move(content):
        base = content["base_optimizer_state"]
        for entry in base["state"].values():
            entry.pop("step")
        for group in base["param_groups"]:
            group["step"] = 7

    for rank in range(2):
        edit(rank_path(written.folder, rank), move)
    check_known(read_zero(written.folder, None), step=7)


def test_latest_names_the_folder(writer):
    written = writer()
    written.stage_3()
    (written.folder.parent / "latest").write_text("global_step5\n")
    assert recognise_zero(written.folder.parent)
    check_known(read_zero(written.folder.parent, None))


def test_frozen_parameters_are_skipped(writer):
    written = writer(frozen=OrderedDict(mask=torch.Size((2,))))
    written.stage_2()
    source = read_zero(written.folder, None)
    assert source.skipped == {"mask": "frozen"}
    check_known(source)


def test_stage_1_does_not_list_frozen_parameters(writer):
    written = writer()
    written.stage_2()
    weights = {name: torch.zeros(2) for name in (*MOMENTS, "mask", "steps", "head.weight")}
    written.model_states("mp_rank_00_model_states.pt", module=weights)
    assert read_zero(written.folder, None).skipped == {"mask": "frozen"}


def test_shared_parameters_follow_the_model(writer, tmp_path):
    written = writer()
    written.stage_3()
    both = model_with(tmp_path, **{"embed.weight": (5, 3), "head.weight": (5, 3)})
    found = {moment.name: moment for moment in rename(read_zero(written.folder, None), both).moments}
    np.testing.assert_array_equal(values(found["head.weight"]), MOMENTS["embed.weight"].numpy())
    np.testing.assert_array_equal(values(found["embed.weight"]), MOMENTS["embed.weight"].numpy())


def test_groups_without_moments_are_skipped(writer):
    written = writer()
    written.stage_3()

    def change(content):
        content["optimizer_state_dict"]["state"] = {0: {"momentum_buffer": torch.zeros(3)}}

    for rank in range(2):
        edit(rank_path(written.folder, rank), change)
    source = read_zero(written.folder, None)
    assert source.moments == ()
    assert source.skipped == dict.fromkeys(GROUPS[0], "only momentum_buffer") | dict.fromkeys(
        GROUPS[1], "never stepped"
    )


def test_round_robin_lists_places_that_are_wrong(writer):
    """The values lie in the order of the model's file; param_slice_mappings has the order before the deal."""
    written = writer(config={"zero_optimization": {"round_robin_gradients": True}})
    dealt = [dict(reversed(group.items())) for group in GROUPS]
    written.stage_2(dealt)
    unshuffled = Writer(written.folder.parent / "other", 2, written.classes)
    unshuffled.stage_2()
    for rank in range(2):
        listed = torch.load(rank_path(unshuffled.folder, rank), weights_only=False)["optimizer_state_dict"]
        places = listed["param_slice_mappings"]
        edit(
            rank_path(written.folder, rank), lambda content, p=places: content.update(param_slice_mappings=p)
        )
    check_known(read_zero(written.folder, None))


def test_places_that_contradict_the_model_are_refused(writer):
    written = writer()
    written.stage_2()
    dealt = [dict(reversed(group.items())) for group in GROUPS]
    written.model_states("mp_rank_00_model_states.pt", dealt)
    refuses(
        written.folder, r"param_slice_mappings has 'scale' at None of group 0, the model's file at \(0, 1\)"
    )


@pytest.mark.parametrize("flat", [False, True], ids=["from stage 2", "from stage 3"])
def test_universal(writer, flat):
    written = writer(frozen=OrderedDict(mask=torch.Size((2,))))
    written.universal(flat)
    assert recognise_universal(written.folder)
    source = read_universal(written.folder, None)
    assert (source.format, source.skipped) == ("deepspeed-universal", {"mask": "frozen"})
    check_known(source)
    (written.folder.parent / "latest_universal").write_text(written.folder.name)
    assert recognise_universal(written.folder.parent)
    check_known(read_universal(written.folder.parent, None))


def test_universal_takes_shapes_from_the_model(writer, tmp_path):
    written = writer()
    written.universal(flat=True)
    (written.folder / "zero_pp_rank_0_mp_rank_00_model_states.pt").unlink()
    refuses(written.folder, r"is flat, and no \*_model_states\.pt has its shape: add --model", read_universal)
    model = model_with(tmp_path, **{name: tuple(moment.shape) for name, moment in MOMENTS.items()})
    source = read_universal(written.folder, Request(model))
    assert {moment.name: moment.shape for moment in source.moments} == {
        name: shape for group in GROUPS for name, shape in group.items()
    }


def test_universal_names_parameters_without_moments(writer):
    written = writer()
    written.universal(flat=False)
    (written.folder / "zero/mid.bias/exp_avg_sq.pt").unlink()
    source = read_universal(written.folder, None)
    assert source.skipped == {"mid.bias": "never stepped"}
    assert len(source.moments) == len(MOMENTS) - 1


def test_universal_of_another_size_is_refused(writer):
    written = writer()
    written.universal(flat=True)
    written.save(torch.zeros(4), "zero/mid.bias/exp_avg_sq.pt")
    refuses(
        written.folder, r"mid\.bias/exp_avg_sq\.pt: has \[4\] elements, the parameter \[3\]", read_universal
    )


def test_universal_of_round_robin_is_refused(writer):
    written = writer(config={"zero_optimization": {"round_robin_gradients": True}})
    written.universal(flat=False)
    refuses(written.folder, "converts checkpoints of round_robin_gradients wrongly", read_universal)


def test_an_empty_universal_folder_is_refused(tmp_path):
    (tmp_path / "zero").mkdir()
    refuses(tmp_path, "holds no folder of a parameter", read_universal)


@pytest.mark.parametrize("content", ["global_step9", "", "\udcff"], ids=["absent", "empty", "not text"])
def test_latest_that_points_nowhere(tmp_path, content):
    (tmp_path / "latest").write_bytes(content.encode(errors="surrogateescape"))
    refuses(tmp_path, "latest: (names the folder|cannot be read)")


@pytest.mark.parametrize("stage", ["stage_2", "stage_3"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_missing_rank_is_named(writer, stage, rank):
    written = writer(3)
    getattr(written, stage)()
    rank_path(written.folder, rank).unlink()
    refuses(written.folder, f"lacks the optimizer file of rank {rank}")


def test_a_missing_model_file_is_named(writer):
    written = writer()
    written.stage_2()
    (written.folder / "mp_rank_00_model_states.pt").unlink()
    refuses(written.folder, r"lacks mp_rank_00_model_states\.pt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "tensor or pipeline parallelism.*ds_to_universal"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "experts spread over ranks"),
        ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "remove the older run's files"),
    ],
    ids=["tensor parallel", "expert parallel", "two runs"],
)
def test_files_of_other_layouts_are_refused(writer, name, message):
    written = writer()
    written.stage_2()
    (written.folder / name).write_bytes(b"")
    refuses(written.folder, message)


def shorten(key):
    def change(content):
        entry = content[key]["state"][1]
        entry["exp_avg_sq"] = entry["exp_avg_sq"][:-1].clone()

    return change


def grow(content):
    for entry in content["base_optimizer_state"]["state"].values():
        entry["exp_avg_sq"] = torch.zeros(len(entry["exp_avg_sq"]) + 2)


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("stage_2", shorten("base_optimizer_state"), r"exp_avg_sq of group 1 has \d+ elements where"),
        ("stage_2", grow, r"exp_avg_sq of group 0 has \d+ elements where"),
        ("stage_3", shorten("optimizer_state_dict"), r"exp_avg_sq of group 1 has \d+ elements where"),
        ("stage_2", lambda c: c.update(group_paddings=[0, 1]), r"its parameters are \d+, padding"),
        ("stage_2", lambda c: c["group_paddings"].pop(), "group_paddings has no int for group 1"),
        ("stage_2", lambda c: c.update(partition_count=[2, 1]), "1 ranks share some parameters"),
        ("stage_2", lambda c: c.pop("partition_count"), "has no partition_count"),
        ("stage_2", lambda c: c.pop("base_optimizer_state"), "is not an optimizer's state"),
        ("stage_2", lambda c: c["base_optimizer_state"]["param_groups"].pop(), "has 1 flat groups"),
        ("stage_2", lambda c: c["base_optimizer_state"]["state"].pop(1), "only some ranks have exp_avg_sq"),
        (
            "stage_3",
            lambda c: c["optimizer_state_dict"]["state"][0].update(step=torch.tensor(4.0)),
            "of another step",
        ),
        ("stage_3", lambda c: c.update(ds_zero_partition_groups=[{}]), "experts spread over ranks"),
    ],
    ids=[
        "truncated",
        "too large",
        "truncated share",
        "padding",
        "paddings",
        "experts",
        "no count",
        "no state",
        "groups",
        "one rank never stepped",
        "steps",
        "expert groups",
    ],
)
def test_what_does_not_fit_is_refused(writer, stage, change, message):
    written = writer()
    getattr(written, stage)()
    edit(rank_path(written.folder, 1), change)
    refuses(written.folder, message)


def test_partitions_of_unequal_sizes_are_refused(writer):
    """Their sum fits, but the cut does not lie where DeepSpeed makes it."""
    written = writer(listed=False)
    written.stage_2()

    def resize(by):
        def change(content):
            for entry in content["base_optimizer_state"]["state"].values():
                entry["exp_avg_sq"] = torch.zeros(len(entry["exp_avg_sq"]) + by)

        return change

    edit(rank_path(written.folder, 0), resize(1))
    edit(rank_path(written.folder, 1), resize(-1))
    refuses(written.folder, "where the first rank's is")


def test_a_truncated_file_is_refused(writer):
    written = writer()
    written.stage_2()
    path = rank_path(written.folder, 1)
    path.write_bytes(path.read_bytes()[:-100])
    refuses(written.folder, path.name)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_code_beside_the_states_is_not_run(writer, tmp_path):
    written = writer()
    written.stage_2()
    edit(rank_path(written.folder, 0), lambda content: content.update(hook=Bomb(tmp_path / "boom")))
    check_known(read_zero(written.folder, None))
    assert not (tmp_path / "boom").exists()


# What DeepSpeed itself writes: stage, ranks, bfloat16, further settings of zero_optimization.
REAL = [
    (1, 2, False, {}),
    (2, 2, True, {}),
    (2, 2, False, {"round_robin_gradients": True}),
    (2, 2, False, {"elastic_checkpoint": True}),
    (3, 1, False, {}),
    (3, 2, True, {}),
    (3, 2, False, {"sub_group_size": 20}),
]


@pytest.mark.parametrize(
    ("stage", "ranks", "bf16", "settings"),
    REAL,
    ids=["1", "2 bfloat16", "2 round robin", "2 elastic", "3 one rank", "3 bfloat16", "3 sub-groups"],
)
def test_deepspeed(tmp_path, stage, ranks, bf16, settings, monkeypatch):
    monkeypatch.undo()
    pytest.importorskip("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
    }
    zero = {"stage": stage, **settings}
    arguments = [sys.executable, __file__, str(tmp_path), json.dumps(zero), str(int(bf16))]
    running = [
        subprocess.Popen(arguments, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    assert [process.wait() for process in running] == [0] * ranks
    expected = torch.load(tmp_path / "live.pt")
    source = read_zero(tmp_path, None)
    found = {moment.name: moment for moment in source.moments}
    assert set(found) == set(expected)
    for name, moment in expected.items():
        np.testing.assert_array_equal(values(found[name]), moment.numpy())
        beta2 = None if settings.get("elastic_checkpoint") else BETA2S[moment.dim() == 1]
        assert (found[name].step, found[name].beta2) == (3, beta2)
    assert source.skipped == {"frozen.weight": "frozen", "frozen.bias": "frozen"}


def train_with_deepspeed(folder: str, zero: dict, bf16: bool) -> None:
    """What one rank does; rank 0 keeps the moments that the live optimizer has, gathered."""
    import deepspeed
    from deepspeed.utils import safe_get_full_optimizer_state
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid, self.norm = nn.Embedding(11, 7), nn.Linear(7, 7), nn.LayerNorm(7)
            self.frozen = nn.Linear(7, 7).requires_grad_(False)
            self.head = nn.Linear(7, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.norm(self.frozen(self.mid(self.embed(tokens)))))

    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    model = Model()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in trained.values() if (p.dim() == 1) == vectors], "betas": (0.9, beta2)}
        for vectors, beta2 in zip((False, True), BETA2S, strict=True)
    ]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config
    )
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    for _ in range(3):
        tokens = torch.randint(0, 11, (4, 5), generator=generator)
        logits = engine(tokens).float()
        engine.backward(nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()))
        engine.step()
    engine.save_checkpoint(folder)
    if zero["stage"] < 3:
        _link_in_true_order(engine.optimizer)
    live = {name: safe_get_full_optimizer_state(p, "exp_avg_sq").clone() for name, p in trained.items()}
    if os.environ["RANK"] == "0":
        torch.save(live, f"{folder}/live.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _link_in_true_order(optimizer) -> None:
    """Repair what DeepSpeed 0.19.8 needs to gather a state: it links groups before they have one, and with
    round_robin_gradients in the order before the deal."""
    optimizer.bit16_groups = optimizer.round_robin_bit16_groups
    optimizer._link_all_hp_params()
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()


if __name__ == "__main__":
    train_with_deepspeed(sys.argv[1], json.loads(sys.argv[2]), bool(int(sys.argv[3])))
