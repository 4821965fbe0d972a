"""The files of a merged model that are not tensors: planned before the merge, written after it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml

from ..errors import RecipeError, RunError
from .chat import chosen_template, with_template
from .folder import holds_weights
from .parts import whole_files
from .quantised import method_in_config, without_claims
from .tokenizer import (
    check_equal_vocabularies,
    files_in,
    has_tokenizer,
    read_bytes,
    read_json,
    tokenizer_files,
)

_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_CONFIG_COMPANIONS = (
    _GENERATION,
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    "feature_extractor_config.json",
    "preprocessor.json",
    "processor.json",
    "normalizer.json",
    "audio_config.json",
    "configuration.json",
    "params.json",
    "open_clip_config.json",
    "label_map.json",
    "labels.txt",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
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
    copy_code: bool = False,
) -> list[Asset]:
    """Configuration, tokenizer, processor and module files of the merged model; writes nothing.

    models: folders by their names in the recipe, the base first if there is one: the first gives the
    configuration. tokenizer_source: "base" (the first model, which may have no tokenizer), "union"
    (all vocabularies must be equal), or a name or folder of a model that has a tokenizer. dtype: the
    torch name that config.json must state, None to leave it. untied: the output has an output matrix of
    its own, so config.json must say that embeddings are not tied. edit: what else changes in config.json;
    chat_template: as in a recipe, None for the tokenizer's own; tokenizer: files of one that was built, in
    place of tokenizer_source. copy_code: copy Python files that the configuration loads its classes from,
    too.

    Raises RecipeError for a tokenizer_source that cannot be served, InputError for a malformed file.
    """
    config_folder = home(next(iter(models.values())))
    built = tokenizer is not None
    tokens_from = config_folder if built else tokenizer_folder(models, tokenizer_source)
    contents: dict[str, bytes | Path] = dict(whole_files(config_folder))
    contents |= files_in(config_folder, (_CONFIG, *_CONFIG_COMPANIONS))
    for name in [name for name in contents if PurePosixPath(name).name == _CONFIG]:
        config = read_json(config_folder / name)
        # Only the model's own configuration knows of ties; modules and components have dtypes.
        is_main = name == _CONFIG
        has_weights = is_main or holds_weights((config_folder / name).parent)
        edited = edit(config) if is_main else config
        changes = edited != config or (has_weights and (dtype is not None or untied))
        if changes or method_in_config(config) is not None:
            contents[name] = _merged_config(
                edited, dtype if has_weights else None, untied and is_main, is_main
            )
    files = dict(tokenizer if built else tokenizer_files(tokens_from))
    if chat_template is not None and (text := chosen_template(chat_template, models.values())):
        if not built and not has_tokenizer(tokens_from):
            raise RecipeError(f"chat_template: {tokens_from} has no tokenizer to give it to: remove the key")
        files = with_template(files, text)
    contents |= files
    if _GENERATION not in contents:  # its token ids are the tokenizer's
        contents |= files_in(tokens_from, [_GENERATION])
    if copy_code:
        contents |= code_files(config_folder, tokens_from)
    return [Asset(name, content) for name, content in contents.items()]


def home(model: Path) -> Path:
    """The folder of a model's files beside its weights: of a weight file, its own, where that has a
    config.json."""
    return model.parent if model.is_file() and (model.parent / _CONFIG).is_file() else model


def tokenizer_folder(models: Mapping[str, Path], source: str) -> Path:
    """The folder whose tokenizer is copied; models and source as for `plan_assets`."""
    models = {label: home(folder) for label, folder in models.items()}
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


def _merged_config(config: dict, dtype: str | None, untied: bool, add: bool = True) -> bytes:
    # No merged tensor is quantised, so nothing may say so.
    config = _restated(without_claims(config), dtype, untied)
    # diffusers, whose configurations have a `_class_name`, knows no such key.
    add = add and "_class_name" not in config
    if add and dtype is not None and not any(key in config for key in _DTYPE_KEYS):
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
        elif key.endswith("_config") and isinstance(value, dict):
            restated[key] = _restated(value, dtype, untied)
    return restated


def code_files(config_folder: Path, tokenizer_folder: Path) -> dict[str, Path]:
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
