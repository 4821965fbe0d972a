"""Second moments out of checkpoints of real optimizers, by name; bad input; the file and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from checkpoints import mounted_tiny_disk, save_model
from optimizers import STEPS, Net, assert_extracted, decay_groups, live, metadata_of, train
from safetensors.torch import load_file

from ota_kernels import InputError, OutputError, RecipeError
from ota_kernels.cli import moments as command
from ota_kernels.io.curvature import CurvatureFile
from ota_kernels.moments import extract
from ota_kernels.moments.readers import formats
from ota_kernels.moments.readers import values as values_module
from ota_kernels.moments.source import Moment, Piece, Source
from ota_kernels.moments.writing import write_moments

# States with names.


def test_names_in_param_groups(net, tmp_path):
    optimizer = torch.optim.AdamW(decay_groups(net.named_parameters()), betas=(0.9, 0.95))
    if "param_names" not in optimizer.param_groups[0]:
        pytest.skip("torch < 2.7 keeps no names")
    train(net, optimizer)
    torch.save({"epoch": 2, "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    summary = extract(tmp_path / "last.pt", tmp_path / "v.safetensors")
    expected = live(net, optimizer)
    assert_extracted(tmp_path / "v.safetensors", expected)
    assert metadata_of(tmp_path / "v.safetensors") == {
        "format": "pt",
        "source_format": "torch",
        "step": str(STEPS),
        "beta2": "0.95",
    }
    assert (summary.format, summary.step, summary.beta2) == ("torch", STEPS, 0.95)
    assert summary.tensors == len(expected)
    assert summary.elements == sum(tensor.numel() for tensor in expected.values())
    assert summary.nbytes == (tmp_path / "v.safetensors").stat().st_size
    assert (summary.missing, summary.extra, summary.varying) == ({}, (), ())


def test_a_merge_reads_what_was_extracted(net, tmp_path):
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99))
    train(net, optimizer)
    by_name = {n: optimizer.state[p] for n, p in net.named_parameters() if p in optimizer.state}
    torch.save(
        {"state": by_name, "param_groups": [{"params": list(by_name), "betas": (0.9, 0.99)}]},
        tmp_path / "a.pt",
    )
    extract(tmp_path / "a.pt", tmp_path / "v.safetensors")
    curvature = CurvatureFile.open(tmp_path / "v.safetensors", "models[0]")
    assert curvature.bias_correction("hidden.weight") == 1 - 0.99**STEPS


def test_names_of_wrapped_modules(net, tmp_path):
    """torch.compile, FSDP and DistributedDataParallel rename parameters; the model's files do not."""
    moments = {f"module._orig_mod.{n}": torch.rand_like(p) for n, p in net.named_parameters()}
    torch.save({"state": {n: {"exp_avg_sq": v} for n, v in moments.items()}}, tmp_path / "optimizer.bin")
    save_model(tmp_path, net.state_dict())
    summary = extract(tmp_path, tmp_path / "v.safetensors")
    assert_extracted(
        tmp_path / "v.safetensors", {n.removeprefix("module._orig_mod."): v for n, v in moments.items()}
    )
    assert (summary.step, summary.beta2, summary.missing, summary.extra) == (None, None, {}, ())


def test_steps_that_differ_are_left_out(net, tmp_path):
    optimizer = torch.optim.AdamW(decay_groups(net.named_parameters()))
    optimizer.param_groups[1]["betas"] = (0.9, 0.9)
    train(net, optimizer)
    net.embed.weight.requires_grad_(False)
    net.embed.weight.grad = None
    train(net, optimizer)
    by_name = {n: optimizer.state[p] for n, p in net.named_parameters() if p in optimizer.state}
    groups = [
        {"params": [n for n, _ in group["params"]], "betas": betas}
        for group, betas in zip(
            decay_groups(Net().named_parameters()), [(0.9, 0.999), (0.9, 0.9)], strict=True
        )
    ]
    torch.save({"state": by_name, "param_groups": groups}, tmp_path / "a.pt")
    summary = extract(tmp_path / "a.pt", tmp_path / "v.safetensors")
    assert (summary.step, summary.beta2, summary.varying) == (None, None, ("step", "beta2"))
    assert metadata_of(tmp_path / "v.safetensors") == {"format": "pt", "source_format": "torch"}
    with pytest.raises(InputError, match=r"metadata .step. is missing"):
        CurvatureFile.open(tmp_path / "v.safetensors", "models[0]").bias_correction("embed.weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_types_become_float32(tmp_path, dtype):
    values = torch.rand(5, 3).to(dtype)
    torch.save({"state": {"w": {"exp_avg_sq": values}}}, tmp_path / "a.pt")
    extract(tmp_path / "a.pt", tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", {"w": values})


def test_more_than_one_piece(tmp_path):
    """With scalars and empty tensors beside."""
    many = values_module.PIECE_ELEMENTS + 7
    state = {"w": torch.rand(many), "s": torch.tensor(0.5), "e": torch.zeros(0, 3)}
    torch.save({"state": {n: {"exp_avg_sq": v} for n, v in state.items()}}, tmp_path / "a.pt")
    extract(tmp_path / "a.pt", tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", state)


# Bad input, through the command line: exit code 2, one line, nothing written.


@pytest.fixture
def refused(refused_command, tmp_path):
    def refused(checkpoint, *options, out=tmp_path / "v.safetensors", facts=()):
        refused_command("moments", "extract", checkpoint, out, *options, facts=facts)

    return refused


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def saved(tmp_path, **moments):
    """A state with names."""
    torch.save({"state": {n: {"step": 1, "exp_avg_sq": v} for n, v in moments.items()}}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_no_checkpoint(refused, tmp_path):
    refused(tmp_path / "none", facts=[tmp_path / "none", "no such file or folder"])
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", facts=[tmp_path / "folder", *formats.FORMATS])
    for name in ("torch", "trainer"):
        refused(tmp_path / "folder", "--format", name, facts=[tmp_path / "folder", "optimizer.pt"])


def test_a_file_that_is_no_optimizer_state(refused, tmp_path):
    file = tmp_path / "optimizer.pt"
    file.write_bytes(b"not a torch file")
    refused(file, facts=[file, "not a complete, uncompressed torch file"])
    for content in ([1, 2], {"state": 5}, {"optimizer": {"w": torch.ones(2)}}):
        torch.save(content, file)
        refused(file, facts=[file, "not an optimizer's state"])


def test_a_damaged_file(refused, tmp_path):
    file = saved(tmp_path, w=torch.ones(100))
    file.write_bytes(file.read_bytes()[:-200])
    refused(file, facts=[file])


def test_a_pickle_with_code(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state": {"w": {"exp_avg_sq": RunsCode()}}}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", facts=["a.pt", "exp_avg_sq is not a plain tensor but of 'posix.mkdir'"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        pytest.param({"state": {0: {"exp_avg_sq": torch.ones(2)}}}, ["param_groups"], id="no groups"),
        pytest.param({"state": {"w": 3}}, ["state['w']", "not a dict"], id="state"),
        pytest.param({"state": {"w": {}}}, ["no second moments"], id="empty state"),
        pytest.param({"state": {1.5: {}}}, ["1.5"], id="key"),
        pytest.param(
            {"state": {"w": {"momentum_buffer": torch.ones(2)}}}, ["momentum_buffer", "Adam"], id="no moments"
        ),
        pytest.param({"state": {"w": {"exp_avg_sq": 0.5}}}, ["exp_avg_sq is not a plain"], id="no tensor"),
        pytest.param(
            {"state": {"w": {"exp_avg_sq": torch.ones(2, dtype=torch.int32)}}},
            ["int32", "float32"],
            id="integers",
        ),
        pytest.param(
            {"state": {"w": {"exp_avg_sq": torch.ones(2), "step": "many"}}}, ["step", "'many'"], id="step"
        ),
        pytest.param(
            {"state": {"w": {"exp_avg_sq": torch.ones(2), "step": float("nan")}}},
            ["step is nan"],
            id="step nan",
        ),
        pytest.param(
            {"state": {"w": {"exp_avg_sq": torch.ones(2)}}, "param_groups": [{"params": ["w", "w"]}]},
            ["twice"],
            id="listed twice",
        ),
        pytest.param(
            {"state": {"w": {"exp_avg_sq": torch.ones(2)}}, "param_groups": [{"params": ["v"]}]},
            ["'w'", "none of the param_groups"],
            id="stray state",
        ),
        pytest.param(
            {"state": {"w": {"exp_avg_sq": torch.ones(2)}}, "param_groups": [{"params": [[]]}]},
            ["param_groups[0]", "params"],
            id="params",
        ),
        pytest.param(
            {
                "state": {0: {"exp_avg_sq": torch.ones(2)}},
                "param_groups": [{"params": [0], "param_names": [None]}],
            },
            ["param_groups[0]", "param_names"],
            id="param_names",
        ),
        pytest.param(
            {"state": {"_orig_mod.w": {"exp_avg_sq": torch.ones(2)}, "w": {"exp_avg_sq": torch.ones(2)}}},
            ["'w'", "name of its own"],
            id="one name twice",
        ),
    ],
)
def test_contradictory_states(refused, tmp_path, content, facts):
    torch.save(content, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", facts=[tmp_path / "a.pt", *facts])


@pytest.mark.parametrize("bad", [-1.0, -1e-40, float("nan"), float("inf")])
def test_values_that_are_no_second_moments(refused, tmp_path, bad):
    values = torch.ones(4, 5)
    values[2, 1] = values[3, 3] = bad
    refused(saved(tmp_path, good=torch.ones(3), w=values), facts=["'w'", "2 of 20", "element 11"])


def test_the_first_bad_value_of_all_pieces(tmp_path):
    values = np.ones(30, np.float32)
    values[[13, 25, 26]] = -2
    parts = tuple(Piece(i, 10, lambda i=i: values[i : i + 10]) for i in (0, 10, 20))
    with pytest.raises(InputError, match=r"'w': 3 of 30 second moments .* element 13 \(-2\)"):
        write_moments(source(Moment("w", (30,), parts)), tmp_path / "v.safetensors", None, None, "x")


def test_zeros_are_second_moments(tmp_path):
    extract(saved(tmp_path, w=torch.tensor([0.0, -0.0, 1e-45])), tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", {"w": torch.tensor([0.0, 0.0, 1e-45])})


def test_a_model_that_does_not_fit(refused, tmp_path):
    file = saved(tmp_path, w=torch.ones(4, 5))
    refused(file, "--model", tmp_path / "none", facts=[tmp_path / "none"])
    save_model(tmp_path / "model", {"w": torch.ones(5, 4)})
    refused(file, "--model", tmp_path / "model", facts=["'w'", "[4, 5]", "[5, 4]"])
    save_model(tmp_path / "other", {"x": torch.ones(5, 4)})
    refused(file, "--model", tmp_path / "other", facts=["'w'", tmp_path / "other"])


def test_a_tied_output_matrix_needs_no_moments(tmp_path):
    file = saved(tmp_path, **{"embed_tokens.weight": torch.ones(5, 4)})
    both = {"embed_tokens.weight": torch.ones(5, 4), "lm_head.weight": torch.ones(5, 4)}
    for tied, missing in ((True, {}), (False, {"lm_head.weight": "not in the optimizer"})):
        save_model(tmp_path / "model", both)
        (tmp_path / "model" / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
        summary = extract(file, tmp_path / "v.safetensors", tmp_path / "model", overwrite=True)
        assert summary.missing == missing
        assert summary.parameters == 1 + len(missing)


def test_outputs_that_cannot_be(refused, tmp_path):
    file = saved(tmp_path, w=torch.ones(4))
    existing = tmp_path / "there.safetensors"
    existing.write_text("precious")
    refused(file, out=existing, facts=[existing, "--overwrite"])
    (tmp_path / "folder.safetensors").mkdir()
    refused(file, "--overwrite", out=tmp_path / "folder.safetensors", facts=["is a folder"])
    refused(file, out=tmp_path / "v.pt", facts=["v.pt", ".safetensors"])
    refused(file, out=tmp_path / "none" / "v.safetensors", facts=[tmp_path / "none", "does not exist"])


def test_overwrite(tmp_path):
    out = tmp_path / "v.safetensors"
    out.write_text("old")
    extract(saved(tmp_path, w=torch.ones(4)), out, overwrite=True)
    assert_extracted(out, {"w": torch.ones(4)})
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "v.safetensors"]


def test_a_disk_without_room(refused, tmp_path):
    file = saved(tmp_path, w=torch.ones(1 << 19))
    with mounted_tiny_disk(tmp_path / "disk") as disk:
        refused(file, out=disk / "v.safetensors", facts=[disk / "v.safetensors", "No space left"])
        assert os.listdir(disk) == []


def test_an_unknown_format(tmp_path):
    with pytest.raises(RecipeError, match="'zip' is not one of auto, torch"):
        extract(saved(tmp_path, w=torch.ones(4)), tmp_path / "v.safetensors", format="zip")


def test_the_command_line_offers_every_format():
    (option,) = (p for p in command.extract.params if p.name == "format_name")
    assert list(option.type.choices) == [formats.AUTO, *formats.FORMATS]


def test_a_folder_that_two_formats_recognise(refused, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    saved(tmp_path, w=torch.ones(4)).rename(tmp_path / "folder" / "optimizer.pt")

    def row(name):
        return formats.Format(name, name, "optimizer_file", "recognise_torch", "read_torch")

    monkeypatch.setattr(formats, "FORMATS", {"torch": formats.FORMATS["torch"], "a": row("a")})
    assert formats.choose(tmp_path / "folder", "auto")[1].name == "a"  # says more than "torch"
    monkeypatch.setattr(formats, "FORMATS", {"a": row("a"), "b": row("b")})
    refused(tmp_path / "folder", facts=["--format a or b"])


# Writing.


def source(*moments):
    return Source("test", moments, {})


def pieces(count, size, after=None):
    """`count` pieces of `size` elements; `after` is called in place of reading the last."""

    def read(i):
        if after is not None and i == count - 1:
            after()
        return np.full(size, i, np.float32)

    return tuple(Piece(i * size, size, lambda i=i: read(i)) for i in range(count))


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError])
def test_an_error_leaves_nothing(tmp_path, error):
    def fail():
        assert len(os.listdir(tmp_path)) == 2  # the unfinished file beside the old one
        raise error

    out = tmp_path / "v.safetensors"
    out.write_text("old")
    with pytest.raises(error):
        write_moments(source(Moment("w", (3, 10), pieces(3, 10, after=fail))), out, None, None, "x")
    assert out.read_text() == "old"
    assert os.listdir(tmp_path) == ["v.safetensors"]


def test_one_piece_in_memory(tmp_path):
    size = 1 << 20
    tracemalloc.start()
    write_moments(source(Moment("w", (16, size), pieces(16, size))), tmp_path / "v.safetensors", 1, None, "x")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 4 * size
    found = load_file(tmp_path / "v.safetensors")["w"]
    assert torch.equal(found, torch.arange(16.0)[:, None].expand(16, size))


def test_a_reader_that_leaves_gaps(tmp_path):
    first, second, third = pieces(3, 10)
    for broken in ((first, third), (second, third), (first, second), ()):
        with pytest.raises(InputError, match=r"elements .* missing|second moments for shape \[30\]"):
            write_moments(source(Moment("w", (30,), broken)), tmp_path / "v.safetensors", None, None, "x")
    assert os.listdir(tmp_path) == []


# What is printed.


def test_the_summary(ota_merge, tmp_path):
    torch.save(
        {
            "state": {
                "a": {"step": 20, "exp_avg_sq": torch.ones(4, 5)},
                "gone": {"step": 20, "exp_avg_sq": torch.ones(3)},
                "c": {"step": 20, "exp_avg_sq": torch.zeros(2)},
            },
            "param_groups": [{"params": ["a", "b", "c", "gone"], "betas": (0.9, 0.999)}],
        },
        tmp_path / "a.pt",
    )
    tensors = {
        "a": torch.ones(4, 5),
        "b": torch.ones(2),
        "c": torch.ones(2),
        "ids": torch.ones(2, dtype=torch.int64),
    }
    save_model(tmp_path / "model", tensors)
    out = tmp_path / "v.safetensors"
    code, printed, errors = ota_merge(
        "moments", "extract", tmp_path / "a.pt", out, "--model", tmp_path / "model"
    )
    assert (code, errors) == (0, "")
    first, *others = printed.splitlines()
    assert first.startswith(f"extracted torch into {out}: 2 tensors, 22 parameters, ")
    assert others == [
        "  step 20, beta2 0.999",
        "  no second moments for 1 of 3 parameters: b (never stepped)",
        "  all 0 for 1 of 2 parameters, about which they say nothing: c",
        "  not in the model, left out: gone",
    ]


def test_the_summary_without_step(ota_merge, tmp_path):
    code, printed, _ = ota_merge(
        "moments", "extract", saved(tmp_path, w=torch.ones(3)), tmp_path / "v.safetensors"
    )
    assert code == 0
    assert "  step 1, beta2 unknown" in printed
    assert "bias_correction" in printed


def test_help_is_light():
    code = (
        "import sys\nfrom ota_kernels.cli import main\nsys.argv[1:] = ['moments', 'extract', '--help']\n"
        "try: main()\nexcept SystemExit: pass\nassert not {'torch', 'numpy', 'rich'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_existing_output_is_found_before_anything_is_read(tmp_path):
    (tmp_path / "v.safetensors").touch()
    with pytest.raises(OutputError, match="exists"):
        extract(tmp_path / "none", tmp_path / "v.safetensors")
