"""Synthetic models and second moments that look like real ones, the same for the same seed."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

from ota_kernels.errors import OutputError
from ota_kernels.io.header import build_header
from ota_kernels.processors import default_threads
from ota_kernels.run.pool import Pool
from ota_kernels.sizes import format_bytes
from ota_kernels.tensors.dtypes import BY_NAME

WEIGHTS, CURVATURE = "model.safetensors", "exp_avg_sq.safetensors"
DEFAULT_FOLDER = Path(os.environ.get("OTA_BENCH_DATA") or Path.home() / ".cache" / "ota_kernels" / "bench")
BASE_DEVIATION, EDIT_DEVIATION = 0.02, 5e-4  # of normal weights and task vectors

_DENSITY = 0.3  # what the recipes keep
_VERSION = 1  # of what is drawn below: a change makes cached sets again
_CHUNK_ELEMENTS = 1 << 20
_WIDE_VOCABULARY = 9216  # of models whose width is asked for: their layers are most of them
_SAMPLE_STRIDE = 61  # of the elements that estimate thresholds; prime, so that no column is favoured

Shapes = dict[str, tuple[int, ...]]


def llama_set(
    folder: Path,
    parameters: int = 250_000_000,
    experts: int = 5,
    curvature: str = "float32",
    seed: int = 0,
    hidden: int | None = None,
) -> Path:
    """A Llama-shaped base and experts in bfloat16, their curvature and recipes; made unless it is there.

    Returns a folder inside `folder`: base/, expert_0/, ... (config.json, model.safetensors,
    exp_avg_sq.safetensors), threshold.yaml, density_model.yaml, density_tensor.yaml, linear.yaml.
    parameters: of each model, at least; curvature: float32 or bfloat16; hidden: columns of its matrices, None
    for what suits so many parameters. Raises OutputError when the disk has no room.
    """
    made_of = {"parameters": parameters, "experts": experts, "curvature": curvature, "seed": seed}
    made_of |= {"hidden": hidden} if hidden else {}
    target = folder / "_".join(["llama", *map(str, made_of.values())])
    marker, text = target / "set.json", json.dumps(made_of | {"version": _VERSION})
    if marker.is_file() and marker.read_text() == text:
        return target
    if target.exists():
        shutil.rmtree(target)
    config, shapes = _llama(parameters, hidden)
    # Experts, base, one merged model; curvature.
    _check_space(folder, shapes, (experts + 2) * 2 + experts * BY_NAME[curvature].itemsize)
    models = [target / name for name in ("base", *(f"expert_{t}" for t in range(experts)))]
    for model in models:
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(config, indent=2))
    base, *edited = (_File(model / WEIGHTS, "bfloat16", shapes) for model in models)
    curvatures = [_File(model / CURVATURE, curvature, shapes) for model in models[1:]]
    _write_recipes(target, models, _fill(base, edited, curvatures, shapes, seed))
    marker.write_text(text)
    return target


def draw_weights(rng: np.random.Generator, shape: tuple[int, int], deviation: float) -> np.ndarray:
    """Normal float32."""
    return rng.standard_normal(shape, np.float32) * np.float32(deviation)


def draw_curvature(rng: np.random.Generator, shape: tuple[int, int], columns: np.ndarray) -> np.ndarray:
    """Second moments like Adam's, float32: log-normal around 1e-12, times a factor for each row and column
    (`columns`, of `draw_factors`); 2.5 % are exact zeros."""
    z = rng.standard_normal(shape, np.float32)
    rows = np.float32(1e-12) * draw_factors(rng, shape[0])
    h = np.exp(np.float32(1.5) * z) * (rows[:, None] * columns)
    h[z < -1.96] = 0.0
    return h


def draw_factors(rng: np.random.Generator, n: int) -> np.ndarray:
    """Log-normal float32[n] with median 1."""
    return np.exp(rng.standard_normal(n, np.float32))


def threshold_of(h: np.ndarray, d: np.ndarray) -> float:
    """The saliency that 30 % of a sample of curvature and task vector reach."""
    return float(np.quantile(h * (d * d), 1 - _DENSITY))


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes (uint8) of float32 values rounded to float32, float16 or bfloat16, to nearest even."""
    if dtype == "bfloat16":
        bits = values.reshape(-1).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
        return rounded.astype(np.uint16).view(np.uint8)
    return values.reshape(-1).astype(dtype, copy=False).view(np.uint8)


def decode(data: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values of bytes that `encode` made."""
    if dtype == "bfloat16":
        return (data.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return data.view(dtype).astype(np.float32, copy=False)


def _llama(parameters: int, hidden: int | None) -> tuple[dict, Shapes]:
    """config.json and tensor shapes of the least deep Llama of so many parameters."""
    vocabulary = _WIDE_VOCABULARY
    if not hidden:
        # The embeddings alone are 65 million, 4 million and 4 thousand.
        hidden = 1024 if parameters >= 100_000_000 else 256 if parameters >= 1_000_000 else 8
        vocabulary = hidden * 125 // 4
    inner, heads = hidden * 11 // 4, max(1, hidden // 64)
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    outside = 2 * vocabulary * hidden + hidden
    layers = max(1, math.ceil((parameters - outside) / sum(map(math.prod, layer.values()))))
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    shapes |= {f"model.layers.{i}.{name}.weight": s for i in range(layers) for name, s in layer.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "num_hidden_layers": layers,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return config, shapes


def _check_space(folder: Path, shapes: Shapes, bytes_per_parameter: int) -> None:
    need = bytes_per_parameter * sum(map(math.prod, shapes.values()))
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OutputError(
            f"{folder} has {format_bytes(free)} free and the benchmark set takes {format_bytes(need)}: "
            "free some, or name another folder in OTA_BENCH_DATA"
        )


class _File:
    """A safetensors file whose chunks are written in any order."""

    def __init__(self, path: Path, dtype: str, shapes: Shapes) -> None:
        self._dtype, self._itemsize = dtype, BY_NAME[dtype].itemsize
        entries = [(name, BY_NAME[dtype], shape) for name, shape in shapes.items()]
        header, ranges = build_header(entries, {"format": "pt"})
        self._begins = [begin for begin, _ in ranges]
        self._bytes = np.memmap(path, np.uint8, "w+", shape=ranges[-1][1])
        self._bytes[: len(header)] = np.frombuffer(header, np.uint8)

    def write(self, tensor: int, start: int, values: np.ndarray) -> np.ndarray:
        """Store float32 values from element `start` of a tensor; returns them as stored."""
        data = encode(values, self._dtype)
        begin = self._begins[tensor] + start * self._itemsize
        self._bytes[begin : begin + data.size] = data
        return decode(data, self._dtype).reshape(values.shape)

    def flush(self) -> None:
        self._bytes.flush()


def _chunks(shapes: Shapes) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """(tensor number, first row, shape of the chunk); a vector is one row."""
    for tensor, shape in enumerate(shapes.values()):
        rows, columns = shape if len(shape) == 2 else (1, *shape)
        step = _CHUNK_ELEMENTS // columns
        for row in range(0, rows, step):
            yield tensor, row, (min(step, rows - row), columns)


def _fill(
    base: _File, edited: list[_File], curvatures: list[_File], shapes: Shapes, seed: int
) -> list[float]:
    """Write every tensor of every model; returns each expert's threshold."""

    def fill(chunk: tuple[int, int, tuple[int, int]]) -> list[np.ndarray]:
        """Per expert a sample of its curvature and task vector, float32[2, n]."""
        tensor, row, shape = chunk
        start, samples = row * shape[1], []
        rng = np.random.default_rng([seed, tensor, 0, row])
        w_0 = base.write(tensor, start, draw_weights(rng, shape, BASE_DEVIATION))
        for t, (expert, curvature) in enumerate(zip(edited, curvatures, strict=True)):
            w = expert.write(tensor, start, w_0 + draw_weights(rng, shape, EDIT_DEVIATION))
            columns = draw_factors(np.random.default_rng([seed, tensor, 1, t]), shape[1])
            h = curvature.write(tensor, start, draw_curvature(rng, shape, columns))
            samples.append(
                np.stack([h.reshape(-1)[::_SAMPLE_STRIDE], (w - w_0).reshape(-1)[::_SAMPLE_STRIDE]])
            )
        return samples

    with Pool(default_threads()) as pool:
        samples = list(zip(*pool.run(fill, _chunks(shapes)), strict=True))
    for file in (base, *edited, *curvatures):
        file.flush()  # now, rather than while a benchmark runs
    return [threshold_of(*np.concatenate(of_expert, axis=1)) for of_expert in samples]


def _write_recipes(folder: Path, models: list[Path], thresholds: list[float]) -> None:
    base, *experts = (str(model.resolve()) for model in models)

    def entry(expert: str, **parameters: float) -> dict:
        return {"model": expert, "parameters": {"preconditioner_path": f"{expert}/{CURVATURE}", **parameters}}

    ota = {"merge_method": "ota", "base_model": base, "models": [entry(e) for e in experts]}
    by_threshold = [entry(e, precond_threshold=x) for e, x in zip(experts, thresholds, strict=True)]
    recipes = {
        "threshold": ota | {"models": by_threshold},
        "density_model": ota | {"parameters": {"density": _DENSITY}},
        "density_tensor": ota | {"parameters": {"density": _DENSITY, "density_scope": "tensor"}},
        "linear": {"merge_method": "linear", "models": [{"model": e} for e in experts]},
    }
    for name, recipe in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
