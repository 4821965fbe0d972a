"""What a user may write, which `mypy --strict` accepts (test_typing.py)."""

from __future__ import annotations

import torch

import ota_kernels
from ota_kernels.integrations.mergekit import register
from ota_kernels.integrations.peft import accelerated, merge_adapters


@ota_kernels.method("typed", each=["weight"])
def typed(base: torch.Tensor, experts: list[torch.Tensor], *, weight: float = 1.0) -> torch.Tensor:
    return base


def main() -> None:
    base = {"w": torch.zeros(3)}
    experts = [{"w": torch.ones(3)}, {"w": torch.ones(3)}]
    merged: dict[str, torch.Tensor] = ota_kernels.merge_state_dicts(base, experts, density=0.5)
    one: torch.Tensor = ota_kernels.merge_tensors(base["w"], [e["w"] for e in experts], lambda_=0.5)
    merger = ota_kernels.Merger(base, experts)
    again: dict[str, torch.Tensor] = merger(method="ties", weight=1.0, density=0.2, out=merged)
    model = torch.nn.Linear(2, 2)
    ota_kernels.merge_into(model, model, [model], method="task_arithmetic", weight=0.5)
    grafted: torch.Tensor = ota_kernels.graft(base["w"], experts[0]["w"], None, density=0.1)
    ota_kernels.method("loudest", select="density", elect="largest")
    plan = ota_kernels.plan("recipe.yaml")
    passes: int = plan.passes
    report = ota_kernels.merge("recipe.yaml", "out")
    reports = ota_kernels.sweep("recipe.yaml", "out", {"lambda": [0.5, 1.0]})
    try:
        ota_kernels.densities("recipe.yaml")
    except ota_kernels.OtaError as error:
        print(error.exit_code)
    with accelerated():
        merge_adapters(["a", "b"], "c", method="linear")
    names: tuple[str, ...] = register()
    print(one, again, grafted, passes, report, reports, names)
