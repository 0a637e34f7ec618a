"""Run directories as real runs leave them, in every state, as many as one wants."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from anemoi_dist.run.directory import RunDirectory

#: A pid that no process can have: beyond the kernel's largest.
NOBODY = 2**22 + 1


def make_run(
    root: Path, run_id: str, *, config: str = "run: {}\n", state: dict[str, Any] | None = None
) -> RunDirectory:
    """Create a run directory with a configuration and, where it is given, a ``run.json``."""
    run = RunDirectory.locate(root, run_id)
    run.create()
    run.config_file.write_text(config)
    if state is not None:
        write_state(run, {"attempts": [], **state})
    return run


def read_state(run: RunDirectory) -> dict[str, Any]:
    """Return ``run.json`` as it stands on disk."""
    return json.loads(run.state_file.read_text())


def write_state(run: RunDirectory, content: dict[str, Any]) -> None:
    """Write ``run.json``, whatever the content."""
    run.state_file.write_text(json.dumps(content))


def attempt(number: int = 1, *, started: float, code: int | None = None, ended: float | None = None) -> dict[str, Any]:
    """Return an attempt as ``run.json`` records it; both times in seconds before now."""
    record = {"attempt": number, "started": time.time() - started, "world_size": 2, "max_steps": 1000, "changes": []}
    return record if code is None else {**record, "exit_code": code, "ended": time.time() - (ended or 0.0)}


def write_beat(
    run: RunDirectory, rank: int, *, ago: float = 1.0, number: int = 1, phase: str = "step", **more: Any
) -> None:
    """Write a heartbeat file as old as it says."""
    seen = time.time() - ago
    content = {
        "rank": rank,
        "host": "n1",
        "pid": 40 + rank,
        "time": seen,
        "step": 40,
        "phase": phase,
        "attempt": number,
    }
    main = {"total_steps": 1000, "loss": 0.4, "samples_per_s": 12.0, "eta_s": 600.0} if rank == 0 else {}
    file = run.heartbeat_file(rank)
    file.write_text(json.dumps({**content, **main, **more}))
    os.utime(file, (seen, seen))


def write_steps(run: RunDirectory, num_steps: int) -> None:
    """Write an event log of so many steps."""
    step = {"event": "step", "time": time.time(), "loss": 0.5, "lr": 1e-3, "grad_norm": 1.2, "samples_per_s": 11.0}
    lines = [json.dumps({**step, "step": number, "eta_s": 60.0}) for number in range(1, num_steps + 1)]
    run.events_file.write_text("\n".join(lines) + "\n")


def write_launch(run: RunDirectory, *events: dict[str, Any]) -> None:
    """Append to the journal; ``ago`` becomes ``time``."""
    with run.launch_file.open("a") as stream:
        for event in events:
            time_s = time.time() - event.get("ago", 0.0)
            base = {"time": time_s, "step": 0, "host": socket.gethostname(), "pid": NOBODY}
            stream.write(json.dumps({**base, **event}) + "\n")


def make_many(root: Path, number: int, *, config: str) -> None:
    """Create so many runs: finished, running, crashed, in the queue, failed, each with logs of a usual size."""
    for index in range(number):
        run_id = f"era5_sample-latlon-zero2-{index:08x}"
        kind = ("finished", "running", "crashed", "queued", "failed")[index % 5]
        launched = {"event": "launch", "kind": "local", "started": 1, "ago": 5000.0 + index}
        end = {"event": "end", "code": {"finished": 0, "failed": 5}.get(kind, 75), "ago": 100.0}
        done = kind in ("finished", "failed")
        attempts = [attempt(1, started=9000, code=75, ended=6000)]
        attempts += (
            [attempt(2, started=4990, code=end["code"] if done else None, ended=101.0)] if kind != "queued" else []
        )
        owner = {"pid": NOBODY, "host": "n1" if kind == "running" else socket.gethostname()}
        state = {"state": {"finished": "finished", "failed": "failed"}.get(kind, "running"), "attempts": attempts}
        run = make_run(root, run_id, config=config, state={**state, "owner": None if done else owner})
        write_launch(
            run, {"event": "launch", "kind": "local", "started": 1, "ago": 9010}, {**end, "code": 75, "ago": 6000}
        )
        if kind == "queued":
            write_launch(run, {"event": "submit", "kind": "slurm", "job_id": str(1000 + index), "ago": 60})
        else:
            write_launch(run, {**launched, "host": "n1" if kind == "running" else socket.gethostname()})
            write_launch(run, *([end] if done else []))
            for rank in range(8):
                write_beat(
                    run, rank, number=2, ago=1.0 if kind == "running" else 100.0, phase="end" if done else "step"
                )
        write_steps(run, 300)
