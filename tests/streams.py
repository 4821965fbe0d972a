"""The engine's merge in memory with everything it decided: what the tests of densities share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from models import Experts, decider_of

from ota_kernels.recipe.schema import Recipe, parse_recipe
from ota_kernels.run.decide import Decider
from ota_kernels.run.engine import Engine, Sink
from ota_kernels.run.pool import Pool
from ota_kernels.run.rules import RULES, Rules
from ota_kernels.run.state import State
from ota_kernels.select.pending import Pending, Store
from ota_kernels.tensors.result import Counts
from ota_kernels.tensors.tile import TensorInputs

BIG = (180, 200)  # elements enough that the thresholds of one tensor are bracketed
KEEP_NOTHING = 1e30  # as an absolute saliency: above every finite score


class Memory:
    """A Sink that keeps merged tiles. outputs: uint8 per tensor, NaN until written."""

    def __init__(self, tensors: Sequence[TensorInputs]) -> None:
        self._sizes = [t.out_dtype.itemsize for t in tensors]
        self.outputs = [np.full(t.numel * t.out_dtype.itemsize, 0xFF, np.uint8) for t in tensors]

    def room(self, segment, nbytes):
        return np.full(nbytes, 0xFF, np.uint8)

    def write(self, segment, merged, final):
        begin = segment.start * self._sizes[segment.index]
        self.outputs[segment.index][begin : begin + len(merged)] = merged

    def patch(self, segment, positions, merged):
        size = self._sizes[segment.index]
        elements = self.outputs[segment.index].reshape(-1, size)[segment.start : segment.stop]
        elements[positions] = merged.reshape(-1, size)

    def wants(self, tensor, segment):
        pass

    def done_with(self, tile):
        pass


@dataclass(frozen=True)
class Streamed:
    """outputs: bytes per tensor; counts: per tensor; waiting: (tensor, undecided elements) of tiles that
    waited for thresholds; repeats: thresholds that lay outside their brackets."""

    outputs: list[bytes]
    counts: list[Counts]
    waiting: list[tuple[int, int]]
    repeats: int

    def scores(self, t: int) -> list[float | None]:
        """Expert t's threshold in each tensor, as a score."""
        found = [counts.thresholds[t] for counts in self.counts]
        return [None if x is None else x * 2.0**64 for x in found]

    def numbers(self) -> list[tuple]:
        """Counts without thresholds."""
        return [(c.kept, c.unkept, c.overflow, c.repaired) for c in self.counts]


def stream(
    recipe: Recipe,
    tensors: Sequence[TensorInputs],
    backend: ModuleType,
    tile: int = 20_000,
    threads: int = 2,
    budget: int = 1 << 30,
    rules: Rules = RULES,
) -> Streamed:
    """A merge in memory, as the engine does it."""
    sink = Memory(tensors)
    with Pool(threads) as pool:
        decider = decider_of(recipe, tensors, backend, pool, rules)
        counts, waiting, repeats = run_engine(decider, sink, tile, budget)
    return Streamed([out.tobytes() for out in sink.outputs], counts, waiting, repeats)


def run_engine(
    decider: Decider, sink: Sink, tile: int, budget: int
) -> tuple[list[Counts], list[tuple[int, int]], int]:
    """(counts, waiting, repeats) as in Streamed."""
    state, store, waiting = State([], len(decider.tensors)), Store(budget), []
    engine = Engine(
        dict(enumerate(decider.tensors)),
        sink,
        decider=decider,
        found=decider.decide_model(),
        tile_elements=tile,
        store=store,
    )
    for event in engine.run():
        state.add(event)
        if isinstance(event, Pending):
            waiting.append((event.segment.index, event.several + sum(event.alternatives)))
    store.close()
    assert not state.pending
    return state.counts, waiting, state.repeats + sum(counts.repeats for counts in state.counts)


def recipe_of(own: Sequence[dict], has_base: bool = True, **shared) -> Recipe:
    """A recipe whose models have these parameters of their own."""
    path = {"preconditioner_path": "exp_avg_sq.safetensors"}
    models = [{"model": f"expert{t}", "parameters": path | one} for t, one in enumerate(own)]
    data = {"merge_method": "ota", "models": models, "parameters": shared}
    return parse_recipe(data | {"base_model": "base"} if has_base else data)


def inputs_of(tensors: Sequence[Experts], out_dtype: str = "float32", **more) -> list[TensorInputs]:
    return [experts.inputs(out_dtype, f"t{i}", **more) for i, experts in enumerate(tensors)]


def closed_recipe(thresholds: Sequence[float | None], **shared) -> Recipe:
    """The recipe that knows the thresholds (scores) beforehand."""
    own = [{"precond_threshold": KEEP_NOTHING if x is None else x * 2.0**-64} for x in thresholds]
    return recipe_of(own, **shared)
