"""``anemoi-dist runs``: list the runs below a directory. No torch, no Hydra: it answers at once."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anemoi_dist.errors import ConfigError, ExitCode
from anemoi_dist.telemetry.progress import format_duration, format_number

from ..status import journal
from ..status.files import Facts, gather
from ..status.inspection import all_runs, inspect_runs
from ..status.run_status import STATES, RunStatus, format_ago

_COLUMNS = ("run", "state", "attempt", "job", "step", "samples/s", "loss", "last seen", "time left")
#: States whose reason is shown below the table.
_EXPLAINED = ("submitted", "requeued", "restarting", "silent", "failed", "crashed", "lost", "unknown")


def run(options: argparse.Namespace) -> int:
    """Print the table of the runs."""
    root = Path(options.root).expanduser().absolute()
    if root.exists() and not root.is_dir():
        raise ConfigError("--root", options.root, "is no directory", fix="--root DIR, where run.root of the runs is")
    # Heartbeats that are a few seconds old need no reading: hundreds of runs may have thousands of ranks.
    facts = sorted((gather(run, every_rank=False) for run in all_runs(root)), key=_since)
    statuses = _chosen(inspect_runs(facts), options.state)
    if options.sort == "loss":  # the best at the end, as the newest otherwise
        statuses.sort(key=lambda status: math.inf if status.loss is None else status.loss, reverse=True)
    if options.json:
        print(json.dumps([asdict(status) for status in statuses], indent=1))
        return ExitCode.FINISHED
    if not statuses:
        place = Path(options.root)
        print(f"no {'such ' if options.state else ''}runs in {place if place.is_absolute() else f'./{place}'} yet")
        return ExitCode.FINISHED
    for line in table(statuses):
        print(line)
    return ExitCode.FINISHED


def _chosen(statuses: Sequence[RunStatus], states: Sequence[str] | None) -> list[RunStatus]:
    for state in states or ():
        if state not in STATES:
            raise ConfigError("--state", state, "is no state of a run", valid=list(STATES))
    return [status for status in statuses if not states or status.state in states]


def _since(facts: Facts) -> tuple[float, str]:
    """Return what sorts runs: those started last are at the end, where the eye is."""
    begun = journal.last(facts.launch, "submit", "launch")
    times = [begun.time if begun is not None else 0.0]
    times += [attempt.started for attempt in facts.attempts[-1:] if attempt.started is not None]
    return max(times), facts.run_id  # the id makes the order of runs of one sweep stable


def table(statuses: Sequence[RunStatus]) -> Iterator[str]:
    """Yield the lines of the table, and below it what a reader should know of single runs."""
    rows = [_COLUMNS, *(_row(status) for status in statuses)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    left = ("run", "state")
    for row in rows:
        cells = (
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(_COLUMNS, row, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()
    for status in statuses:
        if status.state in _EXPLAINED and (status.detail or status.reason):
            yield f"{status.run_id}: {status.detail}"
            if status.reason:
                yield f"{' ' * len(status.run_id)}  {status.reason}"
    # A scheduler that is down gives every run the same note.
    for note in dict.fromkeys(note for status in statuses for note in status.notes):
        about = [status.run_id for status in statuses if note in status.notes]
        yield f"note: {note} ({about[0]}{f' and {len(about) - 1} others' if len(about) > 1 else ''})"


def _row(status: RunStatus) -> tuple[str, ...]:
    def shown(value: Any, text: str) -> str:
        return "-" if value is None else text

    return (
        status.run_id,
        status.state,
        shown(status.attempt, f"{status.attempt}"),
        shown(status.job_id, f"{status.job_id}"),
        shown(status.step, f"{status.step}/{'?' if status.total_steps is None else status.total_steps}"),
        shown(status.samples_per_s, format_number(status.samples_per_s or 0.0, digits=3)),
        shown(status.loss, format_number(status.loss or 0.0)),
        shown(status.seen_s, format_ago(status.seen_s or 0.0)),
        shown(status.eta_s, format_duration(status.eta_s or 0.0)),
    )
