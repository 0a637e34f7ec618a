"""The batch process of a SLURM job: ``python -m anemoi_dist.launch.job RUN_DIRECTORY``, the last line of the script.

It starts the ranks by srun, asks them to save before the time limit, starts them again after a crash, and at the end
decides by what the ranks recorded whether the job goes back into the queue. No torch.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from anemoi_dist.config.launcher_checks import parse_time_limit
from anemoi_dist.config.parse import from_yaml
from anemoi_dist.config.schema import Config, LauncherConfig
from anemoi_dist.errors import AnemoiDistError, ConfigError, ExitCode
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.events import read_events
from anemoi_dist.run.lock import LEAVE, ask_to_stop, hold_launch, withdraw_stop

from ..launchers.local import rank_environment
from ..launchers.slurm import num_ranks_per_node
from ..launchers.supervisor import RESTARTED, Job, supervise
from ..status import journal, slurm_queue
from ..status.journal import Entry
from .allocation import Allocation, interface_variables, meeting_files, start_command

#: Begins the stop file that this process writes: what another life has left there asks nothing of this one.
_STOP_MARK = "time limit of SLURM job"
#: slurmctld that is down comes back, or the time limit ends the job.
_PATIENCE_S, _PAUSE_S = 1800.0, 10.0
_T = TypeVar("_T")


class SupersededError(AnemoiDistError):
    """SLURM took this job's node for dead and has started the job again elsewhere: this life must not touch it."""

    exit_code = ExitCode.SAVED_RUN_AGAIN


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one life of the job and return the exit code of the batch script."""
    own, words = _split(sys.argv[1:] if arguments is None else list(arguments))
    parser = argparse.ArgumentParser(prog="python -m anemoi_dist.launch.job", description=__doc__)
    parser.add_argument("run_directory", type=Path)
    parser.add_argument("--srun", action="store_true", help="start the command after -- by srun")
    options = parser.parse_args(own)
    signals: list[int] = []
    # A warning that comes while this life waits for another to leave must not end it; supervise takes over.
    signal.signal(signal.SIGUSR1, lambda number, frame: signals.append(number))
    run = RunDirectory(options.run_directory.absolute())
    try:
        config = from_yaml(run.config_file.read_text(encoding="utf-8"))
        allocation = Allocation.here(os.environ)
        return Life(run, config, allocation, words=words, by_srun=options.srun, signals=signals).live()
    except AnemoiDistError as error:
        _say(f"anemoi-dist: {error}")
        return int(error.exit_code)
    except OSError as error:
        _say(f"run {run.run_id}: {error}")
        return int(ExitCode.PREFLIGHT)


def _split(arguments: list[str]) -> tuple[list[str], tuple[str, ...] | None]:
    if "--" not in arguments:
        return arguments, None
    place = arguments.index("--")
    return arguments[:place], tuple(arguments[place + 1 :])


class Life:
    """One life of a job, from the batch script's start to its end.

    Parameters
    ----------
    run : RunDirectory
        A prepared run.
    config : Config
        As frozen in it.
    allocation : Allocation
        Where.
    words : tuple[str, ...], optional
        A command to run instead of our trainer.
    by_srun : bool
        Whether srun starts that command, once for each rank.
    signals : list[int], optional
        What this process has been sent so far; it is added to.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        allocation: Allocation,
        *,
        words: tuple[str, ...] | None = None,
        by_srun: bool = False,
        signals: list[int] | None = None,
    ) -> None:
        self._run, self._launcher, self._allocation = run, config.launcher, allocation
        self._words, self._by_srun = words, by_srun
        self._head = ""
        self._signals = [] if signals is None else signals
        self._stopped_by_person = False
        self._facts: dict[str, Any] = {"job_id": allocation.job_id, "life": allocation.life}

    def live(self) -> int:
        """Run until there is nothing left to do in this life; return the exit code of the batch script."""
        hold = hold_launch(self._run, say=_say)
        try:
            self._drop_old_stop()
            saved = num_saved(self._run)
            environment = {**os.environ, **interface_variables(self._launcher)}
            self._head = self._allocation.head_address(environment)
            code = self._supervise(environment)
        except SupersededError as error:
            journal.note_if_possible(self._run, "end", code=int(error.exit_code), reason=str(error), **self._facts)
            raise
        finally:
            self._drop_old_stop()
            for file in meeting_files(self._run, self._allocation):
                file.unlink(missing_ok=True)
            hold.release()
        events = journal.read(self._run)
        first_signal = self._signals[0] if self._signals and not self._stopped_by_person else None
        progress = num_saved(self._run) > saved
        ended = Ended(code, first_signal=first_signal, progress=progress, asked=self._asked_by_person(events))
        decision = decide(ended, Past.of(events, self._allocation.job_id), self._launcher)
        if ended.asked is None and (first_signal == signal.SIGTERM or (decision.requeue and self._is_being_ended())):
            decision = Decision(False, self._who_ended_it())
        _say(f"run {self._run.run_id}: {decision.reason}")
        if decision.requeue:
            self._requeue(ended, decision)
        return code

    def _asked_by_person(self, events: Sequence[Entry]) -> str | None:
        """Return ``stop`` or ``cancel`` where a person has asked this life for it."""
        begun = max((place for place, event in enumerate(events) if event.event == "launch"), default=0)
        asked = journal.last(events[begun:], "stop", "cancel")
        return None if asked is None else asked.event

    def _is_being_ended(self) -> bool:
        """Whether SLURM ends this job, and not because its time is up: scancel by hand, for one."""
        if all(number == signal.SIGUSR1 for number in self._signals):
            return False
        state, ran, limit = self._ask(lambda: self._allocation.fields("JobState", "RunTime", "TimeLimit"))
        return state != "RUNNING" and _seconds(ran or "") < _seconds(limit or "UNLIMITED")

    def _supervise(self, environment: Mapping[str, str]) -> int:
        if self._words is None:
            environment = rank_environment(environment)
            job = self._job(self._start_ranks, environment)
            return supervise(job, self._launcher)
        # Nobody knows whether another program can be started twice in a row.
        return supervise(self._job(self._start_command, environment), replace(self._launcher, max_restarts=0))

    def _job(self, command: Callable[[int], list[str]], environment: Mapping[str, str]) -> Job:
        return Job(
            run=self._run,
            kind="slurm",
            command=command,
            environment=environment,
            ask_to_stop=self._ask_to_stop,
            facts=self._facts,
            hear=self._signals.append,
            early=self._signals,
        )

    def _start_ranks(self, restarts: int) -> list[str]:
        self._refuse_superseded()
        return start_command(
            self._run, self._launcher, self._allocation, python=sys.executable, head=self._head, start=restarts
        )

    def _start_command(self, restarts: int) -> list[str]:
        assert self._words is not None
        flags = ["--srun", str(num_ranks_per_node(self._launcher))] if self._by_srun else []
        return [sys.executable, "-m", "anemoi_dist.launch.job.command", str(self._run.path), *flags, "--", *self._words]

    def _refuse_superseded(self) -> None:
        """Make sure that srun starts ranks in this life's nodes: the next life of a job has the same id."""
        restarts, state = self._ask(lambda: self._allocation.fields("Restarts", "JobState"))
        if restarts != str(self._allocation.life) or state != "RUNNING":
            raise SupersededError(
                f"SLURM job {self._allocation.job_id} is {state} and was started {restarts} times again, this life is "
                f"its {self._allocation.life}.: leaving the run to the next"
            )

    def _ask_to_stop(self, process: subprocess.Popen[bytes], number: int) -> None:
        if self._words is not None:
            process.send_signal(signal.SIGTERM)
        elif number == signal.SIGUSR1:
            # Through the run directory: srun would pass a signal on to torchrun, which it kills. Whoever ends the job
            # by SIGTERM has sent that to every rank.
            asked = ask_to_stop(self._run, f"{_STOP_MARK} {self._allocation.job_id}")
            self._stopped_by_person = not asked  # who asked before wants the run to stay stopped

    def _drop_old_stop(self) -> None:
        """Remove a stop file that no person has written, met or not."""
        withdraw_stop(self._run, _STOP_MARK, LEAVE)

    def _who_ended_it(self) -> str:
        """Say why SLURM has ended this life, and record it where that was for good."""
        try:
            restarts, limit, ran = self._allocation.fields(
                "Restarts", "TimeLimit", "RunTime", timeout_s=slurm_queue.TIMEOUT_S
            )
        except slurm_queue.QueueError as error:
            return f"ended by SLURM: {error}"
        if restarts is not None and int(restarts) > self._allocation.life:
            return "SLURM has put the job back into the queue"
        if limit and ran and _seconds(ran) >= _seconds(limit):
            return "ended at the time limit: a larger launcher.slurm.signal_s leaves more time to save"
        journal.note_if_possible(self._run, "cancel", **self._facts)
        return "cancelled"

    def _requeue(self, ended: Ended, decision: Decision) -> None:
        code = ended.code
        (restarts,) = self._ask(lambda: self._allocation.fields("Restarts"))
        if restarts != str(self._allocation.life):
            _say("SLURM has put the job back into the queue already")
            return
        about = {"code": code, "reason": decision.reason, "count": decision.count, "progress": ended.progress}
        journal.note_if_possible(self._run, "requeue", **about, **self._facts)
        answer = self._ask(lambda: slurm_queue.call(["scontrol", "requeue", self._allocation.job_id], timeout_s=60))
        if answer.returncode:
            said = " ".join(answer.stderr.split())
            journal.note_if_possible(self._run, "end", code=code, reason=f"not requeued: {said}", **self._facts)
            _say(f"SLURM does not requeue the job ({said}): `anemoi-dist resume {self._run.run_id}` goes on")

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


@dataclass(frozen=True)
class Ended:
    """How a life ended.

    Attributes
    ----------
    code : int
        The exit code of the run.
    first_signal : int, optional
        What asked this life to stop; None for nothing, or a person's stop file.
    progress : bool
        Whether it has saved something that was not there before.
    asked : str, optional
        ``stop`` or ``cancel`` where a person has asked for it.
    """

    code: int
    first_signal: int | None
    progress: bool
    asked: str | None = None


@dataclass(frozen=True)
class Past:
    """How often this job has gone back into the queue by itself.

    Attributes
    ----------
    requeues : int
        After a time limit.
    retries : int
        After a crash.
    barren : bool
        Whether the life before this one was asked to stop before it had saved anything.
    """

    requeues: int = 0
    retries: int = 0
    barren: bool = False

    @classmethod
    def of(cls, journal_entries: Sequence[Entry], job_id: str) -> Past:
        """Count in ``launch.jsonl``."""
        requeues = [entry for entry in journal_entries if entry.event == "requeue" and entry.job_id == job_id]
        retries = sum(entry.code in RESTARTED for entry in requeues)
        last = requeues[-1] if requeues else None
        barren = last is not None and last.code == ExitCode.INTERRUPTED and not last.progress
        return cls(len(requeues) - retries, retries, barren)


@dataclass(frozen=True)
class Decision:
    """Whether the job goes back into the queue, why, and for the which time."""

    requeue: bool
    reason: str
    count: int = 0


def decide(ended: Ended, past: Past, launcher: LauncherConfig) -> Decision:
    """Say whether another life of the job is wanted. Pure.

    Where SLURM itself ends the job (a preemption, ``scontrol requeue``, ``scancel``), SLURM knows what comes next.
    """
    if ended.code == ExitCode.FINISHED:
        return Decision(False, "finished")
    if ended.asked is not None:
        return Decision(False, "stopped on request" if ended.asked == "stop" else "cancelled on request")
    if ended.first_signal not in (None, signal.SIGUSR1):
        name = signal.Signals(ended.first_signal).name
        return Decision(False, f"ended by SLURM ({name}), which decides whether the job runs again")
    if ended.code in (ExitCode.SAVED_RUN_AGAIN, ExitCode.INTERRUPTED):
        if ended.first_signal is None:
            return Decision(False, "stopped on request")
        if ended.code == ExitCode.INTERRUPTED and not ended.progress and past.barren:
            return Decision(False, "the time limit came before anything was saved, twice in a row: it is too short")
        if past.requeues >= launcher.max_requeues:
            return Decision(False, f"the time limit came after launcher.max_requeues={launcher.max_requeues} requeues")
        count = past.requeues + 1
        return Decision(True, f"the time limit is near: requeue {count} of {launcher.max_requeues}", count)
    if ended.code not in RESTARTED:
        return Decision(False, f"code {ended.code} would come again: not requeued")
    if not ended.progress:
        return Decision(False, "crashed without having saved anything new: not requeued")
    if past.retries >= launcher.max_retries:
        return Decision(False, f"crashed after launcher.max_retries={launcher.max_retries} retries")
    return Decision(True, f"crashed: retry {past.retries + 1} of {launcher.max_retries}", past.retries + 1)


def num_saved(run: RunDirectory) -> int:
    """Return how many checkpoints the run has recorded, those that were deleted since and saved again included."""
    return sum(event["event"] == "checkpoint" for event in read_events(run.events_file))


def _seconds(text: str) -> float:
    """Return the seconds of one of SLURM's times, infinite for words such as UNLIMITED."""
    try:
        return parse_time_limit(text)
    except ConfigError:
        return float("inf")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
