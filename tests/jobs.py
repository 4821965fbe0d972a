"""Whole merges that are told how to go about it: other rules, or a step at which they stop."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from ota_kernels.recipe.schema import Recipe
from ota_kernels.run.job import Job, Options, Progress, Silent, as_recipe
from ota_kernels.run.ranks import of_environment
from ota_kernels.run.rules import RULES, Rules
from ota_kernels.tensors.segment import Segment


def merge(
    recipe: Recipe | str | os.PathLike | dict,
    out: Path,
    rules: Rules = RULES,
    progress: Progress | None = None,
    **options: Any,
) -> dict:
    """`ota_kernels.merge` with rules."""
    with of_environment() as ranks, Job(as_recipe(recipe), Options.of(**options), rules, ranks) as job:
        return job.run(Path(out), progress or Silent())


def launch(*arguments: Any, pause: float = 0.0, env: dict | None = None, **given: Any) -> subprocess.Popen:
    """`ota-merge run` in a process of its own, by `driver.py`. env: beside this one's; given: of Popen."""
    command = [sys.executable, Path(__file__).with_name("driver.py"), "run", *map(str, arguments)]
    own = {"PAUSE": str(pause), "TOLD": "1"} | (env or {})
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | given
    return subprocess.Popen(command, env=os.environ | own, **given)


class Merged:
    """Counts the elements of merged tiles; `rules` let a merge tell."""

    def __init__(self) -> None:
        self.elements, self._lock = 0, threading.Lock()
        self.rules = Rules(before=self._count)

    def _count(self, step: str, segment: Segment | None) -> None:
        if step == "tile":
            with self._lock:
                self.elements += segment.stop - segment.start


class Interrupt:
    """For `Rules.before`: raises KeyboardInterrupt at a call for one of these steps. after: a step that must
    come first."""

    def __init__(self, step: str, call: int, after: str | None = None) -> None:
        self._step, self._left, self._after = step, call, after
        self._lock = threading.Lock()

    def __call__(self, step: str, segment: Segment | None) -> None:
        with self._lock:
            if step == self._after:
                self._after = None
            if step != self._step or self._after is not None:
                return
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt
