"""Tokenizer files of a model folder, and whether two models' vocabularies are equal."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import InputError, RecipeError
from .signature import check_real
from .sizes import read_settings

# Vocabularies whose format is not read here; two of them are equal when their bytes are.
_OPAQUE_VOCABULARIES = (
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
)
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", *_OPAQUE_VOCABULARIES)
_COMPANIONS = (
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)

_READABLE_VOCABULARY = "tokens"
_SHOWN_DIFFERENCES = 3

# What a vocabulary file of another shape raises when it is taken apart.
_WRONG_SHAPE = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def files_in(folder: Path, patterns: Iterable[str]) -> dict[str, Path]:
    """Files of `folder` that match a glob pattern, by name relative to `folder`, in the patterns' order.

    Raises InputError for one that cannot be opened, such as a link whose target is gone.
    """
    found = {}
    for pattern in patterns:
        parent, _, name_pattern = pattern.rpartition("/")
        directory = folder / parent
        names = sorted(os.listdir(directory)) if directory.is_dir() else []
        for name in names:
            if fnmatchcase(name, name_pattern):
                path = directory / name
                check_real(path)
                found[path.relative_to(folder).as_posix()] = path
    return found


def read_bytes(path: Path) -> bytes:
    """The file's bytes; raises InputError when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be read ({error.strerror}): restore it, or remove it from the folder")


def read_json(path: Path) -> dict:
    """The JSON object in `path`; raises InputError when it is anything else."""
    try:
        value = json.loads(read_settings(path))
    except OSError as error:
        raise _unreadable(path, error) from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): restore the file") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, not an object: restore the file")
    return value


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds a vocabulary."""
    return bool(files_in(folder, _VOCABULARIES))


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Vocabularies, tokenizer settings and chat templates of `folder`, by relative name."""
    return files_in(folder, (*_VOCABULARIES, *_COMPANIONS))


def check_equal_vocabularies(folders: Mapping[str, Path]) -> None:
    """Raise RecipeError unless the vocabularies of `folders` (recipe name -> folder with one) are equal.

    The error names two models and up to three tokens whose ids differ.
    """
    (first, first_folder), *others = folders.items()
    expected = _vocabularies(first_folder) if others else {}
    for other, other_folder in others:
        difference = _difference(expected, _vocabularies(other_folder))
        if difference:
            raise RecipeError(
                f"tokenizer_source: union needs equal vocabularies, but those of {first} and {other} "
                f"{difference}: write tokenizer_source: base or a model's path instead, which works where "
                "the embeddings have equal shapes"
            )


def _difference(expected: dict[str, dict], found: dict[str, dict]) -> str:
    """How two models' vocabularies (by kind) differ, in words; empty when they are equal."""
    kind = next((kind for kind in expected if kind in found), None)
    if kind is None:
        return "are in files of different formats"
    ours, theirs = expected[kind], found[kind]
    # Sorted: the order of a set of strings changes from run to run.
    tokens = sorted((t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)), key=repr)
    if not tokens:
        return ""
    shown = [
        f"{token!r} is {ours.get(token, 'absent')} and {theirs.get(token, 'absent')}"
        for token in tokens[:_SHOWN_DIFFERENCES]
    ]
    more = f", and {len(tokens) - len(shown)} more" if len(tokens) > len(shown) else ""
    return f"differ: {', '.join(shown)}{more}"


def vocabulary_of(folder: Path) -> tuple[bytes, Callable[[], dict[str, int] | None]]:
    """(a digest, a function that reads token -> id) of the vocabulary of `folder`: two of equal digest are
    equal. The function gives None for a format that is not read here.
    """
    added = _added_tokens(folder)
    digest = hashlib.sha256(json.dumps(added, sort_keys=True).encode("utf-8", "surrogatepass"))
    sources = files_in(folder, ("tokenizer.json", "vocab.json", "vocab.txt", *_SENTENCEPIECE))
    for path in list(sources.values())[:1]:
        digest.update(read_bytes(path))

    def read() -> dict[str, int] | None:
        tokens = _tokens(folder)
        if tokens is None:
            found = files_in(folder, _SENTENCEPIECE)
            tokens = next((sentencepiece_tokens(read_bytes(path)) for path in found.values()), None)
        return None if tokens is None else tokens | added

    return digest.digest(), read


def sentencepiece_tokens(model: bytes) -> dict[str, int] | None:
    """piece -> id of a sentencepiece model (a protocol buffer whose field 1 repeats pieces, each with its
    text as field 1); None where it is something else."""
    tokens: dict[str, int] = {}
    try:
        for field, piece in _messages(model):
            if field == 1:
                text = next(value for inner, value in _messages(piece) if inner == 1)
                tokens.setdefault(text.decode("utf-8"), len(tokens))
    except (ValueError, IndexError, StopIteration):
        return None
    return tokens or None


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(field number, content) of the length-delimited fields of a protocol buffer."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            _, at = _varint(data, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        elif wire == 2:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("cut short")
            yield key >> 3, data[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {wire}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("not a varint")


def _vocabularies(folder: Path) -> dict[str, dict[str, int | str]]:
    """Each vocabulary of `folder` by kind: token -> id, or file name -> digest where it is opaque.

    Kinds are comparable between models: an added token counts in every one of them.
    """
    added = _added_tokens(folder)
    kinds = {}
    tokens = _tokens(folder)
    if tokens is not None:
        kinds[_READABLE_VOCABULARY] = tokens | added
    for name, path in files_in(folder, _OPAQUE_VOCABULARIES).items():
        kinds[name] = {name: hashlib.sha256(read_bytes(path)).hexdigest()[:12]} | added
    return kinds


def _tokens(folder: Path) -> dict[str, int] | None:
    readers = {
        "tokenizer.json": _tokenizer_json_tokens,
        "vocab.json": read_json,
        "vocab.txt": _vocab_txt_tokens,
    }
    for name, path in files_in(folder, readers).items():
        return readers[name](path)
    return None


def _tokenizer_json_tokens(path: Path) -> dict[str, int]:
    content = read_json(path)
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [[piece, score], ...], the id is the position
            vocabulary = {piece: index for index, (piece, _score) in enumerate(vocabulary)}
        added = {entry["content"]: entry["id"] for entry in content.get("added_tokens") or ()}
        return dict(vocabulary) | added
    except _WRONG_SHAPE as error:
        raise InputError(f"{path} has no vocabulary that can be compared: restore the file") from error


def _vocab_txt_tokens(path: Path) -> dict[str, int]:
    try:
        # Not splitlines: a token may hold other line separators of Unicode.
        lines = read_bytes(path).decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}): restore the file") from error
    return {line.rstrip("\r"): index for index, line in enumerate(lines)}


def _added_tokens(folder: Path) -> dict[str, int]:
    tokens = {}
    for path in files_in(folder, ["added_tokens.json"]).values():
        tokens |= read_json(path)
    for path in files_in(folder, ["tokenizer_config.json"]).values():
        entries = read_json(path).get("added_tokens_decoder") or {}
        try:
            tokens |= {entry["content"]: int(index) for index, entry in entries.items()}
        except _WRONG_SHAPE as error:
            raise InputError(f"{path}: added_tokens_decoder is malformed: restore the file") from error
    return tokens
