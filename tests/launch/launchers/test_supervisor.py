from __future__ import annotations

import pytest
from support.many_runs import write_state

from anemoi_dist.launch.launchers import supervisor
from anemoi_dist.run.directory import RunDirectory


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
