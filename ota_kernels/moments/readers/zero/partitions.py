"""DeepSpeed ZeRO checkpoints of stages 1, 2 and 3: second moments out of the flat partitions of all ranks.

Which element is whose is not written beside the values. It follows from the order and shapes of parameters in
the model's file, and is taken only where every partition has the size that they imply and, in checkpoints
that list places (param_slice_mappings), where every parameter lies where DeepSpeed itself says.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ....errors import InputError
from ....io.header import quoted
from ...source import Moment, Piece, Source
from .. import kinds
from ..kinds import Accepted
from ..optimizer_file import read_torch
from ..request import Request
from ..values import Values
from . import files
from .files import LABEL, ModelStates, Shape
from .flat import Fragment, concatenated, share_size, spread
from .rank import Rank

_MOMENT = "exp_avg_sq"
_POINTER = "latest"


def recognise_zero(path: Path) -> bool:
    """Whether `path` holds DeepSpeed's optimizer files, or a file `latest` that names the folder of them."""
    return (
        files.has_optimizer_files(path) or os.path.isfile(path / _POINTER) or files.has_whole_optimizer(path)
    )


def read_zero(path: Path, request: Request | None) -> Source:
    """The second moments of a checkpoint folder, or of the step that its file `latest` names.

    Raises InputError for files that are missing, damaged or of different steps, for tensor, pipeline and
    expert parallelism, where sizes do not fit, and for states that are not known to be Adam's or its kin's.
    """
    here = files.has_optimizer_files(path) or not os.path.isfile(path / _POINTER)
    folder = path if here and os.path.isdir(path) else files.latest_folder(path, _POINTER)
    if not files.has_optimizer_files(folder) and files.has_whole_optimizer(folder):
        # Stage 0: one file holds the weights and the optimizer as torch does.
        return replace(read_torch(files.model_file(folder), request or Request()), format="deepspeed")
    ranks = [Rank.load(file) for file in files.optimizer_files(folder)]
    states = files.model_states(folder)
    _check_ranks(ranks, states, folder)
    moments: dict[str, Moment] = {}
    skipped = dict.fromkeys(states.frozen, "frozen")
    notes = []
    as_adam = request is not None and request.as_adam
    for index, shapes in enumerate(states.groups):
        partitions = [rank.partition(index) for rank in ranks]
        accepted = [None if one is None else kinds.accept(one, as_adam=as_adam) for one in partitions]
        if any(accepted):
            moments |= _group_moments(ranks, _present(accepted, index, folder), index, shapes)
            notes += [accepted[0].note] if accepted[0].note else []
        else:
            skipped |= dict.fromkeys(shapes, kinds.absence(partitions[0]))
    return Source("deepspeed", tuple(moments.values()), skipped, states.aliases, tuple(dict.fromkeys(notes)))


def _check_ranks(ranks: Sequence[Rank], states: ModelStates, folder: Path) -> None:
    """Raise InputError unless the files are those of all ranks of one run."""
    if len({(rank.spreads, rank.is_lean) for rank in ranks}) > 1:
        raise InputError(f"{LABEL}: {folder}: files of different ZeRO stages: remove the older run's files")
    for rank in ranks:
        counts = rank.partition_counts
        if max(counts) > len(ranks):
            raise files.missing_rank(folder, len(ranks))
        if min(counts) < len(ranks):
            raise InputError(
                f"{rank.where}: {min(counts)} ranks share some parameters, {len(ranks)} there are: "
                "experts spread over ranks and sharing within sub-groups are not supported"
            )
        if rank.group_count != len(states.groups):
            raise InputError(
                f"{rank.where}: has {rank.group_count} flat groups, {states.path.name} {len(states.groups)}: "
                "they are not of one checkpoint"
            )


def _present(accepted: Sequence[Accepted | None], index: int, folder: Path) -> list[Accepted]:
    """Those of all ranks. Raises InputError where only some have second moments, or their kinds differ."""
    if None in accepted or len({one.kind for one in accepted}) > 1:
        raise InputError(f"{LABEL}: {folder}: only some ranks have {_MOMENT} of group {index}: save it again")
    return list(accepted)


def _group_moments(
    ranks: Sequence[Rank], accepted: Sequence[Accepted], index: int, shapes: Mapping[str, Shape]
) -> dict[str, Moment]:
    """The moments of flat group `index`, by name. Raises InputError where sizes or steps do not fit."""
    flat = [one.values() for one in accepted]
    sizes = [values.numel for values in flat]
    numels = {name: math.prod(shape) for name, shape in shapes.items()}
    locate = _locate_spread if ranks[0].spreads else _locate_concatenated
    fragments = locate(ranks, index, numels, sizes)
    step, *others = (
        one.step if one.step is not None else rank.common_step
        for rank, one in zip(ranks, accepted, strict=True)
    )
    if any(other != step for other in others):
        raise InputError(
            f"{ranks[0].where}: other ranks' files are of another step: save the checkpoint again"
        )
    factor, beta2 = accepted[0].factor, accepted[0].beta2
    return {
        name: Moment(name, shape, tuple(_pieces(fragments[name], flat, factor)), step, beta2)
        for name, shape in shapes.items()
    }


def _locate_spread(
    ranks: Sequence[Rank], index: int, numels: Mapping[str, int], sizes: Sequence[int]
) -> dict[str, list[Fragment]]:
    """Fragments under ZeRO-3, where partitions are shares in a row and nothing else."""
    expected = sum(share_size(numel, len(ranks)) for numel in numels.values())
    for rank, size in zip(ranks, sizes, strict=True):
        if size != expected:
            raise _misfit(rank, index, size, f"the shares of its parameters are {expected}")
    return spread(numels, len(ranks))


def _locate_concatenated(
    ranks: Sequence[Rank], index: int, numels: Mapping[str, int], sizes: Sequence[int]
) -> dict[str, list[Fragment]]:
    """Fragments under ZeRO-1 and 2, where partitions are one row with padding behind it."""
    gaps = ranks[0].gaps(index, len(numels))
    row = sum(numels.values()) + sum(gaps)
    total = sum(sizes)
    paddings = [rank.padding(index) for rank in ranks]
    # Old files do not say: padding fills the row up to a multiple of twice the ranks.
    most = 2 * len(ranks) - 1
    fits = 0 <= total - row <= most if None in paddings else total - row == sum(paddings)
    if not fits:
        raise _misfit(ranks[-1], index, total, f"its parameters are {row}, padding {quoted(paddings)}")
    if not ranks[0].is_lean and len(set(sizes)) > 1:
        raise _misfit(ranks[-1], index, sizes[-1], f"the first rank's is {sizes[0]}")
    fragments = concatenated(numels, gaps, sizes)
    for number, rank in enumerate(ranks):
        _check_listed(rank, index, number, fragments)
    return fragments


def _check_listed(rank: Rank, index: int, number: int, fragments: Mapping[str, list[Fragment]]) -> None:
    """Raise InputError if DeepSpeed lists another place for some parameter in this rank's partition."""
    listed = rank.listed_fragments(index)
    if listed is None:
        return
    found = {
        name: (fragment.offset, fragment.numel)
        for name, parts in fragments.items()
        for fragment in parts
        if fragment.rank == number
    }
    if listed != found:
        name = next(name for name in (*found, *listed) if found.get(name) != listed.get(name))
        raise InputError(
            f"{rank.where}: param_slice_mappings has {quoted(name)} at {listed.get(name)} of group {index}, "
            f"the model's file at {found.get(name)} (start, elements): they are not of one checkpoint"
        )


def _misfit(rank: Rank, index: int, size: int, expected: str) -> InputError:
    return InputError(
        f"{rank.where}: {_MOMENT} of group {index} has {size} elements where {expected}: "
        "the files are damaged or not of one checkpoint"
    )


def _pieces(fragments: Sequence[Fragment], flat: Sequence[Values], factor: float) -> Iterator[Piece]:
    """Pieces of one parameter, in its order."""
    for part in fragments:
        values = flat[part.rank].part(part.offset, part.numel)
        for piece in values.pieces(factor):
            yield Piece(part.start + piece.start, piece.numel, piece.read)
