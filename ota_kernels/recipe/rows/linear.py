"""Rows of fixed weights: linear, passthrough, checkpoints of one run."""

from __future__ import annotations

import math
from collections.abc import Callable

from ...tensors.found import Found
from ...tensors.terms import ExpertTerms, Terms, Words
from ..methods import Method, register
from ..parameters import FINITE, POSITIVE_INTEGER, SHARE, SWITCH, Parameter, choice, show
from ..settings import Settings


def weighted(found: Found, weights: list[float], denominator: float = 1.0) -> Terms:
    """sum_t weight_t w_t / denominator."""
    pairs = zip(found.positions, weights, strict=True)
    experts = tuple(ExpertTerms(weight_scale=w, position=p) for p, w in pairs)
    words = Words(score="none", select="all", weigh="constant", divide="number")
    return Terms(words, experts, denominator=denominator)


def divided_by_weights(key: str) -> Callable[[Settings], str | None]:
    """The check of a row whose weights are divided by their sum, where the switch `key` says so."""

    def check(settings: Settings) -> str | None:
        weights = settings.each("weight")
        # 0.1 + 0.2 - 0.3 is 3e-17 in binary: a sum that is rounding only counts as zero.
        if settings[key] and abs(math.fsum(weights)) <= 1e-12 * math.fsum(map(abs, weights)):
            return f"the weights {show(weights)} sum to 0: change them, or set `{key}: false`"
        return None

    return check


def _linear_terms(settings: Settings, found: Found) -> Terms:
    weights = settings.each("weight")
    return weighted(found, weights, sum(weights) if settings["normalize"] else 1.0)


register(
    Method(
        name="linear",
        source="arXiv 2203.05482",
        formula="sum_t weight_t w_t / sum_t weight_t (normalize: false: not divided)",
        base="ignored",
        edits=False,
        parameters=(
            Parameter("normalize", SWITCH, True, "divide by the sum of the weights"),
            Parameter("weight", FINITE, 1.0, "the model's weight", "expert"),
        ),
        terms=_linear_terms,
        check=divided_by_weights("normalize"),
        least=1,
    )
)


def _passthrough_terms(settings: Settings, found: Found) -> Terms:
    scale = settings.experts[0]["scale"]
    return weighted(found, [1.0 if scale is None else scale])


register(
    Method(
        name="passthrough",
        source="mergekit",
        formula="w, or scale w",
        base="ignored",
        edits=False,
        parameters=(Parameter("scale", FINITE, None, "a factor of the tensor", "expert"),),
        terms=_passthrough_terms,
        copies=lambda settings: settings.experts[0]["scale"] is None,
        least=1,
        most=1,
    )
)


# checkpoints

_DECAYS = {
    "linear": lambda x: 1 - x,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


def checkpoint_weights(n: int, decay: str, beta: float, k: int | None) -> list[float]:
    """c_0 .. c_{n-1}, oldest first: s_i - s_{i+1}, s_i = f(i / n), as if the learning rate had fallen by f
    (WSM, arXiv 2507.17634); ema by beta; lawa: the mean of the last k."""
    if decay == "ema":
        return [beta ** (n - 1), *((1 - beta) * beta ** (n - 1 - i) for i in range(1, n))]
    if decay == "lawa":
        last = n if k is None else k
        return [0.0] * (n - last) + [1 / last] * last
    s = [_DECAYS[decay](i / n) for i in range(n)] + [0.0]
    return [s[i] - s[i + 1] for i in range(n)]


def _last_ones(settings: Settings) -> str | None:
    k, n = settings["k"], len(settings.experts)
    if settings["decay"] == "lawa" and k is not None and k > n:
        return f"`k` is {k}, and there are {n} checkpoints: give at most {n}"
    return None


def _checkpoints_terms(settings: Settings, found: Found) -> Terms:
    n = len(settings.experts)
    return weighted(found, checkpoint_weights(n, settings["decay"], settings["beta"], settings["k"]))


register(
    Method(
        name="checkpoints",
        source="arXiv 2507.17634",
        shown="arXiv 2604.12374: 120 B parameters, +2 to +4 points over 12 benchmarks in the stable phase",
        formula="sum_i c_i x_i of a run's checkpoints, oldest first; c_i as if its learning rate had decayed",
        base="ignored",
        edits=False,
        parameters=(
            Parameter(
                "decay",
                choice(*_DECAYS, "ema", "lawa"),
                "minus_sqrt",
                "how the learning rate would have fallen; ema: by `beta`; lawa: the mean of the last `k`",
                varies=False,
            ),
            Parameter("beta", SHARE, 0.9, "of ema: what the mean keeps at each checkpoint", varies=False),
            Parameter(
                "k", POSITIVE_INTEGER, None, "of lawa: how many of the last, all unless given", varies=False
            ),
            Parameter(
                "every", POSITIVE_INTEGER, None, "only checkpoints whose number is a multiple", varies=False
            ),
            Parameter("last", POSITIVE_INTEGER, None, "only so many of the newest", varies=False),
        ),
        of_one_run=True,
        terms=_checkpoints_terms,
        check=_last_ones,
        least=1,
    )
)
