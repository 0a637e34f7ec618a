"""The records of ``run.json``: the run's state, its owner, its attempts and how they failed. No torch.

Other versions write other keys and a file system may damage a value, so reading trusts nothing: a value of the wrong
type counts as absent, and an unknown key is kept and written back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from anemoi_dist.config.identity import Change

STATES = ("planned", "submitted", "running", "preempted", "finished", "failed", "cancelled")
#: Attributes whose key in the file is another.
_KEYS = {"number": "attempt", "now": "is", "watchdog_time": "seen"}
#: Keys that are written even if they are null; all others are then left out.
_NULLABLE = ("job_id", "owner", "was", "is")
_R = TypeVar("_R")


@dataclass(kw_only=True)
class _Record:
    unknown: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass
class Process(_Record):
    """A process of a rank."""

    rank: int = 0
    host: str = ""
    pid: int = 0


@dataclass
class Hang(_Record):
    """The rank to blame for a hang, and what is known of it.

    Attributes
    ----------
    rank : int
        The rank that the others wait for; of several, the one that has been silent for longest.
    host, pid : str, int
        Its process; empty and 0 for a rank that has never given a sign of life.
    phase, step : str, int
        Its last phase, and the optimizer steps it has done.
    silent_s : float
        Seconds since its last sign of life.
    where : str
        The innermost lines of its training thread; empty if its watchdog did not answer.
    behind : list[int]
        All ranks that the others wait for, eight at most; empty if none has fallen behind.
    unresponsive : list[Process]
        Ranks whose watchdog does not answer, eight at most.
    """

    rank: int = 0
    host: str = ""
    pid: int = 0
    phase: str = "startup"
    step: int = 0
    silent_s: float = 0.0
    where: str = ""
    behind: list[int] = field(default_factory=list)
    unresponsive: list[Process] = field(default_factory=list)

    def __str__(self) -> str:
        where = self.where or "it does not answer: stopped, or in C code that holds the interpreter lock"
        place = f" on {self.host} (pid {self.pid})" if self.host else ""
        return (
            f"hang: rank {self.rank}{place} has given no sign of life for {self.silent_s:.0f} s, last in phase "
            f"{self.phase} after step {self.step}; {where}"
        )


@dataclass
class Failure(_Record):
    """The rank that failed first, or the command that was run in the place of ranks.

    Attributes
    ----------
    rank, host, pid : int, str, int
        The process; None for a command.
    error : str
        Traceback or message.
    signal : str
        Name of the signal that killed the rank.
    log : str
        Path of the rank's log file.
    hang : Hang
        Details of a hang.
    returned : int
        Exit code of a command.
    """

    rank: int | None = None
    host: str | None = None
    pid: int | None = None
    error: str | None = None
    signal: str | None = None
    log: str | None = None
    hang: Hang | None = None
    returned: int | None = None

    @property
    def line(self) -> str:
        """Who failed and how, in one line; empty if the record does not say."""
        if self.returned is not None:  # another program: its code says nothing but that it has failed
            return f"the command returned {self.returned}"
        if self.error is None:
            return ""
        lines = [line.strip() for line in self.error.splitlines() if line.strip()] or ["no message"]
        # A traceback says at its end what happened, all else at its beginning.
        said = lines[-1] if lines[0].startswith("Traceback") else lines[0].rstrip(":")
        return f"{self.place} was {said}" if self.signal is not None else f"{self.place}: {said}"

    @property
    def place(self) -> str:
        """The rank with its host and process."""
        return f"rank {self.rank} on {self.host} (pid {self.pid})"


@dataclass
class AttemptRecord(_Record):
    """One attempt: what it ran on, since when, and how it ended; the end is None while it runs.

    Attributes
    ----------
    number : int
        Counted from 1.
    started, ended : float
        Seconds since 1970-01-01 UTC.
    changes : list[Change]
        Differences from the configuration of the attempt before.
    life : int
        Times that SLURM had put the job back into the queue.
    state : str
        The state of the run that the end led to.
    """

    number: int = 0
    started: float | None = None
    world_size: int | None = None
    max_steps: int | None = None
    changes: list[Change] = field(default_factory=list)
    launcher: str | None = None
    num_nodes: int | None = None
    job_id: str | None = None
    life: int | None = None
    ended: float | None = None
    exit_code: int | None = None
    state: str | None = None
    failure: Failure | None = None

    @property
    def failure_line(self) -> str:
        """Who failed and how, in one line; empty if no failure is recorded."""
        return "" if self.failure is None else self.failure.line


@dataclass
class Owner(_Record):
    """The process of rank 0, and when it began (clock ticks since boot)."""

    pid: int | None = None
    host: str | None = None
    started: int | None = None


@dataclass
class RunState(_Record):
    """Content of ``run.json``.

    Attributes
    ----------
    state : str
        One of :data:`STATES`.
    attempts : list[AttemptRecord]
        In their order.
    changes : list[Change]
        Differences from the frozen configuration that the next attempt is going to record; None if nobody has looked.
    owner : Owner
        Rank 0 of the attempt that runs.
    """

    state: str = "planned"
    attempts: list[AttemptRecord] = field(default_factory=list)
    changes: list[Change] | None = None
    owner: Owner | None = None


def from_json(cls: type[_R], content: Mapping[str, Any]) -> _R:
    """Return a record of what was decoded from JSON."""
    decoders = _decoders(cls)  # type: ignore[arg-type] # mypy takes a type variable's class for unhashable
    known, unknown = {}, {}
    for key, value in content.items():
        if key not in decoders:
            unknown[key] = value
        elif (decoded := decoders[key][1](value)) is not None:
            known[decoders[key][0]] = decoded
    return cls(**known, unknown=unknown) if issubclass(cls, _Record) else cls(**known)


def to_json(record: Any) -> dict[str, Any]:
    """Return a record as what JSON can encode; :func:`from_json` gives it back."""
    content = {}
    for key, (name, _) in _decoders(type(record)).items():  # type: ignore[arg-type]
        value = getattr(record, name)
        if isinstance(value, list):
            value = [to_json(item) if is_dataclass(item) else item for item in value]
        elif is_dataclass(value):
            value = to_json(value)
        if value is not None or key in _NULLABLE:
            content[key] = value
    return content | getattr(record, "unknown", {})


@functools.cache  # reading the hints costs more than decoding a record, and `runs` decodes thousands
def _decoders(cls: Any) -> Mapping[str, tuple[str, Callable[[Any], Any]]]:
    """Return key in the file -> attribute, and what turns a value into its type, or into None if it is of another."""
    hints = {name: hint for name, hint in get_type_hints(cls).items() if name != "unknown"}
    return {_KEYS.get(name, name): (name, _decoder(hint)) for name, hint in hints.items()}


def _decoder(hint: Any) -> Callable[[Any], Any]:
    arguments = get_args(hint)
    kind = arguments[0] if type(None) in arguments else hint
    if kind is Any:
        return lambda value: value
    if kind in (int, float):
        return whole if kind is int else number
    if get_origin(kind) is list:
        return functools.partial(_decode_list, get_args(kind)[0])
    if is_dataclass(kind):
        return lambda value: from_json(kind, value) if isinstance(value, dict) else None  # type: ignore[arg-type]
    return lambda value: value if isinstance(value, kind) else None


def _decode_list(item: Any, value: Any) -> list[Any] | None:
    if not isinstance(value, list):
        return None
    if is_dataclass(item):  # a damaged record keeps its place: attempts are known by their number
        value = [each if isinstance(each, dict) else {} for each in value]
    decode = _decoder(item)
    return [decoded for each in value if (decoded := decode(each)) is not None]


def number(value: Any) -> float | None:
    """Return ``value`` if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond all floats
        return None


def whole(value: Any) -> int | None:
    """Return ``value`` if it is a whole number."""
    return int(value) if (found := number(value)) is not None and found == int(found) else None
