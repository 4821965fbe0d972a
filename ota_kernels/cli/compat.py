"""mergekit's flags of `run` and `files`: those with another name here, those without a meaning here."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import click

from ..errors import RecipeError

# What each would do is what happens anyway, or cannot happen.
_WITHOUT_EFFECT = {
    "lazy_unpickle": "files are mapped",
    "clone_tensors": "files are mapped",
    "low_cpu_memory": "--memory-limit holds anyway",
    "read_to_gpu": "tiles are streamed",
    "async_write": "tiles are written as they come",
    "write_threads": "tiles are written as they come",
    "lora_merge_cache": "adapters are added in the tile, without a copy",
}
_NEGATED = ("allow_crimes", "unsafe_truncate_embeddings", "trust_remote_code", "quiet")
_ON_A_GPU = ("cuda", "multi_gpu", "gpu_rich")
# Of single files only.
_WITHOUT_EFFECT_ON_FILES = {
    "copy_tokenizer": "files have no tokenizer",
    "write_model_card": "the recipe is in the file's metadata",
    "out_shard_size": "the output is one file",
    "allow_crimes": "names decide: -i or -u",
    "trust_remote_code": "nothing beside the files is read",
    "unsafe_truncate_embeddings": "names and shapes decide",
}
_DECIMAL = {"K": 10**3, "M": 10**6, "B": 10**9}


class ShardSize(click.ParamType):
    """mergekit's size: a number with K, M or B, which counts bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).strip().upper()
        number, unit = (text[:-1], _DECIMAL[text[-1]]) if text[-1:] in _DECIMAL else (text, 1)
        try:
            size = int(float(number) * unit)
        except (ValueError, OverflowError):
            size = 0
        if size < 1:
            self.fail(f"{value!r} is not a number of bytes: write it like 5B, 500M or 1000000", param, ctx)
        return size


class TorchType(click.ParamType):
    """A type as recipes write it."""

    name = "dtype"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from ..recipe.parameters import DTYPE, parse_plain

        return parse_plain(value, f"--{param.name.replace('_', '-')}", DTYPE)


def _flag(name: str) -> Callable:
    flag = name.replace("_", "-")
    return click.option(f"--{flag}/--no-{flag}", name, default=False, hidden=True)


def _negation(name: str) -> Callable:
    """Of an option of ours that can only be set."""
    return click.option(f"--no-{name.replace('_', '-')}", f"no_{name}", is_flag=True, hidden=True)


_COMMON = (
    *(_flag(name) for name in _WITHOUT_EFFECT if name not in ("write_threads", "lora_merge_cache")),
    click.option("--write-threads", type=int, hidden=True),
    click.option("--lora-merge-cache", type=click.Path(), hidden=True),
    *(_flag(name) for name in _ON_A_GPU),
    _negation("quiet"),
    click.option("--random-seed", type=int, hidden=True),
    click.option("--num-threads", "-j", type=click.IntRange(min=1), hidden=True),
    click.option("--transformers-cache", type=click.Path(), hidden=True),
    click.option("--safe-serialization/--no-safe-serialization", default=True, hidden=True),
    click.option(
        "--lora-merge-dtype",
        type=TorchType(),
        help="Round a model with an adapter on it to this type, as a merged copy would be.  [default: not]",
    ),
)
_OF_FOLDERS = (
    *(_negation(name) for name in _NEGATED if name != "quiet"),
    click.option("--out-shard-size", type=ShardSize(), hidden=True),
    click.option("--copy-tokenizer/--no-copy-tokenizer", default=True, help="Write the tokenizer's files."),
    click.option("--write-model-card/--no-write-model-card", default=True, help="Write README.md."),
)
_OF_FILES = (
    click.option("--out-shard-size", type=ShardSize(), hidden=True),
    click.option("--copy-tokenizer/--no-copy-tokenizer", default=None, hidden=True),
    click.option("--write-model-card/--no-write-model-card", default=None, hidden=True),
    *(_flag(name) for name in ("allow_crimes", "trust_remote_code", "unsafe_truncate_embeddings")),
)


def mergekit_flags(command: Callable, *, of_files: bool = False) -> Callable:
    """Take mergekit's flags too; the command receives our own options. of_files: there are no folders."""
    without_effect = _WITHOUT_EFFECT | (_WITHOUT_EFFECT_ON_FILES if of_files else {})

    @functools.wraps(command)
    def translated(*args: Any, **given: Any) -> Any:
        return command(*args, **_translated(given, without_effect))

    for option in reversed((*_COMMON, *(_OF_FILES if of_files else _OF_FOLDERS))):
        translated = option(translated)
    return translated


def _translated(given: dict[str, Any], without_effect: Mapping[str, str]) -> dict[str, Any]:
    for name in _NEGATED:
        if given.pop(f"no_{name}", False):
            given[name] = False
    for name, reason in without_effect.items():
        if given.pop(name) not in (None, False):
            click.echo(f"--{name.replace('_', '-')} has no effect here: {reason}", err=True)
    if not given.pop("safe_serialization"):
        raise RecipeError("--no-safe-serialization: pickled models are not written; leave the flag out")
    if cache := given.pop("transformers_cache"):
        os.environ["HF_HUB_CACHE"] = cache
    on_a_gpu = {name for name in _ON_A_GPU if given.pop(name)}
    if on_a_gpu and given["device"] == "auto":
        given["device"] = "cuda"
    ours = {"out_shard_size": "shard_size", "random_seed": "seed", "num_threads": "threads"}
    for theirs, own in ours.items():
        value = given.pop(theirs, None)
        if value is not None:
            given[own] = value
    return given
