"""How kernels read a block of a tile: pointers from the table, and curvature in each of its forms."""

from __future__ import annotations

import triton
import triton.language as tl

from . import formulas as f


@triton.jit
def pointer(table, i, dtype: tl.constexpr, aligned: tl.constexpr):
    """The i-th address of the table; aligned: to 16 bytes, which the launcher has checked."""
    found = tl.load(table + i).to(tl.pointer_type(dtype))
    if aligned:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def everywhere(block_size: tl.constexpr):
    """True for every element."""
    return tl.zeros((block_size,), tl.int32) == 0


@triton.jit
def inside(lane, rest, tail: tl.constexpr, block_size: tl.constexpr):
    """Which of the block's elements are among the `rest` last ones of the tile."""
    return lane < rest if tail else everywhere(block_size)


@triton.jit
def elements(table, i, offset, lane, inside, dtype: tl.constexpr, aligned: tl.constexpr):
    """Elements offset + lane of the i-th tensor, 0 outside of the tile."""
    return tl.load(pointer(table, i, dtype, aligned) + offset + lane, mask=inside, other=0)


@triton.jit
def place_in_matrix(offset, n, lane, first_element, n_columns, aligned: tl.constexpr):
    """Where the block at `offset` lies in its matrix, whose rows are at least as long as a block: (its first
    row, whether the tile has more rows, each element's column, whether it is in the next row)."""
    row = (first_element + offset) // n_columns
    first_column = first_element + offset - row * n_columns
    has_next = n_columns - first_column < n - offset
    column = first_column.to(tl.int32) + lane
    wrapped = column >= n_columns
    column = tl.where(wrapped, column - n_columns.to(tl.int32), column)
    if aligned:  # rows and the tile begin at multiples of 4 columns
        column = tl.max_contiguous(tl.multiple_of(column, 4), 4)
    return row, has_next, column, wrapped


@triton.jit
def curvature(
    table,
    t,
    offset,
    lane,
    inside,
    row,
    has_next,
    column,
    wrapped,
    n_experts: tl.constexpr,
    kind: tl.constexpr,
    dtype: tl.constexpr,
    aligned: tl.constexpr,
    block_size: tl.constexpr,
):
    """h_t of the block, float32. kind: "uniform" (1 everywhere), "full", or "rank1" and "log8", which use the
    place in the matrix."""
    if kind == "uniform":
        h = tl.full((block_size,), 1.0, tl.float32)
    elif kind == "full":
        h = elements(table, n_experts + t, offset, lane, inside, dtype, aligned).to(tl.float32)
    else:
        rows = pointer(table, n_experts + t, tl.float32, False) + row
        of_row = tl.where(wrapped, tl.load(rows + 1, mask=has_next, other=0), tl.load(rows))
        if kind == "rank1":
            columns = pointer(table, 2 * n_experts + t, tl.float32, aligned)
            h = f.rank1(of_row, tl.load(columns + column, mask=inside, other=0))
        else:
            codes = elements(table, 2 * n_experts + t, offset, lane, inside, tl.uint8, aligned)
            h = f.log8(codes, of_row)
    return h
