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

from ..errors import InputError
from ..io.assets import Asset, recipe_asset
from ..io.reader import Checkpoint
from ..recipe.recipe import Recipe
from ..recipe.schema import parse_recipe
from .going_on import Before, together
from .job import Job
from .one_by_one import OneByOne
from .options import Options, Progress, Silent
from .rules import RULES
from .sums_writing import PLANES, SUMS, Earlier, base_probes, plane_type, uniform_tensors


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

    A merge by `opcm` keeps no sums: run/one_by_one.py.

    parameters: the expert's own, by the recipe's keys; those that all others share are taken over. options
    and errors as of `merge`. Returns the report.
    """
    before = Before(Path(out))
    entry = {"model": os.fspath(expert), "parameters": before.parameters(dict(parameters or {}))}
    models = before.recipe["models"]
    whole = parse_recipe(before.recipe | {"models": [*models, entry]})
    if before.one_by_one:
        with OneByOne(before, entry, whole, Options.of(**before.options, **options)) as job:
            return job.run(Path(new), progress or Silent())
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
    before = Before(Path(out))
    if before.one_by_one:
        raise InputError(f"{out}: opcm adds what the others left over: merge them from the start")
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


class _GoingOn(Job):
    """A merge of one expert on top of the sums of others. whole: the recipe of all experts; place: the
    expert's among them; removes: it is taken out."""

    def __init__(
        self,
        before: Before,
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
        both = together(self._before.report, own, self._place, self._removes)
        # Of the edit of all, which nobody has sampled.
        return both | {"found": both["found"] | {"scale": None}, "lambda": None}

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._sums.close()
