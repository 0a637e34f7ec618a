"""The product as a user meets it: real torchrun, real ranks, real data, and a ``kill -9`` in the middle."""

from __future__ import annotations

import json
import random
import signal
import socket
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

from anemoi_dist.run.events import read_events


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    code, output = finish(start(command(root, "a")))
    assert code == 0, output
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
        ("validation", 10),
        ("validation", 20),
        ("validation", NUM_STEPS),
        ("test", NUM_STEPS),
    ]
    scores = by_name["validation"][-1]["scores"]
    assert {score["forecast"] for score in scores} == {"model", "persistence", "climatology", "tide_tendency"}
    assert by_name["end"][0]["exit_code"] == 0 and by_name["end"][0]["seconds"]["step"] > 0
    assert (undisturbed / "report" / "forecast.npz").exists()
    state = json.loads((undisturbed / "run.json").read_text())
    assert state["state"] == "finished" and state["attempts"][0]["exit_code"] == 0


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_run_goes_on_bit_for_bit(undisturbed: Path, tmp_path: Path, victim: int) -> None:
    step = random.randint(6, NUM_STEPS - 4)
    process = start(command(tmp_path, "b"))
    wait_for_step(tmp_path / "b", step, process)
    wait_for_checkpoint(tmp_path / "b", process)
    ranks = ranks_of(process, tmp_path / "b")
    assert len(ranks) == 2
    ranks[victim].send_signal(signal.SIGKILL)
    code, output = finish(process)
    assert code == 70, output
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks), "a rank is left"

    code, output = finish(start(command(tmp_path, "b")))
    assert code == 0, output
    assert "resumes at step" in output, f"killed at step {step}"
    assert_equal_bit_for_bit(undisturbed, tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["launcher", "agent", "rank 0", "rank 1", "data worker"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_whoever_gets_which_signal(
    undisturbed: Path, tmp_path: Path, victim: str, number: signal.Signals
) -> None:
    process = start(command(tmp_path, "n"))
    wait_for_step(tmp_path / "n", 7, process)
    launcher = psutil.Process(process.pid)
    everybody = [launcher, *launcher.children(recursive=True)]
    first, second = ranks_of(process, tmp_path / "n")
    agent = first.parent()
    workers = [each for each in first.children(recursive=True) if "resource_tracker" not in " ".join(each.cmdline())]
    victims = {"launcher": launcher, "agent": agent, "rank 0": first, "rank 1": second, "data worker": workers[-1]}
    victims[victim].send_signal(number)
    code, output = finish(process)
    _, left = psutil.wait_procs(everybody, timeout=30)
    assert not [each for each in left if each.is_running() and each.status() != psutil.STATUS_ZOMBIE], output
    expected = {70} if number == signal.SIGKILL else {75, 0}
    assert code in expected | ({-9} if victim == "launcher" else set()), output
    code, output = finish(start(command(tmp_path, "n")))
    assert code == 0, output
    assert_equal_bit_for_bit(undisturbed, tmp_path / "n")


def test_sigterm_saves_and_the_same_command_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    process = start(command(tmp_path, "c"))
    wait_for_step(tmp_path / "c", 7, process)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 75, output
    state = json.loads((tmp_path / "c" / "run.json").read_text())
    assert state["state"] == "preempted" and state["attempts"][-1]["exit_code"] == 75
    code, output = finish(start(command(tmp_path, "c")))
    assert code == 0, output
    assert_equal_bit_for_bit(undisturbed, tmp_path / "c")
    code, output = finish(start(command(tmp_path, "c")))
    assert code == 0 and "is finished" in output


def test_two_torchrun_agents_do_the_same(undisturbed: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
    job = ["-m", "anemoi_dist.train", *SMALL, f"run.root={tmp_path}", "run.id=d"]
    agents = [start([*torchrun, *job], OMP_NUM_THREADS="1", LOGLEVEL="ERROR") for _ in range(2)]
    results = [finish(agent) for agent in agents]
    assert [code for code, _ in results] == [0, 0], results
    assert_equal_bit_for_bit(undisturbed, tmp_path / "d")


def test_a_wrong_key_costs_no_process_group(tmp_path: Path) -> None:
    code, output = finish(
        start([sys.executable, "-m", "anemoi_dist.train", "training.max_step=3"], RANK="0", WORLD_SIZE="2")
    )
    assert code == 2 and "training.max_steps" in output and "Traceback" not in output


def test_divergence_ends_with_5_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    more = [
        "training.lr.rate=1e30",
        "training.max_skipped=2",
        "training.clip_grad_norm=null",
        "checkpoint.interval_steps=1",
    ]
    code, output = finish(start(command(tmp_path, "e", *more)))
    assert code == 5, output
    assert "not finite" in output
    events = read_events(tmp_path / "e" / "events.jsonl")
    assert sum(e["event"] == "skipped_update" for e in events) == 3
    assert (tmp_path / "e" / "checkpoints" / "step-00000001" / "manifest.json").exists()
