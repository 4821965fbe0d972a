"""What the settings of all tensors need together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .methods import Method, Need
from .settings import Settings

_APART = ("thresholds", "low rank")  # found in ways of their own


@dataclass(frozen=True)
class Needs:
    """What the settings of all tensors need together. of_tensor: right before a tensor merges; model: once;
    matrices: some are merged whole, for which what is kept must be known."""

    everything: tuple[Need, ...]
    model_scope: bool
    matrices: bool = False

    @classmethod
    def of(cls, method: Method, settings: Iterable[Settings]) -> Needs:
        unique = {id(s): s for s in settings}.values()
        needs = dict.fromkeys(need for each in unique for need in method.needs(each))
        model_scope = any(n.statistic == "thresholds" and n.scope == "model" for n in needs)
        return cls(tuple(needs), model_scope, any(map(method.whole, unique)))

    def has(self, statistic: str, scope: str) -> bool:
        return any(n.statistic == statistic and n.scope == scope for n in self.everything)

    @property
    def thresholds(self) -> bool:
        """Whether shares of scores are to be kept."""
        return any(n.statistic == "thresholds" for n in self.everything)

    @property
    def brackets(self) -> bool:
        """Whether thresholds are settled after the merge: there are some, and nothing needs what they keep
        before. Low-rank forms of all tensors would not fit into memory until then."""
        late = any(n.of_masks for n in self.everything) or self.svd or self.matrices
        return self.thresholds and not late

    @property
    def svd(self) -> bool:
        """Whether curvature is decomposed, which takes two reads."""
        return any(n.statistic == "low rank" and n.reads > 1 for n in self.everything)

    @property
    def of_tensor(self) -> list[Need]:
        """In order, those that are found of one tensor beside its thresholds and forms of curvature."""
        return [n for n in self.everything if n.scope == "tensor" and n.statistic not in _APART]
