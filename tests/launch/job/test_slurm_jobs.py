"""Jobs of a real SLURM cluster of four nodes, with everything that goes wrong in one."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.anemoi_sample import overrides
from support.faults import FAULTS, INTERVAL, LONG, TWO_BY_TWO, Outcome, SlurmRun, anemoi_dist, play, table
from support.minislurm import MiniSlurm
from support.runs import assert_equal_bit_for_bit, command, finish, start
from support.waiting import wait_until

from anemoi_dist.run.events import read_events

#: One rank on each of two nodes: what a machine that tests something else at the same time can bear.
TWO_BY_ONE = [*TWO_BY_TWO, "launcher.ranks=1"]
#: Faults that other tests inflict, or that come to the same as another: `python -m support.faults` has them too.
SEEN = ("time limit", "scontrol requeue", "kill -9 of a rank")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, bool], Path]:
    """Runs that nothing happens to, without SLURM, by (ranks, whether long); started when first asked for."""
    root = tmp_path_factory.mktemp("undisturbed")

    class Runs(dict[tuple[int, bool], Path]):
        def __missing__(self, key: tuple[int, bool]) -> Path:
            ranks, long = key
            overrides = [o for o in [*TWO_BY_TWO, *(LONG if long else ())] if not o.startswith("launcher")]
            code, output = finish(start(command(root, f"r{ranks}-{long}", f"launcher.ranks={ranks}", small=overrides)))
            assert code == 0, output
            self[key] = root / f"r{ranks}-{long}"
            return self[key]

    return Runs()


def state_of(run: SlurmRun) -> dict[str, object]:
    return json.loads((run.directory / "run.json").read_text())


def test_a_job_goes_through_a_time_limit(
    cluster: MiniSlurm, undisturbed: dict[tuple[int, bool], Path], tmp_path: Path
) -> None:
    outcome = play(cluster, tmp_path / "it's 50% #1", "time limit", *TWO_BY_ONE)
    run = outcome.run
    assert outcome.state == "COMPLETED", run.log
    assert [e["code"] for e in run.launches("end")] == [75, 0]
    assert [(e["code"], e["count"]) for e in run.launches("requeue")] == [(75, 1)]
    assert [e["life"] for e in run.launches("launch")] == [0, 1]
    assert [attempt["job_id"] for attempt in state_of(run)["attempts"]] == [str(run.job_id)] * 2
    assert run.steps_repeated() == 0, "it saved where it stopped"
    assert not run.left_running()
    assert "starts: zero2 on 2 ranks" in run.log and "resumes at step" in run.log, "one log for both lives"
    assert run.log.count("all-reduce over 2 ranks") == 2, "the preflight of each life"
    assert_equal_bit_for_bit(undisturbed[2, False], run.directory)
    root = str(run.directory.parent).replace("'", "\\'")
    again = anemoi_dist(cluster, "submit", *TWO_BY_ONE, f"run.root='{root}'", f"run.id={run.directory.name}")
    assert again.returncode == 0 and "is finished" in again.stdout, "there is nothing left to do"
    assert len(state_of(run)["attempts"]) == 2


@pytest.fixture(scope="module")
def outcomes() -> Iterator[list[tuple[str, Outcome]]]:
    found: list[tuple[str, Outcome]] = []
    yield found
    if found:
        print(f"\n{table(found)}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAULTS if name not in SEEN])
def test_a_run_gets_through(
    cluster: MiniSlurm,
    undisturbed: dict[tuple[int, bool], Path],
    outcomes: list[tuple[str, Outcome]],
    tmp_path: Path,
    name: str,
) -> None:
    fault = FAULTS[name]
    outcome = play(cluster, tmp_path, name, *TWO_BY_ONE)
    run = outcome.run
    outcomes.append((name, outcome))
    assert outcome.state == "COMPLETED", run.log
    assert state_of(run)["state"] == "finished", run.log
    long = fault.overrides == LONG
    assert run.steps_repeated() <= (50 if long else INTERVAL)
    assert not run.left_running()
    assert len(run.events("start")) == 1 + fault.interrupts, "nothing started that need not"
    assert_equal_bit_for_bit(undisturbed[2, long], run.directory)


@pytest.mark.slow
def test_a_cancelled_run_says_so_and_can_be_resumed(
    cluster: MiniSlurm, undisturbed: dict[tuple[int, bool], Path], tmp_path: Path
) -> None:
    run = SlurmRun(cluster, tmp_path, "cancelled", *TWO_BY_ONE)
    run.wait_for_step(12)
    cluster.run("scancel", str(run.job_id))
    assert run.wait_until_over() == "CANCELLED"
    assert wait_until(lambda: run.launches("cancel")), run.log
    assert not run.launches("requeue") and not run.left_running()
    assert "run cancelled: cancelled" in run.log
    again = SlurmRun(cluster, tmp_path, "cancelled", *TWO_BY_ONE)
    assert again.wait_until_over() == "COMPLETED", again.log
    assert again.steps_repeated() <= INTERVAL
    assert_equal_bit_for_bit(undisturbed[2, False], run.directory)


@pytest.mark.slow
def test_a_cancel_during_the_wait_before_a_restart_is_for_good(cluster: MiniSlurm, tmp_path: Path) -> None:
    run = SlurmRun(cluster, tmp_path, "waiting", *TWO_BY_ONE, "launcher.backoff_s=30", "checkpoint.interval_steps=5")
    run.wait_for_step(8)
    assert wait_until(lambda: run.events("checkpoint")), run.log
    os.kill(run.processes("anemoi_dist.train", RANK="1")[0], signal.SIGKILL)
    assert wait_until(lambda: run.launches("restart")), run.log
    answer = anemoi_dist(cluster, "cancel", str(run.directory))
    assert answer.returncode == 0, answer.stderr
    assert run.wait_until_over() == "CANCELLED"
    assert wait_until(lambda: run.launches("end")), run.log
    assert not run.launches("requeue") and len(run.launches("launch")) == 1


def command_run(cluster: MiniSlurm, root: Path, run_id: str, *arguments: str) -> SlurmRun:
    """Submit any command; what stands before ``--`` are options and overrides."""
    place = arguments.index("--")
    overrides = ["launcher=slurm", "launcher.profile=minislurm", f"run.root={root}", f"run.id={run_id}"]
    answer = anemoi_dist(cluster, "submit", *overrides, *arguments)
    assert answer.returncode == 0 and place >= 0, answer.stderr
    run = SlurmRun.__new__(SlurmRun)
    run.cluster, run.directory = cluster, root / run_id
    run.job_id = int(answer.stdout.partition(": job ")[2].partition(",")[0])
    return run


def test_any_command_has_the_same_life(cluster: MiniSlurm, tmp_path: Path) -> None:
    """It runs until its own end through a time limit, with the arguments and the environment that it was given."""
    counter = tmp_path / "lives"
    script = (
        'trap "echo saving; exit 3" TERM; echo x >> "$1"; echo "life $(wc -l < "$1") of $2 with $KEPT"; '
        'if [ "$(wc -l < "$1")" = 1 ]; then sleep 60 & wait; fi'
    )
    run = command_run(
        cluster,
        tmp_path,
        "c",
        "launcher.slurm.setup=['export KEPT=this']",
        "--",
        "bash",
        "-c",
        script,
        "_",
        str(counter),
        "a b$",
    )
    assert wait_until(lambda: "life 1 of a b$ with this" in run.log), run.log
    cluster.run("scancel", "--signal=USR1", "--batch", str(run.job_id))
    assert run.wait_until_over() == "COMPLETED", run.log
    assert "saving" in run.log and "life 2 of a b$" in run.log
    assert [e["code"] for e in run.launches("end")] == [75, 0]
    assert run.launches("submit")[0]["command"][-1] == "a b$"
    state = state_of(run)
    assert state["state"] == "finished" and len(state["attempts"]) == 2
    assert not run.left_running()


@pytest.mark.slow
def test_anemoi_training_with_its_own_trainer_goes_through_two_time_limits(cluster: MiniSlurm, tmp_path: Path) -> None:
    pytest.importorskip("anemoi.training")
    words = ["anemoi-training", "train", *overrides(tmp_path / "theirs", ranks=2), "training.max_steps=150"]
    run = command_run(cluster, tmp_path, "kept", "launcher.ranks=2", "--", *words)
    for life in range(2):
        assert wait_until(lambda n=life: len(run.launches("launch")) == n + 1), run.log
        run.wait_for_step(10, after=float(run.launches("launch")[-1]["time"]))
        run.cluster.run("scancel", "--signal=USR1", "--batch", str(run.job_id))
    assert run.wait_until_over() == "COMPLETED", run.log
    assert [e["code"] for e in run.launches("end")] == [75, 75, 0]
    steps = [int(e["step"]) for e in run.events("step")]
    assert steps == sorted(set(steps)) and steps[-1] == 150, "no step was done twice"
    assert len(run.events("checkpoint")) >= 2 and not run.left_running()
    assert len(list((tmp_path / "theirs" / "checkpoint").iterdir())) == 1, "one run of theirs, under one id"
    state = state_of(run)
    assert state["state"] == "finished" and [a["max_steps"] for a in state["attempts"]] == [150] * 3
    assert "150/150" in anemoi_dist(cluster, "runs", "--root", str(tmp_path)).stdout


def test_a_command_on_all_nodes_by_srun_and_one_that_fails(cluster: MiniSlurm, tmp_path: Path) -> None:
    show = 'echo "rank $SLURM_PROCID of $SLURM_NTASKS on $SLURMD_NODENAME"'
    run = command_run(cluster, tmp_path, "all", "launcher.nodes=2", "--srun", "--", "bash", "-c", show)
    failing = command_run(cluster, tmp_path, "failing", "--", "bash", "-c", "exit 9")
    absent = command_run(cluster, tmp_path, "absent", "--", "no-such-program")
    assert run.wait_until_over() == "COMPLETED", run.log
    said = [line for line in run.log.splitlines() if line.startswith("rank ")]
    assert sorted(line.split(" on ")[0] for line in said) == [f"rank {n} of 4" for n in range(4)]
    assert len({line.split(" on ")[1] for line in said}) == 2
    for other, code in ((failing, "returned 9"), (absent, "returned 127")):
        assert other.wait_until_over() == "FAILED"
        assert code in other.log and not other.launches("requeue")
        assert state_of(other)["state"] == "failed"
        (ended,) = other.launches("end")
        assert ended["reason"] == f"the command {code}"
        assert f"`anemoi-dist logs {other.directory.name}` has what it printed" in other.log


def test_what_slurm_refuses_is_told_with_its_words_and_leaves_no_record(cluster: MiniSlurm, tmp_path: Path) -> None:
    base = ["submit", "--no-check", *TWO_BY_ONE, f"run.root={tmp_path}", "run.id=r"]
    for override, said, fix in (
        ("launcher.slurm.partition=nowhere", "invalid partition", "sinfo"),
        ("launcher.nodes=4096", "processors", "launcher.nodes"),
        ("+launcher.slurm.options.no-such-option=1", "unrecognized option", "launcher.slurm.options"),
    ):
        more = [override] if "nodes" not in override else [override, "training.global_batch_size=4096"]
        answer = anemoi_dist(cluster, *base, *more)
        assert answer.returncode == 3, answer.stderr
        assert said in answer.stderr and fix in answer.stderr, answer.stderr
        assert not (tmp_path / "r" / "launch.jsonl").exists()
        assert not list((tmp_path / "r" / "scripts").glob("*.sh"))
    answer = anemoi_dist(cluster, *base, "launcher.slurm.partition=short", "launcher.time=00:20:00")
    assert answer.returncode == 3 and "launcher.time" in answer.stderr, answer.stderr


def test_a_run_is_queued_once_and_waits_for_another(cluster: MiniSlurm, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    waiting = ["bash", "-c", 'until [ -e "$1" ]; do sleep .1; done', "_", str(gate)]
    first = command_run(cluster, tmp_path, "first", "--", *waiting)
    again = anemoi_dist(cluster, "submit", "launcher=slurm", f"run.root={tmp_path}", "run.id=first", "--", *waiting)
    assert again.returncode == 3 and f"is job {first.job_id} already" in again.stderr, again.stderr
    other = anemoi_dist(cluster, "submit", "launcher=slurm", f"run.root={tmp_path}", "run.id=first", "--", "true")
    assert other.returncode == 2 and "another command" in other.stderr
    then = command_run(cluster, tmp_path, "then", "--after", "first", "--", "true")
    assert cluster.job_field(then.job_id, "Dependency").startswith(f"afterok:{first.job_id}")
    gate.touch()
    assert then.wait_until_over() == "COMPLETED", then.log
    ended = first.launches("end")[0]["time"]
    assert then.launches("launch")[0]["time"] > ended
    assert then.launches("submit")[0]["after"] == "first"
    failed = command_run(cluster, tmp_path, "fails", "--", "false")
    assert failed.wait_until_over() == "FAILED"
    base = ["submit", "--no-check", "launcher=slurm", f"run.root={tmp_path}", "run.id=never"]
    answer = anemoi_dist(cluster, *base, "--after", "fails", "--", "true")
    assert answer.returncode == 3 and "--after-any" in answer.stderr, answer.stderr
    assert (
        command_run(cluster, tmp_path, "anyway", "--after-any", "fails", "--", "true").wait_until_over() == "COMPLETED"
    )


def test_a_sweep_is_a_run_for_each_combination(cluster: MiniSlurm, tmp_path: Path) -> None:
    base = [
        "submit",
        "--no-check",
        "--multirun",
        *TWO_BY_ONE,
        "+launcher.slurm.options.hold=true",
        f"run.root={tmp_path}",
    ]
    answer = anemoi_dist(cluster, *base, "training.lr.rate=1e-4,3e-4", "run.seed=range(1,3)")
    assert answer.returncode == 0, answer.stderr
    runs = sorted(path.parent for path in tmp_path.glob("*/launch.jsonl"))
    assert len(runs) == 4 and answer.stdout.count(": job ") == 4
    jobs = {read_events(run / "launch.jsonl")[0]["job_id"] for run in runs}
    assert len(jobs) == 4 and all(job in answer.stdout for job in jobs)
    configs = [(run / "config.yaml").read_text() for run in runs]
    assert sum("rate: 0.0003" in text for text in configs) == 2
    cluster.cancel_all()
    for more, said in ((["run.id=x"], "would name 4 runs"), (["model.hidden=1,2"], "is not")):
        refused = anemoi_dist(cluster, *base, "training.lr.rate=1e-4,3e-4", "run.seed=range(1,3)", *more)
        assert refused.returncode == 2 and said in refused.stderr, refused.stderr
    assert len(list(tmp_path.glob("*/launch.jsonl"))) == 4
