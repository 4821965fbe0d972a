"""What is merged, and how: recipes run by `ota-merge`, scored on held-out texts; scores stay in the cache."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ota_kernels.io.header import read_header
from ota_kernels.recipe import methods
from ota_kernels.recipe.advised import ADVISED
from ota_kernels.recipe.parameters import REQUIRED

from .command import ota_merge
from .encoder import Encoder
from .experts import MOMENTS
from .tasks import Task

TIMES = (
    0.5,
    0.7,
    1.4,
    2.0,
)  # of the automatic lambda, beside 1; the best on one set is reported on the other
# Forms of packs: label -> options of `ota-merge pack`, and whether it takes the expert's second moments.
PACKS: dict[str, tuple[list[str], bool]] = {
    "ffg .02 exact": (["--density", "0.02"], True),
    "ffg .05 exact": (["--density", "0.05"], True),
    "ffg .05 exact, by magnitude": (["--density", "0.05"], False),
    "ffg .05 signs": (["--density", "0.05", "--values", "sign"], True),
    "ffg .1 signs": (["--density", "0.1", "--values", "sign"], True),
    "compeft .05": (["--form", "compeft", "--density", "0.05"], False),
    "compeft .1": (["--form", "compeft", "--density", "0.1"], False),
    "tswitch .4": (["--form", "tswitch"], False),
    "bitdelta": (["--form", "bitdelta"], False),
    "emr": (["--form", "emr"], False),
}
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.4)  # of grafts


@dataclass(frozen=True)
class Method:
    """One row of the table. moments: the form of second moments; scaled: whether `lambda` has a meaning."""

    label: str
    merge_method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    moments: str = "adam"
    scaled: bool = True


# Of rows whose own default keeps every edit: what their papers use.
_DENSITIES = dict.fromkeys(("ties", "breadcrumbs", "breadcrumbs_ties"), 0.2) | dict.fromkeys(
    ("dare_linear", "dare_ties", "della", "della_linear"), 0.5
)


def _registered() -> Iterator[Method]:
    """Every method of the registry that merges several experts, by its defaults; required weights are 1."""
    for name in methods.names():
        row = methods.get(name)
        if row.most == 1 or name in ("ota", "checkpoints", "passthrough", "slerp", "nuslerp"):
            continue
        parameters: dict[str, Any] = {}
        for parameter in row.parameters:
            if parameter.default is REQUIRED and parameter.key == "weight":
                parameters["weight"] = 1.0
        if name in _DENSITIES:
            parameters["density"] = _DENSITIES[name]
        yield Method(name, name, parameters, scaled="lambda" in row.by_key and row.base == "required")


_FFG = {"saliency_mass": 0.95}
OTA = (
    Method("ota", "ota"),
    Method("ota power 1 normalise model", "ota", {"power": 1.0, "normalise": "model"}),
    Method("ota + ffg .95", "ota", _FFG),
    Method("ota + ffg .95 normalise model", "ota", _FFG | {"normalise": "model"}),
)
NO_TUNING = Method("no tuning (ota-merge recipe)", "ota", {k: v for k, v in ADVISED.items() if k != "lambda"})
# The same recipe by other second moments: of `moments compress`, or squared gradients taken afterwards, as
# `moments estimate` does for language models.
FORMS = tuple(
    Method(f"no tuning ({form})", "ota", NO_TUNING.parameters, form) for form in ("rank1", "log8", "estimate")
)


# Rows of whole matrices with masks, or with the recipe of no tuning where there are none; and the other way.
WHOLE = (
    Method("tsv + ffg .95", "tsv", _FFG),
    Method("tsv elsewhere ota + ffg .99", "tsv", {"elsewhere": "ota", "power": 1.0, "saliency_mass": 0.99}),
    Method("iso_c elsewhere ota", "iso_c", {"elsewhere": "ota", "power": 1.0}),
    Method("no tuning + calibrate svc", "ota", NO_TUNING.parameters | {"calibrate": "svc"}),
)
# What a bench scores before anything else, and what next.
SECOND = ("iso_c", *(method.label for method in (*OTA, *FORMS, *WHOLE)))
FIRST = (NO_TUNING.label, "linear", "task_arithmetic", "ties", "dare_ties", "tsv")


def all_methods() -> tuple[Method, ...]:
    """The rows of the table."""
    found = {method.label: method for method in _registered()}
    first = [found.pop(label) for label in FIRST[1:]]
    return (NO_TUNING, *first, *OTA, *WHOLE, *found.values(), *FORMS)


class Scored(NamedTuple):
    """One merge. right: per task, a character for each held-out text, 1 where it is right; kept: edits kept;
    factor: its lambda as used, None without one; length: ||merged edit|| / mean_t ||d_t||; bits: per
    parameter of a pack."""

    right: dict[str, str]
    kept: float | None = None
    factor: float | None = None
    length: float | None = None
    bits: float | None = None

    def accuracy(self, task: str) -> float:
        return self.right[task].count("1") / len(self.right[task])


class Lab:
    """One set of experts: merges them, scores, and remembers. tasks: name -> held-out texts."""

    def __init__(
        self,
        folder: Path,
        base: Path,
        experts: Mapping[str, Path],
        encoder: Encoder,
        tasks: Mapping[str, Any],
    ) -> None:
        self.base, self.experts, self._encoder, self._tasks = base, experts, encoder, tasks
        self._folder, self.name, self.frozen = folder, folder.name, False
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "scores.jsonl"
        rows = map(json.loads, self._path.read_text().splitlines()) if self._path.exists() else ()
        self.known = {row["key"]: Scored(**row["scored"]) for row in rows}

    def model(self, key: str, folder: Path, tasks: Iterable[str] | None = None) -> Scored | None:
        """A model as it lies."""
        return self._once(key, lambda: self._score(folder, tasks))

    def merge(self, method: Method, **parameters: Any) -> Scored | None:
        """All experts by a method, with these parameters beside its own."""
        key = json.dumps([method.label, parameters], sort_keys=True)
        return self._once(key, lambda: self._run(self.recipe(method, parameters), None))

    def graft(self, task: str, density: float, by: str) -> Scored | None:
        """The base with some edits of one expert, the most salient ("ffg") or largest, scored on its task."""
        own = {"density": density} | (
            {"preconditioner_path": str(self.moments(task, "adam"))} if by == "ffg" else {}
        )
        recipe = {
            "merge_method": "ffg",
            "base_model": str(self.base),
            "models": [{"model": str(self.experts[task]), "parameters": own}],
            "parameters": {} if by == "ffg" else {"missing_curvature": "uniform"},
        }
        return self._once(f"graft {task} {density} {by}", lambda: self._run(recipe, [task]))

    def packed(self, task: str, label: str) -> Scored | None:
        """An expert packed and unpacked again, scored on its task; of `emr` with all others."""
        return self._once(f"pack {task} {label}", lambda: self._unpacked(task, label))

    def merged_packs(self, label: str) -> Scored | None:
        """All experts packed, and merged by task arithmetic with `lambda: auto`; "experts": as they are."""
        return self._once(f"merge of packs {label}", lambda: self._merged_packs(label))

    def _unpacked(self, task: str, label: str) -> Scored:
        place = self._folder / "packing"
        packs, size = self._pack(place, list(self.experts) if label == "emr" else [task], label)
        ota_merge("unpack", packs[task], place / "out", "-q")
        scored = self._score(place / "out", [task])
        shutil.rmtree(place)
        return scored._replace(bits=size)

    def _merged_packs(self, label: str) -> Scored:
        place = self._folder / "packing"
        models, size = dict(self.experts), None
        if label != "experts":
            models, size = self._pack(place, list(self.experts), label)
        recipe = {
            "merge_method": "task_arithmetic",
            "base_model": str(self.base),
            "models": [{"model": str(model), "parameters": {"weight": 1.0}} for model in models.values()],
            "parameters": {"lambda": "auto"},
        }
        scored = self._run(recipe, None)
        shutil.rmtree(place, ignore_errors=True)
        return scored._replace(bits=size)

    def _pack(self, place: Path, tasks: list[str], label: str) -> tuple[dict[str, Path], float]:
        """Packs of these experts in an empty folder `place`, by task; bits per parameter of an expert."""
        options, by_saliency = PACKS[label]
        shutil.rmtree(place, ignore_errors=True)  # of a run that was stopped
        place.mkdir()
        for task in tasks:  # whose names packs have
            (place / task).symlink_to(self.experts[task])
        target, together = place / "packs", label == "emr"
        packs = {task: target / f"{task}.pack" for task in tasks}
        if together:
            experts = [place / task for task in tasks]
            ota_merge("pack", *experts, target, "--base", self.base, "-q", *options)
        else:
            target.mkdir()
            for task in tasks:
                moments = ["--moments", self.moments(task, "adam")] if by_saliency else []
                ota_merge("pack", place / task, packs[task], "--base", self.base, "-q", *options, *moments)
        size = sum(file.stat().st_size for file in target.iterdir()) / len(tasks)
        return packs, 8 * size / self._parameters()

    def _parameters(self) -> int:
        header = read_header(self.base / "model.safetensors")
        return sum(info.numel for info in header.tensors.values())

    def recipe(self, method: Method, parameters: Mapping[str, Any]) -> dict[str, Any]:
        row = methods.get(method.merge_method)
        models = []
        for task, folder in self.experts.items():
            own = {"preconditioner_path": str(self.moments(task, method.moments))} if row.curvature else {}
            models.append({"model": str(folder), **({"parameters": own} if own else {})})
        recipe = {
            "merge_method": method.merge_method,
            "models": models,
            "parameters": {**method.parameters, **parameters},
        }
        return recipe if row.base == "ignored" else recipe | {"base_model": str(self.base)}

    def moments(self, task: str, form: str) -> Path:
        """An expert's second moments in a form, made where they are not there."""
        full = self.experts[task] / MOMENTS
        if form == "adam":
            return full
        path = full.with_name(f"{form}.safetensors")
        if not path.exists():
            if form == "estimate":
                self._encoder.load(self.experts[task])
                self._encoder.save_squared_gradients(task, path)
            else:
                ota_merge("moments", "compress", full, path, "--format", form)
        return path

    def _once(self, key: str, make: Callable[[], Scored]) -> Scored | None:
        """None for what a frozen lab does not know."""
        if key not in self.known and self.frozen:
            return None
        if key not in self.known:
            self.known[key] = make()
            with open(self._path, "a") as file:
                file.write(json.dumps({"key": key, "scored": self.known[key]._asdict()}) + "\n")
        return self.known[key]

    def _run(self, recipe: dict[str, Any], tasks: list[str] | None) -> Scored:
        path, out = self._folder / "recipe.yaml", self._folder / "merged"
        path.write_text(yaml.safe_dump(recipe))
        ota_merge("run", path, out, "--overwrite", "--quiet")
        report = json.loads((out / "merge_report.json").read_text())
        scale = report["lambda"] or {}
        kept = sum(e["kept"] for e in report["experts"]) / sum(e["total"] for e in report["experts"])
        scored = self._score(out, tasks)
        shutil.rmtree(out)
        return scored._replace(kept=kept, factor=scale.get("used"), length=scale.get("length"))

    def _score(self, folder: Path, tasks: Iterable[str] | None) -> Scored:
        self._encoder.load(folder)
        names = self._tasks if tasks is None else tasks
        return Scored({name: self._encoder.right(name, self._tasks[name]) for name in names})


def failed(error: subprocess.CalledProcessError) -> str:
    """Why a merge could not run, for a row that says so."""
    return (error.stderr or "").strip().splitlines()[-1] if error.stderr else f"exit {error.returncode}"


def tasks_of(tasks: Mapping[str, Task], group: str, most: int) -> dict[str, list[tuple[str, int]]]:
    """The held-out texts that a set of experts is scored on."""
    return {name: getattr(task, group)[:most] for name, task in tasks.items()}
