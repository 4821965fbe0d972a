"""What brackets are made from: the same runs from memory and from files, and when they are spread."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import cached_pages, drop_pages, second_moments, within_seconds
from safetensors.torch import save_file

from ota_kernels.backends import native
from ota_kernels.errors import InputError
from ota_kernels.io.reader import Checkpoint, MappedFile
from ota_kernels.select import sample as sampling
from ota_kernels.select.bracket import bracket_of, cluster_count
from ota_kernels.select.sample import CLUSTER, RUN, RUNS, Files, sample
from ota_kernels.select.thresholds import Selection
from ota_kernels.tensors.buffer import Buffer
from ota_kernels.tensors.curvature import Full, Uniform
from ota_kernels.tensors.dtypes import BY_NAME
from ota_kernels.tensors.terms import ExpertTerms, Terms, Words, score_bits, score_of_bits
from ota_kernels.tensors.tile import TensorInputs

BF16 = BY_NAME["bfloat16"]
SHAPES = {"a": (300, 70), "b": (17,), "c": (5,), "d": (40, 50)}


@pytest.fixture
def tensors(tmp_path):
    """One expert without a base, in mapped files."""
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}
    save_file(weights, tmp_path / "weights.safetensors")
    save_file(second_moments(weights, 4), tmp_path / "moments.safetensors")
    files = [Checkpoint.open(tmp_path / f"{name}.safetensors", name) for name in ("weights", "moments")]
    experts, curvatures = ([file.buffer(name) for name in SHAPES] for file in files)
    yield [
        TensorInputs(name, shape, BF16, None, (w,), (Full(h),))
        for (name, shape), w, h in zip(SHAPES.items(), experts, curvatures, strict=True)
    ]
    for file in files:
        file.close()


def own_curvature(tensor: TensorInputs) -> Terms:
    """Without a base, the score of each expert is its curvature."""
    words = Words(score="curvature" if tensor.base is None else "saliency")
    return Terms(words, (ExpertTerms(),) * len(tensor.experts))


def numbered(tensors: list[TensorInputs]) -> list[TensorInputs]:
    """Curvature that tells the tensor (times 1e5) and the element."""
    values = [np.arange(t.numel, dtype=np.float32) + np.float32(1e5) * n for n, t in enumerate(tensors)]
    buffers = [Buffer(x.view(np.uint8), BY_NAME["float32"]) for x in values]
    return [replace(t, curvatures=(Full(b),)) for t, b in zip(tensors, buffers, strict=True)]


@pytest.mark.parametrize("near", [0, 1 << 40], ids=["far apart", "near"])
@pytest.mark.parametrize("spread", [True, False])
def test_files_and_memory_give_the_same_runs(tensors, spread, near):
    based = [
        replace(t, base=t.experts[0], experts=t.experts * 2, curvatures=t.curvatures * 2) for t in tensors
    ]
    based = [replace(t, experts=(t.curvatures[0].values, t.experts[0])) for t in based]  # weights that differ
    (mapped, _), released = sample(based, 40, [0, 1], own_curvature, native, map, None, spread), []
    (read, of_base) = sample(based, 40, [0, 1], own_curvature, native, map, released.append, spread, near)
    assert bool(released) == (spread and near > 0)  # pages were mapped
    assert mapped.shape == ((40 * RUNS, RUN) if spread else (40, RUNS * RUN))
    assert np.count_nonzero(mapped) > mapped.size / 2
    assert not of_base.any()
    assert np.array_equal(mapped, read)


def test_runs_are_neighbours_in_order_and_reach_every_tensor(tensors):
    (runs,) = sample(numbered(tensors), 1000, [0], own_curvature, native, map)
    of_short = runs[:, 0] // 1e5 == 2
    assert np.all(np.diff(runs[~of_short], axis=1) == 1)
    assert set(runs[of_short].reshape(-1)) == {2e5 + i for i in range(5)}
    assert np.all(np.diff(runs[:, 0] // 1e5) >= 0)
    assert set(runs[:, 0] // 1e5) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("shape", "windows", "runs"),
    [
        ((300, 70), 20, 600),  # one pair for each row
        ((300, 70), 60, 1200),
        ((300, 70), 17, 272),  # fewer: as many as were asked for
        ((300, 31), 40, 640),  # no room for two runs in a row
        ((30, 10, 70), 20, 600),  # rows of the last dimension
        ((21_000,), 20, 320),
    ],
)
def test_runs_of_one_matrix_are_pairs_in_its_rows(tensors, shape, windows, runs):
    numel = int(np.prod(shape))
    values = Buffer(np.arange(numel, dtype=np.float32).view(np.uint8), BY_NAME["float32"])
    weights = Buffer(np.zeros(2 * numel, np.uint8), BF16)
    tensor = TensorInputs("m", shape, BF16, None, (weights,), (Full(values),))
    (found,) = sample([tensor], windows, [0], own_curvature, native, map)
    assert len(found) == runs
    if runs % (2 * (numel // shape[-1])) == 0:
        rows = found[:, 0] // shape[-1]
        assert np.array_equal(rows[::2], rows[1::2])
        assert np.array_equal(np.unique(rows), np.arange(numel // shape[-1]))


@pytest.mark.parametrize(("shape", "aligned"), [((300, 64), True), ((2, 1000, 16), True), ((300, 70), False)])
def test_runs_fill_cache_lines_where_rows_do(shape, aligned):
    tensor = TensorInputs("m", shape, BF16, None, (zeros(shape),), (Uniform(),))
    (tensor,) = numbered([tensor])
    (found,) = sample([tensor], 60, [0], own_curvature, native, map)
    assert np.all(found[:, 0] % RUN == 0) == aligned
    assert len(np.unique(found[:, 0])) > 0.8 * len(found)
    rows = found // shape[-1]
    assert not aligned or np.array_equal(rows[:, 0], rows[:, -1])


@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("cut", [0, 1, 2, 3, 4])
def test_an_input_that_was_cut_while_in_use_is_named(tmp_path, cut, spread):
    n = 40_000
    paths = [tmp_path / f"{i}.safetensors" for i in range(5)]
    for path in paths:
        save_file({"w": torch.ones(n)}, path)
    files = [MappedFile(path) for path in paths]
    base, *experts = (file.buffer("w") for file in files[:3])
    curvatures = tuple(Full(file.buffer("w")) for file in files[3:])
    tensor = TensorInputs("w", (n,), BF16, base, tuple(experts), curvatures)
    with paths[cut].open("r+b") as file:
        file.truncate(paths[cut].stat().st_size // 2)
    with pytest.raises(InputError, match=rf"/{cut}\.safetensors: changed while in use"):
        sample([tensor], 60, [0, 1], own_curvature, native, map, lambda tile: None, spread, near=0)
    for file in files:
        file.close()


def test_a_read_that_fails_is_not_called_a_file_that_was_cut(tmp_path, monkeypatch):
    n, path = 40_000, tmp_path / "expert.safetensors"
    save_file({"w": torch.ones(n)}, path)
    with MappedFile(path) as file, path.open("r+b") as for_all, path.open("ab") as not_for_reading:
        weights = file.buffer("w")
        tensor = TensorInputs("w", (n,), BF16, None, (weights,), (Uniform(),))
        monkeypatch.setattr(sampling.Files, "descriptor", lambda self, buffer: for_all.fileno())
        assert sample([tensor], 60, [0], own_curvature, native, map, lambda tile: None, near=0)[0].all()
        monkeypatch.setattr(sampling.Files, "descriptor", lambda self, buffer: not_for_reading.fileno())
        with pytest.raises(InputError, match=r"/expert\.safetensors: a read from its disk failed"):
            sample([tensor], 60, [0], own_curvature, native, map, lambda tile: None, near=0)


def zeros(shape: tuple[int, ...]) -> Buffer:
    return Buffer(np.zeros(2 * int(np.prod(shape)), np.uint8), BF16)


def matrix_with_rows(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Curvature whose rows differ tenfold."""
    return (rng.exponential(size=shape) * 10 ** rng.uniform(-0.5, 0.5, (shape[0], 1))).astype(np.float32)


def test_brackets_hold_the_threshold_and_leave_out_how_rows_differ():
    rows, columns, kept = 512, 256, 512 * 256 * 3 // 10
    selection, weights = Selection("density", 0.3), Buffer(np.zeros(2 * rows * columns, np.uint8), BF16)
    held, shares = [], {"matrix": [], "vector": []}
    for seed in range(100):
        curvature = matrix_with_rows(np.random.default_rng(seed), (rows, columns)).reshape(-1)
        threshold = np.partition(curvature, len(curvature) - kept)[len(curvature) - kept]
        values = (Full(Buffer(curvature.view(np.uint8), BY_NAME["float32"])),)
        for name, shape in {"matrix": (rows, columns), "vector": (rows * columns,)}.items():
            tensor = TensorInputs(name, shape, BF16, None, (weights,), values)
            (found,) = sample([tensor], 60, [0], own_curvature, native, map)
            bracket = bracket_of(selection, found)
            highest = score_of_bits(score_bits(bracket.lowest) + bracket.span - 1)
            held.append(bracket.lowest <= threshold <= highest)
            shares[name].append(np.mean((curvature >= bracket.lowest) & (curvature <= highest)))
    assert np.mean(held) > 0.985  # 3.5 standard errors: it misses once in 2000
    assert np.mean(shares["matrix"]) < 0.8 * np.mean(shares["vector"])  # 1024 runs instead of 960 give 0.97


def test_windows_that_are_asked_for_come_from_the_disk(tmp_path):
    path, page = tmp_path / "model.safetensors", 4096
    save_file({"w": torch.ones(1 << 20)}, path)
    with MappedFile(path) as mapped:
        weights = mapped.buffer("w")
        tensor = TensorInputs("w", (len(weights),), BF16, None, (weights,), (Uniform(),))
        drop_pages(path)
        windows = np.array([[50_000], [800_000]]) + np.arange(RUNS) * 500  # 8 pages each, or one more
        with Files() as files:
            files.ask_for(tensor, windows.reshape(-1), RUNS)
        for begin in weights.offset + 4 * windows[:, 0]:
            window = (path, begin, begin + 4 * (500 * (RUNS - 1) + RUN))
            assert within_seconds(lambda window=window: cached_pages(*window) >= 4 * 500 * (RUNS - 1) // page)
        assert cached_pages(path) < 64  # of 1024


def test_the_sample_of_the_largest_models_fits_the_memory():
    """256 float32 scores of each cluster, and expert."""
    assert cluster_count(405_000_000_000) * CLUSTER * 4 < 64 << 20
    assert cluster_count(10**15) == cluster_count(10**12)
