"""What a run is doing: a function of what its files say, what the scheduler says, and the time. It reads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anemoi_dist.errors import ExitCode
from anemoi_dist.run.records import AttemptRecord, number, whole
from anemoi_dist.telemetry.progress import format_duration

from . import journal
from .files import Beat, Facts
from .slurm_queue import GONE, JobView

#: A rank that gave no sign of life for so long is called silent. Saving and scoring give signs; see ``watchdog``.
SILENT_AFTER_S = 120.0
#: Ranks import, open data and compile before their first step, each of which may take so long without a sign.
SILENT_AT_STARTUP_AFTER_S = 600.0
#: Signs of life as young as this are believed, and not a scheduler that does not know the job.
CONTRADICTED_S = 30.0
#: Clocks of two nodes agree to this; the control side's word and a rank's are put in order no finer.
SKEW_S = 2.0

#: What a run can be, with what it means; ``status`` and ``runs`` show these words.
STATES = {
    "planned": "prepared, and never started",
    "submitted": "in the scheduler's queue for the first time",
    "starting": "its ranks are being started",
    "restarting": "a rank crashed or hung, and its ranks are being started again",
    "running": "it trains, scores or saves",
    "silent": "it runs, and a rank has given no sign of life for long",
    "stopping": "it was asked to stop, and saves first",
    "requeued": "in the scheduler's queue again, to go on",
    "finished": "it has done all its steps",
    "preempted": "it saved on request and ended; resume goes on",
    "cancelled": "a person ended it",
    "failed": "it ended with an error",
    "crashed": "its processes are gone without a word",
    "lost": "the scheduler does not know its job any more, and it left no word",
    "unknown": "nothing here can tell: another host runs it, or the scheduler does not answer",
}
#: States in which a run does something, or will without a person.
ACTIVE = ("submitted", "starting", "restarting", "running", "silent", "stopping", "requeued")
_REASONS = {
    ExitCode.CONFIGURATION: "the configuration was refused",
    ExitCode.PREFLIGHT: "the preflight failed",
    ExitCode.NO_CHECKPOINT: "no checkpoint could be loaded or written",
    ExitCode.DIVERGED: "training diverged",
    ExitCode.HANG: "a rank hung",
    ExitCode.INTERNAL: "a rank crashed or was killed",
}


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


def derive(facts: Facts, *, now: float, job: JobView | None = None, queue_error: str = "") -> RunStatus:
    """Tell what a run is doing; pure.

    Parameters
    ----------
    facts : Facts
        What its files say.
    now : float
        Seconds since 1970-01-01 UTC.
    job : JobView, optional
        ``facts.job_id`` as the scheduler sees it; None where it was not asked, or gives no answer.
    queue_error : str, optional
        Why it gives none.
    """
    return _Derivation(facts, now=now, job=job, queue_error=queue_error).status()


class _Derivation:
    """One question about one run; the methods answer for one phase each."""

    def __init__(self, facts: Facts, *, now: float, job: JobView | None, queue_error: str) -> None:
        self.facts, self.now, self.job = facts, now, job
        self.attempt = facts.attempts[-1] if facts.attempts else None
        self.last = facts.launch[-1] if facts.launch else None
        self.begun = journal.last(facts.launch, "submit", "launch", "restart")
        self.silent: list[SilentRank] = []
        self.exit_code: int | None = None
        self.reason = ""
        self.notes: list[str] = [f"run.json is passed over: {facts.damage}"] if facts.damage else []
        if queue_error and facts.job_id:
            self.notes.append(queue_error)
        if (ahead := max((event["time"] for event in facts.launch), default=now) - now) > SKEW_S:
            self.notes.append(f"the clock of the host that launched was {format_duration(ahead)} ahead of this one's")

    def status(self) -> RunStatus:
        facts, job = self.facts, self.job
        state, detail = self._phase()
        if facts.stop_requested and state in ("submitted", "requeued", "unknown"):
            self.notes.append("a stop is asked for: once it runs it saves and stops at its first step")
        attempt = self.attempt.number if self.attempt else max((beat.attempt for beat in facts.beats), default=None)
        return RunStatus(
            run_id=facts.run_id,
            state=state,
            detail=" ".join(detail.split()),
            reason=" ".join(self.reason.removeprefix(f"run {facts.run_id}: ").split()) or None,
            attempt=attempt,
            kind=facts.kind,
            job_id=facts.job_id,
            nodes=(job.nodes or None) if job else None,
            restarts=job.restarts if job else None,
            exit_code=self.exit_code,
            silent=tuple(self.silent),
            notes=tuple(self.notes),
            limit_s=max(0.0, job.end_time - self.now) if job and job.is_running and job.end_time is not None else None,
            **_numbers(facts, state=state, now=self.now),
        )

    def _phase(self) -> tuple[str, str]:
        facts = self.facts
        if not (facts.launch or facts.attempts or facts.beats):
            return "planned", "" if facts.has_config else "no configuration is frozen in it"
        if self.job is not None and self.job.is_waiting:
            return self._waiting(self.job)
        if self.job is not None and self.job.is_completing:
            return self._completing(self.job)
        alive = self._alive()
        if alive is None:
            return self._unknown()
        return self._live() if alive else self._over()

    def _alive(self) -> bool | None:
        """Whether processes of the run exist; None where nothing here can tell."""
        facts = self.facts
        if (
            self.job is not None
            and self.job.state == GONE
            and self._current_attempt()
            and not self._control_has_ended()
        ):
            newest = max((beat.seen for beat in facts.beats), default=None)
            if newest is not None and self.now - newest < CONTRADICTED_S:
                self.notes.append(f"this SLURM does not know job {self.job.job_id}: is it of another cluster?")
                return None
        # Of an allocation in which somebody starts ranks by hand only its end tells something of the run.
        if self.job is not None and (self.job.is_over or self.begun is not None):
            return not self.job.is_over
        if facts.owner_alive or (facts.launcher_alive and not self._control_has_ended()):
            return True
        if facts.job_id and self.begun is not None:  # a process that is dead on this host is not the end of a job
            return None
        if facts.owner_host and facts.owner_alive is None:  # rank 0 holds it elsewhere
            return None
        if facts.owner_alive is not None or facts.launcher_alive is not None:
            return False
        return False if self.attempt is not None and self.attempt.exit_code is not None else None

    # In the queue, or on the way out of it or back

    def _waiting(self, job: JobView) -> tuple[str, str]:
        ran = bool(job.restarts or self._num_lives(job) or (self.attempt and self.attempt.job_id == job.job_id))
        words = f"job {job.job_id} waits" + (f": {job.reason}" if job.reason else "")
        if job.is_held:
            words += f" (scontrol release {job.job_id} lets it go)"
        elif job.reason == "DependencyNeverSatisfied":
            words += " (it will never start: cancel it)"
        elif job.start_time is not None and job.start_time > self.now:
            words += f", expected to start in {format_duration(job.start_time - self.now)}"
        return "requeued" if ran else "submitted", words

    def _completing(self, job: JobView) -> tuple[str, str]:
        noted = self.last is not None and self.last["event"] == "requeue"
        # SLURM counts a restart as soon as it decides on it; the new life has not launched anything yet.
        if noted or (job.restarts and job.restarts >= self._num_lives(job) > 0):
            return "requeued", f"job {job.job_id} leaves its nodes and goes back into the queue"
        if self._control_has_ended():
            return self._over()
        return "stopping", f"SLURM ends the processes of job {job.job_id}"

    def _num_lives(self, job: JobView) -> int:
        """Return how many lives the job has had; the last that launched anything is known by its number."""
        launches = [event for event in self.facts.launch if event["event"] == "launch"]
        return max(((whole(e.get("life")) or 0) + 1 for e in launches if str(e.get("job_id")) == job.job_id), default=0)

    # Alive

    def _live(self) -> tuple[str, str]:
        if self.last is not None and self.last["event"] == "cancel" and not self._attempt_is_newer():
            return "stopping", f"cancelled{self._ago(self.last['time'])}; its processes are being ended"
        attempt = self._current_attempt()
        if attempt is None:
            return self._between_attempts()
        self.silent = self._silent_ranks(attempt)
        if self.silent:
            return "silent", self._silence()
        if self.facts.stop_requested:
            return "stopping", "it saves at the end of a step and leaves"
        beats = self.facts.beats
        ranks = "its ranks" if attempt.world_size is None else f"{attempt.world_size} ranks"
        if not beats:
            self.notes.append("there are no heartbeats: a rank that hangs would not be seen")
        if {beat.phase for beat in beats} == {"startup"} or (not beats and not self._has_events(attempt)):
            return "starting", f"{ranks} import and load" + self._for(attempt.started)
        doing = {"validation": "score", "checkpoint": "save", "end": "end"}
        return "running", f"{ranks} {doing.get(beats[0].phase if beats else '', 'train')}"

    def _between_attempts(self) -> tuple[str, str]:
        begun, attempt = self.begun, self.attempt
        if attempt is not None and attempt.exit_code is not None and attempt.ended is not None:
            # A restart is decided a moment after the ranks have ended.
            slack_s = SKEW_S if begun is not None and begun["event"] == "restart" else 0.0
            if all(attempt.ended > start + slack_s for start in self._starts()):
                if attempt.exit_code == ExitCode.FINISHED:
                    return self._over()
                self.reason = attempt.failure_line
                asked = self.facts.stop_requested or self._control_has_ended()
                mended = attempt.exit_code in (ExitCode.INTERNAL, ExitCode.HANG) and not asked
                ended = f"its ranks ended with code {attempt.exit_code}{self._ago(attempt.ended)}"
                return "restarting" if mended else "stopping", ended
        if self._control_has_ended() and self.last is not None and all(self.last["time"] > s for s in self._starts()):
            self.reason = str(self.last.get("reason") or "")
            return "stopping", f"its launcher ended with code {self.last.get('code')}{self._ago(self.last['time'])}"
        launched = self.job is None or self._num_lives(self.job) > (self.job.restarts or 0)
        if self.facts.is_command and launched and self.last is not None and self.last["event"] == "launch":
            return "running", "its command runs" + self._for(self.last["time"])
        since = self.job.start_time if self.job is not None else None
        if begun is not None and begun["event"] == "restart":
            left_s = begun["time"] + (number(begun.get("wait_s")) or 0.0) - self.now
            self.reason = str(begun.get("reason") or "")
            when = f", in {format_duration(left_s)}" if left_s >= 1 else self._for(begun["time"])
            return "restarting", f"{_meaning(whole(begun.get('code')))}; its ranks start again{when}"
        if since is None and begun is not None:
            since = begun["time"]
        return "starting", "its ranks are being started" + self._for(since)

    def _silent_ranks(self, attempt: AttemptRecord) -> list[SilentRank]:
        """Return the ranks without a recent sign of life, the one to blame first."""
        beats, found = self.facts.beats, []
        for beat in beats:
            limit_s = SILENT_AT_STARTUP_AFTER_S if beat.phase == "startup" else SILENT_AFTER_S
            if beat.phase != "end" and self.now - beat.seen > limit_s:
                found.append(beat)
        late_s = max((beat.written - beat.seen for beat in found), default=0.0)
        if late_s > SILENT_AFTER_S:
            self.notes.append(
                f"a heartbeat was written {format_duration(late_s)} after the time in it: the clock of that node is "
                "behind, or its watchdog has written it"
            )
        silent = [_silent(beat, now=self.now) for beat in sorted(found, key=_blame)]
        age_s = 0.0 if attempt.started is None else self.now - attempt.started
        if beats and beats[0].rank != 0 and age_s > SILENT_AT_STARTUP_AFTER_S:
            silent.insert(0, SilentRank(0, host=None, pid=None, phase="", step=None, silent_s=age_s))
        return silent

    def _silence(self) -> str:
        first = self.silent[0]
        lasts = format_duration(first.silent_s)
        if not first.phase:
            return f"rank {first.rank} has given no sign of life for {lasts}"
        stood = f"in {first.phase}" + ("" if first.step is None else f" at step {first.step}")
        others = f"; {len(self.silent) - 1} more silent" if len(self.silent) > 1 else ""
        stop = "; a stop is asked for, which needs every rank" if self.facts.stop_requested else ""
        return f"rank {first.rank} on {first.host or '?'} is silent for {lasts} {stood}{others}{stop}"

    # Not alive

    def _over(self) -> tuple[str, str]:
        job, attempt = self.job, self.attempt if self._attempt_is_of_this_life() else None
        last = {} if self.last is None or self._attempt_is_newer() else self.last
        if attempt is not None and attempt.exit_code == ExitCode.FINISHED:
            return self._by_code(attempt.exit_code, attempt.ended)
        # The launcher may note after it that the ranks, which were ended, had saved.
        told = journal.last(self.facts.launch, "submit", "launch", "cancel")
        if last and told is not None and told["event"] == "cancel" and last.get("code") != ExitCode.FINISHED:
            return "cancelled", f"by `anemoi-dist cancel`{self._ago(told['time'])}"
        if last.get("event") == "end" and (code := whole(last.get("code"))) is not None:
            return self._by_code(code, last["time"], reason=str(last.get("reason") or ""))
        if job is not None and job.state == "CANCELLED":
            return "cancelled", f"by scancel {job.reason}{self._ago(job.end_time)}"
        if last.get("event") == "requeue" and job is not None:
            return "lost", f"it was sent back into the queue, but job {job.job_id} is {job.state}; resume goes on"
        if attempt is not None and attempt.exit_code is not None:
            return self._by_code(attempt.exit_code, attempt.ended)
        return self._without_a_word()

    def _by_code(self, code: int, when: float | None, *, reason: str = "") -> tuple[str, str]:
        self.exit_code = code
        ago = self._ago(when)
        if code == ExitCode.FINISHED:
            return "finished", f"all its steps are done{ago}"
        self.reason = reason
        if code == ExitCode.SAVED_RUN_AGAIN:
            return "preempted", f"it saved on request{ago}; resume goes on"
        if code == ExitCode.INTERRUPTED:
            self.reason = ""
            return "cancelled", f"interrupted before anything new was saved{ago}"
        if not reason and self.attempt is not None and self._attempt_is_of_this_life():
            self.reason = self.attempt.failure_line
        return "failed", f"code {code}: {_meaning(code)}{ago}"

    def _without_a_word(self) -> tuple[str, str]:
        job = self.job
        if job is not None and job.state == GONE:
            how = "left no word" if self.attempt or self._num_lives(job) else "never started"
            return "lost", f"SLURM does not know job {job.job_id} any more, and it {how}; resume goes on"
        if job is not None and job.is_over:
            self.exit_code = job.exit_code or None
            why = f" ({job.reason})" if job.reason else ""
            code = f" with code {job.exit_code}" if job.exit_code else ""
            printed = f"; `anemoi-dist logs {self.facts.run_id}` has what it printed" if job.nodes else ""
            told = f"job {job.job_id} is {job.state}{why}{code} without a word{self._ago(job.end_time)}"
            return "failed", f"{told}{printed}"
        seen = max((beat.seen for beat in self.facts.beats), default=None)
        sign = "" if seen is None else f", last seen{self._ago(seen, mark='')}"
        return "crashed", f"its processes are gone without a word{sign}; resume goes on from what it saved last"

    # Nobody here can tell

    def _unknown(self) -> tuple[str, str]:
        beats, attempt = self.facts.beats, self.attempt
        if self._control_has_ended() and not self._attempt_is_newer():
            return self._over()
        if attempt is not None and attempt.exit_code is not None and self._attempt_is_of_this_life():
            if self.last is not None and self.last["event"] == "requeue":
                return "requeued", f"sent back into the queue{self._ago(self.last['time'])}"
            if attempt.exit_code == ExitCode.FINISHED or not self.facts.job_id:
                return self._over()
        seen = max((beat.seen for beat in beats), default=None)
        if seen is not None and self.now - seen < SILENT_AFTER_S and self._current_attempt() is not None:
            self.notes.append("this is what its heartbeats say; nobody else could be asked")
            return self._live()
        host = next((beat.host for beat in beats if beat.host), self.facts.owner_host)
        begun = self.begun or {}
        word = {"submit": "submitted", "launch": "launched", "restart": "restarted"}.get(str(begun.get("event")))
        if seen is None and word is not None:
            return "unknown", f"{word}{self._ago(begun['time'], mark='')} on {begun.get('host', '?')}"
        on = f" on {host}" if host else ""
        return "unknown", f"last seen{self._ago(seen, mark='')}{on}" if seen is not None else f"held by a process{on}"

    # The order of what happened

    def _control_has_ended(self) -> bool:
        return self.last is not None and self.last["event"] in ("end", "cancel")

    def _attempt_is_newer(self) -> bool:
        """Whether the newest attempt began after the control side was done: somebody else has started it."""
        if self.attempt is None or self.attempt.started is None or not self._control_has_ended():
            return False
        assert self.last is not None
        return self.attempt.started > self.last["time"] + SKEW_S

    def _attempt_is_of_this_life(self) -> bool:
        """Whether the newest attempt began or ended after the last start; an older one says nothing about now."""
        if self.attempt is None or self.begun is None or self.begun["time"] > self.now + SKEW_S:
            return self.attempt is not None
        signs = [sign for sign in (self.attempt.started, self.attempt.ended) if sign is not None]
        return not signs or max(signs) > self.begun["time"] - SKEW_S

    def _current_attempt(self) -> AttemptRecord | None:
        """Return the attempt that runs; None where the newest is over, or of an earlier life."""
        beats, attempt = self.facts.beats, self.attempt
        if attempt is None and beats:
            attempt = AttemptRecord(beats[0].attempt)  # run.json is damaged: the ranks' own word counts
        if attempt is None or attempt.exit_code is not None:
            return None
        signs = [attempt.started, *(beat.seen for beat in beats)]
        latest = max((sign for sign in signs if sign is not None), default=self.now)
        return attempt if all(latest > start - SKEW_S for start in self._starts()) else None

    def _starts(self) -> list[float]:
        """Return what a sign of the present life comes after: the last start, and where SLURM gave nodes again, that.

        A start that a wrong clock has put into the future says nothing.
        """
        starts = [] if self.begun is None else [self.begun["time"]]
        if self.job is not None and self.job.restarts and self.job.start_time is not None:
            starts.append(self.job.start_time)
        return [start for start in starts if start <= self.now + SKEW_S]

    def _has_events(self, attempt: AttemptRecord) -> bool:
        written = self.facts.events_written
        return written is not None and (attempt.started is None or written > attempt.started)

    def _for(self, since: float | None) -> str:
        return "" if since is None else f", for {format_duration(max(0.0, self.now - since))}"

    def _ago(self, when: float | None, *, mark: str = ",") -> str:
        return "" if when is None else f"{mark} {format_ago(self.now - when)}"


def _numbers(facts: Facts, *, state: str, now: float) -> dict[str, Any]:
    """Return the numbers of rank 0's heartbeat, or of the newest ``step`` event where that is not there."""
    main = next((beat for beat in facts.beats if beat.rank == 0), None)
    event = facts.step_event or {}
    told_at = main.seen if main is not None else number(event.get("time"))
    numbers = {
        key: value if (value := getattr(main, key, None)) is not None else number(event.get(key))
        for key in ("loss", "samples_per_s", "eta_s")
    }
    seen = max((beat.seen for beat in facts.beats), default=facts.events_written)
    working = state in ("running", "silent", "stopping")
    eta_s = numbers["eta_s"] if state in ("running", "stopping") else None
    max_steps = facts.attempts[-1].max_steps if facts.attempts else None
    return {
        "step": main.step if main is not None and main.step is not None else whole(event.get("step")),
        "total_steps": main.total_steps if main is not None and main.total_steps is not None else max_steps,
        "loss": numbers["loss"],
        "samples_per_s": numbers["samples_per_s"] if working else None,
        "seen_s": None if seen is None else max(0.0, now - seen),
        "eta_s": None if eta_s is None else max(0.0, eta_s - max(0.0, now - (told_at if told_at is not None else now))),
    }


def _blame(beat: Beat) -> tuple[float, float, float]:
    """Return what sorts ranks that wait for each other: first the one that all others wait for."""
    far = float("inf")
    collectives, step = (far if value is None else value for value in (beat.collectives, beat.step))
    return collectives, step, beat.seen


def _silent(beat: Beat, *, now: float) -> SilentRank:
    return SilentRank(
        beat.rank, host=beat.host or None, pid=beat.pid, phase=beat.phase, step=beat.step, silent_s=now - beat.seen
    )


def _meaning(code: int | None) -> str:
    known = {int(key): words for key, words in _REASONS.items()}
    return "a rank crashed or was killed" if code is None else known.get(code, "an error of its own")


def format_ago(seconds: float) -> str:
    """Return how long ago something was: ``just now``, ``12 s ago``, ``3 min ago``, ``5 h ago``, ``2 d ago``."""
    for unit, size, limit in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < limit * size:
            return "just now" if seconds < 1 else f"{seconds / size:.0f} {unit} ago"
    return f"{seconds / 86400:.0f} d ago"
