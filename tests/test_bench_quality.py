"""bench/quality in small: a tiny encoder, two tasks of made-up words; merges by the command line."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from bench.quality import experts, merges, tables  # noqa: E402 - they need transformers
from bench.quality.encoder import Encoder  # noqa: E402 - they need transformers
from bench.quality.merges import NO_TUNING, Lab, Method, Scored  # noqa: E402 - they need transformers
from bench.quality.scores import Scale  # noqa: E402 - they need transformers
from bench.quality.tables import Results, settings_of  # noqa: E402 - they need transformers
from bench.quality.tasks import Task, _split  # noqa: E402 - they need transformers
from ota_kernels.cli import cli  # noqa: E402 - they need transformers
from ota_kernels.recipe import methods  # noqa: E402 - they need transformers

WORDS = [f"w{i}" for i in range(40)]
LINEAR = Method("task_arithmetic", "task_arithmetic", {"weight": 1.0})


def in_process(*arguments):
    """`ota-merge` without a process of its own."""
    CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)


def task_of(words: list[str], seed: int) -> Task:
    """A text's label is which half of these words most of it is from."""
    random = np.random.default_rng(seed)
    halves = words[: len(words) // 2], words[len(words) // 2 :]

    def rows(n: int) -> list[tuple[str, int]]:
        labels = random.integers(0, 2, n).tolist()
        return [(" ".join(random.choice(halves[y], 6)), y) for y in labels]

    return Task([halves[0][0], halves[1][0]], rows(80), rows(30), rows(30))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    cache = tmp_path_factory.mktemp("quality")
    base = cache / "base"
    torch.manual_seed(0)
    vocabulary = {w: i for i, w in enumerate(["[UNK]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config = transformers.BertConfig(
        vocab_size=41, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    config.save_pretrained(base)
    tokenizer.save(str(base / "tokenizer.json"))
    model = transformers.BertModel(config, add_pooling_layer=False)
    save_file(model.state_dict(), base / "model.safetensors", metadata={"format": "pt"})
    tasks = {"one": task_of(WORDS[:20], 1), "two": task_of(WORDS[20:], 2)}
    training = experts.Training(steps=25, batch=16, rate=3e-3)
    places = experts.folders(cache, "a", tasks, training)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "ota_merge", in_process)
        patch.setattr(merges, "ota_merge", in_process)
        for name, task in tasks.items():
            experts._train(base, places[name], name, task, "a", training)
        encoder = Encoder(base, tasks)
        yield Lab(cache / "scores", base, places, encoder, merges.tasks_of(tasks, "a", 30))


@pytest.fixture(scope="module")
def results(lab):
    base = lab.model("base", lab.base)
    own = {task: lab.model(f"expert {task}", folder) for task, folder in lab.experts.items()}
    found = Results(lab, Scale(base, own), base, own)
    for method in (NO_TUNING, LINEAR):
        found.merges[method.label] = {t: lab.merge(method, **p) for t, p in settings_of(method)[:2]}
    for by in ("ffg", "magnitude"):
        found.grafts[by, 0.1] = {task: lab.graft(task, 0.1, by) for task in lab.experts}
    for label in ("ffg .1 signs", "emr"):
        found.packs[label] = {task: lab.packed(task, label) for task in lab.experts}
    for label in ("experts", "ffg .05 exact", "emr"):
        found.merged_packs[label] = lab.merged_packs(label)
    return found


def test_experts_learn_and_are_saved_with_their_moments(lab, results):
    for task, folder in lab.experts.items():
        assert results.experts[task].accuracy(task) > max(0.8, results.base.accuracy(task))
        moments = load_file(folder / "exp_avg_sq.safetensors")
        assert moments.keys() == load_file(folder / "model.safetensors").keys()
        assert all((m >= 0).all() for m in moments.values())
        assert not (folder / "optimizer.pt").exists()


def test_merges_are_scored_once_and_remembered(lab, results):
    scored = results.merges[NO_TUNING.label][1.0]
    assert {len(right) for right in scored.right.values()} == {30}
    assert scored.factor != 1
    assert 0 < scored.kept < 1
    lines = (lab._folder / "scores.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 2 + 4 + 4 + 4 + 3
    assert all(set("".join(json.loads(x)["scored"]["right"].values())) <= {"0", "1"} for x in lines)
    again = Lab(lab._folder, lab.base, lab.experts, None, {})
    again.frozen = True
    assert again.merge(NO_TUNING, **{"lambda": "auto"}) == scored
    assert again.merge(NO_TUNING, power=3.0) is None


def test_tables_say_what_was_scored(results):
    methods = [NO_TUNING, LINEAR]
    text = tables.merges("a", results, [results], methods)
    rows = [line for line in text.splitlines() if line.startswith(f"| {LINEAR.label} ")]
    assert len(rows) == 2  # default and auto: nothing is tuned on a set that has not tried all
    best = results.merges[LINEAR.label][results.best(LINEAR.label)]
    assert "+0.0 [+0.0, +0.0]" in text
    assert f"| {results.scale.mean(best):.1f} |" in text
    assert "| 0.1 |" in tables.grafts("a", results)
    whole = copy.copy(results)
    of_linear = results.merges[LINEAR.label]
    whole.merges = {LINEAR.label: of_linear | dict.fromkeys(tables.TIMES, of_linear[None])}
    rows = tables.merges("a", results, [whole], methods).splitlines()
    assert len([line for line in rows if line.startswith(f"| {LINEAR.label} ")]) == 3
    lines = tables.overview({"a": results, "b": whole}, methods).splitlines()
    filled = {x.split(" | ")[0]: sum("(" in cell for cell in x.split(" | ")[1:]) for x in lines}
    assert filled[f"| {NO_TUNING.label}"] == 2  # of set a, by default and auto
    assert filled[f"| {LINEAR.label}"] == 5  # and tuned on b


def test_the_figure_has_a_panel_for_what_was_scored(results, tmp_path):
    pytest.importorskip("matplotlib")
    of_linear = results.merges[LINEAR.label]
    whole = copy.copy(results)
    whole.merges = {LINEAR.label: of_linear | dict.fromkeys(tables.TIMES, of_linear[None])}
    for packs, panels in ((results.packs, 3), ({}, 2)):
        whole.packs = packs
        tables.figure(tmp_path / "figure.svg", {"b": whole}, [NO_TUNING, LINEAR])
        text = (tmp_path / "figure.svg").read_text()
        assert text.count('<g id="axes_') == panels
        assert f"<!-- {LINEAR.label} -->" in text


def test_packs_are_scored_with_their_size(lab, results):
    """Signs of a tenth take 0.57 bits, a few KB of headers beside them."""
    assert all(set(found) == set(lab.experts) for found in results.packs.values())
    for scored in results.packs["ffg .1 signs"].values():
        assert 0.5 < scored.bits < 6
    assert all(9 < scored.bits < 14 for scored in results.packs["emr"].values())
    rows = tables.packs("a", results).splitlines()
    assert [row.split(" | ")[0] for row in rows[-4:]] == [
        "| experts",
        "| ffg .05 exact",
        "| ffg .1 signs",
        "| emr",
    ]
    assert not (lab._folder / "packing").exists()


def test_merges_of_packs_are_beside_those_of_experts(lab, results):
    """The experts as they are: the merge of the table of methods."""
    merged = results.merged_packs
    assert merged["experts"].right == results.merges[LINEAR.label][1.0].right
    assert merged["emr"].bits == results.packs["emr"][next(iter(lab.experts))].bits
    assert all(set(scored.right) == set(lab.experts) for scored in merged.values())
    (row,) = (
        line for line in tables.packs("a", results).splitlines() if line.startswith("| ffg .05 exact |")
    )
    gap, low, high = results.scale.difference(merged["ffg .05 exact"], merged["experts"])
    assert row.endswith(f"| {gap:+.1f} [{low:+.1f}, {high:+.1f}] |")


def test_the_interval_is_of_paired_texts():
    own = {"t": Scored({"t": "1" * 100})}
    scale = Scale(Scored({"t": "0" * 100}), own)
    better, worse = Scored({"t": "1" * 60 + "0" * 40}), Scored({"t": "1" * 50 + "0" * 50})
    gap, low, high = scale.difference(better, worse)
    assert gap == pytest.approx(10)
    assert 3 < low < 8 < 12 < high < 17  # ten texts of a hundred differ: standard error 3
    assert scale.difference(better, better) == (0, 0, 0)
    assert scale.gain("t", better) == pytest.approx(60)


def test_other_forms_of_moments_are_made_where_they_are_asked_for(lab):
    for form in ("rank1", "estimate"):
        path = lab.moments("one", form)
        assert path.is_file()
    estimate = load_file(lab.moments("one", "estimate"))
    assert estimate.keys() == load_file(lab.base / "model.safetensors").keys()
    assert sum(float(x.sum()) for x in estimate.values()) > 0


def test_every_method_of_several_experts_has_a_row():
    of_one_run = {"checkpoints", "passthrough", "slerp", "nuslerp"}
    expected = {n for n in methods.names() if methods.get(n).most != 1} - of_one_run
    assert {m.merge_method for m in merges.all_methods()} == expected


def test_no_document_is_in_two_parts():
    rows = [(f"text number {i} of {i // 3}", f"label {i % 2}", str(i // 3)) for i in range(600)]
    task = _split(rows)
    documents = [{text.split(" of ")[1] for text, _ in part} for part in (task.train, task.a, task.b)]
    assert all(documents)
    assert not documents[0] & documents[1]
    assert not (documents[0] | documents[1]) & documents[2]
