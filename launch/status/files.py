"""Read the files of a run once, defensively: any of them may be missing, torn or damaged."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from anemoi_dist.errors import PreflightError
from anemoi_dist.process.parent_death import process_started
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.records import AttemptRecord, Owner, RunState, from_json, whole
from anemoi_dist.telemetry.heartbeat import HeartbeatRecord, read_heartbeat

from . import journal
from .journal import Entry

#: Of an events.jsonl of any size only so much is read, from its end.
TAIL_BYTES = 64 * 1024
#: Heartbeat files younger than this need not be opened to know that their ranks are well.
FRESH_S = 60.0
#: A recorded attempt begins a moment after its process; clocks are not finer than this.
_CLOCK_SLACK_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Beat(HeartbeatRecord):
    """The newest heartbeat file of one rank; ``written`` is the time of the file."""

    written: float

    @property
    def seen(self) -> float:
        """Last sign of life, Unix seconds."""
        # The earlier of the rank's own clock and the file's time, so that a clock ahead does not hide a silence.
        return min(self.time, self.written)


@dataclass(frozen=True)
class StepEvent:
    """The newest ``step`` event of ``events.jsonl``, as far as it replaces a heartbeat."""

    step: int
    time: float | None = None
    loss: float | None = None
    samples_per_s: float | None = None
    eta_s: float | None = None


@dataclass(frozen=True)
class Facts:
    """All that is known of a run without asking a scheduler.

    Attributes
    ----------
    has_config : bool
        A configuration is frozen in it.
    damage : str
        Why ``run.json`` is passed over; empty where it is sound.
    attempts : tuple[AttemptRecord, ...]
        In their order.
    launch : tuple[Entry, ...]
        ``launch.jsonl``.
    beats : tuple[Beat, ...]
        Of the newest attempt: rank 0's, and all others or those that are not fresh.
    step_event : StepEvent or None
        The newest one in the tail of ``events.jsonl``.
    events_written : float or None
        When ``events.jsonl`` was last written to.
    stop_requested : bool
        The stop file is there.
    launcher_alive, owner_alive : bool or None
        Whether the process that launched, or rank 0, lives; None on another host.
    owner_host : str
        Where rank 0 holds the run; empty where nobody does.
    """

    run_id: str
    has_config: bool = True
    damage: str = ""
    attempts: tuple[AttemptRecord, ...] = ()
    launch: tuple[Entry, ...] = ()
    beats: tuple[Beat, ...] = ()
    step_event: StepEvent | None = None
    events_written: float | None = None
    stop_requested: bool = False
    launcher_alive: bool | None = None
    owner_alive: bool | None = None
    owner_host: str = ""

    @property
    def job_id(self) -> str | None:
        """The scheduler's job that the run was last given to, if it was one."""
        begun = journal.last(self.launch, "submit", "launch")
        if begun is None:
            return self.attempts[-1].job_id if self.attempts else None
        return begun.job_id

    @property
    def is_command(self) -> bool:
        """It is another program."""
        return bool(self.command)

    @property
    def command(self) -> list[str] | None:
        """The command that was submitted in the place of the trainer."""
        submitted = journal.last(self.launch, "submit")
        return None if submitted is None else submitted.command

    @property
    def kind(self) -> str | None:
        """The launcher of the last start: ``local``, ``slurm`` or ``mpi``."""
        begun = journal.last(self.launch, "submit", "launch")
        return None if begun is None else begun.kind


def gather(run: RunDirectory, *, every_rank: bool = True) -> Facts:
    """Read what the files of a run say.

    Parameters
    ----------
    run : RunDirectory
        It exists.
    every_rank : bool, optional
        Whether to open the heartbeat files of ranks that were written to a moment ago; rank 0's always is.
    """
    state, damage = _state(run)
    attempts = tuple(state.attempts)
    launch = _launch(run)
    owner = state.owner or Owner()
    step_event, written = _newest_step(run.events_file)
    return Facts(
        run_id=run.run_id,
        has_config=run.config_file.is_file(),
        damage=damage,
        attempts=attempts,
        launch=launch,
        beats=_beats(run, attempts, every_rank=every_rank),
        step_event=step_event,
        events_written=written,
        stop_requested=run.stop_file.exists(),
        launcher_alive=launcher_alive(launch),
        owner_alive=_owner_alive(owner, attempts),
        owner_host=owner.host or "",
    )


def _state(run: RunDirectory) -> tuple[RunState, str]:
    try:
        return run.read_state(), ""
    except (PreflightError, OSError, RecursionError) as error:  # one damaged run must not hide the others
        return RunState(), " ".join(str(error).split())


def _launch(run: RunDirectory) -> tuple[Entry, ...]:
    try:
        return tuple(journal.read(run))
    except (OSError, RecursionError):
        return ()


# Who lives


def launcher_alive(launch: tuple[Entry, ...]) -> bool | None:
    """Whether the process that launched last lives; None if it is on another host, or nobody launched."""
    entry = journal.last(launch, "launch")
    if entry is None or entry.host != socket.gethostname() or entry.pid is None:
        return None
    # A pid alone proves nothing: it may have been given to another process since.
    started = process_started(entry.pid)
    return started is not None and entry.started in (None, started)


def _owner_alive(owner: Owner, attempts: tuple[AttemptRecord, ...]) -> bool | None:
    if not attempts or owner.host != socket.gethostname():
        return None
    ticks = None if owner.pid is None else process_started(owner.pid)
    if ticks is None or owner.started is not None:
        return ticks is not None and ticks == owner.started
    # Rank 0 recorded the attempt after it began; a process that began later has only inherited its number.
    began, recorded = _boot_time() + ticks / os.sysconf("SC_CLK_TCK"), attempts[-1].started
    return recorded is None or began <= recorded + _CLOCK_SLACK_S


def _boot_time() -> float:
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


# Heartbeats


def _beats(run: RunDirectory, attempts: tuple[AttemptRecord, ...], *, every_rank: bool) -> tuple[Beat, ...]:
    """Return the heartbeats of the newest attempt; files that others left behind are passed over."""
    fresh = math.inf if every_rank else time.time() - FRESH_S
    found = []
    try:
        entries = list(os.scandir(run.heartbeats_dir))
    except OSError:
        return ()
    for entry in entries:
        if not (entry.name.startswith("rank-") and entry.name.endswith(".json")):
            continue
        try:
            written = entry.stat().st_mtime
            if written < fresh or entry.name == "rank-00000.json":
                record = read_heartbeat(Path(entry.path))
                found += [Beat(**vars(record), written=written)] if record is not None else []
        except OSError:  # replaced or deleted at this moment
            continue
    newest = attempts[-1].number if attempts else max((beat.attempt for beat in found), default=0)
    size = attempts[-1].world_size if attempts else None
    here = [beat for beat in found if beat.attempt == newest and (size is None or beat.rank < size)]
    return tuple(sorted(here, key=lambda beat: beat.rank))


# Events


def _newest_step(path: Path) -> tuple[StepEvent | None, float | None]:
    """Return the newest ``step`` event in the tail of the event log, and when the log was written to."""
    try:
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            stream.seek(max(0, status.st_size - TAIL_BYTES))
            tail = stream.read()
    except OSError:
        return None, None
    for line in reversed(tail.split(b"\n")):
        if b'"step"' not in line:
            continue
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):  # torn, or the first line of the tail
            continue
        if isinstance(event, dict) and event.get("event") == "step" and whole(event.get("step")) is not None:
            return from_json(StepEvent, event), status.st_mtime
    return None, status.st_mtime
