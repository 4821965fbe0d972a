"""Files of weights per tensor and model: JSON, or safetensors."""

from __future__ import annotations

import json
import math
import numbers
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load_file

from ..errors import InputError


def read_weights(path: Path) -> dict[str, list[float]]:
    """The rows of a table: {tensor: [a number for each model]} in JSON, a vector of floats in safetensors.

    Raises InputError where the file is neither, or a weight is not finite.
    """
    try:
        rows = _of_json(path) if path.suffix == ".json" else _of_safetensors(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    for name, row in rows.items():
        if not isinstance(row, list) or not all(map(_is_finite, row)):
            raise InputError(f"{path}: the weights of {name!r} are no list of finite numbers: give those")
    return {name: [float(w) for w in row] for name, row in rows.items()}


def _is_finite(weight: object) -> bool:
    return isinstance(weight, numbers.Real) and not isinstance(weight, bool) and math.isfinite(weight)


def _of_json(path: Path) -> dict[str, object]:
    try:
        rows = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: is no JSON: {error}") from error
    if not isinstance(rows, dict):
        raise InputError(f"{path}: is no JSON object of rows, {{tensor: [weights]}}")
    return rows


def _of_safetensors(path: Path) -> dict[str, object]:
    try:
        return {name: row.tolist() for name, row in load_file(path).items()}
    except (SafetensorError, TypeError, KeyError) as error:  # types that numpy lacks are a TypeError
        raise InputError(f"{path}: is no safetensors file of float32 or float64 rows: {error}") from error
