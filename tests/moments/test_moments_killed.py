"""Processes that end early: what they leave is removed, at once or by the next one. And one line, always."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from optimizers import adam_state, assert_extracted, saved_states
from safetensors.torch import save_file

from ota_kernels.errors import one_line
from ota_kernels.moments import extract

# Extracts, and waits for ever before the last tensor is written.
WAITS = """
import sys, time
from ota_kernels.cli import main
from ota_kernels.moments import writing
real = writing._write
def slow(tensor, new, what):
    if tensor.name == "last":
        print("writing", flush=True)
        time.sleep(600)
    return real(tensor, new, what)
writing._write = slow
sys.argv = ["ota-merge", "moments", "extract", sys.argv[1], sys.argv[2]]
main()
"""


@pytest.fixture
def running(tmp_path):
    """A command in the middle of its work, and its output's path."""
    states = {"first": adam_state(), "last": adam_state()}
    (tmp_path / "out").mkdir()
    path, out = saved_states(tmp_path / "a.pt", states), tmp_path / "out" / "v.safetensors"
    process = subprocess.Popen([sys.executable, "-c", WAITS, path, out], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"writing\n"
        (left,) = os.listdir(out.parent)
        assert left.startswith(".v.safetensors.")
        yield process, path, out, states
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_terminated(running):
    process, _, out, _ = running
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143
    assert os.listdir(out.parent) == []


def test_killed_and_done_again(running):
    process, path, out, states = running
    process.kill()
    process.wait()
    assert len(os.listdir(out.parent)) == 1
    extract(path, out)
    assert os.listdir(out.parent) == [out.name]
    assert_extracted(out, {name: state["exp_avg_sq"] for name, state in states.items()})


def test_what_a_running_process_writes_stays(running):
    process, path, out, _ = running
    (unfinished,) = os.listdir(out.parent)
    extract(path, out)
    assert sorted(os.listdir(out.parent)) == sorted([unfinished, out.name])
    extract(path, out.with_name("w.safetensors"))
    assert unfinished in os.listdir(out.parent)
    assert process.poll() is None


def test_only_its_own_leavings_are_removed(tmp_path):
    path, out = saved_states(tmp_path / "a.pt", {"w": adam_state()}), tmp_path / "v.safetensors"
    others = [
        ".v.safetensors.12345678x",
        ".v.safetensors.notes",
        ".w.safetensors.12345678",
        "v.safetensors.12345678",
    ]
    for name in [*others, ".v.safetensors.0123abcd"]:
        (tmp_path / name).write_text("x")
    extract(path, out)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "a.pt", "v.safetensors"])


# One line.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb", "a\\nb"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("grün 字", "grün 字"),
        ("a\u202eb", "a\\u202eb"),
        ("\r", "\\r"),
    ],
)
def test_what_would_steer_a_terminal_is_escaped(text, expected):
    assert one_line(text) == expected


HOSTILE = "a\x1b[2J\nb"


def test_names_in_errors(ota_merge, tmp_path):
    for states, options in (
        ({HOSTILE: adam_state(projector=1)}, ()),
        ({HOSTILE: adam_state(exp_avg_sq=-torch.ones(4, 5))}, ()),
        ({HOSTILE: {"step": HOSTILE, "exp_avg_sq": torch.ones(2)}}, ()),
        ({"w": adam_state()}, ("--model", tmp_path / HOSTILE)),
        ({"w": adam_state()}, ("--format", HOSTILE)),
    ):
        path = saved_states(tmp_path / "a.pt", states)
        code, printed, errors = ota_merge("moments", "extract", path, tmp_path / "v.safetensors", *options)
        assert (code, printed) == (2, "")
        assert "\x1b" not in errors
        assert len(errors.splitlines()) == 1


def test_names_in_what_is_printed(ota_merge, tmp_path):
    states = {HOSTILE: adam_state(exp_avg_sq=torch.zeros(4, 5)), "w": adam_state()}
    out = tmp_path / "v.safetensors"
    code, printed, errors = ota_merge("moments", "extract", saved_states(tmp_path / "a.pt", states), out)
    assert (code, errors) == (0, "")
    assert "\\x1b[2J\\nb" in printed
    assert "\x1b" not in printed
    code, shown, _ = ota_merge("moments", "show", out)
    assert code == 0
    assert "\x1b" not in shown
    assert "a\\x1b[2J\\nb" in shown


def test_a_damaged_file_has_one_line_of_our_own(ota_merge, tmp_path):
    path = saved_states(tmp_path / "a.pt", {"w": adam_state()})
    data = bytearray(path.read_bytes())
    at = data.index(b"exp_avg_sq")
    for damage in (b"\x80\xff\x00\x00", b"....", b"\x93\x93\x93\x93"):
        data[at : at + 4] = damage
        path.write_bytes(bytes(data))
        code, _, errors = ota_merge("moments", "extract", path, tmp_path / "v.safetensors")
        assert code == 2
        assert len(errors.splitlines()) == 1
        assert len(errors) < 500


def test_nothing_of_a_library_is_printed(tmp_path):
    """transformers logs and warns while it builds a model; only our lines reach the screen."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    model.save_pretrained(tmp_path / "model")
    torch.save(optimizer.state_dict(), tmp_path / "model" / "optimizer.pt")
    command = [sys.executable, "-c", "from ota_kernels.cli import main; main()", "moments", "extract"]
    started = time.monotonic()
    done = subprocess.run(
        [*command, tmp_path / "model", tmp_path / "v.safetensors"], capture_output=True, text=True
    )
    assert time.monotonic() - started < 120
    assert (done.returncode, done.stderr) == (0, "")
    assert all(
        line.startswith(("extracted torch", "  step 1, beta2", "  numbers were"))
        for line in done.stdout.splitlines()
    )


def test_show_and_merge_name_an_estimate(tmp_path):
    """The file says what it is made of."""
    from ota_kernels.moments import show

    save_file({"w": torch.ones(2)}, tmp_path / "v.safetensors", {"source_format": "lora-lift (an estimate)"})
    assert show(tmp_path / "v.safetensors").source_format == "lora-lift (an estimate)"
