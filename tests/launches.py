"""What work on a device costs beside its bytes: launches, and waits of the host, under the interpreter."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Neither kernels nor copies: memory, and other views of it.
_FREE = {
    *("alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh"),
    *(
        "new_empty",
        "new_empty_strided",
        "permute",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
    ),
    *("set_", "unbind", "unsqueeze", "view", "_unsafe_view", "resolve_conj", "resolve_neg", "diagonal"),
}
# The sizes of what these return, or a number, come from the device.
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal", "is_nonzero"}


@dataclass
class Costs:
    """kernels: of Triton; of_torch: by their names; waits: by what has waited."""

    kernels: Counter = field(default_factory=Counter)
    of_torch: Counter = field(default_factory=Counter)
    waits: Counter = field(default_factory=Counter)
    inside: bool = False  # of a kernel that is interpreted

    @property
    def launches(self) -> int:
        """Of all kernels."""
        return self.kernels.total() + self.of_torch.total()


class _Torch(TorchDispatchMode):
    def __init__(self, costs: Costs) -> None:
        super().__init__()
        self._costs = costs

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self._costs.inside:
            return function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_") else ()
        if (
            name in _WAITING
            or (
                name == "repeat_interleave"
                and isinstance(args[0], torch.Tensor)
                and "output_size" not in (kwargs or {})
            )
            or any(x is not None and x.dtype == torch.bool for x in indices)
        ):
            self._costs.waits[name] += 1
        if name not in _FREE and name != "_local_scalar_dense":
            self._costs.of_torch[name] += 1
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted(monkeypatch) -> Iterator[Costs]:
    """What happens inside. The CPU is the device: what would copy from a GPU is told by its call."""
    from triton.runtime.interpreter import InterpretedFunction

    costs = Costs()
    with monkeypatch.context() as patch:
        run = InterpretedFunction.run

        def launched(self, *args, **kwargs):
            costs.kernels[self.fn.__name__] += 1
            costs.inside = True
            try:
                return run(self, *args, **kwargs)
            finally:
                costs.inside = False

        patch.setattr(InterpretedFunction, "run", launched)
        for name in ("cpu", "tolist"):
            patch.setattr(torch.Tensor, name, _waiting(costs, name, getattr(torch.Tensor, name)))
        with _Torch(costs):
            yield costs


def _waiting(costs: Costs, name: str, method):
    def call(self, *args, **kwargs):
        costs.waits[name] += not costs.inside
        return method(self, *args, **kwargs)

    return call
