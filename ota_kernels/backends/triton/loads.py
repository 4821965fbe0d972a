"""How kernels read: the names of their table and numbers, elements, places in rows, forms of curvature.

Flags have no `~` (`negated`): the interpreter of triton 3.2 lacks it.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The kernels' table, int64, a row for each tile: for each of these names one word per expert, then SCALARS.
# Addresses, of tensors on the device: weights; what their edits are taken from; curvature, its row sums or
# scales; its column shares or codes; probabilities of elements; weights by row or column; scores of rows.
TABLE = (
    *("weights", "origins", "values", "columns", "chances", "place_weights", "row_scores"),
    *("first", "last", "upto", "position", "span"),
)
WEIGHTS, ORIGINS, VALUES, COLUMNS, CHANCES, PLACE_WEIGHTS, ROW_SCORES, FIRST, LAST, UPTO, POSITION, SPAN = (
    tl.constexpr(i) for i in range(len(TABLE))
)
# start: flat index of the tile's first element; key, name: of random numbers; index: of gathered elements. Of
# a merge: base, out: addresses; n: elements; first, columns: of its Place; program, programs: the first one
# that takes full blocks of it, and how many do; censuses: address. Of undecided elements, which each program
# lists in a room of its own: begin: where those of the tile's programs begin, room: of each, stride: elements
# of all rooms together; addresses of how many each program has found, positions, base, weights, curvatures.
SCALARS = (
    *("start", "key", "name", "index", "base", "out", "n", "first", "columns", "program", "programs"),
    *("censuses", "begin", "room", "stride"),
    *("lengths", "positions", "listed_base", "listed_weights", "listed_values"),
)
START, KEY, NAME, INDEX, BASE, OUT, N, PLACE, ROW, PROGRAM, PROGRAMS = (tl.constexpr(i) for i in range(11))
CENSUSES, BEGIN, ROOM, STRIDE = (tl.constexpr(i) for i in range(11, 15))
LENGTHS, POSITIONS, LISTED_BASE, LISTED_WEIGHTS, LISTED_VALUES = (tl.constexpr(i) for i in range(15, 20))
N_TABLE, N_SCALARS = tl.constexpr(len(TABLE)), tl.constexpr(len(SCALARS))

# The kernels' numbers, in the type of the sums, a row for each tile: these of each expert (fields of
# ExpertTerms), then the shared ones (of Terms).
NUMBERS = (
    *("threshold", "upper", "score_scale", "weight_scale", "edit_scale"),
    *("vote", "trim", "alone", "probability"),
)
THRESHOLD, UPPER, SCORE_SCALE, WEIGHT_SCALE, EDIT_SCALE, VOTE, TRIM, ALONE, PROBABILITY = (
    tl.constexpr(i) for i in range(len(NUMBERS))
)
SHARED = (
    *("epsilon", "lambda_", "power", "denominator", "least"),
    *("clip", "tie", "agreement", "needed"),
)
EPSILON, LAMBDA, POWER, DENOMINATOR, LEAST, CLIP, TIE, AGREEMENT, NEEDED = (
    tl.constexpr(i) for i in range(len(SHARED))
)
N_NUMBERS, N_SHARED = tl.constexpr(len(NUMBERS)), tl.constexpr(len(SHARED))


# Read: numbers and elements.


@triton.jit
def number(numbers, t, which: tl.constexpr):
    """That number of expert t."""
    return tl.load(numbers + N_NUMBERS * t + which)


@triton.jit
def shared(numbers, n_experts: tl.constexpr, which: tl.constexpr):
    """That number of all experts."""
    return tl.load(numbers + N_NUMBERS * n_experts + which)


@triton.jit
def integer(table, t, n_experts: tl.constexpr, which: tl.constexpr):
    """That word of expert t."""
    return tl.load(table + which * n_experts + t)


@triton.jit
def scalar(table, n_experts: tl.constexpr, which: tl.constexpr):
    """That one of SCALARS."""
    return tl.load(table + N_TABLE * n_experts + which)


@triton.jit
def row_of_table(table, row, n_experts: tl.constexpr):
    """The table from that row on."""
    return table + row.to(tl.int64) * (N_TABLE * n_experts + N_SCALARS)


@triton.jit
def row_of_numbers(numbers, row, n_experts: tl.constexpr):
    """The numbers from that row on."""
    return numbers + row.to(tl.int64) * (N_NUMBERS * n_experts + N_SHARED)


@triton.jit
def place_in_rows(table, n_experts: tl.constexpr, place: tl.constexpr):
    """(place of the tile's first element, elements of a row), as `place_of` wants them."""
    first, columns = 0, 1
    if place != "none":
        first, columns = scalar(table, n_experts, PLACE), scalar(table, n_experts, ROW)
        if place != "wide" and place != "gathered":
            first, columns = first.to(tl.int32), columns.to(tl.int32)
    return first, columns


@triton.jit
def scalar_pointer(
    table, n_experts: tl.constexpr, which: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr
):
    """That one of SCALARS as an address."""
    return pointer(table, N_TABLE * n_experts + which, dtype, aligned)


@triton.jit
def pointer(table, i, dtype: tl.constexpr, aligned: tl.constexpr):
    """The i-th word of the table as an address; aligned: to 16 bytes, which the launcher has checked."""
    found = tl.load(table + i).to(tl.pointer_type(dtype))
    if aligned:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def negated(flags):
    """Where flags are not set."""
    return flags == 0


@triton.jit
def int32_sum(x, axis: tl.constexpr):
    """Of int32. The interpreter of triton 3.2 sums int32 in int64, and would store it as that."""
    return tl.sum(x, axis).to(tl.int64).to(tl.int32)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def is_curvature(h):
    """Whether h is finite and not negative."""
    return (h >= 0) & (h < float("inf"))


@triton.jit
def inside_of(lane, rest, tail: tl.constexpr, block_size: tl.constexpr):
    """Which of the block's elements are among the `rest` last ones of the tile."""
    return lane < rest if tail else tl.zeros((block_size,), tl.int32) == 0


@triton.jit
def elements(table, i, offset, lane, inside, dtype: tl.constexpr, aligned: tl.constexpr):
    """Elements offset + lane of the tensor at the i-th address, 0 outside of the tile."""
    return tl.load(pointer(table, i, dtype, aligned) + offset + lane, mask=inside, other=0)


@triton.jit
def edit_of(
    table,
    t,
    offset,
    lane,
    inside,
    base,
    acc: tl.constexpr,
    n_experts: tl.constexpr,
    weights: tl.constexpr,
    origins: tl.constexpr,
    aligned: tl.constexpr,
):
    """(w_t as stored, d_t in the type of the sums, d_t in float32, whether its origin can be used). base: in
    the type of the sums; where experts have origins of their own, these are read instead."""
    w = elements(table, WEIGHTS * n_experts + t, offset, lane, inside, weights, aligned)
    usable = negated(lane < 0)
    if origins:
        o = elements(table, ORIGINS * n_experts + t, offset, lane, inside, weights, aligned)
        usable = is_finite(o.to(tl.float32))
        d, d32 = w.to(acc) - o.to(acc), w.to(tl.float32) - o.to(tl.float32)
    else:
        d, d32 = w.to(acc) - base, w.to(tl.float32) - base.to(tl.float32)
    return w, d, d32, usable


# Where elements lie in their tensor.


@triton.jit
def flat_index(table, n_experts: tl.constexpr, offset, lane, inside, gathered: tl.constexpr):
    """int64[block], the flat index of each element in its tensor."""
    if gathered:
        i = elements(table, N_TABLE * n_experts + INDEX, offset, lane, inside, tl.int64, False)
    else:
        i = scalar(table, n_experts, START) + offset + lane
    return i


@triton.jit
def place_of(
    table,
    offset,
    n,
    lane,
    inside,
    first,
    n_columns,
    n_experts: tl.constexpr,
    place: tl.constexpr,
    by_fours: tl.constexpr,
):
    """(row, column, whether it is in the row after, whether the tile has one): row is a number with "whole"
    and "long" rows, and that of the block's first element; else one of each element.

    place: "whole": rows are whole blocks; "long": a block crosses the end of one row at most; "narrow": a
    division per element; "wide", "gathered": in 64 bits; "none": nobody asks. first: place of the tile's
    first element, counted from the beginning of the first row that `row` means."""
    row, column, wrapped, has_next = 0, lane, lane < 0, False
    if place == "whole" or place == "long":
        at = first + offset.to(tl.int32)
        row = at // n_columns
        start = at - row * n_columns
        if place == "whole":
            column = tl.multiple_of(start, 16) + lane
        else:
            has_next = n_columns - start < n - offset
            column = start + lane
            wrapped = column >= n_columns
            column = tl.where(wrapped, column - n_columns, column)
            if by_fours:  # rows and the tile begin at multiples of 4 columns
                column = tl.max_contiguous(tl.multiple_of(column, 4), 4)
    elif place != "none":
        if place == "narrow":
            at = first + offset.to(tl.int32) + lane
        elif place == "wide":
            at = first + offset + lane
        else:
            at = flat_index(table, n_experts, offset, lane, inside, True)
        row = at // n_columns
        column = at - row * n_columns
    return row, column, wrapped, has_next


@triton.jit
def by_row(values, inside, row, wrapped, has_next, place: tl.constexpr):
    """values[row] of each element; with "whole" rows a number."""
    if place == "whole":
        found = tl.load(values + row)
    elif place == "long":
        found = tl.where(wrapped, tl.load(values + row + 1, mask=has_next, other=0), tl.load(values + row))
    else:
        found = tl.load(values + row, mask=inside, other=0)
    return found


# Curvature, in each of its forms.


@triton.jit
def rank1(row_sum, column_share):
    """h = R_i C_j / sum(R); column_share: C_j / sum(R)."""
    return row_sum * column_share


@triton.jit
def log8(code, scale):
    """h of an 8-bit code and its row's scale (tensors/log8.py): integers, and one exact product."""
    c = code.to(tl.int32)
    m = c & 3
    pattern = ((32 * c - ((m * (45 - 11 * m)) >> 2)) << 16) + (64 << 23)
    return tl.where(c > 0, pattern.to(tl.float32, bitcast=True), 0.0) * scale


@triton.jit
def curvature(
    table,
    t,
    offset,
    lane,
    inside,
    row,
    column,
    wrapped,
    has_next,
    n_experts: tl.constexpr,
    kind: tl.constexpr,
    dtype: tl.constexpr,
    place: tl.constexpr,
    aligned: tl.constexpr,
    block_size: tl.constexpr,
):
    """h_t of the block, float32. kind: "uniform" (1 everywhere), "full", or "rank1" and "log8", by place."""
    if kind == "uniform":
        h = tl.full((block_size,), 1.0, tl.float32)
    elif kind == "full":
        h = elements(table, VALUES * n_experts + t, offset, lane, inside, dtype, aligned).to(tl.float32)
    else:
        rows = pointer(table, VALUES * n_experts + t, tl.float32, False)
        of_row = by_row(rows, inside, row, wrapped, has_next, place)
        if kind == "rank1":
            columns = pointer(table, COLUMNS * n_experts + t, tl.float32, aligned)
            h = rank1(of_row, tl.load(columns + column, mask=inside, other=0))
        else:
            codes = elements(table, COLUMNS * n_experts + t, offset, lane, inside, tl.uint8, aligned)
            h = log8(codes, of_row)
    return h
