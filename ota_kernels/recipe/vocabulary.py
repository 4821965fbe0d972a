"""What a recipe asks of the merged vocabulary: `tokenizer: {source, tokens, pad_to_multiple_of}`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from .parameters import SWITCH, TEXT, parse_plain, show, suggest, whole
from .reference import Reference, parse_reference

_ID = whole("an integer >= 0", at_least=0)
_MULTIPLE = whole("an integer >= 1", at_least=1)
_KINDS = ("model_token", "zero")


@dataclass(frozen=True)
class TokenRule:
    """Where the row of a token comes from in models that lack it. kind: "default" (the rule for all tokens),
    "zero", or "token": that of `token` (None: the same one) or of number `index` in `model`; force: in all
    models."""

    kind: str = "default"
    model: Reference | None = None
    token: str | None = None
    index: int | None = None
    force: bool = False

    def as_yaml(self) -> dict[str, Any]:
        found: dict[str, Any] = {"force": True} if self.force else {}
        if self.kind == "zero":
            found["source"] = {"kind": "zero"}
        elif self.kind == "token" and self.token is None and self.index is None:
            found["source"] = self.model.as_yaml()
        elif self.kind == "token":
            which = {"token": self.token} if self.index is None else {"token_id": self.index}
            found["source"] = {"kind": "model_token", "model": self.model.as_yaml()} | which
        return found


@dataclass(frozen=True)
class Vocabulary:
    """source: "union", "base" or a model; tokens: rules by token; multiple: of which the number of rows is
    one."""

    source: str | Reference = "union"
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    multiple: int = 1

    def as_yaml(self) -> dict[str, Any]:
        source = self.source if isinstance(self.source, str) else self.source.as_yaml()
        found: dict[str, Any] = {"source": source}
        if self.tokens:
            found["tokens"] = {token: rule.as_yaml() for token, rule in self.tokens.items()}
        return found | ({"pad_to_multiple_of": self.multiple} if self.multiple > 1 else {})


def parse_source(value: Any, name: str, folder: Path | None) -> str | Reference:
    """`union`, `base` or a model."""
    return value if value in ("union", "base") else parse_reference(value, name, folder)


def parse_vocabulary(data: Any, folder: Path | None) -> Vocabulary:
    """The recipe's `tokenizer`."""
    data = _mapping(data, "`tokenizer`", ("source", "tokens", "pad_to_multiple_of"))
    source = data.get("source")
    source = "union" if source is None else parse_source(source, "`source` in `tokenizer`", folder)
    tokens = {}
    for token, rule in _mapping(data.get("tokens") or {}, "`tokens` in `tokenizer`").items():
        if not isinstance(token, str) or not token:
            raise RecipeError(f"`tokens` in `tokenizer` has {show(token)}: it must be a token (text)")
        tokens[token] = _parse_rule(rule, f"`{token}` in `tokenizer.tokens`", folder)
    multiple = data.get("pad_to_multiple_of")
    multiple = 1 if multiple is None else parse_plain(multiple, "`pad_to_multiple_of`", _MULTIPLE)
    return Vocabulary(source, tokens, multiple)


def _parse_rule(data: Any, name: str, folder: Path | None) -> TokenRule:
    data = _mapping(data or {}, name, ("source", "force"))
    force = False if data.get("force") is None else parse_plain(data["force"], f"`force` of {name}", SWITCH)
    source = data.get("source")
    if source is None:
        return TokenRule(force=force)
    if not isinstance(source, Mapping) or "kind" not in source:
        return TokenRule("token", parse_reference(source, f"`source` of {name}", folder), force=force)
    where = f"`source` of {name}"
    source = _mapping(source, where, ("kind", "model", "token", "token_id"))
    kind = source["kind"]
    if kind not in _KINDS:
        raise RecipeError(f"`kind` of {where} is {show(kind)}: it must be {' or '.join(_KINDS)}")
    if kind == "zero":
        return TokenRule("zero", force=force)
    if source.get("model") is None or (source.get("token") is None) == (source.get("token_id") is None):
        raise RecipeError(f"{where} is {show(dict(source))}: give `model`, and one of `token` and `token_id`")
    model = parse_reference(source["model"], f"`model` of {where}", folder)
    if source.get("token") is not None:
        token = parse_plain(source["token"], f"`token` of {where}", TEXT)
        return TokenRule("token", model, token, force=force)
    index = parse_plain(source["token_id"], f"`token_id` of {where}", _ID)
    return TokenRule("token", model, None, index, force)


def _mapping(value: Any, name: str, known: tuple[str, ...] | None = None) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{name} is {show(value)}: it must be a mapping of keys to values")
    for key in value if known else ():
        if key not in known:
            hint = suggest(key if isinstance(key, str) else "", known)
            raise RecipeError(f"unknown key {show(key)} (value {show(value[key])}) in {name}; {hint}")
    return value
