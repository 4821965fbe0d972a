"""A method's parameters as they hold for one output tensor: gradients, filters and levels are resolved,
defaults filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Values by recipe key. Tensors with equal values share one object, so that it can be asked by identity.

    method: the merge method's name; has_base: whether edits are taken from a base; shared: keys of the whole
    merge; experts: per expert, in recipe order, its own keys.
    """

    method: str
    has_base: bool
    shared: Mapping[str, Any]
    experts: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(
        cls, method: str, has_base: bool, shared: Mapping[str, Any], experts: list[Mapping[str, Any]]
    ) -> Settings:
        """From mappings, which are copied and cannot be changed afterwards."""
        frozen = tuple(MappingProxyType(dict(e)) for e in experts)
        return cls(method, has_base, MappingProxyType(dict(shared)), frozen)

    def __getitem__(self, key: str) -> Any:
        """The value of a key of the whole merge."""
        return self.shared[key]

    def each(self, key: str) -> list[Any]:
        """The values of an expert's key, in recipe order."""
        return [e[key] for e in self.experts]

    @property
    def power(self) -> float:
        """The exponent of the curvature."""
        return self.shared.get("power", 1.0)

    @property
    def lambda_(self) -> float:
        """The factor of the merged edit, without what is found over the whole model."""
        factor = self.shared["lambda"]
        return self.shared.get("times", 1.0) * (1.0 if isinstance(factor, str) else factor)

    @property
    def scaled(self) -> bool:
        """Whether a further factor of the merged edit is found over the whole model."""
        return isinstance(self.shared.get("lambda"), str) or self.shared.get("match_norm") is not None

    def gains(self, bias_corrections: Sequence[float]) -> list[float]:
        """g_t of each expert's g_t h_t^p, where h_t is what is stored divided by its bias correction."""
        scales = [e.get("scaling_factor", 1.0) for e in self.experts]
        return [g * c**-self.power for g, c in zip(scales, bias_corrections, strict=True)]
