"""What a merge would read, write and hold in memory, from headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..backends import Backend
from ..backends.speed import seconds
from ..backends.triton import LEAST_SLOTS, MOST_SLOTS
from ..errors import RecipeError
from ..io.writer import Layout
from ..processors import default_threads
from ..recipe.needs import Needs
from ..sizes import format_bytes
from ..tensors.result import STEP_BYTES, Alternatives, Candidates
from ..tensors.segment import CHUNK
from ..tensors.tile import TensorInputs
from .inputs import Inputs
from .outputs import OutputTensor


class Work(Protocol):
    """What a plan asks of what will decide (run/decide.py): tensors; reads of the model, and of each tensor,
    before it merges; whether thresholds are settled after the merge, over the model; how many elements then
    wait."""

    tensors: Sequence[TensorInputs]
    needs: Needs
    passes: int
    tensor_passes: int
    brackets: bool
    model_scope: bool
    matrices: Any

    def expected_candidates(self) -> int: ...

    def selections(self, tensor: TensorInputs | None = None) -> list: ...


DEFAULT_BUDGET = 256 << 20  # bytes of undecided elements that are held in memory

# Elements of a tile: large enough that a tile costs far more than its Python (2 ms against 0.1), small enough
# that the tiles in flight stay a few percent of the memory limit.
TILE_ELEMENTS = 1 << 20
# Of a density per tensor, where a tensor that is one tile is selected from, merged and settled by one worker;
# and on a GPU, where a tile's copies must take far longer than the Python of its launches.
_LARGE_TILE_ELEMENTS = 4 * TILE_ELEMENTS
_SMALLEST_TILE = 1 << 14
# A GPU wants tiles in flight that are large enough to hide its latencies; its machine has the memory.
_MEMORY_LIMITS = {"native": 1 << 30, "reference": 1 << 30, "triton": 4 << 30}

# Measured resident sizes of a process that has imported what the backend needs and merged one tile; triton's
# under its interpreter: what the driver of a GPU maps comes on top, and differs.
PROCESS_BYTES = {"native": 100 << 20, "reference": 420 << 20, "triton": 420 << 20}
# What is known of one input of one tensor: its name, place, view, counts, line of the report. Measured with
# 60,000 tensors of 7 inputs.
SOURCE_BYTES = 400
_REFERENCE_TEMPORARIES = 12  # float32 arrays of a tile that the reference holds per expert
_SUMS_BYTES = 32  # two sums of float64, those before and those after


@dataclass(frozen=True)
class Plan:
    """The work of a merge.

    passes: times the inputs are read; bytes_in: bytes of all passes; bytes_out: bytes of all shards;
    candidate_bytes: estimate of what waits for exact thresholds, of which candidates_memory are held in
    memory at most and the rest in the work folder; peak_memory: bytes resident at most; seconds: estimate
    when the files are in the page cache; notes: what was understood of the inputs and is not self-evident;
    outputs: every output tensor, with its sources and settings.
    """

    layout: Layout
    backend: str
    threads: int
    tile_elements: int
    tensors: int
    parameters: int
    experts: int
    tiles: int
    passes: int
    bytes_in: int
    bytes_out: int
    candidate_bytes: int
    candidates_memory: int
    peak_memory: int
    seconds: float
    notes: tuple[str, ...] = ()
    outputs: Sequence[OutputTensor] = field(default=(), repr=False, compare=False)

    @property
    def spilled_bytes(self) -> int:
        """Estimate of the candidates that memory does not hold."""
        return max(0, self.candidate_bytes - self.candidates_memory)

    def as_dict(self, tensors: bool = False) -> dict:
        """The plan's numbers, for `--json`. tensors: and every output tensor."""
        names = ("backend", "threads", "tile_elements", "tensors", "parameters", "experts", "tiles", "passes")
        more = ("bytes_in", "bytes_out", "candidate_bytes", "candidates_memory", "peak_memory", "seconds")
        shards = [{"name": s.name, "bytes": s.size} for s in self.layout.shards]
        found = {name: getattr(self, name) for name in names + more} | {"shards": shards}
        found |= {"notes": list(self.notes)}
        return found | {"outputs": [output.as_dict() for output in self.outputs]} if tensors else found


def memory_limit_of(asked: int | None, backend: Backend) -> int:
    """Bytes resident at most: what was asked for, else what the backend wants."""
    return asked or _MEMORY_LIMITS[backend.NAME]


def worker_threads(asked: int | None, backend: Backend) -> int:
    """Threads that merge: what was asked for, else every processor. On a GPU each has a tile in flight: it
    takes three to overlap copies and kernels, and no bus carries more than sixteen threads copy."""
    if backend.NAME != "triton":
        return asked or default_threads()
    return max(asked or min(default_threads(), MOST_SLOTS), LEAST_SLOTS)


def thread_choices(asked: int | None, backend: Backend) -> range:
    """Numbers of threads that may merge, the best first: fewer where nobody asked and memory is short."""
    most = worker_threads(asked, backend)
    least = LEAST_SLOTS if backend.NAME == "triton" else 1
    return range(most, (most if asked else least) - 1, -1)


def pinned_bytes(backend: Backend, threads: int, per_element: int) -> int:
    """Page-locked memory per element of a tile, of all tiles in flight on a GPU."""
    return per_element * min(threads, MOST_SLOTS) if backend.NAME == "triton" else 0


def make_plan(
    inputs: Inputs,
    output: Layout,
    decider: Work,
    backend: Backend,
    *,
    threads: Sequence[int],
    memory_limit: int,
    tile_elements: int | None = None,
    candidates_memory: int = DEFAULT_BUDGET,
    sums: bool = False,
) -> Plan:
    """The plan of a merge of open inputs, with the first number of threads that fits the memory limit. sums:
    whether sums are written beside it. Raises RecipeError when the limit is too small for any."""
    tensors = decider.tensors
    per_element = max((_bytes_per_element(t, backend) for t in tensors), default=1)
    per_element += _SUMS_BYTES * sums
    each = max((_candidate_bytes(t, backend) for t in tensors), default=0)
    candidates = decider.expected_candidates() * each
    # A small limit leaves room for tiles first.
    held = min(candidates_memory, memory_limit // 4)
    whole = decider.matrices.bytes(tensors) if decider.needs.matrices else 0
    process = "reference" if whole and backend.NAME == "native" else backend.NAME  # matrices are torch's
    shared = PROCESS_BYTES[process] + min(candidates, held) + sum(map(_factor_bytes, tensors))
    shared += SOURCE_BYTES * sum(len(e.sources) + len(e.curvatures) for e in inputs.entries)
    local = decider.brackets and not decider.model_scope
    largest = _LARGE_TILE_ELEMENTS if local or backend.NAME == "triton" else TILE_ELEMENTS
    for number in threads:
        fixed = shared + number * whole + _survey_bytes(tensors, decider, number, per_element)
        in_flight = number * per_element + pinned_bytes(backend, number, per_element)
        tile = tile_elements or _fitting_tile(memory_limit - fixed, in_flight, largest)
        if tile:
            break
    else:
        need = fixed + in_flight * _SMALLEST_TILE
        on, fewer = f"{number} thread{'s' if number > 1 else ''}", number > thread_choices(None, backend)[-1]
        raise RecipeError(
            f"a memory limit of {format_bytes(memory_limit)} is too small for this merge on {on}"
            f"{f', each of which holds a matrix ({format_bytes(whole)})' if whole else ''}: "
            f"give it --memory-limit {math.ceil(need / 1e6)}MB{' or lower --threads' if fewer else ''}"
        )
    passes = 1 + decider.passes + decider.tensor_passes
    total = inputs.total_bytes
    return Plan(
        layout=output,
        backend=backend.NAME,
        threads=number,
        tile_elements=tile,
        tensors=len(inputs.entries),
        parameters=sum(e.numel for e in inputs.entries if e.is_computed),
        experts=len(inputs.recipe.models),
        tiles=sum(-(-t.numel // tile) for t in tensors),
        passes=passes,
        bytes_in=total * passes,
        bytes_out=output.total_bytes,
        candidate_bytes=candidates,
        candidates_memory=held,
        peak_memory=fixed + in_flight * min(tile, max((t.numel for t in tensors), default=0)),
        seconds=seconds(backend.NAME, total * passes + output.total_bytes, number),
        outputs=inputs.entries,
    )


def _fitting_tile(room: int, bytes_per_tile_element: int, largest: int) -> int:
    """The tile size that fits, at most `largest`; 0 when none does."""
    fits = room // bytes_per_tile_element // 4096 * 4096
    return min(fits, largest) if fits >= _SMALLEST_TILE else 0


def _candidate_bytes(tensor: TensorInputs, backend: Backend) -> int:
    """Bytes of a candidate that one expert's bracket holds, as nearly all are."""
    if backend.NAME == "native":
        return sum(Alternatives.columns(tensor))
    return sum(Candidates.columns(tensor)) + STEP_BYTES


def _bytes_per_element(tensor: TensorInputs, backend: Backend) -> int:
    size = sum(b.dtype.itemsize for b in tensor.buffers) + tensor.out_dtype.itemsize
    if backend.NAME == "reference":
        size += 4 * _REFERENCE_TEMPORARIES * len(tensor.experts)
    return size


def _factor_bytes(tensor: TensorInputs) -> int:
    """Sums and scales that compressed curvature has beside its elements."""
    return sum(array.nbytes for c in tensor.curvatures for array in c.factors)


def _survey_bytes(tensors: list[TensorInputs], decider: Work, threads: int, per_element: int) -> int:
    """What surveys hold beside tiles: histograms, score chunks, the matrices of `rescale` and `rank`."""
    if not (decider.passes or decider.tensor_passes or decider.brackets):
        return 0
    experts = len(decider.selections())
    chunk = min(CHUNK, max((t.numel for t in tensors), default=0))
    size = 3 * threads * experts * (1 << 20) + threads * chunk * (per_element + 16)
    matrices = [t for t in tensors if len(t.shape) == 2]
    if decider.needs.has("norms", "tensor"):
        size += max((12 * t.numel + 16 * min(t.shape) ** 2 for t in matrices), default=0)
    if decider.needs.svd:
        size += low_rank_bytes(t.shape for t in tensors)
    return size


def low_rank_bytes(shapes: Iterable[tuple[int, ...]]) -> int:
    """What run/low_rank.py holds at most, for the largest matrix among tensors of these shapes."""
    matrices = (shape for shape in shapes if len(shape) == 2)
    return max((16 * rows * columns + 16 * min(rows, columns) ** 2 for rows, columns in matrices), default=0)
