"""Statistics of one tensor by their names in a method's needs: each puts into Found what it says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..planning.roles import role_of
from ..recipe.settings import Settings
from ..select.sample import sample
from ..tensors import array as resident
from ..tensors.found import At, Found, Selection, Threshold
from ..tensors.result import SUMS
from ..tensors.terms import Terms
from ..tensors.tile import TensorInputs
from .norms import edit_norm
from .order import Located, Ready, order_statistics
from .statistics import Edits, Gram, Grams, MaskedSums, MeanWeight, RowDivergence

if TYPE_CHECKING:
    from .decide import Decider


def _means(decider: Decider, tensor: TensorInputs, settings: Settings, found: Found) -> None:
    statistic = MeanWeight(decider.gains, settings.power, len(settings.experts))
    totals = decider.reader.of_tensor(statistic, tensor, decider.score_terms(tensor))
    found.means = [total / max(tensor.numel, 1) for total in totals.tolist()]


def _norms(decider: Decider, tensor: TensorInputs, settings: Settings, found: Found) -> None:
    """edit_scales: norm(d) / norm(m d); 0 where the masked norm is below the relative threshold."""
    role = role_of(tensor.name, tensor.shape)
    masked_terms = decider.method.terms(settings, found)
    whole = replace(found, brackets=[Threshold(masks=b.masks) for b in found.brackets])
    whole_terms = decider.method.terms(settings, whole)

    def norm(t: int, terms: Terms) -> float:
        edits = decider.reader.of_tensor(Edits(t), tensor, terms)
        return edit_norm(edits, tensor.shape, role, settings["approximate_norm"])

    for t in range(len(settings.experts)):
        of_all, of_masked = norm(t, whole_terms), norm(t, masked_terms)
        small = of_masked == 0 or of_masked < settings["rescale_relative_threshold"] * of_all
        found.edit_scales[t] = 0.0 if small else of_all / of_masked


def _trims(decider: Decider, tensor: TensorInputs, settings: Settings, found: Found) -> None:
    """The least |d| among the ties_density share of the largest masked edits."""
    density = Selection("density", settings["ties_density"])
    terms = decider.method.terms(settings, replace(found, trims=[0.0] * len(found.trims)))
    each = (decider.select(tensor, t, terms, density, True) for t in range(len(settings.experts)))
    found.trims = [math.inf if math.isnan(least) else least for least in each]  # infinity: none survives


def _sums(decider: Decider, tensor: TensorInputs, settings: Settings, found: Found) -> None:
    statistic = MaskedSums(len(tensor.experts), len(SUMS))
    found.sums = decider.reader.of_tensor(statistic, tensor, decider.method.terms(settings, found))


def _gram(decider: Decider, tensor: TensorInputs, settings: Settings, found: Found) -> None:
    groups = decider.method.groups(settings, tensor.shape)
    statistic = Gram(len(tensor.experts)) if groups == "tensor" else Grams(groups)
    found.gram = decider.reader.of_tensor(statistic, tensor, decider.method.terms(settings, found))


def _row_scores(decider: Decider, tensor: TensorInputs, settings: Settings, found: Found) -> None:
    terms = decider.method.terms(settings, found)
    count = range(len(tensor.experts))
    found.row_scores = [decider.reader.of_tensor(RowDivergence(t), tensor, terms) for t in count]


def _ranks(decider: Decider, tensor: TensorInputs, settings: Settings, found: Found) -> None:
    terms = decider.method.terms(settings, found)
    places = located(decider, [tensor], tensor.name, lambda _: (tensor, terms))
    found.at = [[At(x.score, x.index) for x in own] for own in places]


def located(
    decider: Decider, tensors: Sequence[TensorInputs], name: str | None, ready: Ready
) -> list[list[Located]]:
    """Per expert what stands at the ranks that the method asks for, over some tensors; of one score for all
    experts, found once. name: of the tensor, None for the model."""
    settings, n = decider.settings(tensors[0]), sum(t.numel for t in tensors)
    first, terms = ready(tensors[0])
    count = len(first.experts)
    experts = [0] if terms.words.score == "spread" else list(range(count))
    wanted = {t: lambda nonzero, t=t: decider.method.ranks(settings, t, n, nonzero) for t in experts}
    wanted = {t: ranks for t, ranks in wanted.items() if n and ranks(n)}
    large = n > decider.rules.direct and wanted
    samples = _samples(decider, tensors, name, list(wanted), ready) if large else {}
    found = order_statistics(decider.reader, tensors, ready, wanted, samples) if wanted else {}
    return [found.get(0 if experts == [0] else t, []) for t in range(count)]


def _samples(
    decider: Decider, tensors: Sequence[TensorInputs], name: str | None, experts: list[int], ready: Ready
) -> dict[int, np.ndarray]:
    """float32[clusters, elements] of each of these experts' scores. name: of the tensor, None for the model;
    ready: a tensor as it is read, and its terms."""
    count = decider.rules.clusters(sum(t.numel for t in tensors))
    prepared = [ready(t)[0] for t in tensors]
    found = decider.surveys.sampled(
        (name, "ranks"),
        experts,
        lambda of: sample(prepared, count, of, lambda t: ready(t)[1], decider.backend, decider.pool.run),
    )
    return dict(zip(experts, map(resident.host, found), strict=True))


FINDERS: Mapping[str, Callable[[Decider, TensorInputs, Settings, Found], None]] = {
    "mean weight": _means,
    "norms": _norms,
    "trims": _trims,
    "sums": _sums,
    "gram": _gram,
    "row scores": _row_scores,
    "ranks": _ranks,
}
