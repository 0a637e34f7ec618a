"""The status of a run: the states it can be in, and what is known of it at one moment."""

from __future__ import annotations

from dataclasses import dataclass

#: State -> its meaning; ``status`` and ``runs`` print these words.
STATES = {
    "planned": "prepared, and never started",
    "submitted": "in the scheduler's queue for the first time",
    "starting": "its ranks are being started",
    "restarting": "a rank crashed or hung, and its ranks are being started again",
    "running": "it trains, scores or saves",
    "silent": "it runs, and a rank has given no sign of life for long",
    "stopping": "it was asked to stop, and saves first",
    "requeued": "in the scheduler's queue again, to continue",
    "finished": "it has done all its steps",
    "preempted": "it saved on request and ended; resume continues it",
    "cancelled": "a person ended it",
    "failed": "it ended with an error",
    "crashed": "its processes exited without recording a status",
    "lost": "the scheduler no longer knows its job, and no end is recorded",
    "unknown": "nothing here can tell: another host runs it, or the scheduler does not answer",
}
#: States in which a run does something, or will without a person.
ACTIVE = ("submitted", "starting", "restarting", "running", "silent", "stopping", "requeued")


@dataclass(frozen=True)
class SilentRank:
    """A rank that gives no sign of life, and where it stood when it last did."""

    rank: int
    host: str | None
    pid: int | None
    phase: str
    step: int | None
    silent_s: float


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment. What is not known is None.

    Attributes
    ----------
    state : str
        A key of :data:`STATES`.
    detail : str
        More of that in a few words, and since when.
    reason : str or None
        What has led to it, as whoever knew it has said.
    exit_code : int or None
        How it ended.
    seen_s : float or None
        Seconds since the last sign of life of any rank.
    eta_s, limit_s : float or None
        Seconds of training left, and until the time limit of the job.
    silent : tuple[SilentRank, ...]
        Those that all others may be waiting for first.
    notes : tuple[str, ...]
        What a reader should know about how far this is to be trusted.
    """

    run_id: str
    state: str
    detail: str = ""
    reason: str | None = None
    attempt: int | None = None
    kind: str | None = None
    job_id: str | None = None
    nodes: str | None = None
    restarts: int | None = None
    exit_code: int | None = None
    step: int | None = None
    total_steps: int | None = None
    samples_per_s: float | None = None
    loss: float | None = None
    seen_s: float | None = None
    eta_s: float | None = None
    limit_s: float | None = None
    silent: tuple[SilentRank, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_active(self) -> bool:
        """It does something, or will without a person."""
        return self.state in ACTIVE

    @property
    def may_go_on(self) -> bool:
        """It is active, or nothing here can tell."""
        return self.is_active or self.state == "unknown"

    @property
    def described(self) -> str:
        """The state with its detail, for a message."""
        return f"{self.state} ({self.detail})" if self.detail else self.state


def format_ago(seconds: float) -> str:
    """Return how long ago something was: ``just now``, ``12 s ago``, ``3 min ago``, ``5 h ago``, ``2 d ago``."""
    for unit, size, limit in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < limit * size:
            return "just now" if seconds < 1 else f"{seconds / size:.0f} {unit} ago"
    return f"{seconds / 86400:.0f} d ago"
