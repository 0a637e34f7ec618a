from __future__ import annotations

import pytest
from support.many_runs import write_state

from anemoi_dist.config.schema import LauncherConfig
from anemoi_dist.launch.launchers import supervisor
from anemoi_dist.launch.status import journal
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.events import EventLog


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = RunDirectory.locate(tmp_path, "r")
    run.create()
    return run


@pytest.mark.parametrize(
    ("attempts", "agent_code", "interrupted", "code", "said"),
    [
        ([{"attempt": 1, "exit_code": 5}, {"attempt": 2, "exit_code": 0}], 0, False, 0, ""),
        ([{"attempt": 1, "exit_code": 0}, {"attempt": 2, "exit_code": 75}], 1, True, 75, ""),
        ([{"attempt": 1, "exit_code": 0}, {"attempt": 2, "exit_code": 70}], 1, False, 70, "attempt-02"),
        (
            [{"attempt": 1, "exit_code": 0}, {"attempt": 2, "exit_code": 70, "failure": {"returned": 9}}],
            70,
            False,
            70,
            "the command returned 9; `anemoi-dist logs r` has what it printed",
        ),
        ([{"attempt": 1, "exit_code": 0}, {"attempt": 2}], 1, False, 70, "attempt-02"),
        ([{"attempt": 1, "exit_code": 0}, {"attempt": 2}], 143, True, 130, "before anything new was saved"),
        ([{"attempt": 1, "exit_code": 0}], 3, False, 3, ""),
        ([{"attempt": 1, "exit_code": 0}], 1, False, 70, "no rank got as far"),
        ([{"attempt": 1, "exit_code": 0}], 0, False, 0, ""),
        ([{"attempt": 1, "exit_code": 0}], 143, True, 130, "before anything"),
    ],
)
def test_ending(run, attempts, agent_code, interrupted, code, said):
    write_state(run, {"state": "running", "attempts": attempts})
    ending = supervisor.read_ending(run, agent_code, attempts_before=1, interrupted=interrupted)
    assert ending.code == code
    assert said in ending.message
    assert bool(ending.message) == bool(said)


def test_a_start_that_has_saved_makes_the_next_wait_the_first_again(run, monkeypatch):
    saves = iter([False, False, True, False, False, False])

    def run_once(job, stopper, restarts):
        if next(saves):
            log = EventLog(run.events_file)
            log.write("checkpoint", step=10)
            log.close()
        return supervisor.Ending(70)

    monkeypatch.setattr(supervisor, "_run_once", run_once)
    monkeypatch.setattr(supervisor._Stopper, "wait", lambda self, seconds: False)
    job = supervisor.Job(run, "local", lambda restarts: [], {}, lambda process, number: None, {})
    supervisor.supervise(job, LauncherConfig(max_restarts=5, backoff_s=1.0))
    waits = [entry.wait_s for entry in journal.read(run) if entry.event == "restart"]
    assert waits == [1.0, 2.0, 1.0, 1.0, 2.0]
