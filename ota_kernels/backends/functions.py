"""Methods that are a Python function of torch tensors, element by element, on the host or where tensors lie.

The function sees blocks of BLOCK elements that begin at multiples of BLOCK, whatever the tiles are: torch's
vectorised loops may round the last elements of a call otherwise than those before, and so the same bytes come
out for any tile size. A block is small enough that torch does not hand it to threads of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import InputError
from ..tensors.array import Array, is_resident
from ..tensors.buffer import Buffer
from ..tensors.curvature import Curvature, Uniform
from ..tensors.result import MergeStats, NonFinite
from ..tensors.terms import BLOCK, Terms
from ..tensors.tile import TensorInputs
from . import torch_words

Operands = tuple[torch.Tensor | None, list[torch.Tensor], list[torch.Tensor]]  # base, experts, curvatures


def merge(tile: TensorInputs, terms: Terms, out: Array) -> MergeStats:
    """Merge one tile by terms.function into `out` (uint8, the tile's elements in its out_dtype)."""
    acc = torch.float64 if tile.out_dtype.itemsize >= 4 else torch.float32
    written = out if is_resident(out) else torch.from_numpy(out)
    written = written.view(getattr(torch, tile.out_dtype.name)) if tile.numel else written
    overflow, nonfinite = 0, {}
    for start in range(0, tile.numel, BLOCK):
        block = tile.slice(start, min(start + BLOCK, tile.numel))
        operands = _operands(block, acc, terms.words.curvature)
        bad = _unusable(*operands)
        for found in bad:
            before = nonfinite.get((found.role, found.expert))
            first, count = (start + found.first, 0) if before is None else (before.first, before.count)
            place = (found.role, found.expert)
            nonfinite[place] = NonFinite(*place, count + found.count, first)
        if not bad:
            merged = _evaluated(block, terms, operands)
            place = written[start : start + block.numel]
            place.copy_(merged)
            overflow += int((~torch.isfinite(place)).sum())
    everything = (tile.numel,) * len(tile.experts)
    return MergeStats(everything, everything, 0, overflow, 0, tuple(nonfinite.values()))


def _operands(block: TensorInputs, acc: torch.dtype, curvature: bool) -> Operands:
    base = None if block.base is None else _decoded(block.base, acc)
    experts = [_decoded(expert, acc) for expert in block.experts]
    read = block.curvatures if curvature else ()
    return base, experts, [_curvature(c, like) for c, like in zip(read, experts, strict=False)]


def _decoded(buffer: Buffer, acc: torch.dtype) -> torch.Tensor:
    """A copy, which a function may change."""
    if not is_resident(buffer.data):
        return torch_words.decode(buffer, acc)
    return buffer.data.view(getattr(torch, buffer.dtype.name)).to(acc, copy=True)


def _curvature(c: Curvature, like: torch.Tensor) -> torch.Tensor:
    if isinstance(c, Uniform):
        return torch.ones_like(like)
    if is_resident(c.buffers[0].data):
        return _decoded(c.buffers[0], like.dtype) / c.bias_correction
    return torch_words.curvature(c, len(like)).to(like.dtype) / c.bias_correction


def _unusable(
    base: torch.Tensor | None, experts: Sequence[torch.Tensor], curvatures: Sequence[torch.Tensor]
) -> list[NonFinite]:
    found = [] if base is None else [*torch_words.count("base", -1, ~torch.isfinite(base.float()))]
    for t, w in enumerate(experts):
        found += torch_words.count("weights", t, ~torch.isfinite(w.float()))
    for t, h in enumerate(curvatures):
        found += torch_words.count("curvature", t, torch_words.bad_curvature(h))
    return found


def _evaluated(block: TensorInputs, terms: Terms, operands: Operands) -> torch.Tensor:
    """The function's values of a block, which are checked: shape, finite, and at the first block of a tensor
    that they depend on no other element."""
    n, half = block.numel, block.numel // 2
    # Before the whole: a function may write into what it is given.
    part = _called(block, terms, _cloned(operands, half)) if block.start == 0 and half else None
    merged = _called(block, terms, operands)
    if not bool(torch.isfinite(merged).all()):
        first = block.start + int((~torch.isfinite(merged)).nonzero()[0])
        raise InputError(
            f"{block.name}: {terms.what} gives {merged[first - block.start]} at flat index {first}"
        )
    if part is not None and not _agree(part, merged[:half]):
        raise InputError(
            f"{block.name}: {terms.what} is not element by element: the first {half} of {n} elements "
            "come out otherwise when they are alone"
        )
    return merged


def _cloned(operands: Operands, stop: int) -> Operands:
    base, experts, curvatures = operands
    return (
        None if base is None else base[:stop].clone(),
        [w[:stop].clone() for w in experts],
        [h[:stop].clone() for h in curvatures],
    )


def _called(block: TensorInputs, terms: Terms, operands: Operands) -> torch.Tensor:
    like = operands[1][0]
    try:
        with torch.no_grad():
            found = terms.function(*operands)
    except Exception as error:
        raise InputError(f"{block.name}: {terms.what} raised {type(error).__name__}: {error}") from error
    if not isinstance(found, torch.Tensor) or found.shape != like.shape or not found.is_floating_point():
        kind = (
            f"{found.dtype}{list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        )
        raise InputError(
            f"{block.name}: {terms.what} gives {kind} where {like.dtype}{list(like.shape)} is due"
        )
    return found.to(like.dtype)


def _agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Within what another order of the same operations does."""
    largest = float(other.abs().max())
    return bool(torch.isfinite(one).all()) and torch.allclose(one, other, rtol=1e-3, atol=1e-6 * largest)
