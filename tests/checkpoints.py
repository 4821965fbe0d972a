"""Small models, second moments and recipes on disk, and what tests ask of a merged folder."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CURVATURE = "exp_avg_sq.safetensors"

# Every role, odd sizes, a scalar and an empty tensor.
SHAPES = {
    "embed_tokens.weight": (50, 16),
    "layers.0.mlp.weight": (33, 17),
    "layers.0.norm.weight": (17,),
    "layers.1.mlp.weight": (21, 40),
    "layers.1.conv.weight": (3, 5, 7),
    "scale": (),
    "empty": (0, 5),
    "lm_head.weight": (50, 16),
}


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Weights as trained models have them: normal, standard deviation 0.02."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    values = 0.02 * torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed))
    parts = zip(shapes.items(), values.split(sizes), strict=True)
    return {name: part.reshape(shape).to(dtype, copy=True) for (name, shape), part in parts}


def edited(base: Mapping[str, Tensor], seed: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """An expert: the base's floating-point tensors moved by a tenth of their size; others as they are."""
    edits = random_tensors({name: tuple(tensor.shape) for name, tensor in base.items()}, seed)
    return {
        name: (tensor.float() + 0.1 * edits[name]).to(dtype or tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in base.items()
    }


def second_moments(
    tensors: Mapping[str, Tensor], seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Squared gradients of about 1e-5, positive, one per floating-point element."""
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if t.is_floating_point()}
    gradients = random_tensors(shapes, seed)
    return {name: ((5e-4 * g) ** 2 + 1e-14).to(dtype) for name, g in gradients.items()}


def save_sharded(folder: Path, tensors: Mapping[str, Tensor], shards: int, metadata=None) -> Path:
    """`tensors` dealt out over `shards` files with an index; one shard is one plain file."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(dict(tensors), folder / WEIGHTS, metadata=metadata)
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, folder / file, metadata=metadata)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def save_model(
    folder: Path, tensors: Mapping[str, Tensor], *, shards: int = 1, config: dict | None = None
) -> Path:
    """A model folder, with config.json where one is given."""
    save_sharded(folder, tensors, shards, {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@dataclass
class ModelSet:
    """A base and its experts in memory and on disk: root/base, root/expert0, ... Curvature lies in the
    experts' folders; recipes name all of it by absolute paths."""

    root: Path
    base: dict[str, Tensor]
    experts: list[dict[str, Tensor]]
    curvatures: list[dict[str, Tensor]]
    base_folder: Path = field(init=False)
    expert_folders: list[Path] = field(init=False)
    curvature_files: list[Path] = field(init=False)

    def __post_init__(self) -> None:
        self.base_folder = self.root / "base"
        self.expert_folders = [self.root / f"expert{t}" for t in range(len(self.experts))]
        self.curvature_files = [folder / CURVATURE for folder in self.expert_folders]

    def save(self, *, shards: int = 1, config: dict | None = None) -> ModelSet:
        """Write models and curvature."""
        save_model(self.base_folder, self.base, shards=shards, config=config)
        for folder, expert in zip(self.expert_folders, self.experts, strict=True):
            save_model(folder, expert, shards=shards, config=config)
        for file, curvature in zip(self.curvature_files, self.curvatures, strict=True):
            save_file(curvature, file)
        return self

    def recipe(self, method: str = "ota", **parameters: Any) -> dict[str, Any]:
        """A recipe of all experts; a parameter that is a list holds one value per expert."""
        per_expert = {k: v for k, v in parameters.items() if isinstance(v, list)}
        own = [{k: v[t] for k, v in per_expert.items()} for t in range(len(self.experts))]
        if method == "ota":
            for values, file in zip(own, self.curvature_files, strict=True):
                values["preconditioner_path"] = str(file)
        return {
            "merge_method": method,
            "base_model": str(self.base_folder),
            "models": [
                {"model": str(folder), "parameters": values}
                for folder, values in zip(self.expert_folders, own, strict=True)
            ],
            "parameters": {k: v for k, v in parameters.items() if k not in per_expert},
        }

    def recipe_file(self, method: str = "ota", **parameters: Any) -> Path:
        """The recipe as a YAML file in the root."""
        return write_recipe(self.root / "recipe.yaml", self.recipe(method, **parameters))


def make_set(
    root: Path,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    *,
    experts: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    **saving: Any,
) -> ModelSet:
    """A random set, saved; saving: arguments of `ModelSet.save`."""
    base = random_tensors(shapes, seed, dtype)
    return ModelSet(
        root,
        base,
        [edited(base, seed + 100 + t) for t in range(experts)],
        [second_moments(base, seed + 200 + t) for t in range(experts)],
    ).save(**saving)


def write_recipe(path: Path, recipe: dict) -> Path:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def shard_files(folder: Path) -> list[Path]:
    """The model's safetensors files, in order."""
    return sorted(folder.glob("model*.safetensors"))


def load_merged(folder: Path) -> dict[str, Tensor]:
    """All tensors of a merged folder, read by the safetensors library, in the order of the shards."""
    tensors = {}
    for path in shard_files(folder):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return tensors


def raw(tensor: Tensor) -> bytes:
    """The tensor's bytes: what "equal" means here, NaN and the sign of zero included."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal names, types, shapes and bytes."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(found[name]) == raw(tensor), name


def digests(files: Sequence[Path] | Path) -> dict[str, str]:
    """File name -> digest of its bytes; of a folder: every file in it, by relative path."""
    if isinstance(files, Path):
        names = {p.relative_to(files).as_posix(): p for p in sorted(files.rglob("*")) if p.is_file()}
    else:
        names = {p.name: p for p in files}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in names.items()}


def model_digests(folder: Path) -> dict[str, str]:
    """Digests of the shards and the index: what must not depend on how a merge ran."""
    return digests([*shard_files(folder), *folder.glob(INDEX)])


@contextmanager
def mounted_tiny_disk(path: Path) -> Iterator[Path]:
    """A file system of 1 MB at `path`; skips the test where that cannot be mounted."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def resident_kib(path: Path) -> int:
    """Resident memory of the map of `path`, from /proc/self/smaps."""
    smaps = Path("/proc/self/smaps").read_text()
    return int(re.search(re.escape(str(path)) + r"\n(?:.*\n)*?Rss:\s+(\d+) kB", smaps)[1])


def cached_pages(path: Path, begin: int = 0, end: int | None = None) -> int:
    """How many pages of bytes [begin, end) of a file the page cache holds, by mincore: asking reads none."""
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED) as whole,
    ):
        held = (ctypes.c_ubyte * -(-len(whole) // mmap.PAGESIZE))()
        address = np.frombuffer(whole, np.uint8).ctypes.data
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        assert mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(whole)), held) == 0
        last = len(whole) if end is None else end
        return sum(x & 1 for x in held[begin // mmap.PAGESIZE : -(-last // mmap.PAGESIZE)])


def drop_pages(path: Path) -> None:
    """Have the page cache let go of a file; skips the test where it does not."""
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system is not told to")
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_pages(path):
        pytest.skip("this file system keeps its pages")


def within_seconds(holds: Callable[[], bool], seconds: float = 30) -> bool:
    """Whether something comes to hold."""
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.01)
    return holds()
