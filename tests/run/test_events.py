import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anemoi_dist.run.events import EventLog, latest_by_step, plain, read_events


@pytest.fixture
def path(tmp_path):
    return tmp_path / "events.jsonl"


def test_an_event_is_one_json_line_with_name_time_and_step(path):
    log = EventLog(path, clock=lambda: 12.3456)
    returned = log.write("step", step=7, loss=0.5, engine="zero2", scores=[{"rmse": 1.5}])
    log.close()
    assert path.read_text().count("\n") == 1
    assert json.loads(path.read_text()) == returned
    assert returned == {
        "event": "step", "time": 12.346, "step": 7, "loss": 0.5, "engine": "zero2", "scores": [{"rmse": 1.5}],
    }  # fmt: skip


def test_each_event_is_one_write_on_a_descriptor_that_appends(path, monkeypatch):
    log, writes, write = EventLog(path), [], os.write
    monkeypatch.setattr(os, "write", lambda fd, data: writes.append(data) or write(fd, data))
    log.write("start", step=0)
    log.write("step", step=1)
    assert [data[-1:] for data in writes] == [b"\n", b"\n"]
    path.write_text("")  # someone else truncated it: an append goes to the new end, not to the old offset
    log.write("step", step=2)
    assert [event["step"] for event in read_events(path)] == [2]


def test_an_event_can_be_read_before_the_log_is_closed(path):
    log = EventLog(path)
    log.write("step", step=1)
    assert [event["step"] for event in read_events(path)] == [1]
    log.close()
    log.close()


def test_events_that_a_full_disk_cuts_short_are_counted_and_the_next_begins_a_line(path, monkeypatch, capsys):
    log, write, room = EventLog(path), os.write, [150]

    def on_full_disk(descriptor, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", on_full_disk)
    for step in range(1, 7):
        log.write("step", step=step, text="x" * 20)
    room[0] = 10**6
    log.write("step", step=7)
    log.write("step", step=8)
    log.close()
    events = read_events(path)
    assert [(event["event"], event["step"]) for event in events] == [("step", 1), ("step", 7), ("lost", 7), ("step", 8)]
    assert events[2]["output"] == [{"what": str(path), "count": 5, "reason": "No space left on device"}]
    assert path.read_text().count("\n") == 5  # one line is torn, and no other is joined with it
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_a_log_that_cannot_be_opened_is_opened_as_soon_as_it_can_be(tmp_path):
    path = tmp_path / "later" / "events.jsonl"
    log = EventLog(path)
    log.write("step", step=1)
    path.parent.mkdir()
    log.write("step", step=2)
    assert [(event["event"], event["step"]) for event in read_events(path)] == [("step", 2), ("lost", 2)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float32("nan"), torch.tensor(np.inf)])
def test_what_is_not_finite_becomes_null(path, value):
    EventLog(path).write("skipped_update", step=1, loss=value, nested=[{"x": value}])
    event = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert event["loss"] is None
    assert event["nested"] == [{"x": None}]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(0.5), 0.5),
        (np.int64(3), 3),
        (torch.tensor(2), 2),
        (np.bool_(True), True),
        ((1, 2), [1, 2]),
        ({1: Path("a/b")}, {"1": "a/b"}),
        (None, None),
        ("ünï", "ünï"),
    ],
)
def test_plain_values(value, expected):
    assert plain(value) == expected
    assert json.loads(json.dumps(plain(value))) == expected


def test_an_object_that_is_no_json_is_refused_by_name(path):
    with pytest.raises(TypeError, match="cannot hold a set"):
        EventLog(path).write("start", step=0, versions={1})
    assert path.read_text() == ""


@given(cut=st.integers(min_value=0))
def test_after_a_kill_at_any_byte_the_whole_lines_and_the_next_event_are_read(cut):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.jsonl"
        log = EventLog(path)
        for step in range(3):
            log.write("step", step=step, text="a\nb")
        log.close()
        whole = path.read_bytes()
        cut %= len(whole) + 1
        path.write_bytes(whole[:cut])
        EventLog(path).write("start", step=9)
        # A line is whole as soon as its object is: only the newline may be missing.
        num_whole = sum(cut >= len(b"\n".join(whole.split(b"\n")[: n + 1])) for n in range(3))
        assert [event["step"] for event in read_events(path)] == [*range(num_whole), 9]


def test_lines_that_are_no_events_are_passed_over(path):
    path.write_bytes(b'{"event":"step","step":1}\n\0\0\0\n[1]\n{"step":2}\n\xff\n{"event":"end","step":3}\n')
    assert [event["step"] for event in read_events(path)] == [1, 3]


def test_a_missing_file_has_no_events(path):
    assert read_events(path) == []


def test_the_last_event_of_a_repeated_step_wins():
    events = [
        {"event": "start", "step": 0, "resumed_from_step": None},
        *({"event": "step", "step": step, "loss": 1} for step in (10, 20, 30, 40)),
        {"event": "start", "step": 20, "resumed_from_step": 20},
        {"event": "step", "step": 30, "loss": 2},
    ]
    found = latest_by_step(events, "step")
    # Step 40 belongs to a history that the resumed run has left and not reached again.
    assert {step: event["loss"] for step, event in found.items()} == {10: 1, 20: 1, 30: 2}
    assert list(latest_by_step([{"event": "step", "step": step} for step in (3, 1, 2)], "step")) == [1, 2, 3]


def test_events_are_chosen_by_field():
    events = [
        {"event": "validation", "step": 5, "split": "validation"},
        {"event": "validation", "step": 5, "split": "test"},
    ]
    assert latest_by_step(events, "validation", split="validation") == {5: events[0]}
    assert latest_by_step(events, "validation", split="test") == {5: events[1]}


def test_reading_events_and_reporting_import_no_torch():
    code = (
        "import sys, anemoi_dist.run.events, anemoi_dist.report.page, anemoi_dist.report.sections;"
        "print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
