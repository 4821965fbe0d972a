"""PEFT's weighted adapters with and without these kernels, and adapters merged in core space."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ota_kernels import InputError, OutputError, RecipeError
from ota_kernels.integrations.core_space import merge_adapters
from ota_kernels.integrations.peft import _leading, accelerated

RANKS = (4, 4, 4)
NAMES = ("one", "two", "three")


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft.tuners.lora", None)
    with pytest.raises(RecipeError, match=r"pip install 'ota-kernels\[peft\]'"), accelerated():
        pass


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(30, 12)
        self.up = torch.nn.Linear(12, 40)
        self.conv = torch.nn.Conv2d(3, 5, 3)


def adapted(ranks=RANKS, targets=("embed", "up", "conv")):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'ota-kernels[peft]'")
    torch.manual_seed(0)
    model = None
    for name, rank in zip(NAMES, ranks, strict=True):
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets))
        if model is None:
            model = peft.get_peft_model(Net(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    return model


def delta(model, name: str) -> dict[str, torch.Tensor]:
    net = model.base_model.model
    keys = ("embed", "up", "conv")
    return {key: getattr(net, key).get_delta_weight(name).detach() for key in keys}


KINDS = {
    "linear": {},
    "ties": {"density": 0.4},
    "magnitude_prune": {"density": 0.37},
    "svd": {},
    "ties_svd": {"density": 0.4},
    "magnitude_prune_svd": {"density": 0.4},
}


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_peft(kind, sign):
    if sign == "frequency" and "ties" not in kind:
        pytest.skip("elects no signs")
    model = adapted()
    options = {"combination_type": kind, "majority_sign_method": sign, **KINDS[kind]}
    model.add_weighted_adapter(list(NAMES), [0.7, -0.4, 1.2], "theirs", **options)
    with accelerated():
        model.add_weighted_adapter(list(NAMES), [0.7, -0.4, 1.2], "ours", **options)
    ours, theirs = delta(model, "ours"), delta(model, "theirs")
    for key, expected in theirs.items():
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(ours[key], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_chance_follows_the_seed_and_keeps_the_mean(kind):
    from ota_kernels.integrations import peft as ours

    function = {"dare_linear": ours._dare_linear, "dare_ties": ours._dare_ties}[kind]
    tensors, weights = [torch.ones(200, 200)], torch.tensor([2.0])
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(function(tensors, weights, 0.25))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert set(found[0].unique().tolist()) == {0.0, 8.0}
    assert found[0].mean() == pytest.approx(2.0, rel=0.05)


def test_the_largest_are_counted_as_peft_counts():
    from ota_kernels.integrations import peft as ours

    tensor = torch.arange(1.0, 101.0)
    kept = ours._magnitude_prune([tensor], torch.tensor([1.0]), 0.57)  # 0.57 * 100 is 56.99...
    assert int((kept != 0).sum()) == int(0.57 * 100) == 56
    equal = ours._magnitude_prune([torch.ones(10)], torch.tensor([1.0]), 0.3)
    assert equal.tolist() == [1.0] * 3 + [0.0] * 7
    assert not ours._magnitude_prune([tensor], torch.tensor([1.0]), 0.0).any()
    with pytest.raises(ValueError, match="Density should be >= 0"):
        ours._ties([tensor], torch.tensor([1.0]), -0.1)


def test_what_was_replaced_is_back_after_an_error():
    adapted()
    from peft.tuners.lora import model as lora

    before = lora.ties
    within = []

    def fail() -> None:
        with accelerated():
            within.append(lora.ties)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert within[0] is not before
    assert lora.ties is before


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (7, 7)])
@pytest.mark.parametrize("true_rank", [3, 100])
def test_leading_triples(shape, true_rank):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    if true_rank < min(shape):
        x = x[:, :true_rank] @ torch.randn(true_rank, shape[1], dtype=torch.float64)
    b, a = _leading(x, 5)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(b @ a, (u[:, :5] * s[:5]) @ vt[:5], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(b.norm(dim=0)[:3], s[:3])


# Core space


def saved(folder, ranks=(2, 5, 3), **changes):
    """Adapters of unlike ranks as PEFT saves them, and what each adds."""
    model = adapted(ranks)
    for name in NAMES:
        model.save_pretrained(folder, selected_adapters=[name])
    for name in NAMES:
        path = folder / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes.get(name, {})))
    return [folder / name for name in NAMES], [delta(model, name) for name in NAMES]


def added(folder) -> dict[str, torch.Tensor]:
    """What PEFT adds to a model when it loads the adapter."""
    import peft

    torch.manual_seed(0)
    model = peft.PeftModel.from_pretrained(Net(), folder, adapter_name="merged")
    return delta(model, "merged")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_a_sum_is_lossless(tmp_path):
    folders, deltas = saved(tmp_path)
    report = merge_adapters(folders, tmp_path / "out", method="task_arithmetic", weight=[0.5, -1.0, 2.0])
    assert report == {"modules": 3, "rank": 10, "lost": 0.0}
    found = added(tmp_path / "out")
    for key in found:
        expected = sum(w * d[key] for w, d in zip([0.5, -1.0, 2.0], deltas, strict=True))
        assert relative(found[key], expected) < 1e-6


def test_rank_and_dtype(tmp_path):
    folders, deltas = saved(tmp_path)
    report = merge_adapters(folders, tmp_path / "out", method="linear", rank=4, dtype="bfloat16")
    assert report["rank"] == 4
    assert 0 < report["lost"] < 1
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    expected = sum(d["up"] for d in deltas) / 3
    u, s, vt = torch.linalg.svd(expected, full_matrices=False)
    assert relative(added(tmp_path / "out")["up"], (u[:, :4] * s[:4]) @ vt[:4]) < 2e-2


@pytest.mark.parametrize("method", ["iso_c", "covariance"])
def test_methods_of_whole_matrices_are_those_of_the_products(tmp_path, method):
    """iso_c up to a factor: its mean is over the directions that there are."""
    from ota_kernels import merge_tensors

    folders, deltas = saved(tmp_path)
    merge_adapters(folders, tmp_path / "out", method=method)
    products = [d["up"].detach().double() for d in deltas]
    expected = merge_tensors(torch.zeros_like(products[0]), products, method=method, name="up.weight")
    found = added(tmp_path / "out")["up"].double()
    if method == "iso_c":
        found, expected = found / found.norm(), expected / expected.norm()
    assert relative(found, expected) < 1e-4


def test_ties_in_core_space_against_numpy(tmp_path):
    folders, _ = saved(tmp_path, ranks=(3, 3, 3))
    merge_adapters(folders, tmp_path / "out", method="ties", weight=1.0, density=1.0)
    factors = []
    for folder in folders:
        tensors = load_file(folder / "adapter_model.safetensors")
        a, b = (tensors[f"base_model.model.up.lora_{side}.weight"].double().numpy() for side in "AB")
        factors.append((b, a))
    u = np.linalg.svd(np.concatenate([b for b, _ in factors], 1), full_matrices=False)[0]
    v = np.linalg.svd(np.concatenate([a.T for _, a in factors], 1), full_matrices=False)[0]
    cores = np.stack([2 * (u.T @ b) @ (a @ v) for b, a in factors])
    sign = np.where(cores.sum(0) >= 0, 1, -1)
    agree = np.sign(cores) == sign
    merged = (cores * agree).sum(0) / np.maximum(agree.sum(0), 1)
    expected = torch.from_numpy(u @ merged @ v.T).float()
    assert relative(added(tmp_path / "out")["up"], expected) < 1e-5


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"use_dora": True}, r"uses DoRA \(`use_dora`\)"),
            ({"bias": "all"}, r"trains biases \(`bias`\)"),
            ({"base_model_name_or_path": "other"}, "`base_model_name_or_path` is 'other'"),
            ({"peft_type": "IA3"}, "only LoRA can be merged"),
        ],
        ids=str,
    )
    def test_other_adapters(self, tmp_path, change, text):
        folders, _ = saved(tmp_path, one={"base_model_name_or_path": "base"}, two=change)
        with pytest.raises(InputError, match=text):
            merge_adapters(folders, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_arguments(self, tmp_path):
        folders, _ = saved(tmp_path)
        with pytest.raises(RecipeError, match="rank must be at least 1"):
            merge_adapters(folders, tmp_path / "out", rank=0)
        with pytest.raises(RecipeError, match="`weight`"):
            merge_adapters(folders, tmp_path / "out", method="ties")
        with pytest.raises(OutputError, match="is not empty"):
            merge_adapters(folders, folders[0], weight=1.0)


def test_the_command(tmp_path, ota_merge):
    saved(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "merge_method: ties\nmodels:\n"
        + "".join(
            f"  - model: {name}\n    parameters: {{weight: {w}}}\n"
            for name, w in zip(NAMES, (1, 2, 1), strict=True)
        )
        + "parameters: {density: 0.5, lambda: 0.8}\nrank: 6\n"
    )
    code, printed, errors = ota_merge("adapters", recipe, tmp_path / "out")
    assert (code, errors) == (0, "")
    assert printed.startswith(f"{tmp_path / 'out'}: 3 modules of rank 6; ")
    merge_adapters(
        [tmp_path / n for n in NAMES],
        tmp_path / "same",
        method="ties",
        weight=[1, 2, 1],
        density=0.5,
        lambda_=0.8,
        rank=6,
    )
    one, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("out", "same"))
    assert all(torch.equal(one[key], other[key]) for key in other)
    assert ota_merge("adapters", recipe, tmp_path / "out")[0] == 2
    assert ota_merge("adapters", recipe, tmp_path / "out", "--overwrite", "-q") == (0, "", "")
    recipe.write_text("merge_method: ties\nmodels: [{model: a}]\nrnk: 3\n")
    code, _, errors = ota_merge("adapters", recipe, tmp_path / "x")
    assert (code, "unknown key `rnk`; did you mean `rank`?" in errors) == (2, True)
