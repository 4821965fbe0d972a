"""Tensors that no optimizer trained, and tensors that only some models have: what is written for them.

A position table, a mask or a counter is not the mean of several: it is taken from one model, bit for bit and
in its own type, where the models agree, and refused where they do not. The same for files and dictionaries.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from ..io.float8 import code_values
from ..tensors.array import host
from ..tensors.dtypes import DType
from .tied import are_equal

# What happens to a tensor.
MERGE, TAKE, AVERAGE, DROP, MISSING = "merge", "take", "average", "drop", "missing"

# Kinds of buffers. A module computes FIXED ones when it is built, so models of one kind have equal ones; what
# CONSTANTS are called, parameters are called too; STATISTICS are means of activations; EMA: a second copy of
# the weights.
FIXED, CONSTANT, COUNTER, STATISTICS, EMA = "fixed", "constant", "counter", "statistics", "ema"
_KINDS = (
    (EMA, re.compile(r"(^|\.)(model_ema|ema_model|ema)\.|(^|\.)ema$")),
    (COUNTER, re.compile(r"(^|\.)(num_batches_tracked|num_updates|n_averaged|global_step)$")),
    (STATISTICS, re.compile(r"(^|\.)running_(mean|var)$")),
    (
        FIXED,
        re.compile(
            r"(^|\.)(\w*inv_freq|cos_cache|sin_cache|(cos|sin)_cached|(freqs_)?(cos|sin)|freqs_cis"
            r"|position_ids|position_index|relative_position_index|masked_bias|attn_mask|attention_mask"
            r"|causal_mask|embed_positions\._float_tensor)$"
        ),
    ),
    (
        CONSTANT,
        re.compile(
            r"(^|\.)(freqs|token_type_ids|mask|\w+_mask|tril|triu|relative_coords_table|mel_filters|window"
            r"|betas|sigmas|(in|out)put_(min|max)|alphas_cumprod\w*|sqrt_\w*alphas_cumprod\w*|rotary_emb\.\w+)$"
        ),
    ),
)
_ATTENTION_BIAS = re.compile(r"(^|\.)attn\.bias$")  # GPT-2's causal mask, [1, 1, n, n]
_ANY = re.compile("|".join(pattern.pattern for _, pattern in _KINDS) + "|" + _ATTENTION_BIAS.pattern)
_MASK_FLOOR = -3e4  # float16 has no -1e9: below this, masks mask

_STEP = 1 << 22  # elements of an average held at once


@dataclass(frozen=True)
class Held:
    """A tensor as one model has it. read: its bytes, uint8[n], in host memory."""

    label: str
    dtype: DType
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Choice:
    """What is written. taken: of TAKE, whose tensor; dtype: of MERGE and AVERAGE, the type that is written
    whatever the recipe says, None to follow it; reason: why, where a user should know."""

    action: str
    taken: int | None = None
    dtype: DType | None = None
    reason: str = ""


PLAIN = Choice(MERGE)  # of a parameter that all models have


def held_of(part: Any) -> Held:
    """A Part (planning/outputs.py), which is read only where it is a buffer."""
    source = part.source
    shape = tuple(part.model.tensors[part.name].shape)
    return Held(part.model.label, source.dtype, shape, lambda: host(source.slice(0, len(source)).data))


def kind_of(name: str, shape: tuple[int, ...] = ()) -> str | None:
    """Which kind of buffer a tensor is by its name (and shape), None for a parameter."""
    if not may_be_buffer(name):
        return None
    if _ATTENTION_BIAS.search(name):
        return FIXED if len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3] else None
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), None)


def needs_no_curvature(name: str, shape: tuple[int, ...] = ()) -> bool:
    """Whether no optimizer has second moments of the tensor."""
    return kind_of(name, shape) is not None


def may_be_buffer(name: str) -> bool:
    """Whether `kind_of` could know the tensor, whatever its shape."""
    return _may_end(".".join(name.rsplit(".", 2)[-2:])) or ("ema" in name and _ANY.search(name) is not None)


@functools.cache
def _may_end(tail: str) -> bool:
    """`may_be_buffer` by the last two modules of a name, of which a model has few."""
    return _ANY.search(tail) is not None


def written_type(name: str, shape: tuple[int, ...], dtypes: Sequence[DType]) -> DType | None:
    """The type in which a buffer is written whatever the recipe says: integers if some model stores them,
    else the widest; None where the recipe decides."""
    if kind_of(name, shape) not in (FIXED, CONSTANT, COUNTER):
        return None
    return _best(dtypes)[1]


def _best(dtypes: Sequence[DType]) -> tuple[int, DType]:
    """(index, type) of the first integer type, else of the first of the widest ones."""
    return min(enumerate(dtypes), key=lambda pair: (pair[1].is_float, -pair[1].itemsize * pair[1].is_float))


def choose(name: str, held: Sequence[Held | None], policy: str = "error", has_base: bool = False) -> Choice:
    """What is written for a tensor. held: as each model has it, None where one lacks it, the base first if
    there is one; policy: `extra_tensors`. MISSING: an error, which the caller words.

    Raises InputError for a fixed buffer that differs between models.
    """
    present = [t for t, one in enumerate(held) if one is not None]
    if len(present) < len(held):
        return _extra(name, held, present, policy)
    kind = kind_of(name, held[0].shape)
    if kind not in (FIXED, CONSTANT, COUNTER) or len({one.shape for one in held}) > 1:
        return PLAIN
    dtypes = [one.dtype for one in held]
    data = [one.read() for one in held]
    if len(set(dtypes)) == 1 and all(are_equal(data[0], other) for other in data[1:]):
        return Choice(TAKE, 0)
    values = [as_float64(d, dtype) for d, dtype in zip(data, dtypes, strict=True)]
    if kind == COUNTER:
        newest = 0 if has_base else int(np.argmax([v.max(initial=0) for v in values]))
        whose = "the base" if has_base else "the newest"
        return Choice(TAKE, newest, reason=f"counters: those of {held[newest].label}, {whose}")
    taken, dtype = _best(dtypes)
    far = next((t for t in range(len(held)) if not _agree(values[t], values[taken], dtypes[t])), None)
    if far is None:
        return Choice(
            TAKE, taken, reason=f"buffers that differ by rounding or type: those of {held[taken].label}"
        )
    if kind == FIXED or not all(d.is_float for d in dtypes):
        raise InputError(
            f"{name}: a buffer that no training changes differs between {held[taken].label} and "
            f"{held[far].label}: the models are built differently; give models of one kind, or remove it "
            "from their files where it is computed anyway"
        )
    return Choice(MERGE, dtype=dtype)


def _extra(name: str, held: Sequence[Held | None], present: list[int], policy: str) -> Choice:
    """Of a tensor that some models lack."""
    first = held[present[0]]
    kind = kind_of(name, first.shape)
    lacking = "the others lack them" if len(held) > 2 or len(present) > 1 else "the other model lacks them"
    if policy == "error":
        if kind == EMA:
            return Choice(DROP, reason="copies of the weights that only some models have: left out")
        if kind in (FIXED, CONSTANT, COUNTER):
            return Choice(TAKE, present[0], reason=f"buffers taken from {first.label}: {lacking}")
        return Choice(MISSING)
    if policy == "drop":
        return Choice(DROP, reason="tensors that only some models have: left out (extra_tensors: drop)")
    if policy == "take" or kind in (FIXED, CONSTANT, COUNTER) or not first.dtype.is_float:
        return Choice(
            TAKE, present[0], reason=f"tensors taken from {first.label}: {lacking} (extra_tensors: {policy})"
        )
    owners = [held[t] for t in present]
    if len({one.shape for one in owners}) > 1 or not all(one.dtype.is_float for one in owners):
        return Choice(MISSING)
    return Choice(AVERAGE, reason="tensors that only some models have: their mean (extra_tensors: average)")


def _agree(values: np.ndarray, others: np.ndarray, dtype: DType) -> bool:
    """Whether values are the others as the type that they are stored in rounds them."""
    if not dtype.is_float:
        return bool(np.array_equal(values, others))
    bits = {"float64": 24, "float32": 17, "float16": 10, "bfloat16": 7, "float8_e4m3fn": 3, "float8_e5m2": 2}
    with np.errstate(invalid="ignore"):
        one, other = np.maximum(values, _MASK_FLOOR), np.maximum(others, _MASK_FLOOR)
    return bool(np.allclose(one, other, rtol=2.0 ** -bits[dtype.name], atol=6e-8, equal_nan=True))


def as_float64(data: np.ndarray, dtype: DType) -> np.ndarray:
    """Elements (bytes, uint8[n]) of any type as float64."""
    data = np.ascontiguousarray(data)
    if dtype.name == "bfloat16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype.name in ("float8_e4m3fn", "float8_e5m2"):
        return code_values(dtype.name)[data].astype(np.float64)
    if dtype.name == "float8_e8m0fnu":
        return np.ldexp(1.0, data.astype(np.int64) - 127)
    return data.view(dtype.name).astype(np.float64)


def average(tensors: Sequence[tuple[np.ndarray, DType]], out: DType) -> np.ndarray:
    """The mean of tensors (bytes and type), rounded once to the type `out`: bytes, uint8[n]."""
    numel = len(tensors[0][0]) // tensors[0][1].itemsize
    pieces = []
    for start in range(0, max(numel, 1), _STEP):
        total = 0.0
        for data, dtype in tensors:
            size = dtype.itemsize
            total = total + as_float64(data[start * size : (start + _STEP) * size], dtype)
        pieces.append(_rounded(total / len(tensors), out))
    return np.concatenate(pieces)


def _rounded(values: np.ndarray, out: DType) -> np.ndarray:
    with np.errstate(over="ignore"):
        if out.name != "bfloat16":
            return values.astype(out.name).view(np.uint8)
        single = values.astype(np.float32)
        # To odd: the last bit says that something was cut off, so that the second rounding is the only one.
        beyond = np.abs(single.astype(np.float64)) > np.abs(values)
        single = np.where(beyond, np.nextafter(single, np.float32(0)), single)
        inexact = (single.astype(np.float64) != values) & np.isfinite(values)
        bits = single.view(np.uint32) | inexact.astype(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16).view(np.uint8)
