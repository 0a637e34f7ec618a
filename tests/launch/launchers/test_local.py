from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.many_runs import read_state

from anemoi_dist.config.compose import compose
from anemoi_dist.errors import ConfigError
from anemoi_dist.launch.launchers import local
from anemoi_dist.launch.launchers.base import Machine
from anemoi_dist.launch.status import journal
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.prepare import prepare_run

FAKE = Path(__file__).with_name("fake_train.py")


@pytest.fixture(scope="module")
def config():
    return compose(["run.id=r", "launcher.ranks=2"]).config


@pytest.fixture
def run(tmp_path, config) -> RunDirectory:
    run = RunDirectory.locate(tmp_path, "r")
    run.create()
    return run


# Pure parts


def test_the_command():
    run = RunDirectory(Path("/runs/first one"))
    assert local.torchrun_command(run, 4) == [
        sys.executable,
        "-m",
        "anemoi_dist.launch.job.agent",
        "--nnodes=1",
        "--nproc-per-node=4",
        "--rdzv-backend=anemoi-dist",
        "--rdzv-endpoint=127.0.0.1",
        "--local-addr=127.0.0.1",
        "--max-restarts=0",
        "-m",
        "anemoi_dist.train",
        "--run-directory",
        "/runs/first one",
    ]


def test_the_environment_keeps_what_the_user_set():
    environment = local.rank_environment({"OMP_NUM_THREADS": "8", "HOME": "/h"})
    assert environment["OMP_NUM_THREADS"] == "8"
    assert environment["HOME"] == "/h"
    assert environment["PYTHONUNBUFFERED"] == "1"
    assert local.rank_environment({})["OMP_NUM_THREADS"] == "1"


def tool(directory: Path, script: str) -> str:
    directory.mkdir(exist_ok=True)
    path = directory / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(directory)


FOUR = "for i in 0 1 2 3; do echo \"GPU $i: H100 (UUID: GPU-$i)\"; echo '  MIG 1g.10gb'; done"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, 4), ("", 0), ("-1", 0), ("0", 1), ("0,2", 2), ("0, 1,-1,2", 2), ("GPU-1,GPU-2", 2)],
)
def test_gpus_are_those_that_are_visible(tmp_path, visible, expected):
    environ = {"PATH": tool(tmp_path / "bin", FOUR)} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert local.count_gpus(environ, proc=tmp_path / "none") == expected


def test_gpus_without_the_tool_or_without_a_driver(tmp_path):
    proc = tmp_path / "gpus"
    assert local.count_gpus({"PATH": ""}, proc=proc) == 0
    (proc / "0000:01:00.0").mkdir(parents=True)
    assert local.count_gpus({"PATH": ""}, proc=proc) == 1
    broken = {"PATH": tool(tmp_path / "broken", "echo 'no driver'; exit 9"), "CUDA_VISIBLE_DEVICES": "0,1"}
    assert local.count_gpus(broken, proc=proc) == 0


def num_ranks(config, environ: dict[str, str]) -> int:
    here = Machine(num_gpus=local.count_gpus(environ), environ=environ, python="python")
    return local.plan(config, RunDirectory(Path("/runs/x")), here).ranks_per_node


def test_number_of_ranks(tmp_path):
    gpus = {"PATH": tool(tmp_path / "bin", FOUR)}
    without = {"PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    composed = compose(["training.global_batch_size=12"]).config
    assert num_ranks(composed, gpus) == 4
    assert num_ranks(composed, without) == 2
    composed.launcher.ranks = 3
    assert num_ranks(composed, gpus) == 3
    composed.launcher.ranks = 5
    with pytest.raises(ConfigError, match="multiple of the 5 ranks"):
        num_ranks(composed, gpus)


# With torchrun, and a worker that ends as it is told


def start(run: RunDirectory, how: str, *, restarts: int = 0) -> subprocess.Popen[str]:
    """Run local.train in a process of its own, the worker replaced by the fake."""
    code = f"""
import sys
from pathlib import Path
from anemoi_dist.config.compose import compose
from anemoi_dist.launch.launchers import local
from anemoi_dist.run.directory import RunDirectory
real = local.torchrun_command
local.torchrun_command = lambda *given: [*real(*given)[:-4], {str(FAKE)!r}, *real(*given)[-2:]]
config = compose(["launcher.max_restarts={restarts}", "launcher.backoff_s=0.1"]).config
code = local.train(RunDirectory(Path({str(run.path)!r})), config, num_ranks=2)
assert "torch" not in sys.modules
sys.exit(code)
"""
    environment = {**os.environ, "FAKE": how}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str], *, within_s: float = 300) -> tuple[int, str]:
    try:
        _, errors = process.communicate(timeout=within_s)
    finally:
        process.kill()
    return process.returncode, errors


def ready(run: RunDirectory, process: subprocess.Popen[str]) -> None:
    for _ in range(6000):
        if all((run.path / f"ready-{rank}").exists() for rank in range(2)):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("the ranks did not start")


def alive(marker: str) -> list[int]:
    """Return processes whose command line has ``marker``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if marker.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def gone(run: RunDirectory) -> None:
    for _ in range(2400):
        if not (left := alive(str(run.path))):
            return
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    raise AssertionError(f"still running: {left}")


def test_the_exit_code_is_the_ranks_where_none_is_recorded(run):
    """One that is recorded is returned below: 0 after a restart, 75 after a request to stop."""
    found, errors = ended(start(run, "unrecorded-3"))
    assert (found, "Traceback" in errors) == (3, False), errors
    assert "torch/distributed" not in errors


def test_a_killed_rank_is_an_internal_error_with_directions(run):
    code, errors = ended(start(run, "killed"))
    assert code == 70, errors
    assert "rank 1" in errors
    assert "SIGKILL" in errors
    assert str(run.logs_dir(1)) in errors
    assert "Traceback" not in errors
    failure = read_state(run)["attempts"][0]["failure"]
    assert failure["rank"] == 1 and failure["error"].startswith("killed by SIGKILL")
    assert f"(pid {failure['pid']}) was killed by SIGKILL" in errors


def test_the_rank_that_failed_first_is_shown(run):
    code, errors = ended(start(run, "raises"))
    assert code == 70, errors
    assert "rank 1 on there" in errors and "failed first" in errors and "  It broke" in errors and "its log" in errors
    assert errors.rstrip().endswith("the same command continues from the last checkpoint")
    reason = journal.read(run)[-1].reason
    assert reason.startswith("rank 1 on there (pid ") and reason.endswith("): It broke")


def test_a_killed_rank_restarts_in_place(run):
    code, errors = ended(start(run, "killed-once", restarts=1))
    assert code == 0, errors
    assert len(read_state(run)["attempts"]) == 2
    assert "restart 1 of 1 in 0.1 s" in errors
    assert "continues from the last checkpoint" not in errors, "it does, by itself"
    names = [(event.event, event.code) for event in journal.read(run)]
    assert names == [("launch", None), ("restart", 70), ("end", 0)]


@pytest.mark.parametrize(("number", "how", "code"), [(signal.SIGINT, "saves", 75), (signal.SIGTERM, "lost", 130)])
def test_a_stop_request_reaches_the_ranks_and_is_waited_for(run, number, how, code):
    process = start(run, how)
    ready(run, process)
    process.send_signal(number)
    found, errors = ended(process)
    assert found == code, errors
    assert f"{number.name}: saving and stopping" in errors
    assert "Traceback" not in errors
    assert not alive(str(run.path))


def test_a_second_request_kills(run):
    process = start(run, "ignores")
    ready(run, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    code, errors = ended(process)
    assert code == 130, errors
    assert "killed; what was saved last is intact" in errors
    gone(run)


def test_ranks_go_when_torchrun_is_killed(run):
    process = start(run, "saves")
    ready(run, process)
    (agent,) = [pid for pid in alive(str(run.path)) if parent_of(pid) == process.pid]
    os.kill(agent, signal.SIGKILL)
    code, errors = ended(process)
    assert code == 70, errors
    assert "without recording a status" in errors
    gone(run)


def parent_of(pid: int) -> int:
    return int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[1])


def test_torchrun_goes_when_the_launcher_is_killed(run):
    process = start(run, "saves")
    ready(run, process)
    process.kill()
    process.communicate()
    gone(run)


def test_prepare_and_locate_agree(tmp_path):
    composed = compose([f"run.root={tmp_path}"])
    assert prepare_run(composed.config) == RunDirectory.locate(tmp_path, composed.config.run.id)
