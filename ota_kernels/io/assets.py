"""The files of a merged model that are not tensors: planned before the merge, written after it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..errors import RecipeError, RunError
from .chat import chosen_template, with_template
from .tokenizer import (
    check_equal_vocabularies,
    files_in,
    has_tokenizer,
    read_bytes,
    read_json,
    tokenizer_files,
)

_CONFIG = "config.json"
_CONFIG_COMPANIONS = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
# transformers writes "dtype" from version 5 on, "torch_dtype" before; every version reads the latter.
_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class Asset:
    """One file to write. name: relative to the output folder; content: bytes, or the file to copy."""

    name: str
    content: bytes | Path


def plan_assets(
    models: Mapping[str, Path],
    *,
    tokenizer_source: str = "base",
    dtype: str | None = None,
    untied: bool = False,
    edit: Callable[[dict], dict] = lambda config: config,
    chat_template: str | None = None,
    tokenizer: Mapping[str, bytes | Path] | None = None,
) -> list[Asset]:
    """Configuration, tokenizer and remote-code files of the merged model; writes nothing.

    models: folders by their names in the recipe, the base first if there is one: the first gives the
    configuration. tokenizer_source: "base" (the first model, which may have no tokenizer), "union"
    (all vocabularies must be equal), or a name or folder of a model that has a tokenizer. dtype: the
    torch name that config.json must state, None to leave it. untied: the output has an output matrix of
    its own, so config.json must say that embeddings are not tied. edit: what else changes in config.json;
    chat_template: as in a recipe, None for the tokenizer's own; tokenizer: files of one that was built, in
    place of tokenizer_source.

    Raises RecipeError for a tokenizer_source that cannot be served, InputError for a malformed file.
    """
    config_folder = next(iter(models.values()))
    built = tokenizer is not None
    tokenizer_folder = config_folder if built else _tokenizer_folder(models, tokenizer_source)
    contents: dict[str, bytes | Path] = {}
    contents |= files_in(config_folder, (_CONFIG, *_CONFIG_COMPANIONS))
    if _CONFIG in contents:
        config = read_json(config_folder / _CONFIG)
        edited = edit(config)
        if dtype is not None or untied or edited != config:
            contents[_CONFIG] = _merged_config(edited, dtype, untied)
    files = dict(tokenizer if tokenizer is not None else tokenizer_files(tokenizer_folder))
    if chat_template is not None and (text := chosen_template(chat_template, models.values())):
        if not built and not has_tokenizer(tokenizer_folder):
            raise RecipeError(
                f"chat_template: {tokenizer_folder} has no tokenizer to give it to: remove the key"
            )
        files = with_template(files, text)
    contents |= files
    contents |= _code_files(config_folder, tokenizer_folder)
    return [Asset(name, content) for name, content in contents.items()]


def _tokenizer_folder(models: Mapping[str, Path], source: str) -> Path:
    first = next(iter(models.values()))
    if source == "base":
        return first
    if source == "union":
        owners = {name: folder for name, folder in models.items() if has_tokenizer(folder)}
        if not owners:
            return first
        check_equal_vocabularies(owners)
        return next(iter(owners.values()))
    folder = models.get(source) or Path(os.path.expanduser(source))
    if not has_tokenizer(folder):
        raise RecipeError(
            f"tokenizer_source: {source} has no tokenizer files: write base, union, or a model that has them"
        )
    return folder


def _merged_config(config: dict, dtype: str | None, untied: bool) -> bytes:
    config = _restated(config, dtype, untied)
    if dtype is not None and not any(key in config for key in _DTYPE_KEYS):
        config["torch_dtype"] = dtype
    if untied:
        config["tie_word_embeddings"] = False
    return (json.dumps(config, indent=2) + "\n").encode()


def _restated(config: dict, dtype: str | None, untied: bool) -> dict:
    """A copy of `config` whose present keys, also in nested text_config and the like, tell the truth."""
    restated = dict(config)
    for key, value in config.items():
        if key in _DTYPE_KEYS and dtype is not None:
            restated[key] = dtype
        elif key == "tie_word_embeddings" and untied:
            restated[key] = False
        elif key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            restated[key] = _restated(value, dtype, untied)
    return restated


def _code_files(config_folder: Path, tokenizer_folder: Path) -> dict[str, Path]:
    """Python files of the folders whose configuration loads its classes from them (`auto_map`)."""
    code: dict[str, Path] = {}
    for folder, name in ((config_folder, _CONFIG), (tokenizer_folder, "tokenizer_config.json")):
        if not any(read_json(path).get("auto_map") for path in files_in(folder, [name]).values()):
            continue
        for file, path in files_in(folder, ["*.py"]).items():
            other = code.setdefault(file, path)
            if other != path and read_bytes(other) != read_bytes(path):
                raise RecipeError(
                    f"tokenizer_source: {other} and {path} differ, and both are needed under that name: "
                    "write tokenizer_source: base"
                )
    return code


def recipe_asset(recipe: dict) -> Asset:
    """merge_recipe.yaml: the recipe (`Recipe.as_dict()`) as it can be run again."""
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    return Asset("merge_recipe.yaml", text.encode())


def write_assets(folder: Path, assets: Iterable[Asset]) -> None:
    """Write or overwrite the assets in `folder`, synced to disk with their folders; links become files."""
    folders = {folder}
    for asset in assets:
        path = folder / asset.name
        folders.add(path.parent)
        write_file(path, asset.content if isinstance(asset.content, bytes) else read_bytes(asset.content))
    for touched in folders:
        sync_folder(touched)


def write_file(path: Path, content: bytes) -> None:
    """Write `content` to `path`, in a new folder if need be, and sync the file to disk.

    Raises RunError when the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}): make room or fix the folder, then use --resume"
        ) from error


def sync_folder(folder: Path) -> None:
    """Wait until the names of the files in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
