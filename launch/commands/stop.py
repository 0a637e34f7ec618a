"""``anemoi-dist stop``: ask a run to save and stop. No torch."""

from __future__ import annotations

import argparse

from anemoi_dist.errors import ConfigError, ExitCode

from ..status import journal
from ..status.files import gather
from ..status.inspection import inspect_run
from ..status.run_status import RunStatus
from .arguments import locate_run


def run(options: argparse.Namespace) -> int:
    """Write the stop file, and print what follows from it."""
    run = locate_run(options.run, options.root)
    status = inspect_run(run)
    command = gather(run).command
    if status.may_go_on and command and not journal.is_anemoi_training(command):
        raise ConfigError(
            "RUN", options.run, "is a command, which hears no stop request", fix=f"anemoi-dist cancel {run.run_id}"
        )
    if not status.may_go_on:
        # The file would wait for the next start, and stop that.
        raise ConfigError("RUN", options.run, f"has nothing to stop: it is {status.described}")
    # A queued run may have no such directory yet.
    run.control_dir.mkdir(mode=0o700, exist_ok=True)
    # Noted first: the batch process reads the journal to tell a person's stop from the time limit's.
    journal.note(run, "stop")
    run.stop_file.touch()
    print(f"{status.run_id} is {status.described}")
    again = f"`anemoi-dist resume {run.run_id}`" if command is None else "the same `anemoi-dist submit` line"
    print(_what_follows(status, again=again))
    for note in status.notes:
        print(f"note: {note}")
    return ExitCode.FINISHED


def _what_follows(status: RunStatus, *, again: str) -> str:
    name = status.run_id
    if status.state in ("submitted", "requeued"):
        return (
            f"it keeps its place in the queue, and saves and stops at the first step once it runs; "
            f"`anemoi-dist cancel {name}` takes it out of the queue"
        )
    if status.state == "silent":
        return (
            f"ranks agree on a stop at the end of a step, which a silent rank may never reach; "
            f"`anemoi-dist cancel {name}` ends it without saving"
        )
    return (
        f"it saves at the end of the step, stops, and ends with code 75; `anemoi-dist status {name} --follow` tells "
        f"when, {again} continues it"
    )
