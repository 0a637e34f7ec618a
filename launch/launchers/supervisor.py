"""Supervise the ranks of a run under every launcher: start them, pass on a stop, restart them, report their end."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from anemoi_dist.config.schema import LauncherConfig
from anemoi_dist.errors import ExitCode, print_message
from anemoi_dist.process.output import write_to_descriptor
from anemoi_dist.process.parent_death import PARENT_PID
from anemoi_dist.run.attempt import ENDING, record_left_ending
from anemoi_dist.run.directory import LAUNCHED, RunDirectory
from anemoi_dist.run.events import read_events
from anemoi_dist.run.records import AttemptRecord

from ..status import journal

#: Exit codes worth a restart: a crash and a hang. An error that a rank raised on purpose would recur.
RESTARTED = (ExitCode.INTERNAL, ExitCode.HANG)
_LONGEST_WAIT_S = 60.0
#: How long, and how often, a launcher tries to record an end that rank 0 could not record.
_RECORD_PATIENCE_S, _RECORD_PAUSE_S = 60.0, 1.0


@dataclass(frozen=True)
class Ending:
    """How one start of the ranks ended.

    Attributes
    ----------
    code : int
        The exit code of the run.
    message : str
        For the user; empty if the ranks have printed it.
    reason : str
        The same in one line, for ``launch.jsonl``.
    """

    code: int
    message: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Job:
    """The ranks of one run, as a command that starts them.

    Attributes
    ----------
    run : RunDirectory
        A prepared run, owned by this process.
    kind : str
        ``local``, ``slurm`` or ``mpi``.
    command : Callable[[int], list[str]]
        Number of restarts so far -> the command that starts the ranks and ends with them.
    environment : Mapping[str, str]
        Environment of the command.
    ask_to_stop : Callable[[subprocess.Popen[bytes], int], None]
        Passes a stop signal on, so that the ranks save and leave.
    facts : Mapping[str, str | int]
        Attributes of this job for its journal entries: ``job_id``, ``life``.
    returns_codes : bool
        Whether the command returns a rank's exit code unchanged. Hydra's mpirun also returns the bare number of a
        signal, and 6 is an abort there, no hang.
    on_signal : Callable[[int], None]
        Called with every signal as it comes, also between two starts.
    early : Sequence[int]
        Signals that came before the supervision began.
    """

    run: RunDirectory
    kind: str
    command: Callable[[int], list[str]]
    environment: Mapping[str, str]
    ask_to_stop: Callable[[subprocess.Popen[bytes], int], None]
    facts: Mapping[str, str | int]
    returns_codes: bool = True
    on_signal: Callable[[int], None] = lambda number: None
    early: Sequence[int] = ()


def supervise(job: Job, options: LauncherConfig) -> int:
    """Run the job until it ends without another restart and return the exit code of the run.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP ask the ranks to save and leave; a second one but SIGUSR1 kills them. A crash or
    a hang is followed by another start, ``launcher.max_restarts`` times, each after a longer wait than the one before
    unless the ranks have saved a checkpoint in between.

    Parameters
    ----------
    job : Job
        What to run.
    options : LauncherConfig
        How often to start again, and after which wait.
    """
    journal.note(job.run, "launch", kind=job.kind, **job.facts)
    with _Stopper(job.ask_to_stop, job.on_signal) as stopper:
        for number in list(job.early)[:1]:  # a second one would kill
            stopper.request(number)
        # All events are read for it: not where nothing is started again.
        saved, num_in_vain = num_saved(job.run) if options.max_restarts else 0, 0
        for restarts in range(options.max_restarts + 1):
            ending = _run_once(job, stopper, restarts)
            if ending.message:
                print_message(ending.message)
            if ending.code not in RESTARTED or stopper.requested or restarts == options.max_restarts:
                break
            # A node or file system that is down needs a while; each further crash is waited for twice as long. A start
            # that has saved something shows that it is not down.
            saved_before, saved = saved, num_saved(job.run)
            num_in_vain = 0 if saved > saved_before else num_in_vain + 1
            wait_s = min(options.backoff_s * 2 ** max(0, num_in_vain - 1), _LONGEST_WAIT_S)
            print_message(f"run {job.run.run_id}: restart {restarts + 1} of {options.max_restarts} in {wait_s:g} s")
            note = {"code": int(ending.code), "reason": ending.reason, "wait_s": wait_s}
            journal.note(job.run, "restart", **note, **job.facts)
            if stopper.wait(wait_s):
                break
    if ending.code in RESTARTED and job.kind != "slurm":  # a job in SLURM may go back into the queue by itself
        print_message("the same command continues from the last checkpoint")
    journal.note(job.run, "end", code=int(ending.code), reason=ending.reason, **job.facts)
    return ending.code


def num_saved(run: RunDirectory) -> int:
    """Return how many checkpoints the run has recorded, those that were deleted since and saved again included."""
    return sum(event["event"] == "checkpoint" for event in read_events(run.events_file))


def _run_once(job: Job, stopper: _Stopper, restarts: int) -> Ending:
    attempts_before = len(job.run.read_state().attempts)
    # Not in the run directory, whose disk may be full when the note is needed.
    note = Path(tempfile.gettempdir(), f"anemoi-dist-{os.getpid()}-{uuid.uuid4().hex}")
    environment = {**job.environment, LAUNCHED: job.kind, PARENT_PID: str(os.getpid()), ENDING: str(note)}
    # In a session of its own, so that Ctrl-C in a terminal reaches this process alone: the ranks would otherwise get
    # SIGINT twice, and a second one kills.
    process = subprocess.Popen(job.command(restarts), env=environment, start_new_session=True)
    agent_code = stopper.attend(process)
    _record_left(job.run, note)
    # From the run's own record: torchrun and mpirun return 1 for nearly every failure.
    return read_ending(
        job.run,
        agent_code,
        attempts_before=attempts_before,
        interrupted=stopper.requested,
        returns_codes=job.returns_codes,
    )


def _record_left(run: RunDirectory, note: Path) -> None:
    """Record the end that rank 0 could not record, once there is room for it."""
    deadline, has_said = time.monotonic() + _RECORD_PATIENCE_S, False
    while True:
        try:
            record_left_ending(run, note)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                print_message(f"run {run.run_id}: its end is not recorded: {error}")
                break
            if not has_said:
                has_said = True
                print_message(f"run {run.run_id}: its end cannot be recorded ({error}); trying again for a while")
            time.sleep(_RECORD_PAUSE_S)
    note.unlink(missing_ok=True)


class _Stopper:
    """Passes stop signals on to the ranks while they run."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(
        self, ask_to_stop: Callable[[subprocess.Popen[bytes], int], None], on_signal: Callable[[int], None]
    ) -> None:
        self._ask_to_stop, self._on_signal = ask_to_stop, on_signal
        self._process: subprocess.Popen[bytes] | None = None
        self._former: dict[int, Any] = {}
        self._asked: threading.Event = threading.Event()
        self._number = 0
        self._passed_on = False

    @property
    def requested(self) -> bool:
        """Whether somebody has asked for a stop."""
        return self._number != 0

    def wait(self, seconds: float) -> bool:
        """Wait, or return True as soon as a stop is asked for."""
        return self._asked.wait(seconds)

    def attend(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the process, and return its code."""
        self._process = process
        self._pass_on()  # asked for between two starts, or before the first
        code = process.wait()
        self._process = None
        return code

    def _pass_on(self) -> None:
        """Pass a stop on to the ranks, once."""
        if self.requested and self._process is not None and not self._passed_on:
            self._passed_on = True
            self._ask_to_stop(self._process, self._number)

    def __enter__(self) -> _Stopper:
        self._former = {number: signal.signal(number, self._handle) for number in self._SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._on_signal(number)
        # Not by print, which may not be entered again from a handler that interrupted it.
        if self.requested:
            if number == signal.SIGUSR1:
                return  # a scheduler's reminder of the time limit: the ranks are saving already
            if self._process is not None:
                write_to_descriptor(2, b"killed; what was saved last is intact\n")
                os.killpg(self._process.pid, signal.SIGKILL)
            return
        self.request(number)

    def request(self, number: int) -> None:
        """Ask for a stop of the ranks that run and of any that are started later."""
        self._number = number
        write_to_descriptor(2, f"{signal.Signals(number).name}: saving and stopping; once more kills\n".encode())
        self._pass_on()
        self._asked.set()


def signal_process(process: subprocess.Popen[bytes], number: int) -> None:
    """Ask for a stop by a signal to the process, which passes it to the ranks of this machine."""
    process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def read_ending(
    run: RunDirectory, agent_code: int, *, attempts_before: int, interrupted: bool, returns_codes: bool = True
) -> Ending:
    """Return how the ranks ended, with a message for the user unless rank 0 has printed one.

    The command that started them returns a code of its own for many failures, so the record in ``run.json`` decides.

    Parameters
    ----------
    run : RunDirectory
        The run.
    agent_code : int
        Returned by the command; one of ours if the first rank that failed left with it.
    attempts_before : int
        Attempts recorded before this start.
    interrupted : bool
        Whether a stop was asked for through this process.
    returns_codes : bool
        As in :class:`Job`.
    """
    attempts = run.read_state().attempts
    last = attempts[-1] if len(attempts) > attempts_before else None
    if last is not None and last.exit_code is not None:
        return Ending(last.exit_code, _describe_failure(run, last, code=last.exit_code), last.failure_line)
    if interrupted:  # before rank 0 had recorded an attempt, or it was killed before it could record the end
        reason = "stopped before anything new was saved"
        return Ending(ExitCode.INTERRUPTED, f"{reason}; the same command starts {run.run_id} again", reason)
    is_ours = returns_codes and agent_code in set(ExitCode)
    if last is None:
        return _ending_before_attempt(run, agent_code, is_ours=is_ours)
    if is_ours and agent_code != ExitCode.FINISHED:
        return Ending(agent_code, f"run {run.run_id}: attempt {last.number} ended with {_name(agent_code)}")
    return Ending(
        ExitCode.INTERNAL,
        f"run {run.run_id}: attempt {last.number} exited without recording a status: a rank was killed or crashed "
        f"(out of memory?); logs: {run.logs_dir(last.number)}",
        "a rank was killed or crashed without recording a status (out of memory?)",
    )


def _ending_before_attempt(run: RunDirectory, agent_code: int, *, is_ours: bool) -> Ending:
    if is_ours and agent_code == ExitCode.HANG:
        reason = "the ranks have not met in time"
        return Ending(agent_code, f"run {run.run_id}: {reason}; where they stood is above", reason)
    # The run was finished already, or refused before the attempt began: rank 0 has printed which.
    if agent_code in set(ExitCode) - {ExitCode.HANG}:
        return Ending(agent_code)
    reason = "no rank got as far as recording its start"
    message = f"run {run.run_id}: {reason} (the command returned {agent_code}); what they printed is above"
    return Ending(ExitCode.INTERNAL, message, reason)


def _describe_failure(run: RunDirectory, attempt: AttemptRecord, *, code: int) -> str:
    """Describe which rank failed first and how; empty if rank 0 has printed its own error."""
    failure = attempt.failure
    if failure is None:
        logs = run.logs_dir(attempt.number)
        return "" if code not in RESTARTED else f"run {run.run_id}: {_name(code)}; logs: {logs}"
    if failure.returned is not None:
        return f"run {run.run_id}: {failure.line}; `anemoi-dist logs {run.run_id}` has what it printed"
    if failure.signal is not None:
        return f"run {run.run_id}: {failure.place} was {failure.error}; its log: {failure.log}"
    if failure.rank == 0 and code not in RESTARTED:
        return ""
    first = f"run {run.run_id}: {failure.place} failed first: {_name(code)}; its log: {failure.log}"
    has_said = failure.rank == 0 and failure.hang is None
    return "\n".join([first] if has_said else [first, *(f"  {line}" for line in (failure.error or "").splitlines())])


def _name(code: int) -> str:
    known = {int(each): each.name.lower().replace("_", " ") for each in ExitCode}
    return f"code {code} ({known[code]})" if code in known else f"code {code}"
