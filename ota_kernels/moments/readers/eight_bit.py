"""8-bit Adam of bitsandbytes: v_i = qmap2[state2_i] * absmax2[i // block].

A block has 256 elements since bitsandbytes 0.44, 2048 before. Parameters below 4096 elements, and embeddings
where the Trainer says so, keep state2 in float32.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from ...errors import InputError
from ...tensors.buffer import Buffer
from ..source import Moment, Piece
from .state import State, cut, pieces, read_once

# bitsandbytes nests the tensors of a state under this key, where FSDP does not look for tensors to gather.
NESTED = "__bnb_optimizer_quant_state__"
_BLOCKS = (256, 2048)
_CODES = 256


def fits(state: State) -> bool:
    return "state2" in state


def shape(state: State) -> tuple[int, ...]:
    return state.shape("state2")


def moment(state: State, name: str, beta2: float | None) -> Moment:
    """Raises InputError for a state that is not quantized in blocks, or whose parts do not fit."""
    stored = state.buffer("state2", ("uint8", "float32"))
    found = pieces(stored) if stored.dtype.name == "float32" else _decoded(state, stored)
    return Moment(name, shape(state), found, state.step, beta2)


def _decoded(state: State, codes: Buffer) -> tuple[Piece, ...]:
    if "absmax2" not in state:
        raise InputError(f"{state.where}: has no absmax2: only 8-bit states quantized in blocks can be read")
    maxima = read_once(state.buffer("absmax2", ("float32",)))
    values = read_once(state.buffer("qmap2", ("float32",)))
    if values.size != _CODES:
        raise InputError(f"{state.where}: qmap2 has {values.size} values, not {_CODES}")
    size = _block_size(state, len(codes), maxima.size)

    def decode(start: int, stop: int) -> np.ndarray:
        scales = np.repeat(maxima[start // size : -(-stop // size)], size)[: stop - start]
        return values[codes.slice(start, stop).data] * scales

    return tuple(Piece(start, stop - start, partial(decode, start, stop)) for start, stop in cut(len(codes)))


def _block_size(state: State, numel: int, blocks: int) -> int:
    for size in _BLOCKS:
        if -(-numel // size) == blocks:
            return size
    raise InputError(
        f"{state.where}: {blocks} values of absmax2 do not divide {numel} elements into blocks of "
        f"{' or '.join(map(str, _BLOCKS))}"
    )
