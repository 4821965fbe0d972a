"""Whose second moments are they? Adam's and its kin's are taken, others refused by name, in every reader."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from optimizers import STEPS, adam_state, assert_extracted, live, saved_states, train

from ota_kernels import InputError
from ota_kernels.io.curvature import CurvatureFile
from ota_kernels.moments import extract
from ota_kernels.moments.readers.kinds import accept
from ota_kernels.moments.readers.state import State

# What each optimizer keeps besides Adam's keys, or has in its groups: from its own code.
FOREIGN = {
    "Adan": ({"exp_avg_diff": torch.zeros(4, 5)}, {"betas": (0.98, 0.92, 0.99)}),
    "Adan by its betas": ({}, {"betas": (0.98, 0.92, 0.99)}),
    "SOAP": ({"GG": [torch.eye(4), torch.eye(5)], "Q": [torch.eye(4), torch.eye(5)]}, {}),
    "SOAP by its group": ({}, {"precondition_frequency": 10, "max_precond_dim": 10000}),
    "GaLore": ({"projector": {"rank": 4}}, {}),
    "GaLore by its group": ({}, {"rank": 4, "update_proj_gap": 200, "scale": 1.0, "proj_type": "std"}),
    "MARS": ({"last_grad": torch.zeros(4, 5)}, {}),
    "Yogi": ({}, {"initial_accumulator": 1e-6}),
    "D-Adaptation": ({"s": torch.zeros(4, 5)}, {"d": 1e-6, "k": 3, "growth_rate": 1.0}),
    "1-bit Adam": ({"worker_error": torch.zeros(4, 5)}, {}),
    "StableAdamW": ({"kahan_comp": torch.zeros(4, 5)}, {}),
    "NovoGrad": ({"exp_avg_sq": torch.tensor(0.5)}, {"grad_averaging": False}),
    "Adam-mini": ({"exp_avg_sq": torch.rand(4, 1)}, {}),
    "8-bit AdEMAMix": (
        {"exp_avg": None, "exp_avg_sq": None, "state1": torch.zeros(2, 4, 5), "state2": torch.rand(4, 5)},
        {},
    ),
    "nobody known": ({"second_thoughts": torch.zeros(4, 5)}, {}),
    "nobody known, by its group": ({}, {"zeal": 0.3}),
}


def torch_file(folder, name, state, settings):
    saved_states(folder / "a.pt", {name: state}, **settings)
    return folder / "a.pt"


def distributed(folder, name, state, settings):
    groups = [{"params": [name], "lr": 1e-3, "betas": (0.9, 0.999)} | settings]
    kept = {key: value for key, value in state.items() if value is not None}
    dcp.save({"optim": {"state": {name: kept}, "param_groups": groups}}, checkpoint_id=folder / "dcp")
    return folder / "dcp"


def universal(folder, name, state, settings):
    place = folder / "universal" / "zero" / name
    place.mkdir(parents=True)
    for key, value in state.items():
        if value is not None:
            torch.save(
                {"param": value} if isinstance(value, torch.Tensor) and value.dim() else value,
                place / f"{key}.pt",
            )
    group = {"params": [0], "betas": (0.9, 0.999)} | settings
    torch.save({"param_groups": [group]}, folder / "universal" / "zero" / "optimizer_state.pt")
    shapes = {"param_shapes": [{name: torch.Size((4, 5))}]}
    torch.save(shapes, folder / "universal" / "mp_rank_00_model_states.pt")
    return folder / "universal"


def zero(folder, name, state, settings):
    """ZeRO-2 of one rank: flat states."""
    flat = {
        key: value.flatten() if isinstance(value, torch.Tensor) and value.dim() else value
        for key, value in state.items()
        if value is not None
    }
    base = {"state": {0: flat}, "param_groups": [{"params": [0], "betas": (0.9, 0.999)} | settings]}
    optimizer = {"base_optimizer_state": base, "partition_count": [1], "group_paddings": [0], "zero_stage": 2}
    (folder / "zero").mkdir()
    torch.save(
        {"optimizer_state_dict": optimizer}, folder / "zero" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    )
    shapes = {"param_shapes": [{name: torch.Size((4, 5))}]}
    torch.save(shapes, folder / "zero" / "mp_rank_00_model_states.pt")
    return folder / "zero"


@pytest.mark.parametrize("write", [torch_file, distributed, universal, zero])
@pytest.mark.parametrize("kind", FOREIGN)
def test_moments_of_another_optimizer_are_refused(tmp_path, write, kind):
    more, settings = FOREIGN[kind]
    if write is universal and "8-bit" in kind:
        pytest.skip("DeepSpeed does not convert 8-bit states")
    path = write(tmp_path, "w", adam_state(**more), settings)
    names = kind.split()[0]
    with pytest.raises(InputError) as error:
        extract(path, tmp_path / "v.safetensors")
    message = str(error.value)
    assert "\n" not in message
    assert names in message or "not one number for each element" in message or "--as-adam" in message
    assert not (tmp_path / "v.safetensors").exists()


def test_the_same_states_without_what_is_foreign_are_read(tmp_path):
    """So that the test above is of the foreign keys, and of nothing else."""
    for i, write in enumerate((torch_file, distributed, universal, zero)):
        folder = tmp_path / str(i)
        folder.mkdir()
        state = adam_state()
        extract(write(folder, "w", state, {}), folder / "v.safetensors")
        assert_extracted(folder / "v.safetensors", {"w": state["exp_avg_sq"]})


def test_what_the_user_says_is_adam(tmp_path):
    state = adam_state(second_thoughts=torch.zeros(4, 5))
    path = saved_states(tmp_path / "a.pt", {"w": state}, zeal=0.3)
    extract(path, tmp_path / "v.safetensors", as_adam=True)
    assert_extracted(tmp_path / "v.safetensors", {"w": state["exp_avg_sq"]})
    for more in ({"projector": 1}, {"exp_avg_sq": torch.tensor(1.0)}):
        saved_states(path, {"w": state | more})
        with pytest.raises(InputError, match="not Adam's second moments"):
            extract(path, tmp_path / "w.safetensors", as_adam=True)


KIN = {
    "Adam": lambda ps: torch.optim.Adam(ps, betas=(0.9, 0.99)),
    "AMSGrad": lambda ps: torch.optim.AdamW(ps, betas=(0.9, 0.99), amsgrad=True),
    "NAdam": lambda ps: torch.optim.NAdam(ps, betas=(0.9, 0.99)),
    "RAdam": lambda ps: torch.optim.RAdam(ps, betas=(0.9, 0.99)),
}


@pytest.mark.parametrize("kind", KIN)
def test_adam_and_its_kin(net, tmp_path, kind):
    optimizer = KIN[kind]([p for p in net.parameters() if p.requires_grad])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=9)
    train(net, optimizer)
    scheduler.step()
    names = [n for n, p in net.named_parameters() if p.requires_grad]
    content = optimizer.state_dict()
    content["param_groups"][0]["param_names"] = names
    torch.save(content, tmp_path / "a.pt")
    summary = extract(tmp_path / "a.pt", tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", live(net, optimizer))
    assert (summary.step, summary.beta2) == (STEPS, 0.99)


LABELS = {
    "lr_scale": 0.5,
    "layer_id": 3,
    "group_name": "decay",
    "wd_mult": 0.0,
    "initial_lr": 1e-3,
    "name": "x",
}


def test_labels_of_groups_are_no_settings(tmp_path):
    state = adam_state()
    extract(saved_states(tmp_path / "a.pt", {"w": state}, **LABELS), tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", {"w": state["exp_avg_sq"]})


LAYOUTS = {
    "timm's LAMB": (
        {},
        {
            "bias_correction": True,
            "grad_averaging": True,
            "max_grad_norm": 1.0,
            "trust_clip": False,
            "always_adapt": False,
            "caution": False,
            "decoupled": False,
            "step": 3,
        },
    ),
    "apex FusedAdam": ({}, {"bias_correction": True, "step": 3}),
    "AdEMAMix": (
        {"exp_avg": None, "exp_avg_fast": torch.zeros(4, 5), "exp_avg_slow": torch.zeros(4, 5)},
        {"betas": (0.9, 0.99, 0.9999), "alpha": 5.0, "beta3_warmup": 100, "alpha_warmup": 100},
    ),
    "any-precision AdamW": (
        {"compensation": torch.zeros(4, 5)},
        {
            "use_kahan_summation": True,
            "momentum_dtype": torch.bfloat16,
            "variance_dtype": torch.bfloat16,
            "compensation_buffer_dtype": torch.bfloat16,
        },
    ),
    "TransformerEngine": ({"master_param": torch.zeros(4, 5)}, {"bias_correction": True, "step": 3}),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_kin_by_their_layouts(tmp_path, kind):
    more, settings = LAYOUTS[kind]
    state = adam_state(**more)
    settings = {"betas": (0.9, 0.99)} | settings
    summary = extract(saved_states(tmp_path / "a.pt", {"w": state}, **settings), tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", {"w": state["exp_avg_sq"]})
    assert (summary.step, summary.beta2) == (STEPS, 0.99)


def test_schedule_free(net, tmp_path):
    """Its group counts the steps; z is the weights."""
    schedulefree = pytest.importorskip("schedulefree")
    optimizer = schedulefree.AdamWScheduleFree(
        [p for p in net.parameters() if p.requires_grad], betas=(0.9, 0.98)
    )
    optimizer.train()
    train(net, optimizer)
    content = optimizer.state_dict()
    content["param_groups"][0]["param_names"] = [n for n, p in net.named_parameters() if p.requires_grad]
    torch.save(content, tmp_path / "a.pt")
    summary = extract(tmp_path / "a.pt", tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", live(net, optimizer))
    assert (summary.step, summary.beta2) == (STEPS, 0.98)


def test_schedule_free_by_its_layout(tmp_path):
    """As schedulefree 1.4 writes it."""
    states = {"w": {"z": torch.randn(4, 5), "exp_avg_sq": torch.rand(4, 5)}}
    settings = {"r": 0.0, "k": 12, "warmup_steps": 0, "train_mode": True, "weight_sum": 1.0, "lr_max": 1e-3}
    settings |= {"scheduled_lr": 1e-3, "weight_lr_power": 2.0, "foreach": True, "weight_decay": 0.0}
    summary = extract(saved_states(tmp_path / "a.pt", states, **settings), tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", {"w": states["w"]["exp_avg_sq"]})
    assert (summary.step, summary.beta2) == (12, 0.999)


PRODIGY = {
    "beta3": None,
    "use_bias_correction": False,
    "d_max": 2e-3,
    "d_numerator": 0.0,
    "d_coef": 1.0,
    "k": 40,
}
PRODIGY |= {
    "growth_rate": float("inf"),
    "safeguard_warmup": False,
    "decouple": True,
    "slice_p": 1,
    "fsdp_in_use": False,
}


@pytest.mark.parametrize("d0", [2e-3, 1e-6])
def test_prodigy_is_divided_by_its_step_size(tmp_path, d0):
    """v is the mean of (d g)^2; as prodigyopt 1.1.2 writes it."""
    true = torch.rand(4, 5)
    d = 2e-3
    state = adam_state(exp_avg_sq=true * d * d, s=torch.zeros(20), p0=torch.zeros(20))
    path = saved_states(tmp_path / "a.pt", {"w": state}, d=d, d0=d0, **PRODIGY)
    summary = extract(path, tmp_path / "v.safetensors")
    from safetensors.torch import load_file

    torch.testing.assert_close(load_file(tmp_path / "v.safetensors")["w"], true, rtol=1e-6, atol=0)
    (note,) = summary.notes
    assert "divided by d^2, with d = 0.002" in note
    assert ("if d stood still" in note) == (d0 != d)


def test_prodigy_itself(tmp_path):
    """Against Adam on the same gradients, where d does not move."""
    prodigyopt = pytest.importorskip("prodigyopt")
    found = {}
    for name, make in (
        ("prodigy", lambda ps: prodigyopt.Prodigy(ps, d0=1e-4, growth_rate=1.0)),
        ("adam", lambda ps: torch.optim.Adam(ps, lr=1e-9)),
    ):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 4)
        optimizer = make(model.parameters())
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        found[name] = model, optimizer
    content = found["prodigy"][1].state_dict()
    if content["param_groups"][0]["d"] != 1e-4:
        pytest.skip("d moved")
    content["param_groups"][0]["param_names"] = ["weight", "bias"]
    torch.save(content, tmp_path / "a.pt")
    extract(tmp_path / "a.pt", tmp_path / "v.safetensors")
    from safetensors.torch import load_file

    for name, value in live(*found["adam"]).items():
        torch.testing.assert_close(load_file(tmp_path / "v.safetensors")[name], value, rtol=1e-5, atol=0)


def test_states_without_second_moments(tmp_path):
    for state, name in (
        ({"exp_avg": torch.ones(2)}, "Lion"),
        ({"momentum_buffer": torch.ones(2)}, "Muon or SGD"),
        ({"step": 1, "exp_avg": torch.ones(2), "exp_inf": torch.ones(2)}, "Adamax"),
        ({"step": 1, "m": torch.ones(2), "vmean": torch.ones(1)}, "Adam-mini"),
    ):
        path = saved_states(tmp_path / "a.pt", {"w": state})
        with pytest.raises(InputError, match=f"holds no second moments, only .* looks like {name}"):
            extract(path, tmp_path / "v.safetensors")
    saved_states(tmp_path / "a.pt", {"w": {"step": 0}})
    with pytest.raises(InputError, match="has taken no step"):
        extract(tmp_path / "a.pt", tmp_path / "v.safetensors")


def test_parameters_of_muon_beside_those_of_adam(tmp_path):
    """One optimizer with both: Adam's are read, Muon's are listed."""
    content = {
        "state": {"w": {"momentum_buffer": torch.ones(4, 5)}, "b": adam_state((4,))},
        "param_groups": [
            {"params": ["w"], "lr": 0.02, "momentum": 0.95, "ns_steps": 5, "use_muon": True},
            {"params": ["b"], "lr": 3e-4, "betas": (0.9, 0.95), "use_muon": False},
        ],
    }
    torch.save(content, tmp_path / "a.pt")
    summary = extract(tmp_path / "a.pt", tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", {"b": content["state"]["b"]["exp_avg_sq"]})
    assert (summary.missing, summary.beta2) == ({"w": "only momentum_buffer"}, 0.95)


@pytest.mark.parametrize("step", [7, torch.tensor([7]), torch.tensor(7.0)], ids=["int", "tensor", "scalar"])
def test_the_step_of_a_group(tmp_path, step):
    state = adam_state()
    del state["step"]
    summary = extract(saved_states(tmp_path / "a.pt", {"w": state}, step=step), tmp_path / "v.safetensors")
    assert summary.step == 7


def test_accept_says_what_it_is(tmp_path):
    accepted = accept(State(adam_state(), tmp_path, "x", {"betas": (0.9, 0.5)}))
    assert (accepted.kind.name, accepted.step, accepted.beta2, accepted.factor) == ("Adam", STEPS, 0.5, 1.0)
    assert accept(State({"momentum_buffer": torch.ones(2)}, tmp_path, "x")) is None


@pytest.mark.parametrize("kind", [kind for kind in FOREIGN if "8-bit" not in kind])
def test_a_recipe_that_names_the_file_itself(tmp_path, kind):
    """`preconditioner_path` takes torch files by name, too: the same states are refused there."""
    more, settings = FOREIGN[kind]
    path = saved_states(tmp_path / "a.pt", {"w": adam_state(**more)}, **settings)
    with pytest.raises(InputError, match=r"models\[0\]: .*(not Adam's second moments|--as-adam)"):
        CurvatureFile.open(path, "models[0]")
    saved_states(path, {"w": adam_state()})
    assert CurvatureFile.open(path, "models[0]").names == ["w"]


def test_a_recipe_that_names_a_file_of_prodigy(tmp_path):
    state = adam_state(s=torch.zeros(20), p0=torch.zeros(20))
    path = saved_states(tmp_path / "a.pt", {"w": state}, d=1e-3, d0=1e-6, **PRODIGY)
    with pytest.raises(InputError, match="is of Prodigy: `ota-merge moments extract` converts it"):
        CurvatureFile.open(path, "models[0]")
