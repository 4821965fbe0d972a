"""Extract: second moments out of a training checkpoint, into one file that a merge reads."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from ..io.new_file import check_new_file
from ..io.reader import Checkpoint
from .checking import check_source
from .readers import formats
from .source import only
from .writing import write_moments

_MODEL_FILES = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Summary:
    """What was extracted.

    format: the name of `--format` that read it; tensors: parameters with second moments; elements: of them
    all; nbytes: of the file; step, beta2: what all of them share, else None; varying: which of the two differ
    between them; parameters: how many the model has, or the checkpoint knows where there was no model;
    missing: those without second moments, with the reason; extra: names that the model does not have.
    """

    format: str
    tensors: int
    elements: int
    nbytes: int
    step: float | None
    beta2: float | None
    varying: tuple[str, ...]
    parameters: int
    missing: dict[str, str]
    extra: tuple[str, ...]


def extract(
    checkpoint: str | Path,
    out: str | Path,
    model: str | Path | None = None,
    format: str = formats.AUTO,
    overwrite: bool = False,
) -> Summary:
    """Write the second moments of a training checkpoint to one safetensors file.

    checkpoint: a folder or a file; out: ends in .safetensors; model: the folder of the trained model, by
    default the checkpoint's where it holds one. Needs memory for one piece of a tensor.
    Raises InputError for a checkpoint that cannot be read with certainty, does not fit the model, or has
    negative or non-finite moments; OutputError where `out` exists or cannot be written; RecipeError for an
    unknown format. `out` then is as it was.
    """
    path, target = Path(checkpoint), Path(out)
    check_new_file(target, overwrite=overwrite)
    chosen = formats.choose(path, format)
    trained = _open_model(path, model)
    source = chosen.read(path, trained)
    where = f"checkpoint: {path}"
    coverage = check_source(source, trained, where)
    steps = {moment.step for moment in source.moments}
    beta2s = {moment.beta2 for moment in source.moments}
    step, beta2 = only(steps), only(beta2s)
    nbytes = write_moments(source, target, step, beta2, where)
    return Summary(
        format=source.format,
        tensors=len(source.moments),
        elements=sum(math.prod(moment.shape) for moment in source.moments),
        nbytes=nbytes,
        step=step,
        beta2=beta2,
        varying=tuple(name for name, found in (("step", steps), ("beta2", beta2s)) if len(found) > 1),
        parameters=coverage.parameters,
        missing=coverage.missing,
        extra=coverage.extra,
    )


def _open_model(path: Path, model: str | Path | None) -> Checkpoint | None:
    if model is not None:
        return Checkpoint.open(Path(model), "model")
    if any(os.path.isfile(path / name) for name in _MODEL_FILES):
        return Checkpoint.open(path, "model")
    return None
