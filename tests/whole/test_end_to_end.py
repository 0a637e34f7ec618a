"""The product as a user meets it: real torchrun, real ranks, and a ``kill -9`` in the middle."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.runs import (
    NUM_STEPS,
    SMALL,
    assert_equal_bit_for_bit,
    command,
    finish,
    ranks_of,
    start,
    wait_for_checkpoint,
    wait_for_step,
)

from anemoi_dist.checkpoint.compare import differences
from anemoi_dist.checkpoint.verified import SavedCheckpoint
from anemoi_dist.run.events import read_events


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that nothing happens to: by hand, with a torchrun on each of two pretended nodes."""
    root = tmp_path_factory.mktemp("undisturbed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
    job = ["-m", "anemoi_dist.train", *SMALL, f"run.root={root}", "run.id=a"]
    agents = [start([*torchrun, *job], OMP_NUM_THREADS="1", LOGLEVEL="ERROR") for _ in range(2)]
    results = [finish(agent) for agent in agents]
    assert [code for code, _ in results] == [0, 0], results
    return root / "a"


def test_the_run_tells_what_it_did(undisturbed: Path) -> None:
    events = read_events(undisturbed / "events.jsonl")
    by_name = {name: [e for e in events if e["event"] == name] for name in {e["event"] for e in events}}
    assert [e["step"] for e in by_name["step"]] == list(range(1, NUM_STEPS + 1))
    assert {"loss", "lr", "grad_norm", "alpha", "beta3", "samples_per_s", "memory_bytes"} <= by_name["step"][-1].keys()
    (begin,) = by_name["start"]
    assert begin["world_size"] == 2 and begin["engine"] == "zero2" and begin["versions"]["torch"]
    sizes = [memory["states"] for memory in begin["memory"]]
    for kind in ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq"):
        assert sizes[0][kind] == sizes[1][kind] and abs(2 * sizes[0][kind] - 4 * begin["num_parameters"]) <= 64
    assert [(e["split"], e["step"]) for e in by_name["validation"]] == [
        ("validation", 30),
        ("validation", NUM_STEPS),
        ("test", NUM_STEPS),
    ]
    scores = by_name["validation"][-1]["scores"]
    assert {score["forecast"] for score in scores} == {"model", "persistence", "climatology", "tide_tendency"}
    assert by_name["end"][0]["exit_code"] == 0 and by_name["end"][0]["seconds"]["step"] > 0
    assert (undisturbed / "report" / "forecast.npz").exists()
    state = json.loads((undisturbed / "run.json").read_text())
    assert state["state"] == "finished" and state["attempts"][0]["exit_code"] == 0


def left_of(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Return those that do not end by themselves."""
    _, left = psutil.wait_procs(processes, timeout=60)
    return [each for each in left if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def test_a_run_that_is_killed_and_stopped_goes_on_bit_for_bit(undisturbed: Path, tmp_path: Path) -> None:
    """A rank is killed, then the launcher is asked to stop; the same command continues each time."""
    run, step, victim = tmp_path / "b", random.randint(6, 15), random.randrange(2)
    process = start(command(tmp_path, "b"))
    wait_for_step(run, step, process)
    wait_for_checkpoint(run, process)
    ranks = ranks_of(process, run)
    assert len(ranks) == 2
    ranks[victim].send_signal(signal.SIGKILL)
    code, output = finish(process)
    assert code == 70, output
    assert not left_of(ranks), "a rank is left"

    process = start(command(tmp_path, "b"))
    wait_for_step(run, 1, process, starts=2)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 75, output
    assert "resumes at step" in output, f"rank {victim} was killed at step {step}"
    state = json.loads((run / "run.json").read_text())
    assert state["state"] == "preempted" and state["attempts"][-1]["exit_code"] == 75

    code, output = finish(start(command(tmp_path, "b")))
    assert code == 0, output
    assert_equal_bit_for_bit(undisturbed, run)
    code, output = finish(start(command(tmp_path, "b")))
    assert code == 0 and "is finished" in output


def processes_of(process: subprocess.Popen[str], run: Path) -> dict[str, psutil.Process]:
    first, second = ranks_of(process, run)
    workers = [each for each in first.children(recursive=True) if "resource_tracker" not in " ".join(each.cmdline())]
    launcher, agent = psutil.Process(process.pid), first.parent()
    assert agent is not None
    return {"launcher": launcher, "agent": agent, "rank 0": first, "rank 1": second, "data worker": workers[-1]}


@pytest.mark.slow
def test_nothing_is_left_whoever_gets_which_signal(undisturbed: Path, tmp_path: Path) -> None:
    """One run meets them all, one start after the other, and ends like the undisturbed one."""
    run = tmp_path / "n"
    strikes = (
        ("launcher", signal.SIGINT),
        ("rank 1", signal.SIGINT),
        ("launcher", signal.SIGKILL),
        ("agent", signal.SIGKILL),
        ("data worker", signal.SIGKILL),
        ("rank 0", signal.SIGTERM),
        ("agent", signal.SIGTERM),
        ("data worker", signal.SIGTERM),  # last: it ignores that, and the run comes to its end
    )
    for start_number, (victim, number) in enumerate(strikes, 1):
        # Slow steps: with fast ones a busy machine could be at the end before all have been struck.
        process = start(command(tmp_path, "n"), PAUSE_S="1")
        wait_for_step(run, 1, process, starts=start_number)
        everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        processes_of(process, run)[victim].send_signal(number)
        code, output = finish(process)
        assert not left_of(everybody), output
        # A data worker that is gone may have had too little memory: another try would not help.
        expected = {75, 0} if number != signal.SIGKILL else {3} if victim == "data worker" else {70}
        assert code in expected | ({-9} if victim == "launcher" else set()), (victim, number, output)
    code, output = finish(start(command(tmp_path, "n")))
    assert code == 0, output
    assert_equal_bit_for_bit(undisturbed, run)


def test_a_wrong_key_costs_no_process_group(tmp_path: Path) -> None:
    code, output = finish(
        start([sys.executable, "-m", "anemoi_dist.train", "training.max_step=3"], RANK="0", WORLD_SIZE="2")
    )
    assert code == 2 and "training.max_steps" in output and "Traceback" not in output


def test_divergence_ends_with_5_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    """On the sample of ERA5."""
    more = [
        "data=era5_sample",
        "training.lr.rate=1e30",
        "training.max_skipped=2",
        "training.clip_grad_norm=null",
        "checkpoint.interval_steps=1",
        "launcher.ranks=1",
    ]
    small = [override for override in SMALL if not override.startswith("data")]
    code, output = finish(start(command(tmp_path, "e", *more, small=small)))
    assert code == 5, output
    assert "not finite" in output
    events = read_events(tmp_path / "e" / "events.jsonl")
    assert sum(e["event"] == "skipped_update" for e in events) == 3
    assert (tmp_path / "e" / "checkpoints" / "step-00000001" / "manifest.json").exists()


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_another_and_keeps_what_is_frozen(tmp_path: Path) -> None:
    code, output = finish(start(command(tmp_path, "a", "training.max_steps=6", "engine=zero3")))
    assert code == 0, output
    frozen, tuned = "training.freeze=[model.blocks.*]", ["training.max_steps=4", "engine=fsdp2", "launcher.ranks=1"]
    wrong = finish(start(command(tmp_path, "b", "checkpoint.init_from=c", *tuned)))
    assert wrong[0] == 2 and "is neither a run" in wrong[1] and not (tmp_path / "b").exists()
    code, output = finish(start(command(tmp_path, "b", "checkpoint.init_from=a@5", frozen, *tuned)))
    assert code == 0 and "begins with the weights of" in output and "step-00000005" in output, output
    saved = SavedCheckpoint(tmp_path / "a" / "checkpoints" / "step-00000005")
    tuned_to = SavedCheckpoint(tmp_path / "b" / "checkpoints" / "step-00000004")
    weights = {name for name, kind in saved.records if kind == "param"}
    changed = {each.fqn for each in differences(saved, tuned_to) if each.kind == "param"}
    assert changed == {name for name in weights if not name.startswith("model.blocks.")} != weights
