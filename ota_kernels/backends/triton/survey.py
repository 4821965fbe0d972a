"""Statistics of a tile: scores, masked edits and their histograms, sums of powers, of rows and of columns,
and the products and overlaps that weights are made of. Sums are float64, of blocks in the kernel, then of the
blocks in torch: the same in every run."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ...tensors.terms import Terms
from . import loads, stages
from .table import by_place, chances_of, is_aligned, is_indexed, launch, launches, operands, unified, upload
from .tiles import BLOCK, TYPES, WARPS, DeviceTile, kind_of, streamed

# Of the block whose row and column sums one program forms: 32 elements a thread stay in registers as float64.
_ROWS, _COLUMNS, _MATRIX_WARPS = 64, 128, 8
_ROW_MULTIPLE = tl.constexpr(8)  # elements of a row that make its beginning a multiple of 16 bytes
_CHUNK = 1 << 22  # elements that torch widens to float64 at a time

_BINS = tl.constexpr(1 << 16)
# Elements whose scores are counted in one row of bins: the sums of 16 bits of all of them take 39 bits, the
# counts 24 more.
PACKED, _LOW_BITS = tl.constexpr(1 << 23), tl.constexpr(39)

_UNSPECIALISED = ["t", "n", "first_block", "first", "n_columns", "prefix", "n_rows"]


@triton.jit
def _scored(
    base_pointer,
    table,
    numbers,
    t,
    n,
    first_block,
    first,
    n_columns,
    n_experts: tl.constexpr,
    weights: tl.constexpr,
    curvature: tl.constexpr,
    curvatures: tl.constexpr,
    score: tl.constexpr,
    select: tl.constexpr,
    has_base: tl.constexpr,
    origins: tl.constexpr,
    indexed: tl.constexpr,
    gathered: tl.constexpr,
    place: tl.constexpr,
    aligned: tl.constexpr,
    tail: tl.constexpr,
    block_size: tl.constexpr,
):
    """Of the program's block and expert t: (offset, lane, which elements are inside of the tile, s, d, m,
    which inputs are usable). s and d are 0, and m is not set, where some are not."""
    block = tl.program_id(0) + first_block
    offset = block.to(tl.int64) * block_size
    lane = tl.arange(0, block_size)
    inside = loads.inside_of(lane, n - offset, tail, block_size)
    row, column, wrapped, has_next = loads.place_of(
        table, offset, n, lane, inside, first, n_columns, n_experts, place, False
    )
    base = tl.zeros((block_size,), tl.float32)
    if has_base:
        base = tl.load(base_pointer + offset + lane, mask=inside, other=0).to(tl.float32)
    of_all = base
    if score == "spread":
        of_all = stages.spread(table, offset, lane, inside, base, n_experts, weights, origins, aligned, 1)
    w, _, d, usable = loads.edit_of(
        table, t, offset, lane, inside, base, tl.float32, n_experts, weights, origins, aligned
    )
    h = loads.curvature(
        table, t, offset, lane, inside, row, column, wrapped, has_next,
        n_experts, curvature, curvatures, place, aligned, block_size)  # fmt: skip
    usable &= loads.is_finite(w.to(tl.float32)) & loads.is_curvature(h) & loads.is_finite(base)
    s = stages.score(table, numbers, t, h, d, of_all, inside, row, wrapped, has_next, score, n_experts, place)
    s = stages.usable_score(s, usable & inside)
    index = lane
    if indexed or select == "random" or select == "random by rank":
        index = loads.flat_index(table, n_experts, offset, lane, inside, gathered)
    keep = stages.select(
        table, numbers, t, s, offset, lane, inside, index, lane, select, n_experts, indexed, False
    )
    return offset, lane, inside, s, tl.where(usable & inside, d, 0.0), keep & usable & inside, usable


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _values_kernel(
    base_pointer,
    out_pointer,
    suspects,
    table,
    numbers,
    t,
    n,
    first_block,
    first,
    n_columns,
    what: tl.constexpr,
    n_experts: tl.constexpr,
    weights: tl.constexpr,
    curvature: tl.constexpr,
    curvatures: tl.constexpr,
    score: tl.constexpr,
    select: tl.constexpr,
    has_base: tl.constexpr,
    origins: tl.constexpr,
    indexed: tl.constexpr,
    gathered: tl.constexpr,
    place: tl.constexpr,
    aligned: tl.constexpr,
    tail: tl.constexpr,
    block_size: tl.constexpr,
):
    """what: "scores", "edits" (those of the mask, else 0) or "masks" (1 or 0)."""
    offset, lane, inside, s, d, keep, usable = _scored(
        base_pointer, table, numbers, t, n, first_block, first, n_columns,
        n_experts, weights, curvature, curvatures, score, select, has_base, origins, indexed, gathered, place,
        aligned, tail, block_size)  # fmt: skip
    if what == "scores":
        out = s
    elif what == "edits":
        out = tl.where(keep, d, 0.0)
    else:
        out = keep.to(tl.uint8)
    tl.store(out_pointer + offset + lane, out, mask=inside)
    bad = loads.int32_sum((inside & loads.negated(usable)).to(tl.int32), 0)
    tl.store(suspects + offset // block_size, bad)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _histogram_kernel(
    base_pointer,
    counts,
    suspects,
    table,
    numbers,
    t,
    prefix,
    n,
    first_block,
    first,
    n_columns,
    of_edits: tl.constexpr,
    first_digit: tl.constexpr,
    n_experts: tl.constexpr,
    weights: tl.constexpr,
    curvature: tl.constexpr,
    curvatures: tl.constexpr,
    score: tl.constexpr,
    select: tl.constexpr,
    has_base: tl.constexpr,
    origins: tl.constexpr,
    indexed: tl.constexpr,
    gathered: tl.constexpr,
    place: tl.constexpr,
    aligned: tl.constexpr,
    tail: tl.constexpr,
    block_size: tl.constexpr,
):
    offset, _, inside, s, d, keep, usable = _scored(
        base_pointer, table, numbers, t, n, first_block, first, n_columns,
        n_experts, weights, curvature, curvatures, score, select, has_base, origins, indexed, gathered, place,
        aligned, tail, block_size)  # fmt: skip
    x = tl.where(keep, d, 0.0) if of_edits else s
    pattern = (stages.bits(x) & 0x7FFFFFFF).to(tl.int32)
    high, low = pattern >> 16, pattern & 0xFFFF
    one = tl.full((block_size,), 1, tl.int64)
    if first_digit:
        # A bin's count and its sum of low halves are one number, in a row of bins for so many elements that
        # neither overflows: additions to memory are what takes the time. Edits that no mask keeps are 0, most
        # of them: one addition to their bin, not one each. Relaxed: nobody reads before the kernel's end.
        bins = counts + offset // PACKED * _BINS
        zeros = tl.sum((inside & (pattern == 0)).to(tl.int64))
        tl.atomic_add(bins, zeros << _LOW_BITS, sem="relaxed")
        packed = (one << _LOW_BITS) + low.to(tl.int64)
        tl.atomic_add(bins + high, packed, mask=inside & (pattern != 0), sem="relaxed")
    else:
        tl.atomic_add(counts + low, one, mask=inside & (high == prefix), sem="relaxed")
    bad = loads.int32_sum((inside & loads.negated(usable)).to(tl.int32), 0)
    tl.store(suspects + offset // block_size, bad)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _power_sum_kernel(
    sums,
    table,
    p,
    n,
    first_block,
    power: tl.constexpr,
    curvatures: tl.constexpr,
    aligned: tl.constexpr,
    tail: tl.constexpr,
    block_size: tl.constexpr,
):
    offset = (tl.program_id(0) + first_block).to(tl.int64) * block_size
    lane = tl.arange(0, block_size)
    inside = loads.inside_of(lane, n - offset, tail, block_size)
    h = loads.elements(table, 0, offset, lane, inside, curvatures, aligned).to(tl.float32)
    h = tl.where(loads.is_curvature(h), h, 0.0).to(tl.float64)
    x = stages.power_of(h, tl.load(p), power)
    tl.store(sums + offset // block_size, tl.sum(tl.where(inside, x, 0.0)))


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _row_column_kernel(
    values,
    row_sums,
    column_sums,
    n_rows,
    n_columns,
    aligned: tl.constexpr,
    rows_of_block: tl.constexpr,
    columns_of_block: tl.constexpr,
):
    if aligned:
        n_columns = n_columns // _ROW_MULTIPLE * _ROW_MULTIPLE  # so the compiler sees it
    # One axis of programs: a second one has 65535 at most, too few for a matrix of few rows.
    across = tl.cdiv(n_columns, columns_of_block)
    down, right = (tl.program_id(0) // across).to(tl.int64), (tl.program_id(0) % across).to(tl.int64)
    row = down * rows_of_block + tl.arange(0, rows_of_block)
    column = right * columns_of_block + tl.arange(0, columns_of_block)
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    h = tl.load(values + row[:, None] * n_columns + column[None, :], mask=inside, other=0).to(tl.float32)
    h = tl.where(loads.is_curvature(h), h, 0.0).to(tl.float64)
    tl.store(row_sums + right * n_rows + row, tl.sum(h, 1), mask=row < n_rows)
    to_columns = column_sums + down * n_columns + column
    tl.store(to_columns, tl.sum(h, 0), mask=column < n_columns)


class _Prepared:
    """A tile as the kernels take it, of expert t alone unless its score is one for all."""

    def __init__(self, tile: DeviceTile, t: int, terms: Terms) -> None:
        words = terms.words
        self.t = t if words.score == "spread" else 0
        chances = [chances_of(tile, terms, t)] if words.select == "random by rank" else []
        self.kept = chances  # in memory until the kernel is launched
        if words.score != "spread":
            tile, terms = tile.expert(t), terms_of(terms, t)
        self.tile = tile = unified(tile, by_place(terms))
        self.table, self.numbers = operands(tile, terms, tl.float32, chances * len(tile.experts))
        self.base = tile.experts[0] if tile.base is None else tile.base
        c, gathered = tile.curvatures[0], tile.index is not None
        rows = words.score == "row magnitude" or kind_of(c) in ("rank1", "log8")
        self.place = tile.place.first, tile.place.columns
        self.suspects = torch.empty(triton.cdiv(tile.numel, BLOCK), dtype=torch.int32, device=tile.device)
        streams = [x for of in map(streamed, tile.curvatures) for x in of]
        self.constants = {
            "n_experts": len(tile.experts),
            "weights": TYPES[tile.experts[0].dtype],
            "curvature": kind_of(c),
            "curvatures": TYPES[c.dtype] if kind_of(c) == "full" else tl.float32,
            "score": words.score,
            "has_base": tile.base is not None,
            "origins": bool(tile.origins),
            "gathered": gathered,
            "place": tile.place.kind(tile.numel, gathered) if rows else "none",
            "aligned": is_aligned([*tile.experts, self.base, *tile.origins, *streams]),
            "block_size": BLOCK,
            "num_warps": WARPS,
            "enable_fp_fusion": False,
        }
        self.masks = {"select": words.select, "indexed": is_indexed(terms)}


def terms_of(terms: Terms, t: int) -> Terms:
    """The terms of expert t alone."""
    return replace(terms, experts=terms.experts[t : t + 1])


def values(what: str, tile: DeviceTile, t: int, terms: Terms) -> tuple[torch.Tensor, torch.Tensor]:
    """Of expert t and each element: "scores", 0 where an input is not usable, or "edits" of its mask
    (float32), or its "masks" (uint8); whether any input is not usable (on the device: reading it waits)."""
    out = torch.empty(tile.numel, dtype=torch.uint8 if what == "masks" else torch.float32, device=tile.device)
    x = _Prepared(tile, t, terms)
    masks = {"select": "all", "indexed": False} if what == "scores" else x.masks
    for first_block, end_block, tail in launches(tile.numel):
        launch(
            _values_kernel,
            (end_block - first_block,),
            x.base, out, x.suspects, x.table, x.numbers, x.t, tile.numel, first_block, *x.place,
            what=what, tail=tail, **masks, **x.constants)  # fmt: skip
    return out, x.suspects.any()


def histogram(
    tile: DeviceTile,
    t: int,
    terms: Terms,
    of_edits: bool,
    prefix: int,
    counts: torch.Tensor,
    lows: torch.Tensor,
) -> torch.Tensor:
    """Add the counts of expert t's scores by their bits to counts and lows (int64[65536]); see
    `native.histogram`. Returns whether some input is not usable."""
    x = _Prepared(tile, t, terms)
    masks = x.masks if of_edits else {"select": "all", "indexed": False}
    bins = counts
    if prefix < 0:
        rows = triton.cdiv(tile.numel, PACKED.value)
        bins = torch.zeros(rows, _BINS.value, dtype=torch.int64, device=tile.device)
    for first_block, end_block, tail in launches(tile.numel):
        launch(
            _histogram_kernel,
            (end_block - first_block,),
            x.base, bins, x.suspects, x.table, x.numbers, x.t, prefix, tile.numel, first_block,
            *x.place, of_edits=of_edits, first_digit=prefix < 0, tail=tail, **masks,
            **x.constants)  # fmt: skip
    if prefix < 0:
        counts += (bins >> _LOW_BITS.value).sum(0)
        lows += (bins & ((1 << _LOW_BITS.value) - 1)).sum(0)
    return x.suspects.any()


def power_sum(h: torch.Tensor, power: float) -> float:
    """The sum of h^power in float64 over the values that are curvature."""
    table, p, _ = upload([h.data_ptr()], [power], tl.float64, h.device)
    sums = torch.empty(triton.cdiv(h.numel(), BLOCK), dtype=torch.float64, device=h.device)
    for first_block, end_block, tail in launches(h.numel()):
        launch(
            _power_sum_kernel,
            (end_block - first_block,),
            sums,
            table,
            p,
            h.numel(),
            first_block,
            power={0.5: "half", 1.0: "one"}.get(power, "general"),
            curvatures=TYPES[h.dtype],
            aligned=is_aligned([h]),
            tail=tail,
            block_size=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return float(sums.sum())


def row_column_sums(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(row sums float64[m], column sums float64[k]) of a matrix; values that are not curvature count as 0."""
    n_rows, n_columns = values.shape
    grid = triton.cdiv(n_rows, _ROWS), triton.cdiv(n_columns, _COLUMNS)
    row_sums = torch.empty(grid[1], n_rows, dtype=torch.float64, device=values.device)
    column_sums = torch.empty(grid[0], n_columns, dtype=torch.float64, device=values.device)
    if values.numel():
        aligned = is_aligned([values]) and n_columns % _ROW_MULTIPLE.value == 0
        launch(
            _row_column_kernel,
            (grid[0] * grid[1],),
            values, row_sums, column_sums, n_rows, n_columns, aligned, _ROWS, _COLUMNS,
            num_warps=_MATRIX_WARPS)  # fmt: skip
    return row_sums.sum(0), column_sums.sum(0)


# In plain torch: products of matrices, and what is asked for once a model.


def gram(tile: DeviceTile, by: str) -> torch.Tensor:
    """Sums of x_t x_u over the tile, float64[T, T]; with by "row" or "column" of its whole rows one for each,
    float64[groups, T, T]. x_t: the edit d_t, or w_t without a base."""
    n, columns, experts = tile.numel, tile.place.columns, range(len(tile.experts))
    if by == "tensor":
        found = torch.zeros(len(experts), len(experts), dtype=torch.float64, device=tile.device)
        for start in range(0, n, _CHUNK):
            part = tile.slice(start, min(start + _CHUNK, n))
            x = torch.stack([part.edit(t, torch.float64) for t in experts])
            found += x @ x.T
        return found
    rows = max(_CHUNK // columns, 1) * columns
    found = []
    for start in range(0, n, rows):
        part = tile.slice(start, min(start + rows, n))
        x = torch.stack([part.edit(t, torch.float64).view(-1, columns) for t in experts])
        found.append(torch.einsum("trc,urc->rtu" if by == "row" else "trc,urc->ctu", x, x))
    if not found:
        groups = 0 if by == "row" else columns
        return torch.zeros(groups, len(experts), len(experts), dtype=torch.float64, device=tile.device)
    return torch.cat(found) if by == "row" else torch.stack(found).sum(0)


def masked_sums(tile: DeviceTile, terms: Terms) -> torch.Tensor:
    """Per expert: kept elements, sum |d|, sum |m d|, sum (m d)^2, elements that another expert keeps too, and
    those that it keeps alone: float64[T, 6]. Elements whose inputs are not usable count nowhere but in
    sum |d|, where d is finite."""
    experts = range(len(tile.experts))
    found = torch.zeros(len(experts), 6, dtype=torch.float64, device=tile.device)
    masks = torch.stack([values("masks", tile, t, terms)[0] for t in experts])
    together = masks.sum(0, dtype=torch.uint8)
    for start in range(0, tile.numel, _CHUNK):
        stop = min(start + _CHUNK, tile.numel)
        part, several = tile.slice(start, stop), together[start:stop] > 1
        for t in experts:
            d, kept = part.edit(t, torch.float64), masks[t, start:stop] != 0
            d = torch.where(torch.isfinite(d), d, 0.0)
            masked = torch.where(kept, d, 0.0)
            shared = (kept & several).sum()
            sums = (d.abs().sum(), masked.abs().sum(), masked.square().sum())
            found[t] += torch.stack([x.double() for x in (kept.sum(), *sums, shared, kept.sum() - shared)])
    return found


def row_divergence(tile: DeviceTile, t: int) -> torch.Tensor:
    """Per row, the Kullback-Leibler divergence of softmax(base) from softmax(w_t), each plus 1e-8:
    float64[rows]; sum p (x - log1p(x)), x = q / p - 1."""
    columns = tile.place.columns
    rows = max(_CHUNK // columns, 1)
    origin = tile.origins[t] if tile.origins and tile.origins[t] is not None else tile.base
    w, base = (x.view(-1, columns) for x in (tile.experts[t], origin))
    found = []
    for start in range(0, len(w), rows):
        p, q = (x[start : start + rows].double().softmax(-1) + 1e-8 for x in (w, base))
        x = q / p - 1
        found.append((p * (x - x.log1p())).sum(-1))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64, device=tile.device)
