"""Methods of a user's own: rows made of the words that kernels know, or functions of torch tensors."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, overload

from ..errors import RecipeError
from ..tensors.found import Found
from ..tensors.terms import ExpertTerms, Terms, Words, scale_weights
from . import methods
from .methods import Method, Need
from .parameters import (
    FINITE,
    REQUIRED,
    SCALE,
    SHARE,
    SWITCH,
    TEXT,
    Kind,
    Parameter,
    whole,
)
from .rows.ota import (
    EPSILON,
    GAIN,
    MOMENTS,
    POWER,
    SCOPE,
    SELECTION,
    selection_needs,
    thresholds,
)
from .settings import Settings

if TYPE_CHECKING:
    import torch

_INTEGER = whole("an integer >= 0", at_least=0)
_KINDS: Mapping[type, Kind] = {bool: SWITCH, int: _INTEGER, float: FINITE, str: TEXT}
_INPUTS = ("base", "experts", "curvatures")

# What is offered of each step: the word in the row, and in the kernels.
_SCORES = ("magnitude", "saliency")
_SELECTS = ("all", "density", "random")
_WEIGHS = {"weight": "constant", "curvature": "curvature"}
_DIVIDES = {
    "one": "number",
    "experts": "number",
    "weights": "weights",
    "kept weights": "kept weights",
    "kept count": "kept count",
}
_ELECTS = ("none", "sum", "count", "largest")

_WEIGHT = Parameter("weight", FINITE, 1.0, "the factor of the model's edit", "expert", affects="values")
_CHANCE = Parameter("density", SHARE, 1.0, "the chance that an edit is kept", "expert", affects="masks")
_DENSITY = Parameter(
    "density", SHARE, 1.0, "share of the model's edits that is kept, the largest", "expert", affects="masks"
)

Function = TypeVar("Function", bound="Callable[..., torch.Tensor]")


@overload
def method(
    name: str,
    *,
    each: Iterable[str] = ...,
    least: int = ...,
    most: int | None = ...,
    formula: str | None = ...,
) -> Callable[[Function], Function]: ...


@overload
def method(
    name: str,
    *,
    score: str = ...,
    select: str = ...,
    elect: str = ...,
    weigh: str = ...,
    divide: str = ...,
    least: int = ...,
    most: int | None = ...,
    formula: str | None = ...,
) -> None: ...


def method(
    name: str,
    *,
    score: str | None = None,
    select: str | None = None,
    elect: str | None = None,
    weigh: str | None = None,
    divide: str | None = None,
    each: Iterable[str] = (),
    least: int = 1,
    most: int | None = None,
    formula: str | None = None,
) -> Callable[[Function], Function] | None:
    """Add a merge method of your own: from then on recipes and functions know `merge_method: name`.

    **A row of words**, which every backend's kernels compute:

        ota_kernels.method("loudest", select="density", elect="largest", divide="one")

    out = w_0 + lambda sum_t g_t P_t d_t / D, per element, in this order (tensors/terms.py has them in full):
    score: "magnitude" |d_t|, or "saliency" h_t d_t^2, by which `density` and `saliency_mass` select; select:
    "all", "density" (the largest scores, exact), "random" (each with the chance `density`); elect: "none",
    "sum" or "count" (edits that agree in sign with the sum of edits, or with most), "largest" (the largest
    edit alone); weigh: "weight" (the key), or "curvature" h_t^power; divide by: "one", "experts" (their
    number), "weights", "kept weights" or "kept count". The recipe's keys follow from the words. Returns None.

    **A function**, as a decorator, which the reference backend calls block by block:

        @ota_kernels.method("soft", each=["weight"])
        def soft(base, experts, *, weight=1.0, sharpness=2.0):
            edits = [w * (x - base) for w, x in zip(weight, experts)]
            ...

    base: float32[n] torch tensor of the base's values; experts, curvatures: lists of such tensors, in recipe
    order; float64 where the output is float32 or float64. It takes those of the three that it names;
    `base=None` makes a base optional, curvatures are second moments. It returns the merged values, [n], and
    must be element by element (checked). Its keyword-only parameters are the recipe's keys, of the type of
    their default (bool, int, float, str; float without one, which a recipe then must give); `lambda_` is the
    key `lambda`. each: those that each model has its own of, given as a list. Other tensors than floating
    point are copied, as ever.

    least, most: models beside a base; formula: for `ota-merge methods`. A merge with such a method streams,
    resumes and reports as any other; one that was stopped is not gone on with by changed code. A method of
    this name that you added before is replaced. Raises RecipeError for a built-in method's name, and for
    words or signatures that are not understood.
    """
    words = {"score": score, "select": select, "elect": elect, "weigh": weigh, "divide": divide}
    given = {key: word for key, word in words.items() if word is not None}
    if given and tuple(each):
        raise RecipeError("`each` is for functions: the keys of a row of words follow from the words")
    if name in methods.names() and not methods.get(name).identity:
        raise RecipeError(f"`{name}` is a method of this package: take another name")
    if given:
        methods.register(_row(name, given, least, most, formula))
        return None

    def decorate(function: Function) -> Function:
        methods.register(_of_function(name, function, tuple(each), least, most, formula))
        return function

    return decorate


# Rows of words


def _row(name: str, given: dict[str, str], least: int, most: int | None, formula: str | None) -> Method:
    score = _word("score", given, _SCORES)
    select = _word("select", given, _SELECTS)
    elect = _word("elect", given, _ELECTS)
    weigh = _word("weigh", given, tuple(_WEIGHS))
    divide = _word("divide", given, tuple(_DIVIDES))
    reads_curvature = weigh == "curvature" or (select == "density" and score == "saliency")
    parameters = [*SCALE]
    if weigh == "weight":
        parameters.append(_WEIGHT)
    else:
        parameters += [POWER, EPSILON, GAIN]
    if select == "density":
        parameters += [*(SELECTION if score == "saliency" else (_DENSITY,)), SCOPE]
    elif select == "random":
        parameters.append(_CHANCE)
    if reads_curvature:
        parameters += MOMENTS

    def needs(settings: Settings) -> list[Need]:
        return selection_needs(settings) if select == "density" else []

    def terms(settings: Settings, found: Found) -> Terms:
        masked = select == "density" and any(b.masks for b in found.brackets)
        kernel_words = Words(
            score=score if masked else "none",
            select={"density": "at least" if masked else "all"}.get(select, select),
            elect=elect,
            weigh=_WEIGHS[weigh],
            divide=_DIVIDES[divide],
        )
        votes, epsilon = [1.0] * len(settings.experts), 0.0
        if weigh == "curvature":
            weights, epsilon = scale_weights(settings.gains(found.bias_corrections), settings["epsilon"])
        else:
            votes = weights = settings.each("weight")
        chances = settings.each("density") if select == "random" else [1.0] * len(votes)
        experts = thresholds(found, weights)
        numbers = zip(experts, votes, chances, strict=True)
        return Terms(
            kernel_words,
            tuple(replace(e, vote=vote, probability=chance) for e, vote, chance in numbers),
            power=settings.power,
            epsilon=epsilon,
            lambda_=settings.lambda_,
            denominator=float(len(experts)) if divide == "experts" else 1.0,
            zero="fallback" if divide == "kept weights" else "one",
            seed=found.seed,
            name_hash=found.name_hash,
        )

    return Method(
        name=name,
        formula=formula
        or f"w_0 + lambda sum_t g_t P_t d_t / D: {score}, {select}, {elect}, {weigh}, {divide}",
        source="of your own",
        base="required",
        parameters=tuple(parameters),
        needs=needs,
        terms=terms,
        least=least,
        most=most,
        identity=repr((score, select, elect, weigh, divide)),
    )


def _word(step: str, given: Mapping[str, str], known: tuple[str, ...]) -> str:
    word = given.get(step, known[0])
    if word not in known:
        raise RecipeError(f"{step}={word!r}: it must be {', '.join(known[:-1])} or {known[-1]}")
    return word


# Functions


def _of_function(
    name: str,
    function: Callable[..., Any],
    each: tuple[str, ...],
    least: int,
    most: int | None,
    formula: str | None,
) -> Method:
    signature = inspect.signature(function)
    inputs, keys = _divided(name, signature)
    unknown = [key for key in each if key not in keys]
    if unknown:
        raise RecipeError(
            f"method {name!r}: each={unknown[0]!r} is no keyword-only parameter of the function"
        )
    parameters = [_parameter(name, keys[key], key in each) for key in keys]
    if "curvatures" in inputs:
        parameters += MOMENTS
    base = "ignored"
    if "base" in inputs:
        base = "required" if signature.parameters["base"].default is inspect.Parameter.empty else "optional"

    def terms(settings: Settings, found: Found) -> Terms:
        values = {key: settings.each(_key(key)) if key in each else settings[_key(key)] for key in keys}

        def computed(
            w_0: torch.Tensor | None, experts: list[torch.Tensor], curvatures: list[torch.Tensor]
        ) -> Any:
            available = {"base": w_0, "experts": experts, "curvatures": curvatures}
            return function(*(available[kind] for kind in inputs), **values)

        reads = "curvature" if "curvatures" in inputs else "constant"
        words = Words(score="none", select="all", weigh=reads, divide="number")
        experts = tuple(ExpertTerms(position=p) for p in found.positions)
        return Terms(words, experts, function=computed, what=f"the function of method {name!r}")

    return Method(
        name=name,
        formula=formula or (inspect.getdoc(function) or f"{function.__name__}(...)").splitlines()[0],
        source="of your own",
        base=base,
        edits=False,
        parameters=tuple(parameters),
        terms=terms,
        least=least,
        most=most,
        identity=_identity(function),
        python=True,
    )


def _divided(name: str, signature: inspect.Signature) -> tuple[list[str], dict[str, inspect.Parameter]]:
    """(what it takes of the inputs, in order; its keyword-only parameters)."""
    inputs, keys = [], {}
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            keys[parameter.name] = parameter
        elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.name in _INPUTS:
            inputs.append(parameter.name)
        else:
            raise RecipeError(
                f"method {name!r}: the function takes {parameter.name!r}: of base, experts and "
                "curvatures those that it needs, and keyword-only parameters (after a *) are understood"
            )
    if "experts" not in inputs:
        raise RecipeError(f"method {name!r}: the function must take `experts`")
    return inputs, keys


def _parameter(name: str, given: inspect.Parameter, own: bool) -> Parameter:
    default = given.default
    if default is inspect.Parameter.empty:
        default = REQUIRED
    elif type(default) not in _KINDS:
        raise RecipeError(
            f"method {name!r}: the default of {given.name!r} is {default!r}: it must be a bool, int, "
            "float or str"
        )
    kind = FINITE if default is REQUIRED else _KINDS[type(default)]
    help_text = f"a parameter of {name}"
    return Parameter(_key(given.name), kind, default, help_text, "expert" if own else "shared")


def _key(parameter: str) -> str:
    return "lambda" if parameter == "lambda_" else parameter


def _identity(function: Callable[..., Any]) -> str:
    """Changes with the function's code, as far as it can be seen: its source, else its bytecode."""
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        text = repr((code.co_code, code.co_consts)) if code else repr(function)
    return hashlib.sha256(text.encode()).hexdigest()
