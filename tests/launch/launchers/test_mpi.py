"""``launcher=mpi``: the commands of both families of mpirun, and, where there is one, real ranks under it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support import runs
from support.many_runs import write_state
from support.waiting import PATIENCE_S, wait_until

from anemoi_dist.config.compose import compose
from anemoi_dist.errors import ConfigError, PreflightError
from anemoi_dist.launch import cli
from anemoi_dist.launch.launchers import machine, mpi
from anemoi_dist.launch.launchers.base import Machine, Mpirun, plan
from anemoi_dist.launch.launchers.supervisor import read_ending
from anemoi_dist.run.directory import RunDirectory

OPENMPI = Mpirun(path="/mpi/bin/mpirun", family="openmpi")
HYDRA = Mpirun(path="/mpich/bin/mpirun", family="hydra")
HERE = Machine(num_gpus=0, environ={"HOME": "/h", "PATH": "/bin"}, python="/env/bin/python", mpirun=OPENMPI)
RUN = RunDirectory(Path("/runs/it's; one"))
WORKER = ("/env/bin/python", "-m", "anemoi_dist.train", "--run-directory", str(RUN.path))


def planned(*overrides: str, on: Machine = HERE):
    config = compose(["launcher=mpi", "run.id=r", "training.global_batch_size=16", *overrides]).config
    return plan(config, RUN, on)


# Pure parts


def test_the_command_of_open_mpi():
    found = planned("launcher.ranks=4")
    assert (found.kind, found.nodes, found.ranks_per_node, found.batches.micro_size) == ("mpi", 1, 4, 4)
    place = ("--map-by", "ppr:4:node:OVERSUBSCRIBE", "--bind-to", "none")
    assert found.command == ("/mpi/bin/mpirun", "-n", "4", *place, *WORKER)
    assert (found.environment["GLOO_SOCKET_IFNAME"], found.environment["OMP_NUM_THREADS"]) == ("lo", "1")


def test_the_command_of_hydra():
    found = planned("launcher.ranks=4", on=dataclasses.replace(HERE, mpirun=HYDRA))
    assert found.command == ("/mpich/bin/mpirun", "-n", "4", "-ppn", "4", "-localhost", "127.0.0.1", *WORKER)
    assert found.environment["I_MPI_PIN"] == "off"


def test_several_hosts_of_a_file():
    overrides = ("launcher.nodes=2", "launcher.gpus_per_node=2", "launcher.hostfile=/h")
    environ = {"PATH": "/bin", "NCCL_DEBUG": "INFO", "HOME": "/h", "ANEMOI_DIST_PARENT_PID": "7"}
    found = planned(*overrides, on=dataclasses.replace(HERE, environ=environ))
    command = " ".join(found.command)
    assert (found.world_size, found.batches.world_size) == (4, 4)
    assert command.startswith("/mpi/bin/mpirun -n 4 --hostfile /h --map-by ppr:2:node:OVERSUBSCRIBE")
    exported = [name for flag, name in zip(found.command, found.command[1:], strict=False) if flag == "-x"]
    assert {"NCCL_DEBUG", "PATH", "OMP_NUM_THREADS", "ANEMOI_DIST_LAUNCHED"} <= set(exported)
    assert not {"HOME", "ANEMOI_DIST_PARENT_PID"} & set(exported)
    assert "GLOO_SOCKET_IFNAME" not in found.environment, "the others are not on the loopback interface"
    hydra = planned(*overrides, on=dataclasses.replace(HERE, mpirun=HYDRA))
    assert hydra.command == ("/mpich/bin/mpirun", "-n", "4", "-ppn", "2", "-f", "/h", *WORKER)


def test_hosts_of_a_job_and_hosts_from_nowhere():
    job = dataclasses.replace(HERE, environ={"SLURM_JOB_ID": "7"})
    assert "--hostfile" not in planned("launcher.nodes=2", on=job).command
    with pytest.raises(ConfigError, match=r"launcher\.hostfile=FILE"):
        planned("launcher.nodes=2")
    with pytest.raises(ConfigError, match=r"no effect with launcher\.kind=local"):
        compose(["launcher.hostfile=/h"])


def test_what_cannot_start():
    with pytest.raises(ConfigError, match="multiple of the 6 ranks"):
        planned("launcher.ranks=3", "launcher.nodes=2", "launcher.hostfile=/h")


@pytest.mark.parametrize("both", ["OMPI_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT"])
def test_what_mpirun_would_refuse_is_refused_first(tmp_path, monkeypatch, both):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    config = compose(["launcher=mpi", "run.id=r"]).config
    with pytest.raises(PreflightError, match="no mpirun in PATH"):
        mpi.check(config, dataclasses.replace(HERE, mpirun=None))
    twice = "OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
    for environ in ({}, {both: "1"}):
        with pytest.raises(PreflightError, match=twice):
            mpi.check(config, dataclasses.replace(HERE, environ=environ))
    told = {both: "1", f"{both}_CONFIRM": "1"}
    mpi.check(config, dataclasses.replace(HERE, environ=told))
    mpi.check(config, dataclasses.replace(HERE, mpirun=HYDRA))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    mpi.check(config, HERE)


def test_a_file_of_hosts_that_is_not_there_is_refused_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "find_mpirun", lambda *_, **__: HYDRA)
    hosts = tmp_path / "nohosts"
    arguments = ["train", "launcher=mpi", f"launcher.hostfile={hosts}", f"run.root={tmp_path}", "run.id=r"]
    assert cli.main(arguments) == 2
    assert f"launcher.hostfile='{hosts}': cannot be read" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("says", "family"),
    [
        ("mpirun (Open MPI) 5.0.11", "openmpi"),
        ("mpirun (Open MPI) 4.1.4", "openmpi"),
        ("HYDRA build details:\n    Version:     4.0.2", "hydra"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.14 Build 20241121", "hydra"),
    ],
)
def test_what_an_mpirun_is(tmp_path, says, family):
    path = program(tmp_path, f"echo '{says}'")
    assert mpi.find_mpirun({"PATH": f"{tmp_path}:/bin:/usr/bin"}, python="/no/python") == Mpirun(path, family)


def test_an_mpirun_that_is_neither(tmp_path):
    program(tmp_path, "echo 'prun 1.0'; exit 3")
    with pytest.raises(PreflightError, match=r"neither Open MPI's nor.*'prun 1\.0'"):
        mpi.find_mpirun({"PATH": f"{tmp_path}:/bin:/usr/bin"}, python="/no/python")
    assert mpi.find_mpirun({"PATH": str(tmp_path / "none")}, python="/no/python") is None


def test_the_number_of_a_signal_is_no_code_of_ours(tmp_path):
    run = RunDirectory(tmp_path)
    run.create()
    write_state(run, {"state": "running", "attempts": [{"attempt": 1}]})
    hydras = read_ending(run, signal.SIGABRT, attempts_before=0, interrupted=False, returns_codes=False)
    assert hydras.code == 70 and "exited without recording a status" in hydras.message


def program(directory: Path, script: str) -> str:
    path = directory / "mpirun"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def meeting_fails(**environ: str) -> str:
    """Return what one of four ranks says that an mpirun of Hydra's family has started."""
    code = "from anemoi_dist.distributed.rendezvous import meet; meet(None)"
    environment = {**os.environ, "PMI_RANK": "1", "PMI_SIZE": "4", **environ}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode != 0
    return done.stderr


def test_mpi4py_without_a_library():
    pytest.importorskip("mpi4py")
    assert "PreflightError: mpi4py finds no MPI library" in meeting_fails(MPI4PY_LIBMPI="/no/libmpi.so")


def test_no_mpi4py(tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ModuleNotFoundError(\"No module named 'mpi4py'\")")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert "pip install 'anemoi-dist[mpi]'" in meeting_fails(PYTHONPATH=path)


def test_an_mpi_that_hangs_as_it_starts_is_ended(tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").touch()
    (tmp_path / "mpi4py" / "MPI.py").write_text("import time; time.sleep(60)")
    code = "from anemoi_dist.distributed import rendezvous; rendezvous.WAIT_S = 0.5; rendezvous.meet(None)"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PMI_RANK": "1", "PMI_SIZE": "4", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 6
    assert 'mpi4py/MPI.py", line 1' in done.stderr, "where it stands"


def test_ranks_that_have_not_met_are_a_hang(tmp_path):
    run = RunDirectory(tmp_path)
    run.create()
    write_state(run, {"state": "running", "attempts": []})
    ending = read_ending(run, 6, attempts_before=0, interrupted=False)
    assert ending.code == 6 and "the ranks have not met in time; where they stood is above" in ending.message
    hydras = read_ending(run, 6, attempts_before=0, interrupted=False, returns_codes=False)
    assert hydras.code == 70 and "no rank got as far" in hydras.message


def test_an_mpirun_of_another_mpi():
    pytest.importorskip("mpi4py")
    found = mpi.find_mpirun(os.environ, python=sys.executable)
    if found is None or found.family != "openmpi":
        pytest.skip("mpi4py is not linked to Open MPI here")
    assert "mpirun started 4 ranks, but mpi4py sees a world of 1: it is linked to another MPI" in meeting_fails()


# With a real mpirun

needs_mpi = pytest.mark.skipif(
    shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}") is None,
    reason="there is no mpirun",
)
# Where tests run as root, which is nobody's fault in a container.
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
SMALL = [*runs.SMALL, "data.num_workers=0", "engine=ddp", "launcher.ranks=2"]


started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    while started:
        started.pop().kill()  # the ranks end with it


def start(root: Path, *overrides: str) -> subprocess.Popen[str]:
    command = runs.command(root, "r", *overrides, small=SMALL)
    process = runs.start(command, **AS_ROOT, CUDA_VISIBLE_DEVICES="")
    started.append(process)
    return process


def processes_of(root: Path) -> list[psutil.Process]:
    """Every process of a run, the launcher and mpirun included."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(root) in word for word in process.info["cmdline"] or ()):
            found.append(process)
    return found


def all_gone(root: Path) -> bool:
    return wait_until(lambda: not processes_of(root), every_s=0.1)


def ranks_of(root: Path) -> list[psutil.Process]:
    """The training processes, without mpirun and their data workers."""
    training = [p for p in processes_of(root) if p.cmdline()[1:3] == ["-m", "anemoi_dist.train"]]
    ranks = [p for p in training if p.parent() not in training]
    numbers = {p: p.environ() for p in ranks}
    return sorted(ranks, key=lambda p: int(numbers[p].get("OMPI_COMM_WORLD_RANK") or numbers[p]["PMI_RANK"]))


@pytest.fixture(scope="module")
def torchruns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What torchrun makes of the same run, undisturbed."""
    root = tmp_path_factory.mktemp("torchrun")
    code, output = runs.finish(start(root))
    assert code == 0, output
    return root


MEET = """
import os, sys, time
from pathlib import Path
from anemoi_dist.distributed.rendezvous import meet
meeting = meet(None)
assert "torch" not in sys.modules
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
(Path(sys.argv[1]) / os.environ["RANK"]).write_text(" ".join(os.environ[name] for name in names))
time.sleep(60)
"""


@needs_mpi
@pytest.mark.parametrize("victim", ["launcher", "mpirun", "rank"])
def test_ranks_meet_and_none_is_left(tmp_path: Path, victim: str):
    config = compose(["launcher=mpi", "launcher.ranks=4", "training.global_batch_size=4", "run.id=r"]).config
    found = plan(config, RUN, machine.detect_machine("mpi"))
    worker = [sys.executable, "-c", MEET, str(tmp_path)]
    command = [sys.executable, "-m", "anemoi_dist.process.parent_death", *found.command[: -len(WORKER)], *worker]
    parent = f"import subprocess, sys; sys.exit(subprocess.run({command!r}).returncode)"
    environment = {**os.environ, **AS_ROOT, **found.environment}
    launcher = subprocess.Popen([sys.executable, "-c", parent, str(tmp_path)], env=environment)
    started.append(launcher)
    met = lambda: sum(path.read_text() != "" for path in tmp_path.iterdir()) == 4  # noqa: E731
    assert wait_until(lambda: met() or launcher.poll() is not None) and met()
    places = [(tmp_path / str(rank)).read_text().split() for rank in range(4)]
    assert [place[:5] for place in places] == [[str(n), "4", str(n), "4", "127.0.0.1"] for n in range(4)]
    assert len({place[5] for place in places}) == 1
    [mpirun] = psutil.Process(launcher.pid).children()
    ranks = [p for p in mpirun.children(recursive=True) if p.cmdline()[1:2] == ["-c"]]
    assert len(ranks) == 4
    {"launcher": launcher, "mpirun": mpirun, "rank": ranks[2]}[victim].kill()
    assert all_gone(tmp_path), processes_of(tmp_path)
    assert launcher.wait(PATIENCE_S) != 0


@needs_mpi
def test_a_stopped_run_says_so(tmp_path: Path):
    process = start(tmp_path, "launcher=mpi")
    runs.wait_for_step(tmp_path / "r", 3, process)
    assert len(ranks_of(tmp_path)) == 2
    process.send_signal(signal.SIGTERM)
    code, output = runs.finish(process)
    assert code == 75, output
    state = json.loads((tmp_path / "r" / "run.json").read_text())
    assert (state["state"], state["attempts"][-1]["exit_code"]) == ("preempted", 75)
    assert all_gone(tmp_path)
    assert "\x1b[" not in output, "no progress bar where there is no terminal"


@needs_mpi
@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(torchruns: Path, tmp_path: Path):
    process = start(tmp_path, "launcher=mpi")
    runs.wait_for_step(tmp_path / "r", 2, process)
    code, output = runs.finish(start(tmp_path, "launcher=mpi"))
    assert code == 3 and "is held by process" in output
    runs.wait_for_step(tmp_path / "r", 8, process)
    ranks_of(tmp_path)[0].kill()
    code, output = runs.finish(process)
    assert code == 70, output
    assert all_gone(tmp_path), "a rank is left"
    code, output = runs.finish(start(tmp_path, "launcher=mpi"))
    assert code == 0, output
    assert "resumes at step" in output
    runs.assert_equal_bit_for_bit(torchruns / "r", tmp_path / "r")
    code, output = runs.finish(start(tmp_path, "launcher=mpi"))
    assert code == 0 and "is finished" in output


@needs_mpi
@pytest.mark.slow
def test_a_killed_rank_is_restarted(torchruns: Path, tmp_path: Path):
    process = start(tmp_path, "launcher=mpi", "launcher.max_restarts=1", "launcher.backoff_s=0")
    runs.wait_for_step(tmp_path / "r", 8, process)
    ranks_of(tmp_path)[1].kill()
    code, output = runs.finish(process)
    assert code == 0, output
    runs.assert_equal_bit_for_bit(torchruns / "r", tmp_path / "r")
