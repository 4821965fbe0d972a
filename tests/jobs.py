"""Whole merges that are told how to go about it: other rules, or a step at which they stop."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from ota_kernels.recipe.schema import Recipe
from ota_kernels.run.job import Job, Options, Progress, Silent, as_recipe
from ota_kernels.run.rules import RULES, Rules


def merge(
    recipe: Recipe | str | os.PathLike | dict,
    out: Path,
    rules: Rules = RULES,
    progress: Progress | None = None,
    **options: Any,
) -> dict:
    """`ota_kernels.merge` with rules."""
    with Job(as_recipe(recipe), Options.of(**options), rules) as job:
        return job.run(out, progress or Silent())


class Interrupt:
    """For `Rules.before`: raises KeyboardInterrupt at a call for one of these steps. after: a step that must
    come first."""

    def __init__(self, step: str, call: int, after: str | None = None) -> None:
        self._step, self._left, self._after = step, call, after
        self._lock = threading.Lock()

    def __call__(self, step: str, segment: object) -> None:
        with self._lock:
            if step == self._after:
                self._after = None
            if step != self._step or self._after is not None:
                return
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt
