"""The merge as one would write it in plain torch: whole tensors, eager operations, safetensors in and out.

    python -m bench.plain_torch RECIPE OUT

The rival that bench.end_to_end times: absolute thresholds, and linear, of single-file checkpoints.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

_EPSILON = 1e-26


def merge(recipe: dict, out: Path) -> None:
    """Write OUT/model.safetensors."""
    models = recipe["models"]
    experts = [_open(Path(model["model"]) / "model.safetensors") for model in models]
    names = experts[0].keys()
    if recipe["merge_method"] == "linear":
        merged = {name: _linear([e.get_tensor(name) for e in experts]) for name in names}
    else:
        own = [model["parameters"] for model in models]
        if not all("precond_threshold" in parameters for parameters in own):
            raise SystemExit("plain torch merges with absolute thresholds only")
        base = _open(Path(recipe["base_model"]) / "model.safetensors")
        curvatures = [_open(Path(parameters["preconditioner_path"])) for parameters in own]
        thresholds = [parameters["precond_threshold"] for parameters in own]
        merged = {}
        for name in names:
            weights = [e.get_tensor(name) for e in experts]
            merged[name] = ota(
                base.get_tensor(name), weights, [c.get_tensor(name) for c in curvatures], thresholds
            )
    out.mkdir(parents=True)
    save_file(merged, out / "model.safetensors", metadata={"format": "pt"})


def _open(path: Path):
    return safe_open(path, framework="pt")


def _linear(experts: list[torch.Tensor]) -> torch.Tensor:
    return (sum(w.float() for w in experts) / len(experts)).to(experts[0].dtype)


def ota(
    base: torch.Tensor,
    experts: list[torch.Tensor],
    curvatures: list[torch.Tensor],
    thresholds: list[float] | list[torch.Tensor],
) -> torch.Tensor:
    """w_0 + sum_t m_t P_t d_t / sum_t m_t P_t, P_t = sqrt(h_t) + eps; w_0 where no edit is kept."""
    w_0 = base.float()
    numerator, denominator = torch.zeros_like(w_0), torch.zeros_like(w_0)
    for w, v, threshold in zip(experts, curvatures, thresholds, strict=True):
        d, h = w.float() - w_0, v.float()
        p = torch.where(h * (d * d) >= threshold, h.sqrt() + _EPSILON, 0.0)
        numerator += p * d
        denominator += p
    return torch.where(denominator > 0, w_0 + numerator / denominator, w_0).to(base.dtype)


if __name__ == "__main__":
    merge(yaml.safe_load(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
