"""`ota-merge moments estimate`: the empirical Fisher diagonal, its samples, kills, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import assert_same_tensors, digests, edited, load_merged, write_recipe
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ota_kernels.cli
from ota_kernels import InputError, OutputError, merge, merge_state_dicts
from ota_kernels.cli.moments_estimate import estimate as command
from ota_kernels.errors import BackendError, RecipeError
from ota_kernels.moments import estimate as estimating
from ota_kernels.moments.estimate import estimate
from ota_kernels.moments.samples import draw
from ota_kernels.moments.sums import Sums, work_folder

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

VOCABULARY = 96
POSITIONS = 64
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def make_llama(tied: bool):
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        attention_dropout=0.5,  # shows if an estimate is not made in evaluation mode
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def save_tokenizer(folder: Path, size: int = VOCABULARY) -> None:
    """Words w0, w1, ... are tokens 0, 1, ...; no special tokens."""
    model = tokenizers.models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")
    fast.save_pretrained(folder)


def save_folder(folder: Path, tied: bool = False) -> Path:
    make_llama(tied).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folder by whether embeddings and output are tied. Tests do not change them."""
    root = tmp_path_factory.mktemp("models")
    return {tied: save_folder(root / f"tied{tied}", tied) for tied in (False, True)}


@pytest.fixture
def folder(folders):
    return folders[False]


@pytest.fixture
def own_folder(folder, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def texts(count: int, seed: int = 0) -> list[list[int]]:
    """Token ids below 80, 2 to 12 a text."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 80, rng.integers(2, 13)).tolist() for _ in range(count)]


def as_text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_texts(path: Path, samples: list[list[int]], key: str = "text") -> Path:
    return write_lines(path, [json.dumps({key: as_text(ids)}) for ids in samples])


@pytest.fixture
def data(tmp_path):
    return write_texts(tmp_path / "data.jsonl", texts(6))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "fisher.safetensors"


def exact_fisher(folder: Path, samples: list[list[int]]) -> dict[str, torch.Tensor]:
    """A plain loop in float64, by transformers' own loss."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    parameters = dict(model.named_parameters())
    fisher = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for ids in samples:
        batch = torch.tensor([ids])
        loss = model(input_ids=batch, labels=batch).loss
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            fisher[name] += gradient**2 / len(samples)
    return fisher


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Within float32 arithmetic: a gradient is good to 1e-5 of its tensor's largest."""
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        assert found[name].dtype == torch.float32
        error = (found[name].double().sqrt() - exact.sqrt()).abs().max()
        assert error <= 1e-5 * exact.max().sqrt(), (name, error, exact.max().sqrt())


class TestValues:
    @pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
    def test_are_the_mean_of_each_samples_squared_gradient(self, folders, data, out, tied):
        summary = estimate(folders[tied], data, out)
        found = load_file(out)
        assert_close(found, exact_fisher(folders[tied], texts(6)))
        assert (OUTPUT in found) is not tied
        assert all((h >= 0).all() for h in found.values())
        assert summary.samples == 6
        assert summary.tokens == sum(len(ids) - 1 for ids in texts(6))
        assert summary.elements == sum(h.numel() for h in found.values())
        assert (summary.cut, summary.skipped, summary.resumed, summary.out) == (0, 0, 0, out)

    def test_are_zero_where_no_sample_reaches(self, folder, data, out):
        estimate(folder, data, out)
        used = {i for ids in texts(6) for i in ids[:-1]}
        unused = [i for i in range(VOCABULARY) if i not in used]
        embedding = load_file(out)[EMBEDDING]
        assert (embedding[unused] == 0).all()
        assert (embedding[sorted(used)] > 0).any(dim=1).all()

    def test_use_the_first_tokens_of_a_long_text(self, folder, data, out):
        summary = estimate(folder, data, out, max_length=5)
        assert_close(load_file(out), exact_fisher(folder, [ids[:5] for ids in texts(6)]))
        assert summary.cut == sum(len(ids) > 5 for ids in texts(6)) > 0

    def test_in_bfloat16_are_coarser(self, folder, data, out, tmp_path):
        estimate(folder, data, out, dtype="bfloat16")
        estimate(folder, data, tmp_path / "fine.safetensors")
        coarse, fine = load_file(out), load_file(tmp_path / "fine.safetensors")
        for name, h in fine.items():
            assert coarse[name].dtype == torch.float32
            assert not torch.equal(coarse[name], h)
            assert coarse[name].sum().item() == pytest.approx(h.sum().item(), rel=0.1)

    def test_of_another_seed_come_from_other_samples(self, folder, data, tmp_path):
        singles = [exact_fisher(folder, [ids]) for ids in texts(6)]
        drawn = set()
        for seed in range(4):
            path = tmp_path / f"{seed}.safetensors"
            estimate(folder, data, path, samples=1, seed=seed)
            found = load_file(path)[EMBEDDING].double()
            errors = [(found - single[EMBEDDING]).abs().max() for single in singles]
            drawn.add(int(np.argmin(errors)))
            assert_close(load_file(path), singles[int(np.argmin(errors))])
        assert len(drawn) > 1

    def test_are_the_same_bytes_for_the_same_seed(self, folder, data, tmp_path):
        for name in ("a", "b"):
            estimate(folder, data, tmp_path / f"{name}.safetensors", samples=3, seed=5)
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()

    def test_need_one_gradient_at_a_time(self, folder, data, out, monkeypatch):
        models, norm, alive = [], torch.linalg.vector_norm, []
        load = estimating.causal_lm.load_model

        def watched_load(*arguments):
            models.append(load(*arguments))
            return models[0]

        def watched_norm(gradient):
            alive.append(sum(parameter.grad is not None for parameter in models[0].parameters()))
            return norm(gradient)

        monkeypatch.setattr(estimating.causal_lm, "load_model", watched_load)
        monkeypatch.setattr(torch.linalg, "vector_norm", watched_norm)
        estimate(folder, data, out)
        assert len(alive) == 6 * len(list(models[0].parameters()))
        assert set(alive) == {0}  # the one that is being added is let go before


def test_the_file_says_what_it_is_and_has_no_bias_to_correct(folder, data, out):
    estimate(folder, data, out, samples=4)
    with safe_open(out, "np") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["source_format"] == "fisher"
    assert metadata["samples"] == "4"
    assert not metadata.keys() & {"step", "beta2"}


class TestSamples:
    """`draw` with one token a character."""

    def draw(self, path, **options):
        options = {"count": 100, "max_length": 50, "text_key": "text", "seed": 0} | options
        return draw(path, lambda text: [ord(c) for c in text], **options)

    def test_are_lines_in_an_order_of_the_seed(self, tmp_path):
        path = write_lines(tmp_path / "d", [json.dumps({"text": f"text {i:02}"}) for i in range(40)])
        orders = [[s.line for s in self.draw(path, seed=seed).samples] for seed in (0, 0, 1)]
        assert orders[0] == orders[1] != orders[2]
        assert all(sorted(order) == list(range(1, 41)) for order in orders)
        assert orders[0] != sorted(orders[0])
        drawn = self.draw(path, count=7)
        assert [s.line for s in drawn.samples] == orders[0][:7]
        for sample in drawn.samples:
            assert "".join(map(chr, sample.ids)) == f"text {sample.line - 1:02}"

    def test_are_cut_skipped_and_counted(self, tmp_path):
        lines = [json.dumps({"text": text}) for text in ("", "a", "ab", "abc", "abcdef")]
        drawn = self.draw(write_lines(tmp_path / "d", ["", *lines, "  "]), max_length=3)
        assert sorted((s.line, len(s.ids)) for s in drawn.samples) == [(4, 2), (5, 3), (6, 3)]
        assert (drawn.cut, drawn.skipped, drawn.predicted) == (1, 2, 1 + 2 + 2)

    def test_need_no_newline_at_the_end_and_may_hold_any_character(self, tmp_path):
        text = "zwei\nZeilen\u2028ü\U0001f600"
        (tmp_path / "d").write_bytes(json.dumps({"text": text}, ensure_ascii=False).encode())
        assert [chr(i) for i in self.draw(tmp_path / "d").samples[0].ids] == list(text)

    def test_that_are_not_drawn_are_not_parsed(self, tmp_path):
        path = write_lines(tmp_path / "d", [json.dumps({"text": "good"}), "{"])
        first = [self.draw_or_line(path, seed) for seed in range(10)]
        assert set(first) == {1, "error"}

    def draw_or_line(self, path, seed):
        try:
            return self.draw(path, count=1, seed=seed).samples[0].line
        except InputError:
            return "error"

    def test_that_the_tokenizer_refuses_are_named(self, tmp_path):
        path = write_lines(tmp_path / "d", [json.dumps({"text": "good"})])

        def refuse(text):
            raise TypeError("not\nthis")

        with pytest.raises(InputError, match="line 1: the tokenizer fails: not this"):
            draw(path, refuse, count=1, max_length=9, text_key="text", seed=0)


@pytest.fixture
def commit_always(monkeypatch):
    """Every sample is committed."""
    monkeypatch.setattr(estimating, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(estimating, "COMMIT_SHARE", float("inf"))


def stop_at(sample: int):
    """A progress that is interrupted when so many samples are done; the last one is not committed."""

    def progress(done, total):
        if done == sample:
            raise KeyboardInterrupt

    return progress


def interrupting(function, calls: int):
    """`function`, interrupted at the call of that number, from 0, before it does anything."""
    left = [calls]

    def wrapped(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return wrapped


@pytest.mark.usefixtures("commit_always")
class TestResume:
    @pytest.fixture
    def expected(self, folder, data, tmp_path):
        estimate(folder, data, tmp_path / "expected.safetensors")
        return (tmp_path / "expected.safetensors").read_bytes()

    @pytest.mark.parametrize(
        ("place", "kept"),
        [("between samples", 3), ("in backward", 2), ("in a commit", 2), ("before the last rename", 6)],
    )
    def test_ends_where_nothing_had_happened(self, folder, data, out, expected, monkeypatch, place, kept):
        parameters = len(list(make_llama(False).parameters()))
        with monkeypatch.context() as patch:
            if place == "in backward":
                stopping = interrupting(torch.linalg.vector_norm, 2 * parameters + 5)
                patch.setattr(torch.linalg, "vector_norm", stopping)
            elif place == "in a commit":
                patch.setattr(os, "replace", interrupting(os.replace, 2))
            elif place == "before the last rename":
                patch.setattr(os, "replace", interrupting(os.replace, 6))
            progress = stop_at(4) if place == "between samples" else None
            with pytest.raises(KeyboardInterrupt):
                estimate(folder, data, out, progress=progress)
        assert not out.exists()
        seen = []
        summary = estimate(folder, data, out, resume=True, progress=lambda done, total: seen.append(done))
        assert summary.resumed == kept
        assert seen == list(range(kept, 7))
        assert out.read_bytes() == expected
        assert not work_folder(out).exists()

    def test_after_many_interrupts(self, folder, data, out, expected):
        for sample in range(2, 7):
            with pytest.raises(KeyboardInterrupt):
                estimate(folder, data, out, resume=True, progress=stop_at(sample))
        assert estimate(folder, data, out, resume=True).resumed == 5
        assert out.read_bytes() == expected

    def test_after_a_kill(self, folder, data, out, expected, tmp_path):
        """The files as they are in the middle of a run are what a kill leaves: nothing else is cleaned up."""

        def progress(done, total):
            if done == 4:
                shutil.copytree(work_folder(out), tmp_path / "left")

        estimate(folder, data, out, progress=progress)
        out.unlink()
        os.rename(tmp_path / "left", work_folder(out))
        assert estimate(folder, data, out, resume=True).resumed == 3
        assert out.read_bytes() == expected

    def test_of_a_complete_output_does_nothing(self, folder, data, out, expected):
        first = estimate(folder, data, out)
        before = out.stat().st_mtime_ns
        for options in ({}, {"overwrite": True}):
            again = estimate(folder, data, out, resume=True, **options)
            assert (again.samples, again.tokens, again.elements) == (6, first.tokens, first.elements)
            assert again.resumed == 6
        assert out.stat().st_mtime_ns == before
        assert out.read_bytes() == expected

    def test_clears_what_a_kill_after_the_rename_left(self, folder, data, out, expected, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", interrupting(shutil.rmtree, 0))
            with pytest.raises(KeyboardInterrupt):
                estimate(folder, data, out)
        assert work_folder(out).exists()
        os.rename(out, out.with_name("moved"))
        assert estimate(folder, data, out, resume=True).resumed == 6
        assert out.read_bytes() == expected
        assert not work_folder(out).exists()

        work_folder(out).mkdir()
        estimate(folder, data, out, resume=True)
        assert not work_folder(out).exists()

    @pytest.mark.parametrize("change", ["seed", "max_length", "dtype", "samples", "data", "model"])
    def test_of_another_estimate_is_an_error(self, own_folder, data, out, change):
        with pytest.raises(KeyboardInterrupt):
            estimate(own_folder, data, out, samples=5, progress=stop_at(3))
        left = digests(work_folder(out))
        options = {"seed": 1, "max_length": 4, "dtype": "bfloat16", "samples": 4}
        if change == "data":
            write_texts(data, texts(6, seed=1))
        elif change == "model":
            os.utime(own_folder / "model.safetensors", ns=(1, 1))
        own = {change: options[change]} if change in options else {}
        options = {"samples": 5} | own
        with pytest.raises(OutputError, match=r"another model, data, options.*--overwrite"):
            estimate(own_folder, data, out, resume=True, **options)
        assert digests(work_folder(out)) == left
        assert estimate(own_folder, data, out, overwrite=True, **options).resumed == 0
        assert not work_folder(out).exists()

    def test_without_a_word_an_unfinished_estimate_is_an_error(self, folder, data, out):
        with pytest.raises(KeyboardInterrupt):
            estimate(folder, data, out, progress=stop_at(3))
        with pytest.raises(OutputError, match=r"--resume goes on, --overwrite starts again"):
            estimate(folder, data, out)

    def test_started_again_does_not_take_the_former_ones_commit(self, folder, data, out, tmp_path):
        """A kill before the first commit, of which the files in the middle of a run are what is left."""
        with pytest.raises(KeyboardInterrupt):
            estimate(folder, data, out, progress=stop_at(3))

        def progress(done, total):
            if done == 0:
                shutil.copytree(work_folder(out), tmp_path / "left")

        estimate(folder, data, out, samples=2, overwrite=True, progress=progress)
        out.unlink()
        os.rename(tmp_path / "left", work_folder(out))
        assert estimate(folder, data, out, resume=True).resumed == 0

    @pytest.mark.parametrize("file", ["state", "sums"])
    def test_of_damaged_files_is_an_error(self, folder, data, out, file):
        with pytest.raises(KeyboardInterrupt):
            estimate(folder, data, out, progress=stop_at(3))
        if file == "state":
            (work_folder(out) / "state.json").write_text("{")
        else:
            for path in work_folder(out).glob("*.safetensors"):
                os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(OutputError, match=r"damaged.*--overwrite"):
            estimate(folder, data, out, resume=True)


def test_an_interrupt_before_the_first_commit_leaves_nothing(folder, data, out, tmp_path):
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        estimate(folder, data, out, progress=stop_at(3))
    assert sorted(os.listdir(tmp_path)) == before


def test_commits_take_a_small_share_of_the_time(folder, data, out, monkeypatch):
    """With a clock that runs in commits only, 1 s each, the second one would come 20 s after the first."""
    clock, commits, commit = [0.0], [], Sums.commit

    def slow_commit(sums, done):
        clock[0] += 1.0
        commits.append(done)
        commit(sums, done)

    def progress(done, total):
        clock[0] += 4.0

    monkeypatch.setattr(Sums, "commit", slow_commit)
    monkeypatch.setattr(estimating.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(estimating, "COMMIT_SECONDS", 4.0)
    write_texts(data, texts(9))
    estimate(folder, data, out, progress=progress)
    first = commits[0]
    assert commits == [first, first + 5, 9]


def test_a_second_one_into_the_same_file_is_an_error(folder, data, out):
    with (
        Sums(out, "another", resume=False, overwrite=False),
        pytest.raises(OutputError, match="another estimate is writing"),
    ):
        estimate(folder, data, out, overwrite=True)
    estimate(folder, data, out)


class TestExistingOutput:
    def test_is_replaced_when_the_new_one_is_whole(self, folder, data, out):
        out.write_bytes(b"former")
        with pytest.raises(KeyboardInterrupt):
            estimate(folder, data, out, overwrite=True, progress=stop_at(3))
        assert out.read_bytes() == b"former"
        estimate(folder, data, out, overwrite=True)
        assert load_file(out)

    def test_of_other_options_is_not_resumed(self, folder, data, out):
        estimate(folder, data, out, samples=2)
        before = out.read_bytes()
        with pytest.raises(OutputError, match="--overwrite"):
            estimate(folder, data, out, samples=3, resume=True)
        assert out.read_bytes() == before

    @pytest.mark.parametrize("name", ["data.safetensors", "model/model.safetensors"])
    def test_that_is_an_input_stays(self, own_folder, tmp_path, name):
        data = write_texts(tmp_path / "data.safetensors", texts(6))
        before = (tmp_path / name).read_bytes()
        with pytest.raises(OutputError, match="is an input too"):
            estimate(own_folder, data, tmp_path / name, overwrite=True)
        assert (tmp_path / name).read_bytes() == before


@pytest.fixture
def run(ota_merge, capsys, monkeypatch):
    """The command through the program's own error handling."""
    monkeypatch.setattr(ota_kernels.cli, "cli", command)

    def run(*arguments):
        capsys.readouterr()  # what transformers says while it saves a test's model
        return ota_merge(*arguments)

    return run


class TestCommand:
    def test_does_the_same_as_the_function_and_says_so(self, run, folder, tmp_path, out):
        data = write_texts(tmp_path / "d.jsonl", [[5], *texts(6)], key="body")
        options = ("--samples", 9, "--max-length", 5, "--text-key", "body", "--seed", 3, "--device", "cpu")
        code, printed, errors = run(folder, data, out, *options)
        assert (code, errors) == (0, "")
        cut = [ids[:5] for ids in texts(6)]
        for word in (
            "from 6 samples",
            f"{sum(map(len, cut)) - 6} tokens",
            "9 were asked for",
            f"{sum(len(ids) > 5 for ids in texts(6))} cut at 5",
            "1 too short",
            str(out),
        ):
            assert word in printed
        assert_close(load_file(out), exact_fisher(folder, cut))

    def test_says_how_far_it_is_where_there_is_no_terminal(self, run, folder, data, out, monkeypatch):
        monkeypatch.setattr("ota_kernels.cli.moments_estimate._LINE_SECONDS", 0.0)
        code, _, errors = run(folder, data, out)
        assert code == 0
        assert errors.splitlines() == [f"{done} of 6 samples" for done in range(7)]

    @pytest.mark.usefixtures("commit_always")
    def test_interrupted_says_how_to_go_on(self, run, folder, data, out, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, "vector_norm", interrupting(torch.linalg.vector_norm, 60))
            code, printed, errors = run(folder, data, out)
        assert (code, printed) == (130, "")
        assert errors == "interrupted; the same command with --resume goes on\n"
        code, printed, _ = run(folder, data, out, "--resume")
        assert code == 0
        assert re.search(r"\d done before", printed)

    def test_has_help_without_importing_torch(self):
        code = (
            "import sys; from ota_kernels.cli.moments_estimate import estimate;"
            "estimate.main(['--help'], standalone_mode=False); assert 'torch' not in sys.modules"
        )
        environment = os.environ | {"PYTHONPATH": str(Path(ota_kernels.__file__).parents[1])}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for word in ("MODEL_DIR", "DATA.jsonl", "OUT.safetensors", "--samples", "--resume", "--dtype"):
            assert word in done.stdout


def spoil_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class TestBadInput:
    """Each is one line, exit code 2, and nothing is left behind."""

    def refuse(self, run, out, *arguments, words):
        before = sorted(os.listdir(out.parent))
        code, printed, errors = run(*arguments)
        assert (code, printed) == (2, ""), errors
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1
        assert sorted(os.listdir(out.parent)) == before
        for word in words:
            assert word in errors

    @pytest.mark.parametrize(
        ("lines", "words"),
        [
            ([], ["holds no lines"]),
            (["", "  "], ["holds no lines"]),
            (['{"text": "w1 w2"}', "", "{"], ["line 3", "not valid JSON"]),
            (['{"text": "w1 w2"}', "[1]"], ["line 2", "not a JSON object"]),
            (['{"txt": "w1 w2"}'], ["line 1", "'text'", "'txt'", "--text-key"]),
            (['{"text": ["w1"]}'], ["line 1", "not a string"]),
            (['{"text": "w1"}', '{"text": ""}'], ["none of its 2 texts has two tokens"]),
        ],
        ids=["empty", "blank", "JSON", "no object", "no key", "no string", "one token"],
    )
    def test_lines(self, run, folder, tmp_path, out, lines, words):
        data = write_lines(tmp_path / "bad.jsonl", lines)
        self.refuse(run, out, folder, data, out, words=[str(data), *words])

    def test_no_data(self, run, folder, tmp_path, out):
        missing = tmp_path / "missing.jsonl"
        self.refuse(run, out, folder, missing, out, words=[str(missing), "cannot be read"])
        self.refuse(run, out, folder, tmp_path, out, words=[str(tmp_path), "not a regular file"])

    def test_no_model(self, run, tmp_path, data, out):
        self.refuse(run, out, tmp_path / "none", data, out, words=[str(tmp_path / "none")])

    def test_no_tokenizer(self, run, own_folder, data, out):
        for path in own_folder.glob("tokenizer*"):
            path.unlink()
        self.refuse(run, out, own_folder, data, out, words=[str(own_folder), "no tokenizer"])

    def test_a_damaged_tokenizer(self, run, own_folder, data, out):
        (own_folder / "tokenizer.json").write_text("{")
        self.refuse(run, out, own_folder, data, out, words=[str(own_folder), "cannot load the tokenizer"])

    def test_another_models_tokenizer(self, run, own_folder, tmp_path, out):
        save_tokenizer(own_folder, VOCABULARY + 1)
        data = write_texts(tmp_path / "d.jsonl", [[1, 2], [3, VOCABULARY]])
        words = ["line 2", f"id {VOCABULARY}", f"{VOCABULARY} tokens"]
        self.refuse(run, out, own_folder, data, out, words=words)

    def test_a_text_beyond_the_models_positions(self, run, folder, tmp_path, out):
        data = write_texts(tmp_path / "d.jsonl", [[1] * (POSITIONS + 1)])
        self.refuse(run, out, folder, data, out, words=["line 1", f"--max-length {POSITIONS}"])
        assert run(folder, data, out, "--max-length", POSITIONS)[0] == 0

    @pytest.mark.parametrize(
        ("config", "word"),
        [({"model_type": "nothing"}, "config.json"), ({"hidden_size": 64}, "cannot load the model")],
    )
    def test_a_config_that_does_not_fit(self, run, own_folder, data, out, config, word):
        spoil_config(own_folder, **config)
        self.refuse(run, out, own_folder, data, out, words=[str(own_folder), word])

    def test_weights_that_lack_a_tensor(self, run, own_folder, data, out):
        spoil_weights(own_folder, lambda tensors: tensors.pop("model.norm.weight"))
        words = [str(own_folder), "weights lack", "model.norm.weight"]
        self.refuse(run, out, own_folder, data, out, words=words)

    def test_weights_under_other_names(self, run, own_folder, data, out):
        """transformers would add the prefix; the curvature would fit no tensor of the checkpoint."""

        def strip(tensors):
            for name in [name for name in tensors if name.startswith("model.")]:
                tensors[name.removeprefix("model.")] = tensors.pop(name)

        spoil_weights(own_folder, strip)
        self.refuse(run, out, own_folder, data, out, words=[str(own_folder), "embed_tokens.weight"])

    @pytest.mark.parametrize("value", [float("nan"), 1e30], ids=["NaN", "overflow"])
    def test_gradients_that_are_not_finite(self, run, own_folder, tmp_path, out, value):
        """With 1e30 in the logits, the loss and the gradients are finite, but not the gradients' squares."""
        data = write_texts(tmp_path / "d.jsonl", [[1, 2], [3, 4]])
        spoil_weights(own_folder, lambda tensors: tensors[OUTPUT].mul_(value))
        self.refuse(run, out, own_folder, data, out, words=["line ", "not finite"])

    @pytest.mark.usefixtures("commit_always")
    def test_a_sample_that_is_not_finite_is_named(self, run, own_folder, tmp_path, out):
        data = write_texts(tmp_path / "d.jsonl", [*texts(5), [90, 2, 3]])

        def spoil(tensors):
            tensors[EMBEDDING][90] = float("inf")

        spoil_weights(own_folder, spoil)
        self.refuse(run, out, own_folder, data, out, words=[f"{data}: line 6", "not finite"])

    def test_an_output_that_exists(self, run, folder, data, out):
        out.write_bytes(b"former")
        self.refuse(run, out, folder, data, out, words=[str(out), "--overwrite"])
        assert out.read_bytes() == b"former"

    def test_an_output_of_another_kind(self, run, folder, data, tmp_path, out):
        self.refuse(run, out, folder, data, tmp_path / "out.pt", words=["out.pt", ".safetensors"])
        out.mkdir()
        self.refuse(run, out, folder, data, out, words=[str(out), "folder"])

    def test_options(self, run, folder, data, out):
        self.refuse(run, out, folder, data, out, "--samples", 0, words=["--samples"])
        self.refuse(run, out, folder, data, out, "--max-length", 1, words=["--max-length"])
        self.refuse(run, out, folder, data, out, "--dtype", "float16", words=["--dtype"])
        bad = ({"samples": 0}, {"max_length": 1}, {"seed": -1}, {"dtype": "float16"}, {"device": "tpu"})
        for options in bad:
            with pytest.raises(RecipeError, match=next(iter(options)).replace("_", "-")):
                estimate(folder, data, out, **options)

    def test_a_gpu_that_is_not_there(self, folder, data, out, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(BackendError, match="--device cpu"):
            estimate(folder, data, out, device="cuda")

    def test_no_transformers(self, run, folder, data, out, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        self.refuse(run, out, folder, data, out, words=["pip install 'ota-kernels[estimate]'"])

    def test_a_full_disk(self, run, folder, data, out, monkeypatch):
        def full(*arguments):
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(os, "posix_fallocate", full)
        self.refuse(run, out, folder, data, out, words=[os.strerror(28), str(out.parent)])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_two_experts_merge_by_their_estimated_curvature(folders, tmp_path, tied):
    base = load_file(folders[tied] / "model.safetensors")
    experts, curvatures, models = [], [], []
    for t in range(2):
        folder = Path(shutil.copytree(folders[tied], tmp_path / f"expert{t}"))
        experts.append(edited(base, seed=t))
        save_file(experts[t], folder / "model.safetensors", metadata={"format": "pt"})
        data = write_texts(tmp_path / f"{t}.jsonl", texts(5, seed=t))
        file = folder / "fisher.safetensors"
        estimate(folder, data, file)
        curvatures.append(load_file(file))
        models.append({"model": str(folder), "parameters": {"preconditioner_path": str(file)}})
    recipe = {
        "merge_method": "ota",
        "base_model": str(folders[tied]),
        "models": models,
        "parameters": {"density": 0.4},
    }
    merge(write_recipe(tmp_path / "recipe.yaml", recipe), tmp_path / "merged")
    merged = load_merged(tmp_path / "merged")
    assert_same_tensors(merged, merge_state_dicts(base, experts, curvatures, density=0.4))
    assert not torch.equal(merged[EMBEDDING], base[EMBEDDING])

    recipe["parameters"]["bias_correction"] = True
    with pytest.raises(InputError, match=r'fisher\.safetensors: bias_correction: metadata "step" is missing'):
        merge(recipe, tmp_path / "corrected")
