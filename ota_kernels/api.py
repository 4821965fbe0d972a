"""Merging tensors in memory: torch tensors or numpy arrays in, the same kind out.

Tensors on a GPU are merged there: nothing of their size crosses to the host, and everything runs on the
calling thread's current stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

from .arguments import recipe_of
from .errors import InputError, RecipeError
from .integrations import gradients
from .integrations.tracing import traceable
from .merger import Merger, Placed
from .run.sinks import GraftSink

if TYPE_CHECKING:
    import torch

Tensor = TypeVar("Tensor")  # torch.Tensor or numpy.ndarray
Model = TypeVar("Model")  # a Tensor, or a dictionary of them


def merge_tensors(
    base: Tensor | None,
    experts: Sequence[Tensor],
    curvatures: Sequence[Tensor] | None = None,
    *,
    method: str = "ota",
    origins: Sequence[Tensor | None] | None = None,
    name: str = "weight",
    out_dtype: str | None = None,
    backend: str = "auto",
    threads: int | None = None,
    **parameters: Any,
) -> Tensor:
    """Merge one tensor of several models: out = w_0 + lambda sum_t P_t d_t / sum_t P_t (arXiv 2509.11167).

    base: any shape, or None for methods that need none; experts: tensors of the same shape, in recipe order;
    curvatures: second moments v_t of each expert, same shape, float32, bfloat16 or float16, >= 0 (units of
    squared gradient), or None for curvature 1 everywhere; origins: what each expert's edit is counted from,
    None for the base (skill vectors, unlearning by a negative weight). name: tells embeddings and output
    matrices from other matrices where that matters (`rank`, `rescale`). parameters: the recipe's keys
    (`density`, `precond_threshold`, `power`, `lambda_` for `lambda`, ...); a key of one model may be a list
    with a value per expert. Densities are over this tensor.

    Tensors on a GPU are merged there by the backend `triton`, on the current stream. For others
    `auto` is `native`; `triton` streams them through a GPU.

    CUDA graphs: a merge on a GPU can be captured that the host decides nothing of: with precond_threshold and
    on_nonfinite "base", or `linear` and its like, whose results show what is not finite. A `Merger` that has
    merged so before knows its other thresholds, too. Nothing is counted then. Merge once before the capture,
    for kernels that have to compile. Anything else is a BackendError while a stream is captured.

    Returns a new tensor like the first input, on its device, in out_dtype (default: the base's, or first
    expert's, type). Raises RecipeError for a wrong parameter, InputError for tensors that do not fit, are not
    finite, lie on several devices or are DTensors, BackendError for a device that the backend does not serve.
    """
    merged = merge_state_dicts(
        None if base is None else {name: base},
        [{name: expert} for expert in experts],
        None if curvatures is None else [{name: curvature} for curvature in curvatures],
        method=method,
        origins=None if origins is None else [None if o is None else {name: o} for o in origins],
        out_dtype=out_dtype,
        backend=backend,
        threads=threads,
        **parameters,
    )
    return merged[name]


@traceable
def merge_state_dicts(
    base: Mapping[str, Tensor] | None,
    experts: Sequence[Mapping[str, Tensor] | str | PathLike],
    curvatures: Sequence[Mapping[str, Tensor]] | None = None,
    *,
    method: str = "ota",
    origins: Sequence[Mapping[str, Tensor] | None] | None = None,
    out_dtype: str | None = None,
    backend: str = "auto",
    threads: int | None = None,
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merge dictionaries of tensors; densities are over all of them (`density_scope: model`) unless told.

    Arguments and errors as for `merge_tensors`; tensors of different names may lie on different GPUs, each is
    merged where it is. An expert may be the path of a pack (`ota-merge pack`)
    against the base: it is made tile by tile, on the host. Tensors that are not floating point, and
    buffers that no optimizer trained (`inv_freq`, masks, counters), are copied in their own type when all
    models agree. Names that only some dictionaries have are an error unless `extra_tensors` says
    otherwise; of buffers, the first one's is taken. A name without curvature is an error unless
    `missing_curvature` says otherwise.

    Weights with gradients: `weight` may be a torch tensor [experts], and `lambda_` one of shape (), of the
    methods `linear` and `task_arithmetic`, which are linear in them; RecipeError for others. Results then
    carry gradients for them, and for inputs that require them.
    """
    if gradients.are_given(parameters):
        from .integrations import torch_ops  # noqa: F401 - registers the operators

        others = {"curvatures": curvatures, "origins": origins, "out_dtype": out_dtype, "threads": threads}
        parameters |= others | {"backend": backend}
        return gradients.merge_state_dicts(base, experts, method, parameters)
    placed = Placed(base, experts, curvatures, backend, threads, origins)
    return placed.merge(placed.recipe(method, out_dtype, parameters))


def merge_into(
    model: torch.nn.Module | Mapping[str, Tensor],
    base: torch.nn.Module | Mapping[str, Tensor] | None,
    experts: Sequence[torch.nn.Module | Mapping[str, Tensor]],
    curvatures: Sequence[Mapping[str, Tensor]] | None = None,
    *,
    method: str = "ota",
    origins: Sequence[torch.nn.Module | Mapping[str, Tensor] | None] | None = None,
    backend: str = "auto",
    threads: int | None = None,
    **parameters: Any,
) -> None:
    """Write a merge into a live model's parameters and buffers: on their device, in their types.

    model: a torch module, or a dictionary of tensors; base, experts: modules or dictionaries whose tensors
    have the model's names. Other arguments and errors are those of `merge_state_dicts`. Parameters that are
    tied, one memory under several names, are merged once, and refused where the inputs differ under these
    names.

    Nothing of the model's size is held beside it, except for parameters that are inputs too, that are not
    contiguous, or that lie on another device than the inputs: those are merged in memory of their own, and
    copied. After an error the model holds a part of the merge.
    """
    Merger(base, experts, curvatures, origins=origins, backend=backend, threads=threads)(
        method=method, out=model, **parameters
    )


@traceable
def graft(
    base: Model,
    expert: Model,
    curvature: Model | None,
    *,
    density: float | None = None,
    saliency_mass: float | None = None,
    precond_threshold: float | None = None,
    density_scope: str = "model",
    rank: int | None = None,
    rank1_approx: bool = False,
    missing_curvature: str = "error",
    backend: str = "auto",
    threads: int | None = None,
) -> Model:
    """Fast Fisher Grafting (arXiv 2509.11167): the base, with one expert's most salient edits.

    base, expert: a tensor each, of the same shape and any floating-point type that a merge can be written
    in, or dictionaries of tensors; curvature: the expert's second moments as for `merge_tensors`, or None for
    curvature 1, which grafts by magnitude. Exactly one of density, saliency_mass and precond_threshold says
    which edits are kept; they and the other parameters are the recipe's keys. Masks are those of a merge with
    this one expert: exact, ties kept.

    Returns new tensors of the base's types, a tensor or a dictionary like the base: where an edit is dropped,
    the base's value bit for bit, where it is kept, the expert's value bit for bit (rounded to the base's type
    where the expert's differs). An edit from 0 to -0 is none. Errors are those of `merge_tensors`, which call
    the expert experts[0].
    """
    selections = {"density": density, "saliency_mass": saliency_mass, "precond_threshold": precond_threshold}
    given = {key: value for key, value in selections.items() if value is not None}
    if len(given) != 1:
        found = " and ".join(f"`{key}`" for key in given) or "none"
        raise RecipeError(f"a graft takes exactly one of {', '.join(selections)}, not {found}")
    models = [base, expert] if curvature is None else [base, expert, curvature]
    kinds = {isinstance(model, Mapping) for model in models}
    if len(kinds) > 1:
        raise InputError("base, expert and curvature must be all tensors, or all dictionaries of tensors")
    parameters = given | {
        "masked_task_vector_merge_method": "linear",  # w_0 + d: the weights of one expert cancel
        "density_scope": density_scope,
        "rank1_approx": rank1_approx,
        "missing_curvature": missing_curvature,
    }
    if rank is not None:
        parameters["rank"] = rank
    recipe = recipe_of(True, 1, curvature is not None, "ota", None, parameters)
    whole = kinds == {True}
    base, expert, *curvatures = models if whole else [{"weight": model} for model in models]
    merged = Placed(base, [expert], curvatures or None, backend, threads).merge(recipe, sink=GraftSink)
    return {name: merged[name] for name in base if name in merged} if whole else merged["weight"]
