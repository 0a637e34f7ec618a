"""Pools of gloo ranks and a SLURM cluster, shared by all tests that need them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings
from support.minislurm import MiniSlurm, missing_programs
from support.ranks import RankPool
from support.recorded import fill

from anemoi_dist.run.directory import RunDirectory

# How long an example takes says something about what else the machine does.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """Return ``ranks(n)``: a running pool of n ranks, started when first asked for."""
    pools: dict[int, RankPool] = {}

    def get(num_ranks: int) -> RankPool:
        if num_ranks not in pools or not pools[num_ranks].is_alive:
            pools[num_ranks] = RankPool(num_ranks)
        return pools[num_ranks]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def cluster() -> Iterator[MiniSlurm]:
    """Return a running SLURM cluster of four nodes with two pretended GPUs each."""
    if missing := missing_programs():
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge")
    folder = Path(tempfile.mkdtemp(prefix="minislurm-", dir="/tmp"))  # pytest's own are too long for a socket
    cluster = MiniSlurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        assert not cluster.processes(), "the cluster left processes behind"
        shutil.rmtree(folder)


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "default-1")
    run.create()
    return run


@pytest.fixture
def finished_run(run):
    fill(run)
    return run
