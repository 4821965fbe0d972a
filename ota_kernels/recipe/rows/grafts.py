"""Rows of masks or curvature alone: grafts of one expert, localize-and-stitch, diagonal Fisher."""

from __future__ import annotations

from dataclasses import replace

from ...tensors.curvature import floored
from ...tensors.found import Found
from ...tensors.terms import ExpertTerms, Terms, Words, scale_weights
from ...tensors.tile import TensorInputs
from ..methods import Method, register
from ..parameters import FINITE, NOT_NEGATIVE, SCALE, SHARE, Parameter, choice
from ..settings import Settings
from .ota import MOMENTS, SCOPE, SELECTION, gains, mean_needs, selection_needs, thresholds


def masked_sum(settings: Settings, found: Found, score: str, divide: str, denominator: float = 1.0) -> Terms:
    """w_0 + lambda sum_t m_t d_t / D, masks by thresholds of a score."""
    masked = any(b.masks for b in found.brackets)
    words = Words(
        score=score if masked else "none",
        select="at least" if masked else "all",
        weigh="constant",
        divide=divide,
    )
    return Terms(words, thresholds(found), lambda_=settings.lambda_, denominator=denominator)


def _graft_terms(settings: Settings, found: Found) -> Terms:
    return masked_sum(settings, found, "saliency", "number")


register(
    Method(
        name="ffg",
        source="arXiv 2509.11167",
        formula="w_0 + m d, m: the edits of largest h d^2; with `missing_curvature: uniform` of largest |d|",
        base="required",
        parameters=(*SELECTION, *MOMENTS, SCOPE, *SCALE),
        needs=selection_needs,
        terms=_graft_terms,
        least=1,
        most=1,
    )
)


def _stitch_terms(settings: Settings, found: Found) -> Terms:
    return masked_sum(settings, found, "magnitude", "kept count")


register(
    Method(
        name="localize_stitch",
        source="arXiv 2408.13656",
        shown="MergeBench (arXiv 2505.10833): first, five skills on models of 2-9 B",
        formula="w_0 + sum_t m_t d_t / max(1, sum_t m_t), m_t: the largest |d_t| of the model",
        base="required",
        parameters=(
            Parameter(
                "density", SHARE, 0.1, "share of an expert's edits that is kept", "expert", affects="masks"
            ),
            SCOPE,
            Parameter(
                "embeddings", choice("base", "merge"), "base", "what becomes of the embeddings", varies=False
            ),
            *SCALE,
        ),
        needs=selection_needs,
        terms=_stitch_terms,
        keeps_base=lambda settings, role: settings["embeddings"] == "base" and role == "embedding",
        least=1,
    )
)


def _with_floor(tensor: TensorInputs, settings: Settings) -> TensorInputs:
    floor = settings["fisher_floor"]
    return replace(tensor, curvatures=tuple(floored(c, floor) for c in tensor.curvatures))


def _fisher_terms(settings: Settings, found: Found) -> Terms:
    each = [w * g for w, g in zip(settings.each("weight"), gains(settings, found), strict=True)]
    scales, _ = scale_weights([abs(w) for w in each], 0.0)
    factor = max(scales) / max(map(abs, each)) if any(each) else 1.0
    pairs = zip(found.positions, each, strict=True)
    experts = tuple(ExpertTerms(weight_scale=w * factor, position=p) for p, w in pairs)
    words = Words(score="none", select="all", weigh="curvature", divide="kept weights")
    return Terms(words, experts, power=1.0, fallback="mean")


register(
    Method(
        name="fisher",
        source="arXiv 2111.09832",
        shown="MergeBench (arXiv 2505.10833): last, five skills on models of 2-9 B",
        formula="sum_t weight_t n(F_t) w_t / sum_t weight_t n(F_t), F_t = max(h_t, fisher_floor)",
        base="ignored",
        edits=False,
        parameters=(
            Parameter("weight", FINITE, 1.0, "the model's weight", "expert", affects="values"),
            *MOMENTS,
            Parameter("fisher_floor", NOT_NEGATIVE, 1e-6, "the least value of F_t"),
            Parameter(
                "normalise",
                choice("none", "global", "model"),
                "model",
                "divide F_t by its mean over the tensor (global) or the model; the paper: by its L2 norm",
                varies=False,
            ),
            Parameter("epsilon", NOT_NEGATIVE, 1e-26, "added to each mean", affects="values"),
        ),
        needs=mean_needs,
        view=_with_floor,
        terms=_fisher_terms,
    )
)
