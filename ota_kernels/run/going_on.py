"""A finished merge that goes on with one more expert, or without one: what is known of it, and the report
of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputError, RecipeError
from ..recipe.schema import load_recipe
from .report import published_report
from .sums_writing import SUMS

RECIPE_NAME = "merge_recipe.yaml"
SELECTIONS = ("density", "saliency_mass", "precond_threshold")


class Before:
    """A finished merge. recipe: as a mapping; report: what it says of itself; options: those that its bytes
    depend on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.report = folder, published_report(folder)
        self.one_by_one = self.report.get("method") == "opcm"
        if not self.one_by_one and ("sums" not in self.report or not (folder / SUMS).is_dir()):
            raise InputError(
                f"{folder}: is no merge that can go on: merge it with `keep_sums: true` of the method `ota`, "
                "or by `opcm`"
            )
        self.recipe = load_recipe(folder / RECIPE_NAME).as_dict()
        self.options: dict[str, Any] = dict(self.report["options"])
        if "models" not in self.recipe:
            raise InputError(f"{folder}: its recipe restacks layers: merge all experts from the start")

    def parameters(self, given: dict[str, Any]) -> dict[str, Any]:
        """A new expert's: what is given, and what all experts of the merge share."""
        each = [model.get("parameters", {}) for model in self.recipe["models"]]
        shared = {k: x for k, x in each[0].items() if all(k in own and own[k] == x for own in each)}
        shared.pop("preconditioner_path", None)
        if any(key in given for key in SELECTIONS):
            shared = {key: value for key, value in shared.items() if key not in SELECTIONS}
        elif not any(key in shared for key in SELECTIONS) and any(
            k in own for own in each for k in SELECTIONS
        ):
            raise RecipeError(
                f"the experts of {self.folder} differ in what is kept of them: give --density or the like"
            )
        return shared | given


def together(
    before: dict[str, Any], report: dict[str, Any], place: int, removes: bool = False
) -> dict[str, Any]:
    """The report of one expert's merge, with what the earlier one says of the others."""

    def whole(old: list, new: list) -> list:
        return old[:place] + old[place + 1 :] if removes else old + new[-1:]

    tensors = {}
    for name, found in report["tensors"].items():
        old = before["tensors"][name]
        tensors[name] = found | {key: whole(old[key], found[key]) for key in ("kept", "thresholds")}
    both = {key: whole(before["found"][key], report["found"][key]) for key in ("thresholds", "mean_weights")}
    return report | {
        "experts": whole(before["experts"], report["experts"]),
        "tensors": tensors,
        "found": report["found"] | both,
    }
