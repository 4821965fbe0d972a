"""Many tiles in few launches.

    tiles --unified, by variant--> a table's row each --one copy--> full blocks: one launch; tails: another
    --> counts by program --> totals by tile, on the device until somebody reads them

A program is of one tile; a tile has programs in proportion to its blocks.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from ...errors import BackendError
from ...tensors.result import CENSUS
from ...tensors.terms import Terms
from .merge import _merge_kernel
from .outcome import N_TOTALS, Lists, Merged, Rooms
from .table import address, by_place, chances_of, launch, numbers_of, unified, upload, words_of
from .tiles import BLOCK, DeviceTile
from .variant import UNROLLED, Variant, constants, warps

MOST = 64  # experts: one bit each of `kept_by`

# Programs of a launch for each processor of the device: four or more run at once, the rest even out the end.
_PROGRAMS = 16
_INTERPRETED_PROGRAMS = 2
_MOST_BLOCKS = (1 << 13) - 1  # of a program, whose threads count 8 elements of each in 16 bits

# Undecided elements are a quarter of a program's at most, or it merges again with room for all.
_SHARE_OF_ROOM = 4

# Tiles of a launch with brackets: bins of their scores take 8 KB for each expert.
_MOST_BRACKETED = 1024

# Bytes of tensors that were copied for their types until they are launched: mixed types are rare.
_MOST_COPIED = 1 << 30


class Request(NamedTuple):
    """A tile that is merged into `out` ([n], any output type). exact_roots: see `Merged.is_overdone`;
    whole_room: whether all its elements may be undecided."""

    tile: DeviceTile
    terms: Terms
    out: torch.Tensor
    exact_roots: bool = False
    whole_room: bool = False


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


class Ready(NamedTuple):
    """A request as the kernel takes it; tile: unified."""

    request: Request
    tile: DeviceTile
    chances: tuple[torch.Tensor, ...]
    censuses: torch.Tensor | None


def merge(tile: DeviceTile, terms: Terms, out: torch.Tensor, exact_roots: bool = False) -> Merged:
    """Merge one tile without waiting for the device; errors as for `merge_all`."""
    (merged,) = merge_all([Request(tile, terms, out, exact_roots)])
    return merged


def merge_all(requests: Sequence[Request]) -> list[Merged]:
    """Merge tiles without waiting for the device: two launches for all that need the same code.

    Raises BackendError for more than 64 experts.
    """
    found: dict[int, Merged] = {}
    for indices, batch in batches(requests):
        found.update(zip(indices, batch.merged(batch.launch()), strict=True))
    return [found[i] for i in range(len(found))]


def batches(requests: Sequence[Request]) -> Iterator[tuple[list[int], Batch]]:
    """The requests that need the same code, and their numbers."""
    waiting: dict[Variant, dict[int, Ready]] = {}
    copied = 0
    for i, request in enumerate(requests):
        if len(request.tile.experts) > MOST:
            count = len(request.tile.experts)
            raise BackendError(f"the triton backend merges {MOST} experts at most, not {count}")
        tile = unified(request.tile, by_place(request.terms))
        variant = Variant.of(tile, request.terms, request.out, request.exact_roots)
        waiting.setdefault(variant, {})[i] = _ready(request, tile, variant)
        copied += _copied_bytes(request.tile, tile)
        full = variant.brackets and len(waiting[variant]) == _MOST_BRACKETED
        if full or copied > _MOST_COPIED or i == len(requests) - 1:
            for of, ready in waiting.items():
                yield list(ready), Batch(of, list(ready.values()))
            waiting, copied = {}, 0


def _ready(request: Request, tile: DeviceTile, variant: Variant) -> Ready:
    terms, chances, censuses = request.terms, (), None
    if variant.select == "random by rank":
        chances = tuple(chances_of(request.tile, terms, t) for t in range(len(terms.experts)))
    if variant.census:
        censuses = torch.zeros(len(terms.experts), CENSUS, dtype=torch.int64, device=tile.device)
    return Ready(request, tile, chances, censuses)


def _copied_bytes(given: DeviceTile, tile: DeviceTile) -> int:
    pairs = zip((*given.experts, *given.curvatures), (*tile.experts, *tile.curvatures), strict=True)
    return sum(x.nbytes for before, x in pairs if isinstance(x, torch.Tensor) and x is not before)


class Batch:
    """Tiles of one variant on the device. rooms: of undecided elements, of each tile; lists: of all; table,
    numbers: a row for each tile; tiles: of each program, those of full blocks first; counts: a column for
    each program."""

    def __init__(self, variant: Variant, ready: Sequence[Ready]) -> None:
        self.variant, self.ready, self.device = variant, ready, ready[0].tile.device
        sizes = np.array([x.tile.numel for x in ready], np.int64)
        programs = _programs(self.device, sizes // BLOCK, variant)
        tails = np.flatnonzero(sizes % BLOCK)
        self.n_full = int(programs.sum())
        self.tile_of_program = np.concatenate([np.repeat(np.arange(len(ready)), programs), tails])
        self.rooms = _rooms(sizes, programs, tails, [x.request.whole_room for x in ready])
        self.lists = self._lists() if variant.brackets else None
        self.table, self.numbers, self.tiles = self._uploaded()
        rows = variant.n_experts * (1 + variant.brackets) + N_TOTALS
        self.counts = torch.empty(rows, self.n_programs, dtype=torch.int32, device=self.device)

    @property
    def n_programs(self) -> int:
        return len(self.tile_of_program)

    def launch(self) -> torch.Tensor:
        """Merge; returns the totals of each tile, int32[tiles, counts]."""
        for first, end, tail in ((0, self.n_full, False), (self.n_full, self.n_programs, True)):
            if end > first:
                run(
                    replace(self.variant, tail=tail),
                    self.table,
                    self.numbers,
                    self.tiles,
                    self.counts,
                    first,
                    end,
                )
        return self.totals(self.counts)

    def totals(self, counts: torch.Tensor) -> torch.Tensor:
        """Of each tile, of the columns of its programs."""
        if len(self.ready) == 1:
            return counts.sum(1, dtype=torch.int32)[None]
        return counts.new_zeros(len(self.ready), len(counts)).index_add_(0, self.tiles, counts.T)

    def merged(self, totals: torch.Tensor) -> list[Merged]:
        """What is known of each tile."""
        scaled = self.variant.power == "scaled"
        return [
            Merged(x.request.tile, x.request.terms, scaled, totals, i, self.lists, rooms, x.censuses)
            for i, (x, rooms) in enumerate(zip(self.ready, self.rooms, strict=True))
        ]

    def _lists(self) -> Lists:
        tile, n = self.ready[0].tile, _end(self.rooms)
        empty = functools.partial(torch.empty, device=self.device)
        base = None if tile.base is None else empty(n, dtype=tile.base.dtype)
        weights = empty(len(tile.experts), n, dtype=tile.experts[0].dtype)
        uniform = tile.curvatures[0] is None
        curvatures = None if uniform else empty(len(tile.experts), n, dtype=torch.float32)
        lengths = empty(self.n_programs, dtype=torch.int32)
        return Lists(empty(n, dtype=torch.int32), base, weights, curvatures, lengths)

    def _uploaded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        lists = self.lists or Lists(*[None] * len(Lists._fields))
        stride = _end(self.rooms)
        table, numbers = [], []
        for x, rooms in zip(self.ready, self.rooms, strict=True):
            terms, tile, out = x.request.terms, x.tile, x.request.out
            table += words_of(
                tile,
                terms,
                x.chances,
                base=address(out if tile.base is None else tile.base),
                out=address(out),
                n=tile.numel,
                program=rooms.first,
                programs=rooms.count,
                censuses=address(x.censuses),
                begin=rooms.begin,
                room=rooms.room,
                stride=stride,
                lengths=address(lists.lengths),
                positions=address(lists.positions),
                listed_base=address(lists.base),
                listed_weights=address(lists.weights),
                listed_values=address(lists.curvatures),
            )
            numbers += numbers_of(_scaled(terms) if self.variant.power == "scaled" else terms)
        return upload(table, numbers, self.variant.acc, self.device, self.tile_of_program)


def run(
    variant: Variant,
    table: torch.Tensor,
    numbers: torch.Tensor,
    tiles: torch.Tensor,
    counts: torch.Tensor,
    first: int,
    end: int,
) -> None:
    """Launch the programs first .. end of a variant, which write as many columns of counts."""
    launch(
        _merge_kernel,
        (end - first,),
        table, numbers, tiles, counts, first, counts.shape[1],
        **constants(variant),
        num_warps=warps(variant),
        enable_fp_fusion=False)  # fmt: skip


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


def _rooms(sizes: np.ndarray, programs: np.ndarray, tails: np.ndarray, whole: Sequence[bool]) -> list[Rooms]:
    """Of each tile. whole: room for every element; else for a quarter of them, but a block at least."""
    firsts = np.cumsum(programs) - programs
    of_tail = dict(zip(tails.tolist(), itertools.count(int(programs.sum()))))
    found, begin = [], 0
    for i, (n, first, count) in enumerate(
        zip(sizes.tolist(), firsts.tolist(), programs.tolist(), strict=True)
    ):
        most = -(-(n // BLOCK) // max(count, 1)) * BLOCK
        room = most if whole[i] else max(most // _SHARE_OF_ROOM, BLOCK)
        found.append(Rooms(first, count, of_tail.get(i, -1), begin, room))
        begin += count * room + (BLOCK if i in of_tail else 0)
    return found


def _end(rooms: Sequence[Rooms]) -> int:
    """Elements of all rooms."""
    last = rooms[-1]
    return last.begin + last.count * last.room + (BLOCK if last.tail >= 0 else 0)
