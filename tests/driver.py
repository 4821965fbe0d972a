"""`ota-merge` as a process of its own, in small tiles and lots that take a moment: what tests kill and stop.

Before each tile it writes "." to the descriptor TOLD, where one is given, before each patch ","; then it
waits PAUSE seconds. Ranks give signs of life often. `jobs.launch` starts it.
"""

from __future__ import annotations

import functools
import os
import signal
import time

import jobs

from ota_kernels import cli
from ota_kernels.run import job, ranks, shares
from ota_kernels.run.rules import Rules

TILE = 1500
# What it merges: many tiles of one tensor, tensors of several tiles each, and tensors that share a unit.
SHAPES = {
    "embed": (300, 40),
    **{f"layers.{i}.weight": (50, 60) for i in range(12)},
    **{f"layers.{i}.bias": (60,) for i in range(12)},
    "scale": (),
    "empty": (0, 3),
}


def before(step, segment):
    if step in ("tile", "patch"):
        if os.environ["TOLD"]:
            os.write(int(os.environ["TOLD"]), b"." if step == "tile" else b",")
        time.sleep(float(os.environ["PAUSE"]))


if __name__ == "__main__":
    # Where a shell has started the tests in the background, processes ignore Ctrl-C unless they say so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    shares._LEAST_LOT = 1
    ranks.Several = functools.partial(ranks.Several, beat=0.2, lost=2.0)
    job.merge = functools.partial(jobs.merge, rules=Rules(before=before), tile_elements=TILE)
    cli.main()
