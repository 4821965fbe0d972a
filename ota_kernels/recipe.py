"""mergekit's YAML schema, read into one frozen Recipe. What is unknown or out of range raises RecipeError."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from . import methods
from .dtypes import OUTPUT_NAMES
from .errors import RecipeError
from .methods import Method

MAX_MODELS = 64

# The longest published recipe has 2 KB; the limit keeps a mistyped path to a checkpoint from being read.
_MAX_FILE_BYTES = 1 << 20

_FLOAT32_MAX = (2 - 2**-23) * 2.0**127

# YAML 1.1 reads 1e-26 (no dot) as a string.
_NUMBER_TEXT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100

_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}

_TOP_KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer_source")
_MODEL_KEYS = ("model", "parameters")
_UNSUPPORTED_TOP_KEYS = {
    "slices": "layers cannot be restacked here; list whole models under `models`",
    "modules": "parts cannot be merged apart here; list whole models under `models`",
    "chat_template": "remove it; the chat template is copied from the model that `tokenizer_source` names",
    "tokenizer": "vocabularies cannot be rebuilt here; use `tokenizer_source`",
    "name": "remove it; the output folder names the merge",
}

_NO_EFFECT = {
    "int8_mask": "it saved memory in other tools",
    "embed_slerp": "no tool reads it",
}

# Of each group a model may have one; what a model says itself replaces the whole group of the global default.
_EXCLUSIVE = (("precond_threshold", "density", "saliency_mass"), ("rank", "rank1_approx"))


@dataclass(frozen=True)
class _Kind:
    """A kind of value: what is allowed in words, and a parser that raises ValueError on anything else."""

    allowed: str
    parse: Callable[[Any], Any]


def _parse_number(value: Any) -> float:
    if isinstance(value, str) and _NUMBER_TEXT.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError
    number = float(value)
    if not abs(number) <= _FLOAT32_MAX:  # NaN compares false
        raise ValueError
    return number


def _number(
    allowed: str, above: float = -math.inf, at_least: float = -math.inf, at_most: float = math.inf
) -> _Kind:
    def parse(value: Any) -> float:
        number = _parse_number(value)
        if not (above < number and at_least <= number <= at_most):
            raise ValueError
        return number

    return _Kind(allowed, parse)


def _parse_positive_integer(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch("[0-9]+", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError
    return int(value)


def _parse_switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _parse_text(value: Any) -> str:
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value


def _choice(*options: str) -> _Kind:
    def parse(value: Any) -> str:
        if not isinstance(value, str) or value not in options:
            raise ValueError
        return value

    return _Kind(f"{', '.join(options[:-1])} or {options[-1]}", parse)


def _parse_dtype(value: Any) -> str | None:
    name = _DTYPE_ALIASES.get(_parse_text(value), value)
    if name == "auto":
        return None
    if name not in OUTPUT_NAMES:
        raise ValueError
    return name


_FINITE = _number("a finite float32 number")
_NOT_NEGATIVE = _number("a number >= 0", at_least=0)
_POSITIVE = _number("a number > 0", above=0)
_SHARE = _number("a number in [0, 1]", at_least=0, at_most=1)
_POSITIVE_INTEGER = _Kind("an integer >= 1", _parse_positive_integer)
_SWITCH = _Kind("true or false", _parse_switch)
_TEXT = _Kind("a path or name (text)", _parse_text)
_DTYPE = _Kind(f"{', '.join(OUTPUT_NAMES)} or auto", _parse_dtype)


def _parameter(default: Any, kind: _Kind, text: str, key: str | None = None) -> Any:
    """A dataclass field that declares a recipe key: default, allowed values, help, and its YAML name."""
    return dataclasses.field(default=default, metadata={"kind": kind, "help": text, "key": key})


@dataclass(frozen=True)
class Parameters:
    """What holds for the whole merge: the recipe's global `parameters`."""

    epsilon: float = _parameter(1e-26, _NOT_NEGATIVE, "eps, added to each weight P_t")
    normalise: str = _parameter(
        "none",
        _choice("none", "global", "model"),
        "n: divide g_t * h_t^p by its mean over the tensor (global) or over the whole model (model)",
    )
    power: float = _parameter(0.5, _POSITIVE, "p, the exponent of the curvature")
    lambda_: float = _parameter(1.0, _FINITE, "the factor of the merged task vector", key="lambda")
    fallback_to_base: bool = _parameter(
        True, _SWITCH, "an element that no expert keeps takes the base's value; false: the experts' mean"
    )
    density_scope: str = _parameter(
        "model",
        _choice("model", "tensor"),
        "`density` and `saliency_mass` count over the model or each tensor",
    )
    mask_weights: bool = _parameter(
        True, _SWITCH, "masked experts leave the denominator too; false: their weights stay in it"
    )
    masked_task_vector_merge_method: str = _parameter(
        "precond",
        _choice("precond", "linear", "ties"),
        "how masked task vectors are combined: by curvature, by mean, or by TIES",
    )
    ties_density: float = _parameter(1.0, _SHARE, "the share that the ties variant keeps when it trims")
    rescale: bool = _parameter(False, _SWITCH, "scale masked task vectors back to the norm they had")
    approximate_norm: bool = _parameter(False, _SWITCH, "estimate the spectral norms that `rescale` needs")
    rescale_relative_threshold: float = _parameter(
        0.0,
        _NOT_NEGATIVE,
        "`rescale` zeroes a masked task vector whose norm is below this share of its former norm",
    )
    bias_correction: bool = _parameter(
        False, _SWITCH, "divide curvature by 1 - beta2^step, read from its file's metadata"
    )
    missing_curvature: str = _parameter(
        "error",
        _choice("error", "uniform", "base"),
        "a parameter without curvature: an error, curvature 1, or the base's value",
    )
    on_nonfinite: str = _parameter(
        "error",
        _choice("error", "base"),
        "NaN, infinity or negative curvature: an error, or the base's value there",
    )
    extra_tensors: str = _parameter(
        "error",
        _choice("error", "take", "drop", "average"),
        "tensors that only some models have: an error (buffers are taken), or take the first model's, drop "
        "them, or their average",
    )
    normalize: bool = _parameter(True, _SWITCH, "divide by the sum of the weights")


@dataclass(frozen=True)
class ModelParameters:
    """What holds for one model; a value in the recipe's global `parameters` is the default of all models."""

    preconditioner_path: str | None = _parameter(
        None, _TEXT, "file of the model's second moments (exp_avg_sq)"
    )
    precond_threshold: float | None = _parameter(
        None, _NOT_NEGATIVE, "theta_t: edits of at least this saliency are kept"
    )
    density: float | None = _parameter(
        None, _SHARE, "share of the edits that are kept, the most salient ones"
    )
    saliency_mass: float | None = _parameter(
        None, _SHARE, "keep the fewest edits that hold this share of the total saliency"
    )
    scaling_factor: float = _parameter(1.0, _POSITIVE, "g_t, the factor of the model's curvature")
    rank: int | None = _parameter(None, _POSITIVE_INTEGER, "use the curvature's truncated SVD of this rank")
    rank1_approx: bool = _parameter(False, _SWITCH, "use the curvature's row and column sums only")
    weight: float = _parameter(1.0, _FINITE, "the model's weight in a linear merge; ota accepts 1 only")


def _yaml_keys(parameters: type) -> dict[str, dataclasses.Field]:
    return {field.metadata["key"] or field.name: field for field in dataclasses.fields(parameters)}


_GLOBAL_FIELDS = _yaml_keys(Parameters)
_MODEL_FIELDS = _yaml_keys(ModelParameters)
_FIELDS = {**_GLOBAL_FIELDS, **_MODEL_FIELDS}


@dataclass(frozen=True)
class ModelEntry:
    """One model of the merge: a local folder or a hub id, and its parameters."""

    model: str
    parameters: ModelParameters


@dataclass(frozen=True)
class Recipe:
    """A whole merge, checked: every value is in range, every default filled in.

    models: at most MAX_MODELS, in recipe order, without the base where the method uses one; dtype and
    out_dtype: torch names or None; tokenizer_source: "base", "union", or a model.
    """

    merge_method: str
    models: tuple[ModelEntry, ...]
    base_model: str | None = None
    parameters: Parameters = Parameters()
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str = "base"

    @property
    def output_dtype(self) -> str | None:
        """The torch name of the type that is written; None means the base's (or first model's) own."""
        return self.out_dtype or self.dtype

    def as_dict(self) -> dict[str, Any]:
        """The canonical mapping, defaults written out; parse_recipe makes an equal Recipe from it."""
        method = methods.get(self.merge_method)
        whole = {
            "merge_method": self.merge_method,
            "base_model": self.base_model,
            "models": [
                {"model": entry.model, "parameters": _dump(entry.parameters, method.model_parameters)}
                for entry in self.models
            ],
            "parameters": _dump(self.parameters, method.parameters),
            "dtype": self.dtype,
            "out_dtype": self.out_dtype,
            "tokenizer_source": self.tokenizer_source,
        }
        return {key: value for key, value in whole.items() if value is not None}


def _dump(parameters: Parameters | ModelParameters, accepted: frozenset[str]) -> dict[str, Any]:
    """The accepted keys that have a value, in the order of declaration."""
    values = {key: getattr(parameters, field.name) for key, field in _yaml_keys(type(parameters)).items()}
    return {key: value for key, value in values.items() if key in accepted and value is not None}


class ParameterHelp(NamedTuple):
    """One recipe key as help and README print it; default None: not set."""

    key: str
    default: Any
    allowed: str
    help: str


def describe_parameters(method: str) -> list[ParameterHelp]:
    """The keys that a method accepts under `parameters`, those of the whole merge first."""
    accepted = methods.get(method).keys
    return [
        ParameterHelp(key, field.default, field.metadata["kind"].allowed, field.metadata["help"])
        for key, field in _FIELDS.items()
        if key in accepted
    ]


def load_recipe(path: str | Path) -> Recipe:
    """Read a YAML recipe. Relative paths in it start at the current folder, else at the recipe's own.

    RecipeError names the file, and the key and value that are wrong.
    """
    path = Path(path)
    try:
        return parse_recipe(_load_yaml(path), path.parent)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def parse_recipe(data: Mapping[str, Any], folder: Path | None = None) -> Recipe:
    """Check a recipe that is a mapping already. folder: where relative paths may start, besides the current.

    RecipeError names the key and value that are wrong.
    """
    data = _mapping(data, "the recipe")
    _check_keys(data, _TOP_KEYS, "the recipe", _UNSUPPORTED_TOP_KEYS)
    if data.get("merge_method") is None:
        raise RecipeError(f"`merge_method` is missing: give one of {', '.join(methods.names())}")
    method = methods.get(_top_value(data, "merge_method", _TEXT, None))
    base_model = _top_value(data, "base_model", _TEXT, None)
    if base_model is not None:
        base_model = _resolve(base_model, folder)
    values = _parse_values(data.get("parameters"), "parameters", method, _FIELDS)
    tokenizer_source = _top_value(data, "tokenizer_source", _TEXT, "base")
    if tokenizer_source not in ("base", "union"):
        tokenizer_source = _resolve(tokenizer_source, folder)
    recipe = Recipe(
        merge_method=method.name,
        models=_parse_models(data.get("models"), method, base_model, values, folder),
        base_model=base_model,
        parameters=_build(Parameters, values),
        dtype=_top_value(data, "dtype", _DTYPE, None),
        out_dtype=_top_value(data, "out_dtype", _DTYPE, None),
        tokenizer_source=tokenizer_source,
    )
    _check_base(recipe, method)
    _check_curvature(recipe, method)
    _check_weights(recipe, method)
    return recipe


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, of which PyYAML would silently keep the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                problem = f"the key `{key.value}` stands there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def _load_yaml(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"cannot read the recipe: {reason}") from error
    if len(text) > _MAX_FILE_BYTES:
        raise RecipeError(f"larger than {_MAX_FILE_BYTES} bytes, so not a recipe: give a YAML file")
    try:
        return yaml.load(text, _UniqueKeyLoader)
    # Beside YAMLError, PyYAML lets through what its constructors meet: ValueError for the date 2001-99-99,
    # LookupError for `!!bool 3`, AttributeError for `!!timestamp x`, RecursionError for deep nesting.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise RecipeError(f"not readable as YAML: {_yaml_problem(error)}") from error


def _yaml_problem(error: Exception) -> str:
    """PyYAML's many-line text as one line."""
    mark = getattr(error, "problem_mark", None)
    text = f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else str(error)
    return " ".join(text.split())


def _resolve(text: str, folder: Path | None) -> str:
    """A path relative to the recipe's folder, if it exists there and not from the current folder."""
    if folder is None or os.path.exists(text):
        return text
    beside = os.path.join(folder, text)
    return beside if os.path.exists(beside) else text


def _show(value: Any) -> str:
    """A value of a message: one line, cut short."""
    try:
        return " ".join(_REPR.repr(value).split())
    except ValueError:  # an integer of more digits than Python prints
        return "a very large number"


def _mapping(value: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where} is {_show(value)}: it must be a mapping of keys to values")
    return value


def _check_keys(
    data: Mapping[Any, Any], known: Iterable[str], where: str, unsupported: Mapping[str, str]
) -> None:
    for key, value in data.items():
        if key in unsupported:
            raise RecipeError(f"mergekit's `{key}` is not supported: {unsupported[key]}")
        if key not in known:
            raise _unknown_key(key, value, where, known)


def _unknown_key(key: Any, value: Any, where: str, known: Iterable[str]) -> RecipeError:
    hint = _place_of(key, where) or methods.suggest(key if isinstance(key, str) else "", known)
    return RecipeError(f"unknown key {_show(key)} (value {_show(value)}) in {where}; {hint}")


def _place_of(key: Any, where: str) -> str | None:
    """Where a key belongs that recipes often have at another level; None for a key that stands nowhere."""
    if key in _NO_EFFECT:
        return f"it has no effect on values: remove it ({_NO_EFFECT[key]})"
    if "parameters" in where:
        return (
            "move it to the top level of the recipe" if key in (*_TOP_KEYS, *_UNSUPPORTED_TOP_KEYS) else None
        )
    if key in _FIELDS:
        return "move it under `parameters`" + ("" if where == "the recipe" else " of that model")
    return "move it to the top level of the recipe" if key in _TOP_KEYS else None


def _parse_value(value: Any, name: str, kind: _Kind) -> Any:
    try:
        return kind.parse(value)
    except (ValueError, OverflowError):
        raise RecipeError(f"{name} is {_show(value)}: it must be {kind.allowed}") from None


def _top_value(data: Mapping[Any, Any], key: str, kind: _Kind, default: Any) -> Any:
    """The value of a top-level key; absent or null gives the default."""
    value = data.get(key)
    return default if value is None else _parse_value(value, f"`{key}`", kind)


def _parse_values(
    data: Any, where: str, method: Method, fields: Mapping[str, dataclasses.Field]
) -> dict[str, Any]:
    """The keys and parsed values of one `parameters` mapping; fields: the keys that may stand there."""
    values = {}
    for key, value in _mapping({} if data is None else data, f"`{where}`").items():
        _check_parameter_key(key, value, where, method, fields)
        name = f"`{key}` in `{where}`"
        kind = fields[key].metadata["kind"]
        if isinstance(value, list | tuple | Mapping):
            raise RecipeError(
                f"{name} is {_show(value)}: mergekit's gradients and filters (values by layer or tensor) "
                f"are not supported; it must be {kind.allowed}"
            )
        values[key] = _parse_value(value, name, kind)
    for group in _EXCLUSIVE:
        chosen = _chosen(values, group)
        if len(chosen) > 1:
            both = " and ".join(f"`{key}`" for key in chosen)
            raise RecipeError(f"{both} in `{where}` exclude each other: keep one of them")
    if method.curvature and values.get("weight", 1.0) != 1.0:
        raise RecipeError(
            f"`weight` in `{where}` is {values['weight']!r}: `{method.name}` weights by curvature and "
            "accepts 1.0 only; use `scaling_factor`"
        )
    return values


def _check_parameter_key(
    key: Any, value: Any, where: str, method: Method, fields: Mapping[str, dataclasses.Field]
) -> None:
    if key not in _FIELDS:
        raise _unknown_key(key, value, f"`{where}`", method.keys & fields.keys())
    if key not in method.keys:
        owners = ", ".join(f"`{name}`" for name in methods.names() if key in methods.get(name).keys)
        raise RecipeError(f"`{key}` in `{where}` is not used by `{method.name}`; it belongs to {owners}")
    if key not in fields:
        raise RecipeError(
            f"`{key}` in `{where}` holds for the whole merge: move it to the global `parameters`"
        )


def _chosen(values: Mapping[str, Any], group: Iterable[str]) -> list[str]:
    """The keys of an exclusive group that take effect: a density of 0 does, `rank1_approx: false` not."""
    return [key for key in group if key in values and values[key] is not False]


def _with_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """One model's values over the global ones."""
    replaced = {key for group in _EXCLUSIVE if _chosen(values, group) for key in group}
    return {key: value for key, value in defaults.items() if key not in replaced} | dict(values)


def _build(parameters: type, values: Mapping[str, Any]) -> Any:
    """A Parameters or ModelParameters of those values that are its own."""
    fields = _yaml_keys(parameters)
    return parameters(**{fields[key].name: value for key, value in values.items() if key in fields})


def _parse_models(
    data: Any, method: Method, base_model: str | None, defaults: Mapping[str, Any], folder: Path | None
) -> tuple[ModelEntry, ...]:
    if data is None or (isinstance(data, list | tuple) and not data):
        raise RecipeError("`models` is missing or empty: list the models to merge, each as `- model: PATH`")
    if not isinstance(data, list | tuple):
        raise RecipeError(f"`models` is {_show(data)}: it must be a list of `- model: PATH`")
    entries = [
        _parse_model(entry, f"models[{index}]", method, defaults, folder) for index, entry in enumerate(data)
    ]
    if base_model is not None and method.base != "unused":
        # mergekit's recipes may list the base among the models; its task vector is zero.
        entries = [entry for entry in entries if not _same_place(entry.model, base_model)]
    if not entries:
        raise RecipeError(
            f"`models` lists only the base model {base_model!r}: add the models to merge into it"
        )
    if len(entries) > MAX_MODELS:
        raise RecipeError(f"`models` lists {len(entries)} models: at most {MAX_MODELS} can be merged at once")
    return tuple(entries)


def _parse_model(
    data: Any, where: str, method: Method, defaults: Mapping[str, Any], folder: Path | None
) -> ModelEntry:
    data = _mapping(data, f"`{where}`")
    _check_keys(data, _MODEL_KEYS, f"`{where}`", {})
    if "model" not in data:
        raise RecipeError(f"`model` is missing in `{where}`: give a folder or a hub id")
    model = _resolve(_parse_value(data["model"], f"`model` in `{where}`", _TEXT), folder)
    own = _parse_values(data.get("parameters"), f"{where}.parameters", method, _MODEL_FIELDS)
    values = _with_defaults(own, defaults)
    if "preconditioner_path" in values:
        values["preconditioner_path"] = _resolve(values["preconditioner_path"], folder)
    return ModelEntry(model, _build(ModelParameters, values))


def _same_place(first: str, second: str) -> bool:
    one, other = (os.path.realpath(os.path.expanduser(text)) for text in (first, second))
    return one == other


def _check_base(recipe: Recipe, method: Method) -> None:
    if recipe.base_model is not None and method.base != "unused":
        return
    if method.base == "required":
        raise RecipeError(f"`{method.name}` needs a `base_model`: add one")
    if len(recipe.models) < 2:
        graft = "" if method.base == "unused" else ", or a `base_model` to graft one model onto"
        raise RecipeError(f"a merge needs at least two models: add to `models`{graft}")
    for key, value in (("on_nonfinite", "base"), ("missing_curvature", "base"), ("rescale", True)):
        if getattr(recipe.parameters, key) == value:
            raise RecipeError(
                f"`{key}: {str(value).lower()}` needs a `base_model`: add one, or remove the key"
            )


def _check_curvature(recipe: Recipe, method: Method) -> None:
    if not method.curvature or recipe.parameters.missing_curvature != "error":
        return
    without = [repr(entry.model) for entry in recipe.models if not entry.parameters.preconditioner_path]
    if without:
        raise RecipeError(
            f"no `preconditioner_path` for {', '.join(without)}: `{method.name}` needs one for each model; "
            "`missing_curvature: uniform` or `base` opts out"
        )


def _check_weights(recipe: Recipe, method: Method) -> None:
    if "normalize" not in method.parameters or not recipe.parameters.normalize:
        return
    weights = [entry.parameters.weight for entry in recipe.models]
    # 0.1 + 0.2 - 0.3 is 3e-17 in binary: a sum that is rounding only counts as zero.
    if abs(math.fsum(weights)) <= 1e-12 * math.fsum(map(abs, weights)):
        raise RecipeError(f"the weights {_show(weights)} sum to 0: change them, or set `normalize: false`")
