"""The ring that tiles pass through on their way to a device: on the CPU, which takes the same code without
pinned memory, and on a made-up GPU whose copies happen late."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 34.00 MiB."


def random_bytes(seed: int, *sizes: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, size, np.uint8) for size in sizes]


class TestRing:
    @pytest.fixture
    def ring(self):
        from ota_kernels.backends.triton.ring import Ring

        return Ring(torch.device("cpu"), most=3)

    def test_tiles_in_flight_do_not_touch_each_other(self, ring):
        """Eight threads, three slots, tiles of many sizes; three are inside at a time."""
        inside, together, wrong, lock = [], [], [], threading.Lock()
        arrived = threading.Barrier(3)

        def tile(seed: int) -> None:
            arrays = random_bytes(seed, *np.random.default_rng(seed).integers(0, 5000, 4))

            def work(slot) -> list[np.ndarray]:
                with lock:
                    wrong.extend([seed] * (slot in inside))
                    inside.append(slot)
                    together.append(len(inside))
                loaded = slot.load(arrays)
                if seed < 3:
                    arrived.wait(timeout=20)
                time.sleep(0.002)
                found = slot.fetch(loaded)
                with lock:
                    inside.remove(slot)
                return found

            if [a.tobytes() for a in ring.run(work)] != [a.tobytes() for a in arrays]:
                wrong.append(seed)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(tile, range(48)))
        assert wrong == []
        assert max(together) == 3

    def test_memory_is_used_again(self, ring):
        sizes = [3 << 20, 3 << 20, 100, 2 << 20]
        tiles = [random_bytes(seed, size) for seed, size in enumerate(sizes)]
        places = [ring.run(lambda slot, tile=tile: slot.load(tile)[0].data_ptr()) for tile in tiles]
        assert len(set(places)) == 1

    def test_parts_are_aligned_views_of_one_arena(self, ring):
        def work(slot) -> list[int]:
            parts = slot.load(random_bytes(0, 1, 255, 256, 0, 1000))
            assert [part.numel() for part in parts] == [1, 255, 256, 0, 1000]
            return [part.data_ptr() - parts[0].data_ptr() for part in parts if part.numel()]

        assert ring.run(work) == [0, 256, 512, 768]

    def test_results_larger_than_the_pinned_memory_come_in_pieces(self, ring):
        sizes = []

        def work(slot) -> list[np.ndarray]:
            slot.load(random_bytes(2, 10))
            sizes.extend((2 * slot.nbytes + 77, 5, 0, 300))
            given = random_bytes(1, *sizes)
            return slot.fetch([torch.from_numpy(a) for a in given])

        found = ring.run(work)
        assert [a.tobytes() for a in found] == [a.tobytes() for a in random_bytes(1, *sizes)]

    def test_arrays_of_any_type_and_order(self, ring):
        matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
        bytes_of = ring.run(lambda slot: slot.fetch(slot.load([matrix.T, matrix[1:]])))
        assert [b.tobytes() for b in bytes_of] == [matrix.T.tobytes(), matrix[1:].tobytes()]

    def test_an_error_gives_the_slot_back(self, ring):
        for _ in range(5):
            with pytest.raises(ZeroDivisionError):
                ring.run(lambda slot: 1 / 0)
        assert ring.run(lambda slot: 7) == 7

    def test_release_gives_up_what_is_not_in_use(self, ring):
        sizes = []
        ring.run(lambda slot: (slot.load(random_bytes(3, 1000)), sizes.append(slot.nbytes)))
        ring.release()
        ring.run(lambda slot: sizes.append(slot.nbytes))
        assert sizes[0] >= 1000
        assert sizes[1] == 0

    @pytest.fixture
    def device_memory(self, monkeypatch):
        """Lets arenas take so many bytes together, as a list of one number."""
        budget, empty, lock = [1 << 40], torch.empty, threading.RLock()

        def change(nbytes: int) -> None:
            with lock:
                if budget[0] < -nbytes:
                    raise torch.OutOfMemoryError(OUT_OF_MEMORY)
                budget[0] += nbytes

        def limited(n, **options):
            if "device" not in options:
                return empty(n, **options)
            change(-n)
            arena = empty(n, **options)
            weakref.finalize(arena, change, n)
            return arena

        monkeypatch.setattr(torch, "empty", limited)
        return budget

    def test_fewer_slots_where_memory_runs_out(self, ring, device_memory, caplog):
        """Two of three tiles find room: the third waits for one of them; later ones too."""
        device_memory[0] = 2 * (4 << 20)
        two_inside, most, lock, inside = threading.Barrier(2), [], threading.Lock(), []
        data = random_bytes(4, *[3 << 20] * 6)
        found = {}

        def tile(i: int) -> None:
            def work(slot) -> bytes:
                loaded = slot.load([data[i]])
                with lock:
                    inside.append(i)
                    most.append(len(inside))
                if i < 2:
                    two_inside.wait(timeout=20)
                (back,) = slot.fetch(loaded)
                with lock:
                    inside.remove(i)
                return back.tobytes()

            found[i] = ring.run(work)

        with caplog.at_level(logging.WARNING, "ota_kernels"), ThreadPoolExecutor(6) as threads:
            list(threads.map(tile, range(6)))
        assert found == {i: a.tobytes() for i, a in enumerate(data)}
        assert max(most) == 2
        (message,) = caplog.messages
        assert "2 tiles in flight" in message
        assert "Tried to allocate" in message

    def test_the_last_slot_says_that_there_is_no_room(self, ring, device_memory):
        from ota_kernels.backends.triton.device import DeviceMemoryError

        device_memory[0] = 4 << 20
        with pytest.raises(DeviceMemoryError, match=r"34.00 MiB") as caught:
            ring.run(lambda slot: slot.load(random_bytes(5, 5 << 20)))
        assert caught.value.__context__ is None  # it would hold the failed attempt's memory
        assert ring.run(lambda slot: slot.fetch(slot.load(random_bytes(5, 9))))[0].size == 9


class Driver:
    """A made-up GPU whose copies happen only when the host waits for their stream. waiting: copies that are
    under way; locked: page-locked ranges, by address; code: what page-locking answers."""

    def __init__(self, monkeypatch) -> None:
        self.waiting, self.locked, self.code = [], {}, 0
        self._stream = self._device = None
        self._copy, self._empty = torch.Tensor.copy_, torch.empty
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "Event", self._event)
        monkeypatch.setattr(torch.cuda, "stream", self._entered)
        monkeypatch.setattr(torch.cuda, "device", self._current)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.Tensor, "copy_", lambda *given, **options: self._later(*given, **options))
        monkeypatch.setattr(torch, "empty", self._on_host)
        monkeypatch.setattr(torch, "zeros", self._on_host)

    @contextlib.contextmanager
    def _entered(self, stream):
        self._stream = stream
        yield
        self._stream = None

    @contextlib.contextmanager
    def _current(self, device):
        self._device = device
        yield
        self._device = None

    def _later(self, to, source, non_blocking=False):
        assert self._stream is self
        assert non_blocking
        self.waiting.append((to, source))
        return to

    def _on_host(self, n, dtype=torch.uint8, device=None):
        assert self._stream is self
        return self._empty(n, dtype=dtype).fill_(0xEE)

    def _event(self, blocking):
        assert blocking  # a waiting thread leaves its processor to others
        return self

    def record(self, stream):
        assert stream is self

    def synchronize(self):
        for to, source in self.waiting:
            self._copy(to, source)
        self.waiting.clear()

    def cudaHostRegister(self, address, size, flags):  # noqa: N802 (CUDA's name)
        if not self.code:
            self.locked[address] = size
        return self.code

    def cudaHostUnregister(self, address):  # noqa: N802
        assert not self.waiting
        assert self._device == torch.device("cuda:0")
        return 0 if self.locked.pop(address) else 1


class TestStreams:
    @pytest.fixture
    def driver(self, monkeypatch):
        return Driver(monkeypatch)

    @pytest.fixture
    def ring(self, driver):
        from ota_kernels.backends.triton.ring import Ring

        return Ring(torch.device("cuda:0"), most=1)

    def test_nothing_is_read_before_it_is_there(self, driver, ring):
        """Bytes go to the device and back, tile after tile through one slot that grows."""
        for seed, size in enumerate((70_000, 5 << 20, 1000)):
            arrays = random_bytes(seed, size, 3, 700)

            def work(slot, arrays=arrays):
                loaded = slot.load(arrays)
                assert driver.waiting  # the copy is under way
                return slot.fetch(loaded)

            assert [a.tobytes() for a in ring.run(work)] == [a.tobytes() for a in arrays]
            assert driver.waiting == []

    def test_memory_is_page_locked_while_it_is_in_use(self, driver, ring):
        sizes = []
        for size in (1000, 5 << 20):
            ring.run(lambda slot, size=size: (slot.load(random_bytes(1, size)), sizes.append(slot.nbytes)))
            assert list(driver.locked.values()) == sizes[-1:]
        ring.release()
        assert driver.locked == {}

    def test_a_failed_tile_leaves_no_copy_under_way(self, driver, ring):
        with pytest.raises(ZeroDivisionError):
            ring.run(lambda slot: (slot.load(random_bytes(1, 9)), 1 / 0))
        assert driver.waiting == []
        assert driver.locked == {}

    def test_memory_that_cannot_be_locked_is_used_as_it_is(self, driver, ring, caplog):
        driver.code = 801
        arrays = random_bytes(1, 1000)
        found = ring.run(lambda slot: slot.fetch(slot.load(arrays)))
        assert found[0].tobytes() == arrays[0].tobytes()
        assert "cannot be page-locked (CUDA error 801)" in caplog.text
        ring.release()


class Kernel:
    """Stands for a kernel that takes a while to compile. most: threads that were in it at once."""

    def __init__(self) -> None:
        self.inside, self.most, self.launched = 0, 0, []

    def __getitem__(self, grid):
        def run(number, **constants):
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(0.002)
            self.inside -= 1
            self.launched.append((grid, number, constants))

        return run


def test_threads_launch_one_at_a_time():
    """Triton shows a kernel to other threads before it is loaded."""
    from ota_kernels.backends.triton.table import launch

    kernel = Kernel()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: launch(kernel, (7,), number, num_warps=4), range(20)))
    assert kernel.most == 1
    assert sorted(kernel.launched) == [((7,), number, {"num_warps": 4}) for number in range(20)]
