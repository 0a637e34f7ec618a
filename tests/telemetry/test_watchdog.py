"""Who is to blame for a hang, and who may end a run; with real ranks in ``tests/whole/test_hangs.py``."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.many_runs import read_state
from support.waiting import PATIENCE_S, wait_until

from anemoi_dist.errors import ExitCode
from anemoi_dist.run.attempt import Attempt
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.events import read_events
from anemoi_dist.run.records import Hang, Process
from anemoi_dist.telemetry import watchdog
from anemoi_dist.telemetry.heartbeat import Heartbeat, HeartbeatRecord
from anemoi_dist.telemetry.watchdog import Watchdog, find_hang, record_unreported_hang


def beat(rank: int, *, time: float, collectives: int = 5, **more: Any) -> HeartbeatRecord:
    who = {"rank": rank, "host": "node1", "pid": 100 + rank, "phase": "step", "step": 3}
    return HeartbeatRecord(**who, time=time, collectives=collectives, **more)


def found(*beats: HeartbeatRecord, world_size: int | None = None, margin_s: float = 0.0) -> Hang | None:
    size = len(beats) if world_size is None else world_size
    return find_hang({b.rank: b for b in beats}, world_size=size, now=100.0, timeout_s=10.0, margin_s=margin_s)


def test_the_rank_with_the_fewest_collectives_is_to_blame() -> None:
    hang = found(beat(0, time=80.0, stalled=True), beat(1, time=85.0, collectives=4, stalled=True, where="m.py:1 in f"))
    assert hang is not None and (hang.rank, hang.behind, hang.silent_s) == (1, [1], 15.0)
    assert hang.unresponsive == []
    assert str(hang) == (
        "hang: rank 1 on node1 (pid 101) has given no sign of life for 15 s, last in phase step after step 3; "
        "m.py:1 in f"
    )


def test_where_none_has_fallen_behind_it_is_the_one_silent_for_longest() -> None:
    hang = found(beat(0, time=85.0, stalled=True), beat(1, time=80.0, stalled=True))
    assert hang is not None and (hang.rank, hang.behind) == (1, [])


def test_no_hang_while_one_rank_goes_on() -> None:
    assert found(beat(0, time=50.0, stalled=True), beat(1, time=95.0)) is None
    # It may have been silent for long enough, and be about to say so itself.
    assert found(beat(0, time=50.0, stalled=True), beat(1, time=89.0), margin_s=4.0) is None
    assert found(beat(0, time=50.0, stalled=True), beat(1, time=85.0), margin_s=4.0) is not None


def test_a_rank_that_does_not_answer_is_named() -> None:
    hang = found(beat(0, time=80.0, stalled=True), beat(1, time=79.0, collectives=3))
    assert hang is not None and hang.unresponsive == [Process(1, host="node1", pid=101)]
    assert "does not answer" in str(hang)
    never = found(beat(0, time=80.0, stalled=True), world_size=2)
    assert never is not None and (never.rank, never.host, never.unresponsive) == (1, "", [])


def test_a_rank_that_starts_has_a_limit_of_its_own() -> None:
    starting = HeartbeatRecord(rank=0, time=80.0, phase="startup")
    limits = {"world_size": 1, "now": 100.0, "timeout_s": 10.0}
    assert find_hang({0: starting}, **limits, startup_timeout_s=30.0) is None
    assert find_hang({0: starting}, **limits, startup_timeout_s=15.0) is not None
    assert find_hang({0: beat(0, time=80.0)}, **limits, startup_timeout_s=30.0) is not None


def test_between_two_phases_a_rank_that_trains_does_not_start_again(run: RunDirectory) -> None:
    heartbeat = Heartbeat(run, rank=0, world_size=1, attempt=1)
    heartbeat.beat("startup")
    assert heartbeat.phase == "startup"
    heartbeat.beat("validation")
    heartbeat.beat("startup")
    assert heartbeat.phase == "step"


def test_a_slow_start_is_no_hang_and_a_silent_step_is(run: RunDirectory, ended: list[int]) -> None:
    Attempt(run, world_size=1, max_steps=10)
    run.logs_dir(1).mkdir(parents=True, exist_ok=True)
    heartbeat = Heartbeat(run, rank=0, world_size=1, attempt=1, interval_s=0.05)
    heartbeat.start()
    dog = Watchdog(heartbeat, run=run, attempt=1, rank=0, world_size=1, timeout_s=0.5, startup_timeout_s=600.0)
    dog.start()
    time.sleep(1.5)  # three times the limit of a step
    assert ended == []
    heartbeat.beat("step", step=1)
    assert wait_until(lambda: ended)
    heartbeat.close()
    assert ended == [ExitCode.HANG]
    assert "watchdog.timeout_s=0.5 s, in phase step after step 1" in run.log_file(1, 0).read_text()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.locate(tmp_path, "r")
    run.create()
    return run


class NoSwitch:
    """A dead man's switch that never goes off: where these threads get no time it would end all tests."""

    def __init__(self, **_: Any) -> None: ...
    def hold(self, seconds: float) -> None: ...
    def close(self) -> None: ...


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The codes that a watchdog would have ended this process with; its thread ends instead."""
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr(watchdog.os, "_exit", end)
    monkeypatch.setattr(watchdog, "Deadman", NoSwitch)
    return codes


def make(run: RunDirectory, *, rank: int = 0, world_size: int = 1, timeout_s: float = 0.5) -> tuple:
    heartbeat = Heartbeat(run, rank=rank, world_size=world_size, attempt=1, interval_s=0.05)
    heartbeat.start()
    dog = Watchdog(heartbeat, run=run, attempt=1, rank=rank, world_size=world_size, timeout_s=timeout_s)
    dog.start()
    return heartbeat, dog


def test_a_run_that_goes_on_is_left_alone_and_its_threads_end(
    run: RunDirectory, ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = Attempt(run, world_size=1, max_steps=1)
    heartbeat, dog = make(run, timeout_s=600.0)
    monkeypatch.setattr(heartbeat, "silent_s", lambda: 599.0)
    dog._check()
    dog.close()
    monkeypatch.setattr(heartbeat, "silent_s", lambda: 601.0)
    dog._check()  # it was closed while it looked
    heartbeat.close()
    assert not [thread for thread in threading.enumerate() if thread.name in ("watchdog", "heartbeat")]
    assert ended == [] and run.log_file(1, 0).read_text() == ""
    assert attempt.end(ExitCode.FINISHED) == ExitCode.FINISHED


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_hang_is_recorded_and_its_record_stands(run: RunDirectory, ended: list[int]) -> None:
    attempt = Attempt(run, world_size=1, max_steps=1)
    heartbeat, dog = make(run)
    heartbeat.beat("checkpoint", step=4)
    assert wait_until(lambda: ended)
    assert ended == [ExitCode.HANG]
    [event] = read_events(run.events_file)
    assert (event["event"], event["rank"], event["phase"], event["step"]) == ("hang", 0, "checkpoint", 4)
    assert "test_watchdog.py" in event["where"] and "in test_a_hang_is_recorded" in event["where"]
    log = run.log_file(1, 0).read_text()
    assert "watchdog.timeout_s=0.5 s, in phase checkpoint after step 4" in log
    assert "in test_a_hang_is_recorded" in log
    assert attempt.end(ExitCode.INTERNAL) == ExitCode.HANG
    last = read_state(run)["attempts"][-1]
    assert (
        last["exit_code"] == 6 and last["failure"]["hang"]["rank"] == 0 and "hang: rank 0" in last["failure"]["error"]
    )
    dog.close()
    heartbeat.close()


def test_a_rank_that_waits_for_one_at_work_is_not_ended(
    run: RunDirectory, ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    Attempt(run, world_size=2, max_steps=1)
    busy = Heartbeat(run, rank=1, world_size=2, attempt=1)
    heartbeat = Heartbeat(run, rank=0, world_size=2, attempt=1)
    dog = Watchdog(heartbeat, run=run, attempt=1, rank=0, world_size=2, timeout_s=600.0)
    monkeypatch.setattr(heartbeat, "silent_s", lambda: 1200.0)
    for _ in range(3):
        busy.beat()
        busy.write()
        dog._check()
    monkeypatch.setattr(heartbeat, "silent_s", lambda: 0.0)
    dog._check()
    dog._thread.start()
    dog.close()
    assert ended == []
    log = run.log_file(1, 0).read_text()
    assert log.count("no sign of life") == 1 and "it continues" in log


def test_who_decides_is_the_first_whose_watchdog_lives(run: RunDirectory) -> None:
    Attempt(run, world_size=3, max_steps=1)
    heartbeat = Heartbeat(run, rank=1, world_size=3, attempt=1, interval_s=0.05)
    dog = Watchdog(heartbeat, run=run, attempt=1, rank=1, world_size=3, timeout_s=10.0)
    first = Heartbeat(run, rank=0, world_size=3, attempt=1)
    first.write(stalled=True, watchdog_time=time.time() + 600.0)
    assert not dog._is_judge()
    first.write(stalled=True, watchdog_time=time.time() - 30.0)
    assert dog._is_judge()
    first.write()  # it goes on
    assert not dog._is_judge()
    later = Watchdog(heartbeat, run=run, attempt=1, rank=2, world_size=3, timeout_s=10.0)
    run.heartbeat_file(0).unlink()
    assert dog._is_judge() and not later._is_judge()
    time.sleep(0.55)
    assert later._is_judge()


def test_who_started_a_lone_rank_records_its_hang(run: RunDirectory) -> None:
    record_unreported_hang(run)  # nothing was begun
    assert run.read_state().attempts == []
    attempt = Attempt(run, world_size=1, max_steps=1)
    Heartbeat(run, rank=0, world_size=1, attempt=1).write(time=time.time() + 1.0)  # the file is rounded to 1 ms
    record_unreported_hang(run)
    assert read_state(run)["attempts"][-1]["exit_code"] == ExitCode.HANG
    assert attempt.end(ExitCode.INTERNAL) == ExitCode.HANG
    assert len(read_events(run.events_file)) == 1


DEADMAN = """
import ctypes, sys, threading, time
from anemoi_dist.process.deadman import Deadman
log = open(sys.argv[1], "w")
switch = Deadman(grace_s=3.0, code=6, log=log)
for _ in range(8):
    switch.hold(0.4)
    time.sleep(0.1)
if sys.argv[2] == "close":
    switch.close()
    time.sleep(4.0)
    sys.exit(0)
switch.hold(0.4)
ctypes.PyDLL(None).sleep(6000)  # with the interpreter lock
"""


def test_the_dead_mans_switch_needs_no_interpreter(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(DEADMAN)
    processes = {
        how: subprocess.Popen([sys.executable, str(script), str(tmp_path / how), how]) for how in ("close", "stuck")
    }
    codes = {how: process.wait(PATIENCE_S) for how, process in processes.items()}
    assert codes == {"close": 0, "stuck": 6}
    for how in codes:
        assert ('script.py", line 14 in <module>' in (tmp_path / how).read_text()) == (how == "stuck")
