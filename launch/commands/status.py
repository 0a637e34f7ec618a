"""``anemoi-dist status``: say what a run is doing, and why. No torch, no Hydra: it answers at once."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from anemoi_dist.errors import ExitCode, print_message
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.telemetry.progress import format_duration, format_number

from ..status.inspection import follow, inspect_run
from ..status.run_status import STATES, RunStatus, format_ago
from .arguments import locate_run

#: A line comes at least so often while a run is followed and nothing changes.
_QUIET_S = 60.0
_MOST_SILENT = 8


def run(options: argparse.Namespace) -> int:
    """Print what the run is doing; with ``--follow`` until it has ended."""
    run = locate_run(options.run, options.root)
    if options.follow:
        return _follow(run, as_json=options.json)
    status = inspect_run(run)
    if options.json:
        print(json.dumps(asdict(status), indent=1))
    else:
        for line in described(status, run):
            print(line)
    return ExitCode.FINISHED


def described(status: RunStatus, run: RunDirectory) -> Iterator[str]:
    """Yield the lines that tell a person all that is known of a run."""
    yield _line("run", f"{status.run_id}  ({run.path})")
    yield _line("state", f"{status.state}: {status.detail or STATES[status.state]}")
    if status.reason:
        yield _line("reason", status.reason)
    if status.attempt is not None:
        yield _line("attempt", str(status.attempt))
    if status.job_id:
        where = f" on {status.nodes}" if status.nodes else ""
        again = f", {status.restarts} times back in the queue" if status.restarts else ""
        limit = "" if status.limit_s is None else f", {format_duration(status.limit_s)} until its time limit"
        yield _line("job", f"{status.job_id}{where}{again}{limit}")
    if status.step is not None:
        yield _line("step", f"{status.step} of {'?' if status.total_steps is None else status.total_steps}")
    if status.samples_per_s is not None:
        yield _line("speed", f"{format_number(status.samples_per_s, digits=3)} samples/s")
    if status.loss is not None:
        yield _line("loss", format_number(status.loss))
    if status.seen_s is not None:
        yield _line("last seen", format_ago(status.seen_s))
    if status.eta_s is not None:
        yield _line("time left", format_duration(status.eta_s))
    for rank in status.silent[:_MOST_SILENT]:
        at = "" if rank.step is None else f", step {rank.step}"
        where = f"{rank.phase or 'never seen'}{at}, process {rank.pid or '?'} on {rank.host or '?'}"
        yield _line("silent", f"rank {rank.rank} for {format_duration(rank.silent_s)}: {where}")
    # All ranks of a job are silent once one of them is, since they wait for it: the first lines name the cause.
    if len(status.silent) > _MOST_SILENT:
        yield _line("", f"and {len(status.silent) - _MOST_SILENT} ranks more")
    for note in status.notes:
        yield _line("note", note)


def _line(name: str, text: str) -> str:
    return f"{name:<10} {text}"


def _follow(run: RunDirectory, *, as_json: bool) -> int:
    shown: tuple[Any, ...] = ()
    shown_at = 0.0
    for status in follow(run):
        now = time.monotonic()
        key = (status.state, status.attempt, status.job_id, status.step, status.notes)
        # A quiet run still prints now and then, so that a reader sees that the command itself is alive.
        if key == shown and now - shown_at < _QUIET_S:
            continue
        if as_json:
            print(json.dumps(asdict(status)), flush=True)
        else:
            _print_change(status, notes=status.notes if shown[4:] != (status.notes,) else ())
        shown, shown_at = key, now
    return ExitCode.FINISHED


def _print_change(status: RunStatus, *, notes: Sequence[str]) -> None:
    words = [time.strftime("%H:%M:%S"), f"{status.state:<10}"]
    if status.state in ("running", "stopping") and status.step is not None:
        words.append(f"attempt {status.attempt}, step {status.step}/{status.total_steps or '?'}")
        words += [] if status.loss is None else [f"loss {format_number(status.loss)}"]
        words += [] if status.samples_per_s is None else [f"{format_number(status.samples_per_s, digits=3)} samples/s"]
        words += [] if status.eta_s is None else [f"{format_duration(status.eta_s)} left"]
    else:
        words.append(status.detail or STATES[status.state])
    print("  ".join(words), flush=True)
    if status.reason:
        print(f"{'':10}{status.reason}", flush=True)
    for note in notes:
        print_message(f"note: {note}")
