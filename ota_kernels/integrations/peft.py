"""PEFT's `add_weighted_adapter` by these kernels, and adapters merged in their core space.

Inside of `accelerated()` PEFT's combinations of adapters are computed here, with the meaning that they have
there:

    k_t: all, the int(density n) of largest magnitude, or each with the chance `density`, then divided by it
    elect (ties): s = sign(sum_t k_t d_t), or of sum_t sign(k_t d_t) (`frequency`), + where that is 0
    out = sum_t g_t w_t k_t d_t;   ties: divided by max(sum_t g_t, 1), g_t = [sign(k_t d_t) = s]

The `_svd` forms take the leading singular triples from the smaller Gram matrix in float64; PEFT takes the
whole SVD.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..backends import Backend
from ..errors import RecipeError
from ..merger import serving
from ..processors import default_threads
from ..recipe.methods import Method, Need
from ..recipe.settings import Settings
from ..run.decide import Decider
from ..run.engine import Engine
from ..run.pool import IN_PLACE, Pool
from ..run.sinks import Inline, MemorySink
from ..select.pending import Store
from ..tensors import array as resident
from ..tensors.convert import array_like
from ..tensors.curvature import Uniform
from ..tensors.found import Found, Rank
from ..tensors.terms import ExpertTerms, Terms, Words
from ..tensors.tile import TensorInputs
from .core_space import merge_adapters

if TYPE_CHECKING:
    import torch

__all__ = ["accelerated", "merge_adapters"]

_UNLIMITED = 1 << 62
_TILE = 1 << 20
_FUNCTIONS = ("task_arithmetic", "magnitude_prune", "ties", "dare_linear", "dare_ties")
_SVD = "_svd_generalized_task_arithmetic_weighted_adapter"


@contextlib.contextmanager
def accelerated() -> Iterator[None]:
    """Within the block, `model.add_weighted_adapter` of PEFT's LoRA models computes here: combination types
    linear, ties, dare_linear, dare_ties, magnitude_prune and their `_svd` forms, and svd; `cat` as ever.
    Values are those of `peft.utils.merge_utils` but for rounding (sums are float64 for float32 adapters), for
    which of equal magnitudes are kept (the first ones), and for the draws of dare, which follow
    torch.manual_seed too. Not for several threads at once. RecipeError without PEFT, or with one whose
    functions have other names."""
    try:
        from peft.tuners.lora import model as lora
    except ImportError as error:
        raise RecipeError(f"PEFT is not installed ({error}): pip install 'ota-kernels[peft]'") from None
    ours: dict[tuple[Any, str], Any] = {(lora, name): globals()[f"_{name}"] for name in _FUNCTIONS}
    ours[lora.LoraModel, _SVD] = _svd_adapter
    for owner, name in ours:
        if not hasattr(owner, name):
            raise RecipeError(f"this version of PEFT has no {name}: 0.21 is understood")
    before = {(owner, name): getattr(owner, name) for owner, name in ours}
    try:
        for (owner, name), function in ours.items():
            setattr(owner, name, function)
        yield
    finally:
        for (owner, name), function in before.items():
            setattr(owner, name, function)


# PEFT's functions of tensors: `task_tensors` of one shape, `weights` [T]


def _task_arithmetic(task_tensors: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    return _combined(task_tensors, weights, "all", 1.0)


def _magnitude_prune(task_tensors: list[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    return _combined(task_tensors, weights, "at least", density)


def _ties(
    task_tensors: list[torch.Tensor],
    weights: torch.Tensor,
    density: float,
    majority_sign_method: str = "total",
) -> torch.Tensor:
    return _combined(task_tensors, weights, "at least", density, majority_sign_method)


def _dare_linear(task_tensors: list[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    return _combined(task_tensors, weights, "random", density)


def _dare_ties(
    task_tensors: list[torch.Tensor],
    weights: torch.Tensor,
    density: float,
    majority_sign_method: str = "total",
) -> torch.Tensor:
    return _combined(task_tensors, weights, "random", density, majority_sign_method)


_ELECT = {None: "none", "total": "sum", "frequency": "count"}


def _combined(
    tensors: Sequence[torch.Tensor],
    weights: torch.Tensor,
    select: str,
    density: float,
    sign: str | None = None,
) -> torch.Tensor:
    """One merge by words, edits from 0."""
    import torch

    if density < 0:
        raise ValueError(f"Density should be >= 0, got {density}")
    if sign not in _ELECT:
        raise RuntimeError(f'Unimplemented mask method "{sign}"')
    if select != "all" and density >= 1:
        warnings.warn(f"The density {density} keeps everything.", stacklevel=3)
        select = "all"
    count = int(density * tensors[0].numel())
    if tensors[0].numel() == 0 or (select == "at least" and count == 0):
        return torch.zeros_like(tensors[0])
    seed = int(torch.randint(1 << 62, ())) if select == "random" else 0
    factors = [float(w) for w in weights]
    row = _row(select, density, count, _ELECT[sign], factors, seed)
    return _run(row, list(tensors))


def _row(select: str, density: float, count: int, elect: str, weights: Sequence[float], seed: int) -> Method:
    ranked = select == "at least"
    words = Words(
        score="magnitude" if ranked else "none",
        select=select,
        elect=elect,
        weigh="constant",
        divide="number" if elect == "none" else "kept count",
    )
    scale = 1 / density if select == "random" and density > 0 else 1.0

    def terms(settings: Settings, found: Found) -> Terms:
        experts = []
        for t, weight in enumerate(weights):
            at = found.at[t][0] if ranked and found.at else None
            bounds = {} if at is None else {"threshold": at.score, "last": at.index}
            drawn = {"probability": density} if select == "random" else {}
            experts.append(
                ExpertTerms(position=t, weight_scale=weight, edit_scale=scale, vote=1.0, **bounds, **drawn)
            )
        return Terms(words, tuple(experts), tie=1.0, zero="one", seed=seed)

    return Method(
        name="peft",
        formula="",
        base="required",
        parameters=(),
        terms=terms,
        needs=lambda settings: [Need("ranks")] if ranked else [],
        ranks=lambda settings, t, n, nonzero: [Rank(count - 1)],
    )


def _run(row: Method, tensors: list[torch.Tensor]) -> torch.Tensor:
    """A merge with a base of zeros: where nothing is kept, it is 0."""
    import torch

    first = tensors[0]
    backend, read = serving("auto", first, "the first adapter")
    zeros = read(torch.zeros_like(first), "zero")
    experts = tuple(read(tensor, f"adapter {t}") for t, tensor in enumerate(tensors))
    uniform = (Uniform(),) * len(experts)
    inputs = TensorInputs("weight", tuple(first.shape), experts[0].dtype, zeros, experts, uniform)
    settings = Settings.of(row.name, True, {}, [{} for _ in experts])
    return array_like(first, _merged(row, inputs, settings, backend), experts[0].dtype, tuple(first.shape))


def _pool(device: torch.device | None, numel: int) -> Any:
    if device is not None:
        return Inline(device)
    # Threads take longer to start than one tile to merge.
    return contextlib.nullcontext(IN_PLACE) if numel <= _TILE else Pool(default_threads())


def _merged(row: Method, inputs: TensorInputs, settings: Settings, backend: Backend) -> Any:
    on_device = inputs.is_resident
    device = inputs.experts[0].data.device if on_device else None
    with _pool(device, inputs.numel) as pool:
        sink = MemorySink([inputs])
        decider = Decider(row, [inputs], {inputs.name: settings}, backend, pool)
        engine = Engine(
            {0: inputs},
            sink,
            decider=decider,
            found=decider.decide_model(),
            tile_elements=resident.TILE if on_device else _TILE,
            store=Store(_UNLIMITED),
        )
        for _ in engine.run():
            pass
    return sink.outputs[0]


# The `_svd` forms


def _svd_adapter(
    self: Any,
    combination_type: str,
    adapters: Sequence[str],
    weights: Sequence[float],
    new_rank: int,
    target: Any,
    target_lora_A: torch.Tensor,  # noqa: N803 - PEFT calls it by name
    target_lora_B: torch.Tensor,  # noqa: N803
    density: float | None,
    majority_sign_method: str,
    clamp: float | None = None,
    full_matrices: bool = True,
    driver: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of one module: the leading new_rank singular triples of a combination of the adapters'
    products."""
    import torch

    embedding = any(adapter in target.lora_embedding_A for adapter in adapters)
    pairs = [
        (adapter, weight)
        for adapter, weight in zip(adapters, weights, strict=True)
        if adapter in target.lora_A or adapter in target.lora_embedding_A
    ]
    if not pairs:
        raise ValueError("no adapter changes this module")
    deltas = [target.get_delta_weight(adapter) for adapter, _ in pairs]
    factors = torch.tensor([weight for _, weight in pairs])
    functions: dict[str, Callable[[], torch.Tensor]] = {
        "svd": lambda: _task_arithmetic(deltas, factors),
        "ties_svd": lambda: _ties(deltas, factors, density, majority_sign_method),
        "dare_linear_svd": lambda: _dare_linear(deltas, factors, density),
        "dare_ties_svd": lambda: _dare_ties(deltas, factors, density, majority_sign_method),
        "magnitude_prune_svd": lambda: _magnitude_prune(deltas, factors, density),
    }
    if combination_type not in functions:
        raise ValueError(f"Invalid value passed to combination type: {combination_type}")
    merged = functions[combination_type]().flatten(start_dim=1)
    if getattr(target, "fan_in_fan_out", False) or embedding:
        merged = merged.T
    b, a = _leading(merged, new_rank)
    if clamp is not None:
        high = torch.quantile(torch.cat([b.flatten(), a.flatten()]), clamp)
        b, a = b.clamp(-high, high), a.clamp(-high, high)
    if deltas[0].ndim > 2:
        a, b = a.reshape(target_lora_A.shape), b.reshape(target_lora_B.shape)
    return a, b


def _leading(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(U S [m, rank], V^T [rank, n]) of the leading singular triples, from the eigenvectors of the smaller
    Gram matrix in float64. Directions below 2^-24 of the first are left out, zeros in their place."""
    import torch

    x = matrix.double()
    wide = x.shape[0] <= x.shape[1]
    gram = x @ x.T if wide else x.T @ x
    values, vectors = torch.linalg.eigh(gram)
    kept = min(rank, len(values))
    singular = values.flip(0)[:kept].clamp(min=0).sqrt()
    leading = vectors.flip(1)[:, :kept] * (singular > singular[:1] * 2.0**-24)
    inverse = torch.where(singular > 0, 1 / singular.clamp(min=1e-300), singular)
    if wide:
        b, a = leading * singular, (leading * inverse).T @ x
    else:
        b, a = x @ leading, leading.T
    b = torch.nn.functional.pad(b, (0, rank - kept))
    a = torch.nn.functional.pad(a, (0, 0, 0, rank - kept))
    return b.to(matrix.dtype), a.to(matrix.dtype)
