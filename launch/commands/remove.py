"""``anemoi-dist remove``: delete a run and everything that it has saved. No torch."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from anemoi_dist.errors import ConfigError, ExitCode, print_message
from anemoi_dist.run.lock import hold_launch
from anemoi_dist.telemetry.progress import format_bytes

from ..status.inspection import inspect_run
from .arguments import locate_run


def run(options: argparse.Namespace) -> int:
    """Ask, delete, and say what that has freed."""
    run = locate_run(options.run, options.root)
    status = inspect_run(run)
    if status.may_go_on:
        fix = f"`anemoi-dist cancel {status.run_id}` first"
        raise ConfigError("RUN", options.run, f"is not over: it is {status.described}", fix=fix)
    files = [path for path in run.path.rglob("*") if path.is_file() and not path.is_symlink()]
    size = format_bytes(sum(path.lstat().st_size for path in files))
    what = f"{run.path}: {len(files)} files, {size}, {_saved(run.path)}"
    if not options.yes and not _is_wanted(what):
        print_message("nothing is deleted")
        return ExitCode.INTERRUPTED
    # A start between the question and the answer is the owner, and this an error.
    with_lock = hold_launch(run)
    try:
        shutil.rmtree(run.path)
    finally:
        with_lock.release()
    print(f"{run.path} is deleted: {size}")
    return ExitCode.FINISHED


def _saved(path: Path) -> str:
    steps = sorted(int(folder.name.removeprefix("step-")) for folder in path.glob("checkpoints/step-????????"))
    return f"checkpoints of steps {steps[0]} to {steps[-1]}" if steps else "no checkpoint"


def _is_wanted(what: str) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("--yes", False, "nobody can be asked here", fix="--yes deletes without asking")
    return input(f"delete {what}? [y/N] ").strip().lower() in ("y", "yes")
