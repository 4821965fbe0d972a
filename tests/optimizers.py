"""Small models that real optimizers have trained, and what an extracted file must hold of them."""

from __future__ import annotations

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

STEPS = 3


class Net(nn.Module):
    """Parameters of different shapes, a frozen one among them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.hidden = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.frozen = nn.Linear(6, 3, bias=False).requires_grad_(False)
        self.out = nn.Linear(3, 2)

    def forward(self, tokens):
        return self.out(self.frozen(self.norm(self.hidden(self.embed(tokens)))))


def train(model, optimizer, steps=STEPS):
    """Some steps with random gradients; frozen parameters get none."""
    for _ in range(steps):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = 0.1 * torch.randn_like(parameter)
        optimizer.step()


def live(model, optimizer, key="exp_avg_sq"):
    """What the optimizer itself holds, by name."""
    return {n: optimizer.state[p][key] for n, p in model.named_parameters() if key in optimizer.state[p]}


def decay_groups(parameters):
    """As trainers group: matrices decay, vectors do not."""
    parameters = [(n, p) for n, p in parameters if p.requires_grad]
    return [
        {"params": [(n, p) for n, p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def nameless(groups):
    return [group | {"params": [p for _, p in group["params"]]} for group in groups]


def assert_extracted(out, expected):
    """The file holds these float32 bits under these names, and nothing else."""
    found = load_file(out)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor.detach().float()), name


def metadata_of(out):
    with safe_open(out, "pt") as file:
        return file.metadata()


def adam_state(shape=(4, 5), **more):
    """One parameter's entry as torch.optim.Adam keeps it, with further keys."""
    return {
        "step": torch.tensor(float(STEPS)),
        "exp_avg": torch.randn(shape),
        "exp_avg_sq": torch.rand(shape),
    } | more


def saved_states(path, states, **settings):
    """A torch file of these states by name, in one group with `settings`."""
    group = {"params": list(states), "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8} | settings
    torch.save({"state": states, "param_groups": [group]}, path)
    return path
