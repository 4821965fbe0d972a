"""mergekit 0.1.5 as a program beside this one: where it is, and models and recipes for both.

`tools/setup_mergekit.sh` makes its environment. It is run, and nothing of it is imported.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from ota_kernels.errors import BackendError
from ota_kernels.recipe import methods

from .data import WEIGHTS, llama_set

_BIN = Path(__file__).parent.parent / ".venv-mergekit" / "bin"
# Without tokenizer and model card, which no merge of weights depends on.
PLAIN = ("--no-copy-tokenizer", "--no-write-model-card")


def program(name: str) -> str:
    """The path of one of its programs; BackendError where it is not installed."""
    path = _BIN / name
    if not path.exists():
        raise BackendError(f"{path} is missing: run tools/setup_mergekit.sh")
    return str(path)


@dataclass(frozen=True)
class Case:
    """One recipe that both run. own: keys of each expert, a list is one value each; experts: how many; base:
    "base" where it is what edits are taken from, "expert" where it is one more model, "" where there is none;
    drawn: it draws random numbers."""

    method: str
    shared: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)
    experts: int = 3
    base: str = "base"
    drawn: bool = False

    @property
    def label(self) -> str:
        optional = methods.get(self.method).base == "optional"
        keys = {**self.own, **self.shared} | ({} if self.base or not optional else {"base": "none"})
        return self.method + (f" ({', '.join(f'{k}: {_shown(v)}' for k, v in keys.items())})" if keys else "")

    def of_expert(self, t: int) -> dict[str, Any]:
        return {k: v[t] if isinstance(v, list) else v for k, v in self.own.items()}

    def recipe(self, folder: Path, dtype: str) -> dict[str, Any]:
        """Of the models in a folder that `llama_set` made."""
        models = [
            {"model": str(folder / f"expert_{t}"), "parameters": self.of_expert(t)}
            for t in range(self.experts)
        ]
        found: dict[str, Any] = {"merge_method": self.method, "dtype": dtype, "models": models}
        if self.base == "base":
            found["base_model"] = str(folder / "base")
        if self.shared:
            found["parameters"] = dict(self.shared)
        return found


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def in_float32(source: Path, target: Path, seed: int = 0) -> Path:
    """The models of `llama_set` in float32, each weight moved by up to a thousandth of itself: no two
    differences are equal any more."""
    for model in sorted(p for p in source.iterdir() if (p / WEIGHTS).exists()):
        generator = torch.Generator().manual_seed(seed)
        seed += 1
        moved = {
            name: w.float() * (1 + 1e-3 * torch.rand(w.shape, generator=generator))
            for name, w in load_file(model / WEIGHTS).items()
        }
        (target / model.name).mkdir(parents=True, exist_ok=True)
        save_file(moved, target / model.name / WEIGHTS, metadata={"format": "pt"})
        config = (model / "config.json").read_text()
        (target / model.name / "config.json").write_text(config.replace("bfloat16", "float32"))
    return target


def small_models(folder: Path, experts: int) -> tuple[Path, Path]:
    """(bfloat16, float32) sets of 1.5 million parameters a model."""
    stored = llama_set(folder, 1_500_000, experts, hidden=64)
    wide = folder / "float32"
    return stored, wide if wide.exists() else in_float32(stored, wide)


def merge_all(recipes: Mapping[str, dict[str, Any]], folder: Path, seed: int = 1) -> dict[str, Path]:
    """Merge by one mergekit process what is not there yet; the folder of each name. RuntimeError with its
    last lines if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipes.yaml"
    path.write_text(yaml.safe_dump_all([{"name": name, **recipe} for name, recipe in recipes.items()]))
    command = [
        program("mergekit-multi"),
        str(path),
        "-I",
        str(folder),
        "--random-seed",
        str(seed),
        "--quiet",
        "--lazy",
    ]
    done = subprocess.run([*command, *PLAIN], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError("\n".join(done.stderr.strip().splitlines()[-3:]))
    return {name: folder / name for name in recipes}


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a merged folder, in float64."""
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= {name: w.double() for name, w in load_file(file).items()}
    return found
