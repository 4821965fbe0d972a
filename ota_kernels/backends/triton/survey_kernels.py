"""Statistics of a tile: scores and masked edits, their histograms by bits, sums of powers, row and column
sums, and the Gram matrix of the inputs. Sums are float64, of blocks in the kernel, then of the blocks in
torch: the same in every run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...tensors.terms import ExpertTerms
from . import formulas as f
from . import loads
from .tiles import (
    BLOCK,
    TYPES,
    WARPS,
    DeviceTile,
    addresses,
    is_aligned,
    kind_of,
    launch,
    launches,
    place_of,
    streamed,
    unified,
    upload,
)

# Of the block whose row and column sums one program forms: 32 elements a thread stay in registers as float64.
_ROWS, _COLUMNS, _MATRIX_WARPS = 64, 128, 8
_ROW_MULTIPLE = tl.constexpr(8)  # elements of a row that make its beginning a multiple of 16 bytes
_BINS = 1 << 16

_UNSPECIALISED = ["n", "first_block", "first_element", "n_columns", "prefix", "n_rows", "n_blocks"]


@triton.jit
def _edit_and_score(
    base_pointer,
    table,
    score_scale,
    n,
    first_block,
    first_element,
    n_columns,
    weights: tl.constexpr,
    curvature: tl.constexpr,
    curvatures: tl.constexpr,
    has_base: tl.constexpr,
    aligned: tl.constexpr,
    tail: tl.constexpr,
    block_size: tl.constexpr,
):
    """Of the program's block: (offset, lane, which elements are inside of the tile, d, s, which are usable).
    d and s are 0 where an input is not usable."""
    offset = (tl.program_id(0) + first_block).to(tl.int64) * block_size
    lane = tl.arange(0, block_size)
    inside = loads.inside(lane, n - offset, tail, block_size)
    row, has_next, column, wrapped = 0, False, lane, inside
    if curvature == "rank1" or curvature == "log8":
        place = loads.place_in_matrix(offset, n, lane, first_element, n_columns, False)
        row, has_next, column, wrapped = place
    d = loads.elements(table, 0, offset, lane, inside, weights, aligned).to(tl.float32)
    h = loads.curvature(table, 0, offset, lane, inside, row, has_next, column, wrapped,
                        1, curvature, curvatures, aligned, block_size)  # fmt: skip
    usable = f.is_finite(d) & f.is_curvature(h)
    if has_base:
        base = tl.load(base_pointer + offset + lane, mask=inside, other=0).to(tl.float32)
        usable &= f.is_finite(base)
        d = d - base
    s = f.usable_score(f.score(h, d, score_scale, has_base), usable & inside)
    return offset, lane, inside, tl.where(usable & inside, d, 0.0), s, usable


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _scores_kernel(
    base_pointer,
    out_pointer,
    suspects,
    table,
    score_scale,
    threshold,
    n,
    first_block,
    first_element,
    n_columns,
    of_edits: tl.constexpr,
    weights: tl.constexpr,
    curvature: tl.constexpr,
    curvatures: tl.constexpr,
    has_base: tl.constexpr,
    aligned: tl.constexpr,
    tail: tl.constexpr,
    block_size: tl.constexpr,
):
    offset, lane, inside, d, s, usable = _edit_and_score(
        base_pointer, table, score_scale, n, first_block, first_element, n_columns,
        weights, curvature, curvatures, has_base, aligned, tail, block_size)  # fmt: skip
    out = tl.where(s >= threshold, d, 0.0) if of_edits else s
    tl.store(out_pointer + offset + lane, out, mask=inside)
    tl.store(suspects + offset // block_size, tl.sum((inside & f.negated(usable)).to(tl.int32)))


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _histogram_kernel(
    base_pointer,
    counts,
    lows,
    suspects,
    table,
    score_scale,
    threshold,
    prefix,
    n,
    first_block,
    first_element,
    n_columns,
    of_edits: tl.constexpr,
    first_digit: tl.constexpr,
    weights: tl.constexpr,
    curvature: tl.constexpr,
    curvatures: tl.constexpr,
    has_base: tl.constexpr,
    aligned: tl.constexpr,
    tail: tl.constexpr,
    block_size: tl.constexpr,
):
    offset, _, inside, d, s, usable = _edit_and_score(
        base_pointer, table, score_scale, n, first_block, first_element, n_columns,
        weights, curvature, curvatures, has_base, aligned, tail, block_size)  # fmt: skip
    x = tl.where(s >= threshold, d, 0.0) if of_edits else s
    pattern = (f.bits(x) & 0x7FFFFFFF).to(tl.int32)
    high, low = pattern >> 16, pattern & 0xFFFF
    one = tl.full((block_size,), 1, tl.int64)
    if first_digit:
        # Edits that no mask keeps are 0, most of them: one addition to their bin, not one each.
        tl.atomic_add(counts, tl.sum((inside & (pattern == 0)).to(tl.int64)))
        wanted = inside & (pattern != 0)
        tl.atomic_add(counts + high, one, mask=wanted)
        tl.atomic_add(lows + high, low.to(tl.int64), mask=wanted)
    else:
        tl.atomic_add(counts + low, one, mask=inside & (high == prefix))
    tl.store(suspects + offset // block_size, tl.sum((inside & f.negated(usable)).to(tl.int32)))


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
    inside = loads.inside(lane, n - offset, tail, block_size)
    h = loads.elements(table, 0, offset, lane, inside, curvatures, aligned).to(tl.float32)
    h = tl.where(f.is_curvature(h), h, 0.0).to(tl.float64)
    x = f.power_of(h, tl.load(p), power)
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
    row = tl.program_id(0).to(tl.int64) * rows_of_block + tl.arange(0, rows_of_block)
    column = tl.program_id(1).to(tl.int64) * columns_of_block + tl.arange(0, columns_of_block)
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    h = tl.load(values + row[:, None] * n_columns + column[None, :], mask=inside, other=0).to(tl.float32)
    h = tl.where(f.is_curvature(h), h, 0.0).to(tl.float64)
    tl.store(row_sums + tl.program_id(1).to(tl.int64) * n_rows + row, tl.sum(h, 1), mask=row < n_rows)
    to_columns = column_sums + tl.program_id(0).to(tl.int64) * n_columns + column
    tl.store(to_columns, tl.sum(h, 0), mask=column < n_columns)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _gram_kernel(
    sums,
    table,
    n,
    first_block,
    n_blocks,
    n_inputs: tl.constexpr,
    weights: tl.constexpr,
    aligned: tl.constexpr,
    tail: tl.constexpr,
    block_size: tl.constexpr,
):
    block = tl.program_id(0) + first_block
    offset = block.to(tl.int64) * block_size
    lane = tl.arange(0, block_size)
    inside = loads.inside(lane, n - offset, tail, block_size)
    for i in tl.range(0, n_inputs):
        x = loads.elements(table, i, offset, lane, inside, weights, aligned).to(tl.float64)
        for j in tl.range(i, n_inputs):
            y = loads.elements(table, j, offset, lane, inside, weights, aligned).to(tl.float64)
            tl.store(sums + (i * n_inputs + j) * n_blocks + block, tl.sum(x * y))


class _Prepared:
    """One expert's tile as the kernels take it."""

    def __init__(self, tile: DeviceTile) -> None:
        self.tile = tile = unified(tile)
        (w,), (c,) = tile.experts, tile.curvatures
        self.table, _ = upload(addresses(tile), (), tile.device)
        self.base = w if tile.base is None else tile.base
        self.place = place_of(c)
        self.suspects = torch.empty(triton.cdiv(tile.numel, BLOCK), dtype=torch.int32, device=tile.device)
        self.constants = {
            "weights": TYPES[w.dtype],
            "curvature": kind_of(c),
            "curvatures": TYPES[c.dtype] if kind_of(c) == "full" else tl.float32,
            "has_base": tile.base is not None,
            "aligned": is_aligned([w, self.base, *streamed(c)]),
            "block_size": BLOCK,
            "num_warps": WARPS,
            "enable_fp_fusion": False,
        }


def _write(tile: DeviceTile, terms: ExpertTerms, of_edits: bool) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(tile.numel, dtype=torch.float32, device=tile.device)
    x = _Prepared(tile)
    for first_block, programs, tail in launches(tile.numel):
        launch(
            _scores_kernel,
            (programs,),
            x.base, out, x.suspects, x.table, terms.score_scale, terms.threshold, tile.numel, first_block,
            *x.place, of_edits=of_edits, tail=tail, **x.constants)  # fmt: skip
    return out, x.suspects.any()


def scores(tile: DeviceTile, terms: ExpertTerms) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of a tile of one expert, float32[n], 0 where an input is not usable; whether any is not (on
    the device: reading it waits)."""
    return _write(tile, terms, of_edits=False)


def edits(tile: DeviceTile, terms: ExpertTerms) -> tuple[torch.Tensor, torch.Tensor]:
    """The masked edits m d of a tile of one expert, float32[n], and whether some input is not usable."""
    return _write(tile, terms, of_edits=True)


def histogram(
    tile: DeviceTile,
    terms: ExpertTerms,
    of_edits: bool,
    prefix: int,
    counts: torch.Tensor,
    lows: torch.Tensor,
) -> torch.Tensor:
    """Add the counts of one expert's scores by their bits to counts and lows (int64[65536]); see
    `native.histogram`. Returns whether some input is not usable."""
    x = _Prepared(tile)
    for first_block, programs, tail in launches(tile.numel):
        launch(
            _histogram_kernel,
            (programs,),
            x.base, counts, lows, x.suspects, x.table, terms.score_scale, terms.threshold, prefix, tile.numel,
            first_block, *x.place, of_edits=of_edits, first_digit=prefix < 0, tail=tail,
            **x.constants)  # fmt: skip
    return x.suspects.any()


def power_sum(h: torch.Tensor, power: float) -> float:
    """The sum of h^power in float64 over the values that are curvature."""
    table, p = upload([h.data_ptr()], (power,), h.device)
    sums = torch.empty(triton.cdiv(h.numel(), BLOCK), dtype=torch.float64, device=h.device)
    for first_block, programs, tail in launches(h.numel()):
        launch(
            _power_sum_kernel,
            (programs,),
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
            grid,
            values, row_sums, column_sums, n_rows, n_columns, aligned, _ROWS, _COLUMNS,
            num_warps=_MATRIX_WARPS)  # fmt: skip
    return row_sums.sum(0), column_sums.sum(0)


def gram(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The Gram matrix of flat tensors of one type, float64[T, T]: products are exact, sums float64."""
    n, n_inputs = inputs[0].numel(), len(inputs)
    n_blocks = triton.cdiv(n, BLOCK)
    table, _ = upload([x.data_ptr() for x in inputs], (), inputs[0].device)
    sums = torch.zeros(n_inputs, n_inputs, n_blocks, dtype=torch.float64, device=inputs[0].device)
    for first_block, programs, tail in launches(n):
        launch(
            _gram_kernel,
            (programs,),
            sums,
            table,
            n,
            first_block,
            n_blocks,
            n_inputs,
            weights=TYPES[inputs[0].dtype],
            aligned=is_aligned(inputs),
            tail=tail,
            block_size=BLOCK,
            num_warps=WARPS,
        )
    upper = sums.sum(2)
    return upper + upper.triu(1).T
