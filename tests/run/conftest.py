"""What tests of merges that end on the way share."""

from __future__ import annotations

import jobs
import pytest
from checkpoints import make_set
from driver import SHAPES


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("models"), SHAPES)


@pytest.fixture
def start():
    """`jobs.launch`; what still runs is killed at the end."""
    processes = []

    def start(*arguments, **options):
        processes.append(jobs.launch(*arguments, **options))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()
