"""Random tensors of several models as backends take them, and one call of a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import oracle
import torch

from ota_kernels.planning.roles import role_of
from ota_kernels.tensors.buffer import Buffer
from ota_kernels.tensors.curvature import Curvature, Full, Log8, Uniform
from ota_kernels.tensors.dtypes import BY_NAME
from ota_kernels.tensors.result import Candidates, MergeStats
from ota_kernels.tensors.terms import Terms
from ota_kernels.tensors.tile import TensorInputs

INPUT_DTYPES = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2")
OUTPUT_DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Experts:
    """One tensor of every model, as torch tensors. curvatures None: curvature 1."""

    base: torch.Tensor | None
    experts: tuple[torch.Tensor, ...]
    curvatures: tuple[torch.Tensor, ...] | None

    def inputs(
        self, out_dtype: str, name: str = "weight", bias_corrections: Sequence[float] | None = None
    ) -> TensorInputs:
        """What a backend receives."""
        corrections = bias_corrections or (1.0,) * len(self.experts)
        found = (Uniform(),) * len(self.experts)
        if self.curvatures is not None:
            found = tuple(Full(buffer(h), c) for h, c in zip(self.curvatures, corrections, strict=True))
        return TensorInputs(
            name,
            tuple(self.experts[0].shape),
            BY_NAME[out_dtype],
            None if self.base is None else buffer(self.base),
            tuple(map(buffer, self.experts)),
            found,
        )

    def exact(self, name: str = "weight", bias_corrections: Sequence[float] | None = None) -> oracle.Tensor:
        """The same values for the float64 evaluation."""
        return oracle.Tensor(
            None if self.base is None else self.base.double().numpy(),
            tuple(w.double().numpy() for w in self.experts),
            None if self.curvatures is None else tuple(h.float().numpy() for h in self.curvatures),
            role_of(name, tuple(self.experts[0].shape)),
            None if bias_corrections is None else tuple(bias_corrections),
        )


def buffer(tensor: torch.Tensor, origin: str = "") -> Buffer:
    """A tensor's bytes, as a reader would map them."""
    if tensor.numel() == 0:  # numpy 2.4 gives it stride 0, which torch does not view as another type
        data = np.zeros(0, np.uint8)
    else:
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return Buffer(data, BY_NAME[str(tensor.dtype).removeprefix("torch.")], origin)


def decode(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Result bytes as float64[shape]."""
    if data.size == 0:  # torch does not view an empty numpy array as another type
        return np.zeros(shape)
    return torch.from_numpy(data).view(getattr(torch, dtype)).double().numpy().reshape(shape)


def random_experts(
    seed: int,
    shape: tuple[int, ...],
    n_experts: int = 3,
    *,
    dtypes: Sequence[str] = ("bfloat16",),
    base_dtype: str | None = "bfloat16",
    curvature_dtypes: Sequence[str] | None = ("float32",),
) -> Experts:
    """Weights near 0.05; edits a tenth of that, one in eight 0; curvature log-uniform, one in sixteen 0.
    Expert t has the type dtypes[t mod len]; base_dtype and curvature_dtypes None: without."""
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 0.05, shape)
    experts, curvatures = [], []
    for t in range(n_experts):
        edit = rng.normal(0, 0.005, shape) * (rng.random(shape) > 1 / 8)
        experts.append(torch.as_tensor(base + edit).to(getattr(torch, dtypes[t % len(dtypes)])))
        if curvature_dtypes is not None:
            dtype = curvature_dtypes[t % len(curvature_dtypes)]
            least = -5.0 if dtype == "float16" else -14.0  # float16 ends at 6e-8
            h = 10.0 ** rng.uniform(least, least + 8, shape) * (rng.random(shape) > 1 / 16)
            curvatures.append(torch.as_tensor(h).to(getattr(torch, dtype)))
    return Experts(
        None if base_dtype is None else torch.as_tensor(base).to(getattr(torch, base_dtype)),
        tuple(experts),
        None if curvature_dtypes is None else tuple(curvatures),
    )


def with_buffers(tile: TensorInputs, change: Callable[[Buffer], Buffer]) -> TensorInputs:
    """The same tile with other buffers of the same elements; factors are shared."""

    def curvature(c: Curvature) -> Curvature:
        if isinstance(c, Full):
            return replace(c, values=change(c.values))
        return replace(c, codes=change(c.codes)) if isinstance(c, Log8) else c

    return replace(
        tile,
        base=None if tile.base is None else change(tile.base),
        experts=tuple(map(change, tile.experts)),
        curvatures=tuple(map(curvature, tile.curvatures)),
    )


def merge_tile(tile: TensorInputs, terms: Terms, backend: ModuleType) -> tuple[np.ndarray, MergeStats]:
    """One call of a backend, into memory that holds NaN."""
    out = np.full(tile.numel * tile.out_dtype.itemsize, 0xFF, np.uint8)
    return out, backend.merge(tile, terms, out)


def undecided(candidates: Candidates) -> np.ndarray:
    """The positions of candidates and alternatives, ascending."""
    alternatives = (a.positions & np.uint32((1 << 31) - 1) for a in candidates.alternatives)
    return np.sort(np.concatenate([candidates.positions, *alternatives]))
