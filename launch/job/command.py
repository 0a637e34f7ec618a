"""Run any command in the place of the trainer: start it, ask it to stop, and record its end as that of a run.

    python -m anemoi_dist.launch.job.command RUN_DIRECTORY [--srun RANKS_PER_NODE] -- COMMAND ...

It holds the run and writes ``run.json``, as rank 0 does for the trainer. No torch.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from anemoi_dist.errors import AnemoiDistError, ExitCode, print_error, print_message
from anemoi_dist.process.parent_death import PARENT_PID, die_with_parent, parent_in_environment
from anemoi_dist.run.attempt import Attempt
from anemoi_dist.run.directory import LAUNCHED, RunDirectory
from anemoi_dist.run.events import read_events
from anemoi_dist.run.records import Failure

from ..status import slurm_queue
from ..status.journal import is_anemoi_training
from .allocation import Allocation, srun


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 75 if it shall run again, 70 for any other end."""
    die_with_parent(parent_pid=parent_in_environment(), number=signal.SIGTERM)
    arguments = sys.argv[1:] if arguments is None else arguments
    place = list(arguments).index("--")
    own, words = list(arguments[:place]), list(arguments[place + 1 :])
    run, by_srun = RunDirectory(Path(own[0])), own[1:2] == ["--srun"]
    try:
        allocation = Allocation.here(os.environ)
        ranks_per_node = int(own[2]) if by_srun else 1
        world_size = len(allocation.nodes) * ranks_per_node if by_srun else 1
        program = _anemoi_training(run, words) if is_anemoi_training(words) else words
        attempt = Attempt(run, world_size=world_size, max_steps=0)
        command = [*srun(allocation, tasks_per_node=ranks_per_node), *program] if by_srun else program
        stops = _num_stops(run)
        code = _Command(command, allocation, by_srun=by_srun).run()
        if code == ExitCode.FINISHED and _num_stops(run) > stops:
            code = int(ExitCode.SAVED_RUN_AGAIN)
    except AnemoiDistError as error:
        print_error(error)
        return int(error.exit_code)
    ended = _exit_code(code)
    message = f"{shlex.join(words)[:200]} returned {code}"
    print_message(f"run {run.run_id}: {message}")
    attempt.end(ended, failure=None if ended != ExitCode.INTERNAL else Failure(returned=code, error=message))
    return int(ended)


def _anemoi_training(run: RunDirectory, words: Sequence[str]) -> list[str]:
    """Return what a rank of ``anemoi-training train`` runs: the first time as it is, then from the last checkpoint."""
    program = [sys.executable, "-m", "anemoi_dist.launch.job.anemoi_training", str(run.path), *words[2:]]
    if not run.foreign_checkpoint_file.exists():
        return program
    last = Path(run.foreign_checkpoint_file.read_text(encoding="utf-8"))
    if not last.exists():  # it ended before it had saved anything: with its id it would refuse to start
        return program
    print_message(f"run {run.run_id}: continues {last}")
    # Its id alone is not enough: where the first start began from another run, these would begin from there again.
    from_elsewhere = ["training.fork_run_id=null", "training.load_weights_only=false", "system.input.warm_start=null"]
    return [*program, f"training.run_id={last.parent.name}", *from_elsewhere]


def _num_stops(run: RunDirectory) -> int:
    """Return how often anemoi-training has saved and left on request, which its exit code does not tell."""
    return sum(event["event"] == "stop_requested" for event in read_events(run.events_file))


def _exit_code(code: int) -> ExitCode:
    """Return the exit code of the run for a command's code: of that only 0 and 75 ("run again") have a meaning here."""
    known = (ExitCode.FINISHED, ExitCode.SAVED_RUN_AGAIN)
    return ExitCode(code) if code in known else ExitCode.INTERNAL


class _Command:
    """The command while it runs."""

    def __init__(self, command: Sequence[str], allocation: Allocation, *, by_srun: bool) -> None:
        self._command, self._allocation, self._by_srun = command, allocation, by_srun
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = self._passed_on = False

    def run(self) -> int:
        """Run it to its end; return 75 if it was asked to stop, whatever its own code: it has not done its work."""
        signal.signal(signal.SIGTERM, self._stop)
        # Programs that use this package themselves must not take this process for their launcher.
        environment = {name: value for name, value in os.environ.items() if name not in (PARENT_PID, LAUNCHED)}
        try:
            self._process = subprocess.Popen(self._command, env=environment, process_group=0)
        except OSError as error:
            print_message(f"cannot start {self._command[0]}: {error.strerror}")
            return 127
        if self._asked:  # before the process existed
            self._pass_on()
        code = self._process.wait()
        with contextlib.suppress(ProcessLookupError):  # processes left in the background would outlive the job
            os.killpg(self._process.pid, signal.SIGKILL)
        if self._asked:
            return int(ExitCode.SAVED_RUN_AGAIN)
        return code if code >= 0 else 128 - code

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            return
        self._asked = True
        self._pass_on()

    def _pass_on(self) -> None:
        if self._process is None or self._passed_on:
            return
        self._passed_on = True
        if self._by_srun:
            # A signal to srun would kill the tasks at once; scancel signals the tasks and not the batch script.
            slurm_queue.call(["scancel", "--signal=TERM", self._allocation.job_id], timeout_s=60)
        else:
            self._process.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
