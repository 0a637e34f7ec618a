"""Stands in for anemoi_dist.train: records an attempt as rank 0 does and ends as FAKE says; imports no torch."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

from anemoi_dist.run.directory import RunDirectory, write_atomically


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-directory", type=Path, required=True)
    run = RunDirectory(parser.parse_args().run_directory)
    rank, how = int(os.environ["RANK"]), os.environ["FAKE"]
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # as world.py: a rank ends with its agent
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stopped.append(number))
    if how.startswith("unrecorded"):
        return int(how.split("-")[1])
    if rank == 0:
        record(run, {"started": time.time(), "world_size": int(os.environ["WORLD_SIZE"])}, new=True)
    (run.path / f"ready-{rank}").touch()
    if how == "killed":
        if rank == 1:
            await_record(run)
            os.kill(os.getpid(), signal.SIGKILL)
        return wait(stopped, then=-1)
    if how == "killed-once":
        first = not (run.path / f"been-{rank}").exists()
        (run.path / f"been-{rank}").touch()
        if rank == 1 and first:
            await_record(run)
            os.kill(os.getpid(), signal.SIGKILL)
        if first:
            return wait(stopped, then=1)
        if rank == 0:
            record(run, {"exit_code": 0})
        return 0
    if how == "raises":
        if rank == 0:
            return wait(stopped, then=1)
        await_record(run)
        failure = {"rank": 1, "host": "there", "pid": os.getpid(), "error": "Traceback\nIt broke", "log": "its log"}
        record(run, {"exit_code": 70, "failure": failure})
        return 70
    if how == "ignores":
        time.sleep(3600)
        return 0
    code = wait(stopped, then=75 if how == "saves" else 1)
    if rank == 0 and how == "saves":
        record(run, {"exit_code": code})
    return code


def await_record(run: RunDirectory) -> None:
    """Wait until rank 0 has recorded the attempt: only then does an end belong to it."""
    while not (run.path / "ready-0").exists():
        time.sleep(0.01)


def wait(stopped: list[int], *, then: int) -> int:
    for _ in range(6000):
        if stopped:
            return then
        time.sleep(0.05)
    return 99


def record(run: RunDirectory, what: dict, *, new: bool = False) -> None:
    state = json.loads(run.state_file.read_text()) if run.state_file.exists() else {"attempts": []}
    if new:
        state["attempts"].append({"attempt": len(state["attempts"]) + 1})
    state["attempts"][-1] |= what
    write_atomically(run.state_file, json.dumps({**state, "state": "running"}))


if __name__ == "__main__":
    sys.exit(main())
