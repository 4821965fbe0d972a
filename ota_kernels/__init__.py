"""Merge fine-tuned models at memory speed: OTA merging with Fast Fisher Grafting (arXiv 2509.11167).

merge(recipe, out)               the whole job, from a YAML recipe to a folder
sweep(recipe, out, values)       K merges that differ in parameters, with one read of the inputs
plan(recipe)                     what it would read, write and hold in memory
densities(recipe)                what each density would keep of each expert, and where
merge_state_dicts(base, experts) dictionaries of tensors
merge_tensors(base, experts)     one tensor
Merger(base, experts)             the same models merged again and again, as a search does
merge_into(model, base, experts)  into a live model's parameters
graft(base, expert, curvature)   one expert's most salient edits on the base: tensors or dictionaries
method(name, ...)                a merge method of one's own: words, or a function of torch tensors
topk_threshold(score, k)         the exact k-th largest score of an array
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import BackendError, InputError, OtaError, OutputError, RecipeError, RunError

if TYPE_CHECKING:
    from .api import graft, merge_into, merge_state_dicts, merge_tensors
    from .merger import Merger
    from .recipe.own import method
    from .run.files import merge_files
    from .run.grid.densities import densities
    from .run.job import merge, plan
    from .run.sweep import sweep
    from .topk import topk_threshold

# As in pyproject.toml. To ask the installed package takes as long as `ota-merge --help` does.
__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "InputError",
    "Merger",
    "OtaError",
    "OutputError",
    "RecipeError",
    "RunError",
    "densities",
    "graft",
    "merge",
    "merge_files",
    "merge_into",
    "merge_state_dicts",
    "merge_tensors",
    "method",
    "plan",
    "sweep",
    "topk_threshold",
]

_LAZY = {
    "merge": "run.job",
    "plan": "run.job",
    "sweep": "run.sweep",
    "merge_files": "run.files",
    "densities": "run.grid.densities",
    "merge_tensors": "api",
    "merge_state_dicts": "api",
    "merge_into": "api",
    "graft": "api",
    "method": "recipe.own",
    "Merger": "merger",
    "topk_threshold": "topk",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
