"""What goes into a merge and what comes out, and the two forms of an edit: float64 for values, float32 for
decisions.

An edit is d_t = w_t - w_0 (w_t - o_t where the model has an origin; w_t itself without a base). Its value is
taken in float64, in sums over a tensor too (norms, squares, inner products). Whatever *decides* an element
(scores, thresholds, elections) takes d_t as float32(w_t) - float32(w_0), one float32 subtraction; of 16-bit
weights both are the same but where the exponents of w_t and w_0 lie far apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class Tensor:
    """One tensor of every model.

    base: float64[shape] or None; experts: float64[shape] each, None where a model lacks the tensor;
    curvatures: float32[shape] each, or None for curvature 1; role: embedding, output, matrix or vector;
    bias_corrections: 1 - beta2^step of each expert, by which its curvature is divided; origins:
    float64[shape] or None (the base) of each expert; layer: its number in the output model, None outside the
    layers.
    """

    base: np.ndarray | None
    experts: tuple[np.ndarray | None, ...]
    curvatures: tuple[np.ndarray, ...] | None = None
    role: str = "vector"
    bias_corrections: tuple[float, ...] | None = None
    origins: tuple[np.ndarray | None, ...] | None = None
    layer: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of every input; inputs of different shapes raise ValueError."""
        shapes = {x.shape for x in (self.base, *self.experts, *(self.origins or ())) if x is not None}
        if len(shapes) != 1:
            raise ValueError(f"inputs of one tensor have the shapes {sorted(shapes)}: they must agree")
        return next(iter(shapes))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def origin(self, t: int) -> np.ndarray | None:
        """What expert t's edit is counted from; None: from 0."""
        return self.base if self.origins is None or self.origins[t] is None else self.origins[t]

    def edit(self, t: int) -> np.ndarray:
        """d_t in float64."""
        origin = self.origin(t)
        return self.experts[t] if origin is None else self.experts[t] - origin

    def edits(self) -> np.ndarray:
        """float64[T, *shape]."""
        found = [self.edit(t) for t in range(len(self.experts))]
        return np.array(found, np.float64).reshape(len(found), *self.shape)

    def edits32(self) -> np.ndarray:
        """float32[T, *shape]: what decisions see."""
        found = [task_vector(w, self.origin(t)) for t, w in enumerate(self.experts)]
        return np.array(found, np.float32).reshape(len(found), *self.shape)

    def only(self, kept: list[int]) -> Tensor:
        """The tensor with these experts alone."""

        def of(values: tuple | None) -> tuple | None:
            return None if values is None else tuple(values[t] for t in kept)

        return replace(
            self,
            experts=of(self.experts),
            curvatures=of(self.curvatures),
            bias_corrections=of(self.bias_corrections),
            origins=of(self.origins),
        )


@dataclass(frozen=True)
class Merged:
    """out: float64[shape]; masks: bool[T, *shape], what each expert's selection kept (False where the model
    lacks the tensor); unkept: bool[shape], kept by nobody; operand: float64[shape], the largest magnitude
    that was added up; agreed: bool[T, *shape], kept and of the elected sign, None without election."""

    out: np.ndarray
    masks: np.ndarray
    unkept: np.ndarray
    operand: np.ndarray
    agreed: np.ndarray | None = None


def task_vector(w: np.ndarray, base: np.ndarray | None) -> np.ndarray:
    """d_t in float32."""
    w32 = w.astype(np.float32)
    return w32 if base is None else w32 - base.astype(np.float32)


def merged(
    out: np.ndarray, tensor: Tensor, terms: list, masks: np.ndarray | None = None, agreed=None
) -> Merged:
    """out with what it was added up from: the inputs and `terms`. masks None: every expert keeps all."""
    shape, n_experts = tensor.shape, len(tensor.experts)
    masks = np.ones((n_experts, *shape), bool) if masks is None else masks
    inputs = [x for x in (tensor.base, *tensor.experts, *(tensor.origins or ())) if x is not None]
    operand = np.max([np.broadcast_to(np.abs(x), shape) for x in (*inputs, *terms)], axis=0)
    unkept = ~masks.any(axis=0) if n_experts else np.ones(shape, bool)
    return Merged(np.asarray(out, np.float64), masks, np.asarray(unkept), operand, agreed)


def share_of(count: int, share: float) -> int:
    """floor(share x count), the share as the decimal that is written: 0.29 of 100 is 29."""
    return math.floor(Fraction(str(share)) * count)


def exact_sum(values: list[float]) -> Fraction:
    """The sum of numbers as the decimals that are written: 0.1 + 0.2 - 0.3 is 0."""
    return sum((Fraction(str(v)) for v in values), Fraction(0))


def largest(scores: np.ndarray, k: int) -> np.ndarray:
    """Exactly the first k in the order (score descending, flat index ascending); bool of the same shape."""
    kept = np.zeros(scores.size, bool)
    kept[np.argsort(-scores.ravel(), kind="stable")[:k]] = True
    return kept.reshape(scores.shape)
