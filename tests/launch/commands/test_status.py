from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from support.fake_slurm import FakeSlurm, squeue_line
from support.many_runs import NOBODY, attempt, make_many, make_run, write_beat, write_launch, write_state, write_steps

from anemoi_dist.config.compose import compose
from anemoi_dist.config.parse import to_yaml
from anemoi_dist.launch.cli import main
from anemoi_dist.launch.commands import runs
from anemoi_dist.launch.commands import status as status_command
from anemoi_dist.launch.status import files as facts_module
from anemoi_dist.launch.status import journal
from anemoi_dist.launch.status.files import gather
from anemoi_dist.launch.status.inspection import follow, inspect_run
from anemoi_dist.launch.status.run_status import STATES
from anemoi_dist.run.records import Failure, from_json


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "bin", monkeypatch)


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "runs"


def running(root: Path, run_id: str = "r"):
    """Return a run whose rank 0 is a process that lives, this one's parent."""
    state = {"state": "running", "attempts": [attempt(started=300)]}
    run = make_run(root, run_id, state={**state, "owner": {"pid": os.getppid(), "host": os.uname().nodename}})
    started = journal.process_started(os.getppid())
    write_launch(run, {"event": "launch", "kind": "local", "pid": os.getppid(), "started": started, "ago": 310})
    for rank in range(2):
        write_beat(run, rank)
    return run


# What the files say


def test_a_run_that_runs(root):
    facts = gather(running(root))
    assert (facts.launcher_alive, facts.kind, facts.job_id) == (True, "local", None)
    assert [beat.rank for beat in facts.beats] == [0, 1]
    assert (facts.beats[0].loss, facts.beats[1].loss) == (0.4, None)
    assert inspect_run(running(root)).state == "running"


def test_a_launchers_pid_given_to_another_process_is_nobody(root):
    run = make_run(root, "r")
    write_launch(run, {"event": "launch", "kind": "local", "pid": os.getpid(), "started": 1})
    assert gather(run).launcher_alive is False
    started = journal.process_started(os.getpid())
    write_launch(run, {"event": "launch", "kind": "local", "pid": os.getpid(), "started": started})
    assert gather(run).launcher_alive is True
    write_launch(run, {"event": "launch", "kind": "local", "pid": os.getpid(), "started": started, "host": "elsewhere"})
    assert gather(run).launcher_alive is None


def test_an_owners_pid_given_to_another_process_is_nobody(root):
    owner = {"pid": os.getpid(), "host": os.uname().nodename}
    run = make_run(root, "r", state={"state": "running", "owner": owner, "attempts": [attempt(started=0)]})
    assert gather(run).owner_alive is True
    write_state(run, {"state": "running", "owner": owner, "attempts": [attempt(started=1e6)]})
    assert gather(run).owner_alive is False, "this process began after the attempt"
    exact = {**owner, "started": journal.process_started(os.getpid())}
    write_state(run, {"state": "running", "owner": exact, "attempts": [attempt(started=1e6)]})
    assert gather(run).owner_alive is True, "it says itself when it began"
    exact["started"] -= 1
    write_state(run, {"state": "running", "owner": exact, "attempts": [attempt(started=0)]})
    assert gather(run).owner_alive is False
    write_state(run, {"state": "running", "owner": {**owner, "pid": NOBODY}, "attempts": [attempt(started=0)]})
    assert gather(run).owner_alive is False
    write_state(run, {"state": "running", "owner": {**owner, "host": "n7"}, "attempts": [attempt(started=0)]})
    assert (gather(run).owner_alive, gather(run).owner_host) == (None, "n7")


def test_only_heartbeats_of_this_attempt_count(root):
    run = make_run(root, "r", state={"state": "running", "attempts": [attempt(1, started=99), attempt(2, started=9)]})
    for rank in range(4):
        write_beat(run, rank, number=1)
    write_beat(run, 1, number=2)
    assert [(beat.rank, beat.attempt) for beat in gather(run).beats] == [(1, 2)]
    for rank in range(4):
        write_beat(run, rank, number=2)
    assert [beat.rank for beat in gather(run).beats] == [0, 1], "its world has two ranks"
    write_beat(run, 1, number=2, ago=300)
    assert [beat.rank for beat in gather(run, every_rank=False).beats] == [0, 1]
    write_beat(run, 1, number=2)
    assert [beat.rank for beat in gather(run, every_rank=False).beats] == [0]


def test_a_heartbeat_is_as_old_as_the_older_of_its_two_times(root):
    run = make_run(root, "r")
    write_beat(run, 0, ago=50, time=time.time() + 3600)
    [beat] = gather(run).beats
    assert 49 < time.time() - beat.seen < 60


HOSTILE = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"attempts": 1, "state": "running"}',
    b'"x"',
    b"1e999",
]


@pytest.mark.parametrize(
    "text", [*HOSTILE, b'{"state": "running", "attempts": [1, null, {"started": "x"}], "owner": 5}']
)
def test_damaged_files_are_passed_over(root, text):
    run = make_run(root, "r")
    run.state_file.write_bytes(text)
    run.heartbeat_file(0).write_bytes(text)
    run.events_file.write_bytes(text + b"\n" + text)
    run.launch_file.write_bytes(
        text + b'\n{"event": "launch", "step": 0}\n{"event": "launch", "time": "x", "step": 0}\n'
    )
    found = gather(run)
    assert found.beats == () and found.launch == () and found.step_event is None
    assert bool(found.damage) == (b'"owner"' not in text)
    assert inspect_run(run).state in STATES


def test_of_a_huge_event_log_only_the_end_is_read(root):
    run = make_run(root, "r")
    write_steps(run, 5)
    line = run.events_file.read_bytes().splitlines()[-1].replace(b'"step": 5', b'"step": 77')
    with run.events_file.open("r+b") as stream:
        stream.truncate(3 << 30)  # sparse: gigabytes that nobody could read in time
        stream.seek(0, os.SEEK_END)
        stream.write(b"\n" + line + b"\n" + line[:20])
    began = time.perf_counter()
    assert gather(run).step_event.step == 77
    assert time.perf_counter() - began < 1
    assert facts_module.TAIL_BYTES < 1 << 20


# runs


def test_runs_are_listed_with_the_newest_last(root, slurm, capsys):
    running(root, "busy")
    old = make_run(root, "old", state={"state": "finished", "attempts": [attempt(started=9000, code=0, ended=8000)]})
    write_steps(old, 20)
    write_launch(make_run(root, "queued"), {"event": "submit", "kind": "slurm", "job_id": "12", "ago": 5})
    write_launch(make_run(root, "purged"), {"event": "submit", "kind": "slurm", "job_id": "13", "ago": 7000})
    (root / "not-a-run").mkdir()
    slurm.answer("squeue", squeue_line("12", "PENDING", reason="Priority"))
    assert main(["runs", "--root", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == " ".join(runs._COLUMNS).split()
    assert [line.split()[0] for line in lines[1:5]] == ["old", "purged", "busy", "queued"]
    assert lines[3].split() == ["busy", "running", "1", "-", "40/1000", "12.0", "0.4000", "1", "s", "ago", "9:59"]
    assert lines[4].split() == ["queued", "submitted", "-", "12", "-", "-", "-", "-", "-"]
    assert "queued: job 12 waits: Priority" in lines
    assert any(line.startswith("purged: SLURM no longer knows job 13") for line in lines)
    assert [words[0] for words in slurm.asked()] == ["squeue", "sacct"], "one question for all"
    assert main(["runs", "--root", str(root), "--json"]) == 0
    listed = {run["run_id"]: run for run in json.loads(capsys.readouterr().out)}
    assert (listed["busy"]["step"], listed["old"]["state"], listed["old"]["step"]) == (40, "finished", 20)


def test_runs_by_state_and_by_loss(root, slurm, capsys):
    for name, loss in (("a", 0.5), ("b", None), ("c", 0.25)):
        run = make_run(root, name, state={"state": "running", "owner": None, "attempts": [attempt(started=300)]})
        write_beat(run, 0, loss=loss)
    make_run(root, "d", state={"state": "finished", "attempts": [attempt(started=300, code=0)]})
    assert main(["runs", "--root", str(root), "--sort", "loss", "--state", "running"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:4]] == ["run", "b", "a", "c"]
    assert main(["runs", "--root", str(root), "--state", "lost"]) == 0
    assert "no such runs in" in capsys.readouterr().out
    assert main(["runs", "--root", str(root), "--state", "over"]) == 2
    assert "is no state of a run" in capsys.readouterr().err


def test_slurm_is_not_asked_about_finished_runs(root, slurm):
    run = make_run(root, "r", state={"state": "finished", "attempts": [attempt(started=99, code=0)]})
    write_launch(run, {"event": "launch", "kind": "slurm", "job_id": "12"}, {"event": "end", "code": 0})
    assert main(["runs", "--root", str(root)]) == 0
    assert slurm.asked() == []


def test_a_silent_slurmctld_is_said_once(root, slurm, capsys):
    for name in ("a", "b", "c"):
        write_launch(make_run(root, name), {"event": "submit", "kind": "slurm", "job_id": "12", "ago": 60})
    slurm.answer("squeue", errors="slurm_load_jobs error: Unable to contact slurm controller", code=1)
    assert main(["runs", "--root", str(root)]) == 0
    out = capsys.readouterr().out
    assert out.count("slurmctld does not answer") == 1 and "(a and 2 others)" in out
    assert out.count("unknown") == 3


def test_no_runs(root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["runs", "--root", str(root)]) == 0
    assert capsys.readouterr().out == f"no runs in {root} yet\n"
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == "no runs in ./runs yet\n"
    assert main(["runs", "--json"]) == 0
    assert capsys.readouterr().out == "[]\n"
    assert main(["status", "r"]) == 2
    assert "fix: --root DIR" in capsys.readouterr().err
    root.write_text("")
    assert main(["runs", "--root", str(root)]) == 2
    root.unlink()
    root.mkdir()
    assert main(["runs", "--root", str(root)]) == 0
    assert "no runs in" in capsys.readouterr().out


# status


def test_status_says_all_that_is_known(root, slurm, capsys):
    run = make_run(root, "r", state={"state": "running", "attempts": [attempt(started=300)]})
    write_launch(run, {"event": "launch", "kind": "slurm", "job_id": "12", "ago": 310})
    write_beat(run, 0)
    write_beat(run, 1, ago=200)
    end = int(time.time()) + 3600
    slurm.answer("squeue", squeue_line("12", "RUNNING", nodes="node[1-2]", start=end - 4000, end=end))
    assert main(["status", "r", "--root", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("state      silent: rank 1 on n1 is silent for 3:20 in step at step 40") for line in lines
    )
    assert any(line.startswith("job        12 on node[1-2], ") for line in lines)
    assert "silent     rank 1 for 3:20: step, step 40, process 41 on n1" in lines
    assert main(["status", str(run.path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["silent"][0]["rank"], told["nodes"]) == ("silent", 1, "node[1-2]")


def test_of_a_failed_run_the_error_is_shown(root, capsys):
    failure = {"rank": 0, "host": "n0", "pid": 7, "error": "model.dilations=[0]: must hold numbers\n  fix: 1"}
    refused = attempt(started=9, code=2, ended=5) | {"failure": failure}
    run = make_run(root, "r", state={"state": "failed", "attempts": [refused]})
    write_launch(run, {"event": "launch", "kind": "local", "pid": NOBODY, "ago": 310}, {"event": "end", "code": 2})
    assert main(["status", "r", "--root", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("state      failed: code 2: the configuration was refused, ")
    assert lines[2] == "reason     rank 0 on n0 (pid 7): model.dilations=[0]: must hold numbers"
    assert main(["runs", "--root", str(root)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "   rank 0 on n0 (pid 7): model.dilations=[0]: must hold numbers"
    assert main(["status", "r", "--root", str(root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nodes"] is None
    traced = {**failure, "error": "Traceback (most recent call last):\n  File x\nValueError: broke\n"}
    assert from_json(Failure, traced).line == "rank 0 on n0 (pid 7): ValueError: broke"
    assert from_json(Failure, {"error": 3}).line == ""


def test_an_unknown_run_has_near_matches(root, capsys):
    running(root, "first")
    for name in ("status", "logs", "stop", "cancel", "resume"):
        assert main([name, "frist", "--root", str(root)]) == 2
        assert "nearest: first" in capsys.readouterr().err


def test_of_many_runs_only_the_near_ones_are_named(two_hundred, capsys):
    assert main(["status", "mien", "--root", str(two_hundred)]) == 2
    error = capsys.readouterr().err
    assert "nearest: mine" in error and "era5_sample" not in error


def test_following_ends_with_the_run(root, monkeypatch, capsys):
    run = running(root)
    follower = follow(run, read_s=0.02)
    assert next(follower).state == "running"
    write_beat(run, 0, step=41)
    assert next(follower).step == 41
    write_state(run, {"state": "finished", "owner": None, "attempts": [attempt(started=300, code=0)]})
    write_launch(run, {"event": "end", "code": 0})
    assert [status.state for status in follower] == ["finished"]


def test_following_goes_on_over_a_requeue_and_spares_slurm(root, slurm):
    run = make_run(root, "r", state={"state": "running", "attempts": [attempt(started=300)]})
    write_launch(run, {"event": "launch", "kind": "slurm", "job_id": "12", "ago": 310})
    write_beat(run, 0)
    slurm.answer("squeue", squeue_line("12", "RUNNING"))
    follower = follow(run, read_s=0.01, ask_s=60)
    assert [next(follower).state for _ in range(5)] == ["running"] * 5
    assert len(slurm.asked()) == 1
    slurm.answer("squeue", squeue_line("12", "PENDING", reason="BeginTime", restarts=1))
    write_launch(run, {"event": "requeue", "code": 75})
    assert [next(follower).state for _ in range(3)] == ["requeued"] * 3
    assert len(slurm.asked()) == 2, "the journal has changed: SLURM's answer was an old one"


def test_follow_prints_what_changes(root, monkeypatch, capsys):
    run = running(root)
    monkeypatch.setattr(status_command, "follow", lambda run: follow(run, read_s=0.02))

    def end() -> None:
        time.sleep(0.3)
        write_state(run, {"state": "preempted", "owner": None, "attempts": [attempt(started=300, code=75)]})
        write_launch(run, {"event": "end", "code": 75, "reason": "the stop file"})

    thread = threading.Thread(target=end)
    thread.start()
    assert main(["status", "r", "--root", str(root), "--follow"]) == 0
    thread.join()
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop().strip() == "the stop file"
    assert 2 <= len(lines) <= 3, "perhaps stopping, between the two"
    assert "attempt 1, step 40/1000  loss 0.4000  12.0 samples/s" in lines[0] and "preempted" in lines[-1]


# Quick, and without what is slow to import


@pytest.fixture(scope="module")
def two_hundred(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("many") / "runs"
    make_many(root, 200, config=to_yaml(compose([]).config))
    run = make_run(root, "mine", state={"state": "finished", "attempts": [attempt(started=300, code=0)]})
    run.logs_dir(1).mkdir(parents=True)
    run.log_file(1, 0).write_text("hello\n")
    return root


#: Of one run: its record, its journal, the end of its events and a heartbeat of each of its 8 ranks.
MOST_FILES = 3 + 8
#: Runs a command and says what it cost: files opened, processes started, modules that are slow to import.
COUNTING = """
import collections, json, os, sys
opened, started = collections.Counter(), []
def count(event, arguments):
    if event == "open" and not isinstance(arguments[0], int):
        opened[os.fsdecode(arguments[0])] += 1
    elif event == "subprocess.Popen":
        started.append(os.path.basename(os.fsdecode(arguments[0])))
sys.addaudithook(count)
from anemoi_dist.launch.cli import main
code = main(sys.argv[1:])
slow = {"torch", "hydra", "omegaconf", "yaml", "numpy", "rich"} & set(sys.modules)
print(json.dumps({"code": code, "opened": opened, "started": started, "slow": sorted(slow)}), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "processes"),
    [
        (["runs"], 0, ["squeue"]),
        (["runs", "--json"], 0, ["squeue"]),
        (["status", "mine"], 0, []),
        (["logs", "mine"], 0, []),
        (["stop", "mine"], 2, []),
        (["cancel", "mine"], 2, []),
    ],
)
def test_what_looking_at_200_runs_costs(two_hundred, arguments, code, processes, slurm):
    slurm.answer("squeue", "".join(squeue_line(str(1000 + index), "PENDING") for index in range(200)))
    command = [sys.executable, "-c", COUNTING, *arguments, "--root", str(two_hundred)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    cost = json.loads(done.stderr.splitlines()[-1])
    assert cost["code"] == code and cost["slow"] == [] and cost["started"] == processes
    opened = {path: times for path, times in cost["opened"].items() if path.startswith(f"{two_hundred}/")}
    runs = Counter(Path(path).relative_to(two_hundred).parts[0] for path, times in opened.items() for _ in range(times))
    if arguments[0] != "runs":
        assert runs.keys() <= {"mine"}, "another run was looked at"
    assert max(runs.values()) <= MOST_FILES, runs.most_common(3)
    if arguments == ["runs"]:
        states = Counter(line.split()[1] for line in done.stdout.splitlines()[1:202])
        assert states == {"finished": 41, "running": 40, "crashed": 40, "submitted": 40, "failed": 40}
