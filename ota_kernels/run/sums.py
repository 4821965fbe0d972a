"""Merges that go on: `keep_sums: true` writes N = sum_t P_t d_t and D = sum_t P_t beside a merge, and
`add` goes on with them as if its expert had been there from the start.

    sums/numerator/NAME, sums/denominator/NAME   float32, of outputs wider than 16 bits float64; where
    nobody keeps an element, D has the sign bit
    add:     N + P d, D + P, in the order in which a merge of all experts adds them: bit for bit
    remove:  N - P d, D - P: within rounding, since sums of floats do not remember what was added
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, RecipeError
from ..io.assets import Asset, recipe_asset
from ..io.reader import Checkpoint
from ..recipe.recipe import Recipe
from ..recipe.schema import load_recipe, parse_recipe
from .job import Job
from .options import Options, Progress, Silent
from .report import published_report
from .rules import RULES
from .sums_writing import PLANES, SUMS, Earlier, base_probes, plane_type, uniform_tensors

RECIPE_NAME = "merge_recipe.yaml"
SELECTIONS = ("density", "saliency_mass", "precond_threshold")


def add(
    out: str | os.PathLike,
    expert: str | os.PathLike,
    new: str | os.PathLike,
    *,
    parameters: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Merge an expert into the finished merge `out`, which has kept its sums, and write it as the folder
    `new`: byte for byte the merge of all experts in this order. Reads the sums, the base and one expert.

    parameters: the expert's own, by the recipe's keys; those that all others share are taken over. options
    and errors as of `merge`. Returns the report.
    """
    before = _Before(Path(out))
    entry = {"model": os.fspath(expert), "parameters": before.parameters(dict(parameters or {}))}
    models = before.recipe["models"]
    whole = parse_recipe(before.recipe | {"models": [*models, entry]})
    with _GoingOn(before, entry, whole, len(models), Options.of(**before.options, **options)) as job:
        return job.run(Path(new), progress or Silent())


def remove(
    out: str | os.PathLike,
    expert: str | os.PathLike,
    new: str | os.PathLike,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Take an expert out of the finished merge `out` again: within rounding the merge of the others. The
    sums have lost what rounding took when it was added: an error of an ulp of the largest P_t d_t.
    Arguments as of `add`; expert: as the recipe names it."""
    before = _Before(Path(out))
    models = before.recipe["models"]
    found = [t for t, model in enumerate(models) if _same(_name(model["model"]), os.fspath(expert))]
    if len(found) != 1 or len(models) < 2:
        listed = ", ".join(_name(model["model"]) for model in models)
        why = "is its only expert" if len(models) < 2 else f"is not one expert of it: {listed}"
        raise InputError(f"{out}: {os.fspath(expert)} {why}")
    (place,) = found
    whole = parse_recipe(before.recipe | {"models": models[:place] + models[place + 1 :]})
    with _GoingOn(before, models[place], whole, place, Options.of(**before.options, **options), True) as job:
        return job.run(Path(new), progress or Silent())


def _name(model: Any) -> str:
    return model if isinstance(model, str) else str(model["model"])


def _same(one: str, other: str) -> bool:
    return one == other or os.path.realpath(os.path.expanduser(one)) == os.path.realpath(
        os.path.expanduser(other)
    )


class _Before:
    """A finished merge that kept its sums. recipe: as a mapping; report: what it says of itself; options:
    those that its bytes depend on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.report = folder, published_report(folder)
        if "sums" not in self.report or not (folder / SUMS).is_dir():
            raise InputError(
                f"{folder}: is no merge that can go on: merge it with `keep_sums: true` of the method `ota`"
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


class _GoingOn(Job):
    """A merge of one expert on top of the sums of others. whole: the recipe of all experts; place: the
    expert's among them; removes: it is taken out."""

    def __init__(
        self,
        before: _Before,
        entry: dict[str, Any],
        whole: Recipe,
        place: int,
        options: Options,
        removes: bool = False,
    ) -> None:
        self._before, self._whole, self._place, self._removes = before, whole, place, removes
        self._sums = Checkpoint.open(before.folder / SUMS, f"the sums of {before.folder}")
        try:
            super().__init__(parse_recipe(before.recipe | {"models": [entry]}), options, RULES)
        except BaseException:
            self._sums.close()
            raise

    def _prepare(self) -> None:
        super()._prepare()
        where, said = self._before.folder, self._before.report["sums"]
        for entry in self.inputs.entries:
            for plane in PLANES if entry.is_computed else ():
                info = self._sums.tensors.get(f"{plane}/{entry.name}")
                wanted = plane_type(entry.dtype), entry.shape
                if info is None or (info.dtype, tuple(info.shape)) != wanted:
                    raise InputError(
                        f"{where}: has no sums of {entry.name} as {wanted[0].name}{list(entry.shape)}"
                    )
        differing = sorted({*uniform_tensors(self.inputs.entries)}.symmetric_difference(said["uniform"]))
        if differing:
            raise InputError(
                f"{differing[0]} has curvature in some experts only, which changes how all are merged: merge "
                "all of them from the start"
            )
        for probe in base_probes(self.tensors.values()):
            if probe not in said["base"]:
                raise InputError(
                    f"{self.recipe.base_model} is not the base of {where}: {probe[0]} is another; bring "
                    "back the base that its recipe names"
                )

    @property
    def _earlier(self) -> Earlier:
        return Earlier(self._sums, len(self._whole.models), self._removes)

    def _digest(self, *more: Any) -> str:
        parts = (self._whole.as_dict(), self._removes, self._place, self._sums.fingerprint())
        return super()._digest(*parts, *more)

    def assets(self) -> list[Asset]:
        own = recipe_asset(self._whole.as_dict())
        return [own if asset.name == own.name else asset for asset in super().assets()]

    def _sources(self) -> dict[str, Path]:
        return super()._sources() | {str(self._before.folder): self._before.folder}

    def _files(self) -> list[Path]:
        return [*super()._files(), *self._sums.files]

    def _completed(self, report: dict[str, Any]) -> dict[str, Any]:
        own = super()._completed(report) | {"notes": self.notes}
        return _together(self._before.report, own, self._place, self._removes)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._sums.close()


def _together(before: dict[str, Any], report: dict[str, Any], place: int, removes: bool) -> dict[str, Any]:
    """The report of one expert's merge, with what the earlier one says of the others."""

    def whole(old: list, new: list) -> list:
        return old[:place] + old[place + 1 :] if removes else old + new

    tensors = {}
    for name, found in report["tensors"].items():
        old = before["tensors"][name]
        tensors[name] = found | {key: whole(old[key], found[key]) for key in ("kept", "thresholds")}
    both = {key: whole(before["found"][key], report["found"][key]) for key in ("thresholds", "mean_weights")}
    return report | {
        "experts": whole(before["experts"], report["experts"]),
        "tensors": tensors,
        "found": report["found"] | both | {"scale": None},  # of the edit of all, which nobody has sampled
        "lambda": None,
    }
