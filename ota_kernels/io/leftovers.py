"""What of a model's folder is not in the merged one, and why: no file is lost without a word."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from .assets import code_files, home, tokenizer_folder
from .parts import is_weights
from .quantised import method_in_config
from .tokenizer import files_in, read_json

_LISTED = 8
# Written anew, or of the repository that the folder was in.
_REPLACED = {"README.md", "merge_report.json", "merge_recipe.yaml", ".gitattributes"}


def asset_notes(
    models: Mapping[str, Path], written: Iterable[str], tokenizer_source: str = "base"
) -> list[str]:
    """Lines about files beside the weights. models and tokenizer_source: as for `plan_assets`; written: names
    of what it plans."""
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
    lost = [n for n in _small_files(folder) if n not in written and n not in _REPLACED and n not in code]
    if lost:
        notes.append(f"files of {label} that stay behind: {_listing(lost)}")
    return notes


def _small_files(folder: Path) -> list[str]:
    """Files of a folder that hold no weights, by relative name; hidden ones are the leavings of tools."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith((".", "checkpoint-", "global_step"))
        )
        for name in sorted(names):
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file() and not is_weights(path):
                found.append(path.relative_to(folder).as_posix())
    return found


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown}, and {len(names) - _LISTED} more"
