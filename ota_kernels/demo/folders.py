"""The demo's folders: checkpoints with curvature beside them, recipes that merge them, and their reuse."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..recipe.advised import ADVISED
from . import digits
from .digits import EXPERTS, Mlp, Settings

WEIGHTS = "model.safetensors"
CURVATURE = "exp_avg_sq.safetensors"
_MARKER = "demo.json"

# Recipe file -> what it adds to the models. OTA's curvature is Adam's, FFG is OTA with a selection.
RECIPES: dict[str, dict] = {
    "linear": {"merge_method": "linear"},
    "ota": {"merge_method": "ota"},
    "ota_ffg_density": {"merge_method": "ota", "parameters": {"density": 0.2}},
    "ota_ffg_mass": {"merge_method": "ota", "parameters": {"saliency_mass": 0.9}},
    "advised": {"merge_method": "ota", "parameters": ADVISED},
    "advised_one": {"merge_method": "ota", "parameters": ADVISED | {"lambda": 1}},
}


def expert_folder(folder: Path, view: str) -> Path:
    """Where one seed's expert of `view` lies."""
    return folder / f"expert_{view}"


def prepare(folder: Path, settings: Settings) -> bool:
    """Make one seed's base, experts and recipes in `folder`; returns whether it had to train.

    A folder that an earlier run finished with the same settings is kept as it is.
    """
    reused = _is_trained(folder, settings)
    if not reused:
        _train(folder, settings)
    for name, recipe in RECIPES.items():
        _write_recipe(folder, name, recipe)
    return not reused


def load_model(folder: Path) -> Mlp:
    """The model of a checkpoint folder that the demo or a merge wrote."""
    model = Mlp(tuple(json.loads((folder / "config.json").read_text())["widths"]))
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model


def _is_trained(folder: Path, settings: Settings) -> bool:
    experts = [expert_folder(folder, view) for view in EXPERTS]
    files = [f / name for f in [folder / "base", *experts] for name in ("config.json", WEIGHTS)]
    files += [f / CURVATURE for f in experts]
    marker = folder / _MARKER
    return all(f.is_file() for f in [marker, *files]) and marker.read_text() == _marker_text(settings)


def _marker_text(settings: Settings) -> str:
    return json.dumps(asdict(settings), indent=2) + "\n"


def _train(folder: Path, settings: Settings) -> None:
    # The marker is the last thing written and the first removed, so that an interrupted run is not reused.
    (folder / _MARKER).unlink(missing_ok=True)
    training, _ = digits.split(settings)
    base = digits.train_base(settings, training)
    _save_model(folder / "base", base, settings)
    for view in EXPERTS:
        expert, exp_avg_sq = digits.train_expert(settings, base, training, view)
        _save_model(expert_folder(folder, view), expert, settings)
        _save_curvature(expert_folder(folder, view), exp_avg_sq, settings)
    (folder / _MARKER).write_text(_marker_text(settings))


def _save_model(folder: Path, model: Mlp, settings: Settings) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "digits_mlp", "widths": settings.widths, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(model.state_dict(), folder / WEIGHTS, metadata={"format": "pt"})


def _save_curvature(folder: Path, exp_avg_sq: dict[str, Tensor], settings: Settings) -> None:
    metadata = {"format": "pt", "step": str(settings.expert_steps), "beta2": str(digits.BETA2)}
    save_file(exp_avg_sq, folder / CURVATURE, metadata=metadata)


def _write_recipe(folder: Path, name: str, recipe: dict) -> None:
    models: list[dict] = [{"model": str(expert_folder(folder, view).resolve())} for view in EXPERTS]
    head = {"merge_method": recipe["merge_method"]}
    if recipe["merge_method"] == "ota":
        head["base_model"] = str((folder / "base").resolve())
        for model in models:
            model["parameters"] = {"preconditioner_path": str(Path(model["model"]) / CURVATURE)}
    text = yaml.safe_dump({**head, "models": models, **recipe}, sort_keys=False)
    (folder / f"{name}.yaml").write_text(text)
