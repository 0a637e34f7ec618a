"""Ranks of torchrun, MPI and SLURM find each other; what cannot be true is said."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anemoi_dist.distributed import rendezvous
from anemoi_dist.distributed.rendezvous import Place, meet, own_address, slurm_place, starter, step_key
from anemoi_dist.errors import PreflightError
from anemoi_dist.run.directory import RunDirectory

TASK = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
OMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "4"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "environment"),
        (OMPI, "mpi"),
        (HYDRA, "mpi"),
        (TASK, "slurm"),
        # A batch script, and the shell of salloc: the job's numbers, but one process.
        ({name: value for name, value in TASK.items() if name != "SLURM_STEP_ID"}, None),
        # One torchrun a node below srun, mpirun below srun, and srun that sets PMI's numbers itself.
        ({**TASK, "RANK": "5", "WORLD_SIZE": "16", "TORCHELASTIC_RUN_ID": "x"}, "environment"),
        ({**TASK, "RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, "environment"),
        ({**TASK, **OMPI}, "mpi"),
        ({**TASK, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}, "mpi"),
        ({**TASK, **HYDRA}, "mpi"),
        ({**TASK, "PMI_RANK": "0", "PMI_SIZE": "4"}, "slurm"),
        # Numbers that a wrapper has copied.
        ({**OMPI, "RANK": "1", "WORLD_SIZE": "4"}, "environment"),
    ],
)
def test_what_started_this_rank(environ, expected):
    assert starter(environ) == expected


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one'"),
        (
            {**OMPI, "RANK": "0", "WORLD_SIZE": "1"},
            "mpirun started this process as rank 1 of 4.*RANK=0 and WORLD_SIZE=1",
        ),
        ({**OMPI, "RANK": "0", "WORLD_SIZE": "4"}, "unset RANK"),
        ({**TASK, "RANK": "0"}, "srun started this process as rank 0 of 4"),
        ({**TASK, "SLURM_PROCID": ""}, "SLURM_PROCID=''"),
    ],
)
def test_numbers_that_contradict_each_other(environ, said):
    with pytest.raises(PreflightError, match=said):
        starter(environ)


@pytest.mark.parametrize(
    ("node", "tasks", "expected"), [("0", "2(x2)", 2), ("1", "2(x2)", 2), ("2", "4,1(x2),3", 1), ("3", "4,1(x2),3", 3)]
)
def test_ranks_on_a_node_of_slurm(node, tasks, expected):
    environ = {**TASK, "SLURM_NODEID": node, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_STEP_NUM_TASKS": "9"}
    assert slurm_place(environ) == Place(0, 9, 0, expected)


@pytest.mark.parametrize(
    "change", [{"SLURM_PROCID": "4"}, {"SLURM_LOCALID": "2"}, {"SLURM_NODEID": "2"}, {"SLURM_STEP_TASKS_PER_NODE": "8"}]
)
def test_a_task_that_cannot_be(change):
    with pytest.raises(PreflightError):
        slurm_place({**TASK, **change})


def test_every_start_has_a_name_of_its_own():
    starts = [
        TASK,
        {**TASK, "SLURM_STEP_ID": "3"},
        {**TASK, "SLURM_RESTART_COUNT": "1"},
        {**TASK, "SLURM_JOB_ID": "72"},
    ]
    keys = [step_key(start) for start in [*starts, {**TASK, "SLURM_CLUSTER_NAME": "../b"}]]
    assert len(set(keys)) == 5 and not any("/" in key for key in keys)


def test_tasks_without_a_run_directory_say_what_to_do():
    with pytest.raises(PreflightError, match="--run-directory, or set MASTER_ADDR and MASTER_PORT"):
        rendezvous._meet_by_file(None, dict(TASK))


def test_an_address_that_is_told_is_kept():
    environ = {**TASK, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29400"}
    rendezvous._meet_by_file(None, environ)
    kept = {name: environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    assert kept == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("node1", "29400")
    assert "TORCHELASTIC_USE_AGENT_STORE" not in environ


def test_torchruns_environment_is_left_alone():
    environ = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    before = dict(environ)
    assert not meet(None, environ).kills_others
    assert environ == before


def test_the_port_is_bound_before_it_is_told(tmp_path: Path):
    run = RunDirectory(tmp_path)
    run.create()
    one_node = {**TASK, "SLURM_STEP_TASKS_PER_NODE": "4"}
    environ = dict(one_node)
    meeting = rendezvous._meet_by_file(tmp_path, environ)
    told = json.loads(run.rendezvous_file(step_key(one_node)).read_text())
    assert (told["host"], str(told["port"])) == ("127.0.0.1", environ["MASTER_PORT"])
    with socket.create_connection(("127.0.0.1", told["port"]), timeout=5):
        pass
    other = socket.socket()
    with pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", told["port"]))
    other.close()
    late = {**one_node, "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    rendezvous._meet_by_file(tmp_path, late)
    assert late["MASTER_PORT"] == environ["MASTER_PORT"]
    with meeting:
        pass
    assert not list(run.control_dir.iterdir())


def test_a_stale_word_of_rank_0_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = RunDirectory(tmp_path)
    run.create()
    run.rendezvous_file(step_key(TASK)).write_text(json.dumps({"host": "127.0.0.1", "port": 1}))
    monkeypatch.setattr(rendezvous, "WAIT_S", 0.3)
    again = {**TASK, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_RESTART_COUNT": "1"}
    with pytest.raises(PreflightError, match="rank 0 has not said"):
        rendezvous._meet_by_file(tmp_path, again)


def test_the_address_of_an_interface():
    assert own_address({"GLOO_SOCKET_IFNAME": "lo"}) == "127.0.0.1"
    assert own_address({"NCCL_SOCKET_IFNAME": "=lo,eth9"}) == "127.0.0.1"
    with pytest.raises(PreflightError, match=r"must name one of: .*lo"):
        own_address({"GLOO_SOCKET_IFNAME": "no-such-if"})
    own = own_address({})
    with socket.socket() as probe:
        probe.bind((own, 0))


def test_an_address_that_is_not_here_is_a_preflight_error():
    with pytest.raises(PreflightError, match=r"cannot listen on 192\.0\.2\.1.*GLOO_SOCKET_IFNAME"):
        rendezvous._listen_as_main(Place(0, 4, 0, 2), {"MASTER_ADDR": "192.0.2.1"})


JOIN = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from anemoi_dist.distributed.rendezvous import meet
from anemoi_dist.distributed.world import World
meeting = meet(Path(sys.argv[1]))  # named: it holds the store, which the others need after rank 0 has joined
with meeting:
    world = World.join(timeout_s=60)
value = torch.tensor([float(world.rank)])
dist.all_reduce(value)
assert value.item() == 6 and world.world_size == 4, value
print(world.rank, world.local_rank, flush=True)
world.leave()
"""


def test_four_tasks_on_two_nodes_join(tmp_path: Path):
    run = RunDirectory(tmp_path)
    run.create()
    tasks = []
    for rank in (3, 2, 1, 0):  # rank 0 last: the others wait for it
        place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2), "SLURM_NODEID": str(rank // 2)}
        environ = {**os.environ, **TASK, **place, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", JOIN, str(tmp_path)]
        tasks.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        time.sleep(0.05)
    ended = [task.communicate(timeout=90) for task in tasks]
    assert [task.returncode for task in tasks] == [0] * 4, ended
    assert sorted(output for output, _ in ended) == ["0 0\n", "1 1\n", "2 0\n", "3 1\n"]
    assert not list(run.control_dir.iterdir())
