"""The file of a pack: records against a decoder of their own, tiles in any order, and files that lie."""

from __future__ import annotations

import json
import struct
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ota_kernels import InputError, _native
from ota_kernels.backends import native
from ota_kernels.io import pack as pack_format
from ota_kernels.io.header import PREFIX_BYTES
from ota_kernels.io.pack import EXACT, SIGN, Base, Entry, PackFile, hash_of
from ota_kernels.io.pack_codec import TILE, encode_mask, encode_signs
from ota_kernels.io.pack_writing import Encoded, PackWriter, Spool
from ota_kernels.tensors.buffer import Buffer
from ota_kernels.tensors.curvature import Uniform
from ota_kernels.tensors.dtypes import BY_NAME
from ota_kernels.tensors.terms import ExpertTerms, Terms, Words
from ota_kernels.tensors.tile import TensorInputs

BF16 = BY_NAME["bfloat16"]


def decoded(mask: bytes, n: int, count: int) -> list[int]:
    """As README.md has it, bit by bit."""
    if not mask:
        return []
    code, bits = mask[0], [byte >> i & 1 for byte in mask[1:] for i in range(8)]
    if code == 65:
        return list(range(n))
    if code == 64:
        return [i for i in range(n) if bits[i]]
    found, position, at = [], -1, 0
    for _ in range(count):
        high = 0
        while not bits[at]:
            high, at = high + 1, at + 1
        low = sum(bits[at + 1 + i] << i for i in range(code))
        at += 1 + code
        position += 1 + (high << code) + low
        found.append(position)
    return found


def unpack(record: bytes, count: int, n: int, values: int, base: np.ndarray, scale=1.0, window=None):
    """Of one tile of a tensor of n elements: (the tile that is at fault or -1, what came out)."""
    start, stop = window or (0, n)
    size = base.itemsize
    out = np.zeros((stop - start) * (size if values == 0 else 4), np.uint8)
    part = part_of([record], [count], n, values, base[start:stop], scale, (start, stop))
    return _native.unpack(part, out), out


def bytes_of(data: np.ndarray) -> SimpleNamespace:
    return SimpleNamespace(data=np.ascontiguousarray(data).view(np.uint8))


def part_of(
    records: list[bytes], counts: list[int], n: int, values: int, base: np.ndarray, scale, window, tile=TILE
):
    """What the extension is told of elements `window` of a tensor of n elements: base, of these alone."""
    size = base.itemsize
    return SimpleNamespace(
        base=bytes_of(base),
        shared=None,
        records=bytes_of(np.frombuffer(b"".join(records), np.uint8)),
        offsets=np.cumsum([0, *map(len, records)]),
        counts=np.array(counts),
        first=0,
        tile=TILE,
        numel=n,
        start=window[0],
        stop=window[1],
        values=values,
        type=BF16.code if size == 2 else 0,
        size=size,
        scale=scale,
    )


masks = st.builds(
    lambda n, density, seed: np.random.default_rng(seed).random(n) < density,
    st.sampled_from([1, 7, 8, 63, 64, 65, 1000, 5000]),
    st.sampled_from([0.0, 0.001, 0.02, 0.2, 0.5, 0.97, 1.0]),
    st.integers(0, 1000),
)


class TestRecords:
    @given(masks, st.data())
    def test_exact(self, mask, data):
        n, kept = len(mask), np.flatnonzero(mask)
        assert decoded(encode_mask(kept, n), n, len(kept)) == kept.tolist()
        random = np.random.default_rng(n)
        base, values = (random.integers(0, 1 << 16, size, np.uint16) for size in (n, len(kept)))
        record = encode_mask(kept, n) + values.tobytes()
        wanted = base.copy()
        wanted[kept] = values
        bad, out = unpack(record, len(kept), n, 0, base)
        assert (bad, out.view(np.uint16).tolist()) == (-1, wanted.tolist())
        start = data.draw(st.integers(0, n))
        stop = data.draw(st.integers(start, n))
        bad, out = unpack(record, len(kept), n, 0, base, window=(start, stop))
        assert (bad, out.view(np.uint16).tolist()) == (-1, wanted[start:stop].tolist())

    @given(masks)
    def test_signs(self, mask):
        n, kept = len(mask), np.flatnonzero(mask)
        random = np.random.default_rng(n)
        base, positive = random.normal(size=n).astype(np.float32), random.random(len(kept)) < 0.5
        wanted = base.copy()
        wanted[kept] += np.where(positive, np.float32(0.3), np.float32(-0.3))
        bad, out = unpack(encode_mask(kept, n) + encode_signs(positive), len(kept), n, 1, base, 0.3)
        assert (bad, out.view(np.float32).tolist()) == (-1, wanted.tolist())

    def test_a_mask_is_no_longer_than_a_bitmap(self):
        for density in (0.3, 0.5, 0.9):
            kept = np.flatnonzero(np.random.default_rng(1).random(TILE) < density)
            assert len(encode_mask(kept, TILE)) <= TILE // 8 + 1
        assert encode_mask(np.arange(TILE), TILE) == bytes([65])
        assert encode_mask(np.arange(0), TILE) == b""

    @settings(max_examples=200)
    @given(st.binary(max_size=40), st.integers(-1, 80), st.integers(1, 70), st.integers(0, 1))
    def test_anything_is_refused_or_stays_inside(self, record, count, n, values):
        """Decoded into memory of its own size, which the kernel may not leave."""
        base = np.zeros(n, np.uint16)
        bad, out = unpack(record, count, n, values, base)
        assert bad in (0, -1)
        if bad == -1 and values == 0:
            assert np.count_nonzero(out.view(np.uint16)) <= count


N = 2 * TILE + 1234


@pytest.fixture(scope="module")
def parts():
    """(base, expert: bfloat16 bits; a pack of two tensors as bytes, and its path)."""
    random = np.random.default_rng(0)
    base = random.integers(0x3C00, 0x3D00, N).astype(np.uint16)
    expert = base.copy()
    kept = random.random(N) < 0.05
    expert[kept] ^= 1
    return base, expert


def write(path: Path, base: np.ndarray, expert: np.ndarray) -> bytes:
    spool = Spool(path.parent)
    writer = PackWriter(spool)
    entries = {"w": Entry((N,), BF16, EXACT), "signs": Entry((10, 20), BF16, SIGN, 0.25)}
    for name, entry in entries.items():
        writer.begin(name, entry)
        numel, tiles = entry.numel, []
        for start in range(0, numel, TILE):
            stop = min(start + TILE, numel)
            kept = np.flatnonzero(base[start:stop] != expert[start:stop])
            mask, own = encode_mask(kept, stop - start), hash_of(base[start:stop].tobytes())
            values = expert[start:stop][kept].tobytes() if name == "w" else encode_signs(kept % 2 == 0)
            tiles.append(Encoded(mask + values, len(kept), own))
        writer.add(name, tiles)
    said = Base("/nowhere", "org/base", writer.content())
    writer.write(path, "ffg", "expert", {"density": 0.05}, said, {"config.json": b"{}" * 50})
    spool.close()
    return path.read_bytes()


def whole(pack: PackFile, base: np.ndarray) -> list[bytes]:
    """All that a pack holds."""
    found = []
    for name, entry in pack.entries.items():
        buffer = Buffer(base[: entry.numel].view(np.uint8), BF16)
        found.append(pack.part(name, buffer, 0, entry.numel).data.tobytes())
    return [*found, str(pack.beside())]


@pytest.fixture(scope="module")
def path(parts, tmp_path_factory):
    path = tmp_path_factory.mktemp("pack") / "e.pack"
    write(path, *parts)
    return path


@given(st.integers(0, N), st.integers(0, N))
def test_tiles_decode_alone_and_in_any_order(parts, path, one, other):
    base, expert = parts
    start, stop = sorted((one, other))
    pack = PackFile(path, "e")
    found = pack.part("w", Buffer(base[start:stop].view(np.uint8), BF16), start, stop).data
    assert found.tobytes() == expert[start:stop].tobytes()
    pack.close()


@settings(max_examples=30)
@given(st.integers(0, N), st.integers(0, N), st.sampled_from(["bfloat16", "float32"]), st.integers(1, 3))
def test_a_merge_decodes_what_it_merges(parts, path, one, other, out_dtype, experts):
    """A stretch at a time, wherever its tile begins and ends: as if the experts lay there as a whole."""
    start, stop = sorted((one, other))
    base = Buffer(parts[0][start:stop].view(np.uint8), BF16)
    words = Words(score="none", select="all", weigh="constant", divide="number")
    terms = Terms(words, tuple(ExpertTerms(weight_scale=0.3 + t) for t in range(experts)))
    found = []
    with closing(PackFile(path, "e")) as pack:
        for whole in (False, True):
            own = [pack.part("w", base, start, stop) for _ in range(experts)]
            given = tuple(Buffer(part.data, part.dtype) if whole else part for part in own)
            curvatures = (Uniform(),) * experts
            tile = TensorInputs("w", (N,), BY_NAME[out_dtype], base, given, curvatures, start=start)
            out = np.empty(len(base) * BY_NAME[out_dtype].itemsize, np.uint8)
            stats = native.merge(tile, terms, out)
            found.append((out.tobytes(), stats.kept, stats.unkept))
            assert whole or start == stop or all(part._made is None for part in own)
    assert found[0] == found[1]


@pytest.mark.parametrize("special", ["nothing", "zeros", "nan", "infinite base", "all", "overflow"])
@pytest.mark.parametrize("divide", ["number", "weights"])
@pytest.mark.parametrize("repair", [False, True])
def test_a_sum_of_packs_is_that_of_the_experts(parts, tmp_path, special, divide, repair):
    """Where only what is kept is looked at, and where some of it is not finite."""
    base, expert = (part.copy() for part in parts)
    if special == "zeros":
        base[::7] = expert[::7] = 0x8000  # -0
    elif special == "nan":
        expert[[5, 70000]] = 0x7FC0
    elif special == "infinite base":
        base[70000] = expert[70000] = 0x7F80
    elif special == "all":
        expert = base ^ 3
    elif special == "overflow":
        base[9], expert[9] = 0x7F7F, 0x7F7E
    write(tmp_path / "e.pack", base, expert)
    words = Words(score="none", select="all", weigh="constant", divide=divide)
    buffer, found = Buffer(base.view(np.uint8), BF16), []
    for weights in ((0.7,), (0.5, -2.0, 1.0)):
        terms = Terms(words, tuple(ExpertTerms(weight_scale=w) for w in weights), repair=repair)
        for whole in (False, True):
            with closing(PackFile(tmp_path / "e.pack", "e")) as pack:
                own = [pack.part("w", buffer, 0, N) for _ in weights]
                given = tuple(Buffer(part.data, part.dtype) if whole else part for part in own)
                tile = TensorInputs("w", (N,), BF16, buffer, given, (Uniform(),) * len(weights))
                out = np.empty(2 * N, np.uint8)
                found.append((native.merge(tile, terms, out), out.tobytes()))
    assert found[0] == found[1]
    assert found[2] == found[3]


def test_a_merge_of_a_record_that_is_none(parts, tmp_path):
    """Whose hash is right: whoever made it meant it."""
    base, expert = parts
    spool = Spool(tmp_path)
    writer = PackWriter(spool)
    writer.begin("w", Entry((2 * TILE,), BF16, EXACT))
    kept = np.flatnonzero(base[:TILE] != expert[:TILE])
    sound = encode_mask(kept, TILE) + expert[kept].tobytes()
    own = [hash_of(base[a : a + TILE].tobytes()) for a in (0, TILE)]
    writer.add("w", [Encoded(sound, len(kept), own[0]), Encoded(sound[:-1], len(kept), own[1])])
    writer.write(tmp_path / "e.pack", "ffg", "e", {}, Base("", "b", writer.content()), {})
    spool.close()
    words = Words(score="none", select="all", weigh="constant", divide="number")
    buffer = Buffer(base[: 2 * TILE].view(np.uint8), BF16)
    with closing(PackFile(tmp_path / "e.pack", "e")) as pack:
        part = pack.part("w", buffer, 0, 2 * TILE)
        tile = TensorInputs("w", (2 * TILE,), BF16, buffer, (part,), (Uniform(),))
        with pytest.raises(InputError, match="damaged: tile 1 of 'w'"):
            native.merge(tile, Terms(words, (ExpertTerms(),)), np.empty(4 * TILE, np.uint8))
        with pytest.raises(InputError, match="damaged: tile 1 of 'w'"):
            len(part.data)


@given(st.lists(st.integers(0, N - 1), max_size=300))
def test_elements_at_positions(parts, path, positions):
    """Ascending, some of them more than once; of signs, in float32."""
    base, expert = parts
    with closing(PackFile(path, "e")) as pack:
        at = np.sort(np.array(positions, np.int64))
        found = pack.gathered("w", Buffer(base[at].view(np.uint8), BF16), at)
        assert found.tobytes() == expert[at].tobytes()
        at %= 200
        at.sort()
        of_signs = pack.part("signs", Buffer(base[:200].view(np.uint8), BF16), 0, 200).data.view(np.float32)
        found = pack.gathered("signs", Buffer(base[at].view(np.uint8), BF16), at).view(np.float32)
        assert found.tolist() == of_signs[at].tolist()


def test_says_what_it_is(parts, path):
    pack = PackFile(path, "e")
    assert (pack.form, pack.expert, pack.settings) == ("ffg", "expert", {"density": 0.05})
    assert (pack.base.model, len(pack.base.content)) == ("org/base", 64)
    assert pack.beside() == {"config.json": b"{}" * 50}
    tiles = np.split(parts[0], [TILE, 2 * TILE])
    assert pack.base_hashes("w").tolist() == [hash_of(tile.tobytes()) for tile in tiles]
    pack.close()


class RefusedError(Exception):
    """A pack is refused, by one line."""


@contextmanager
def in_one_line():
    try:
        yield
    except InputError as error:
        if "\n" in str(error):
            raise
        raise RefusedError from error


def content_of(parts, path: Path, content: bytes) -> list[bytes] | None:
    """All that a file holds, None where it is refused."""
    path.write_bytes(content)
    with suppress(RefusedError), in_one_line(), closing(PackFile(path, "e")) as pack:
        return whole(pack, parts[0])
    return None


@settings(max_examples=150)
@given(st.data())
def test_damaged_bytes_are_refused_or_harmless(parts, path, tmp_path_factory, data):
    content = bytearray(path.read_bytes())
    wanted = content_of(parts, tmp_path_factory.getbasetemp() / "damaged.pack", bytes(content))
    assert wanted is not None
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.one_of(st.integers(0, 2500), st.integers(0, len(content) - 1)))
        removed = data.draw(st.integers(0, 3))
        content[at : at + removed] = data.draw(st.binary(max_size=3))
    found = content_of(parts, tmp_path_factory.getbasetemp() / "damaged.pack", bytes(content))
    assert found is None or found == wanted


lies = st.one_of(
    st.integers(-2, 1 << 40),
    st.none(),
    st.booleans(),
    st.floats(),
    st.sampled_from(["exact", "sign", "shared", "float32", "int64", [], {}, [2**62, 2**62], [-1], "x" * 300]),
)


@settings(max_examples=150)
@given(st.sampled_from(["shape", "dtype", "values", "scale"]), st.sampled_from(["w", "signs"]), lies)
def test_a_lie_about_a_tensor_is_refused_or_harmless(parts, path, tmp_path_factory, key, name, lie):
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[PREFIX_BYTES : PREFIX_BYTES + length])
    table = json.loads(header["__metadata__"]["tensors"])
    table[name][key] = lie
    said = header["__metadata__"]
    said["tensors"] = json.dumps(table)
    said["check"] = pack_format.check_of(said)
    text = json.dumps(header).encode()
    lying = struct.pack("<Q", len(text)) + text + content[PREFIX_BYTES + length :]
    target = tmp_path_factory.getbasetemp() / "lying.pack"
    target.write_bytes(lying)
    with suppress(RefusedError), in_one_line(), closing(PackFile(target, "e")) as pack:
        for own, entry in pack.entries.items():
            if entry.numel <= 2 * N:
                base = np.zeros(entry.numel * entry.dtype.itemsize, np.uint8)
                len(pack.part(own, Buffer(base, entry.dtype), 0, entry.numel, _some(entry)).data)


def _some(entry: Entry) -> Buffer | None:
    if entry.values != "shared":
        return None
    return Buffer(np.zeros(2 * entry.numel, np.uint8), BF16)


@settings(max_examples=60)
@given(st.integers(0, 2), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_a_lie_about_a_tile_is_refused(parts, path, tmp_path_factory, tile, column, lie):
    """Bytes, count and hash of a record; the base's hash tells of another base."""
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[PREFIX_BYTES : PREFIX_BYTES + length])
    begin = PREFIX_BYTES + length + header["tiles/w"]["data_offsets"][0]
    at = begin + 4 * (4 * tile + column)
    if struct.unpack_from("<I", content, at)[0] == lie:
        return
    struct.pack_into("<I", content, at, lie)
    target = tmp_path_factory.getbasetemp() / "tile.pack"
    target.write_bytes(content)
    base = Buffer(parts[0].view(np.uint8), BF16)
    pack = PackFile(target, "e")
    if column == 3:
        assert pack.base_hashes("w")[tile] == lie
        return
    with pytest.raises(InputError, match="damaged"):
        len(pack.part("w", base, 0, N).data)
