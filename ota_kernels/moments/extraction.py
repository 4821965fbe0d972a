"""Extract: second moments out of a training checkpoint, into one file that a merge reads."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import InputError
from ..io.new_file import check_new_file
from ..io.reader import Checkpoint
from .checking import check_source
from .readers import formats
from .readers.adapter import is_adapter
from .readers.naming import rename
from .readers.numbered import NAMED
from .readers.request import Request, read_names
from .source import Source, only
from .writing import write_moments

_MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
_ADAPTER_NOTE = (
    "these are of an adapter's matrices, which no merge of full weights can use: `ota-merge moments lift` "
    "makes an estimate for the full matrices of them"
)


@dataclass(frozen=True)
class Summary:
    """What was extracted.

    format: the name of `--format` that read it; tensors: parameters with second moments; elements: of them
    all; nbytes: of the file; step, beta2: what all of them share, else None; varying: which of the two differ
    between them; parameters: how many the model has, or the checkpoint knows where there was no model;
    missing: those without second moments, with the reason; extra: names that the model does not have, left
    out; zeros: those whose second moments are 0 everywhere; notes: what was assumed or converted.
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
    zeros: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def extract(
    checkpoint: str | Path,
    out: str | Path,
    model: str | Path | None = None,
    format: str = formats.AUTO,
    overwrite: bool = False,
    *,
    base: str | Path | None = None,
    names: str | Path | None = None,
    as_adam: bool = False,
    prefix: str = "",
) -> Summary:
    """Write the second moments of a training checkpoint to one safetensors file.

    checkpoint: a folder or a file; out: ends in .safetensors; model: the folder of the trained model, by
    default the checkpoint's where it holds one; base: the folder of the model that it was trained from: of
    states that are keyed by number, parameters that equal its own may have been frozen; names: a file of the
    parameters' names, in the model's order; prefix: what those names of the checkpoint begin with that are
    meant, where it holds several models; as_adam: keys and settings that are unknown are Adam's. Needs
    memory for one piece of a tensor.
    Raises InputError for a checkpoint that cannot be read with certainty, does not fit the model, or has
    negative or non-finite moments; OutputError where `out` exists or cannot be written; RecipeError for an
    unknown format. `out` then is as it was.
    """
    path, target = Path(checkpoint), Path(out)
    check_new_file(target, overwrite=overwrite)
    path, chosen = formats.choose(path, format)
    trained = _open_model(path, model)
    if base is not None and trained is None:
        raise InputError("--base is compared with the model that was trained: add --model with its folder")
    request = Request(
        trained,
        None if base is None else Checkpoint.open(Path(base), "base"),
        () if names is None else read_names(Path(names)),
        as_adam,
    )
    where = f"checkpoint: {path}"
    source = _chosen(chosen.read(path, request), prefix, where)
    if names is not None and NAMED not in source.notes:
        raise InputError(f"{where}: names its parameters itself: --names is for states by number")
    source = renamed(source, trained, where)
    coverage = check_source(source, trained, where)
    if coverage.extra:
        extra = frozenset(coverage.extra)
        source = replace(source, moments=tuple(m for m in source.moments if m.name not in extra))
    steps = {moment.step for moment in source.moments}
    beta2s = {moment.beta2 for moment in source.moments}
    step, beta2 = only(steps), only(beta2s)
    written = write_moments(source, target, step, beta2, where)
    return Summary(
        format=source.format,
        tensors=len(source.moments),
        elements=sum(math.prod(moment.shape) for moment in source.moments),
        nbytes=written.nbytes,
        step=step,
        beta2=beta2,
        varying=tuple(name for name, found in (("step", steps), ("beta2", beta2s)) if len(found) > 1),
        parameters=coverage.parameters,
        missing=coverage.missing,
        extra=coverage.extra,
        zeros=written.zeros,
        notes=(*source.notes, _ADAPTER_NOTE) if is_adapter(names_of(source)) else source.notes,
    )


def _chosen(source: Source, prefix: str, where: str) -> Source:
    """What of `source` has names that begin with `prefix`, without it."""
    if not prefix:
        return source
    cut = len(prefix)
    moments = tuple(replace(m, name=m.name[cut:]) for m in source.moments if m.name.startswith(prefix))
    if not moments:
        raise InputError(f"{where}: no name begins with {prefix!r}; one is {names_of(source)[0]!r}")
    skipped = {n[cut:]: why for n, why in source.skipped.items() if n.startswith(prefix)}
    aliases = {n[cut:]: of[cut:] for n, of in source.aliases.items() if n.startswith(prefix)}
    return replace(source, moments=moments, skipped=skipped, aliases=aliases)


def renamed(source: Source, model: Checkpoint | None, where: str) -> Source:
    """`source` under the model's names. Raises InputError, naming `where`."""
    try:
        return rename(source, model)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def names_of(source: Source) -> list[str]:
    return [moment.name for moment in source.moments]


def _open_model(path: Path, model: str | Path | None) -> Checkpoint | None:
    if model is not None:
        return Checkpoint.open(Path(model), "model")
    if any(os.path.isfile(path / name) for name in _MODEL_FILES):
        return Checkpoint.open(path, "model")
    return None
