"""The tokens of tokenizer.json files, and one vocabulary made of several: its ids and its files."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .tokenizer import files_in, read_bytes, read_json, tokenizer_files

_FILE = "tokenizer.json"
_WRONG_SHAPE = (AttributeError, IndexError, KeyError, TypeError, ValueError)


@dataclass(frozen=True)
class Tokens:
    """One tokenizer.json. ids: of all its tokens; added: the entries of added tokens, by token."""

    folder: Path
    content: dict[str, Any]
    ids: dict[str, int]
    added: dict[str, dict[str, Any]]

    @property
    def fingerprint(self) -> str:
        """Changes with the file."""
        return hashlib.sha256(read_bytes(self.folder / _FILE)).hexdigest()


def read_tokens(folder: Path) -> Tokens | None:
    """None for a folder without tokenizer.json; InputError for one that is malformed."""
    for path in files_in(folder, [_FILE]).values():
        content = read_json(path)
        try:
            vocabulary = content["model"]["vocab"]
            if isinstance(vocabulary, list):  # Unigram: [[piece, score], ...], the id is the position
                vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
            added = {entry["content"]: dict(entry) for entry in content.get("added_tokens") or ()}
            ids = dict(vocabulary) | {token: int(entry["id"]) for token, entry in added.items()}
            if not all(isinstance(token, str) and type(i) is int and i >= 0 for token, i in ids.items()):
                raise ValueError
        except _WRONG_SHAPE as error:
            raise InputError(f"{path} has no vocabulary that can be read: restore the file") from error
        return Tokens(folder, content, ids, added)
    return None


def stripped(tokens: Tokens, limit: int) -> Tokens:
    """Without the tokens whose id is `limit` or more, and the merges that make them (BPE; others stay)."""
    content = tokens.content
    gone = {token for token, i in tokens.ids.items() if i >= limit}
    if not gone or content["model"].get("type", "BPE") != "BPE":
        return tokens
    content = copy.deepcopy(content)
    model = content["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in gone}
    merges = model.get("merges") or []
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
    kept = zip(merges, pairs, strict=True)
    model["merges"] = [m for m, pair in kept if not gone & {*pair, "".join(pair)}]
    content["added_tokens"] = [e for e in content.get("added_tokens") or () if e["content"] not in gone]
    ids = {token: i for token, i in tokens.ids.items() if token not in gone}
    added = {token: entry for token, entry in tokens.added.items() if token not in gone}
    return Tokens(tokens.folder, content, ids, added)


def joined(
    base: Tokens, others: Iterable[tuple[Tokens, int]], named: Iterable[str]
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """(ids of the joined vocabulary, entries of added tokens that are new). The base's ids never change.

    others: further tokenizers, and the id from which on their tokens have no row; named: tokens that are
    there in any case. New tokens are added tokens, in the order of the models and ascending ids: first those
    that are plain in their tokenizer, then those that are added there, with their settings.
    """
    ids, new = dict(base.ids), []

    def add(token: str, entry: Mapping[str, Any]) -> None:
        if token not in ids:
            ids[token] = max(ids.values(), default=-1) + 1 if not new else new[-1]["id"] + 1
            new.append({**_PLAIN, **entry, "id": ids[token], "content": token})

    others = list(others)
    for kind in ("plain", "added"):
        for tokens, limit in others:
            for token, i in sorted(tokens.ids.items(), key=lambda pair: pair[1]):
                if i < limit and (token in tokens.added) == (kind == "added"):
                    add(token, tokens.added.get(token, {}))
    for token in named:
        add(token, {})
    return ids, new


_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def written(tokens: Tokens, new: list[dict[str, Any]], changed: bool) -> dict[str, bytes | Path]:
    """The files of a tokenizer with further added tokens. changed: its vocabulary was stripped, so that files
    in other formats no longer say the same and are left out."""
    files: dict[str, bytes | Path] = dict(tokenizer_files(tokens.folder))
    if changed:
        for name in ("vocab.json", "merges.txt", "tokenizer.model", "vocab.txt"):
            files.pop(name, None)
    if not new and not changed:
        return files
    content = tokens.content | {"added_tokens": [*(tokens.content.get("added_tokens") or ()), *new]}
    files[_FILE] = json.dumps(content, ensure_ascii=False).encode()
    for name in ("tokenizer_config.json", "added_tokens.json"):
        if name in files:
            found = read_json(files[name])
            text = json.dumps(_with_added(name, found, tokens, new), indent=2, ensure_ascii=False)
            files[name] = f"{text}\n".encode()
    return files


def _with_added(name: str, content: dict, tokens: Tokens, new: list[dict[str, Any]]) -> dict:
    if name == "added_tokens.json":
        return {t: i for t, i in content.items() if t in tokens.ids} | {e["content"]: e["id"] for e in new}
    decoder = content.get("added_tokens_decoder")
    if not isinstance(decoder, dict):
        return content
    kept = {i: entry for i, entry in decoder.items() if entry.get("content") in tokens.ids}
    more = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in new}
    return content | {"added_tokens_decoder": kept | more}
