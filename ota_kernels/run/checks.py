"""Inputs that are not finite, or negative curvature: one line that names file, tensor, count and first
index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from ..backends import Backend
from ..errors import InputError
from ..tensors.result import NonFinite
from ..tensors.segment import CHUNK
from ..tensors.terms import Terms
from ..tensors.tile import TensorInputs
from .bundles import Bundle

TermsOf = Callable[[TensorInputs], Terms]


def check(
    tensors: Sequence[TensorInputs],
    bundles: Iterable[Bundle],
    backend: Backend,
    terms_of: TermsOf,
    tile: TensorInputs,
    nonfinite: Iterable[NonFinite],
) -> None:
    """Raise InputError for the first unusable input of a tile of one of the tensors; bundles: those among
    them that stand for several."""
    for bad in nonfinite:
        tensor = next(t for t in tensors if t.name == tile.name)
        bundle = next((p for p in bundles if p.inputs is tensor), None)
        members = [tensor] if bundle is None else [output.inputs() for output in bundle.members]
        found = ((one, *_count(one, backend, terms_of(one), bad)) for one in members)
        _fail(*next(each for each in found if each[1] or len(members) == 1), bad)


def _fail(tensor: TensorInputs, count: int, first: int, bad: NonFinite) -> NoReturn:
    if bad.role == "base":
        origin = tensor.base.origin
    elif bad.role == "weights":
        origin = tensor.experts[bad.expert].origin
    else:
        origin = tensor.curvatures[bad.expert].origin
    what = "negative or not finite" if bad.role == "curvature" else "not finite"
    kind = "curvature" if bad.role == "curvature" else "weight"
    hint = "; `on_nonfinite: base` would write the base value there" if tensor.base is not None else ""
    raise InputError(
        f"{origin}: {tensor.name}: {count} of {tensor.numel} {kind} values are {what}, "
        f"the first at flat index {first}{hint}"
    )


def _count(tensor: TensorInputs, backend: Backend, terms: Terms, bad: NonFinite) -> tuple[int, int]:
    """How many such values the whole tensor has, and where the first is."""
    count, first = 0, -1
    for start in range(0, tensor.numel, CHUNK):
        tile = tensor.slice(start, min(start + CHUNK, tensor.numel))
        for found in backend.edits(tile, max(bad.expert, 0), terms)[1]:
            if found.role == bad.role:
                first = start + found.first if first < 0 else first
                count += found.count
    return count, first
