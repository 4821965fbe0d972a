"""Experts: the base fully fine-tuned on one task each, as Hugging Face folders with second moments."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional

from .command import ota_merge
from .encoder import SCALE, Encoder, base_folder
from .tasks import Task

SETS = ("a", "b")  # two trainings: other seeds, another 80 % of the training texts, other texts to score
MOMENTS = "exp_avg_sq.safetensors"


@dataclass(frozen=True)
class Training:
    """AdamW's settings: linear warm-up over a tenth of the steps, then linear decay."""

    steps: int = 150
    batch: int = 16
    rate: float = 1e-4
    decay: float = 0.01


TRAINING = Training()


def train_all(cache: Path, tasks: dict[str, Task], training: Training = Training()) -> None:
    """Train what the cache lacks."""
    base = base_folder(cache)
    for group in SETS:
        for name, task in tasks.items():
            folder = folders(cache, group, [name], training)[name]
            if not (folder / MOMENTS).exists():
                _train(base, folder, name, task, group, training)


def folders(cache: Path, group: str, names: Iterable[str], training: Training = TRAINING) -> dict[str, Path]:
    """A set's experts by task; another training is another folder."""
    place = cache / f"experts-{training.steps}x{training.batch}-{training.rate:g}" / group
    return {name: place / name for name in names}


def _train(base: Path, folder: Path, name: str, task: Task, group: str, training: Training) -> None:
    began = time.monotonic()
    encoder = Encoder(base, {name: task})
    model, head = encoder.model, encoder.heads[name]
    seed = 1000 * SETS.index(group) + sum(name.encode())
    torch.manual_seed(seed)  # dropout
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(task.train), generator=generator)[: int(0.8 * len(task.train))].tolist()
    tokens, labels = encoder.tokens([task.train[i][0] for i in chosen]), [task.train[i][1] for i in chosen]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.rate, weight_decay=training.decay, fused=True
    )
    model.train()
    queue: list[int] = []
    losses = []
    for step in range(training.steps):
        if len(queue) < training.batch:
            queue = torch.randperm(len(tokens), generator=generator).tolist()
        pick, queue = queue[: training.batch], queue[training.batch :]
        warm, left = (step + 1) / (0.1 * training.steps), (training.steps - step) / (0.9 * training.steps)
        optimizer.param_groups[0]["lr"] = training.rate * min(warm, left)
        logits = SCALE * encoder.embed([tokens[i] for i in pick]) @ head.T
        loss = functional.cross_entropy(logits, torch.tensor([labels[i] for i in pick]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    _save(base, folder, model, optimizer)
    took = time.monotonic() - began
    print(
        f"expert {group} {name}: loss {losses[0]:.2f} -> {sum(losses[-20:]) / 20:.2f}, {took:.0f} s",
        flush=True,
    )


def _save(base: Path, folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As a trainer does; of the optimizer's state, second moments are extracted."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    for asset in ("config.json", "tokenizer.json"):
        shutil.copy(base / asset, folder)
    names = [name for name, _ in model.named_parameters()]
    state = optimizer.state_dict()
    by_name = {
        "state": {names[i]: s for i, s in state["state"].items()},
        "param_groups": [g | {"params": [names[i] for i in g["params"]]} for g in state["param_groups"]],
    }
    torch.save(by_name, folder / "optimizer.pt")
    ota_merge("moments", "extract", folder, folder / MOMENTS, "--overwrite")
    (folder / "optimizer.pt").unlink()
