"""The data, the model and its training: six views of scikit-learn's handwritten digits, and a small MLP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..errors import RecipeError

BETA2 = 0.999

# Every view maps images[n, 8, 8] to images of the same shape. None of them loses information: "shifted" is
# cyclic, because a plain shift by two pixels would push strokes out of an 8 x 8 picture.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "clean": lambda images: images,
    "rotated": lambda images: images.rot90(1, (1, 2)),
    "inverted": lambda images: 1 - images,
    "mirrored": lambda images: images.flip(2),
    "shifted": lambda images: images.roll((2, 2), (1, 2)),
    "transposed": lambda images: images.transpose(1, 2),
}

# One expert per view; "clean" has none, so its column shows what the merges keep of the base.
EXPERTS = tuple(view for view in VIEWS if view != "clean")


@dataclass(frozen=True)
class Settings:
    """What one seed's base and experts depend on; equal settings give equal tensors.

    widths: units per layer, input to output; base_steps, expert_steps: optimizer steps; batch: images per
    step; base_rate, expert_rate: AdamW's learning rates; held_out: images kept from training.
    """

    seed: int = 0
    widths: tuple[int, ...] = (64, 256, 128, 10)
    base_steps: int = 200
    expert_steps: int = 150
    batch: int = 128
    base_rate: float = 2e-3
    expert_rate: float = 5e-4
    held_out: int = 360


@dataclass(frozen=True)
class Images:
    """images: float32[n, 8, 8] in [0, 1]; labels: int64[n]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Images:
        """The images at `indices`."""
        return Images(self.images[indices], self.labels[indices])

    def seen_as(self, view: str) -> Images:
        """The same images in one view."""
        return Images(VIEWS[view](self.images), self.labels)


class Mlp(nn.Module):
    """Linear layers with ReLU between them. widths: units per layer, input to output."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in pairwise(widths))

    def forward(self, images: Tensor) -> Tensor:
        """images[n, 8, 8] -> logits[n, 10]."""
        hidden = images.flatten(1)
        for layer in self.layers[:-1]:
            hidden = layer(hidden).relu()
        return self.layers[-1](hidden)


def split(settings: Settings) -> tuple[Images, Images]:
    """(training, held-out) images of one seed. Raises RecipeError where scikit-learn is missing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RecipeError("the demo needs scikit-learn: pip install 'ota-kernels[demo]'") from error
    digits = load_digits()
    everything = Images(
        torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target, dtype=torch.int64)
    )
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(settings.seed))
    return everything.take(order[settings.held_out :]), everything.take(order[: settings.held_out])


def train_base(settings: Settings, training: Images) -> Mlp:
    """A fresh model trained briefly on all six views mixed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = Mlp(settings.widths)
    views = [training.seen_as(view) for view in VIEWS]
    mix = Images(torch.cat([v.images for v in views]), torch.cat([v.labels for v in views]))
    _fit(model, mix, settings.base_steps, settings.base_rate, settings)
    return model


def train_expert(settings: Settings, base: Mlp, training: Images, view: str) -> tuple[Mlp, dict[str, Tensor]]:
    """The base fine-tuned on one view, and the `exp_avg_sq` that Adam ends with, by parameter name."""
    model = Mlp(settings.widths)
    model.load_state_dict(base.state_dict())
    optimizer = _fit(model, training.seen_as(view), settings.expert_steps, settings.expert_rate, settings)
    return model, {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters()}


def _fit(model: Mlp, data: Images, steps: int, rate: float, settings: Settings) -> torch.optim.AdamW:
    """Train in place on batches drawn with replacement; returns the optimizer with its final state."""
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, BETA2))
    # One thread: for layers this small a second one gains nothing, and waits long where others compute.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(steps):
            batch = data.take(torch.randint(len(data), (settings.batch,), generator=generator))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch.images), batch.labels).backward()
            optimizer.step()
    finally:
        torch.set_num_threads(threads)
    return optimizer


@torch.no_grad()
def accuracy(model: Mlp, data: Images) -> float:
    """Share of `data` that the model labels right, in [0, 1]."""
    return (model(data.images).argmax(1) == data.labels).float().mean().item()
