"""Plans of models of terabytes, in files that take no room.

    python -m bench.large [--runs 3] [--experts 5] [--layout mixture] [--folder FOLDER] [--json]

Two layouts: 405 B parameters in 1 137 tensors, and a mixture of experts of 695 B in 47 278, each a base and
experts in bfloat16 and, for OTA, second moments in float32. Files are sparse: a plan reads headers only. Per
layout `ota-merge plan` runs in a process of its own: seconds of processor (the least of the runs), and the
operating system's own figure of resident memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml

from .end_to_end import OTA_MERGE, run_process
from .output import RESULTS, print_table, save_json

Shapes = dict[str, tuple[int, ...]]
_BYTES = {"BF16": 2, "F32": 4}


def dense() -> Shapes:
    """405 B parameters."""
    width, hidden, vocabulary = 16_384, 53_248, 128_256
    layer = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (1024, width),
        "self_attn.v_proj": (1024, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(126) for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def mixture() -> Shapes:
    """695 B parameters: 63 layers, of which 60 have 256 experts, and one predicts a further token."""
    width, hidden, inner, vocabulary = 7168, 18_432, 2048, 129_280
    attention = {
        "q_a_proj.weight": (1536, width),
        "q_a_layernorm.weight": (1536,),
        "q_b_proj.weight": (24_576, 1536),
        "kv_a_proj_with_mqa.weight": (576, width),
        "kv_a_layernorm.weight": (512,),
        "kv_b_proj.weight": (32_768, 512),
        "o_proj.weight": (width, 16_384),
        "indexer.wq_b.weight": (8192, 1536),
        "indexer.wk.weight": (128, width),
        "indexer.k_norm.weight": (128,),
        "indexer.k_norm.bias": (128,),
        "indexer.weights_proj.weight": (64, width),
    }
    shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for i in range(63):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{name}": shape for name, shape in attention.items()}
        shapes |= dict.fromkeys(
            (f"{at}.input_layernorm.weight", f"{at}.post_attention_layernorm.weight"), (width,)
        )
        if i < 3:
            shapes |= _gated(f"{at}.mlp", width, hidden)
            continue
        shapes |= {
            f"{at}.mlp.gate.weight": (256, width),
            f"{at}.mlp.gate.e_score_correction_bias": (256,),
        }
        for expert in ("shared_experts", *(f"experts.{j}" for j in range(256))):
            shapes |= _gated(f"{at}.mlp.{expert}", width, inner)
    last = "model.layers.62"
    shapes |= {f"{last}.eh_proj.weight": (width, 2 * width)}
    shapes |= {f"{last}.{name}.weight": (width,) for name in ("enorm", "hnorm", "shared_head.norm")}
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def _gated(at: str, width: int, hidden: int) -> Shapes:
    up = (hidden, width)
    return {
        f"{at}.gate_proj.weight": up,
        f"{at}.up_proj.weight": up,
        f"{at}.down_proj.weight": (width, hidden),
    }


LAYOUTS = {"dense": (dense, 191), "mixture": (mixture, 163)}  # shapes, shards


def sparse_model(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    shards: int,
    dtype: str = "BF16",
    stem: str = "model",
) -> Path:
    """Zeros in files that take no room, with an index. OSError where a file system has none of the size."""
    folder.mkdir(parents=True, exist_ok=True)
    names, weight_map = list(shapes), {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.safetensors"
        header, end = {}, 0
        for name in names[number * len(names) // shards : (number + 1) * len(names) // shards]:
            begin, end = end, end + _BYTES[dtype] * math.prod(shapes[name])
            header[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": [begin, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(folder / file, 8 + len(text) + end)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def make_set(folder: Path, layout: str, experts: int) -> dict[str, Path]:
    """Recipes by method, of a set that is made in `folder`."""
    make, shards = LAYOUTS[layout]
    shapes, recipes = make(), {}
    base, *folders = (
        str(sparse_model(folder / name, shapes, shards))
        for name in ("base", *(f"expert{i}" for i in range(experts)))
    )
    moments = [str(sparse_model(Path(f"{each}.moments"), shapes, shards, "F32")) for each in folders]
    entries = {
        "ota": [
            {"model": m, "parameters": {"preconditioner_path": path}}
            for m, path in zip(folders, moments, strict=True)
        ],
        "linear": [{"model": m, "parameters": {"weight": 1.0}} for m in folders],
    }
    for method, models in entries.items():
        recipe = {"merge_method": method, "models": models}
        if method == "ota":
            recipe |= {"base_model": base, "parameters": {"density": 0.3}}
        recipes[method] = folder / f"{method}.yaml"
        recipes[method].write_text(yaml.safe_dump(recipe))
    return recipes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--layout", choices=LAYOUTS, help="both without it")
    parser.add_argument("--folder", type=Path, help="where the sets are made, and kept")
    parser.add_argument("--json", nargs="?", type=Path, const=RESULTS / "large.json")
    arguments = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory(prefix="ota-large-") as scratch:
        for layout in [arguments.layout] if arguments.layout else LAYOUTS:
            recipes = make_set((arguments.folder or Path(scratch)) / layout, layout, arguments.experts)
            for method, recipe in recipes.items():
                runs = [run_process([OTA_MERGE, "plan", str(recipe)]) for _ in range(arguments.runs)]
                figures[f"{layout}, {method}"] = {
                    "processor_seconds": min(run.processor_seconds for run in runs),
                    "peak_mib": max(run.peak_bytes for run in runs) / 2**20,
                }
    rows = [(name, *(f"{value:.1f}" for value in found.values())) for name, found in figures.items()]
    print_table(("set", "processor s", "peak MiB"), rows)
    if arguments.json:
        save_json(arguments.json, {"plans": figures})


if __name__ == "__main__":
    main()
