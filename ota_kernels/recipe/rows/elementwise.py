"""Rows of one element of all experts at a time: SCE, RAM, consensus, MagMax, NearSwap, Arcee Fusion."""

from __future__ import annotations

import math

import numpy as np

from ...tensors.found import Found, Rank
from ...tensors.terms import ExpertTerms, Terms, Words
from ..methods import Method, Need, register
from ..parameters import (
    FINITE,
    NOT_NEGATIVE,
    POSITIVE_INTEGER,
    REQUIRED,
    SCALE,
    SWITCH,
    Parameter,
    scale,
)
from ..settings import Settings
from ..shares import share_of

_LEAST_SQUARES = 1e-6  # of all experts together: below it they weigh the same
_LEAST_WEIGHT = 1e-6  # of the experts that agree


def _experts(found: Found, **numbers) -> tuple[ExpertTerms, ...]:
    return tuple(ExpertTerms(position=p, **numbers) for p in found.positions)


# sce


def _sce_needs(settings: Settings) -> list[Need]:
    return [*([Need("ranks")] if settings["select_topk"] < 1 else []), Need("sums")]


def _sce_ranks(settings: Settings, t: int, n: int, nonzero: int) -> list[Rank]:
    k = share_of(max(settings["select_topk"], 0.0), nonzero)
    return [Rank(k - 1)] if k else []


def _sce_terms(settings: Settings, found: Found) -> Terms:
    count = len(settings.experts)
    weights = [1 / count] * count
    if found.sums is not None:
        squares = found.sums[:, 3] / max(found.numel, 1)
        if squares.sum() >= _LEAST_SQUARES:
            weights = (squares / squares.sum()).tolist()
    masked = settings["select_topk"] < 1
    at = found.at[0] if found.at else []
    bounds = {"threshold": math.nan}
    if not masked:
        bounds = {}
    elif at:
        bounds = {"threshold": at[0].score, "last": at[0].index}
    experts = tuple(
        ExpertTerms(position=p, weight_scale=w, **bounds)
        for p, w in zip(found.positions, weights, strict=True)
    )
    words = Words(
        score="spread" if masked else "none",
        select="at least" if masked else "all",
        elect="sum",
        weigh="constant",
        divide="kept weights",
    )
    return Terms(words, experts, lambda_=settings.lambda_, least=_LEAST_WEIGHT, tie=1.0)


register(
    Method(
        name="sce",
        source="arXiv 2408.07990",
        formula="w_0 + sum_t g_t q_t m d_t / sum_t g_t q_t, m: where experts differ most, q_t: sum (m d_t)^2",
        base="required",
        parameters=(
            Parameter(
                "select_topk",
                NOT_NEGATIVE,
                1.0,
                "share of the elements where experts differ that is kept",
                affects="masks",
            ),
            *SCALE,
            Parameter("int8_mask", SWITCH, False, "accepted, without effect"),
        ),
        needs=_sce_needs,
        ranks=_sce_ranks,
        terms=_sce_terms,
        least=0,
    )
)


# ram, ramplus_tl, ramplus


def _ram_terms(settings: Settings, found: Found) -> Terms:
    words = Words(score="magnitude", select="above", weigh="constant", divide="kept count")
    experts = _experts(found, threshold=settings["epsilon"])
    return Terms(words, experts, lambda_=settings.lambda_)


def _ramplus_terms(settings: Settings, found: Found) -> Terms:
    words = Words(score="magnitude", select="above", weigh="alone", divide="kept count")
    sums = found.sums if found.model_sums is None else found.model_sums
    experts = []
    for t, position in enumerate(found.positions):
        alone = 1.0 if sums is None else _factor_alone(*sums[t][4:6], settings)
        experts.append(ExpertTerms(position=position, threshold=settings["epsilon"], alone=alone))
    return Terms(words, tuple(experts), lambda_=settings.lambda_)


def _factor_alone(shared: float, unique: float, settings: Settings) -> float:
    """1 + r clip(shared / max(unique, epsilon), 0, alpha); where nothing is alone, any factor will do."""
    floor = max(unique, settings["epsilon"])
    return 1 + settings["r"] * min(shared / floor if floor else math.inf, settings["alpha"])


def _ram_parameters(r: float, alpha: float) -> tuple[Parameter, ...]:
    return (
        Parameter("epsilon", NOT_NEGATIVE, 1e-5, "edits up to this magnitude count as none", affects="masks"),
        Parameter("r", FINITE, r, "how much an edit grows that no other expert has", affects="values"),
        Parameter(
            "alpha", NOT_NEGATIVE, alpha, "bound of the ratio of shared to lone edits", affects="values"
        ),
        *SCALE,
    )


_RAM = "w_0 + sum_t a_t d_t / max(sum_t a_t, 1), a_t = [|d_t| > epsilon]"
register(
    Method(
        name="ram",
        source="arXiv 2601.13572",
        formula=_RAM,
        base="required",
        parameters=(_ram_parameters(0, 0)[0], *SCALE),
        terms=_ram_terms,
        least=0,
    )
)
register(
    Method(
        name="ramplus_tl",
        source="arXiv 2601.13572, by tensor",
        formula=f"{_RAM}, lone edits times 1 + r clip(shared_t / unique_t, 0, alpha)",
        base="required",
        parameters=_ram_parameters(0.1, 0.2),
        needs=lambda settings: [Need("sums")],
        terms=_ramplus_terms,
        least=0,
    )
)
register(
    Method(
        name="ramplus",
        source="arXiv 2601.13572",
        formula=f"{_RAM}, lone edits times 1 + r clip(shared_t / unique_t, 0, alpha), counts over the model",
        base="required",
        parameters=_ram_parameters(0.2, 1.0),
        needs=lambda settings: [Need("sums", "model")],
        terms=_ramplus_terms,
        least=0,
    )
)


# consensus, magmax


def _consensus_terms(settings: Settings, found: Found) -> Terms:
    words = Words(score="none", select="all", elect="agreement", weigh="constant", divide="number")
    return Terms(
        words, _experts(found), lambda_=settings.lambda_, agreement=settings["q"], needed=settings["k"]
    )


register(
    Method(
        name="consensus",
        source="arXiv 2405.07813",
        shown="MergeBench (arXiv 2505.10833): in the middle, five skills on models of 2-9 B",
        formula="w_0 + lambda D [#(|d_t| > q |D - d_t|) >= k], D = sum_t d_t",
        base="required",
        parameters=(
            Parameter("q", NOT_NEGATIVE, 0.4, "how much of the rest an edit must exceed to count"),
            Parameter("k", POSITIVE_INTEGER, 2, "experts whose edits must count for an element to change"),
            *SCALE,
        ),
        terms=_consensus_terms,
        least=0,
    )
)


def _magmax_terms(settings: Settings, found: Found) -> Terms:
    words = Words(score="none", select="all", elect="largest", weigh="constant", divide="number")
    return Terms(words, _experts(found), lambda_=settings.lambda_)


register(
    Method(
        name="magmax",
        source="arXiv 2407.06322",
        formula="w_0 + lambda d_t*, t* the last t of the largest |d_t|",
        base="required",
        parameters=scale(0.5),
        terms=_magmax_terms,
        least=0,
    )
)


# nearswap, arcee_fusion: one expert


def _nearswap_terms(settings: Settings, found: Found) -> Terms:
    words = Words(edit="clipped", score="none", select="all", weigh="constant", divide="number")
    return Terms(words, _experts(found), clip=settings["t"], lambda_=settings.lambda_)


register(
    Method(
        name="nearswap",
        source="alchemonaut/QuartetAnemoi-70B",
        formula="w_0 + clip(t / max(|d|, 1e-6), 0, 1) d",
        base="required",
        parameters=(Parameter("t", FINITE, REQUIRED, "edits up to this magnitude are taken whole"), *SCALE),
        terms=_nearswap_terms,
        least=1,
        most=1,
        absent="base alone",
    )
)


def _arcee_ranks(settings: Settings, t: int, n: int, nonzero: int) -> list[Rank]:
    return [Rank(quarter * (n - 1) // 4, descending=False) for quarter in (1, 2, 3)]


def _arcee_terms(settings: Settings, found: Found) -> Terms:
    threshold = 0.0
    if found.at and found.at[0]:
        first, median, third = (at.score for at in found.at[0])
        threshold = float(np.float32(median + 1.5 * (third - first)))
    row_scores = found.row_scores[0] if found.row_scores else None
    words = Words(score="row magnitude", weigh="constant", divide="number")
    expert = ExpertTerms(position=found.positions[0], threshold=threshold, row_scores=row_scores)
    return Terms(words, (expert,))


register(
    Method(
        name="arcee_fusion",
        source="mergekit",
        formula="w_1 where |d| KL(row) >= median + 1.5 (Q3 - Q1), else w_0",
        base="required",
        edits=False,
        parameters=(),
        needs=lambda settings: [Need("row scores"), Need("ranks")],
        ranks=_arcee_ranks,
        terms=_arcee_terms,
        least=1,
        most=1,
        absent="only one",
    )
)
