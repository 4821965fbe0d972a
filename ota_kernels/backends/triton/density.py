"""Thresholds of densities, found while tiles merge, by launches whose number depends on nothing.

    sampled runs --score, rank--> the sample's score at each density --squares--> its error --rank--> brackets
    --merge--> counts, lists of undecided elements --score, rank--> thresholds --merge the lists--> results

Each step is one launch for all tiles of a variant and all experts, a rank four. Numbers that depend on scores
never leave the device: brackets and thresholds are written into the kernels' own table and numbers. The host
reads counts, thresholds and what was missed, once, at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton.language as tl

from ...tensors.result import MergeStats
from ...tensors.segment import RUN
from ...tensors.terms import Words, score_of_bits
from . import loads, ranks
from .batch import Batch, Request, batches, run
from .outcome import N_TOTALS, Merged, unusable
from .table import address, launch, upload
from .tiles import BLOCK, WARPS

_PART = 1 << 14  # sampled elements that one program ranks


def finds(words: Words) -> bool:
    """Whether thresholds are found here for such a merge: undecided elements are merged by themselves."""
    scores = words.score in ("saliency", "curvature", "magnitude")
    return scores and words.select == "at least" and words.weigh in ("constant", "curvature", "alone")


@dataclass(frozen=True)
class Found:
    """Of a batch, on the device. totals, settled: counts of the merge with brackets and of what it left
    undecided, int32[tiles, counts]; thresholds: bits, and whether it was missed, int32[tiles, T, 2]."""

    batch: Batch
    totals: torch.Tensor
    settled: torch.Tensor
    thresholds: torch.Tensor


def merge_all(requests: Sequence[Request], together: bool = False) -> list[tuple[MergeStats, bool]]:
    """Merge tiles of whole tensors and find their thresholds, or together one of each expert over all tiles,
    in the brackets of their terms; per tile what came of it, and whether roots overflowed (see
    `Merged.is_overdone`). Waits once."""
    groups = [list(batches(requests))] if together else ([each] for each in batches(requests))
    found = []
    for group in groups:
        launched = _launched([batch for _, batch in group], together)
        found += zip((indices for indices, _ in group), launched, strict=True)
    parts = [x for _, f in found for x in (f.totals, f.settled, f.thresholds)]
    numbers = torch.cat([x.view(-1) for x in parts]).tolist() if parts else []
    ends = list(itertools.accumulate((x.numel() for x in parts), initial=0))
    shaped = iter(
        np.array(numbers[begin:end], np.int64).reshape(x.shape)
        for x, (begin, end) in zip(parts, itertools.pairwise(ends), strict=True)
    )
    stats: dict[int, tuple[MergeStats, bool]] = {}
    of_batches = [(next(shaped), next(shaped), next(shaped)) for _ in found]
    if together:
        missed = np.concatenate([x[2][..., 1] for x in of_batches]).any(0)
        for _, _, thresholds in of_batches:
            thresholds[..., 1] |= missed
    for (indices, f), (totals, settled, thresholds) in zip(found, of_batches, strict=True):
        merged = f.batch.merged(f.totals)
        for i, m, *of_tile in zip(indices, merged, totals, settled, thresholds, strict=True):
            stats[i] = _stats(m, *of_tile)
    return [stats[i] for i in range(len(stats))]


def _stats(
    merged: Merged, totals: np.ndarray, settled: np.ndarray, thresholds: np.ndarray
) -> tuple[MergeStats, bool]:
    n = len(merged.terms.experts)
    kept = tuple((totals[:n] + settled[:n]).tolist())
    unkept, overflow, repaired, _ = (totals[-N_TOTALS:] + settled[-N_TOTALS:]).tolist()
    bad = unusable(merged.tile, merged.terms) if totals[-1] else ()
    answers = tuple(
        score_of_bits(bits) if e.wanted and not missed else None
        for e, (bits, missed) in zip(merged.terms.experts, thresholds.tolist(), strict=True)
    )
    repaired = repaired if merged.terms.repair else 0
    stats = MergeStats(kept, kept, unkept, overflow, repaired, bad, thresholds=answers)
    return stats, merged.is_overdone(totals.tolist(), bad)


@dataclass(frozen=True)
class _Lists:
    """Lists of elements on the device (see ranks.py). tiles, groups, begins, lengths: of each; values:
    int32[T, n]; places, runs: of sampled ones."""

    tiles: torch.Tensor
    groups: torch.Tensor
    begins: torch.Tensor
    lengths: torch.Tensor
    values: torch.Tensor
    places: torch.Tensor | None = None
    runs: torch.Tensor | None = None

    @property
    def given(self) -> tuple:
        return self.groups, self.begins, self.lengths, self.values, self.values.shape[1]


def _launched(batches: Sequence[Batch], together: bool) -> list[Found]:
    """One batch, of tiles with thresholds of their own, or all with those that they have together."""
    first = batches[0]
    n_experts, experts = first.variant.n_experts, first.ready[0].request.terms.experts
    if together:
        wanted = upload([e.wanted for e in experts], (), tl.float32, first.device)[0]
    else:
        wanted, sample, statistics = _sample(first)
        _bracket(first, wanted, sample, *statistics)
    totals = [batch.launch() for batch in batches]
    undecided = [_undecided(batch, together) for batch in batches]
    for batch, of_batch in zip(batches, undecided, strict=True):
        _score(batch, *of_batch)
    reached = [total[:, n_experts : 2 * n_experts] for total in totals]
    left = wanted - (sum(r.sum(0) for r in reached) if together else reached[0].reshape(-1))
    bins = _ranked([lists for lists, _ in undecided], left, n_experts, 1, from_inside=True)
    found = []
    for batch, total, (_, table) in zip(batches, totals, undecided, strict=True):
        thresholds = torch.zeros(len(batch.ready), n_experts, 2, dtype=torch.int32, device=batch.device)
        launch(
            ranks._decide_kernel,
            (len(batch.ready), n_experts),
            batch.table, batch.numbers, bins, wanted, left, batch.lists.lengths, thresholds,
            n_experts, together, BLOCK)  # fmt: skip
        found.append(Found(batch, total, _settled(batch, table), thresholds))
    return found


def _settled(batch: Batch, table: torch.Tensor) -> torch.Tensor:
    """Merge what was undecided; the totals."""
    rows = batch.variant.n_experts + N_TOTALS
    counts = torch.empty(rows, batch.n_programs, dtype=torch.int32, device=batch.device)
    uniform = batch.variant.curvature == "uniform"
    settling = replace(
        batch.variant,
        listed=True,
        tail=True,
        brackets=False,
        aligned=False,
        place="none",
        curvature="uniform" if uniform else "full",
        curvatures=tl.float32,
        by_fours=False,
    )
    run(settling, table, batch.numbers, batch.tiles, counts, 0, batch.n_programs)
    return batch.totals(counts)


def _sample(batch: Batch) -> tuple[torch.Tensor, _Lists, tuple[torch.Tensor, ...]]:
    """(wanted, the sample of each tile, its statistics for `_bracket`), on the device."""
    wanted = np.array([[e.wanted for e in x.request.terms.experts] for x in batch.ready], np.int64)
    starts, at = [], {}
    tiles, begins, lengths, places, sizes = [], [], [], [], []
    filled = runs = 0
    for i, x in enumerate(batch.ready):
        sample, n = x.request.terms.sample, x.tile.numel
        key = ("all", n) if sample is None else id(sample.starts)
        if key not in at:
            starts.append(np.arange(0, n, RUN, np.int32) if sample is None else sample.starts)
            at[key] = runs
            runs += len(starts[-1])
        size = n if sample is None else RUN * len(sample.starts)
        for begin in range(0, size, _PART):
            tiles.append(i)
            begins.append(filled + begin)
            lengths.append(min(_PART, size - begin))
            places.append(at[key] + begin // RUN)
        sizes.append(size)
        filled += size
    samples = [x.request.terms.sample for x in batch.ready]
    numels = np.array([max(x.tile.numel, 1) for x in batch.ready])
    targets = wanted / numels[:, None] * np.array(sizes)[:, None]
    exact = np.array([s is None for s in samples])
    targets[exact] = wanted[exact]
    first = np.maximum(np.ceil(targets), 1).astype(np.int64)
    reach = np.array([0.0 if s is None else s.reach for s in samples])
    margin = np.stack([reach, 1.0 - exact], 1)
    words = [*begins, *places, *sizes, *wanted.reshape(-1).tolist(), *first.reshape(-1).tolist()]
    reals = [*targets.reshape(-1).tolist(), *margin.reshape(-1).tolist()]
    integers = np.concatenate([np.array([*tiles, *lengths, *exact], np.int32), *starts])
    words, reals, integers = upload(words, reals, tl.float64, batch.device, integers)
    count, n = len(tiles), len(sizes)
    begins, places, sizes, wanted_there, first = words.split([count, count, n, wanted.size, wanted.size])
    tiles, lengths, exact, runs = integers.split([count, count, n, runs])
    values = torch.empty(batch.variant.n_experts, filled, dtype=torch.int32, device=batch.device)
    lists = _Lists(tiles, tiles, begins, lengths, values, places, runs)
    targets, margin = reals.split([wanted.size, 2 * n])
    return wanted_there, lists, (first, targets, margin.view(n, 1, 2), sizes, exact)


def _bracket(
    batch: Batch,
    wanted: torch.Tensor,
    sample: _Lists,
    first: torch.Tensor,
    targets: torch.Tensor,
    margin: torch.Tensor,
    sizes: torch.Tensor,
    exact: torch.Tensor,
) -> None:
    """Write the brackets into the batch's table and numbers."""
    n_experts, n = batch.variant.n_experts, len(batch.ready)
    _score(batch, sample)
    bins = _ranked([sample], first, n_experts, 1)
    squares = torch.zeros(n, n_experts, dtype=torch.int64, device=batch.device)
    launch(
        ranks._squares_kernel,
        (len(sample.tiles), n_experts),
        *sample.given, bins, first, squares, n_experts, BLOCK)  # fmt: skip
    reach = (squares.double().sqrt() * margin[..., 0] + margin[..., 1]).view(-1)
    both = torch.stack([targets + reach, targets - reach], 1).ceil().long().view(-1)
    bins = _ranked([sample], both, n_experts, 2)
    launch(
        ranks._bracket_kernel,
        (n * n_experts,),
        batch.table, batch.numbers, bins, both, wanted, sizes, exact, n_experts)  # fmt: skip


def _score(batch: Batch, lists: _Lists, table: torch.Tensor | None = None) -> None:
    """Fill the lists' values. table: of lists of undecided elements."""
    v, sampled = batch.variant, table is None
    long = v.place in ("whole", "long")
    form = {"curvature": v.curvature, "curvatures": v.curvatures, "place": "narrow" if long else v.place}
    if not sampled:
        kind = "uniform" if v.curvature == "uniform" else "full"
        form = {"curvature": kind, "curvatures": tl.float32, "place": "none"}
    launch(
        ranks._score_kernel,
        (len(lists.tiles), v.n_experts),
        batch.table, batch.table if sampled else table, batch.numbers, lists.tiles, lists.begins,
        lists.lengths, lists.places if sampled else lists.begins, lists.runs if sampled else lists.tiles,
        lists.values, lists.values.shape[1],
        n_experts=v.n_experts, weights=v.weights, bases=v.bases, score=v.score, has_base=v.has_base,
        sampled=sampled, block_size=BLOCK, num_warps=WARPS, enable_fp_fusion=False, **form)  # fmt: skip


def _ranked(
    of_batches: Sequence[_Lists],
    wanted: torch.Tensor,
    n_experts: int,
    queries: int,
    from_inside: bool = False,
) -> torch.Tensor:
    """Bins of each (group, expert, query), which tell the value of that rank."""
    bins = torch.zeros(len(wanted) * ranks.DIGITS * ranks.BINS, dtype=torch.int32, device=wanted.device)
    for digit, lists in itertools.product(range(ranks.DIGITS), of_batches):
        launch(
            ranks._digit_kernel,
            (len(lists.tiles), n_experts * queries),
            *lists.given, bins, wanted, n_experts, queries, digit, from_inside, BLOCK,
            num_warps=WARPS)  # fmt: skip
    return bins


def _undecided(batch: Batch, together: bool) -> tuple[_Lists, torch.Tensor]:
    """The lists of a merge with brackets, and the table by which they are tiles: a row for each list."""
    experts, lists, n = batch.variant.n_experts, batch.lists, batch.n_programs
    stride = lists.weights.shape[1]
    begins, room_of = np.empty(n, np.int64), np.empty(n, np.int64)
    for rooms in batch.rooms:
        programs = np.arange(rooms.first, rooms.first + rooms.count)
        begins[programs] = rooms.begin + (programs - rooms.first) * rooms.room
        room_of[programs] = rooms.room
        if rooms.tail >= 0:
            begins[rooms.tail] = rooms.begin + rooms.count * rooms.room
            room_of[rooms.tail] = BLOCK
    table = np.zeros((n, len(loads.TABLE) * experts + len(loads.SCALARS)), np.int64)

    def put(name: str, values: np.ndarray) -> None:
        table[:, len(loads.TABLE) * experts + loads.SCALARS.index(name)] = values

    def element(tensor: torch.Tensor, of_expert: int = 0) -> np.ndarray:
        return address(tensor) + (of_expert * stride + begins) * tensor.itemsize

    outs = np.array([address(x.request.out) for x in batch.ready])[batch.tile_of_program]
    for t in range(experts):
        table[:, loads.TABLE.index("weights") * experts + t] = element(lists.weights, t)
        if lists.curvatures is not None:
            table[:, loads.TABLE.index("values") * experts + t] = element(lists.curvatures, t)
    put("base", outs if lists.base is None else element(lists.base))
    put("out", outs)
    put("room", room_of)
    put("positions", element(lists.positions))
    put("lengths", address(lists.lengths) + lists.lengths.itemsize * np.arange(n))
    words = np.concatenate([table.reshape(-1), begins])
    words, _, rooms = upload(words, (), tl.float32, batch.device, room_of)
    table, begins = words.split([table.size, n])
    lengths = torch.minimum(lists.lengths, rooms)
    values = torch.empty(experts, stride, dtype=torch.int32, device=batch.device)
    groups = torch.zeros_like(batch.tiles) if together else batch.tiles
    return _Lists(batch.tiles, groups, begins, lengths, values), table
