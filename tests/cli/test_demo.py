"""The demo with one seed and a few steps: what lands in its folder, reuse, curvature, the table."""

from __future__ import annotations

import builtins
import io
import shlex
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

from ota_kernels.cli.demo import demo
from ota_kernels.demo import digits, folders, table
from ota_kernels.demo.digits import EXPERTS, VIEWS, Mlp, Settings
from ota_kernels.errors import OutputError, RecipeError

TINY = Settings(widths=(64, 12, 10), base_steps=20, expert_steps=5)
SHAPES = {
    "layers.0.weight": (12, 64),
    "layers.0.bias": (12,),
    "layers.1.weight": (10, 12),
    "layers.1.bias": (10,),
}
LABELS = [
    "base",
    *(f"expert {view}" for view in EXPERTS),
    "linear",
    "OTA",
    "OTA+FFG density 0.2",
    "OTA+FFG mass 0.9",
    "ota-merge recipe",
    "the same, lambda 1",
]


@pytest.fixture(scope="module")
def seed_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert folders.prepare(folder, TINY)
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    lines = []
    return folder, table.run(folder, seeds=1, settings=TINY, say=lines.append), lines


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_keeps_every_pixel(view):
    images = torch.arange(2 * 64, dtype=torch.float32).reshape(2, 8, 8) / 128
    seen = VIEWS[view](images)
    pixels = 1 - seen if view == "inverted" else seen
    assert torch.equal(pixels.flatten(1).sort().values, images.flatten(1))
    assert torch.equal(seen, images) == (view == "clean")


def test_held_out_digits_are_fixed_per_seed_and_never_trained_on():
    training, held_out = digits.split(TINY)
    _, again = digits.split(TINY)
    _, other = digits.split(replace(TINY, seed=1))
    assert (len(training), len(held_out)) == (1797 - TINY.held_out, TINY.held_out)
    assert torch.equal(held_out.images, again.images)
    assert not torch.equal(held_out.images, other.images)
    # The 1797 digits are all different, so a shared image would be a shared sample.
    both = torch.cat([training.images, held_out.images]).flatten(1)
    assert len(both.unique(dim=0)) == 1797


def test_training_is_deterministic_and_leaves_the_global_generator_alone():
    training, _ = digits.split(TINY)
    state = torch.random.get_rng_state()
    first, second = (digits.train_base(TINY, training).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_checkpoints_have_the_model_s_tensors_in_float32(seed_folder):
    base = load_file(seed_folder / "base" / "model.safetensors")
    assert shapes(base) == SHAPES
    for view in EXPERTS:
        expert = load_file(folders.expert_folder(seed_folder, view) / "model.safetensors")
        assert shapes(expert) == SHAPES
        assert all(tensor.dtype == torch.float32 for tensor in expert.values())
        assert not torch.equal(expert["layers.1.weight"], base["layers.1.weight"])


@pytest.mark.parametrize("view", EXPERTS)
def test_curvature_is_named_and_shaped_as_the_parameters_and_not_negative(seed_folder, view):
    file = folders.expert_folder(seed_folder, view) / "exp_avg_sq.safetensors"
    curvature = load_file(file)
    assert shapes(curvature) == SHAPES
    assert all(tensor.dtype == torch.float32 and tensor.min() >= 0 for tensor in curvature.values())
    assert all(tensor.max() > 0 for tensor in curvature.values())
    with safe_open(file, "pt") as opened:
        assert (opened.metadata()["step"], float(opened.metadata()["beta2"])) == ("5", 0.999)


def test_curvature_after_one_step_is_the_squared_gradient():
    settings = replace(TINY, expert_steps=1, batch=8)
    training, _ = digits.split(settings)
    base = digits.train_base(settings, training)
    _, exp_avg_sq = digits.train_expert(settings, base, training, "mirrored")
    generator = torch.Generator().manual_seed(settings.seed)
    batch = training.seen_as("mirrored").take(torch.randint(len(training), (8,), generator=generator))
    base.zero_grad()
    torch.nn.functional.cross_entropy(base(batch.images), batch.labels).backward()
    for name, parameter in base.named_parameters():
        torch.testing.assert_close(exp_avg_sq[name], (1 - 0.999) * parameter.grad**2)


def test_training_teaches_an_expert_its_view():
    settings = Settings(widths=(64, 32, 10), base_steps=50, expert_steps=200, expert_rate=2e-3)
    training, held_out = digits.split(settings)
    base = digits.train_base(settings, training)
    expert, _ = digits.train_expert(settings, base, training, "inverted")
    seen = held_out.seen_as("inverted")
    assert digits.accuracy(expert, seen) > digits.accuracy(base, seen)


def test_accuracy_is_the_share_labelled_right():
    model = Mlp((64, 10))
    with torch.no_grad():
        model.layers[0].weight.zero_()
        model.layers[0].bias.copy_(torch.arange(10.0))  # always says 9
    data = digits.Images(torch.zeros(4, 8, 8), torch.tensor([9, 1, 9, 9]))
    assert digits.accuracy(model, data) == 3 / 4


def test_a_second_run_reuses_what_is_trained(seed_folder):
    kept = sorted(seed_folder.rglob("*.safetensors"))
    before = [file.stat().st_mtime_ns for file in kept]
    assert len(kept) == 1 + 2 * len(EXPERTS)
    assert not folders.prepare(seed_folder, TINY)
    assert [file.stat().st_mtime_ns for file in kept] == before


@pytest.mark.parametrize(
    "lost", ["demo.json", "base/model.safetensors", "expert_shifted/exp_avg_sq.safetensors"]
)
def test_a_missing_file_trains_again(tmp_path, lost):
    folders.prepare(tmp_path, TINY)
    curvature = tmp_path / "expert_shifted" / "exp_avg_sq.safetensors"
    before = load_file(curvature)
    (tmp_path / lost).unlink()
    assert folders.prepare(tmp_path, TINY)
    assert (tmp_path / lost).is_file()
    after = load_file(curvature)
    assert all(torch.equal(after[name], before[name]) for name in SHAPES)


def test_other_settings_train_again(tmp_path):
    folders.prepare(tmp_path, TINY)
    assert folders.prepare(tmp_path, replace(TINY, expert_steps=6))


def test_an_interrupted_training_is_not_reused(tmp_path, monkeypatch):
    folders.prepare(tmp_path, TINY)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(digits, "train_expert", interrupt)
        with pytest.raises(KeyboardInterrupt):
            folders.prepare(tmp_path, replace(TINY, expert_steps=6))
    assert folders.prepare(tmp_path, TINY)


def test_the_table_has_every_row_and_true_numbers(measured):
    folder, rows, lines = measured
    assert [row.label for row in rows] == LABELS
    assert len(lines) == 1
    _, held_out = digits.split(TINY)
    merged = folders.load_model(folder / "seed0" / "ota_ffg_mass")
    expected = [digits.accuracy(merged, held_out.seen_as(view)) for view in VIEWS]
    row = next(row for row in rows if row.label == "OTA+FFG mass 0.9")
    assert list(row.accuracies) == expected
    assert row.mean == pytest.approx(sum(expected) / len(VIEWS))


def test_the_merges_are_what_their_recipes_say(measured):
    folder, rows, _ = measured
    seed = folder / "seed0"
    experts = [load_file(folders.expert_folder(seed, view) / "model.safetensors") for view in EXPERTS]
    linear = load_file(seed / "linear" / "model.safetensors")
    for name in SHAPES:
        mean = torch.stack([e[name].double() for e in experts]).mean(0)
        # Five float32 additions of weights below 1; experts differ by about 1e-3.
        torch.testing.assert_close(linear[name].double(), mean, rtol=0, atol=5 * 5 * 2**-24)
    kept = {row.label: row.kept for row in rows}
    total = sum(tensor.numel() for tensor in linear.values())
    assert kept["base"] is None
    assert kept["linear"] == kept["OTA"] == kept["expert mirrored"] == 1
    # k = floor(0.2 n) of each expert, plus ties, which float32 saliencies of a real training hardly have.
    assert int(0.2 * total) / total <= kept["OTA+FFG density 0.2"] <= 0.2 + 2 / total
    assert 0 < kept["OTA+FFG mass 0.9"] < 0.9


def test_rows_are_averaged_over_seeds():
    first = [table.Row("base", (0.5, 0.7), None), table.Row("OTA", (0.2, 0.4), 0.1)]
    second = [table.Row("base", (0.7, 0.9), None), table.Row("OTA", (0.4, 0.8), 0.3)]
    base, ota = table.average([first, second])
    assert base.kept is None
    assert base.accuracies == pytest.approx((0.6, 0.8))
    assert (*ota.accuracies, ota.kept, ota.mean) == pytest.approx((0.3, 0.6, 0.2, fmean((0.3, 0.6))))


def test_the_printed_table_fits_80_columns():
    rows = [table.Row(label, (0.123456,) * len(VIEWS), 0.135) for label in LABELS]
    rows[0] = table.Row("base", (0.999,) * len(VIEWS), None)
    output = io.StringIO()
    Console(file=output, width=80).print(table.render(rows, seeds=3))
    lines = output.getvalue().splitlines()
    assert lines[1].split() == [*VIEWS, "mean", "kept"]
    assert lines[2].split() == ["base", *["99.9"] * (len(VIEWS) + 1), "-"]
    assert lines[-1].startswith("the same, lambda 1 ")
    assert lines[-1].split()[-2:] == ["12.3", "13.5"]
    assert len(lines) == 2 + len(LABELS)


def test_the_command_prints_the_table_and_what_to_try_next(tmp_path, monkeypatch):
    asked = []
    rows = [table.Row(label, (0.5,) * len(VIEWS), 1.0) for label in LABELS]
    monkeypatch.setattr(table, "run", lambda folder, seeds: asked.append((folder, seeds)) or rows)
    result = CliRunner().invoke(demo, [str(tmp_path / "my out"), "--seeds", "2"])
    assert result.exit_code == 0, result.output
    assert asked == [(tmp_path / "my out", 2)]
    assert all(label in result.output for label in LABELS)
    command = result.output.splitlines()[-1]
    assert shlex.split(command) == [
        "ota-merge",
        "run",
        str(tmp_path / "my out" / "seed0" / "ota_ffg_mass.yaml"),
        str(tmp_path / "my out" / "my_merge"),
    ]


def test_a_missing_scikit_learn_is_one_line_that_says_what_to_install(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_sklearn(name, *args, **kwargs):
        if name.split(".")[0] == "sklearn":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(
        RecipeError, match=r"^the demo needs scikit-learn: pip install 'ota-kernels\[demo\]'$"
    ):
        table.run(tmp_path / "out", seeds=1, settings=TINY, say=lambda _: None)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file/demo"):
        table.run(tmp_path / "file" / "demo", seeds=1, settings=TINY, say=lambda _: None)
