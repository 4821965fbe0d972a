"""The engine's merge in memory with everything it decided: what the tests of densities share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from models import Experts

from ota_kernels.recipe.schema import Recipe, parse_recipe
from ota_kernels.run.counts import Tally
from ota_kernels.run.engine import Engine, Open
from ota_kernels.run.pool import Pool
from ota_kernels.run.state import Ledger
from ota_kernels.run.survey import Survey
from ota_kernels.select.pending import Store
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

    def write(self, segment, merged):
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
    """outputs: bytes per tensor; tallies: per tensor; waiting: (tensor, candidates) of tiles that waited for
    thresholds; repeats: thresholds that lay outside their brackets."""

    outputs: list[bytes]
    tallies: list[Tally]
    waiting: list[tuple[int, int]]
    repeats: int

    def scores(self, t: int) -> list[float | None]:
        """Expert t's threshold in each tensor, as a score."""
        found = [tally.thresholds[t] for tally in self.tallies]
        return [None if x is None else x * 2.0**64 for x in found]

    def counts(self) -> list[tuple]:
        return [(t.kept, t.unkept, t.overflow, t.repaired) for t in self.tallies]


def stream(
    recipe: Recipe,
    tensors: Sequence[TensorInputs],
    backend: ModuleType,
    tile: int = 20_000,
    threads: int = 2,
    budget: int = 1 << 30,
) -> Streamed:
    """A merge in memory, as the engine does it."""
    survey = Survey(recipe, tensors, backend)
    sink, ledger, store, waiting = Memory(tensors), Ledger([], len(tensors)), Store(budget), []
    with Pool(threads) as pool:
        engine = Engine(
            dict(enumerate(tensors)),
            sink,
            backend=backend,
            pool=pool,
            tile_elements=tile,
            survey=survey,
            decisions=survey.decide_model(pool.run),
            store=store,
        )
        for event in engine.run():
            ledger.add(event)
            if isinstance(event, Open):
                waiting.append((event.segment.index, event.held.count + sum(event.held.alternatives)))
    store.close()
    assert not ledger.open
    repeats = ledger.repeats + sum(tally.repeats for tally in ledger.tallies)
    return Streamed([out.tobytes() for out in sink.outputs], ledger.tallies, waiting, repeats)


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
