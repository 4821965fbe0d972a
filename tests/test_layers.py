"""Who imports whom: file code knows no torch, kernels know no files, and a merge on a CPU starts light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import make_set, write_recipe

import ota_kernels

PACKAGE = Path(ota_kernels.__file__).parent
HEAVY = {"torch", "triton", "transformers", "sklearn"}


def loaded(code: str, *arguments) -> set[str]:
    """Top-level names of the modules that a fresh interpreter holds after `code`."""
    script = f"import json, sys\n{code}\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Absolute names of what a module imports; everywhere: also within functions."""
    tree = ast.parse(path.read_text())
    parts = ("ota_kernels", *path.relative_to(PACKAGE).with_suffix("").parts)
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = [*parts[: -node.level], node.module] if node.level else [node.module]
            origin = ".".join(part for part in origin if part)
            found |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
    return found


def modules(folder: str) -> list[Path]:
    return sorted((PACKAGE / folder).rglob("*.py"))


# Which rooms a room may import, besides itself; `errors` and `sizes` are everybody's. Arrows point down.
MAY_IMPORT = {
    "tensors": set(),
    "spectral": set(),
    "recipe": {"spectral", "tensors"},
    "io": {"tensors"},
    "backends": {"io", "tensors"},
    "select": {"backends", "io", "tensors"},
    "planning": {"recipe", "backends", "io", "tensors"},
    "run": {"planning", "spectral", "recipe", "select", "backends", "io", "tensors"},
}
EVERYBODYS = {"errors", "sizes", "processors", "__version__", "_native"}
EXCEPTIONS = {"io": {"moments"}}  # whether a torch file's states are Adam's is known there


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_arrows_point_down(room):
    found = set()
    for path in modules(room):
        for name in imports(path):
            if name.startswith("ota_kernels."):
                found.add(name.split(".")[1])
    allowed = MAY_IMPORT[room] | EVERYBODYS | {room} | EXCEPTIONS.get(room, set())
    assert found - allowed == set()


# Imported only where a torch file is read.
TORCH_FILES = ("inert",)


@pytest.mark.parametrize(
    "path", [p for p in modules("io") if p.stem not in TORCH_FILES], ids=lambda p: p.stem
)
def test_io_knows_files_only(path):
    top = {name.split(".")[0] for name in imports(path, everywhere=False)}
    assert not top & {"torch", "triton", "click", "rich"}


@pytest.mark.parametrize(
    "path", [*modules("select"), PACKAGE / "run" / "engine.py"], ids=lambda path: path.stem
)
def test_the_engine_knows_neither_files_nor_the_command_line(path):
    found = imports(path)
    assert not {n for n in found if n.startswith(("ota_kernels.cli", "ota_kernels.run.job"))}
    assert not {n.split(".")[0] for n in found} & {"click", "rich", "safetensors", "torch"}


def test_only_the_command_line_imports_click_and_rich():
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in modules("")
        if {name.split(".")[0] for name in imports(path)} & {"click", "rich"}
    }
    assert users <= {"cli", "demo"}


def test_importing_the_package_is_light():
    found = loaded("import ota_kernels")
    assert not found & (HEAVY | {"numpy", "yaml", "click"})


def test_importing_every_file_module_is_light():
    names = ", ".join(
        f"ota_kernels.io.{path.stem}" for path in modules("io") if path.stem not in ("__init__", *TORCH_FILES)
    )
    assert not loaded(f"import {names}") & HEAVY


def test_help_is_light():
    code = "from ota_kernels.cli import main\nsys.argv[1:] = ['--help']\ntry: main()\nexcept SystemExit: pass"
    assert not loaded(code) & (HEAVY | {"numpy", "yaml"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "parameters",
    [
        {"precond_threshold": 1e-16},
        {"density": 0.3, "normalise": "model"},
        {"saliency_mass": 0.9, "density_scope": "tensor", "rank1_approx": True},
        {"masked_task_vector_merge_method": "ties", "ties_density": 0.5, "rank": 2, "rescale": True},
    ],
    ids=str,
)
def test_a_native_merge_never_imports_torch(tmp_path, dtype, parameters):
    models = make_set(tmp_path / "models", {"embed_tokens.weight": (20, 8), "w": (9, 7)}, dtype=dtype)
    recipe = write_recipe(tmp_path / "recipe.yaml", models.recipe(**parameters))
    code = "from ota_kernels.cli import main\nsys.argv[1:] = ['run', '-q', *sys.argv[1:]]\nmain()"
    assert not loaded(code, recipe, tmp_path / "out") & HEAVY
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_reference_backend_is_seen_to_import_torch():
    """What the tests above would show."""
    assert "torch" in loaded("from ota_kernels.backends import select\nselect('reference')")
