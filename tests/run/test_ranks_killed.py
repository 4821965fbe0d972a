"""Processes that are killed, on one and on several ranks; by torchrun, and as torchrun starts them.

OTA_KILLS=50 kills so many times for each way of deciding (some minutes); without it, once each.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jobs
import pytest
from checkpoints import make_set, model_digests, write_recipe
from jobs import merge

KILLS = int(os.environ.get("OTA_KILLS", 0))
TILE = 1500
SHAPES = {
    "embed": (300, 40),
    **{f"layers.{i}.weight": (50, 60) for i in range(12)},
    "norm": (60,),
    "empty": (0, 3),
}
VARIANTS = {
    "model density": ("ota", {"density": 0.3, "normalise": "model"}),
    "tensor mass": ("ota", {"saliency_mass": 0.8, "density_scope": "tensor"}),
    "threshold": ("ota", {"precond_threshold": 2e-16}),
    "by chance": ("dare_ties", {"density": 0.4, "weight": 1.0}),
    "exactly k": ("ties", {"density": 0.3, "weight": 1.0}),
}

# The real command, cut into small tiles and lots, each of which takes a moment.
DRIVER = f"""
import functools, os, time
import jobs
from ota_kernels import cli
from ota_kernels.run import job, ranks, shares
from ota_kernels.run.rules import Rules

shares._LEAST_LOT = 1
ranks.Several = functools.partial(ranks.Several, beat=0.2, lost=2.0)
pause = float(os.environ.get("PAUSE", 0))

def before(step, segment):
    if step in ("tile", "patch"):
        os.write(1, b".")
        time.sleep(pause)

job.merge = functools.partial(jobs.merge, rules=Rules(before=before), tile_elements={TILE})
cli.main()
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("models"), SHAPES)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    path = tmp_path_factory.mktemp("driver") / "driver.py"
    path.write_text(DRIVER)
    return path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Started:
    """Processes of one merge, as torchrun starts them."""

    def __init__(self, driver, count, arguments, pause=0.0):
        paths = {"PYTHONPATH": str(Path(jobs.__file__).parent), "PAUSE": str(pause)}
        several = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.all = [
            subprocess.Popen(
                [sys.executable, driver, "run", *map(str, arguments), "-q", "--threads", "1"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=os.environ | paths | (several | {"RANK": str(rank)} if count > 1 else {}),
            )
            for rank in range(count)
        ]

    def end(self):
        """Exit codes, and all that was said."""
        outputs = [process.communicate(timeout=100) for process in self.all]
        return [process.returncode for process in self.all], b"".join(e for _, e in outputs).decode()

    def kill(self):
        for process in self.all:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS if KILLS else ["model density"])
def test_resumed_until_done_gives_the_same_bytes(models, tmp_path, driver, variant, ranks):
    method, parameters = VARIANTS[variant]
    recipe, out = (
        write_recipe(tmp_path / "recipe.yaml", models.recipe(method, **parameters)),
        tmp_path / "out",
    )
    merge(recipe, tmp_path / "expected", shard_size=20_000)
    arguments = (recipe, out, "--resume", "--shard-size", "20kB", "--candidates-memory", "0")
    dice, kills = random.Random(f"{variant} {ranks}"), KILLS or 1
    for _ in range(kills):
        # As many as before, or others: any number goes on.
        started = Started(driver, dice.choice([1, ranks]) if kills > 1 else ranks, arguments, pause=0.02)
        try:
            started.all[-1].stdout.read(dice.randint(1, 4))
            time.sleep(dice.uniform(0, 0.1))
            begun = time.monotonic()
            victim = dice.choice(started.all[1:] or started.all)
            victim.kill()
            codes, said = started.end()
            assert time.monotonic() - begun < 60
            if codes[0] == 0:  # it was done, all but for its last breath
                break
            assert codes[started.all.index(victim)] == -signal.SIGKILL
            if len(codes) > 1:
                assert set(codes) == {1, -signal.SIGKILL}
                line = said
                assert len(said.splitlines()) == 1, said
                assert "--resume goes on, with any number of processes" in line
            assert not out.exists()
        finally:
            started.kill()
    codes, said = Started(driver, ranks, arguments).end()
    assert (set(codes), said) == ({0}, "")
    assert model_digests(out) == model_digests(tmp_path / "expected")
    assert sorted(os.listdir(tmp_path)) == ["expected", "out", "recipe.yaml"]


def test_torchrun(models, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", models.recipe(density=0.3))
    merge(recipe, tmp_path / "expected")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ota_kernels"]
    done = subprocess.run(
        [*command, "run", recipe, tmp_path / "out"], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.count("merged into") == 1
    assert model_digests(tmp_path / "out") == model_digests(tmp_path / "expected")
