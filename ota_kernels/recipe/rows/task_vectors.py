"""Rows that sparsify edits, may elect signs, and add: task arithmetic, TIES, DARE, DELLA, Breadcrumbs.

k_t: what is kept;   r_t = sum |d_t| / sum |k_t d_t| with `rescale`;   y_t = weight_t r_t k_t d_t
elect: s = +1 where sum_t y_t >= 0, else -1;   g_t = [sign(y_t) = s], 1 without
out = w_0 + lambda sum_t g_t y_t / (sum_t g_t weight_t with `normalize`, else 1)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...tensors.found import Found, Rank
from ...tensors.terms import ExpertTerms, Terms, Words, scale_weights
from ..methods import Method, Need, register
from ..parameters import (
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    REQUIRED,
    SCALE,
    SHARE,
    SWITCH,
    Parameter,
    choice,
)
from ..settings import Settings
from ..shares import share_of
from .ota import MOMENTS

_LEAST_NORM = 1e-7  # a sum of magnitudes below it rescales nothing
_LEAST_WEIGHT = 1e-8  # a sum of weights below it divides nothing
_EPSILON = 1e-26  # added to weights by curvature, as `ota` does


@dataclass(frozen=True)
class _Row:
    """sparsify: none, magnitude, saliency, outliers, random or rank; elect: by the sign of the sum or not;
    normalize, rescale: defaults of these keys; mean_of_kept: whether `normalize` divides by the weights of
    those that kept an edit also where nothing is elected."""

    name: str
    source: str
    sparsify: str
    elect: bool
    normalize: bool
    rescale: bool
    mean_of_kept: bool = False

    @property
    def drawn(self) -> bool:
        return self.sparsify in ("random", "rank")


_SELECT = {
    "none": ("none", "all"),
    "magnitude": ("magnitude", "at least"),
    "saliency": ("saliency", "at least"),
    "outliers": ("magnitude", "between"),
    "random": ("none", "random"),
    "rank": ("none", "random by rank"),
}


_BENCH = "MergeBench (arXiv 2505.10833, models of 2-9 B)"
_SHOWN = {
    "task_arithmetic": f"arXiv 2511.21437: alone gains reliably on models of 3-8 B; {_BENCH}: in the middle",
    "ties": f"{_BENCH}: in the middle; arXiv 2511.21437: brings nothing notable on models of 3-8 B",
    "dare_linear": f"{_BENCH}: low",
    "dare_ties": f"{_BENCH}: low",
}

_SCOPE = Parameter(
    "density_scope",
    choice("tensor", "model"),
    "tensor",
    "over what a density counts",
    varies=False,
)
_ZERO_SIGN = Parameter(
    "zero_sign",
    choice("positive", "majority"),
    "positive",
    "the sign that is elected where edits sum to 0; majority: that of most sums of the model",
    varies=False,
)


def _parameters(row: _Row) -> tuple[Parameter, ...]:
    found = [
        Parameter("weight", FINITE, REQUIRED, "the factor of the model's edit", "expert", affects="values"),
        Parameter(
            "density", NOT_NEGATIVE, 1.0, "share of the model's edits that is kept", "expert", affects="masks"
        ),
        Parameter(
            "normalize",
            SWITCH,
            row.normalize,
            "divide by the sum of the weights that take part",
            affects="values",
        ),
        Parameter("rescale", SWITCH, row.rescale, "give kept edits the length that all edits have"),
        *SCALE,
        Parameter("int8_mask", SWITCH, False, "accepted, without effect"),
    ]
    if row.sparsify == "outliers":
        found.insert(
            2, Parameter("gamma", SHARE, 0.01, "share of the largest edits that is dropped", "expert")
        )
    if row.sparsify == "rank":
        found.insert(2, Parameter("epsilon", SHARE, 0.15, "half of the range of probabilities", "expert"))
    if row.drawn:
        by = choice("norm", "density")
        found.append(
            Parameter("rescale_by", by, "norm", "by the lengths, or by 1 / density as the papers do")
        )
    else:
        found += [_SCOPE] if row.sparsify != "none" else []
    if row.elect:
        count = choice("sum", "count")
        found.append(Parameter("consensus", count, "sum", "elect by the sum of edits, or by their number"))
        found.append(_ZERO_SIGN)
    return tuple(found)


def _check(row: _Row):
    def check(settings: Settings) -> str | None:
        if row.sparsify != "rank":
            return None
        if settings.shared.get("zero_sign") == "majority" and _by_chance(row, settings):
            return "`zero_sign: majority` is not offered with `rescale_by: density`: leave out one of them"
        for own in settings.experts:
            density, epsilon = own["density"], own["epsilon"]
            if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
                return (
                    f"density {density:g} and epsilon {epsilon:g}: density - epsilon and density + epsilon "
                    "must lie between 0 and 1: give a smaller `epsilon`"
                )
        return None

    return check


def _needs(row: _Row):
    def needs(settings: Settings) -> list[Need]:
        sparse = row.sparsify != "none" and any(d < 1 for d in settings.each("density"))
        found = []
        if sparse and not row.drawn:
            found.append(Need("ranks", settings["density_scope"]))
        if sparse and settings["rescale"] and _by_norm(settings):
            found.append(Need("sums"))
        if row.elect and settings["zero_sign"] == "majority":
            found.append(Need("signs", "model"))
        return found

    return needs


def _by_norm(settings: Settings) -> bool:
    return settings.shared.get("rescale_by", "norm") == "norm"


def _by_chance(row: _Row, settings: Settings) -> bool:
    """Whether each kept edit is divided by the chance that it had."""
    sparse = any(0 < density < 1 for density in settings.each("density"))
    return row.sparsify == "rank" and sparse and settings["rescale"] and not _by_norm(settings)


def _ranks(row: _Row):
    def ranks(settings: Settings, t: int, n: int, nonzero: int) -> list[Rank]:
        own = settings.experts[t]
        if own["density"] >= 1:
            return []
        if row.sparsify in ("magnitude", "saliency"):
            return [Rank(max(1, share_of(own["density"], n)) - 1)] if own["density"] > 0 else []
        count, top = share_of(own["density"], n), share_of(own["gamma"], n)
        low = max(0, n - count - top)
        return [Rank(low, descending=False), Rank(low + count - 1, descending=False)] if count else []

    return ranks


def _bounds(row: _Row, own, found: Found, t: int) -> dict:
    """The numbers of an expert's selection."""
    density = own["density"]
    if row.sparsify == "none" or density >= 1:
        return {}
    if row.drawn:
        return {"probability": max(density, 0.0), "spread": own.get("epsilon", 0.0) if density > 0 else 0.0}
    at = found.at[t] if found.at else []
    if not at:
        return {"threshold": math.nan}
    if row.sparsify in ("magnitude", "saliency"):
        return {"threshold": at[0].score, "last": at[0].index}
    low, high = at
    return {"threshold": low.score, "first": low.index, "upper": high.score, "upto": high.index}


def _rescale(row: _Row, settings: Settings, found: Found, t: int) -> float:
    density = settings.experts[t]["density"]
    if not settings["rescale"] or row.sparsify == "none" or density >= 1:
        return 1.0
    if not _by_norm(settings):
        return 1 / density if density > 0 and row.sparsify == "random" else 1.0
    if found.sums is None:
        return 1.0
    whole, kept = found.sums[t][1:3]
    return 1.0 if min(whole, kept) < _LEAST_NORM else whole / kept


def _weights(settings: Settings, found: Found) -> tuple[list[float], float]:
    """(weight_scale of each expert, epsilon): by curvature weight_t h_t^p, where the recipe asks for it."""
    weights = settings.each("weight")
    if settings.shared.get("weigh", "fixed") == "fixed":
        return weights, 0.0
    gains = settings.gains(found.bias_corrections)
    scales, epsilon = scale_weights([abs(w) * g for w, g in zip(weights, gains, strict=True)], _EPSILON)
    return [math.copysign(a, w) for a, w in zip(scales, weights, strict=True)], epsilon


def _terms(row: _Row):
    def terms(settings: Settings, found: Found) -> Terms:
        score, select = _SELECT[row.sparsify]
        weigh = "constant" if settings.shared.get("weigh", "fixed") == "fixed" else "curvature"
        scales, epsilon = _weights(settings, found)
        experts = []
        for t, own in enumerate(settings.experts):
            scale = _rescale(row, settings, found, t)
            numbers = {"weight_scale": scales[t], "edit_scale": scale, "vote": own["weight"] * scale}
            numbers |= {"score_scale": found.score_scales[t]} if score == "saliency" else {}
            experts.append(ExpertTerms(position=found.positions[t], **numbers, **_bounds(row, own, found, t)))
        of_kept = row.elect or row.mean_of_kept
        total = 1.0
        if settings["normalize"] and not of_kept:
            total = sum(settings.each("weight"))
            total = 1.0 if abs(total) < _LEAST_WEIGHT else total
        words = Words(
            edit="by chance" if _by_chance(row, settings) else "difference",
            score=score,
            select=select,
            elect=settings["consensus"] if row.elect else "none",
            weigh=weigh,
            divide="kept weights" if settings["normalize"] and of_kept else "number",
        )
        return Terms(
            words,
            tuple(experts),
            power=settings.power,
            epsilon=epsilon,
            lambda_=settings.lambda_,
            denominator=total,
            tie=1.0 if found.signs is None or found.signs >= 0 else -1.0,
            zero="one",
            seed=found.seed,
            name_hash=found.name_hash,
            ranked=_rows(found.shape),
        )

    return terms


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """DELLA ranks along axis 1, a vector is one row; as mergekit has it, for any number of axes."""
    axis = 1 if len(shape) > 1 else 0
    return (shape[axis], math.prod(shape[axis + 1 :])) if shape else (1, 1)


def _formula(row: _Row) -> str:
    kept = {"none": "d_t", "magnitude": "largest d_t", "outliers": "d_t between smallest and largest"}
    edits = kept.get(row.sparsify, "d_t kept by chance")
    agreeing = " that agree with the sign of their sum" if row.elect else ""
    return f"w_0 + lambda sum_t weight_t ({edits}){agreeing}"


for _row in (
    _Row("task_arithmetic", "arXiv 2212.04089", "none", elect=False, normalize=False, rescale=False),
    _Row("ties", "arXiv 2306.01708", "magnitude", elect=True, normalize=True, rescale=False),
    _Row("dare_linear", "arXiv 2311.03099", "random", elect=False, normalize=False, rescale=True),
    _Row("dare_ties", "arXiv 2311.03099", "random", elect=True, normalize=False, rescale=True),
    _Row("breadcrumbs", "arXiv 2312.06795", "outliers", elect=False, normalize=False, rescale=False),
    _Row("breadcrumbs_ties", "arXiv 2312.06795", "outliers", elect=True, normalize=False, rescale=False),
    _Row("della", "arXiv 2406.11617", "rank", elect=True, normalize=True, rescale=True),
    _Row("della_linear", "arXiv 2406.11617", "rank", elect=False, normalize=False, rescale=True),
):
    register(
        Method(
            name=_row.name,
            source=_row.source,
            shown=_SHOWN.get(_row.name, ""),
            formula=_formula(_row),
            base="required",
            parameters=_parameters(_row),
            check=_check(_row),
            needs=_needs(_row),
            ranks=_ranks(_row),
            terms=_terms(_row),
            least=0,
        )
    )


# Any selection with any weights and any consensus, by keys.

_SPARSIFY = ("none", "magnitude", "saliency", "outliers", "random", "rank")


def _row_of(settings: Settings) -> _Row:
    elects = settings["consensus"] != "none"
    return _Row("combine", "", settings["select"], elects, True, False, mean_of_kept=True)


def _check_combination(settings: Settings) -> str | None:
    if settings["weigh"] == "curvature" and not settings["normalize"]:
        return "`weigh: curvature` needs `normalize: true`: curvature says how edits weigh among each other"
    if settings["select"] not in ("magnitude", "outliers") and settings["density_scope"] == "model":
        return f"`density_scope: model` is not for `select: {settings['select']}`: set it to tensor"
    if settings["rescale"] and not _by_norm(settings) and settings["select"] not in ("random", "rank"):
        return "`rescale_by: density` is for random selections: no paper rescales others so"
    return _check(_row_of(settings))(settings)


register(
    Method(
        name="combine",
        source="of all rows",
        formula="w_0 + lambda sum_t g_t P_t d_t / sum_t g_t P_t, of any `select`, `consensus` and `weigh`",
        base="required",
        parameters=(
            Parameter("select", choice(*_SPARSIFY), "magnitude", "which edits are kept", varies=False),
            Parameter(
                "consensus",
                choice("none", "sum", "count"),
                "none",
                "whether kept edits must have the sign of their sum, or of most of them",
                varies=False,
            ),
            Parameter(
                "weigh",
                choice("fixed", "curvature"),
                "fixed",
                "by `weight`, or by weight h^power",
                varies=False,
            ),
            Parameter("weight", FINITE, 1.0, "the model's weight", "expert", affects="values"),
            Parameter("density", NOT_NEGATIVE, 1.0, "share of the edits that is kept", "expert"),
            Parameter("gamma", SHARE, 0.01, "of outliers: share of the largest that is dropped", "expert"),
            Parameter("epsilon", SHARE, 0.15, "of rank: half of the range of probabilities", "expert"),
            Parameter("normalize", SWITCH, True, "divide by the weights of those that kept an edit"),
            Parameter("rescale", SWITCH, False, "give kept edits the length that all edits have"),
            Parameter("rescale_by", choice("norm", "density"), "norm", "by lengths, or by 1 / probability"),
            Parameter("power", POSITIVE, 0.5, "the exponent of the curvature"),
            *MOMENTS,
            _SCOPE,
            _ZERO_SIGN,
            *SCALE,
        ),
        check=_check_combination,
        needs=lambda settings: _needs(_row_of(settings))(settings),
        ranks=lambda settings, t, n, nonzero: _ranks(_row_of(settings))(settings, t, n, nonzero),
        terms=lambda settings, found: _terms(_row_of(settings))(settings, found),
        curvature_optional=True,
        least=1,
    )
)
