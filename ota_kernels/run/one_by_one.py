"""A finished merge by `opcm` goes on from its file and two numbers of its report: k and the norms N_t.

    S_{T-1} = (w - w_0) / k;   S_T = S_{T-1} + c_T(d_T);   out = w_0 + S_T mean_{t <= T}(N_t) / ||S_T||

as if the expert had been there from the start, but for the rounding of the file's weights: one more than
that of the merge's own output.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputError
from ..io.assets import Asset, recipe_asset
from ..planning.inputs import Inputs
from ..recipe.recipe import Recipe
from ..recipe.schema import parse_recipe
from .decide import Decider
from .going_on import SELECTIONS, Before, together
from .job import Job
from .options import Options
from .pool import Pool
from .rules import RULES

_FROM_THE_START = "merge all experts from the start"


class OneByOne(Job):
    """A merge of the edit of a finished one and of one more expert. whole: the recipe of all experts."""

    def __init__(self, before: Before, entry: dict[str, Any], whole: Recipe, options: Options) -> None:
        self._before, self._whole = before, whole
        said = before.report.get("lambda") or {}
        self._factor, self._norms = said.get("used"), said.get("norms") or []
        if not self._factor or len(self._norms) != len(before.recipe["models"]):
            raise InputError(f"{before.folder}: its report has no one factor and norms: {_FROM_THE_START}")
        first = {"model": str(before.folder)}
        super().__init__(parse_recipe(before.recipe | {"models": [first, entry]}), options, RULES)

    def _open(self, recipe: Recipe) -> Inputs:
        return super()._open(recipe, unscaled={str(self._before.folder): self._factor})

    def _prepare(self) -> None:
        levels = [self._before.recipe, *self._before.recipe["models"], *self.recipe.as_dict()["models"]]
        given = {key for level in levels for key in level.get("parameters", {})}
        settings = [entry.settings for entry in self.inputs.entries if entry.is_computed]
        if given & {*SELECTIONS} or any(
            s["calibrate"] != "none" or s["elsewhere"] != "sum" or s.shared.get("match_norm") is None
            for s in settings
        ):
            raise InputError(
                f"{self._before.folder}: goes on only where whole edits are summed and their norms matched: "
                f"{_FROM_THE_START}"
            )
        super()._prepare()

    def decider(self, pool: Pool) -> Decider:
        found = super().decider(pool)
        found.norms_before = self._norms
        return found

    def _digest(self, *more: Any) -> str:
        return super()._digest(self._whole.as_dict(), self._factor, self._norms, *more)

    def assets(self) -> list[Asset]:
        own = recipe_asset(self._whole.as_dict())
        return [own if asset.name == own.name else asset for asset in super().assets()]

    def _completed(self, report: dict[str, Any]) -> dict[str, Any]:
        own = super()._completed(report) | {"notes": self.notes}
        return together(self._before.report, own, len(self._norms))

    def _sources(self) -> dict[str, Path]:
        return super()._sources() | {str(self._before.folder): self._before.folder}
