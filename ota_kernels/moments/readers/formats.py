"""The checkpoint formats that second moments are read from: one row each, its module imported when used."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ...errors import InputError, RecipeError
from ..source import Source
from .request import Request

AUTO = "auto"
_STEP = re.compile(r"(?:checkpoint|global_step|step)[-_]?(\d+)")


@dataclass(frozen=True)
class Format:
    """name: of `--format`; holds: what a checkpoint of it has; module, recogniser, reader: whose code it is.

    general: any other format that recognises a checkpoint says more about it.
    """

    name: str
    holds: str
    module: str
    recogniser: str
    reader: str
    general: bool = False

    def recognises(self, path: Path) -> bool:
        recogniser: Callable[[Path], bool] = getattr(self._module(), self.recogniser)
        return recogniser(path)

    def read(self, path: Path, request: Request) -> Source:
        """All second moments of `path`; the reader's errors."""
        reader: Callable[[Path, Request], Source] = getattr(self._module(), self.reader)
        return reader(path, request)

    def _module(self):
        return import_module(f".{self.module}", __package__)


FORMATS = {
    row.name: row
    for row in (
        Format(
            "torch",
            "optimizer.pt, .bin or .pth (another torch file of an optimizer: name it, not its folder)",
            "optimizer_file",
            "recognise_torch",
            "read_torch",
            general=True,
        ),
        Format(
            "trainer",
            "optimizer.pt beside trainer_state.json",
            "optimizer_file",
            "recognise_trainer",
            "read_trainer",
        ),
        Format(
            "deepspeed",
            "DeepSpeed's *_optim_states.pt files",
            "zero",
            "recognise_zero",
            "read_zero",
        ),
        Format(
            "deepspeed-universal",
            "a folder zero/ with one folder per parameter",
            "zero",
            "recognise_universal",
            "read_universal",
        ),
        Format(
            "dcp",
            "a torch distributed checkpoint with .metadata",
            "dcp",
            "recognise_dcp",
            "read_dcp",
        ),
    )
}


def choose(path: Path, name: str) -> tuple[Path, Format]:
    """The format called `name`, or for "auto" the one that recognises `path`; and the checkpoint: `path`, or
    the only checkpoint-N folder in it.

    Raises RecipeError for an unknown name, InputError where there is nothing at `path`, where no format
    recognises it, or where several do.
    """
    if name != AUTO and name not in FORMATS:
        raise RecipeError(f"--format {name!r} is not one of {', '.join((AUTO, *FORMATS))}")
    if not os.path.exists(path):
        raise InputError(f"checkpoint: {path}: no such file or folder")
    if name != AUTO:
        return path, FORMATS[name]
    found = [row for row in FORMATS.values() if row.recognises(path)]
    if not found:
        return _choose_within(path)
    particular = [row for row in found if not row.general] or found
    if len(particular) > 1:
        names = " or ".join(row.name for row in particular)
        raise InputError(f"checkpoint: {path}: holds several optimizer states: add --format {names}")
    return path, particular[0]


def _choose_within(path: Path) -> tuple[Path, Format]:
    """As `choose`, of the folder of a run that holds its checkpoints."""
    numbered = sorted((int(m[1]), m[0]) for m in map(_STEP.fullmatch, _names(path)) if m)
    if len(numbered) == 1:
        return choose(path / numbered[0][1], AUTO)
    if numbered:
        raise InputError(
            f"checkpoint: {path}: holds {len(numbered)} checkpoints of a run: name one, like "
            f"{path / numbered[-1][1]}"
        )
    looked_for = "; ".join(f"{row.holds} ({row.name})" for row in FORMATS.values())
    raise InputError(f"checkpoint: {path}: holds no optimizer state that is known. Looked for: {looked_for}")


def _names(path: Path) -> list[str]:
    return os.listdir(path) if os.path.isdir(path) else []
