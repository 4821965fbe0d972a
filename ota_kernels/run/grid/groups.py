"""What a count is split by: (role, layer) pairs, few however many tensors there are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...planning.roles import DETAILED_ROLES, detailed_role, layer_of
from ...tensors.tile import TensorInputs

NO_LAYER = "none"  # the layer of embeddings, final norm and output


class Groups:
    """of: the group of each tensor; sizes: elements of each group, int64[groups]."""

    def __init__(self, tensors: Sequence[TensorInputs]) -> None:
        keys = [(detailed_role(t.name), layer_of(t.name)) for t in tensors]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        self._keys = list(numbers)
        self.of = [numbers[key] for key in keys]
        self.sizes = np.zeros(len(numbers), np.int64)
        np.add.at(self.sizes, self.of, [t.numel for t in tensors])

    def __len__(self) -> int:
        return len(self._keys)

    def by_role(self, counts: np.ndarray) -> dict[str, int]:
        """int64[groups] summed by role, in the order of a table."""
        present = {role for role, _ in self._keys}
        found = dict.fromkeys((role for role in DETAILED_ROLES if role in present), 0)
        for (role, _), count in zip(self._keys, counts.tolist(), strict=True):
            found[role] += count
        return found

    def by_layer(self, counts: np.ndarray) -> dict[str, int]:
        """int64[groups] summed by layer, ascending, what is in none last."""
        layers = {layer for _, layer in self._keys}
        found = dict.fromkeys(map(str, sorted(layers - {None})), 0)
        if None in layers:
            found[NO_LAYER] = 0
        for (_, layer), count in zip(self._keys, counts.tolist(), strict=True):
            found[NO_LAYER if layer is None else str(layer)] += count
        return found
