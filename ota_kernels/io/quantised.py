"""Whether a model's tensors are codes of a quantisation, told by names, types and configuration.

Codes averaged as numbers are a wrong model that looks right. float8 with scales can be dequantised exactly
(`float8.py`); other formats are known by name only, so that they can be refused by it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..tensors.dtypes import DType
from .table import Table

CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")

_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
_INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
_DEFAULT_BLOCK = 128  # DeepSeek's, and what transformers takes where the configuration does not say

# Formats that are refused: what names of their tensors end in, all of which must be there.
_FORMATS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("bitsandbytes 4-bit", ("bitsandbytes__nf4",)),
    ("bitsandbytes 4-bit", ("bitsandbytes__fp4",)),
    ("bitsandbytes 4-bit", (".absmax", ".quant_map")),
    ("bitsandbytes 8-bit", (".SCB",)),
    ("GPTQ", (".qweight", ".g_idx")),
    ("GPTQ or AWQ", (".qweight", ".qzeros")),
    ("GPTQ or AWQ", (".qweight", ".scales")),
    ("MXFP4", ("_blocks", "_scales")),
    ("NVFP4", (".weight_scale_2",)),
    ("compressed-tensors", (".weight_packed",)),
    ("AQLM", (".codebooks", ".codes")),
    ("VPTQ", (".centroids.weight", ".indices")),
    ("QuIP#", (".Qidxs",)),
    ("HQQ", (".W_q",)),
    ("Quanto", (".weight._data", ".weight._scale")),
    ("MLX", (".scales", ".biases")),
)
_ENDS = tuple({end for _, ends in _FORMATS for end in ends})
# Beside float8 weights; they go when the weights are dequantised.
_SCALE_ENDS = (("weight", "weight_scale_inv"), ("weight", "weight_scale"), ("weight", "scale_weight"))
_SCALE_ENDS += (("weight", "qscale_weight"), ("", "_scale_inv"), ("", "_scale"))
_HELPER = re.compile(
    r"(^|[._])(input_scale|scale_input|input_scale_ub|input_activation_scale|activation_scale|qscale_act"
    r"|k_scale|v_scale|q_scale|kv_scale|scaled_fp8|comfy_quant)$"
)
# Types of quantised weights that nothing here reads: elements that are parts of a byte, or unknown.
FOREIGN_TAGS = {
    "F4": "4-bit floats (MXFP4 or NVFP4)",
    "F6_E2M3": "6-bit floats (MXFP6)",
    "F6_E3M2": "6-bit floats (MXFP6)",
    "I4": "4-bit integers",
    "U4": "4-bit integers",
}
_ADVICE = (
    "codes cannot be merged: give the model in 16 or 32 bits that they were made from, or dequantise first"
)


@dataclass(frozen=True)
class Scaled:
    """The scales of one float8 tensor: weights = codes x scales. name: of the scales; block: elements along
    each axis that share a scale."""

    name: str
    block: tuple[int, ...]


@dataclass(frozen=True)
class Quantised:
    """How a model is quantised.

    format: its name; evidence: what it was told by; scaled: float8 tensors that can be dequantised, by name;
    helpers: tensors that mean nothing without the codes. Only where `scaled` is not empty can it be merged.
    """

    format: str
    evidence: str
    scaled: dict[str, Scaled] = field(default_factory=dict)
    helpers: frozenset[str] = frozenset()

    @property
    def note(self) -> str:
        """What a plan and a report say where the tensors are dequantised."""
        return (
            f"{self.format} is read as weights, code x scale, and written without scales: {len(self.scaled)} "
            f"tensors; {len(self.helpers)} scales and markers go"
        )

    def __str__(self) -> str:
        return f"quantised: {self.format} ({self.evidence})"


def quantisation_of(model: Any) -> Quantised | None:
    """How the tensors of a model (`tensors`: a Table; `config`) are quantised; None where
    they are plain numbers, whatever the configuration says."""
    method = method_in_config(model.config)
    ending = model.tensors.say(_ending)
    for name, ends in _FORMATS if ending else ():
        found = [next((n for n in ending if n.endswith(end)), None) for end in ends]
        if all(found) and _are_codes(found, model.tensors):
            return Quantised(_refined(name, method), _evidence(found, method))
    for foreign in _of_types(model.tensors, lambda dtype: bool(dtype.bits)):
        tag = model.tensors[foreign].dtype.tag
        return Quantised(FOREIGN_TAGS[tag], f"{foreign!r} is of type {tag}")
    floats = _of_types(model.tensors, lambda dtype: dtype.name in _FLOAT8)
    scaled = _scaled_float8(model, floats)
    if scaled:
        helpers = {s.name for s in scaled.values()} | {n for n in model.tensors if _HELPER.search(n)}
        first = next(iter(scaled))
        more = f" and {len(scaled) - 1} more like it" if len(scaled) > 1 else ""
        evidence = f"{first} with {scaled[first].name}{more}"
        return Quantised("float8 with scales", evidence, scaled, frozenset(helpers))
    lonely = next((n for n in model.tensors if n.endswith(("weight_scale", "weight_scale_inv"))), None)
    if lonely is not None and method is not None:
        return Quantised(method, f"{lonely}, quant_method in config.json")
    if floats and method is not None:
        return Quantised(method, f"{floats[0]} is float8 and has no scale, quant_method in config.json")
    integers = _of_types(model.tensors, lambda dtype: dtype.name in _INTEGERS)
    codes = [name for name in integers if name.endswith("weight")]
    if codes and (method is not None or any(len(model.tensors[n].shape) >= 2 for n in codes)):
        dtype = model.tensors[codes[0]].dtype.name
        return Quantised(method or f"{dtype} weights", f"{codes[0]} is {dtype}")
    return None


def _ending(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.endswith(_ENDS)]


def _of_types(tensors: Table, wanted: Callable[[DType], bool]) -> list[str]:
    """The names of the tensors of some types, which most models have none of."""
    types = set(filter(wanted, tensors.types))
    return [name for name, info in tensors.items() if info.dtype in types] if types else []


def refuse_quantised(label: str, found: Quantised) -> InputError:
    """The error about a quantised model."""
    return InputError(f"{label}: is {found}: {_ADVICE}")


def method_in_config(config: Mapping[str, Any] | None) -> str | None:
    """The quantisation that config.json claims, in nested configurations too: "fp8", "gptq", ..."""
    for section in _claims(config or {}):
        for key in ("quant_method", "quant_algo", "quant_type", "format"):
            if isinstance(section.get(key), str):
                return section[key]
        if section.get("load_in_4bit") or section.get("load_in_8bit"):
            return "bitsandbytes"
        if "bits" in section:
            return f"{section['bits']}-bit"
        return "of an unnamed method"
    return None


def _claims(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            if key in CONFIG_KEYS:
                yield value
            else:
                yield from _claims(value)


def without_claims(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration, nested ones too, without what claims a quantisation."""
    kept = {k: v for k, v in config.items() if not (k in CONFIG_KEYS and isinstance(v, Mapping | None))}
    return {key: without_claims(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _are_codes(found: list[str], tensors: Mapping[str, Any]) -> bool:
    """Names like `_scales` or `.indices` also occur in models that are not quantised; integers beside them do
    not."""
    named = any(name.endswith((".SCB", ".absmax", "weight_scale_2", "._data")) for name in found)
    stem = found[0].rpartition(".")[0]
    near = (n for n in tensors if n == f"{stem}.weight" or n in found)
    return named or any(tensors[n].dtype.name in _INTEGERS for n in near)


def _refined(name: str, method: str | None) -> str:
    """A format that names leave open, as the configuration calls it."""
    if name == "GPTQ or AWQ" and method in ("gptq", "awq"):
        return method.upper()
    return f"{name} ({method})" if name == "compressed-tensors" and method not in (None, name) else name


def _evidence(found: list[str | None], method: str | None) -> str:
    said = f"; config.json says {method}" if method else ""
    return f"{', '.join(name for name in found if name)}{said}"


def _scaled_float8(model: Any, names: Iterable[str]) -> dict[str, Scaled]:
    blocks = _block_of(model.config)
    found = {}
    for name in names:
        info = model.tensors[name]
        for own, end in _SCALE_ENDS:
            scale = name.removesuffix(own) + end if name.endswith(own) else None
            if scale in model.tensors:
                block = block_shape(info.shape, model.tensors[scale].shape, blocks)
                if block is None:
                    shapes = f"{list(info.shape)} with scales {list(model.tensors[scale].shape)}"
                    raise InputError(f"{model.label}: {scale} does not fit {name} ({shapes}): {_ADVICE}")
                found[name] = Scaled(scale, block)
                break
    return found


def _block_of(config: Mapping[str, Any] | None) -> tuple[int, ...] | None:
    for section in _claims(config or {}):
        block = section.get("weight_block_size")
        if isinstance(block, list) and all(type(size) is int and size > 0 for size in block):
            return tuple(block)
    return None


def block_shape(
    shape: tuple[int, ...], scales: tuple[int, ...], said: tuple[int, ...] | None = None
) -> tuple[int, ...] | None:
    """Elements along each axis of a tensor that share a scale; None where the scales do not fit.

    scales: a scalar, one per row, or as many axes as the tensor has. said: the last axes' blocks, as
    config.json has them; without it 128 where that fits, else the exact quotient.
    """
    if math.prod(scales) == 1:
        return tuple(shape)
    if len(scales) == 1 and len(shape) > 1 and scales[0] == shape[0]:
        scales = (scales[0],) + (1,) * (len(shape) - 1)
    if len(scales) != len(shape) or 0 in scales:
        return None
    given = (None,) * (len(shape) - len(said or ())) + (said or ())
    block = []
    for size, count, asked in zip(shape, scales, given[-len(shape) :], strict=True):
        if count == size or count == 1:
            block.append(size // count)
            continue
        options = [asked] if asked else [_DEFAULT_BLOCK, -(-size // count)]
        fitting = [b for b in options if -(-size // b) == count]
        if not fitting:
            return None
        block.append(fitting[0])
    return tuple(block)
