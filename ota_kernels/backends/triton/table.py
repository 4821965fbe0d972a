"""What a launch takes: tiles of one type and form, in blocks, and the table of words and numbers kernels
read."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import triton.language as tl

from ...tensors import random
from ...tensors.array import is_captured
from ...tensors.terms import LAST_INDEX, Terms
from . import loads
from .tiles import BLOCK, DeviceTile, Log8, Place, Rank1, addressed, on_device, written_out

ALIGNMENT = 16  # bytes of the widest load

_NUMPY = {tl.float32: np.float32, tl.float64: np.float64}
_TORCH = {tl.float32: torch.float32, tl.float64: torch.float64}
_EXACT_IN_BF16 = (torch.float8_e4m3fn, torch.float8_e5m2)
_LAUNCHING = threading.RLock()


def launch(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Launch a kernel, compiled if need be. Threads take turns: Triton, 3.9 too, shows a kernel to other
    threads before it is loaded (its pull request 11518), and its interpreter's state is the process's."""
    with _LAUNCHING:
        kernel[grid](*arguments, **constants)


def unified(tile: DeviceTile, by_place: bool) -> DeviceTile:
    """The same values with one element type for all weights, one form and type for all curvature: kernels are
    compiled for those. What differs is widened without loss, in a copy; models seldom differ.

    by_place: whether rows or columns of the tensor are asked for; curvature whose rows are others is written
    out. Where only curvature has rows, they become the tile's place.
    """
    origins = tuple(tile.base if o is None else o for o in tile.origins)
    if any(o is None for o in origins):
        zeros = torch.zeros_like(tile.experts[0])
        origins = tuple(zeros if o is None else o for o in origins)
    given = tuple(map(_widened, (*tile.experts, *origins)))
    weights = _one_type(given)
    experts, origins = weights[: len(tile.experts)], weights[len(tile.experts) :]
    base = None if tile.base is None else _widened(tile.base)
    changed = replace(tile, base=base, experts=experts, origins=origins)

    curvatures, forms_ = tile.curvatures, {type(c) for c in tile.curvatures}
    if forms_ == {torch.Tensor}:
        return replace(changed, curvatures=_one_type(curvatures))
    if forms_ == {type(None)}:
        return changed
    places = {Place(c.start, c.n_columns) for c in curvatures if isinstance(c, (Rank1, Log8))}
    if len(forms_) == 1 and len(places) == 1 and (not by_place or places == {tile.place}):
        return replace(changed, place=places.pop())
    values = tuple(written_out(c, tile.numel, tile.device) for c in curvatures)
    return replace(changed, curvatures=_one_type(values))


def _widened(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16() if x.dtype in _EXACT_IN_BF16 else x


def _one_type(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    found = {x.dtype for x in tensors}
    if len(found) == 1:
        return tensors
    wide = torch.float64 if torch.float64 in found else torch.float32
    return tuple(x.to(wide) for x in tensors)


def is_aligned(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether 16-byte loads may be used on all of them."""
    return all(x.data_ptr() % ALIGNMENT == 0 for x in tensors)


def launches(n: int) -> Iterator[tuple[int, int, bool]]:
    """(first block, end, whether it is the tail) of the launches that cover n elements: full blocks, then the
    rest. Only the tail has a mask: it would turn all 16-byte loads into loads of single elements."""
    full = n // BLOCK
    if full:
        yield 0, full, False
    if n % BLOCK:
        yield full, full + 1, True


def is_indexed(terms: Terms) -> bool:
    """Whether some threshold holds for a part of the flat indices."""
    bounds = {(e.first, e.last, e.upto) for e in terms.experts}
    return terms.words.select in ("at least", "between") and bounds != {(0, LAST_INDEX, LAST_INDEX)}


def by_place(terms: Terms) -> bool:
    """Whether the words ask for an element's row or column."""
    return terms.words.weigh in ("by row", "by column") or terms.words.score == "row magnitude"


def operands(
    tile: DeviceTile, terms: Terms, acc: tl.dtype, chances: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """(table, numbers) of a unified tile on the device, as loads.py names them, the numbers of type acc.
    chances: of "random by rank"."""
    return upload(words_of(tile, terms, chances), numbers_of(terms), acc, tile.device)[:2]


def words_of(
    tile: DeviceTile, terms: Terms, chances: Sequence[torch.Tensor] = (), **others: int
) -> list[int]:
    """The table's row of a unified tile; others: further ones of its SCALARS, 0 where they are not given."""
    values, columns = zip(*map(addressed, tile.curvatures), strict=True)
    nothing = (None,) * len(tile.experts)
    given = (tile.experts, tile.origins, values, columns, chances, tile.place_weights, tile.row_scores)
    row = [address(x) for tensors in given for x in (tensors or nothing)]
    row += [getattr(e, name) for name in loads.TABLE[len(given) :] for e in terms.experts]
    key = (terms.seed & 0xFFFFFFFF) | (terms.name_hash & 0xFFFFFFFF) << 32
    scalars = {
        "start": tile.start,
        "key": _signed(key),
        "name": terms.name_hash >> 32,
        "index": address(tile.index),
        "first": tile.place.first,
        "columns": tile.place.columns,
    }
    return row + [(scalars | others).get(name, 0) for name in loads.SCALARS]


def numbers_of(terms: Terms) -> list[float]:
    """The numbers' row of a tile."""
    of_experts = [getattr(e, name) for e in terms.experts for name in loads.NUMBERS]
    return of_experts + [getattr(terms, name) for name in loads.SHARED]


def address(x: torch.Tensor | None) -> int:
    """Where a tensor lies; 0 for none."""
    return 0 if x is None else x.data_ptr()


def _signed(word: int) -> int:
    """The int64 of the bits of 64 bits without a sign."""
    return word - (1 << 64) if word >> 63 else word


def upload(
    table: Sequence[int],
    numbers: Sequence[float],
    dtype: tl.dtype,
    device: torch.device,
    integers: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words (int64), numbers (float32 or float64) and integers (int32) on the device, by one copy; none where
    a CUDA graph is captured."""
    with np.errstate(over="ignore"):
        parts = np.array(table, np.int64), np.array(numbers, _NUMPY[dtype]), np.array(integers, np.int32)
    data = b"".join(part.tobytes() for part in parts)
    if is_captured(torch.empty(0, device=device)):
        found = _written(data, device)
    else:
        # A tensor that leaves the cache may be in use still: only its own stream takes its memory after that.
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        found = _upload(data, device, stream)
    words, reals, rest = found.split([part.nbytes for part in parts])
    return words.view(torch.int64), reals.view(_TORCH[dtype]), rest.view(torch.int32)


@functools.lru_cache(maxsize=64)  # tiles of a ring have the same addresses again and again
def _upload(data: bytes, device: torch.device, stream: int) -> torch.Tensor:
    return on_device(np.frombuffer(data, np.uint8), device)


def _written(data: bytes, device: torch.device) -> torch.Tensor:
    """The bytes there, brought by arguments of kernels (96 words each): a graph keeps those, while it would
    read the host's memory again whenever it runs."""
    words = np.frombuffer(data + bytes(-len(data) % 8), np.int64)
    found = torch.zeros(len(words), dtype=torch.int64, device=device)
    places, of_each = np.flatnonzero(words), found.unbind()
    if len(places):
        torch._foreach_add_([of_each[i] for i in places], words[places].tolist())
    return found.view(torch.uint8)[: len(data)]


def chances_of(tile: DeviceTile, terms: Terms, t: int) -> torch.Tensor:
    """p of each element of whole rows by the rank of its edit in its row: float32[n]; see
    tensors/random.py."""
    (n, stride), e = terms.ranked, terms.experts[t]
    if tile.numel == 0:
        return torch.empty(0, dtype=torch.float32, device=tile.device)
    rows = tile.edit(t, torch.float32).abs().view(-1, n, stride)
    order = rows.sort(dim=1, stable=True).indices
    of_rank = on_device(random.probability_of_rank(e.probability, e.spread, np.arange(n), n), tile.device)
    found = torch.empty(rows.shape, dtype=torch.float32, device=tile.device)
    return found.scatter_(1, order, of_rank.view(1, n, 1).expand_as(rows)).view(-1)
