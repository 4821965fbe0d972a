"""8-bit Adam of bitsandbytes: v_i = qmap2[state2_i] * absmax2[i // block].

A block has 256 elements since bitsandbytes 0.44, 2048 before. Parameters below 4096 elements, and embeddings
where the Trainer says so, keep state2 in float32.
"""

from __future__ import annotations

import numpy as np

from ...errors import InputError
from .state import State
from .values import Values

# bitsandbytes nests the tensors of a state under this key, where FSDP does not look for tensors to gather.
NESTED = "__bnb_optimizer_quant_state__"
_BLOCKS = (256, 2048)
_CODES = 256


def shape(state: State) -> tuple[int, ...]:
    return state.shape("state2")


def values(state: State) -> Values:
    """Raises InputError for a state that is not quantized in blocks, or whose parts do not fit."""
    stored = state.values("state2", ("uint8", "float32"))
    return stored if state.dtype("state2") == "float32" else _decoded(state, stored)


def _decoded(state: State, codes: Values) -> Values:
    if "absmax2" not in state:
        raise InputError(f"{state.where}: has no absmax2: only 8-bit states quantized in blocks can be read")
    maxima = state.values("absmax2", ("float32",)).all()
    table = state.values("qmap2", ("float32",)).all()
    if table.size != _CODES:
        raise InputError(f"{state.where}: qmap2 has {table.size} values, not {_CODES}")
    size = _block_size(state, codes.numel, maxima.size)

    def decode(start: int, stop: int) -> np.ndarray:
        blocks = np.arange(start // size, -(-stop // size))
        first = start - blocks[0] * size if blocks.size else 0
        scales = np.repeat(maxima[blocks], size)[first : first + stop - start]
        return table[codes.read(start, stop).astype(np.intp)] * scales

    return Values(codes.numel, decode, codes.cuts)


def _block_size(state: State, numel: int, blocks: int) -> int:
    for size in _BLOCKS:
        if -(-numel // size) == blocks:
            return size
    raise InputError(
        f"{state.where}: {blocks} values of absmax2 do not divide {numel} elements into blocks of "
        f"{' or '.join(map(str, _BLOCKS))}"
    )
