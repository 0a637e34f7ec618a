"""``anemoi-dist logs``: print a rank's log, and follow it into the next attempts. No torch."""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from anemoi_dist.errors import ConfigError, ExitCode, print_message
from anemoi_dist.run.directory import RunDirectory

from ..status.inspection import inspect_run
from .arguments import locate_run

#: Seconds between two readings of a log, and between two questions whether the run continues, which SLURM may answer.
_READ_S, _STATE_S = 0.5, 5.0
_CHUNK_BYTES = 1 << 20


def run(options: argparse.Namespace) -> int:
    """Print the log; with ``--follow`` until the run has ended."""
    run = locate_run(options.run, options.root)
    found = find(run, rank=options.rank, attempt=options.attempt)
    if found is None and options.follow and inspect_run(run).may_go_on:
        found = _wait(run, rank=options.rank, attempt=options.attempt)
    if found is None:
        raise ConfigError("RUN", options.run, _missing(run, options.rank, options.attempt), fix=_existing(run))
    if options.follow:
        _follow(run, found, rank=options.rank or 0, later=options.attempt is None)
    else:
        _print(found, offset=0)
    return ExitCode.FINISHED


def find(run: RunDirectory, *, rank: int | None = None, attempt: int | None = None) -> Path | None:
    """Return the log that is asked for; None if there is none.

    Without a rank and an attempt it is rank 0's of the newest attempt, or the batch script's if no rank has printed
    yet: a job that fails before its ranks start says there why.
    """
    for number in _attempts(run)[-1:] if attempt is None else [attempt]:
        file = run.log_file(number, rank or 0)
        if file.is_file():
            return file
    if rank is None and attempt is None:
        return max(_batch_logs(run), key=lambda file: file.stat().st_mtime, default=None)
    return None


def _attempts(run: RunDirectory) -> list[int]:
    """Return the attempts that have logs, in their order."""
    folders = run.logs_dir(1).parent.glob("attempt-*")
    return sorted(int(name) for folder in folders if (name := folder.name.removeprefix("attempt-")).isdecimal())


def _batch_logs(run: RunDirectory) -> list[Path]:
    return list(run.slurm_logs_dir.glob("slurm-*.log"))


def _ranks(run: RunDirectory, attempt: int) -> list[int]:
    names = (file.stem.removeprefix("rank-") for file in run.logs_dir(attempt).glob("rank-*.log"))
    return sorted(int(name) for name in names if name.isdecimal())


def _missing(run: RunDirectory, rank: int | None, attempt: int | None) -> str:
    attempts = _attempts(run)
    if not attempts:
        return "has no logs: no rank of it has started"
    return f"has no log of rank {rank or 0} in attempt {attempts[-1] if attempt is None else attempt}"


def _existing(run: RunDirectory) -> str:
    """Return which logs there are, in words."""
    parts = []
    for attempt in _attempts(run):
        ranks = _ranks(run, attempt)
        if ranks:
            parts.append(f"--attempt {attempt} has ranks {_spans(ranks)}")
    parts += [f"{file} is of the batch script" for file in _batch_logs(run)]
    return "; ".join(parts) or f"`anemoi-dist status {run.run_id}` says what it is doing"


def _spans(numbers: list[int]) -> str:
    """Return ``0-3, 7`` for the sorted numbers 0, 1, 2, 3, 7."""
    spans: list[list[int]] = []
    for value in numbers:
        if spans and value == spans[-1][-1] + 1:
            spans[-1][1:] = [value]
        else:
            spans.append([value])
    return ", ".join("-".join(map(str, span)) for span in spans)


# Following


def _wait(run: RunDirectory, *, rank: int | None, attempt: int | None) -> Path | None:
    """Wait for the first log of a run that is on its way."""
    print_message(f"{_missing(run, rank, attempt)} yet; waiting")
    ended = _rarely(lambda: not inspect_run(run).may_go_on)
    while (found := find(run, rank=rank, attempt=attempt)) is None and not ended():
        time.sleep(_READ_S)
    return found


def _follow(run: RunDirectory, file: Path, *, rank: int, later: bool) -> None:
    """Print a log as it grows, and where ``later`` those of the attempts after it, until the run has ended."""
    ended = _rarely(lambda: not inspect_run(run).may_go_on)
    offset = 0
    while True:
        # Asked before the file is read: the last lines may be written between the two.
        following, over = _following(run, file, rank=rank), ended()
        offset = _print(file, offset=offset)
        # A restart continues in a new file, a requeue possibly on other nodes.
        if following is not None and later:
            print_message(f"==> {following.parent.name} <==")
            file, offset = following, 0
        elif following is not None or over:
            return
        else:
            time.sleep(_READ_S)


def _following(run: RunDirectory, file: Path, *, rank: int) -> Path | None:
    """Return the same rank's log of the next attempt that has one."""
    match = re.fullmatch(r"attempt-(\d+)", file.parent.name)
    now = int(match[1]) if match else 0  # the batch script's log comes before all
    later = (run.log_file(number, rank) for number in _attempts(run) if number > now)
    return next((log for log in later if log.is_file()), None)


def _rarely(question: Callable[[], bool]) -> Callable[[], bool]:
    """Return a function that asks a costly question once in a while and repeats the answer until then."""
    answer, asked_at = False, -math.inf

    def ask() -> bool:
        nonlocal answer, asked_at
        if time.monotonic() - asked_at >= _STATE_S:
            answer, asked_at = question(), time.monotonic()
        return answer

    return ask


def _print(file: Path, *, offset: int) -> int:
    """Print a file from ``offset``, as the bytes that it holds; return where it ends now."""
    sys.stdout.flush()
    with file.open("rb") as stream:
        stream.seek(0, 2)
        if stream.tell() < offset:  # truncated, by a user or by a restore
            offset = 0
        stream.seek(offset)
        while chunk := stream.read(_CHUNK_BYTES):
            # Bytes, not text: a rank may be killed in the middle of a character.
            sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
        return stream.tell()
