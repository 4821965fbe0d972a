"""Rows of whole matrices: task singular vectors, isotropic merging, covariances of edits.

X of m_1 d_1 .. m_T d_T, one matrix at a time (spectral/formulas.py);   out = w_0 + lambda X
elsewhere (embeddings, output matrices, vectors): lambda mean_t(m_t d_t) (opcm: sum_t), or as by `ota`
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

from ...spectral import formulas
from ...spectral.formulas import Edits, Formula
from ...tensors.found import Found
from ...tensors.terms import Terms, Words, scale_weights
from ..methods import Method, Need, register
from ..parameters import SCALE, SHARE, Parameter, choice
from ..settings import Settings
from ..shares import share_of
from .grafts import masked_sum
from .ota import (
    EPSILON,
    MOMENTS,
    POWER,
    SCOPE,
    SELECTION,
    gains,
    mean_needs,
    normalise,
    selection_needs,
    thresholds,
)


def _parameters(elsewhere: str, match_norm: str | None) -> tuple[Parameter, ...]:
    """elsewhere, match_norm: the defaults."""
    return (
        *(replace(p, default=match_norm) if p.key == "match_norm" else p for p in SCALE),
        Parameter(
            "elsewhere",
            choice(elsewhere, "ota"),
            elsewhere,
            f"embeddings, output matrices, vectors: the {elsewhere} of the edits, or their mean by curvature "
            "as by `ota`",
            varies=False,
        ),
        POWER,
        normalise("model"),
        EPSILON,
        *SELECTION,
        SCOPE,
        *MOMENTS,
    )


def _needs(settings: Settings) -> list[Need]:
    weighted = settings["elsewhere"] == "ota"
    return selection_needs(settings) + (mean_needs(settings) if weighted else [])


def _terms(settings: Settings, found: Found) -> Terms:
    """Of what is no matrix; and of matrices what is kept of their edits."""
    experts = 1 if settings["elsewhere"] == "sum" else len(settings.experts)
    plain = masked_sum(settings, found, "saliency", "number", float(experts))
    if found.is_matrix or settings["elsewhere"] != "ota":
        return plain
    weights, epsilon = scale_weights(gains(settings, found), settings["epsilon"])
    words = Words(score=plain.words.score, select=plain.words.select)
    return Terms(
        words,
        thresholds(found, weights),
        power=settings["power"],
        epsilon=epsilon,
        lambda_=settings.lambda_,
    )


def _register(
    name: str,
    source: str,
    formula: str,
    matrix: Callable[[Settings], Formula],
    *own: Parameter,
    elsewhere: str = "mean",
    match_norm: str | None = None,
) -> None:
    register(
        Method(
            name=name,
            source=source,
            formula=formula,
            base="required",
            parameters=(*own, *_parameters(elsewhere, match_norm)),
            needs=_needs,
            terms=_terms,
            matrix=matrix,
            curvature_optional=True,
            least=1,
        )
    )


_register(
    "tsv",
    "arXiv 2412.00081",
    "w_0 + lambda polar(U*) S* polar(V*), of each m_t d_t the r / T leading singular triples, side by side",
    lambda settings: Formula(formulas.tsv),
)

_register(
    "iso_c",
    "arXiv 2502.04959",
    "w_0 + lambda mean(s) polar(sum_t m_t d_t), s: its singular values",
    lambda settings: Formula(formulas.iso_c),
)


def _iso_cts(settings: Settings, edits: Edits):
    return formulas.iso_cts(edits, share_of(settings["common"], min(edits.shape)))


_register(
    "iso_cts",
    "arXiv 2502.04959",
    "w_0 + lambda mean(s*) polar(U*) polar(V*), of the leading triples of sum_t m_t d_t and of each rest",
    lambda settings: Formula(functools.partial(_iso_cts, settings)),
    Parameter("common", SHARE, 0.8, "share of the directions that are the sum's; the rest are the experts'"),
)


def _covariance(settings: Settings) -> Formula:
    by_norm = settings["covariance_weights"] == "norm"
    return Formula(functools.partial(formulas.covariance, by_norm=by_norm), by_columns=True)


_register(
    "covariance",
    "arXiv 2604.01329",
    "w_0 + lambda (sum_t g_t m_t d_t C_t) (sum_t g_t C_t)^-1, C_t = (m_t d_t)^T m_t d_t",
    _covariance,
    Parameter(
        "covariance_weights",
        choice("equal", "norm"),
        "equal",
        "g_t: 1, or 1 / ||m_t d_t||^2, the minimum of WUDI's loss",
    ),
)


def _opcm(settings: Settings) -> Formula:
    return Formula(functools.partial(formulas.opcm, alpha=settings["alpha"]))


_register(
    "opcm",
    "arXiv 2501.09522",
    "w_0 + S_T mean_t ||d_t|| / ||S_T||, S_t = S_{t-1} + what of m_t d_t S_{t-1} does not point at",
    _opcm,
    Parameter("alpha", SHARE, 0.5, "share of the singular values whose directions count as a span"),
    elsewhere="sum",
    match_norm="mean",
)
