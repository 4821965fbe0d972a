"""Many tiles in few launches.

    tiles --unified, by variant--> a table's row each --one copy--> full blocks: one launch; tails: another
    --> counts by program --> totals by tile, on the device until somebody reads them

A program is of one tile; a tile has programs in proportion to its blocks.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import triton

from ...errors import BackendError
from ...tensors.result import CENSUS
from ...tensors.terms import Terms
from .merge import _merge_kernel
from .outcome import N_TOTALS, Merged
from .table import address, by_place, chances_of, launch, numbers_of, unified, upload, words_of
from .tiles import BLOCK, DeviceTile
from .variant import UNROLLED, Variant, constants, warps

MOST = 64  # experts: one bit each of `kept_by`

# Programs of a launch for each processor of the device: four or more run at once, the rest even out the end.
_PROGRAMS = 16
_INTERPRETED_PROGRAMS = 2
_MOST_BLOCKS = (1 << 13) - 1  # of a program, whose threads count 8 elements of each in 16 bits

# Bytes of tensors that were copied for their types until they are launched: mixed types are rare.
_MOST_COPIED = 1 << 30


class Request(NamedTuple):
    """A tile that is merged into `out` ([n], any output type). exact_roots: see `Merged.is_overdone`."""

    tile: DeviceTile
    terms: Terms
    out: torch.Tensor
    exact_roots: bool = False


def totals_of(merged: Sequence[Merged]) -> list[list[int]]:
    """The totals of each; one wait for all."""
    groups = {id(m.together): m.together for m in merged}
    flat = [group.view(-1) for group in groups.values()]
    numbers = (flat[0] if len(flat) == 1 else torch.cat(flat)).tolist() if flat else []
    ends = itertools.accumulate((group.numel() for group in groups.values()), initial=0)
    starts = dict(zip(groups, ends, strict=False))
    widths = [m.together.shape[1] for m in merged]
    begins = [starts[id(m.together)] + m.place * width for m, width in zip(merged, widths, strict=True)]
    return [numbers[begin : begin + width] for begin, width in zip(begins, widths, strict=True)]


class _Ready(NamedTuple):
    """A request as the kernel takes it."""

    request: Request
    tile: DeviceTile
    chances: tuple[torch.Tensor, ...]
    columns: tuple[torch.Tensor | None, ...]
    lengths: torch.Tensor | None
    censuses: torch.Tensor | None


def merge(tile: DeviceTile, terms: Terms, out: torch.Tensor, exact_roots: bool = False) -> Merged:
    """Merge one tile without waiting for the device; errors as for `merge_all`."""
    (merged,) = merge_all([Request(tile, terms, out, exact_roots)])
    return merged


def merge_all(requests: Iterable[Request]) -> list[Merged]:
    """Merge tiles without waiting for the device: two launches for all that need the same code.

    Raises BackendError for more than 64 experts.
    """
    found: dict[int, Merged] = {}
    waiting: dict[Variant, dict[int, _Ready]] = {}
    copied = 0

    def flush() -> None:
        for variant, ready in waiting.items():
            found.update(zip(ready, _launched(variant, list(ready.values())), strict=True))
        waiting.clear()

    for i, request in enumerate(requests):
        if len(request.tile.experts) > MOST:
            count = len(request.tile.experts)
            raise BackendError(f"the triton backend merges {MOST} experts at most, not {count}")
        tile = unified(request.tile, by_place(request.terms))
        variant = Variant.of(tile, *request[1:])
        waiting.setdefault(variant, {})[i] = _ready(request, tile, variant)
        copied += _copied_bytes(request.tile, tile)
        if copied > _MOST_COPIED:
            flush()
            copied = 0
    flush()
    return [found[i] for i in range(len(found))]


def _ready(request: Request, tile: DeviceTile, variant: Variant) -> _Ready:
    terms, device = request.terms, tile.device
    chances, lengths, censuses = (), None, None
    if variant.select == "random by rank":
        chances = tuple(chances_of(request.tile, terms, t) for t in range(len(terms.experts)))
    if variant.brackets:
        lengths = torch.empty(triton.cdiv(tile.numel, BLOCK), dtype=torch.int32, device=device)
    if variant.census:
        censuses = torch.zeros(len(terms.experts), CENSUS, dtype=torch.int64, device=device)
    columns = _columns(tile) if variant.brackets else ()
    return _Ready(request, tile, chances, columns, lengths, censuses)


def _copied_bytes(given: DeviceTile, tile: DeviceTile) -> int:
    pairs = zip((*given.experts, *given.curvatures), (*tile.experts, *tile.curvatures), strict=True)
    return sum(x.nbytes for before, x in pairs if isinstance(x, torch.Tensor) and x is not before)


def _launched(variant: Variant, ready: Sequence[_Ready]) -> list[Merged]:
    """Tiles of one variant."""
    device = ready[0].tile.device
    sizes = np.array([x.tile.numel for x in ready], np.int64)
    programs = _programs(device, sizes // BLOCK, variant)
    tails = np.flatnonzero(sizes % BLOCK)
    of_blocks = np.repeat(np.arange(len(ready)), programs)
    tile_of_program = np.concatenate([of_blocks, tails])
    table, numbers, tiles = _uploaded(variant, ready, programs, tile_of_program)
    n_programs = len(tile_of_program)
    rows = variant.n_experts * (1 + variant.brackets) + N_TOTALS
    counts = torch.empty(rows, n_programs, dtype=torch.int32, device=device)
    for first, end, tail in ((0, len(of_blocks), False), (len(of_blocks), n_programs, True)):
        if end > first:
            launch(
                _merge_kernel,
                (end - first,),
                table, numbers, tiles, counts, first, n_programs,
                **constants(replace(variant, tail=tail) if tail else variant),
                num_warps=warps(variant),
                enable_fp_fusion=False)  # fmt: skip
    if len(ready) == 1:
        totals = counts.sum(1, dtype=torch.int32)[None]
    else:
        totals = counts.new_zeros(len(ready), rows).index_add_(0, tiles, counts.T)
    scaled = variant.power == "scaled"
    return [
        Merged(x.request.tile, x.request.terms, scaled, totals, i, x.columns, x.lengths, x.censuses)
        for i, x in enumerate(ready)
    ]


def _uploaded(
    variant: Variant, ready: Sequence[_Ready], programs: np.ndarray, tile_of_program: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(table, numbers, tile of each program) on the device."""
    firsts = np.cumsum(programs) - programs
    table, numbers = [], []
    for x, first, count in zip(ready, firsts.tolist(), programs.tolist(), strict=True):
        terms, tile, out = x.request.terms, x.tile, x.request.out
        columns = x.columns or (None,) * 4
        table += words_of(
            tile,
            terms,
            x.chances,
            base=address(out if tile.base is None else tile.base),
            out=address(out),
            n=tile.numel,
            program=first,
            programs=count,
            censuses=address(x.censuses),
            lengths=address(x.lengths),
            positions=address(columns[0]),
            bases=address(columns[1]),
            kept_weights=address(columns[2]),
            kept_values=address(columns[3]),
        )
        numbers += numbers_of(_scaled(terms) if variant.power == "scaled" else terms)
    return upload(table, numbers, variant.acc, ready[0].tile.device, tile_of_program)


def _scaled(terms: Terms) -> Terms:
    """Weights for roots of h k instead of h."""
    experts = (replace(e, weight_scale=e.weight_scale / e.score_scale**0.5) for e in terms.experts)
    return replace(terms, experts=tuple(experts))


def _programs(device: torch.device, blocks: np.ndarray, variant: Variant) -> np.ndarray:
    """How many programs take the full blocks of each tile, of so many."""
    if variant.n_experts > UNROLLED:
        return blocks  # a program has one block
    wanted = _INTERPRETED_PROGRAMS
    if device.type == "cuda":
        wanted = _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
    of_each = min(max(-(-int(blocks.sum()) // wanted), 1), _MOST_BLOCKS)
    return -(-blocks // of_each)


def _columns(tile: DeviceTile) -> tuple[torch.Tensor | None, ...]:
    """Room for every element of the tile as a candidate: positions, base; weights and curvatures by expert
    (None: all 1), [T, n] of whole blocks."""
    n, experts = triton.cdiv(tile.numel, BLOCK) * BLOCK, len(tile.experts)
    empty = functools.partial(torch.empty, device=tile.device)
    base = None if tile.base is None else empty(n, dtype=tile.base.dtype)
    weights = empty(experts, n, dtype=tile.experts[0].dtype)
    curvatures = None if tile.curvatures[0] is None else empty(experts, n, dtype=torch.float32)
    return empty(n, dtype=torch.int32), base, weights, curvatures
