"""What a merge would read, write and hold in memory, from headers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

from .backends.stats import STEP_BYTES, Candidates
from .candidates import DEFAULT_BUDGET
from .errors import RecipeError
from .factors import CHUNK
from .inputs import COPY, Inputs
from .io.writer import Layout, layout
from .survey import Survey
from .tensors import TensorInputs
from .units import format_bytes

# Elements of a tile: large enough that a tile costs far more than its Python (2 ms against 0.1), small enough
# that the tiles in flight stay a few percent of the memory limit.
TILE_ELEMENTS = 1 << 20
# Of a density per tensor: a tensor that is one tile is selected from, merged and settled by one worker.
_LOCAL_TILE_ELEMENTS = 4 * TILE_ELEMENTS
_SMALLEST_TILE = 1 << 14
DEFAULT_MEMORY_LIMIT = 1 << 30

# Measured resident sizes of a process that has imported what the backend needs and merged one tile.
PROCESS_BYTES = {"native": 100 << 20, "reference": 420 << 20}
_REFERENCE_TEMPORARIES = 12  # float32 arrays of a tile that the reference holds per expert
_ASSUMED_BANDWIDTH = 8e9  # bytes per second per thread, for the estimated time from a warm page cache


@dataclass(frozen=True)
class Plan:
    """The work of a merge.

    passes: times the inputs are read; bytes_in: bytes of all passes; bytes_out: bytes of all shards;
    candidate_bytes: estimate of what waits for exact thresholds, of which candidates_memory are held in
    memory at most and the rest in the work folder; peak_memory: bytes resident at most; seconds: estimate
    when the files are in the page cache.
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

    @property
    def spilled_bytes(self) -> int:
        """Estimate of the candidates that memory does not hold."""
        return max(0, self.candidate_bytes - self.candidates_memory)

    def as_dict(self) -> dict:
        """The plan's numbers, for `--json`."""
        names = ("backend", "threads", "tile_elements", "tensors", "parameters", "experts", "tiles", "passes")
        more = ("bytes_in", "bytes_out", "candidate_bytes", "candidates_memory", "peak_memory", "seconds")
        shards = [{"name": s.name, "bytes": s.size} for s in self.layout.shards]
        return {name: getattr(self, name) for name in names + more} | {"shards": shards}


def make_plan(
    inputs: Inputs,
    survey: Survey,
    backend: ModuleType,
    *,
    threads: int,
    memory_limit: int,
    shard_size: int,
    tile_elements: int | None = None,
    candidates_memory: int = DEFAULT_BUDGET,
) -> Plan:
    """The plan of a merge of open inputs. Raises RecipeError when the memory limit is too small."""
    tensors = survey.tensors
    per_element = max((_bytes_per_element(t, backend) for t in tensors), default=1)
    # Most candidates lie in one expert's bracket, which lists one step.
    each = max((sum(Candidates.columns(t)) + STEP_BYTES for t in tensors), default=0)
    candidates = survey.expected_candidates() * each
    # A small limit leaves room for tiles first.
    held = min(candidates_memory, memory_limit // 4)
    fixed = PROCESS_BYTES[backend.NAME] + _survey_bytes(tensors, survey, threads, per_element)
    fixed += min(candidates, held) + sum(_factor_bytes(t) for t in tensors)
    local = survey.brackets and not survey.model_scope
    largest = _LOCAL_TILE_ELEMENTS if local else TILE_ELEMENTS
    tile = tile_elements or _fitting_tile(memory_limit - fixed, threads * per_element, largest)
    if tile < 1:
        need = fixed + threads * per_element * _SMALLEST_TILE
        raise RecipeError(
            f"a memory limit of {format_bytes(memory_limit)} is too small for this merge on {threads} "
            f"threads: give it --memory-limit {math.ceil(need / 1e6)}MB or lower --threads"
        )
    output = layout([(e.name, e.dtype, e.shape) for e in inputs.entries], shard_size)
    passes = 1 + survey.passes + survey.tensor_passes
    total = inputs.total_bytes
    return Plan(
        layout=output,
        backend=backend.NAME,
        threads=threads,
        tile_elements=tile,
        tensors=len(inputs.entries),
        parameters=sum(e.numel for e in inputs.entries if e.action != COPY),
        experts=len(inputs.experts),
        tiles=sum(-(-t.numel // tile) for t in tensors),
        passes=passes,
        bytes_in=total * passes,
        bytes_out=output.total_bytes,
        candidate_bytes=candidates,
        candidates_memory=held,
        peak_memory=fixed + threads * per_element * tile,
        seconds=(total * passes + output.total_bytes) / (_ASSUMED_BANDWIDTH * threads),
    )


def _fitting_tile(room: int, bytes_per_tile_element: int, largest: int) -> int:
    """The tile size that fits, at most `largest`; 0 when none does."""
    fits = room // bytes_per_tile_element // 4096 * 4096
    return min(fits, largest) if fits >= _SMALLEST_TILE else 0


def _bytes_per_element(tensor: TensorInputs, backend: ModuleType) -> int:
    size = sum(b.dtype.itemsize for b in tensor.buffers) + tensor.out_dtype.itemsize
    if backend.NAME == "reference":
        size += 4 * _REFERENCE_TEMPORARIES * len(tensor.experts)
    return size


def _factor_bytes(tensor: TensorInputs) -> int:
    """Sums and scales that compressed curvature has beside its elements."""
    return sum(array.nbytes for c in tensor.curvatures for array in c.factors)


def _survey_bytes(tensors: list[TensorInputs], survey: Survey, threads: int, per_element: int) -> int:
    """What surveys hold beside tiles: histograms, score chunks, the matrices of `rescale` and `rank`."""
    if not (survey.passes or survey.tensor_passes or survey.brackets):
        return 0
    experts = len(survey.models)
    size = 3 * threads * experts * (1 << 20) + threads * CHUNK * (per_element + 16)
    matrices = [t for t in tensors if len(t.shape) == 2]
    if survey.recipe.parameters.rescale:
        size += max((12 * t.numel + 16 * min(t.shape) ** 2 for t in matrices), default=0)
    if any(m.rank for m in survey.models):
        size += max((16 * t.numel + 16 * min(t.shape) ** 2 for t in matrices), default=0)
    return size
