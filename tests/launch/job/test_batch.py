"""What the batch process decides, and the commands it starts; no scheduler needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from anemoi_dist.config.schema import LauncherConfig, SlurmConfig
from anemoi_dist.errors import ExitCode, PreflightError
from anemoi_dist.launch.job import allocation, batch
from anemoi_dist.launch.job.allocation import Allocation, fewest_cpus, start_command
from anemoi_dist.launch.job.requeue import Decision, History, Outcome, decide
from anemoi_dist.launch.launchers.supervisor import num_saved
from anemoi_dist.launch.status import journal, slurm_queue
from anemoi_dist.launch.status.journal import Entry
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.events import EventLog

USR1, TERM = int(signal.SIGUSR1), int(signal.SIGTERM)
OPTIONS = LauncherConfig(kind="slurm", nodes=2, ranks=4, max_requeues=3, max_retries=2)
HERE = Allocation("12", 1, ("n1", "n2"), cpus_per_node=16, cpus_per_task=4)


@pytest.mark.parametrize(
    ("code", "first_signal", "progress", "past", "requeued"),
    [
        (0, None, True, History(), False),
        (0, USR1, True, History(), False),
        (75, USR1, True, History(), True),
        (75, USR1, True, History(requeues=2), True),
        (75, USR1, True, History(requeues=3), False),
        (75, None, True, History(), False),  # a person's stop file
        (75, TERM, True, History(), False),  # SLURM ends the job, and knows whether it runs again
        (130, USR1, False, History(), True),
        (130, USR1, False, History(requeues=1, saved_nothing=True), False),
        (70, None, True, History(), True),
        (70, USR1, True, History(), True),
        (70, None, False, History(), False),
        (70, None, True, History(retries=2), False),
        (70, None, True, History(requeues=3, retries=1), True),
        (6, None, True, History(), True),
        (70, TERM, True, History(), False),
        (2, None, True, History(), False),
        (3, None, True, History(), False),
        (4, None, True, History(), False),
        (5, None, True, History(), False),
        (2, USR1, True, History(), False),
    ],
)
def test_which_starts_are_followed_by_another(
    code: int, first_signal: int | None, progress: bool, past: History, requeued: bool
) -> None:
    decision = decide(Outcome(code, first_signal=first_signal, progress=progress), past, OPTIONS)
    assert decision.requeue is requeued, decision.reason
    assert decision.reason


def test_the_past_is_counted_from_the_journal_of_this_job() -> None:
    def requeue(code: int, job_id: str = "12") -> Entry:
        return Entry("requeue", code=code, job_id=job_id)

    assert History.count([], "12") == History()
    events = [requeue(75, "11"), Entry("end", code=70, job_id="12"), requeue(75), requeue(70), requeue(6)]
    assert History.count(events, "12") == History(requeues=1, retries=2, saved_nothing=False)
    assert History.count([*events, requeue(130)], "12") == History(requeues=2, retries=2, saved_nothing=True)


def test_one_agent_a_node_holds_all_its_cpus() -> None:
    command = start_command(
        RunDirectory(Path("/runs/a b")), OPTIONS, HERE, python="/env/python", head="10.0.0.1", start=2
    )
    srun, rest = command[: command.index("/env/python")], command[command.index("/env/python") :]
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=16", "--export=ALL"} <= set(srun)
    assert srun[-2:] == ["env", "--unset=ANEMOI_DIST_PARENT_PID"]
    assert rest[1:3] == ["-m", "anemoi_dist.launch.job.agent"]
    assert {"--nnodes=2", "--nproc-per-node=4", "--rdzv-endpoint=10.0.0.1", "--max-restarts=0"} <= set(rest)
    assert "--rdzv-conf=file=/runs/a b/control/agents-12-1-2.json" in rest, "of this start alone"
    assert rest[-4:] == ["-m", "anemoi_dist.train", "--run-directory", "/runs/a b"]


def test_one_task_a_rank() -> None:
    options = LauncherConfig(kind="slurm", nodes=2, gpus_per_node=4, ranks_by="srun")
    command = start_command(RunDirectory(Path("/runs/a")), options, HERE, python="/env/python", head="", start=0)
    assert {"--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=4", "--kill-on-bad-exit=1"} <= set(command)
    assert command[-5:] == ["/env/python", "-m", "anemoi_dist.train", "--run-directory", "/runs/a"]


@pytest.mark.parametrize(("text", "fewest"), [("4", 4), ("72(x2),36", 36), ("8,16(x3)", 8)])
def test_the_fewest_cpus(text: str, fewest: int) -> None:
    assert fewest_cpus(text) == fewest


@pytest.mark.parametrize(
    ("interface", "variables"),
    [
        (None, {}),
        ("ib0", {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "ib0"}),
        ("=ib0,ib1", {"NCCL_SOCKET_IFNAME": "=ib0,ib1", "GLOO_SOCKET_IFNAME": "ib0,ib1"}),
        ("^docker", {"NCCL_SOCKET_IFNAME": "^docker"}),
    ],
)
def test_the_interface(interface: str | None, variables: dict[str, str]) -> None:
    launcher = LauncherConfig(slurm=SlurmConfig(interface=interface))
    assert allocation.interface_variables(launcher) == variables


class Answer:
    def __init__(self, stdout: str, stderr: str = "", returncode: int = 0) -> None:
        self.stdout, self.stderr, self.returncode = stdout, stderr, returncode


def test_the_head_is_reached_by_its_name_or_by_the_address_that_slurm_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def call(command: list[str], *, timeout_s: float) -> Answer:
        asked.append(command)
        return Answer("NodeName=n1 Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=n1 Version=22.05")

    resolves = {"n1": "10.9.9.9"}

    def getaddrinfo(name: str, *rest: object, **more: object) -> list[tuple[object, ...]]:
        if name in resolves:
            return [(2, 1, 6, "", (resolves[name], 0))]
        if name[0].isdigit():
            return [(2, 1, 6, "", (name, 0))]
        raise OSError("unknown host")

    monkeypatch.setattr(slurm_queue, "call", call)
    monkeypatch.setattr(allocation.socket, "getaddrinfo", getaddrinfo)
    assert HERE.head_address({}) == "10.9.9.9" and not asked
    resolves["n1"] = "127.0.1.1"  # as Debian writes it into /etc/hosts
    assert HERE.head_address({}) == "10.1.2.3"
    resolves.clear()
    assert HERE.head_address({}) == "10.1.2.3"
    assert HERE.head_address({"GLOO_SOCKET_IFNAME": "lo"}) == "127.0.0.1"
    monkeypatch.setattr(slurm_queue, "call", lambda command, timeout_s: Answer("", "not found", 1))
    with pytest.raises(PreflightError, match="n1 has no address"):
        HERE.head_address({})


def job(tmp_path: Path) -> batch.BatchJob:
    from anemoi_dist.config.compose import compose

    run = RunDirectory(tmp_path / "r")
    run.create()
    config = compose(["launcher=slurm", "launcher.nodes=2", "run.id=r"]).config
    return batch.BatchJob(run, config, HERE)


def test_a_start_that_slurm_has_given_up_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = "JobId=12 JobName=r JobState={} Reason=None Requeue=1 Restarts={}"
    told = {"text": shown.format("RUNNING", 1)}
    monkeypatch.setattr(slurm_queue, "call", lambda command, timeout_s: Answer(told["text"]))
    here = job(tmp_path)
    assert here._start_ranks(0)[0] == "srun"
    for state, restarts in (("RUNNING", 2), ("PENDING", 2), ("COMPLETING", 1)):
        told["text"] = shown.format(state, restarts)
        with pytest.raises(batch.SupersededError, match="leaving the run to the next"):
            here._start_ranks(1)


def test_a_start_that_slurm_has_given_up_does_not_requeue_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, restarts = [], 1

    def call(command: list[str], *, timeout_s: float) -> Answer:
        asked.append(command[1])
        return Answer(f"JobId=12 JobState=RUNNING Restarts={restarts}")

    monkeypatch.setattr(slurm_queue, "call", call)
    here = job(tmp_path)
    here._requeue(Outcome(75, first_signal=USR1, progress=True), Decision(True, "time limit", 1))
    assert asked == ["--oneliner", "requeue"]
    restarts = 2
    here._requeue(Outcome(75, first_signal=USR1, progress=True), Decision(True, "time limit", 1))
    assert asked == ["--oneliner", "requeue", "--oneliner"]
    noted = [event for event in journal.read(RunDirectory(tmp_path / "r")) if event.event == "requeue"]
    assert [(event.code, event.progress) for event in noted] == [(75, True)]


def test_a_slurmctld_that_is_down_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [slurm_queue.QueueError("down"), slurm_queue.QueueError("down"), Answer("JobState=RUNNING Restarts=1")]

    def call(command: list[str], *, timeout_s: float) -> Answer:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(slurm_queue, "call", call)
    monkeypatch.setattr(batch, "_PAUSE_S", 0.0)
    assert job(tmp_path)._start_ranks(0)[0] == "srun"
    assert not answers


def test_only_its_own_stop_file_is_taken_back(tmp_path: Path) -> None:
    here, run = job(tmp_path), RunDirectory(tmp_path / "r")
    here._ask_to_stop(None, USR1)  # type: ignore[arg-type]
    assert run.stop_file.exists()
    here._withdraw_own_stop()
    assert not run.stop_file.exists()
    run.stop_file.write_text("")
    here._withdraw_own_stop()
    assert run.stop_file.exists(), "a person's"


def test_outside_a_job_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job(tmp_path)
    from anemoi_dist.config.compose import compose
    from anemoi_dist.config.parse import to_yaml

    run = RunDirectory(tmp_path / "r")
    run.config_file.write_text(to_yaml(compose(["launcher=slurm", "run.id=r"]).config))
    assert "SLURM_JOB_ID" not in os.environ
    assert batch.main([str(run.path)]) == ExitCode.PREFLIGHT
    assert "not in a SLURM job" in capsys.readouterr().err
    command = [sys.executable, "-m", "anemoi_dist.launch.job", str(run.path)]
    assert subprocess.run(command, capture_output=True).returncode == ExitCode.PREFLIGHT, "what SLURM sees of it"


@pytest.mark.parametrize("asked", ["stop", "cancel"])
@pytest.mark.parametrize(("code", "first_signal"), [(75, USR1), (130, USR1), (70, None)])
def test_what_a_person_asks_for_is_not_undone(asked: str, code: int, first_signal: int | None) -> None:
    assert decide(Outcome(code, first_signal=first_signal, progress=True), History(), OPTIONS).requeue
    decision = decide(Outcome(code, first_signal=first_signal, progress=True, request=asked), History(), OPTIONS)
    assert not decision.requeue and "on request" in decision.reason


def test_a_request_counts_in_the_start_that_it_was_made_in(tmp_path: Path) -> None:
    here, run = job(tmp_path), RunDirectory(tmp_path / "r")
    for event in ("launch", "stop", "launch"):
        journal.note(run, event)
    assert here._person_request(journal.read(run)) is None
    journal.note(run, "cancel")
    assert here._person_request(journal.read(run)) == "cancel"


def test_a_persons_stop_is_not_taken_for_the_time_limits(tmp_path: Path) -> None:
    here, run = job(tmp_path), RunDirectory(tmp_path / "r")
    run.stop_file.touch()
    here._ask_to_stop(None, USR1)  # type: ignore[arg-type]
    assert here._stopped_by_person and run.stop_file.read_text() == ""


@pytest.mark.parametrize(
    ("signals", "answer", "ended"),
    [
        ([USR1], "JobState=RUNNING RunTime=00:00:03 TimeLimit=00:05:00", False),
        ([USR1, TERM], "JobState=COMPLETING RunTime=00:00:03 TimeLimit=00:05:00", True),
        ([USR1, TERM], "JobState=COMPLETING RunTime=00:05:10 TimeLimit=00:05:00", False),
        ([USR1, TERM], "JobState=COMPLETING RunTime=1-00:05:10 TimeLimit=UNLIMITED", True),
    ],
)
def test_a_job_that_slurm_ends_before_its_time_is_up_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: list[int], answer: str, ended: bool
) -> None:
    monkeypatch.setattr(slurm_queue, "call", lambda command, *, timeout_s: Answer(answer))
    here = job(tmp_path)
    here._signals += signals
    assert here._is_being_ended() is ended


def test_saves_count_also_below_an_older_one(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "r")
    run.create()
    before = num_saved(run)
    log = EventLog(run.events_file)
    log.write("checkpoint", step=100)
    log.write("start", step=90, resumed_from_step=90)
    log.write("checkpoint", step=95)
    log.close()
    assert (before, num_saved(run)) == (0, 2)


def test_a_start_that_saved_is_no_failure() -> None:
    entry = Entry("requeue", code=130, job_id="12", progress=True)
    assert History.count([entry], "12") == History(requeues=1, saved_nothing=False)
    assert decide(
        Outcome(130, first_signal=USR1, progress=True), History(requeues=1, saved_nothing=True), OPTIONS
    ).requeue
