"""The batch process of a SLURM job: ``python -m anemoi_dist.launch.job RUN_DIRECTORY``, the last line of the script.

It starts the ranks by srun, asks them to save before the time limit, restarts them after a crash, and at the end
decides by what the ranks recorded whether the job goes back into the queue. No torch.

SLURM may start one job several times: after ``scontrol requeue``, after a preemption, or because it wrongly
considers a node dead. All these starts have the same job id; only SLURM's restart counter tells them apart.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from anemoi_dist.config.launcher_checks import parse_time_limit
from anemoi_dist.config.parse import from_yaml
from anemoi_dist.config.schema import Config
from anemoi_dist.errors import AnemoiDistError, ConfigError, ExitCode, print_error, print_message
from anemoi_dist.process.output import protect_output
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.lock import LEAVE, ask_to_stop, hold_launch, withdraw_stop

from ..launchers.local import rank_environment
from ..launchers.slurm import num_ranks_per_node
from ..launchers.supervisor import Job, num_saved, supervise
from ..status import journal, slurm_queue
from ..status.journal import Entry
from .allocation import Allocation, interface_variables, meeting_files, start_command
from .requeue import Decision, History, Outcome, decide

#: First words of the stop file that this process writes: one that an earlier start left behind is not for this one.
_STOP_MARK = "time limit of SLURM job"
#: slurmctld may be down for maintenance. It comes back, or the time limit ends the job.
_PATIENCE_S, _PAUSE_S = 1800.0, 10.0
_T = TypeVar("_T")


class SupersededError(AnemoiDistError):
    """SLURM considered this job's node dead and has started the job again elsewhere: this start must leave the run."""

    exit_code = ExitCode.SAVED_RUN_AGAIN


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one start of the job and return the exit code of the batch script."""
    own, command = _split(sys.argv[1:] if arguments is None else list(arguments))
    parser = argparse.ArgumentParser(prog="python -m anemoi_dist.launch.job", description=__doc__)
    parser.add_argument("run_directory", type=Path)
    parser.add_argument("--srun", action="store_true", help="start the command after -- by srun")
    options = parser.parse_args(own)
    protect_output()
    signals: list[int] = []
    # The time limit's warning may come while this process waits for an earlier start to leave, and by default it would
    # end the process; the supervisor installs its own handler later.
    signal.signal(signal.SIGUSR1, lambda number, frame: signals.append(number))
    run = RunDirectory(options.run_directory.absolute())
    try:
        config = from_yaml(run.config_file.read_text(encoding="utf-8"))
        allocation = Allocation.here(os.environ)
        return BatchJob(run, config, allocation, command=command, by_srun=options.srun, signals=signals).run()
    except AnemoiDistError as error:
        print_error(error)
        return int(error.exit_code)
    except OSError as error:
        print_message(f"run {run.run_id}: {error}")
        return int(ExitCode.PREFLIGHT)


def _split(arguments: list[str]) -> tuple[list[str], tuple[str, ...] | None]:
    if "--" not in arguments:
        return arguments, None
    place = arguments.index("--")
    return arguments[:place], tuple(arguments[place + 1 :])


class BatchJob:
    """One start of a SLURM job, from the first line of its batch script to the last.

    Parameters
    ----------
    run : RunDirectory
        A prepared run.
    config : Config
        The configuration frozen in it.
    allocation : Allocation
        The nodes.
    command : tuple[str, ...], optional
        Run instead of the trainer.
    by_srun : bool
        Whether srun starts that command, once for each rank.
    signals : list[int], optional
        Signals that this process has received so far; later ones are appended.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        allocation: Allocation,
        *,
        command: tuple[str, ...] | None = None,
        by_srun: bool = False,
        signals: list[int] | None = None,
    ) -> None:
        self._run, self._launcher, self._allocation = run, config.launcher, allocation
        self._command, self._by_srun = command, by_srun
        self._head = ""
        self._signals = [] if signals is None else signals
        self._stopped_by_person = False
        self._facts: dict[str, str | int] = {"job_id": allocation.job_id, "life": allocation.requeues}

    def run(self) -> int:
        """Run until there is nothing left to do in this start; return the exit code of the batch script."""
        code, progress = self._run_ranks()
        entries = journal.read(self._run)
        outcome = Outcome(
            code,
            first_signal=self._signals[0] if self._signals and not self._stopped_by_person else None,
            progress=progress,
            request=self._person_request(entries),
        )
        decision = decide(outcome, History.count(entries, self._allocation.job_id), self._launcher)
        is_ended = outcome.first_signal == signal.SIGTERM or (decision.requeue and self._is_being_ended())
        if outcome.request is None and is_ended:
            decision = Decision(False, self._why_slurm_ended_it())
        print_message(f"run {self._run.run_id}: {decision.reason}")
        if decision.requeue:
            self._requeue(outcome, decision)
        return code

    def _run_ranks(self) -> tuple[int, bool]:
        """Own the run while its ranks run; return its exit code, and whether anything new was saved."""
        hold = hold_launch(self._run, say=print_message)
        try:
            self._withdraw_own_stop()
            environment = {**os.environ, **interface_variables(self._launcher)}
            self._head = self._allocation.head_address(environment)
            # Counted as the owner: an earlier start that had to leave may have saved until now.
            saved_before = num_saved(self._run)
            code = self._supervise(environment)
            return code, num_saved(self._run) > saved_before
        except SupersededError as error:
            self._note("end", code=int(error.exit_code), reason=str(error))
            raise
        finally:
            self._withdraw_own_stop()
            for file in meeting_files(self._run, self._allocation):
                file.unlink(missing_ok=True)
            hold.release()

    def _note(self, event: str, **fields: object) -> None:
        journal.note(self._run, event, **fields, **self._facts)

    # Starting ranks

    def _supervise(self, environment: Mapping[str, str]) -> int:
        if self._command is None:
            return supervise(self._job(self._start_ranks, rank_environment(environment)), self._launcher)
        # A program that we do not know may not stand a second start: no restarts.
        return supervise(self._job(self._start_command, environment), replace(self._launcher, max_restarts=0))

    def _job(self, command: Callable[[int], list[str]], environment: Mapping[str, str]) -> Job:
        return Job(
            run=self._run,
            kind="slurm",
            command=command,
            environment=environment,
            ask_to_stop=self._ask_to_stop,
            facts=self._facts,
            on_signal=self._signals.append,
            early=self._signals,
        )

    def _start_ranks(self, restarts: int) -> list[str]:
        self._refuse_superseded()
        return start_command(
            self._run, self._launcher, self._allocation, python=sys.executable, head=self._head, start=restarts
        )

    def _start_command(self, restarts: int) -> list[str]:
        assert self._command is not None
        flags = ["--srun", str(num_ranks_per_node(self._launcher))] if self._by_srun else []
        program = [sys.executable, "-m", "anemoi_dist.launch.job.command", str(self._run.path)]
        return [*program, *flags, "--", *self._command]

    def _refuse_superseded(self) -> None:
        """Raise if SLURM has started the job again elsewhere: srun would start ranks in the nodes of that start."""
        requeues, state = self._ask(lambda: self._allocation.fields("Restarts", "JobState"))
        if requeues != str(self._allocation.requeues) or state != "RUNNING":
            raise SupersededError(
                f"SLURM job {self._allocation.job_id} is {state} and has been requeued {requeues} times, this start is "
                f"of requeue {self._allocation.requeues}: leaving the run to the next"
            )

    # Stopping ranks

    def _ask_to_stop(self, process: subprocess.Popen[bytes], number: int) -> None:
        if self._command is not None and not journal.is_anemoi_training(self._command):
            process.send_signal(signal.SIGTERM)
        elif number == signal.SIGUSR1:
            # By a file in the run directory: srun would pass a signal on to torchrun, which would kill its ranks before
            # they have saved. After a SIGTERM nothing is left to do, since scancel has sent it to every rank.
            asked = ask_to_stop(self._run, f"{_STOP_MARK} {self._allocation.job_id}")
            # A person's stop file is there already: the job must not go back into the queue afterwards.
            self._stopped_by_person = not asked

    def _withdraw_own_stop(self) -> None:
        """Remove a stop file that no person has written: it would stop the next start at its first step."""
        withdraw_stop(self._run, _STOP_MARK, LEAVE)

    def _person_request(self, entries: Sequence[Entry]) -> str | None:
        """Return ``stop`` or ``cancel`` if a person has asked this start for it."""
        begun = max((place for place, entry in enumerate(entries) if entry.event == "launch"), default=0)
        asked = journal.last(entries[begun:], "stop", "cancel")
        return None if asked is None else asked.event

    # SLURM's decisions

    def _is_being_ended(self) -> bool:
        """Whether SLURM ends this job for another reason than its time limit: scancel by hand, for one."""
        if all(number == signal.SIGUSR1 for number in self._signals):
            return False
        state, ran, limit = self._ask(lambda: self._allocation.fields("JobState", "RunTime", "TimeLimit"))
        return state != "RUNNING" and _seconds(ran or "") < _seconds(limit or "UNLIMITED")

    def _why_slurm_ended_it(self) -> str:
        """Return why SLURM has ended this start; a cancellation, which is final, is recorded."""
        try:
            # Between SIGTERM and SIGKILL there is no time for the patience of _ask.
            requeues, limit, ran = self._allocation.fields(
                "Restarts", "TimeLimit", "RunTime", timeout_s=slurm_queue.TIMEOUT_S
            )
        except slurm_queue.QueueError as error:
            return f"ended by SLURM: {error}"
        if requeues is not None and int(requeues) > self._allocation.requeues:
            return "SLURM has put the job back into the queue"
        if limit and ran and _seconds(ran) >= _seconds(limit):
            return "ended at the time limit: a larger launcher.slurm.signal_s leaves more time to save"
        self._note("cancel")
        return "cancelled"

    def _requeue(self, outcome: Outcome, decision: Decision) -> None:
        (requeues,) = self._ask(lambda: self._allocation.fields("Restarts"))
        # After a preemption SLURM requeues by itself; a second requeue would end the start that has begun since.
        if requeues != str(self._allocation.requeues):
            print_message("SLURM has put the job back into the queue already")
            return
        # Noted first: scontrol requeue ends this process at once.
        self._note(
            "requeue", code=outcome.code, reason=decision.reason, count=decision.count, progress=outcome.progress
        )
        answer = self._ask(lambda: slurm_queue.call(["scontrol", "requeue", self._allocation.job_id], timeout_s=60))
        if answer.returncode:
            refusal = " ".join(answer.stderr.split())
            self._note("end", code=outcome.code, reason=f"not requeued: {refusal}")
            print_message(
                f"SLURM does not requeue the job ({refusal}): `anemoi-dist resume {self._run.run_id}` continues it"
            )

    def _ask(self, question: Callable[[], _T]) -> _T:
        """Ask slurmctld, again and again while it does not answer."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return question()
            except slurm_queue.QueueError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_PAUSE_S)


def _seconds(text: str) -> float:
    """Return the seconds of one of SLURM's times, infinite for words such as UNLIMITED."""
    try:
        return parse_time_limit(text)
    except ConfigError:
        return float("inf")
