"""Pools of gloo ranks and a SLURM cluster, shared by all tests that need them."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings
from support.hydra_cache import use_hydra_cache
from support.minislurm import MiniSlurm, missing_programs
from support.ranks import RankPool
from support.recorded import fill
from support.warm import WarmInterpreter

from anemoi_dist.process.output import LOSSES
from anemoi_dist.run.directory import RunDirectory

# How long an example takes says something about what else the machine does.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
use_hydra_cache()

#: Tests with one of these fixtures run in one worker of pytest-xdist: there is one cluster, and one pool of each size.
#: The groups are started first, in this order: the others fill what time the workers have beside and after them.
SHARED = {"cluster": "slurm", "ranks": "ranks"}


@pytest.hookimpl(wrapper=True)  # before pytest-xdist, which reads the groups in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    if hasattr(config, "workerinput"):
        group_and_sort(items)
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_warning_recorded(warning_message: warnings.WarningMessage) -> None:
    # pytest-xdist imports the module of a warning where it collects results; Lightning's cannot always be imported.
    if warning_message.category.__module__ != "builtins":
        warning_message.message = UserWarning(str(warning_message.message))
        warning_message.category = UserWarning


def group_and_sort(items: list[pytest.Item]) -> None:
    groups = {item: group_of(item) for item in items}
    for item, group in groups.items():
        if group:
            item.add_marker(pytest.mark.xdist_group(group))
    order = [*SHARED.values()]
    items.sort(key=lambda item: order.index(groups[item]) if groups[item] in order else len(order) + (not groups[item]))


def group_of(item: pytest.Item) -> str | None:
    """Return what a test shares with others: a fixture of the session, or its file where the file has fixtures."""
    for fixture, group in SHARED.items():
        if fixture in item.fixturenames:
            return group
    definitions = item._fixtureinfo.name2fixturedefs.values()
    is_shared = any(
        each[-1].scope in ("module", "package") and each[-1].baseid == item.parent.nodeid for each in definitions
    )
    return item.location[0] if is_shared else None


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
def warm() -> Iterator[WarmInterpreter]:
    """Return what runs scripts in processes of their own that need not import torch again."""
    interpreter = WarmInterpreter()
    yield interpreter
    interpreter.close()


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


@pytest.fixture(autouse=True)
def _no_losses() -> None:
    """Forget what earlier tests of this process could not write: their losses would become events of this one."""
    LOSSES.take(failing=True)
    LOSSES._failing.clear()


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "default-1")
    run.create()
    return run


@pytest.fixture
def finished_run(run):
    fill(run)
    return run
