"""Single files merged into one: checkpoints of ComfyUI and diffusers, state dictionaries of anything.

What `mergekit-pytorch` does: names are just names, so there are no layers (a gradient has its first value
everywhere), and what lies beside the files is not looked at.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import OutputError, RecipeError
from ..io.assets import Asset
from ..io.reader import FILE_SUFFIX
from ..io.workfolder import WorkFile
from ..planning.inputs import Inputs
from ..recipe.recipe import Recipe
from .job import Job, as_recipe
from .options import Options, Progress, Silent
from .rules import RULES, Rules

NAMES = ("same", "intersection", "union")


def merge_files(
    recipe: Recipe | str | os.PathLike | dict,
    out: str | os.PathLike,
    names: str = "same",
    *,
    progress: Progress | None = None,
    **options: Any,
) -> dict:
    """Merge the files that a recipe names as models (.safetensors, .pt, .pth, .ckpt, .bin) into the file
    `out` (.safetensors); returns the report.

    names: "same": all files must have the same tensors; "intersection": those that all have; "union": all,
    each merged over the files that have it. options: the fields of `Options`. The recipe stands in the file's
    metadata. Raises as `merge` does.
    """
    if names not in NAMES:
        raise RecipeError(f"names is {names!r}: it must be one of {', '.join(NAMES)}")
    out = Path(out)
    if out.suffix != FILE_SUFFIX:
        raise OutputError(f"{out}: the output is a safetensors file: let its name end in {FILE_SUFFIX}")
    with FilesJob(as_recipe(recipe), Options.of(**options), names) as job:
        return job.run(out, progress or Silent())


class FilesJob(Job):
    """One merge of files."""

    def __init__(self, recipe: Recipe, options: Options, names: str, rules: Rules = RULES) -> None:
        self._names = names
        _check(recipe)
        super().__init__(recipe, replace(options, shard_size=sys.maxsize, write_model_card=False), rules)

    def _open(self, recipe: Recipe) -> Inputs:
        return Inputs(recipe, files=self._names, lora_dtype=self.options.lora_merge_dtype)

    def _metadata(self) -> dict[str, str]:
        return {"merge_recipe": json.dumps(self.recipe.as_dict()), "merge_digest": self._digest(self._names)}

    def assets(self) -> list[Asset]:
        return []

    @functools.cached_property
    def notes(self) -> list[str]:
        return list(self.inputs.notes)

    def _work_folder(self, out: Path) -> WorkFile:
        room = {"resume": self.options.resume, "overwrite": self.options.overwrite}
        return WorkFile(out, self.needed_bytes, name=self.plan.layout.shards[0].name, **room)

    def check_output(self, out: Path) -> dict | None:
        for label, path in self._sources().items():
            if out == path.resolve():
                raise OutputError(f"the output {out} is the input {label}: name another file")
        if out.is_dir():
            raise OutputError(f"the output {out} is a folder: name a file")
        if out.exists() and self.options.resume and self._is_complete(out):
            return {}
        if out.exists() and not self.options.overwrite:
            found = "holds something else than this merge" if self.options.resume else "is there already"
            raise OutputError(f"the output {out} {found}: choose another name, or add --overwrite")
        self._work_folder(out).check()
        return None

    def _is_complete(self, out: Path) -> bool:
        """Whether a file is this merge's: it appears when it is complete, and its header knows what of."""
        shard = self.plan.layout.shards[0]
        with out.open("rb") as stream:
            return os.path.getsize(out) == shard.size and stream.read(len(shard.header)) == shard.header


def _check(recipe: Recipe) -> None:
    """RecipeError for what has no meaning for files."""
    given = {
        "slices": not recipe.slices[0].whole,
        "modules": recipe.modules[0].name is not None,
        "tokenizer": recipe.vocabulary is not None,
        "chat_template": recipe.chat_template is not None,
        "keep_sums": bool(recipe.parameters.get("keep_sums")),
    }
    for key, there in given.items():
        if there:
            raise RecipeError(f"`{key}` has no meaning for single files: remove it, or use `ota-merge run`")
    for reference in recipe.references:
        if os.path.isdir(os.path.expanduser(reference.path)):
            raise RecipeError(
                f"{reference.path} is a folder: name the file in it, or use `ota-merge run`, which merges "
                "folders"
            )
