"""Merge fine-tuned models at memory speed: OTA merging with Fast Fisher Grafting (arXiv 2509.11167).

merge(recipe, out)               the whole job, from a YAML recipe to a folder
plan(recipe)                     what it would read, write and hold in memory
densities(recipe)                what each density would keep of each expert, and where
merge_state_dicts(base, experts) dictionaries of tensors
merge_tensors(base, experts)     one tensor
"""

from __future__ import annotations

from importlib.metadata import version as _version
from typing import TYPE_CHECKING

from .errors import BackendError, InputError, OtaError, OutputError, RecipeError, RunError

if TYPE_CHECKING:
    from .density_grid import densities
    from .functional import merge_state_dicts, merge_tensors
    from .job import merge, plan

__version__ = _version("ota-kernels")

__all__ = [
    "BackendError",
    "InputError",
    "OtaError",
    "OutputError",
    "RecipeError",
    "RunError",
    "densities",
    "merge",
    "merge_state_dicts",
    "merge_tensors",
    "plan",
]

_LAZY = {
    "merge": "job",
    "plan": "job",
    "densities": "density_grid",
    "merge_tensors": "functional",
    "merge_state_dicts": "functional",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
