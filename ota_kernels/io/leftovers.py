"""What of a model's folder is not in the merged one, and why: no file is lost without a word."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from .assets import code_files, home, tokenizer_folder
from .folder import BESIDE
from .parts import is_weights
from .quantised import method_in_config
from .tokenizer import files_in, read_json

_LISTED = 8
_DEEPEST, _MOST = 3, 2000  # folders and files that are looked at: more are no model's
_OF_INTEREST = (
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
# Written anew, or of the repository that the folder was in.
_REPLACED = {"README.md", "merge_report.json", "merge_recipe.yaml", ".gitattributes"}


def asset_notes(
    models: Mapping[str, Path],
    written: Iterable[str],
    tokenizer_source: str = "base",
    read: Iterable[Path] = (),
) -> list[str]:
    """Lines about files beside the merged weights.

    models and tokenizer_source: as for `plan_assets`; written: names of what it plans; read: weight files
    that are merged.
    """
    written = set(written)
    label, first = next(iter(models.items()))
    folder, tokens = home(first), tokenizer_folder(models, tokenizer_source)
    notes = []
    if folder != first:
        notes.append(f"{label} is a file: configuration and tokenizer are those of its folder")
    config = files_in(folder, ["config.json"])
    method = method_in_config(read_json(config["config.json"])) if config else None
    if method is not None:
        notes.append(f"config.json of {label} says quantised ({method}), which no tensor is: not written")
    if "generation_config.json" in written and not (folder / "generation_config.json").exists():
        notes.append(f"generation_config.json is that of {tokens}, with the tokenizer; {label} has none")
    code = [name for name in code_files(folder, tokens) if name not in written]
    if code:
        notes.append(
            f"custom code stays behind: {_listing(code)}; the model needs it, so copy it with "
            "--trust-remote-code where you trust it"
        )
    small, weights = _files(folder)
    lost = [name for name in small if name not in written and name not in _REPLACED and name not in code]
    if lost:
        notes.append(f"files of {label} that stay behind: {_listing(lost)}")
    merged = {path.resolve() for path in read}
    if any(folder / name in merged or (folder / name).resolve() in merged for name in weights):
        other = [name for name in weights if _is_other_set(folder / name, merged)]
        if other:
            notes.append(f"other weights of {label} that stay behind: {_listing(other)}")
    return notes + _elsewhere(models, folder, tokens, written)


def _is_other_set(path: Path, merged: set[Path]) -> bool:
    """Whether weights are neither merged nor what training left (optimizer states, second moments)."""
    return (
        path.resolve() not in merged and not path.name.endswith("index.json") and not BESIDE.match(path.name)
    )


def _elsewhere(models: Mapping[str, Path], folder: Path, tokens: Path, written: set[str]) -> list[str]:
    """Chat templates and processors that a model has whose files are not the ones that are written."""
    notes = []
    for label, other in models.items():
        if home(other) in (folder, tokens):
            continue
        lacking = [name for name in files_in(home(other), _OF_INTEREST) if name not in written]
        if lacking:
            notes.append(
                f"{label} has {_listing(lacking)}, which the output lacks: `tokenizer_source: {label}` or "
                "another base brings them"
            )
    return notes


def _files(folder: Path) -> tuple[list[str], list[str]]:
    """(files without weights, files of weights) of a folder, by relative name; hidden ones and checkpoints
    of the training are the leavings of tools."""
    small: list[str] = []
    weights: list[str] = []
    for parent, folders, names in os.walk(folder):
        deep = len(Path(parent).relative_to(folder).parts) >= _DEEPEST
        passed = (".", "checkpoint-", "global_step")
        folders[:] = [] if deep else sorted(name for name in folders if not name.startswith(passed))
        for name in sorted(names):
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                found = weights if is_weights(path) else small
                found.append(path.relative_to(folder).as_posix())
        if len(small) + len(weights) > _MOST:
            break
    return small, weights


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown}, and {len(names) - _LISTED} more"
