"""Processes that are killed, on one and on several ranks; by torchrun, and as torchrun starts them.

OTA_KILLS=50 kills so many times for each way of deciding (some minutes); without it, once each.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from checkpoints import model_digests, write_recipe
from jobs import merge

KILLS = int(os.environ.get("OTA_KILLS", 0))
VARIANTS = {
    "model density": ("ota", {"density": 0.3, "normalise": "model"}),
    "tensor mass": ("ota", {"saliency_mass": 0.8, "density_scope": "tensor"}),
    "threshold": ("ota", {"precond_threshold": 2e-16}),
    "by chance": ("dare_ties", {"density": 0.4, "weight": 1.0}),
    "exactly k": ("ties", {"density": 0.3, "weight": 1.0}),
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Started:
    """Processes of one merge, as torchrun starts them."""

    def __init__(self, start, count, arguments, pause=0.0):
        several = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environments = [several | {"RANK": str(rank)} if count > 1 else {} for rank in range(count)]
        arguments = [*arguments, "-q", "--threads", "1"]
        self.all = [start(*arguments, pause=pause, env=env) for env in environments]

    def end(self):
        """Exit codes, and all that was said."""
        outputs = [process.communicate(timeout=100) for process in self.all]
        return [process.returncode for process in self.all], b"".join(e for _, e in outputs).decode()


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS if KILLS else ["model density"])
def test_resumed_until_done_gives_the_same_bytes(models, tmp_path, start, variant, ranks):
    method, parameters = VARIANTS[variant]
    recipe = write_recipe(tmp_path / "recipe.yaml", models.recipe(method, **parameters))
    out, expected = tmp_path / "out", tmp_path / "expected"
    merge(recipe, expected, shard_size=20_000)
    arguments = (recipe, out, "--resume", "--shard-size", "20kB", "--candidates-memory", "0")
    dice, kills = random.Random(f"{variant} {ranks}"), 0

    def ended_well(codes, said):
        assert (set(codes), said) == ({0}, "")
        assert model_digests(out) == model_digests(expected)
        assert sorted(os.listdir(tmp_path)) == ["expected", "out", "recipe.yaml"]

    while kills < (KILLS or 1):
        # As many as before, or others: any number goes on.
        started = Started(start, dice.choice([1, ranks]) if KILLS else ranks, arguments, pause=0.02)
        started.all[-1].stdout.read(dice.randint(1, 4))
        time.sleep(dice.uniform(0, 0.1))
        begun = time.monotonic()
        victim = dice.choice(started.all[1:] or started.all)
        victim.kill()
        codes, said = started.end()
        assert time.monotonic() - begun < 60
        killed = codes[started.all.index(victim)] == -signal.SIGKILL
        kills += killed
        if out.exists():  # it was done, all but for clearing up
            ended_well(*Started(start, ranks, arguments).end())
            shutil.rmtree(out)
            continue
        assert killed
        if len(codes) > 1:
            assert set(codes) == {1, -signal.SIGKILL}
            assert len(said.splitlines()) == 1, said
            assert "--resume goes on, with any number of processes" in said
    ended_well(*Started(start, ranks, arguments).end())


def test_torchrun(models, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", models.recipe(density=0.3))
    merge(recipe, tmp_path / "expected")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ota_kernels"]
    done = subprocess.run(
        [*command, "run", recipe, tmp_path / "out"], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.count("merged into") == 1
    assert model_digests(tmp_path / "out") == model_digests(tmp_path / "expected")
