"""Rows that sparsify edits, may elect signs, and add: task arithmetic, TIES, DARE, DELLA, Breadcrumbs.

k_t: what is kept;   r_t = sum |d_t| / sum |k_t d_t| with `rescale`;   y_t = weight_t r_t k_t d_t
elect: s = +1 where sum_t y_t >= 0, else -1;   g_t = [sign(y_t) = s], 1 without
out = w_0 + lambda sum_t g_t y_t / (sum_t g_t weight_t with `normalize`, else 1)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...tensors.found import Found, Rank
from ...tensors.terms import ExpertTerms, Terms, Words
from ..methods import Method, Need, register
from ..parameters import (
    FINITE,
    NOT_NEGATIVE,
    REQUIRED,
    SCALE,
    SHARE,
    SWITCH,
    Parameter,
    choice,
)
from ..settings import Settings
from ..shares import share_of

_LEAST_NORM = 1e-7  # a sum of magnitudes below it rescales nothing
_LEAST_WEIGHT = 1e-8  # a sum of weights below it divides nothing


@dataclass(frozen=True)
class _Row:
    """sparsify: none, magnitude, outliers, random or rank; elect: by the sign of the sum or not; the rest are
    defaults of the keys of these names."""

    name: str
    source: str
    sparsify: str
    elect: bool
    normalize: bool
    rescale: bool

    @property
    def drawn(self) -> bool:
        return self.sparsify in ("random", "rank")


_SELECT = {
    "none": ("none", "all"),
    "magnitude": ("magnitude", "at least"),
    "outliers": ("magnitude", "between"),
    "random": ("none", "random"),
    "rank": ("none", "random by rank"),
}


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
    if row.sparsify == "random":
        by = choice("norm", "density")
        found.append(
            Parameter("rescale_by", by, "norm", "by the lengths, or by 1 / density as the paper does")
        )
    if row.elect:
        count = choice("sum", "count")
        found.append(Parameter("consensus", count, "sum", "elect by the sum of edits, or by their number"))
    return tuple(found)


def _check(row: _Row):
    def check(settings: Settings) -> str | None:
        if row.sparsify != "rank":
            return None
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
            found.append(Need("ranks"))
        if sparse and settings["rescale"] and _by_norm(settings):
            found.append(Need("sums"))
        return found

    return needs


def _by_norm(settings: Settings) -> bool:
    return settings.shared.get("rescale_by", "norm") == "norm"


def _ranks(row: _Row):
    def ranks(settings: Settings, t: int, n: int, nonzero: int) -> list[Rank]:
        own = settings.experts[t]
        if own["density"] >= 1:
            return []
        if row.sparsify == "magnitude":
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
    if row.sparsify == "magnitude":
        return {"threshold": at[0].score, "last": at[0].index}
    low, high = at
    return {"threshold": low.score, "first": low.index, "upper": high.score, "upto": high.index}


def _rescale(row: _Row, settings: Settings, found: Found, t: int) -> float:
    density = settings.experts[t]["density"]
    if not settings["rescale"] or row.sparsify == "none" or density >= 1:
        return 1.0
    if not _by_norm(settings):
        return 1 / density if density > 0 else 1.0
    if found.sums is None:
        return 1.0
    whole, kept = found.sums[t][1:3]
    return 1.0 if min(whole, kept) < _LEAST_NORM else whole / kept


def _terms(row: _Row):
    def terms(settings: Settings, found: Found) -> Terms:
        score, select = _SELECT[row.sparsify]
        elect = settings["consensus"] if row.elect else "none"
        experts = []
        for t, own in enumerate(settings.experts):
            scale, weight = _rescale(row, settings, found, t), own["weight"]
            numbers = {"weight_scale": weight, "edit_scale": scale, "vote": weight * scale}
            experts.append(ExpertTerms(position=found.positions[t], **numbers, **_bounds(row, own, found, t)))
        total = 1.0
        if settings["normalize"] and not row.elect:
            total = sum(settings.each("weight"))
            total = 1.0 if abs(total) < _LEAST_WEIGHT else total
        divide = "kept weights" if settings["normalize"] and row.elect else "number"
        return Terms(
            Words(score=score, select=select, elect=elect, weigh="constant", divide=divide),
            tuple(experts),
            lambda_=settings.lambda_,
            denominator=total,
            tie=1.0,
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
