"""Every method of mergekit 0.1.5 beside this package, on the same files: elements compared, elements apart.

    tools/setup_mergekit.sh
    python -m bench.agreement [--markdown] [--only METHOD] [--folder FOLDER]

float64 of float32 files says whether both compute the same formula. float32, of these files and of bfloat16
files (whose differences are often equal), is what a user compares. In bfloat16 both are compared with the
float64 value of the formula: of this package, which the first column has compared. Elements whose choice is
left open are counted apart: those whose score equals a threshold, and those whose election sums to rounding.
Of random methods the share of elements that moved, and the length of the merged edit, are compared.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import ota_kernels

from .mergekit import Case, load, merge_all, small_models
from .output import print_table

Model = dict[str, torch.Tensor]
_EXPERTS = 3
_OF_ONE = {"experts": 1}
_WEIGHTS = {"weight": [0.5, 0.3, 1.0]}
_FLOAT32_UNITS = 8  # of a tensor's largest value
_NEAR = 1e-5  # relative: a score this near to its threshold, a sum this near to zero
_DEVIATIONS = 6  # of a count of draws

# How far float64 may be apart, as a share of a tensor's largest value: mergekit takes rho in float32.
_FLOAT64_SHARE = {"ramplus_tl": 1e-6}
# Why its float32 values are further from the formula than rounding; ours are compared with that too.
_NOISE = {
    "arcee_fusion": "its KL of near-equal rows is float32 rounding, and decides",
    "nuslerp": "its cosine of near-equal models is float32: the angle is noise",
    "multislerp": "its tangent average, zero but for rounding, is added",
    "karcher": "its angles of near-equal models are float32 noise",
}

CASES = (
    Case("linear", own=_WEIGHTS, base=""),
    Case("linear", {"normalize": False}, {"weight": [0.5, -0.3, 1.0]}, base=""),
    Case("passthrough", own={"scale": 0.3}, base="", **_OF_ONE),
    Case("task_arithmetic", {"lambda": 0.8}, {"weight": [0.5, -0.3, 1.0]}),
    Case("task_arithmetic", {"normalize": True}, _WEIGHTS),
    Case("ties", own=_WEIGHTS | {"density": 0.4}),
    Case("ties", {"normalize": False}, {"weight": [1.0, -0.7, 0.4], "density": [0.9, 0.2, 0.5]}),
    Case("ties", {"rescale": True, "lambda": 0.7}, _WEIGHTS | {"density": 0.4}),
    Case("ties", own={"weight": 1.0, "density": [1.0, 0.0, 0.3]}),
    Case("breadcrumbs", own=_WEIGHTS | {"density": 0.6, "gamma": 0.05}),
    Case("breadcrumbs", {"normalize": True}, _WEIGHTS | {"density": 0.95, "gamma": 0.2}),
    Case("breadcrumbs_ties", own=_WEIGHTS | {"density": 0.5}),
    Case("breadcrumbs_ties", {"rescale": True}, _WEIGHTS | {"density": 0.3, "gamma": 0.1}),
    Case("sce"),
    Case("sce", {"select_topk": 0.3}),
    Case("ram", {"epsilon": 3e-4}),
    Case("ramplus_tl", {"epsilon": 3e-4}),
    Case("ramplus_tl", {"epsilon": 3e-4, "r": 0.5, "alpha": 2.0}),
    Case("nearswap", {"t": 3e-4}, **_OF_ONE),
    Case("arcee_fusion", **_OF_ONE),
    Case("slerp", {"t": 0.3}, **_OF_ONE),
    Case("nuslerp", own={"weight": [0.3, 0.9]}, experts=2),
    Case("nuslerp", own={"weight": [0.3, 0.9]}, experts=2, base=""),
    Case("nuslerp", {"nuslerp_flatten": False}, {"weight": [0.3, 0.9]}, experts=2),
    Case("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, {"weight": [0.3, 0.9]}, experts=2),
    Case("multislerp", own=_WEIGHTS),
    Case("multislerp", {"normalize_weights": False}, _WEIGHTS, base=""),
    Case("karcher", base=""),
    Case("karcher", {"max_iter": 100, "tol": 1e-9}, experts=2, base=""),
    Case("model_stock"),
    Case("model_stock", {"filter_wise": True}),
    Case("dare_linear", own={"weight": 1.0, "density": 0.4}, drawn=True, **_OF_ONE),
    Case("dare_linear", {"rescale": False}, {"weight": 0.5, "density": 0.3}, drawn=True),
    Case("dare_ties", own=_WEIGHTS | {"density": 0.4}, drawn=True),
    Case("della", own=_WEIGHTS | {"density": 0.5, "epsilon": 0.2}, drawn=True),
    Case("della_linear", own={"weight": 1.0, "density": 0.4, "epsilon": 0.1}, drawn=True, **_OF_ONE),
)


class Apart(NamedTuple):
    """elements: compared; open: of those, whose choice is left open; apart: beyond the bound, and not open;
    worst: the largest difference of those, over its tensor's largest value."""

    elements: int = 0
    open: int = 0
    apart: int = 0
    worst: float = 0.0

    def __add__(self, other: Apart) -> Apart:
        counts = (a + b for a, b in zip(self[:3], other[:3], strict=True))
        return Apart(*counts, max(self.worst, other.worst))

    @property
    def text(self) -> str:
        return f"{self.apart}" + (f" (+ {self.open} open)" if self.open else "")


Bound = Callable[[torch.Tensor, torch.Tensor], Any]  # from expected values and the largest input of each


def compared(
    found: Model, expected: Model, bound: Bound, undecided: Model | None, models: list[Model]
) -> Apart:
    """Elements of `found` that are further from `expected` than the bound. undecided: None where nothing
    is."""
    assert found.keys() == expected.keys(), "they wrote different tensors"
    total = Apart()
    for name, want in expected.items():
        error = (found[name] - want).abs()
        is_open = torch.zeros_like(error, dtype=torch.bool) if undecided is None else undecided[name]
        inputs = torch.stack([model[name].abs() for model in models]).max(0).values
        wrong = ~(error <= bound(want, inputs))
        apart = wrong & ~is_open
        scale = float(want.abs().max()) or 1.0
        worst = float(error[~is_open].max()) / scale if bool((~is_open).any()) else 0.0
        total += Apart(want.numel(), int((wrong & is_open).sum()), int(apart.sum()), worst)
    return total


def _float32_units(want: torch.Tensor, inputs: torch.Tensor) -> Any:
    return _FLOAT32_UNITS * float(want.abs().max()) * 2.0**-23


def _one_unit(bits: int) -> Bound:
    """One unit of a type, and what T + 4 float32 operations on the inputs round."""

    def bound(want: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        _, exponent = torch.frexp(want)
        unit = torch.ldexp(torch.ones_like(want), exponent - bits)
        return unit + (_EXPERTS + 4) * 2.0**-24 * inputs if bits < 24 else unit

    return bound


# What is left open


def undecided(case: Case, models: list[Model]) -> Model:
    """Elements whose choice is left open, bool of each tensor. models: the base first."""
    return {name: _undecided(case, [m[name] for m in models]) for name in models[0]}


def _undecided(case: Case, tensors: list[torch.Tensor]) -> torch.Tensor:
    base, *experts = tensors
    edits = [w - base for w in experts[: case.experts]]
    found = torch.zeros(base.shape, dtype=torch.bool)
    for scores, places in _places(case, edits):
        ordered = scores.flatten().sort(descending=True).values
        for place in places:
            if 0 <= place < len(ordered):
                # One more than the k kept: a band between them that rounding may cross.
                for at in ordered[max(place - 1, 0) : place + 1]:
                    found |= (scores - at).abs() <= _NEAR * at
    if "ties" in case.method or case.method in ("sce", "della"):
        votes = [w * d for w, d in zip(_weights(case), edits, strict=True)]
        # Which experts take part is not known here: any subset of them may cancel.
        total, size = sum(votes), sum(v.abs() for v in votes)
        found |= total.abs() <= _NEAR * size
        for one in votes:
            found |= (total - one).abs() <= _NEAR * size
    return found


def _weights(case: Case) -> list[float]:
    return [case.of_expert(t).get("weight", 1.0) for t in range(case.experts)]


def _places(case: Case, edits: list[torch.Tensor]) -> list[tuple[torch.Tensor, list[int]]]:
    """Scores, and the places in their descending order between which a selection divides them."""
    n, found = edits[0].numel(), []
    if case.method == "ties":
        for t, d in enumerate(edits):
            found.append((d.abs(), [max(1, int(case.of_expert(t)["density"] * n))]))
    if case.method.startswith("breadcrumbs"):
        for t, d in enumerate(edits):
            own = {"gamma": 0.01} | case.of_expert(t)
            top, kept = int(own["gamma"] * n), int(own["density"] * n)
            low = max(0, n - kept - top)
            found.append((d.abs(), [n - low - kept, n - low]))
    if case.method == "sce" and "select_topk" in case.shared:
        spread = torch.stack(edits).var(0, unbiased=False)
        found.append((spread, [int(case.shared["select_topk"] * int((spread != 0).sum()))]))
    return found


# The runs


def _ours(recipe: dict[str, Any], folder: Path) -> Model:
    ota_kernels.merge(recipe, folder, overwrite=True)
    return load(folder)


def _runs(stored: Path, wide: Path) -> dict[str, tuple[Path, str]]:
    """The recipes of one case: files and dtype."""
    return {
        "float64": (wide, "float64"),
        "float32": (wide, "float32"),
        "of bfloat16": (stored, "float32"),
        "bfloat16": (stored, "bfloat16"),
    }


class Row(NamedTuple):
    """One case. float64, float32, of_bfloat16: theirs against ours; ours32, ours, theirs: float32 and
    bfloat16 against float64 of the formula."""

    case: Case
    float64: Apart
    float32: Apart
    of_bfloat16: Apart
    ours32: Apart
    ours: Apart
    theirs: Apart

    @property
    def why(self) -> str:
        """Why theirs are apart in float32."""
        apart = self.float32.apart or self.of_bfloat16.apart
        return _NOISE.get(self.case.method, "?") if apart else ""

    @property
    def wrong(self) -> bool:
        """Whether the formula differs, ours are not its values, or theirs are apart and nobody knows why."""
        return bool(self.float64.apart or self.ours32.apart or self.ours.apart or self.why == "?")

    @property
    def cells(self) -> list[str]:
        share = self.theirs.apart / max(self.theirs.elements - self.theirs.open, 1)
        return [self.case.label, str(self.float64.elements), f"{self.float64.worst:.0e}", self.float32.text,
                self.of_bfloat16.text, str(self.ours32.apart + self.ours.apart), f"{100 * share:.2g} %",
                self.why]  # fmt: skip


HEADER = ("method", "elements", "float64: largest", "float32 apart", "of bfloat16 files", "ours off",
          "theirs off, bfloat16", "why apart")  # fmt: skip


def _row(case: Case, theirs: dict[str, Model], folders: tuple[Path, Path], scratch: Path) -> Row:
    stored, wide = folders
    inputs = {files: [load(files / name) for name in _names()] for files in folders}
    is_open = {files: undecided(case, models) for files, models in inputs.items()}
    runs = _runs(*folders)
    found = {run: _ours(case.recipe(files, dtype), scratch) for run, (files, dtype) in runs.items()}
    exact = _ours(case.recipe(stored, "float64"), scratch)
    share = _FLOAT64_SHARE.get(case.method, 1e-9)

    def beside(run: str, bound: Bound) -> Apart:
        files = runs[run][0]
        return compared(theirs[run], found[run], bound, is_open[files], inputs[files])

    return Row(
        case,
        beside("float64", lambda want, _: share * want.abs().max()),
        beside("float32", _float32_units),
        beside("of bfloat16", _float32_units),
        compared(found["float32"], found["float64"], _one_unit(24), None, inputs[wide]),
        compared(found["bfloat16"], exact, _one_unit(8), None, inputs[stored]),
        compared(theirs["bfloat16"], exact, _one_unit(8), is_open[stored], inputs[stored]),
    )


def _names() -> list[str]:
    return ["base", *(f"expert_{t}" for t in range(_EXPERTS))]


class Draws(NamedTuple):
    """One random case. moved: share of elements that differ from the base, ours and theirs; length: of the
    merged edit (sum of magnitudes, over that of all edits); deviation: of a share, by chance alone."""

    label: str
    elements: int
    moved: tuple[float, float]
    length: tuple[float, float]
    deviation: float

    @property
    def apart(self) -> bool:
        return any(
            abs(a - b) > _DEVIATIONS * self.deviation * max(1, a) for a, b in (self.moved, self.length)
        )

    @property
    def cells(self) -> list[str]:
        pairs = [f"{x:.4f}" for x in (*self.moved, *self.length)]
        return [self.label, str(self.elements), *pairs, f"{self.deviation:.0e}"]


DRAWN = ("method", "elements", "moved, ours", "theirs", "length, ours", "theirs", "by chance")


def _draws(case: Case, theirs: Model, wide: Path, scratch: Path) -> Draws:
    base, *experts = (load(wide / name) for name in _names())
    ours = _ours(case.recipe(wide, "float32"), scratch)
    elements = sum(w.numel() for w in base.values())
    size = sum(float((m[n] - w).abs().sum()) for m in experts[: case.experts] for n, w in base.items())

    def of(model: Model) -> tuple[float, float]:
        moved = sum(int((model[n] != w).sum()) for n, w in base.items())
        return moved / elements, sum(float((model[n] - w).abs().sum()) for n, w in base.items()) / size

    moved, length = zip(of(ours), of(theirs), strict=True)
    return Draws(case.label, elements, moved, length, (0.5 / elements) ** 0.5)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", action="store_true", help="tables as RESULTS.md has them")
    parser.add_argument("--only", help="one method")
    parser.add_argument("--folder", type=Path, help="where models and mergekit's results stay, and are found")
    args = parser.parse_args()
    cases = [case for case in CASES if args.only in (None, case.method)]
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        stored, wide = small_models(folder, _EXPERTS)
        recipes = {
            f"{i}-{run.replace(' ', '-')}": case.recipe(files, dtype)
            for i, case in enumerate(cases)
            for run, (files, dtype) in _runs(stored, wide).items()
            if not case.drawn or run == "float32"
        }
        folders = merge_all(recipes, folder / "theirs")
        rows, draws = [], []
        for i, case in enumerate(cases):
            own = {run: folders.get(f"{i}-{run.replace(' ', '-')}") for run in _runs(stored, wide)}
            theirs = {run: load(path) for run, path in own.items() if path is not None}
            if case.drawn:
                draws.append(_draws(case, theirs["float32"], wide, folder / "ours"))
            else:
                rows.append(_row(case, theirs, (stored, wide), folder / "ours"))
            print(case.label, file=sys.stderr)
    show = _markdown if args.markdown else print_table
    show(HEADER, [row.cells for row in rows])
    print()
    show(DRAWN, [row.cells for row in draws])
    wrong = [row.case.label for row in rows if row.wrong]
    wrong += [d.label for d in draws if d.apart]
    print("\n" + (f"apart beyond the bounds: {'; '.join(wrong)}" if wrong else "all within the bounds"))
    return bool(wrong)


def _markdown(header: tuple[str, ...], rows: list[list[str]]) -> None:
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    sys.exit(main())
