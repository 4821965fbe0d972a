"""What compressed second moments save: size of their files, and time of the merge that reads them.

    python -m bench.rank1 [--forms bf16,rank1] [--runs 5] [--json]

Whole `ota-merge run` processes on the set of `bench.end_to_end`, absolute thresholds, with the same second
moments as float32, bfloat16, log8, and row and column sums (`ota-merge moments compress`). Each form merges
once and its result is checked; then they run in turn, every file read once before each run. A ratio is the
median of the ratios within turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import yaml

from ota_kernels.errors import OtaError

from .data import CURVATURE, DEFAULT_FOLDER, WEIGHTS, llama_set
from .density import digest_of
from .end_to_end import OTA_MERGE, check_merge, in_child, run_process
from .output import RESULTS, print_table, save_json

FORMS = ("bf16", "log8", "rank1")


class Run(NamedTuple):
    """One process. merge_seconds: of it, between opening the files and waiting for the disk."""

    seconds: float
    merge_seconds: float
    peak_bytes: int


def compressed_files(data: Path, form: str) -> list[Path]:
    """Each expert's second moments in this form, beside its others; made unless they are there."""
    from ota_kernels.moments.compress import compress

    sources = sorted(data.glob(f"expert_*/{CURVATURE}"))
    if form == "float32":
        return sources
    files = [source.with_name(f"exp_avg_sq.{form}.safetensors") for source in sources]
    for source, file in zip(sources, files, strict=True):
        if not file.exists():
            compress(source, file, form)
    return files


def recipe_of(data: Path, files: list[Path]) -> dict:
    """The set's recipe of absolute thresholds, with these second moments."""
    recipe = yaml.safe_load((data / "threshold.yaml").read_text())
    for model, file in zip(recipe["models"], files, strict=True):
        model["parameters"]["preconditioner_path"] = str(file.resolve())
    return recipe


def race(data: Path, folder: Path, files: dict[str, list[Path]], runs: int) -> dict[str, list[Run]]:
    """Per form its runs. Raises AssertionError where a merge is not the reference's."""
    recipes = {form: recipe_of(data, paths) for form, paths in files.items()}
    results: dict[str, list[Run]] = {form: [] for form in files}
    for turn in range(1 + runs):
        for form, recipe in recipes.items():
            for path in (*data.glob(f"*/{WEIGHTS}"), *files[form]):
                digest_of(path, lambda part: None)
            with tempfile.TemporaryDirectory(dir=folder, prefix="scratch-") as scratch:
                path, out = Path(scratch) / "recipe.yaml", Path(scratch) / "merged"
                path.write_text(yaml.safe_dump(recipe))
                usage = run_process([OTA_MERGE, "run", "-q", str(path), str(out)])
                if turn == 0:
                    in_child(check_merge, recipe, out)
                    continue
                report = json.loads((out / "merge_report.json").read_text())
                results[form].append(Run(usage.seconds, report["seconds"]["merge"], usage.peak_bytes))
    return results


def _row(form: str, results: dict[str, list[Run]], sizes: dict[str, int]) -> list[str]:
    runs = results[form]
    seconds = [run.seconds for run in runs]
    pairs = list(zip(results["float32"], runs, strict=True))
    return [
        form,
        f"{sizes[form] / 1e6:.1f}",
        f"{sizes['float32'] / sizes[form]:.1f}",
        f"{statistics.median(seconds):.2f}",
        f"{min(seconds):.2f}-{max(seconds):.2f}",
        f"{statistics.median(full.seconds / run.seconds for full, run in pairs):.2f}",
        f"{statistics.median(run.merge_seconds for run in runs):.2f}",
        f"{statistics.median(full.merge_seconds / run.merge_seconds for full, run in pairs):.2f}",
        f"{max(run.peak_bytes for run in runs) / 2**20:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time merges with compressed second moments.")
    parser.add_argument(
        "--data", type=Path, default=DEFAULT_FOLDER, help="where sets are cached [%(default)s]"
    )
    parser.add_argument("--parameters", type=int, default=250_000_000, help="of each model [%(default)s]")
    parser.add_argument(
        "--forms", default=",".join(FORMS), help="that are compared with float32 [%(default)s]"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS / "rank1.json", help="also write JSON")
    arguments = parser.parse_args()
    if arguments.runs < 1:
        parser.error("--runs must be at least 1")
    chosen = ["float32", *arguments.forms.split(",")]
    if unknown := set(chosen[1:]) - set(FORMS):
        parser.error(f"--forms takes {', '.join(FORMS)}, not {min(unknown)!r}")
    try:
        data = in_child(llama_set, arguments.data, arguments.parameters)
        files = {form: in_child(compressed_files, data, form) for form in chosen}
    except OtaError as error:
        sys.exit(f"error: {error}")
    sizes = {form: sum(path.stat().st_size for path in paths) for form, paths in files.items()}
    results = race(data, arguments.data, files, arguments.runs)
    print(f"{data.name}, absolute thresholds, warm page cache")
    header = ("form", "MB", "smaller", "median s", "min-max", "faster", "merge s", "faster", "peak MiB")
    print_table(header, [_row(form, results, sizes) for form in chosen])
    if arguments.json:
        forms = {
            form: {"bytes": sizes[form], "runs": [run._asdict() for run in results[form]]} for form in chosen
        }
        save_json(arguments.json, {"set": data.name, "forms": forms})


if __name__ == "__main__":
    main()
