from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest

from anemoi_dist.config.batch import BatchPlan
from anemoi_dist.config.compose import compose
from anemoi_dist.config.schema import LAUNCHER_KINDS
from anemoi_dist.errors import ConfigError
from anemoi_dist.launch.launchers import machine
from anemoi_dist.launch.launchers.base import Machine, launcher, plan
from anemoi_dist.run.directory import RunDirectory

HERE = Machine(num_gpus=0, environ={"HOME": "/h", "OMP_NUM_THREADS": "8"}, python="/env/bin/python")
RUN = RunDirectory(Path("/runs/it's; one"))


def planned(*overrides: str, on: Machine = HERE):
    return plan(compose(["run.id=r", "training.global_batch_size=16", *overrides]).config, RUN, on)


@pytest.mark.parametrize("kind", LAUNCHER_KINDS)
def test_every_kind_is_a_module_that_plans(kind):
    assert callable(launcher(kind).plan)


def test_a_local_plan():
    found = planned(on=dataclasses.replace(HERE, num_gpus=4))
    assert (found.kind, found.nodes, found.ranks_per_node, found.world_size) == ("local", 1, 4, 4)
    assert found.batches == BatchPlan(global_size=16, micro_size=4, accumulation=1, world_size=4)
    assert found.command[:3] == ("/env/bin/python", "-m", "anemoi_dist.launch.job.agent")
    assert "--nproc-per-node=4" in found.command
    assert found.command[-2:] == ("--run-directory", str(RUN.path))
    assert "OMP_NUM_THREADS" not in found.environment, "the user's stands"
    assert found.environment["PYTHONUNBUFFERED"] == "1"
    assert found.script is None
    assert planned().ranks_per_node == 2, "without a GPU"
    assert planned("launcher.ranks=1", on=dataclasses.replace(HERE, num_gpus=4)).ranks_per_node == 1


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="multiple of the 3 ranks"):
        planned("launcher.ranks=3")


def test_the_command_survives_a_shell():
    found = planned()
    words = shlex.split(found.shell())
    assert tuple(words[-len(found.command) :]) == found.command
    assert words[: -len(found.command)] == [f"{name}={value}" for name, value in found.environment.items()]


def test_looking_at_this_machine(monkeypatch):
    monkeypatch.setattr(machine, "count_gpus", lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    seen = machine.detect_machine()
    assert seen.num_gpus == 3
    assert seen.environ["OMP_NUM_THREADS"] == "5"
    assert Path(seen.python).is_file()
