"""Options that several commands share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import click

from ..errors import RecipeError
from . import remarks


class Size(click.ParamType):
    """A number of bytes: 5GB, 512MiB, 1000000."""

    name = "size"

    def __init__(self, least: int = 1) -> None:
        self._least = least

    def convert(self, value, param, ctx) -> int:
        from ..sizes import parse_size

        try:
            return parse_size(value, self._least)
        except RecipeError as error:
            self.fail(str(error), param, ctx)


class Share(click.ParamType):
    """A share of a whole: 1%, 0.01."""

    name = "share"

    def convert(self, value, param, ctx) -> float:
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 < share <= 1:
            self.fail(f"{text!r} is no share of a whole: write 1% or 0.01", param, ctx)
        return share


class Device(click.ParamType):
    """auto, cpu, cuda, cuda:N, or several: cuda:0,2."""

    name = "device"

    def convert(self, value, param, ctx) -> str:
        from ..backends import check_device

        try:
            check_device(value)
        except RecipeError as error:
            self.fail(str(error), param, ctx)
        return value


def _set_verbosity(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        remarks.release()
        logging.basicConfig(format="%(message)s")
        logging.getLogger("ota_kernels").setLevel(logging.INFO)


_BACKEND = click.option(
    "--backend",
    type=click.Choice(["auto", "triton", "native", "reference"]),
    default="auto",
    show_default=True,
    help="What computes: GPU kernels (triton), C++ kernels (native), plain torch (reference), or the fastest "
    "that runs here.",
)
_DEVICE = click.option(
    "--device",
    type=Device(),
    default="auto",
    show_default=True,
    help="Where to compute: cpu, cuda (also of AMD; `run` takes all GPUs), cuda:1, cuda:0,2; auto: a GPU if "
    "there is one.",
)
_MEMORY_LIMIT = click.option(
    "--memory-limit",
    type=Size(),
    help="Resident memory at most, beside the driver of a GPU.  [default: 1GiB; on a GPU 4GiB]",
)
_THREADS = click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Worker threads; three at least on a GPU.  [default: every processor]",
)
_VERBOSE = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_set_verbosity,
    help="Say which backend runs, and why not another; show a traceback with an error.",
)
_CANDIDATES_MEMORY = click.option(
    "--candidates-memory",
    type=Size(least=0),
    default="256MiB",
    show_default=True,
    help="Of elements that wait for exact thresholds; beyond it they go to the work folder.",
)
_SEED = click.option(
    "--seed", type=int, default=0, show_default=True, help="Of methods that draw random numbers."
)
_READING = (_BACKEND, _DEVICE, _MEMORY_LIMIT, _THREADS, _VERBOSE)
_MERGING_FILES = (_BACKEND, _DEVICE, _MEMORY_LIMIT, _CANDIDATES_MEMORY, _THREADS, _SEED, _VERBOSE)
_MERGING = (
    _BACKEND,
    _DEVICE,
    _MEMORY_LIMIT,
    _CANDIDATES_MEMORY,
    _THREADS,
    click.option(
        "--shard-size",
        type=Size(),
        default="5GB",
        show_default=True,
        help="Bytes of one output file at most.",
    ),
    click.option(
        "--allow-crimes",
        is_flag=True,
        help="Merge models that differ in tensors, configurations or vocabularies, and say what differs.",
    ),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Copy Python files that the model loads its classes from; none is run.",
    ),
    _SEED,
    click.option(
        "--unsafe-truncate-embeddings",
        is_flag=True,
        help="Cut vocabularies of unlike sizes to the smallest; tokens beyond it are lost.",
    ),
    _VERBOSE,
)


def _add(options: Iterable[Callable]) -> Callable[[Callable], Callable]:
    def decorate(command: Callable) -> Callable:
        for option in reversed(tuple(options)):
            command = option(command)
        return command

    return decorate


reading = _add(_READING)  # the options of a command that reads all inputs
merging = _add(_MERGING)  # those of `job.Options` that both `run` and `plan` take
merging_files = _add(_MERGING_FILES)  # and those of `files`
