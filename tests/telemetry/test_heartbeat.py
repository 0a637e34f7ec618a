"""Signs of life: whose they are, what they cost, and what a reader makes of old and torn ones."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.waiting import PATIENCE_S, wait_until

from anemoi_dist.checkpoint.worker import Worker
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.telemetry import heartbeat
from anemoi_dist.telemetry.heartbeat import Heartbeat, clear_beyond, read_heartbeat, read_heartbeats


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.locate(tmp_path, "r")
    run.create()
    return run


@pytest.fixture
def beating(run: RunDirectory) -> Iterator[Heartbeat]:
    made = Heartbeat(run, rank=1, world_size=2, attempt=3, num_collectives=lambda: 42, interval_s=0.02)
    made.start()
    yield made
    made.close()


def test_the_file_says_who_is_where(run: RunDirectory, beating: Heartbeat) -> None:
    before = time.time()
    heartbeat.beat("step", step=7)
    heartbeat.note(loss=0.5, eta_s=float("nan"))
    assert wait_until(lambda: read_heartbeat(run.heartbeat_file(1)).loss is not None, every_s=0.005)
    content = read_heartbeat(run.heartbeat_file(1))
    assert (content.rank, content.attempt, content.phase, content.step) == (1, 3, "step", 7)
    assert content.time >= before - 0.01 and content.pid > 0 and content.host
    assert content.loss == 0.5 and content.eta_s is None and content.collectives == 42
    beating.close()
    assert read_heartbeat(run.heartbeat_file(1)).phase == "end"
    assert [path.name for path in run.heartbeats_dir.iterdir()] == ["rank-00001.json"]
    heartbeat.beat("step")  # nobody listens any more
    assert beating.phase == "end"


def test_a_training_thread_that_is_stuck_goes_silent(
    run: RunDirectory, beating: Heartbeat, monkeypatch: pytest.MonkeyPatch
) -> None:
    heartbeat.beat("validation")
    assert wait_until(lambda: read_heartbeat(run.heartbeat_file(1)).phase == "validation", every_s=0.005)
    first, last = run.heartbeat_file(1).read_text(), beating._last
    helper = threading.Thread(target=lambda: [heartbeat.beat("step") for _ in range(20)])
    helper.start()
    helper.join()
    rounds, wait = threading.Semaphore(0), beating._closed.wait
    monkeypatch.setattr(beating._closed, "wait", lambda seconds: rounds.release() or wait(seconds))
    for _ in range(3):
        assert rounds.acquire(timeout=PATIENCE_S)
    assert run.heartbeat_file(1).read_text() == first, "another thread's word does not count"
    assert beating._last == last


def test_who_waits_for_a_thread_lives_by_its_progress(beating: Heartbeat, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def work() -> str:
        heartbeat.beat()
        begun.set()
        assert may_end.wait(PATIENCE_S)
        return ""

    job, last = Worker().submit(work), beating._last
    assert begun.wait(PATIENCE_S) and beating._last == last, "nobody has waited for it yet"
    wait = job._done.wait
    monkeypatch.setattr(job._done, "wait", lambda _: wait(0.01))
    follow = beating.follow
    monkeypatch.setattr(beating, "follow", lambda: [follow(), may_end.set()])
    job.wait()
    followed = beating._last
    assert followed > last
    Worker().submit(lambda: "").wait()
    assert beating._last == followed, "no progress, no sign of life"


def test_phases_nest(beating: Heartbeat) -> None:
    heartbeat.beat("step")
    with heartbeat.during("checkpoint"):
        assert beating.phase == "checkpoint"
    assert beating.phase == "step"


def test_a_sign_of_life_touches_no_file(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step gives several: only the thread that writes may open files."""
    made = Heartbeat(run, rank=0, world_size=1, attempt=1)
    before = sorted(run.heartbeats_dir.iterdir())
    monkeypatch.setattr(Heartbeat, "write", lambda *_, **__: pytest.fail("written by the training thread"))
    for step in range(100):
        made.beat("step", step=step)
    assert made.step == 99 and sorted(run.heartbeats_dir.iterdir()) == before


def test_a_file_that_cannot_be_written_is_no_reason_to_end(
    run: RunDirectory, beating: Heartbeat, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.heartbeat_file(1).unlink()
    run.heartbeats_dir.rename(run.path / "gone")
    heartbeat.beat()
    tried, write = threading.Event(), beating.write
    monkeypatch.setattr(beating, "write", lambda: [tried.set(), write()])
    assert tried.wait(PATIENCE_S)
    (run.path / "gone").rename(run.heartbeats_dir)
    heartbeat.beat()
    assert wait_until(lambda: run.heartbeat_file(1).exists(), every_s=0.005)


def test_many_ranks_write_less_often(run: RunDirectory) -> None:
    intervals = [Heartbeat(run, rank=0, world_size=n, attempt=1).interval_s for n in (1, 500, 10_000)]
    assert intervals == [2.0, 2.0, 40.0]


def test_old_attempts_and_torn_files_are_passed_over(run: RunDirectory) -> None:
    for rank, attempt in ((0, 2), (1, 1), (2, 2), (9, 2)):
        content = {"rank": rank, "attempt": attempt, "time": 1.0}
        run.heartbeat_file(rank).write_text(json.dumps(content))
    run.heartbeat_file(2).write_text('{"rank": 2, "att')
    assert read_heartbeats(run, attempt=2).keys() == {0, 9}
    clear_beyond(run, world_size=3)
    assert sorted(path.name for path in run.heartbeats_dir.iterdir()) == [f"rank-0000{n}.json" for n in (0, 1, 2)]
    assert read_heartbeat(run.heartbeat_file(7)) is None
