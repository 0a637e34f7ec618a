from __future__ import annotations

import os

import pytest

from anemoi_dist.launch.status import journal
from anemoi_dist.run.directory import RunDirectory


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = RunDirectory.locate(tmp_path, "r")
    run.create()
    return run


def test_what_is_noted_is_read_in_order(run):
    assert journal.read(run) == []
    journal.note(run, "submit", kind="slurm", job_id="12")
    journal.note(run, "launch", kind="slurm", job_id="12")
    journal.note(run, "requeue", code=75)
    events = journal.read(run)
    assert [event.event for event in events] == ["submit", "launch", "requeue"]
    assert (events[2].code, events[2].pid) == (75, os.getpid())
    assert journal.last(events, "submit", "launch").event == "launch"
    assert journal.last(events, "cancel") is None


def test_an_unknown_event_is_refused(run):
    with pytest.raises(ValueError, match="not one of"):
        journal.note(run, "sumbit")
    assert journal.read(run) == []
