from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_slurm import FakeSlurm, squeue_line

from anemoi_dist.launch.status import slurm_queue
from anemoi_dist.launch.status.slurm_queue import GONE, JobView, QueueError, SlurmQueue

#: As SLURM 22.05 prints it, with SLURM_TIME_FORMAT=%s.
RECORDED = """\
2|2|CANCELLED|Resources|0|1795357521|1795357521||0|
3|3_0|CANCELLED|Priority|0|1795357521|1795357521||0|
3|3_1|PENDING|Priority|0|N/A|N/A||0|
7|7|COMPLETED|None|0|1795357521|1795357561|node[1-2,4]|0|
6|6|FAILED|BadConstraints|0|1795357521|1795357521||1|
8|8|FAILED|NonZeroExitCode|0|1795357521|1795357521|node1|768|
1|1|RUNNING|None|1|1795357527|1795358127|node1|0|
9|9|PENDING|BeginTime|2|1795357527|1795358127||0|
10|10|COMPLETING|None|2|1795357527|1795358127|node1|0|
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "bin", monkeypatch)


def phases(view: JobView) -> list[bool]:
    return [view.is_waiting, view.is_running, view.is_completing, view.is_over]


def test_recorded_jobs(slurm):
    slurm.answer("squeue", RECORDED)
    views = SlurmQueue().views(["1", "2", "3_0", "3_1", "6", "7", "8", "9", "10"])
    assert views["1"] == JobView("1", "RUNNING", "", 1, 1795357527, 1795358127, "node1")
    assert views["2"] == JobView("2", "CANCELLED", "", 0, 1795357521, 1795357521, "", 0)
    assert [views["3_0"].state, views["3_1"].state, views["3_1"].job_id] == ["CANCELLED", "PENDING", "3_1"]
    assert (views["7"].nodes, views["7"].exit_code) == ("node[1-2,4]", 0)
    assert (views["8"].reason, views["8"].exit_code) == ("NonZeroExitCode", 3)
    assert views["6"].exit_code == 129, "killed by SIGHUP"
    assert (views["9"].reason, views["9"].restarts) == ("BeginTime", 2)
    for view in views.values():
        assert sum(phases(view)) == 1
    assert [phases(views[job]).index(True) for job in ("9", "1", "10", "2")] == [0, 1, 2, 3]
    [asked] = slurm.asked()
    assert "--states=all" in asked and "--jobs=1,10,2,3_0,3_1,6,7,8,9" in asked


def test_a_job_that_squeue_has_forgotten_is_looked_up(slurm):
    slurm.answer("squeue", squeue_line("1", "RUNNING"))
    slurm.answer(
        "sacct",
        "2|2|COMPLETED|1795357521|1795357561|node[1-2]|0:0\n"
        "4|3_1|CANCELLED by 1000|Unknown|1795357561|None assigned|0:0\n"
        "5|5|FAILED|1795357521|1795357561|node1|0:9\n6|6|TIMEOUT|1795357521|1795357561|node1|0:0\n",
    )
    views = SlurmQueue().views(["1", "2", "3_1", "5", "6", "7"])
    assert views["1"].is_running and views["7"] == JobView("7", GONE) and views["7"].is_over
    assert views["2"] == JobView("2", "COMPLETED", "", None, 1795357521, 1795357561, "node[1-2]", 0)
    assert views["3_1"] == JobView("3_1", "CANCELLED", "by 1000", None, None, 1795357561, "", 0)
    assert views["5"].exit_code == 137
    assert [words[0] for words in slurm.asked()] == ["squeue", "sacct"]
    assert "--jobs=2,3_1,5,6,7" in slurm.asked()[1]


@pytest.mark.parametrize("sacct", [{"errors": "Slurm accounting storage is disabled", "code": 1}, {"sleep_s": 3600}])
def test_without_accounting_a_purged_job_is_gone(slurm, sacct):
    slurm.answer("squeue", errors="slurm_load_jobs error: Invalid job id specified", code=1)
    slurm.answer("sacct", **sacct)
    assert SlurmQueue(timeout_s=0.3).views(["12"]) == {"12": JobView("12", GONE)}


def test_a_silent_slurmctld_is_said_and_not_waited_for(slurm):
    slurm.answer("squeue", sleep_s=3600)
    with pytest.raises(QueueError, match="slurmctld does not answer"):
        SlurmQueue(timeout_s=0.3).views(["12"])


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", "slurmctld does not answer"),
        ("slurm_load_jobs error: Socket timed out on send/recv operation", "slurmctld does not answer"),
        ("squeue: fatal: Unable to process configuration file", "SLURM refuses: squeue: fatal"),
        ("", "exit code 1"),
    ],
)
def test_errors_are_told_apart(slurm, said, told):
    slurm.answer("squeue", errors=said, code=1)
    with pytest.raises(QueueError, match=told) as error:
        SlurmQueue().views(["12"])
    assert error.value.exit_code == 3


def test_a_machine_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QueueError, match="cannot run squeue here"):
        SlurmQueue().views(["12"])


def test_what_is_no_job_id_is_not_asked(slurm):
    assert SlurmQueue().views(["--me", "", "12; rm", "12\n", "x", "1,2"]) == {}
    assert slurm.asked() == []


def test_a_users_environment_changes_nothing(slurm, monkeypatch):
    monkeypatch.setenv("SQUEUE_STATES", "PD")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    (slurm.folder / "squeue").write_text('#!/bin/sh\necho "12|12|$SQUEUE_STATES.|None|0|1|2||0|"\n')
    assert SlurmQueue().views(["12"])["12"].state == "."
    (slurm.folder / "squeue").write_text('#!/bin/sh\necho "12|12|$SLURM_TIME_FORMAT|None|0|1|2||0|"\n')
    assert SlurmQueue().views(["12"])["12"].state == "%s"
    assert os.environ["SQUEUE_STATES"] == "PD"


def test_cancel(slurm):
    slurm.answer("scancel")
    SlurmQueue().cancel("12")
    assert slurm.asked() == [["scancel", "12"]]
    over = "scancel: error: Kill job error on job id 12: Job/step already completing or completed"
    for said in (over, "scancel: error: Kill job error on job id 12: Invalid job id specified"):
        slurm.answer("scancel", errors=said, code=1)
        SlurmQueue().cancel("12")
    slurm.answer("scancel", errors="scancel: error: Kill job error on job id 12: Access/permission denied", code=1)
    with pytest.raises(QueueError, match="permission denied"):
        SlurmQueue().cancel("12")


@given(st.text(alphabet="12|_x\n N/A", max_size=200))
def test_any_output_is_read_without_an_error(text):
    for view in [*slurm_queue.parse_squeue(text), *slurm_queue.parse_sacct(text)]:
        assert isinstance(view[1], JobView)
