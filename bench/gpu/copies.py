"""The yardstick: a copy of the bytes that a case moves, half of them read and half of them written. Beside it
a reader, as nine tenths of a merge's bytes are read, and the bus, which files have to cross."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl

from .timing import Bench, Call, Case

_BUS_BYTES = 1 << 28
_BLOCK, _WARPS = 4096, 8  # four 16-byte loads of each thread in flight


@triton.jit
def _copy_kernel(source, target, block_size: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * block_size + tl.arange(0, block_size)
    tl.store(target + place, tl.load(source + place))


def _triton_copy(target: torch.Tensor, source: torch.Tensor) -> None:
    _copy_kernel[(source.numel() // _BLOCK,)](source, target, _BLOCK, num_warps=_WARPS)


def cases(bench: Bench) -> Iterator[Case]:
    """Two ways to copy; the better one is the yardstick."""
    words = max(1, bench.size // (2 * 4 * _BLOCK)) * _BLOCK
    ways = {"copy-torch": torch.Tensor.copy_, "copy-triton": _triton_copy}
    for name, way in ways.items():
        yield Case(name, 2 * 4 * words, partial(_prepare, bench, words, way))


def other_cases(bench: Bench) -> Iterator[Case]:
    """What else bytes can do; none of it is the yardstick."""
    words = max(1, bench.size // (4 * _BLOCK)) * _BLOCK
    yield Case("read", 4 * words, partial(_prepare_read, bench, words))
    words = min(words, _BUS_BYTES // 4)
    yield Case("bus-to-device", 4 * words, partial(_prepare_bus, bench, words, True))
    yield Case("bus-from-device", 4 * words, partial(_prepare_bus, bench, words, False))


def _prepare_read(bench: Bench, words: int) -> Sequence[Call]:
    return [
        torch.ones(words, dtype=torch.float32, device=bench.device).sum for _ in range(bench.sets(4 * words))
    ]


def _prepare_bus(bench: Bench, words: int, to_device: bool) -> Sequence[Call]:
    on_gpu = bench.device.type == "cuda"
    host = torch.arange(words, dtype=torch.int32, pin_memory=on_gpu)
    device = torch.zeros(words, dtype=torch.int32, device=bench.device)
    target, source = (device, host) if to_device else (host, device.copy_(host))
    call = partial(target.copy_, source, non_blocking=True)
    call()
    if on_gpu:
        torch.cuda.synchronize()
    if not torch.equal(target.cpu(), source.cpu()):
        raise AssertionError("the copy differs")
    return [call]


def _prepare(bench: Bench, words: int, way: Callable[[torch.Tensor, torch.Tensor], object]) -> Sequence[Call]:
    draw = torch.Generator(bench.device).manual_seed(0)
    calls = []
    for _ in range(bench.sets(2 * 4 * words)):
        source = torch.randint(
            -(1 << 31), 1 << 31, (words,), generator=draw, device=bench.device, dtype=torch.int32
        )
        target = torch.empty_like(source).fill_(-1)
        way(target, source)
        if not torch.equal(source, target):
            raise AssertionError("the copy differs")
        calls.append(partial(way, target, source))
    return calls
