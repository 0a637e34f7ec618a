"""One run, one owner: races, dead owners, owners on other hosts, earlier lives of the same job."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from support.waiting import wait_until

from anemoi_dist.config.parse import from_yaml
from anemoi_dist.errors import ExitCode
from anemoi_dist.run import lock
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.lock import HeldError, Hold, Holder, hold_launch, hold_ranks, owned

# Waits for a common moment, takes hold, says whether it did, and keeps hold until told to let go.
ROUNDS = """
import sys, time
from anemoi_dist.run.lock import HeldError
print("ready", flush=True)
for line in sys.stdin:
    moment, *names = line.split()
    while time.time() < float(moment):
        pass
    try:
        hold = take(*names)
        print("owns", flush=True)
    except HeldError as error:
        print("held by", error.holder and error.holder.pid, flush=True)
        hold = None
    sys.stdin.readline()
    if hold:
        hold.release()
    print("done", flush=True)
"""
CONTENDER = """
import sys
from pathlib import Path
from anemoi_dist.run.lock import hold_launch
from anemoi_dist.run.directory import RunDirectory
def take():
    return hold_launch(RunDirectory(Path(sys.argv[1])))
"""
# A whole start: each contender has a configuration of its own, and every round is a run of its own.
STARTER = """
import sys
from anemoi_dist.config.compose import compose
from anemoi_dist.run.prepare import claim_run
config = compose([f"run.root={sys.argv[1]}", f"training.lr.rate={sys.argv[2]}", "run.id=none"]).config
def take(name):
    config.run.id = name
    return claim_run(config)[1]
"""


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = RunDirectory.locate(tmp_path, "r")
    run.create()
    return run


def contender(run: RunDirectory, **environment: str) -> subprocess.Popen[str]:
    return contend(CONTENDER, str(run.path), **environment)


def contend(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code + ROUNDS, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stdout.readline() == "ready\n"
    return process


def tell(process: subprocess.Popen[str], text: str = "") -> str:
    process.stdin.write(f"{text}\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def test_of_two_starts_at_once_one_owns_the_run_and_the_other_says_who(run):
    contenders = [contender(run) for _ in range(2)]
    winners = set()
    for _ in range(15):
        moment = time.time() + 0.02
        for each in contenders:
            each.stdin.write(f"{moment}\n")
            each.stdin.flush()
        answers = [each.stdout.readline().strip() for each in contenders]
        assert sorted(answer.split()[0] for answer in answers) == ["held", "owns"], answers
        winner = answers.index("owns")
        # None only where the winner has the lock and is about to write its name.
        assert answers[1 - winner] in (f"held by {contenders[winner].pid}", "held by None")
        winners.add(winner)
        assert [tell(each) for each in contenders] == ["done", "done"]
    for each in contenders:
        each.kill()
        each.wait()
    assert not run.stop_file.exists()


def test_the_start_that_runs_is_the_one_whose_configuration_is_frozen(tmp_path):
    rates = ("0.001", "0.002")
    contenders = [contend(STARTER, str(tmp_path), rate) for rate in rates]
    for number in range(10):
        moment = time.time() + 0.02
        for each in contenders:
            each.stdin.write(f"{moment} r{number}\n")
            each.stdin.flush()
        answers = [each.stdout.readline().strip() for each in contenders]
        assert sorted(answer.split()[0] for answer in answers) == ["held", "owns"], answers
        frozen = from_yaml((tmp_path / f"r{number}" / "config.yaml").read_text())
        assert str(frozen.training.lr.rate) == rates[answers.index("owns")]
        assert [tell(each) for each in contenders] == ["done", "done"]
    for each in contenders:
        each.kill()
        each.wait()


def test_a_killed_owner_holds_nothing(run):
    owner = contender(run)
    assert tell(owner, "0") == "owns"
    with pytest.raises(HeldError, match=rf"run r is held by process {owner.pid} on {socket.gethostname()}") as caught:
        hold_launch(run)
    assert caught.value.exit_code == ExitCode.PREFLIGHT
    owner.kill()
    owner.wait()
    hold = hold_launch(run)
    assert Holder.read(run.launch_lock_file) == Holder.here()
    hold.release()
    hold.release()
    assert Holder.read(run.launch_lock_file) is None


def leave_holder(run: RunDirectory, **facts) -> None:
    """Write a holder as one whose lock this machine does not see."""
    holder = {"host": "elsewhere", "pid": 1, "started": 1, "job_id": None, "life": 0, **facts}
    run.launch_lock_file.write_text(json.dumps(holder))


def test_a_reused_pid_is_not_the_owner(run):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = Holder.here().started
    leave_holder(run, host=socket.gethostname(), pid=other.pid, started=started - 1)
    hold_launch(run).release()
    leave_holder(run, host=socket.gethostname(), pid=other.pid, started=lock.process_started(other.pid))
    with pytest.raises(HeldError, match=f"process {other.pid}"):
        hold_launch(run)
    other.kill()
    other.wait()
    hold_launch(run).release()


def test_an_owner_on_another_host_is_known_by_its_touch(run, monkeypatch):
    monkeypatch.setattr(lock, "TOUCH_S", 0.2)
    monkeypatch.setattr(lock, "SILENCE_S", 1.0)
    leave_holder(run)
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(0.05):
            os.utime(run.launch_lock_file)

    toucher = threading.Thread(target=touch)
    toucher.start()
    with pytest.raises(HeldError, match="process 1 on elsewhere"):
        hold_launch(run)
    ended.set()
    toucher.join()
    before = time.monotonic()
    hold = hold_launch(run)
    assert time.monotonic() - before > 0.5, "silence is waited for"
    touched = run.launch_lock_file.stat().st_mtime_ns
    is_touched = wait_until(lambda: run.launch_lock_file.stat().st_mtime_ns > touched)
    assert is_touched, "the holder gives signs of life"
    hold.release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', '"x"', "\0"])
def test_a_damaged_lock_file_is_no_owner(run, text):
    run.launch_lock_file.write_text(text)
    hold_launch(run).release()


def test_an_earlier_life_of_the_same_job_is_asked_to_leave_and_waited_for(run, monkeypatch):
    earlier = contender(run, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="0")
    assert tell(earlier, "0") == "owns"
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    with pytest.raises(HeldError, match=r"SLURM job 7"):
        hold_launch(run)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    said: list[str] = []
    asked = []

    def leave() -> None:
        while not run.stop_file.exists():
            time.sleep(0.01)
        asked.append(True)
        tell(earlier)

    leaver = threading.Thread(target=leave)
    leaver.start()
    hold = hold_launch(run, say=said.append)
    leaver.join()
    assert asked and "asked to save and leave" in said[0] and not run.stop_file.exists()
    hold.release()
    earlier.kill()
    earlier.wait()


def test_ranks_that_do_not_leave_are_named(run, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_S", 0.3)
    ranks = Hold(run, run.lock_file)
    with pytest.raises(HeldError, match=f"process {os.getpid()}"):
        hold_ranks(run)
    with pytest.raises(HeldError), owned(run):
        pass
    ranks.release()
    with owned(run), pytest.raises(HeldError):
        hold_launch(run)
    hold_launch(run).release()
