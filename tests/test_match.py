"""Which tensor of each model becomes which of the output: heads, aliases, prefixes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from checkpoints import load_merged, random_tensors, save_model

from ota_kernels import InputError, merge, plan
from ota_kernels.io.ties import has_tied_embeddings, is_head, tie_in_config
from ota_kernels.planning.prefixes import renaming
from ota_kernels.planning.tied import embedding_of, look_equal

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHAPES = {EMBED: (12, 4), "model.layers.0.mlp.up_proj.weight": (6, 4), "model.norm.weight": (4,)}


def linear(root, *folders, **more):
    models = [{"model": str(root / folder)} for folder in folders]
    return {"merge_method": "linear", "models": models} | more


def save(root, name, tensors, config=None):
    return save_model(root / name, tensors, config=config)


def mean(*models):
    return {n: sum(m[n].double() for m in models).div(len(models)).float() for n in models[0]}


def check_means(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        (HEAD, True),
        ("output.weight", True),
        ("language_model.output.weight", True),
        ("_orig_mod.lm_head.weight", True),
        ("embed_out.weight", True),
        ("score.weight", False),
        ("rwkv.blocks.0.attention.output.weight", False),
        ("layers.3.output.weight", False),
        ("lm_head.bias", False),
        ("lm_head.weight.extra", False),
    ],
)
def test_what_may_be_tied(name, answer):
    assert is_head(name) is answer


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, None),
        ({}, None),
        ({"tie_word_embeddings": True}, True),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        ({"llm_config": {"tie_word_embeddings": False}}, False),
        ({"thinker_config": {"text_config": {"tie_word_embeddings": True}}}, True),
        ({"tie_word_embeddings": True, "llm_config": {"tie_word_embeddings": False}}, None),
        ({"tie_word_embeddings": False, "vision_config": {"tie_word_embeddings": True}}, False),
        ({"tie_word_embeddings": "yes"}, None),
    ],
)
def test_what_the_configuration_says_of_ties(config, said):
    assert tie_in_config(config) is said


def test_a_section_speaks_of_its_own_module(tmp_path):
    """Bark: three language models, of which one ties its output matrices."""
    config = {
        "model_type": "bark",
        "semantic_config": {"model_type": "semantic"},
        "fine_acoustics_config": {"model_type": "fine_acoustics", "tie_word_embeddings": True},
    }
    assert tie_in_config(config, "semantic.lm_head.weight") is None
    assert tie_in_config(config, "fine_acoustics.lm_head.weight") is True
    assert tie_in_config(config, "lm_head.weight") is True
    for i, name in enumerate("ab"):
        random = torch.Generator().manual_seed(i)
        names = (
            "semantic.lm_head.weight",
            "semantic.embed_tokens.weight",
            "fine_acoustics.embed_tokens.weight",
        )
        save(tmp_path, name, {n: torch.randn(8, 4, generator=random) for n in names}, config)
    listed = [{"model": str(tmp_path / name)} for name in "ab"]
    merge({"merge_method": "linear", "models": listed}, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["fine_acoustics_config"]["tie_word_embeddings"] is True
    assert "tie_word_embeddings" not in written


def test_a_silent_configuration_is_told_by_what_is_stored():
    assert has_tied_embeddings({}, [EMBED])
    assert not has_tied_embeddings({}, [EMBED, "language_model.output.weight"])
    assert has_tied_embeddings({}, [EMBED, "score.weight"])
    assert not has_tied_embeddings(None, [EMBED])


class Info:
    def __init__(self, *shape):
        self.shape = shape


def test_the_embedding_of_a_head_is_of_its_own_language_model():
    tensors = {
        "vision_model.embeddings.weight": Info(7, 4),
        "language_model.model.tok_embeddings.weight": Info(12, 4),
        "talker.model.embed_tokens.weight": Info(12, 4),
    }
    head = "language_model.output.weight"
    assert embedding_of(head, tensors) == "language_model.model.tok_embeddings.weight"
    assert embedding_of(head, tensors, (12, 4)) == "language_model.model.tok_embeddings.weight"
    assert embedding_of(head, tensors, (7, 4)) == "vision_model.embeddings.weight"
    assert embedding_of("lm_head.weight", tensors) is None  # three as near as one another
    assert embedding_of("lm_head.weight", {"layers.0.embeddings.weight": Info(12, 4)}) is None


def test_large_tensors_are_looked_at_in_many_places():
    one = torch.arange(3 << 20, dtype=torch.int32).view(torch.uint8).numpy()
    other = one.copy()
    assert look_equal(one, other)
    other[-1] ^= 1
    assert not look_equal(one, other)
    other = one.copy()
    other[other.size // 3 :] ^= 1
    assert not look_equal(one, other)
    assert not look_equal(one, other[:-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_comparing_large_matrices_holds_no_pages(tmp_path):
    """A tied head and its embeddings may be larger than the memory limit."""
    embeddings = torch.ones(1 << 12, 1 << 12)
    path = tmp_path / "a"
    save_model(path, {EMBED: embeddings, HEAD: embeddings.clone()})
    script = (
        "import resource, sys, pathlib\n"
        "from ota_kernels.io.reader import Checkpoint\n"
        "from ota_kernels.planning.tied import are_equal\n"
        "model = Checkpoint.open(pathlib.Path(sys.argv[1]), 'a')\n"
        "pair = [model.buffer(name).data for name in sys.argv[2:]]\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert are_equal(*pair)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    call = [sys.executable, "-c", script, str(path), EMBED, HEAD]
    grown = int(subprocess.run(call, capture_output=True, text=True, check=True).stdout)
    assert grown < 80 << 10  # KiB, of 128 MiB


@pytest.mark.parametrize("head", ["score.weight", "classifier.output.weight", "embed_out.weight"])
@pytest.mark.parametrize("rows", [12, 2])
def test_a_head_of_its_own_stays_in_a_tied_model(tmp_path, head, rows):
    """Whatever its name and shape, a stored tensor with values of its own is merged."""
    models = [random_tensors(SHAPES | {head: (rows, 4)}, seed) for seed in (1, 2)]
    for name, tensors in zip("ab", models, strict=True):
        save(tmp_path, name, tensors, {"model_type": "llama", "tie_word_embeddings": True})
    merge(linear(tmp_path, "a", "b"), tmp_path / "out")
    check_means(load_merged(tmp_path / "out"), mean(*models))


def test_a_copy_of_a_tied_head_is_left_out_and_named(tmp_path, capsys):
    models = [random_tensors(SHAPES, seed) for seed in (1, 2)]
    for name, tensors in zip("ab", models, strict=True):
        save(tmp_path, name, tensors | {HEAD: tensors[EMBED].clone()}, {"tie_word_embeddings": True})
    report = merge(linear(tmp_path, "a", "b"), tmp_path / "out")
    check_means(load_merged(tmp_path / "out"), mean(*models))
    assert report["left_out"] == {HEAD: f"a copy of {EMBED}, to which it is tied"}
    assert any(HEAD in note for note in report["notes"])
    assert any(HEAD in note for note in plan(linear(tmp_path, "a", "b")).notes)


def test_a_head_that_is_tied_on_paper_only_is_merged_and_untied(tmp_path):
    models = [random_tensors(SHAPES | {HEAD: (12, 4)}, seed) for seed in (1, 2)]
    for name, tensors in zip("ab", models, strict=True):
        save(tmp_path, name, tensors, {"tie_word_embeddings": True})
    report = merge(linear(tmp_path, "a", "b"), tmp_path / "out")
    check_means(load_merged(tmp_path / "out"), mean(*models))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert any("its values are its own" in note for note in report["notes"])


@pytest.mark.parametrize("own", [False, True], ids=["copy", "own"])
def test_a_silent_model_that_stores_its_head_and_one_that_does_not(tmp_path, own):
    one, other = (random_tensors(SHAPES, seed) for seed in (1, 2))
    head = random_tensors({HEAD: (12, 4)}, 3)[HEAD] if own else other[EMBED].clone()
    save(tmp_path, "a", one, {"model_type": "llama"})
    save(tmp_path, "b", other | {HEAD: head}, {"model_type": "llama"})
    merge(linear(tmp_path, "a", "b"), tmp_path / "out")
    expected = mean(one, other)
    if own:  # the model without one lends its embeddings
        expected[HEAD] = (one[EMBED] + head) / 2
    check_means(load_merged(tmp_path / "out"), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("tie_word_embeddings") is (False if own else None)


class TestAliases:
    def test_copies_that_some_models_store_are_left_out_and_named(self, tmp_path):
        one, other = (random_tensors({"shared.weight": (12, 4), "w": (3, 4)}, seed) for seed in (1, 2))
        copies = {n: other["shared.weight"].clone() for n in ("encoder.embed_tokens.weight", "x.y")}
        save(tmp_path, "a", one)
        save(tmp_path, "b", other | copies)
        report = merge(linear(tmp_path, "b", "a"), tmp_path / "out")
        check_means(load_merged(tmp_path / "out"), mean(one, other))
        assert report["left_out"].keys() == copies.keys()
        assert all("shared.weight" in reason for reason in report["left_out"].values())

    def test_copies_that_all_models_store_are_merged(self, tmp_path):
        models = [random_tensors({"shared.weight": (12, 4)}, seed) for seed in (1, 2)]
        models = [m | {"encoder.embed_tokens.weight": m["shared.weight"].clone()} for m in models]
        for name, tensors in zip("ab", models, strict=True):
            save(tmp_path, name, tensors)
        merge(linear(tmp_path, "a", "b"), tmp_path / "out")
        check_means(load_merged(tmp_path / "out"), mean(*models))

    @pytest.mark.parametrize(
        "extra",
        [
            pytest.param(lambda w: w + 1e-6, id="one bit off"),
            pytest.param(lambda w: torch.cat([w[:-1], -w[-1:]]), id="the last row"),
        ],
    )
    def test_what_is_no_copy_is_no_alias(self, tmp_path, extra):
        one, other = (random_tensors({"shared.weight": (12, 4)}, seed) for seed in (1, 2))
        save(tmp_path, "a", one)
        save(tmp_path, "b", other | {"proj.weight": extra(other["shared.weight"])})
        with pytest.raises(InputError, match=r"proj\.weight"):
            plan(linear(tmp_path, "a", "b"))

    def test_zeros_are_copies_of_nothing(self, tmp_path):
        zeros = {"a.weight": torch.zeros(4, 4)}
        save(tmp_path, "a", zeros)
        save(tmp_path, "b", zeros | {"b.weight": torch.zeros(4, 4)})
        with pytest.raises(InputError, match=r"b\.weight"):
            plan(linear(tmp_path, "a", "b"))


class TestPrefixes:
    NAMES = (EMBED, "model.layers.0.q.weight", "model.layers.1.q.weight", "model.norm.weight", HEAD)

    @pytest.mark.parametrize(
        ("change", "safe"),
        [
            pytest.param(lambda n: "_orig_mod." + n, True, id="_orig_mod"),
            pytest.param(lambda n: "module." + n, True, id="module"),
            pytest.param(lambda n: n.removeprefix("model."), True, id="model. taken away"),
            pytest.param(lambda n: n.replace("model.", "model.language_model.", 1), True, id="inserted"),
            pytest.param(lambda n: "language_model." + n, True, id="language_model"),
            pytest.param(lambda n: n.replace("model.", "transformer.", 1), True, id="another wrapper"),
            pytest.param(lambda n: n.replace("model.", "decoder.", 1), False, id="another module"),
            pytest.param(lambda n: n.replace("model.layers.", "transformer.h."), False, id="other layers"),
        ],
    )
    def test_one_change(self, change, safe):
        theirs = [change(name) for name in self.NAMES]
        found = renaming(self.NAMES, theirs)
        assert found.safe is safe
        expected = dict(zip(theirs, self.NAMES, strict=True))
        assert found.names == {name: own for name, own in expected.items() if name != own}

    def test_two_changes(self):
        ours = ["model.layers.0.w", "model.norm.w", "visual.blocks.0.w", "lm_head.w"]
        theirs = ["model.language_model.layers.0.w", "model.language_model.norm.w", "model.visual.blocks.0.w"]
        found = renaming(ours, [*theirs, "lm_head.w"])
        assert found.names == dict(zip(theirs, ours, strict=False))
        assert str(found) == "`model.language_model.` for `model.` and `model.` for no prefix"

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            (["a.w", "b.w"], ["a.w", "b.w"]),
            (["a.w", "b.w"], ["a.w"]),
            (["a.w", "b.w"], ["x.c.w", "x.d.w"]),  # `w` alone is the end of two names
            (["encoder.l.w", "decoder.l.w"], ["l.w"]),  # which of the two?
            (["m.l.w"], ["x.l.w", "y.l.w"]),  # two for one
        ],
    )
    def test_none(self, ours, theirs):
        assert renaming(ours, theirs) is None

    def test_a_tied_head_under_a_prefix(self, tmp_path):
        one, other = (random_tensors(SHAPES, seed) for seed in (1, 2))
        config = {"tie_word_embeddings": True}
        save(tmp_path, "a", one, config)
        wrapped = {f"_orig_mod.{n}": t for n, t in other.items()}
        save(tmp_path, "b", wrapped | {f"_orig_mod.{HEAD}": other[EMBED].clone()}, config)
        report = merge(linear(tmp_path, "a", "b"), tmp_path / "out")
        check_means(load_merged(tmp_path / "out"), mean(one, other))
        assert any("`_orig_mod.` for no prefix" in note for note in report["notes"])

    def test_another_module_is_refused_by_its_prefix(self, tmp_path):
        one, other = (random_tensors(SHAPES, seed) for seed in (1, 2))
        save(tmp_path, "a", one)
        save(tmp_path, "b", {n.replace("model.", "decoder."): t for n, t in other.items()})
        with pytest.raises(InputError, match=r"differ by a prefix: .*b has `decoder\.` for `model\.` of .*a"):
            plan(linear(tmp_path, "a", "b"))
