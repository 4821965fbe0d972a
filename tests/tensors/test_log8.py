"""The 8-bit form of second moments: its levels, its errors, and that every backend reads it alike."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from models import buffer

from ota_kernels.backends import native
from ota_kernels.select.sample import RUN, RUNS, Files
from ota_kernels.tensors import log8
from ota_kernels.tensors.buffer import Buffer
from ota_kernels.tensors.curvature import Log8, Rank1
from ota_kernels.tensors.dtypes import BY_NAME
from ota_kernels.tensors.terms import ExpertTerms, Terms, Words
from ota_kernels.tensors.tile import TensorInputs

SMALLEST_NORMAL, LARGEST = 2.0**-126, float(np.finfo(np.float32).max)
TERMS = Terms(Words(score="curvature"), (ExpertTerms(score_scale=1.0),))
LOWEST_LEVEL = 152 / 128 * 2.0**-63  # times a row's scale


def exact_levels() -> np.ndarray:
    """level(c), float64[256]: significands 128, 152, 181, 215 of 128, octaves that end at [1, 2)."""
    codes = np.arange(256)
    levels = np.array([128, 152, 181, 215])[codes % 4] / 128 * 2.0 ** (codes // 4 - 63)
    levels[0] = 0
    return levels


def decoded(values: np.ndarray) -> np.ndarray:
    codes, scales = log8.encode(values)
    return log8.decode(codes, scales[:, None])


def relative_errors(values: np.ndarray) -> np.ndarray:
    """Of values > 0, in float64."""
    exact = values.astype(np.float64)
    return np.abs(decoded(values) - exact) / exact


def test_the_levels():
    np.testing.assert_array_equal(log8.LEVELS, exact_levels())


def test_no_other_significands_have_a_lesser_ratio():
    triples = itertools.combinations(range(129, 256), 3)
    best = min(max(a / 128, b / a, c / b, 256 / c) for a, b, c in triples)
    levels = exact_levels()[1:]
    ratio = (levels[1:] / levels[:-1]).max()
    assert ratio == best
    assert pytest.approx((ratio - 1) / (ratio + 1), rel=1e-15) == log8.LARGEST_ERROR


def test_the_nearest_level_is_taken():
    """Around every level and every middle between two, one float32 to both sides too."""
    levels = exact_levels()[1:]
    places = np.float32(np.concatenate([levels, (levels[1:] + levels[:-1]) / 2]))
    places = np.concatenate(
        [places, np.nextafter(places, np.float32(0)), np.nextafter(places, np.float32(2))]
    )
    row = places[None, (places < 1.8) & (places > 0)]  # the next octave's scale begins at 1.84
    found = np.abs(decoded(row) - row.astype(np.float64))
    least = np.abs(levels[:, None] - row.astype(np.float64)).min(axis=0)
    np.testing.assert_array_equal(found[0], least)


ROWS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 9)),
    elements=st.floats(0, LARGEST, width=32, allow_subnormal=True),
)


@given(ROWS)
@example(np.zeros((2, 3), np.float32))
@example(np.float32([[2.0**-149, 1e-40, 0], [1, 2.0**-62, 2.0**-149]]))
@example(np.float32([[LARGEST, 1, 0], [2.0**-126, 2.0**-63, 1e-30]]))
@example(np.float32([[-0.0, 0.0], [-0.0, 1.0]]))
def test_any_rows(values):
    codes, scales = log8.encode(values)
    np.testing.assert_array_equal(codes == 0, values == 0)
    exponents = np.log2(scales.astype(np.float64))
    assert (exponents == exponents.astype(int)).all()
    assert (exponents >= -63).all()
    exact = exact_levels()[codes] * scales.astype(np.float64)[:, None]
    found = log8.decode(codes, scales[:, None])
    np.testing.assert_array_equal(found, exact)  # the product is exact,
    assert (found[codes > 0] >= SMALLEST_NORMAL).all()  # and no subnormal

    largest = values.max(axis=1, keepdims=True)
    promised = (values >= largest * 2.0**-62) & (values >= 1.1 * SMALLEST_NORMAL) & (values < 1.83 * 2.0**127)
    error = np.abs(found - values.astype(np.float64))
    assert (error[promised] <= log8.LARGEST_ERROR * values[promised].astype(np.float64)).all()
    top = (largest > 2.0**-62)[:, 0]
    assert (codes.max(axis=1)[top] >= 252).all()
    np.testing.assert_array_equal(decoded(found), found)  # compressing again changes nothing


def test_what_is_promised_of_the_errors():
    rng = np.random.default_rng(1)
    values = np.float32(2.0 ** rng.uniform(-61, 0, (50, 2000)))
    values *= np.float32(2.0 ** rng.integers(-60, 100, (50, 1)))
    errors = relative_errors(values)
    assert 0.087 < errors.max() <= log8.LARGEST_ERROR < 0.0871
    assert errors.mean() < 0.05


def test_beyond_the_range_of_a_row():
    """Values too small for their row become its lowest level, none becomes 0."""
    row = np.float32([[1.5, 2.0**-64, 2.0**-100, SMALLEST_NORMAL, 2.0**-149, 0]])
    np.testing.assert_array_equal(decoded(row)[0], np.float32([181 / 128, *[LOWEST_LEVEL] * 4, 0]))


def test_rows_of_subnormals_and_of_the_largest_numbers():
    row = np.float32([[2.0**-149, 1e-40, 0.99 * SMALLEST_NORMAL, 0]])
    np.testing.assert_array_equal(decoded(row)[0], np.float32([LOWEST_LEVEL * 2.0**-63] * 3 + [0]))
    huge = np.float32([[LARGEST, 1.84 * 2.0**127, 2.0**127, 2.0**66]])
    expected = [215 / 128 * 2.0**127, 215 / 128 * 2.0**127, 2.0**127, 2.0**66]
    np.testing.assert_array_equal(decoded(huge)[0], np.float32(expected))


def random_codes(seed: int, rows: int, columns: int, bias_correction: float = 1.0) -> Log8:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, rows * columns).astype(np.uint8)
    scales = np.float32(2.0 ** rng.integers(-63, 127, rows))
    return Log8(Buffer(codes, BY_NAME["uint8"], "codes"), scales, columns, bias_correction=bias_correction)


def expand(c: Log8) -> np.ndarray:
    """Its values, straight from the definition, float32[n]."""
    index = c.start + np.arange(len(c.codes))
    return np.float32(exact_levels()[c.codes.data] * c.scales.astype(np.float64)[index // c.columns])


def tile_of(curvature, n: int) -> TensorInputs:
    """Scores of this tile are its curvature: no base, and no scale."""
    return TensorInputs("w", (n,), BY_NAME["float32"], None, (buffer(torch.ones(n)),), (curvature,))


def read(curvature, n: int, backend) -> np.ndarray:
    return backend.scores(tile_of(curvature, n), 0, TERMS)[0]


@pytest.mark.parametrize(
    "shape", [(1, 256), (3, 7), (1, 1), (5, 1024), (2, 1500), (700, 3), (1, 4099)], ids=str
)
def test_every_backend_decodes_alike(backend, shape):
    whole = random_codes(2, *shape)
    if shape == (1, 256):
        whole.codes.data[:] = np.arange(256)
    n = len(whole.codes)
    truth = expand(whole)
    np.testing.assert_array_equal(read(whole, n, backend), truth)
    np.testing.assert_array_equal(whole.float32(), truth)
    for start, stop in [(1, n), (n // 3, n // 2 + 1), (n - 1, n), (n // 2, n // 2)]:
        part = whole.slice(start, stop).slice(0, stop - start)
        np.testing.assert_array_equal(read(part, stop - start, backend), truth[start:stop])
    positions = np.random.default_rng(3).permutation(n)[: n // 2 + 1]
    gathered = tile_of(whole, n).gather(positions).curvatures[0]
    np.testing.assert_array_equal(gathered.values.data.view(np.float32), truth[positions])


@pytest.mark.parametrize("offset", [1, 2, 3, 5, 63])
def test_codes_may_lie_anywhere(backend, offset):
    aligned = random_codes(4, 9, 300)
    room = np.zeros(len(aligned.codes) + 128, np.uint8)
    room = room[-room.ctypes.data % 64 :][offset : offset + len(aligned.codes)]
    room[:] = aligned.codes.data
    moved = Log8(Buffer(room, BY_NAME["uint8"]), aligned.scales, aligned.columns)
    np.testing.assert_array_equal(read(moved, len(room), backend), expand(aligned))


def test_row_and_column_sums(backend):
    if backend is not native:
        pytest.skip("sums are taken by the native backend for all")
    c = random_codes(5, 6, 1030)
    c.scales[:] = 1.0
    rows, columns = np.zeros(4), np.zeros(1030)
    native.row_column_sums(c.slice(1030, 5 * 1030), rows, columns)
    truth = expand(c).astype(np.float64).reshape(6, 1030)[1:5]
    np.testing.assert_allclose(rows, truth.sum(1), rtol=1e-12)
    np.testing.assert_allclose(columns, truth.sum(0), rtol=1e-12)


@pytest.mark.parametrize("form", ["log8", "rank 1"])
@pytest.mark.parametrize("together", [0, 1, RUNS])
def test_runs_are_read_from_files_alike(tmp_path, form, together):
    """What the sampler does, by the buffers' offsets in their files."""
    shape = (40, 50)
    c = random_codes(6, *shape, bias_correction=0.5)
    path = tmp_path / "codes"
    path.write_bytes(b"skipped" + c.codes.data.tobytes())
    file = np.fromfile(path, np.uint8)
    c = Log8(Buffer(file[7:], BY_NAME["uint8"], str(path), 7), c.scales, c.columns, 0, c.bias_correction)
    if form == "rank 1":
        c = Rank1(c.scales, np.float32(2.0 ** -np.arange(50)), bias_correction=0.5)
    tensor = tile_of(c, 2000)
    starts = np.random.default_rng(7).integers(0, 2000 - RUN, 2 * RUNS)
    found = np.empty(2 * RUNS * RUN, np.float32)
    with Files() if together else contextlib.nullcontext() as files:
        places = (files.descriptor, together) if together else ()
        assert native.run_scores(tensor, TERMS, [0], starts, RUN, [found], *places) is None
    positions = (starts[:, None] + np.arange(RUN)).reshape(-1)
    np.testing.assert_array_equal(found, read(c, 2000, native)[positions])
    assert tensor.gather(positions).curvatures[0].bias_correction == 0.5


def test_runs_of_a_file_that_was_cut_are_not_scored(tmp_path):
    c = random_codes(6, 40, 50)
    path = tmp_path / "codes"
    path.write_bytes(c.codes.data[:-1].tobytes())
    c = replace(c, codes=replace(c.codes, origin=str(path), offset=0))
    found = [np.empty(2 * RUN, np.float32)]
    with Files() as files:
        for last, cut in ((2000 - RUN - 1, None), (2000 - RUN, c.codes)):
            for together in (1, 2):
                starts = np.array([1900, last])
                given = tile_of(c, 2000), TERMS, [0], starts, RUN, found, files.descriptor, together
                assert native.run_scores(*given) is cut
