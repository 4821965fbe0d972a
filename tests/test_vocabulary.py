"""One vocabulary of several: ids, rows of weights and curvature by value, files that transformers loads."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from checkpoints import load_merged, save_model
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ota_kernels import merge
from ota_kernels.errors import InputError, RecipeError
from ota_kernels.io.vocabulary import joined, read_tokens, stripped
from ota_kernels.planning.inputs import Inputs
from ota_kernels.recipe.schema import parse_recipe

LETTERS = {letter: i for i, letter in enumerate("abcdefgh")}


def tokenizer(folder, extra=(), added=(), merges=()):
    """Byte-level BPE over a few letters; extra: further plain tokens; added: special ones."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = dict(LETTERS)
    for token in extra:
        vocabulary[token] = len(vocabulary)
    made = Tokenizer(models.BPE(vocabulary, list(merges)))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in added])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def model(folder, rows, tag, tied=False, width=3):
    """Row i of the embedding holds tag + i, of the output matrix -(tag + i)."""
    numbers = tag + torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, width)
    tensors = {
        "model.embed_tokens.weight": numbers.contiguous(),
        "model.norm.weight": torch.full((width,), float(tag)),
    }
    if not tied:
        tensors["lm_head.weight"] = (-numbers).contiguous()
    config = {"vocab_size": rows, "tie_word_embeddings": tied, "model_type": "llama"}
    save_model(folder, tensors, config=config)
    return folder


@pytest.fixture
def pair(tmp_path):
    """a: letters, ab, <s>; 12 rows, two of them spare. b: letters, cd, <s>, <t>; 11 rows."""
    a, b = tmp_path / "a", tmp_path / "b"
    model(tokenizer(a, ["ab"], ["<s>"], [("a", "b")]), 12, 100)
    model(tokenizer(b, ["cd"], ["<s>", "<t>"], [("c", "d")]), 11, 200)
    return tmp_path


def recipe(root, names="ab", method="linear", **top):
    return {"merge_method": method, "models": [{"model": str(root / n)} for n in names], **top}


def rows_of(data, name="model.embed_tokens.weight"):
    """Of each model, the first number of each row."""
    with Inputs(parse_recipe(data)) as inputs:
        entry = next(e for e in inputs.entries if e.name == name)
        found = []
        for part in entry.sources:
            source = part.source
            found.append(source.slice(0, len(source)).float32().reshape(entry.shape)[:, 0].tolist())
        return found, inputs.alignment


def test_union(pair):
    found, alignment = rows_of(recipe(pair, tokenizer_source="union"))
    assert alignment.ids == LETTERS | {"ab": 8, "<s>": 9, "cd": 10, "<t>": 11}
    assert alignment.size == 12
    a, b = found
    assert a == [100 + i for i in range(10)] + [208, 210]  # cd and <t> as b has them
    assert b == [200 + i for i in range(8)] + [108, 209, 208, 210]  # ab as a has it


def test_base_cuts_to_its_tokens(pair):
    found, alignment = rows_of(recipe(pair, tokenizer_source="base"))
    assert alignment.ids == LETTERS | {"ab": 8, "<s>": 9}
    assert found == [[100 + i for i in range(10)], [200 + i for i in range(8)] + [108, 209]]
    with Inputs(parse_recipe(recipe(pair, "a", tokenizer_source="base"))) as inputs:
        entry = next(e for e in inputs.entries if e.name == "lm_head.weight")
        assert entry.shape == (10, 3)
        assert entry.experts[0].source.offset >= 0  # only cut: it stays where it lies


def test_a_model(pair):
    found, alignment = rows_of(recipe(pair, tokenizer_source=str(pair / "b")))
    assert alignment.ids == LETTERS | {"cd": 8, "<s>": 9, "<t>": 10}
    assert found == [[100 + i for i in range(8)] + [208, 109, 210], [200 + i for i in range(11)]]


def test_several_owners(pair):
    """The base's row if it has the token, else the mean of those that have it."""
    model(tokenizer(pair / "c", ["cd", "ef"]), 10, 300)
    found, alignment = rows_of(recipe(pair, "abc", tokenizer_source="union"))
    assert alignment.ids["cd"] == 10
    assert alignment.ids["ef"] == 11
    assert alignment.ids["<t>"] == 12
    a, b, c = found
    assert (a[10], b[10], c[10]) == ((208 + 308) / 2, 208, 308)
    assert (a[11], b[11], c[11]) == (309, 309, 309)
    assert c[8:10] == [108, 109]


def test_tokens_and_padding(pair):
    tokens = {
        "<new>": {"source": {"kind": "zero"}},
        "<copy>": {"source": {"kind": "model_token", "model": str(pair / "b"), "token": "<t>"}},
        "<id>": {"source": {"kind": "model_token", "model": str(pair / "a"), "token_id": 3}},
        "a": {"source": str(pair / "b"), "force": True},
        "b": {"force": True},
    }
    data = recipe(pair, tokenizer={"source": "base", "tokens": tokens, "pad_to_multiple_of": 8})
    assert parse_recipe(parse_recipe(data).as_dict()) == parse_recipe(data)
    (a, b), alignment = rows_of(data)
    assert alignment.size == 16
    assert [alignment.ids[token] for token in ("<new>", "<copy>", "<id>")] == [10, 11, 12]
    assert a[:2] == b[:2] == [200, 101]
    assert a[10:13] == b[10:13] == [0, 210, 103]
    assert a[13:] == pytest.approx([np.mean(a[:13])] * 3)
    assert b[13:] == pytest.approx([np.mean(b[:13])] * 3)


def test_tied_models_lend_their_embedding(pair):
    model(tokenizer(pair / "c", ["ef"]), 9, 300, tied=True)
    found, _ = rows_of(recipe(pair, "ac", tokenizer_source="union"), "lm_head.weight")
    assert found[0] == [-100 - i for i in range(10)] + [308]
    assert found[1] == [300.0 + i for i in range(8)] + [-108, -109, 308]


def test_merged_values_config_and_files(pair, tmp_path):
    out = tmp_path / "out"
    merge(recipe(pair, tokenizer_source="union"), out, backend="reference")
    (a, b), _ = rows_of(recipe(pair, tokenizer_source="union"))
    merged = load_merged(out)
    expected = (torch.tensor(a) + torch.tensor(b)) / 2
    assert torch.equal(merged["model.embed_tokens.weight"], expected[:, None].expand(12, 3))
    assert torch.equal(merged["lm_head.weight"], -expected[:, None].expand(12, 3))
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 12
    from transformers import PreTrainedTokenizerFast

    for folder in (pair / "a", pair / "b", out):
        loaded = PreTrainedTokenizerFast.from_pretrained(folder)
        assert loaded.decode(loaded("abcdh<s>").input_ids) == "abcdh<s>"
    loaded = PreTrainedTokenizerFast.from_pretrained(out)
    assert len(loaded) == 12
    assert loaded("ab<s>cd<t>").input_ids == [8, 9, 10, 11]
    assert loaded.convert_ids_to_tokens([10, 11]) == ["cd", "<t>"]


def test_curvature_rows_follow(pair, tmp_path):
    """Under ota: the curvature of a token that a model lacks is that of the model whose row it has."""
    for number, name in enumerate("ab"):
        rows = {"a": 12, "b": 11}[name]
        moments = {"model.norm.weight": torch.ones(3)}
        for tensor in ("model.embed_tokens.weight", "lm_head.weight"):
            moments[tensor] = (
                (10.0**-number * (1 + torch.arange(rows, dtype=torch.float32)))[:, None]
                .expand(rows, 3)
                .contiguous()
            )
        save_file(moments, pair / f"{name}.safetensors")
    data = recipe(pair, "ab", "ota", tokenizer_source="union")
    for entry, name in zip(data["models"], "ab", strict=True):
        entry["parameters"] = {"preconditioner_path": str(pair / f"{name}.safetensors")}
    with Inputs(parse_recipe(data)) as inputs:
        entry = next(e for e in inputs.entries if e.name == "model.embed_tokens.weight")
        found = [c.values.slice(0, 36).float32().reshape(12, 3)[:, 0] for c in entry.curvatures]
    a, b = np.arange(1.0, 13), 0.1 * np.arange(1.0, 12)
    assert found[0] == pytest.approx([*a[:10], b[8], b[10]], rel=1e-6)
    assert found[1] == pytest.approx([*b[:8], a[8], b[9], b[8], b[10]], rel=1e-6)
    merge(data, tmp_path / "out", backend="reference")
    rows, _ = rows_of(data)
    weights = np.sqrt(np.array(found, np.float64)) + 1e-26
    expected = (weights * np.array(rows)).sum(axis=0) / weights.sum(axis=0)
    merged = load_merged(tmp_path / "out")["model.embed_tokens.weight"][:, 0].double().numpy()
    assert merged == pytest.approx(expected, rel=1e-6)


def test_any_slice_has_the_same_values(pair):
    with Inputs(parse_recipe(recipe(pair, tokenizer={"pad_to_multiple_of": 16}))) as inputs:
        source = next(e for e in inputs.entries if e.name == "lm_head.weight").experts[1].source
        whole = source.slice(0, len(source)).data.view(np.float32)
        assert len(source) == 48
        for start in range(0, 48, 5):
            for stop in (start + 1, 48):
                assert (
                    source.slice(start, stop).data.view(np.float32).tobytes() == whole[start:stop].tobytes()
                )
        positions = np.array([47, 0, 31, 30, 5, 5])
        assert source.gather(positions).data.view(np.float32).tobytes() == whole[positions].tobytes()


def test_tokens_without_rows_are_stripped(tmp_path):
    folder = model(tokenizer(tmp_path / "a", ["ab", "cd"], ["<s>"], [("a", "b"), ("c", "d")]), 9, 100)
    found = stripped(read_tokens(folder), 9)
    assert found.ids == LETTERS | {"ab": 8}
    assert [list(m) if isinstance(m, list) else m.split() for m in found.content["model"]["merges"]] == [
        ["a", "b"]
    ]
    assert found.added == {}
    whole = read_tokens(folder)
    assert stripped(whole, 11) is whole
    ids, new = joined(found, [(whole, 11)], ["x"])
    assert ids == found.ids | {"cd": 9, "<s>": 10, "x": 11}
    assert [(e["content"], e["special"]) for e in new] == [("cd", False), ("<s>", True), ("x", False)]


def test_a_changed_tokenizer_is_another_merge(pair):
    data = recipe(pair, tokenizer_source="union")
    with Inputs(parse_recipe(data)) as inputs:
        before = inputs.fingerprint()
    tokenizer(pair / "b", ["ce"], ["<s>", "<t>"])
    with Inputs(parse_recipe(data)) as inputs:
        assert inputs.fingerprint() != before


def test_a_model_without_tokenizer_has_the_bases_tokens(pair, caplog):
    (pair / "b" / "tokenizer.json").unlink()
    found, _ = rows_of(recipe(pair, tokenizer_source="union"))
    assert found[1] == [200 + i for i in range(10)]
    assert any("has no tokenizer.json" in line for line in caplog.messages)


@pytest.mark.parametrize("name", "ab")
@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"model": {"vocab": {"a": "0"}}}', '{"model": {"vocab": [1]}}', "\xff"]
)
def test_a_tokenizer_that_cannot_be_read(pair, name, content):
    """Damaged, not absent: an error that names the file."""
    (pair / name / "tokenizer.json").write_bytes(content.encode("latin1"))
    with pytest.raises((InputError, RecipeError)) as caught:
        rows_of(recipe(pair, tokenizer_source="union"))
    assert str(pair / name) in str(caught.value)
    assert "\n" not in str(caught.value)


WRONG = [
    ({"tokens": {"<x>": {}}}, "no model has the token '<x>'"),
    ({"tokens": {"<x>": {"source": "org/x"}}}, "org/x, which is no input"),
    ({"tokens": {"<t>": {"source": "A"}}}, "has no row for '<t>'"),
    (
        {"tokens": {"<x>": {"source": {"kind": "model_token", "model": "A", "token_id": 12}}}},
        "has no row for 12",
    ),
    ({"tokens": {"<x>": {"source": {"kind": "model_token", "model": "A"}}}}, "one of `token` and `token_id`"),
    ({"tokens": {"<x>": {"source": {"kind": "mean"}}}}, "model_token or zero"),
    ({"tokens": {"<x>": {"sorce": 1}}}, "did you mean `source`?"),
    ({"tokens": {"<x>": {"force": 1}}}, "true or false"),
    ({"tokens": [1]}, "`tokens` in `tokenizer` is [1]"),
    ({"pad_to_multiple_of": 0}, "`pad_to_multiple_of` is 0"),
    ({"sources": "base"}, "did you mean `source`?"),
    (3, "`tokenizer` is 3"),
]


@pytest.mark.parametrize(("wrong", "text"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong(pair, wrong, text):
    def placed(value):
        if isinstance(value, dict):
            return {key: placed(item) for key, item in value.items()}
        return str(pair / "a") if value == "A" else value

    with pytest.raises(RecipeError) as caught:
        rows_of(recipe(pair, tokenizer=placed(wrong)))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_ways_at_once(pair):
    with pytest.raises(RecipeError, match="exclude each other"):
        parse_recipe(recipe(pair, tokenizer={"source": "base"}, tokenizer_source="base"))


def test_no_tokenizer_json_at_all(pair):
    (pair / "a" / "tokenizer.json").unlink()
    with pytest.raises(RecipeError, match=r"has no tokenizer\.json: save it with transformers"):
        rows_of(recipe(pair, tokenizer={"pad_to_multiple_of": 8}))


# Without tokenizers


def test_cut_to_the_smallest(pair, tmp_path, caplog):
    data = recipe(pair)
    with pytest.raises(InputError, match="the vocabularies differ"):
        merge(data, tmp_path / "refused", backend="reference")
    merge(data, tmp_path / "out", backend="reference", unsafe_truncate_embeddings=True)
    merged = load_merged(tmp_path / "out")
    for name, sign in (("model.embed_tokens.weight", 1), ("lm_head.weight", -1)):
        assert merged[name].shape == (11, 3)
        assert merged[name][:, 0].tolist() == [sign * (150.0 + i) for i in range(11)]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 11
    assert sum("are cut to 11 rows" in line for line in caplog.messages) == 1
