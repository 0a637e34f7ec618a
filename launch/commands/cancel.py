"""``anemoi-dist cancel``: end a run now, whether it has saved or not. No torch."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import time

from anemoi_dist.errors import ConfigError, ExitCode, PreflightError
from anemoi_dist.run.directory import RunDirectory

from ..status import journal
from ..status.files import Facts, gather, launcher_alive
from ..status.inspection import inspect_run
from ..status.run_status import RunStatus
from ..status.slurm_queue import SlurmQueue
from .arguments import locate_run

#: Between two signals to a launcher on this machine. SLURM has its own (KillWait).
_GRACE_S = 5.0
#: The first lets the ranks save if they can in that time, the second kills them, the third does not even ask.
_SIGNALS = {"SIGTERM": signal.SIGTERM, "a second SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}
_POLL_S = 0.05


def run(options: argparse.Namespace) -> int:
    """End the job, or the launcher on this machine."""
    run = locate_run(options.run, options.root)
    facts, status = gather(run), inspect_run(run)
    if facts.job_id:
        _cancel_job(run, facts.job_id, status)
    elif not status.may_go_on:
        raise ConfigError("RUN", options.run, f"has nothing to cancel: it is {status.described}")
    else:
        _cancel_process(run, facts)
    print(f"what was saved last is intact; `anemoi-dist resume {status.run_id}` continues from it")
    return ExitCode.FINISHED


def _cancel_job(run: RunDirectory, job_id: str, status: RunStatus) -> None:
    queue = SlurmQueue()
    view = queue.views([job_id]).get(job_id)  # raises if SLURM does not answer: nothing is noted then
    if view is None or view.is_over:
        raise ConfigError("RUN", status.run_id, f"has nothing to cancel: it is {status.described}")
    # Noted first: the batch process reads it when it is ended, and does not put the job back into the queue.
    journal.note(run, "cancel", job_id=job_id)
    queue.cancel(job_id)
    print(f"job {job_id} is cancelled; it was {status.described}")


def _cancel_process(run: RunDirectory, facts: Facts) -> None:
    """End the launcher on this machine; its ranks end with it."""
    launched = journal.last(facts.launch, "launch")
    if launched is None:
        host = f" on {facts.owner_host}" if facts.owner_host else ""
        raise PreflightError(
            f"run {run.run_id} was not started by anemoi-dist{host}: end what started it, torchrun for one; "
            f"`anemoi-dist stop {run.run_id}` asks it to save and stop"
        )
    pid = launched.pid
    if launched.host != socket.gethostname():
        raise PreflightError(
            f"run {run.run_id} was started on {launched.host or '?'} by process {pid}: cancel it there; "
            f"`anemoi-dist stop {run.run_id}` asks it from here to save and stop"
        )
    journal.note(run, "cancel")
    means = _end(facts, pid or 0)
    print(f"process {pid} was gone already" if means is None else f"process {pid} was ended by {means}")


def _end(facts: Facts, pid: int) -> str | None:
    """End the launcher and return by which signal; None if it is gone. A process that reuses its pid is left alone."""
    try:
        handle = os.pidfd_open(pid)
    except (OSError, ValueError, OverflowError):
        return None
    try:
        # The handle always names the same process, so the check that it is the launcher cannot be outdated.
        if not launcher_alive(facts.launch):
            return None
        for name, number in _SIGNALS.items():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
            deadline = time.monotonic() + _GRACE_S
            # A launcher waits for its ranks, which may be saving.
            while launcher_alive(facts.launch):
                if time.monotonic() > deadline:
                    break
                time.sleep(_POLL_S)
            else:
                return name
        raise PreflightError(f"process {pid} did not end, not even by SIGKILL: it may wait for a file system")
    finally:
        os.close(handle)
