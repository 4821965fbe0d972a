"""Tensors that some models lack (METHODS section 1, optional tensors)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .parameters import Method, Settings
from .tensors import Merged, Tensor, merged


def reduce(
    name: str, method: Method, tensor: Tensor, settings: Settings
) -> tuple[Tensor, Settings] | Merged | None:
    """What is left to merge; or the outcome, where no merging is left; None: the tensor is left out.

    merge        over those present; a missing base is an error
    only one     slerp, nuslerp, arcee_fusion: the only one that is present is passed through
    base alone   nearswap: nothing but the base is passed through
    three        model_stock: with fewer than 3 inputs left out

    A tensor that the base alone has stays as it is, in every method that has a base.
    """
    here = [t for t, w in enumerate(tensor.experts) if w is not None]
    if not here and tensor.base is not None and method.base != "ignored":
        return _passed(tensor, tensor.base)
    if method.base == "required" and tensor.base is None and method.absent != "only one":
        if method.absent == "three" and len(here) < 3:
            return None
        raise ValueError(f"{name}: the base lacks the tensor")
    if len(here) == len(tensor.experts) and (tensor.base is not None or method.base != "required"):
        return tensor, settings
    if not here:
        return None
    inputs = [x for x in (tensor.base, *tensor.experts) if x is not None]
    if method.absent == "three" and len(inputs) < 3:
        return None
    if method.absent == "only one" and len(inputs) == 1:
        return _passed(tensor, inputs[0])
    if method.absent in ("only one", "base alone"):
        raise ValueError(
            f"{name}: {len(inputs)} inputs have the tensor: too few to merge, too many to pass through"
        )
    own = tuple(settings.own[t] for t in here)
    return tensor.only(here), replace(settings, own=own)


def _passed(tensor: Tensor, x: np.ndarray) -> Merged:
    """An input as it is; kept by the expert that it is, if any."""
    found = merged(x, Tensor(x, ()), [])
    masks = np.zeros((len(tensor.experts), *x.shape), bool)
    masks[[w is not None for w in tensor.experts]] = True
    return replace(found, masks=masks, unkept=~masks.any(axis=0))


def spread_out(found: Merged, n_experts: int, settings: Settings) -> Merged:
    """Masks with a row for every expert of the recipe, False where the model lacks the tensor."""
    positions = settings.each("position")
    if len(positions) == n_experts:
        return found

    def rows(masks: np.ndarray | None) -> np.ndarray | None:
        if masks is None:
            return None
        whole = np.zeros((n_experts, *masks.shape[1:]), bool)
        whole[positions] = masks
        return whole

    return replace(found, masks=rows(found.masks), agreed=rows(found.agreed))
