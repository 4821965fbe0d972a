"""Tensors that 16-bit models keep in 32 bits: routing biases, norms, whatever every model stores so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ..tensors.dtypes import BY_NAME, DType

_SIXTEEN = ("bfloat16", "float16")


def main_type(model: Any) -> str | None:
    """The floating-point type that most elements of a model have; None without any."""
    sizes: Counter[str] = Counter()
    for info in model.tensors.values():
        if info.dtype.is_float:
            sizes[info.dtype.name] += info.numel
    return max(sizes, key=sizes.__getitem__) if sizes else None


class Precision:
    """Which type each tensor of the output has. dtype, out_dtype: the recipe's.

    `dtype` with 16 bits leaves a tensor that every model stores in 32 bits or more as it is, where some
    model's main type has 16: it was kept so on purpose. `out_dtype` is the type of everything. kept, rounded:
    names of the tensors that the one spares and the other does not.
    """

    def __init__(self, models: Iterable[Any], dtype: str | None, out_dtype: str | None) -> None:
        self._asked = BY_NAME.get(out_dtype or dtype or "")
        self._told = out_dtype is not None
        narrow = self._asked is not None and self._asked.name in _SIXTEEN
        self._spares = narrow and any(main_type(model) in _SIXTEEN for model in models)
        self.kept: list[str] = []
        self.rounded: list[str] = []

    def of(self, name: str, stored: Sequence[DType]) -> DType | None:
        """The type of a tensor that models store in these types; None: the first one's own."""
        if self._spares and all(dtype.itemsize >= 4 for dtype in stored):
            if not self._told:
                self.kept.append(name)
                return None
            self.rounded.append(name)
        return self._asked

    def notes(self, listing) -> list[str]:
        """What a user should know; listing: shows names."""
        found = []
        if self.kept:
            found.append(
                "kept in float32, as every model stores them (`out_dtype` would round them too): "
                f"{listing(self.kept)}"
            )
        if self.rounded:
            found.append(
                f"stored in float32 by every model, rounded to {self._asked.name} as `out_dtype` says: "
                f"{listing(self.rounded)}"
            )
        return found
