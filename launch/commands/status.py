"""``anemoi-dist runs`` and ``status``: what runs are doing. No torch, no Hydra: both answer at once."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anemoi_dist.errors import ConfigError, ExitCode
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.telemetry.progress import format_duration, format_number

from ..status import journal
from ..status.derive import STATES, RunStatus, derive, format_ago
from ..status.files import Facts, gather
from ..status.slurm_queue import JobView, Queue, QueueError, SlurmQueue
from .arguments import RUN_HELP, add_command, locate_run

#: Seconds between two looks at the files, and between two questions to the scheduler, which serves many.
_LOOK_S, _ASK_S = 2.0, 15.0
#: A line comes at least so often while a run is followed and nothing changes.
_QUIET_S = 60.0
_COLUMNS = ("run", "state", "attempt", "job", "step", "samples/s", "loss", "last seen", "time left")
#: States whose reason is shown below the table.
_EXPLAINED = ("submitted", "requeued", "restarting", "silent", "failed", "crashed", "lost", "unknown")
_MOST_SILENT = 8


def add_commands(commands: Any) -> None:
    """Add ``runs`` and ``status``."""
    runs = add_command(commands, "runs", _runs, "list the runs: state, progress, last sign of life")
    runs.add_argument("--root", default="runs", help="directory of the runs (default: %(default)s)")
    runs.add_argument("--json", action="store_true", help="print JSON")

    status = add_command(commands, "status", _status, "say what a run is doing, and why")
    add_run_argument(status)
    status.add_argument("--json", action="store_true", help="print JSON; with --follow one object a line")
    status.add_argument("--follow", action="store_true", help="print a line when something changes, until the run ends")


def add_run_argument(command: argparse.ArgumentParser) -> None:
    """Add what every command about one run has."""
    command.add_argument("run", metavar="RUN", help=RUN_HELP)
    command.add_argument("--root", default="runs", help="directory of the runs (default: %(default)s)")


def look(facts: Sequence[Facts], *, queue: Queue) -> list[RunStatus]:
    """Return what runs are doing; the scheduler is asked once for all, and not about those that have ended."""
    views, error = ask(queue, [run for run in facts if not _is_settled(run)])
    now = time.time()
    return [derive(run, now=now, job=views.get(run.job_id or ""), queue_error=error) for run in facts]


def look_at(run: RunDirectory, *, queue: Queue | None = None) -> RunStatus:
    """Return what one run is doing."""
    facts = gather(run)
    views, error = ask(SlurmQueue() if queue is None else queue, [facts])
    return derive(facts, now=time.time(), job=views.get(facts.job_id or ""), queue_error=error)


def ask(queue: Queue, facts: Sequence[Facts]) -> tuple[dict[str, JobView], str]:
    """Return what the scheduler says of the jobs of runs, or why it says nothing."""
    job_ids = [run.job_id for run in facts if run.job_id]
    try:
        return (queue.views(job_ids) if job_ids else {}), ""
    except QueueError as error:
        return {}, str(error)


def _is_settled(facts: Facts) -> bool:
    """Whether the run has done its work, so that no scheduler need be asked; after any other end SLURM may go on."""
    return bool(facts.launch) and facts.launch[-1]["event"] == "end" and facts.launch[-1].get("code") == 0


# runs


def _runs(options: argparse.Namespace) -> int:
    root = Path(options.root).expanduser().absolute()
    if root.exists() and not root.is_dir():
        raise ConfigError("--root", options.root, "is no directory", fix="--root DIR, where run.root of the runs is")
    facts = sorted((gather(run, every_rank=False) for run in all_runs(root)), key=_since)
    statuses = look(facts, queue=SlurmQueue())
    if options.json:
        print(json.dumps([asdict(status) for status in statuses], indent=1))
        return ExitCode.FINISHED
    if not statuses:
        place = Path(options.root)
        print(f"no runs in {place if place.is_absolute() else f'./{place}'} yet")
        return ExitCode.FINISHED
    for line in table(statuses):
        print(line)
    return ExitCode.FINISHED


def all_runs(root: Path) -> list[RunDirectory]:
    """Return the runs below ``root``, which need not exist."""
    if not root.is_dir():
        return []
    return [RunDirectory(path) for path in root.iterdir() if RunDirectory(path).config_file.is_file()]


def _since(facts: Facts) -> tuple[float, str]:
    """Return what sorts runs: those started last are at the end, where the eye is."""
    begun = journal.last(facts.launch, "submit", "launch")
    times = [begun["time"] if begun is not None else 0.0]
    times += [attempt.started for attempt in facts.attempts[-1:] if attempt.started is not None]
    return max(times), facts.run_id


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


# status


def _status(options: argparse.Namespace) -> int:
    run = locate_run(options.run, options.root)
    if options.follow:
        return _follow(run, as_json=options.json)
    status = look_at(run)
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
        print(f"note: {note}", file=sys.stderr, flush=True)


def follow(
    run: RunDirectory, *, queue: Queue | None = None, look_s: float = _LOOK_S, ask_s: float = _ASK_S
) -> Iterator[RunStatus]:
    """Yield what a run is doing, again and again; the last time when it has ended.

    Parameters
    ----------
    run : RunDirectory
        It exists.
    queue : Queue, optional
        Whom to ask; SLURM by default.
    look_s, ask_s : float, optional
        Seconds between two looks at the files, and between two questions to the scheduler.
    """
    queue = SlurmQueue() if queue is None else queue
    views: dict[str, JobView] = {}
    error, asked_at, known = "", -ask_s, -1
    while True:
        facts, now = gather(run), time.monotonic()
        # What the control side has just written makes the scheduler's last answer an old one.
        if now - asked_at >= ask_s or len(facts.launch) != known:
            (views, error), asked_at, known = ask(queue, [facts]), now, len(facts.launch)
        status = derive(facts, now=time.time(), job=views.get(facts.job_id or ""), queue_error=error)
        yield status
        if not status.may_go_on:
            return
        time.sleep(look_s)
