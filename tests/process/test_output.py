from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading

import pytest

from anemoi_dist.process import output
from anemoi_dist.process.output import LOSSES, AppendedFile, Losses, Output

ENOSPC = OSError(errno.ENOSPC, "No space left on device")
CLOSED = """
import os, sys
for number in ({closed}): os.close(number)
from anemoi_dist.process.output import fill_descriptors
fill_descriptors()
opened = os.open("/dev/null", os.O_RDONLY)
code = [opened > 2, *(os.get_inheritable(number) for number in range(3))]
os._exit(0 if all(code) else 1)
"""
PIPED = """
import sys
from anemoi_dist.process.output import LOSSES, protect_output
protect_output()
for number in range(1000): print("line", number, "x" * 1000, flush=True)
sys.stderr.write(str(LOSSES.take(failing=True)))
"""


def full_disk(monkeypatch, room):
    """Let ``os.write`` write as many bytes as ``room[0]`` says."""
    write = os.write

    def limited(descriptor, data):
        if not room[0]:
            raise ENOSPC
        written = write(descriptor, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(output.os, "write", limited)


def test_a_log_on_a_full_disk_goes_on_with_a_fresh_line_and_says_how_many_are_missing(tmp_path, monkeypatch):
    path, room = tmp_path / "log", [16]
    stream = output.open_log(path)
    full_disk(monkeypatch, room)
    for number in range(4):
        print("a line", number, file=stream)
    room[0] = 1000
    print("a line", 4, file=stream)
    stream.close()
    assert path.read_text().splitlines() == [
        "a line 0",
        "a line ",
        "[3 lines are missing here: No space left on device]",
        "a line 4",
    ]
    assert LOSSES.take() == [{"what": str(path), "count": 3, "reason": "No space left on device"}]


def test_a_loss_is_reported_once_and_again_after_the_destination_has_worked(capsys):
    losses = Losses()
    for _ in range(3):
        losses.note("the log", ENOSPC)
    assert capsys.readouterr().err.count("the log cannot be written (No space left on device)") == 1
    assert losses.take() == []  # it still fails: the count is not final
    losses.end("the log")
    losses.note("metrics", ENOSPC, count=5)
    assert losses.take() == [{"what": "the log", "count": 3, "reason": "No space left on device"}]
    losses.note("the log", ENOSPC)
    assert capsys.readouterr().err.count("the log cannot be written") == 1
    taken = losses.take(failing=True)
    assert {loss["what"]: loss["count"] for loss in taken} == {"metrics": 5, "the log": 1}
    losses.put_back(taken)
    assert losses.take(failing=True) == taken


def test_lines_of_two_threads_are_not_mixed(tmp_path):
    stream = Output(AppendedFile("log", path=tmp_path / "log"))
    stream.write("one ")
    thread = threading.Thread(target=lambda: print("two", file=stream))
    thread.start()
    thread.join()
    print("line", file=stream)
    assert (tmp_path / "log").read_text() == "two\none line\n"


@pytest.mark.parametrize("closed", ["0,", "1,", "2,", "0, 1, 2"])
def test_closed_descriptors_are_the_null_device_for_the_process_and_its_children(closed):
    assert subprocess.run([sys.executable, "-c", CLOSED.format(closed=closed)]).returncode == 0


def test_a_reader_that_goes_away_is_a_loss_and_no_end():
    process = subprocess.Popen([sys.executable, "-c", PIPED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("line 0 ")
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0
    # A megabyte never fits into a pipe that nobody reads.
    assert said.count("standard output cannot be written (Broken pipe)") == 1
    assert "'reason': 'Broken pipe'" in said


def test_standard_error_that_cannot_be_written_is_counted_and_reported_nowhere(monkeypatch):
    room = [0]
    full_disk(monkeypatch, room)
    monkeypatch.setattr(sys, "stderr", Output(AppendedFile("standard error", descriptor=2)))
    print("text", file=sys.stderr)
    print("text", file=sys.stderr)
    assert LOSSES.take(failing=True) == [{"what": "standard error", "count": 2, "reason": "No space left on device"}]
