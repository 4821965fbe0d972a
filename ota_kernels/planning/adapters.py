"""A model with a LoRA adapter on it: W + s B A, computed in the tile; nothing of it is written anywhere.

W' = W + s B A         s = alpha / r, with rsLoRA alpha / sqrt(r); [m, n] = [m, n] + [m, r] [r, n]
W' = W + s (B A)^T     embeddings (A: [r, vocabulary]), and layers that store W transposed (fan_in_fan_out)
W' = m_i (W + s B A)_i / ||(W + s B A)_i||     DoRA (arXiv 2402.09353): each row i has the length m_i
W' = the adapter's own tensor: modules_to_save, biases, and `base_layer` before its B A is added
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from ..io.adapter import AdapterFile, AdapterTensor
from ..io.header import quoted
from ..io.pages import advise
from ..tensors.buffer import Buffer
from ..tensors.computed import Computed, Source
from ..tensors.dtypes import BY_NAME
from .models import Info, Model

_MAGNITUDE = "lora_magnitude_vector"
_KINDS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", _MAGNITUDE)
# Settings of LoRA that change what the weights are, and that are not computed here.
_REFUSED = {
    "use_qalora": "QALoRA",
    "layer_replication": "layer_replication",
    "target_parameters": "target_parameters",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
}
# These change the weights of the model when they are loaded; what is left beside them is no W of a
# checkpoint.
_REFUSED_STARTS = ("pissa", "olora", "corda", "loftq")
_BLOCK = 64  # rows of a product: every tile asks for whole blocks, so that all see the same bits
_CACHED = 16  # pairs of factors that are held as floats at a time


class Change(NamedTuple):
    """What an adapter does to one tensor. own: the tensor that replaces it; a, b: keys of its factors, None
    without; scale: s; transposed: whether (B A)^T is added; bias: the key of what is added to a bias;
    magnitude: that of the lengths of rows."""

    own: str | None = None
    a: str | None = None
    b: str | None = None
    scale: float = 1.0
    transposed: bool = False
    bias: str | None = None
    magnitude: str | None = None


class Adapted:
    """A Model: another one with an adapter on it. label: what errors call both; rounded: the torch name of a
    type that W' is rounded to, None for not at all."""

    def __init__(self, model: Model, adapter: AdapterFile, label: str, rounded: str | None = None) -> None:
        self.label, self._model, self._adapter, self.rounded = label, model, adapter, rounded
        self.config = model.config
        self.tied_embeddings = model.tied_embeddings
        self._where = f"{adapter.label}: {adapter.folder}"
        self._changes = changes(adapter, model.tensors)
        self.tensors: dict[str, Info] = {}
        for name, info in model.tensors.items():
            self.tensors[name] = Info(tuple(info.shape), info.dtype)
        for name, change in self._changes.items():
            if change.own is not None:
                found = adapter.tensors[change.own]
                self.tensors[name] = Info(found.shape, found.buffer.dtype)
            self._check(name, change)
        self.factors = functools.lru_cache(_CACHED)(self._factors)

    def _check(self, name: str, change: Change) -> None:
        info = self.tensors[name]
        if not info.dtype.is_float or info.dtype.itemsize < 2:
            raise InputError(
                f"{self._where}: {name} is {info.dtype.name}, onto which no adapter can be added"
            )
        if change.a is not None:
            a, b = (self._adapter.tensors[key].shape for key in (change.a, change.b))
            shape = (b[0], math.prod(a[1:]))
            shape = shape[::-1] if change.transposed else shape
            if len(info.shape) < 2 or shape != (info.shape[0], math.prod(info.shape[1:])):
                raise InputError(
                    f"{self._where}: B A for {name} has shape {list(shape)}, the tensor {list(info.shape)}: "
                    "the adapter is of another model"
                )
        if change.bias is not None and self._adapter.tensors[change.bias].shape != info.shape:
            raise InputError(f"{self._where}: the bias for {name} has another shape than {list(info.shape)}")
        if change.magnitude is not None and self._numel(change.magnitude) != info.shape[0]:
            raise InputError(
                f"{self._where}: DoRA's magnitude for {name} has {self._numel(change.magnitude)} elements, "
                f"the tensor {info.shape[0]} rows"
            )

    def _numel(self, key: str) -> int:
        return math.prod(self._adapter.tensors[key].shape)

    def _factors(self, a: str, b: str, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        """[r, n] and [m, r]."""
        return tuple(factor(self._adapter.tensors[key], dtype) for key in (a, b))

    def source(self, name: str, stands_for: str | None = None) -> Source:
        change = self._changes.get(name)
        if change is None:
            return self._model.source(name)
        own = change.own
        stored = self._model.source(name) if own is None else self._adapter.tensors[own].buffer
        if change.a is None and change.bias is None:
            return stored
        return Adapting(self, name, stored, change)

    def vector(self, key: str, dtype: str) -> np.ndarray:
        """A vector of the adapter."""
        return _values(self._adapter.tensors[key].buffer, dtype)

    def buffers(self, change: Change) -> Iterator[Buffer]:
        """What of the adapter a change reads."""
        for key in (change.a, change.b, change.bias, change.magnitude):
            if key is not None:
                yield self._adapter.tensors[key].buffer

    def bytes_per_element(self, name: str) -> int:
        return self.tensors[name].dtype.itemsize

    def what(self, name: str) -> str:
        return f"{self.label}: {name}"

    def fingerprint(self) -> list:
        return [self._model.fingerprint(), self._adapter.fingerprint()]

    def close(self) -> None:
        self.factors.cache_clear()
        self._adapter.close()
        self._model.close()


class Adapting(Computed):
    """One tensor of a model with an adapter on it; float32, or float64 where it is stored so."""

    def __init__(self, model: Adapted, name: str, stored: Source, change: Change) -> None:
        info = model.tensors[name]
        dtype = "float64" if info.dtype.name == "float64" else "float32"
        super().__init__(info.shape, BY_NAME[dtype], model.what(name), info.dtype.itemsize)
        self._model, self._stored, self._change = model, stored, change
        self._scale = np.dtype(dtype).type(change.scale)

    def rows(self, first: int, stop: int) -> np.ndarray:
        stored = self._stored.slice(first * self.columns, stop * self.columns)
        values = _values(stored, self.dtype.name).reshape(stop - first, self.columns)
        advise(stored.data, "dontneed")
        if self._change.bias is not None:
            values += self._scale * self._model.vector(self._change.bias, self.dtype.name)[first:stop, None]
            return round_to(values, self._model.rounded)
        for begin in range(first // _BLOCK * _BLOCK, stop, _BLOCK):
            block = self._product(begin, min(begin + _BLOCK, self.shape[0]))
            low, high = max(first, begin), min(stop, begin + _BLOCK)
            values[low - first : high - first] += block[low - begin : high - begin]
        if self._change.magnitude is not None:
            lengths = np.sqrt(np.square(values, dtype=np.float64).sum(axis=1, keepdims=True))
            magnitude = self._model.vector(self._change.magnitude, "float64")[first:stop, None]
            # A row of zeros has no direction: what is not finite then is told where it is merged.
            with np.errstate(divide="ignore", invalid="ignore"):
                values *= magnitude / lengths
        return round_to(values, self._model.rounded)

    def _product(self, first: int, stop: int) -> np.ndarray:
        """Rows of s B A, or of its transpose."""
        a, b = self._model.factors(self._change.a, self._change.b, self.dtype.name)
        product = a[:, first:stop].T @ b.T if self._change.transposed else b[first:stop] @ a
        product *= self._scale
        return product

    def parts(self, first: int, stop: int) -> Iterator[Buffer]:
        yield self._stored.slice(first * self.columns, stop * self.columns)
        yield from self._model.buffers(self._change)


def _values(buffer: Buffer, dtype: str) -> np.ndarray:
    """Elements as float32 or float64, a copy."""
    if buffer.dtype.name == "float64":
        return buffer.data.copy().view(np.float64).astype(dtype)
    return np.array(buffer.float32(), dtype)


def round_to(values: np.ndarray, dtype: str | None) -> np.ndarray:
    """float32 or float64 values in their own type, rounded to another one (to nearest, ties to even)."""
    if dtype is None:
        return values
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return values.astype(dtype).astype(values.dtype)
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(values), rounded.view(np.float32), values).astype(values.dtype)


def factor(tensor: AdapterTensor, dtype: str) -> np.ndarray:
    """A or B as a matrix: float32 or float64 of [first axis, all others]."""
    return _values(tensor.buffer, dtype).reshape(tensor.shape[0], -1)


# What an adapter changes


def changes(adapter: AdapterFile, model: Mapping[str, Info]) -> dict[str, Change]:
    """By the model's names. InputError for another kind of adapter, an adapter of another model, or a tensor
    that is not understood."""
    where = f"{adapter.label}: {adapter.folder}"
    _check_kind(adapter.config, where)
    modules: dict[str, dict[str, str]] = {}
    found: dict[str, Change] = {}
    for key in adapter.tensors:
        module, kind, rest = _taken_apart(key)
        if kind in _KINDS and rest in ("", "weight"):
            modules.setdefault(module, {})[kind] = key
        elif kind == "lora_B" and rest == "bias":
            modules.setdefault(module, {})["bias"] = key
        elif kind == "base_layer" and rest in ("weight", "bias") and f"{module}.{rest}" in model:
            found[f"{module}.{rest}"] = Change(own=key)
        elif kind is None and key in model:
            found[key] = Change(own=key)
        else:
            raise InputError(f"{where}: holds {quoted(key)}, which is no LoRA weight or tensor of the model")
    for module, keys in modules.items():
        _add_module(found, module, keys, adapter, model)
    return found


def _taken_apart(key: str) -> tuple[str, str | None, str]:
    """(module, kind, the rest) of a key like `model.layers.0.q_proj.lora_A.weight`."""
    match = re.fullmatch(r"(.+?)\.(lora_\w+|base_layer)(?:\.(.*))?", key)
    return (key, None, "") if match is None else (match[1], match[2], match[3] or "")


def _check_kind(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("peft_type")
    if str(kind).upper() != "LORA":
        raise InputError(f"{where}: is an adapter of the kind {quoted(kind)}; only LoRA can be merged")
    for key, name in _REFUSED.items():
        if config.get(key):
            raise InputError(
                f"{where}: uses {name} (`{key}`), which is not supported: merge the adapter with PEFT first"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REFUSED_STARTS):
        raise InputError(
            f"{where}: was started by {start} (`init_lora_weights`), which changes the model's own weights: "
            "convert it with PEFT first"
        )


def _add_module(
    found: dict[str, Change],
    module: str,
    keys: Mapping[str, str],
    adapter: AdapterFile,
    model: Mapping[str, Info],
) -> None:
    where = f"{adapter.label}: {adapter.folder}"
    embedding = "lora_embedding_A" in keys or "lora_embedding_B" in keys
    a, b = (keys.get(f"lora_{'embedding_' if embedding else ''}{side}") for side in "AB")
    if a is None or b is None:
        raise InputError(f"{where}: {module} has one of the two factors of its LoRA only")
    name = f"{module}.weight"
    if name not in model:
        raise InputError(
            f"{where}: changes {module}, which the model does not have as a tensor of its own: the adapter "
            "is of another model, or of an output matrix that is tied to the embeddings"
        )
    shapes = adapter.tensors[a].shape, adapter.tensors[b].shape
    rank = shapes[0][0] if shapes[0] else 0
    if min(map(len, shapes)) < 2 or math.prod(shapes[1][1:]) != rank:
        raise InputError(
            f"{where}: the factors of {module} have shapes {list(shapes[0])} and {list(shapes[1])}"
        )
    scale = _scale(adapter.config, module, rank, where)
    transposed = embedding or bool(adapter.config.get("fan_in_fan_out"))
    magnitude = keys.get(_MAGNITUDE)
    if bool(adapter.config.get("use_dora")) != (magnitude is not None):
        raise InputError(f"{where}: {module} and `use_dora` do not agree whether there is a {_MAGNITUDE}")
    if magnitude is not None and transposed:
        raise InputError(
            f"{where}: {module} has DoRA on an embedding or a transposed weight, which is not supported: "
            "merge the adapter with PEFT first"
        )
    own = found[name].own if name in found else None
    found[name] = Change(own, a, b, scale, transposed, magnitude=magnitude)
    if "bias" in keys:
        bias = f"{module}.bias"
        if bias not in model:
            raise InputError(f"{where}: adds a bias to {module}, which has none in the model")
        own = found[bias].own if bias in found else None
        found[bias] = Change(own, scale=scale, bias=keys["bias"])


def _scale(config: Mapping[str, Any], module: str, rank: int, where: str) -> float:
    said = _pattern(config.get("rank_pattern"), module, config.get("r"))
    if said != rank:
        raise InputError(f"{where}: {module} has rank {rank}, but adapter_config.json says {quoted(said)}")
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise InputError(f"{where}: lora_alpha of {module} is {quoted(alpha)}, not a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that the module's name ends in, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        try:
            fits = re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module) is not None
        except re.error:
            fits = module == pattern or module.endswith(f".{pattern}")
        if fits:
            return value
    return default
