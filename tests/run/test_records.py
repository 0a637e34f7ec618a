"""``run.json`` of other versions and of damaged disks, read and written back."""

import pytest

from anemoi_dist.run.records import AttemptRecord, Failure, Owner, RunState, from_json, to_json

PROCESS = {"rank": 3, "host": "n7", "pid": 12}
HANG = {**PROCESS, "phase": "step", "step": 9, "silent_s": 3.5, "where": "m.py:1 in f", "behind": [3]}
#: As 0.1.0 wrote it.
STATE = {
    "state": "failed",
    "attempts": [
        {
            "attempt": 1,
            "started": 1.5,
            "world_size": 4,
            "max_steps": 10,
            "changes": [{"key": "training.lr.rate", "was": None, "is": 0.5}],
            "launcher": "slurm",
            "num_nodes": 2,
            "job_id": None,
            "life": 0,
            "ended": 2.5,
            "exit_code": 6,
            "state": "failed",
            "failure": {**PROCESS, "error": "hang: ...", "log": "l", "hang": {**HANG, "unresponsive": [PROCESS]}},
        },
        {"attempt": 2, "changes": [], "job_id": "7", "failure": {"error": "no", "returned": 9}},
    ],
    "owner": {"pid": 5, "host": "n7", "started": 77},
}


@pytest.mark.parametrize("more", [{}, {"changes": []}, {"of a newer version": {"a": 1}}, {"owner": None}])
def test_what_is_read_is_written_back(more):
    assert to_json(from_json(RunState, STATE | more)) == STATE | more


def test_values_of_the_wrong_type_count_as_absent():
    state = from_json(
        RunState, {"state": "running", "attempts": [1, None, {"started": "x", "exit_code": True}], "owner": 5}
    )
    assert state == RunState("running", attempts=[AttemptRecord(), AttemptRecord(), AttemptRecord()])
    assert from_json(Owner, {"pid": float("nan"), "host": 3, "started": 10**400}) == Owner()


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (Failure(returned=9, error="bash returned 9"), "the command returned 9"),
        (
            Failure(1, host="n1", pid=2, error="killed by SIGKILL", signal="SIGKILL"),
            "rank 1 on n1 (pid 2) was killed by SIGKILL",
        ),
        (
            Failure(1, host="n1", pid=2, error="Traceback (most recent):\n  f\nValueError: x"),
            "rank 1 on n1 (pid 2): ValueError: x",
        ),
        (Failure(), ""),
    ],
)
def test_a_failure_in_one_line(failure, line):
    assert AttemptRecord(failure=failure).failure_line == line
