"""Second moments in less room: a curvature file in, a smaller one out, which merges read as it is.

    rank1   row and column sums of each matrix: R_i C_j / sum(R)
    bf16    bfloat16, rounded to nearest even
    log8    8 bits per element, a scale per row (ota_kernels.log8)

Tensors that a form is not for, and those that are row and column sums already, are copied.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, RecipeError
from ..io.curvature import CurvatureFile
from ..io.header import quoted
from ..io.hub import resolve_file
from ..io.new_file import Entry, NewFile, check_new_file, new_file
from ..io.pages import advise
from ..io.stored import MOMENT
from ..processors import default_threads
from ..run.pool import Pool
from ..tensors.curvature import Rank1
from ..tensors.dtypes import BY_NAME
from ..tensors.segment import Map
from .encoders import FORMATS, Encoder
from .relative_error import Errors

_COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class Summary:
    """What became of a file.

    tensors, elements: compressed; copied: tensors that stayed as they were; bytes_before,
    bytes_after: of the second moments; error_median, error_99, error_max: of the relative errors of
    compressed elements that are not 0 (quantiles to within 1.6 %); zeros: elements that were 0; zeros_kept:
    those that still are; step, beta2: what a recipe's `bias_correction` needs, None where the tensors do not
    share it.
    """

    format: str
    tensors: int
    copied: int
    elements: int
    bytes_before: int
    bytes_after: int
    error_median: float
    error_99: float
    error_max: float
    zeros: int
    zeros_kept: int
    step: float | None
    beta2: float | None

    @property
    def ratio(self) -> float:
        """How many times smaller they are."""
        return self.bytes_before / self.bytes_after

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return asdict(self) | {"ratio": self.ratio}


def compress(source: str | Path, out: str | Path, format: str, overwrite: bool = False) -> Summary:
    """Write the second moments in `source` to the safetensors file `out`, smaller; `out` appears when it is
    whole.

    source: what a recipe's `preconditioner_path` takes; format: "rank1", "bf16" or "log8". Reads each tensor
    in blocks (twice for rank1), and holds a few. Raises RecipeError for an unknown format, InputError where
    `source` is none, or holds a value that is negative, not finite, or too large for the format, OutputError
    where `out` cannot be written.
    """
    if format not in FORMATS:
        raise RecipeError(f"format {format!r} is none of {', '.join(FORMATS)}")
    out = Path(out)
    check_new_file(out, overwrite=overwrite)
    with contextlib.closing(CurvatureFile.open(resolve_file(str(source)), "source")) as file:
        if not file.names:
            raise InputError(f"{file.where}: holds no second moments")
        encoders, copies = _sort(file, format)
        step, beta2 = _shared_step(file)
        entries = [entry for encoder in encoders for entry in encoder.entries]
        entries += [_entry(file, key) for key in copies]
        errors = Errors()
        with new_file(out, entries, _metadata(step, beta2)) as new, Pool(default_threads()) as pool:
            for encoder in encoders:
                _encode(encoder, new, errors, pool.run)
            for key in copies:
                _copy(file, key, new)
        return Summary(
            format=format,
            tensors=len(encoders),
            copied=len(file.names) - len(encoders),
            elements=errors.elements,
            bytes_before=file.total_bytes,
            bytes_after=sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in entries),
            error_median=errors.quantile(0.5),
            error_99=errors.quantile(0.99),
            error_max=errors.largest,
            zeros=errors.zeros,
            zeros_kept=errors.zeros_kept,
            step=step,
            beta2=beta2,
        )


def _sort(file: CurvatureFile, format: str) -> tuple[list[Encoder], list[str]]:
    """(encoders of what is compressed, keys of what is copied)."""
    encoder, is_for = FORMATS[format]
    encoders: list[Encoder] = []
    copies: list[str] = []
    for name in file.names:
        curvature, shape = file.curvature(name), file.shape(name)
        if is_for(shape) and not isinstance(curvature, Rank1):
            encoders.append(encoder(name, shape, curvature, f"{file.where}: {quoted(name)}"))
        else:
            copies += file.keys_of(name)
    return encoders, copies


def _shared_step(file: CurvatureFile) -> tuple[float, float] | tuple[None, None]:
    """step and beta2 that all tensors share: a file has room for one of each."""
    with contextlib.suppress(InputError):  # not said
        found = {file.step_and_beta2(name) for name in file.names}
        if len(found) == 1:
            return found.pop()
    return None, None


def _metadata(step: float | None, beta2: float | None) -> dict[str, str]:
    said = {"step": step, "beta2": beta2}
    return {"format": "pt"} | {key: f"{x:.17g}" for key, x in said.items() if x is not None}


def _encode(encoder: Encoder, new: NewFile, errors: Errors, run: Map) -> None:
    encoder.begin(new.write, run)

    def of_block(block: tuple[int, int]) -> np.ndarray:
        """Flat indices of what is no second moment."""
        values = encoder.read(*block)
        bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if bad.size == 0:
            errors.add(values, encoder.encode(block[0], values, new.write))
        return block[0] + bad

    count, first = 0, -1
    for bad in run(of_block, encoder.blocks()):
        first = int(bad[0]) if bad.size and not count else first
        count += bad.size
    if count:
        raise InputError(
            f"{encoder.where}: {count} of {encoder.numel} values are negative or not finite, the first at "
            f"flat index {first}: they are no second moments"
        )


def _entry(file: CurvatureFile, key: str) -> Entry:
    return key.removesuffix(f".{MOMENT}"), BY_NAME[file.key_dtype(key)], file.key_shape(key)


def _copy(file: CurvatureFile, key: str, new: NewFile) -> None:
    buffer, (name, dtype, _) = file.key_buffer(key), _entry(file, key)
    step = _COPY_BYTES // dtype.itemsize
    for start in range(0, len(buffer), step):
        part = buffer.slice(start, start + step).data
        new.write(name, start, part)
        advise(part, "dontneed")
