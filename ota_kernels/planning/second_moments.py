"""Which curvature of a file belongs to a tensor of an expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError
from ..recipe.recipe import ModelEntry
from ..tensors.curvature import Curvature, Rank1
from .models import Moments


def moments_key(entry: ModelEntry) -> tuple[int, str]:
    """What an entry's second moments are known by."""
    return entry.number, entry.parameters.get("preconditioner_path", "")


def curvature_of(
    file: Moments | None,
    names: Sequence[str],
    shape: tuple[int, ...],
    bias_correction: bool,
    parameters: Mapping[str, Any],
) -> Curvature | None:
    """None without. names: under which the file may know the tensor: its own, or that of the embeddings it is
    tied to; parameters: the expert's own."""
    for name in names if file is not None else ():
        found = file.held(name, bias_correction)
        if found is None:
            continue
        if found.shape != shape:
            raise InputError(f"{file.what(name)} has shape {list(found.shape)}, the tensor {list(shape)}")
        if parameters.get("rank") and isinstance(found.curvature, Rank1):
            raise InputError(
                f"{file.what(name)} is row and column sums, which have rank 1: leave out `rank`, or give a "
                "file of all second moments"
            )
        return found.curvature
    return None
