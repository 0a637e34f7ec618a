"""Derive what a run is doing from its files, from the scheduler's view of its job, and from the time. Pure."""

from __future__ import annotations

from dataclasses import replace

from anemoi_dist.errors import ExitCode
from anemoi_dist.run.records import AttemptRecord
from anemoi_dist.telemetry.progress import format_duration

from . import journal
from .files import Beat, Facts
from .run_status import RunStatus, SilentRank, format_ago
from .slurm_queue import GONE, JobView

#: A rank without a sign of life for this long is silent. Ranks that save or score give signs; see ``watchdog``.
SILENT_AFTER_S = 120.0
#: Ranks import, open data and compile before their first step, each of which may take this long without a sign.
SILENT_AT_STARTUP_AFTER_S = 600.0
#: Signs of life as young as this are believed rather than a scheduler that does not know the job.
CONTRADICTED_S = 30.0
#: Clocks of two nodes agree to this: times that differ by less have no order.
SKEW_S = 2.0

_MEANINGS: dict[int | None, str] = {
    None: "a rank crashed or was killed",
    ExitCode.CONFIGURATION: "the configuration was refused",
    ExitCode.PREFLIGHT: "the preflight failed",
    ExitCode.NO_CHECKPOINT: "no checkpoint could be loaded or written",
    ExitCode.DIVERGED: "training diverged",
    ExitCode.HANG: "a rank hung",
    ExitCode.INTERNAL: "a rank crashed or was killed",
}
_PHASES = {"validation": "score", "checkpoint": "save", "end": "end"}


def derive(facts: Facts, *, now: float, job: JobView | None = None, queue_error: str = "") -> RunStatus:
    """Return what a run is doing.

    Parameters
    ----------
    facts : Facts
        Content of its files.
    now : float
        Seconds since 1970-01-01 UTC.
    job : JobView, optional
        ``facts.job_id`` as the scheduler sees it; None if it was not asked, or does not answer.
    queue_error : str, optional
        Why it does not answer.
    """
    return _Derivation(facts, now=now, job=job, queue_error=queue_error).status()


class _Derivation:
    """One question about one run. Methods that return two strings return the state and its detail."""

    def __init__(self, facts: Facts, *, now: float, job: JobView | None, queue_error: str) -> None:
        self.facts, self.now, self.job = facts, now, job
        self.attempt = facts.attempts[-1] if facts.attempts else None
        self.last = facts.launch[-1] if facts.launch else None
        self.begun = journal.last(facts.launch, "submit", "launch", "restart")
        self.control_has_ended = self.last is not None and self.last.event in ("end", "cancel")
        self.seen = max((beat.seen for beat in facts.beats), default=None)
        self.silent: list[SilentRank] = []
        self.exit_code: int | None = None
        self.reason = ""
        self.notes: list[str] = [f"run.json is passed over: {facts.damage}"] if facts.damage else []
        if queue_error and facts.job_id:
            self.notes.append(queue_error)
        if (ahead := max((entry.time for entry in facts.launch), default=now) - now) > SKEW_S:
            self.notes.append(f"the clock of the host that launched was {format_duration(ahead)} ahead of this one's")

    def status(self) -> RunStatus:
        facts, job = self.facts, self.job
        state, detail = self._state()
        if facts.stop_requested and state in ("submitted", "requeued", "unknown"):
            self.notes.append("a stop is asked for: once it runs it saves and stops at its first step")
        attempt = self.attempt.number if self.attempt else max((beat.attempt for beat in facts.beats), default=None)
        status = RunStatus(
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
        )
        return _with_progress(status, facts, now=self.now)

    def _state(self) -> tuple[str, str]:
        facts, job = self.facts, self.job
        if not (facts.launch or facts.attempts or facts.beats):
            return "planned", "" if facts.has_config else "no configuration is frozen in it"
        # The scheduler's word comes first: files of an earlier start say nothing about a job in the queue.
        if job is not None and job.is_waiting:
            return self._waiting(job)
        if job is not None and job.is_completing:
            return self._completing(job)
        alive = self._is_alive()
        if alive is None:
            return self._unknown()
        return self._alive() if alive else self._over()

    def _is_alive(self) -> bool | None:
        """Whether processes of the run exist; None if nothing here can tell."""
        facts, job = self.facts, self.job
        is_fresh = self.seen is not None and self.now - self.seen < CONTRADICTED_S and not self.control_has_ended
        if job is not None and job.state == GONE and is_fresh and self._current_attempt() is not None:
            self.notes.append(f"this SLURM does not know job {job.job_id}: is it of another cluster?")
            return None
        # In an allocation where somebody starts ranks by hand, only the job's end says something about the run.
        if job is not None and (job.is_over or self.begun is not None):
            return not job.is_over
        # A launcher that has noted its end may live on for a moment.
        if facts.owner_alive or (facts.launcher_alive and not self.control_has_ended):
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
        ran = bool(job.restarts or self._num_starts(job) or (self.attempt and self.attempt.job_id == job.job_id))
        detail = f"job {job.job_id} waits" + (f": {job.reason}" if job.reason else "")
        if job.is_held:
            detail += f" (scontrol release {job.job_id} lets it go)"
        elif job.reason == "DependencyNeverSatisfied":
            detail += " (it will never start: cancel it)"
        elif job.start_time is not None and job.start_time > self.now:
            detail += f", expected to start in {format_duration(job.start_time - self.now)}"
        return "requeued" if ran else "submitted", detail

    def _completing(self, job: JobView) -> tuple[str, str]:
        is_noted = self.last is not None and self.last.event == "requeue"
        # SLURM counts a requeue as soon as it decides on it, before the job starts again and launches anything.
        if is_noted or (job.restarts and job.restarts >= self._num_starts(job) > 0):
            return "requeued", f"job {job.job_id} leaves its nodes and goes back into the queue"
        if self.control_has_ended:
            return self._over()
        return "stopping", f"SLURM ends the processes of job {job.job_id}"

    def _num_starts(self, job: JobView) -> int:
        """Return how often SLURM has started the job, by the last start that launched anything."""
        launches = [entry for entry in self.facts.launch if entry.event == "launch" and entry.job_id == job.job_id]
        return max((entry.life + 1 for entry in launches), default=0)

    # Alive

    def _alive(self) -> tuple[str, str]:
        if self.last is not None and self.last.event == "cancel" and not self._attempt_is_newer():
            return "stopping", f"cancelled{self._ago(self.last.time)}; its processes are being ended"
        attempt = self._current_attempt()
        if attempt is None:
            return self._between_attempts()
        # Before a stop request: ranks agree on a stop together, and a silent one never does.
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
        return "running", f"{ranks} {_PHASES.get(beats[0].phase if beats else '', 'train')}"

    def _between_attempts(self) -> tuple[str, str]:
        begun, last = self.begun, self.last
        if (ended := self._has_just_ended()) is not None:
            return ended
        if last is not None and self.control_has_ended and all(last.time > start for start in self._starts()):
            self.reason = last.reason
            return "stopping", f"its launcher ended with code {last.code}{self._ago(last.time)}"
        has_launched = self.job is None or self._num_starts(self.job) > (self.job.restarts or 0)
        if self.facts.is_command and has_launched and last is not None and last.event == "launch":
            return "running", "its command runs" + self._for(last.time)
        if begun is not None and begun.event == "restart":
            left_s = begun.time + begun.wait_s - self.now
            self.reason = begun.reason
            when = f", in {format_duration(left_s)}" if left_s >= 1 else self._for(begun.time)
            return "restarting", f"{_meaning(begun.code)}; its ranks start again{when}"
        since = None if self.job is None else self.job.start_time
        if since is None and begun is not None:
            since = begun.time
        return "starting", "its ranks are being started" + self._for(since)

    def _has_just_ended(self) -> tuple[str, str] | None:
        """Return the state of a run whose attempt has ended and whose launcher has not reacted yet; else None."""
        attempt = self.attempt
        if attempt is None or attempt.exit_code is None or attempt.ended is None:
            return None
        # A restart is decided a moment after the ranks have ended.
        slack_s = SKEW_S if self.begun is not None and self.begun.event == "restart" else 0.0
        if any(attempt.ended <= start + slack_s for start in self._starts()):
            return None
        if attempt.exit_code == ExitCode.FINISHED:
            return self._over()
        self.reason = attempt.failure_line
        is_asked = self.facts.stop_requested or self.control_has_ended
        restarts = attempt.exit_code in (ExitCode.INTERNAL, ExitCode.HANG) and not is_asked
        detail = f"its ranks ended with code {attempt.exit_code}{self._ago(attempt.ended)}"
        return "restarting" if restarts else "stopping", detail

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
        if beats and beats[0].rank != 0 and age_s > SILENT_AT_STARTUP_AFTER_S:  # rank 0 has never given a sign
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
        job, attempt = self.job, self.attempt if self._attempt_is_of_this_start() else None
        last = None if self._attempt_is_newer() else self.last
        if attempt is not None and attempt.exit_code == ExitCode.FINISHED:
            return self._by_code(attempt.exit_code, attempt.ended)
        # The launcher may note after a cancel that the ranks, which were ended, had saved.
        asked = journal.last(self.facts.launch, "submit", "launch", "cancel")
        if last is not None and asked is not None and asked.event == "cancel" and last.code != ExitCode.FINISHED:
            return "cancelled", f"by `anemoi-dist cancel`{self._ago(asked.time)}"
        if last is not None and last.event == "end" and last.code is not None:
            return self._by_code(last.code, last.time, reason=last.reason)
        if job is not None and job.state == "CANCELLED":
            return "cancelled", f"by scancel {job.reason}{self._ago(job.end_time)}"
        if last is not None and last.event == "requeue" and job is not None:
            return "lost", f"it was sent back into the queue, but job {job.job_id} is {job.state}; resume continues it"
        if attempt is not None and attempt.exit_code is not None:
            return self._by_code(attempt.exit_code, attempt.ended)
        return self._without_status()

    def _by_code(self, code: int, when: float | None, *, reason: str = "") -> tuple[str, str]:
        self.exit_code = code
        ago = self._ago(when)
        if code == ExitCode.FINISHED:
            return "finished", f"all its steps are done{ago}"
        if code == ExitCode.INTERRUPTED:
            return "cancelled", f"interrupted before anything new was saved{ago}"
        self.reason = reason
        if code == ExitCode.SAVED_RUN_AGAIN:
            return "preempted", f"it saved on request{ago}; resume continues it"
        if not reason and self.attempt is not None and self._attempt_is_of_this_start():
            self.reason = self.attempt.failure_line
        return "failed", f"code {code}: {_meaning(code)}{ago}"

    def _without_status(self) -> tuple[str, str]:
        """Describe a run of which nobody has recorded the end."""
        job = self.job
        if job is not None and job.state == GONE:
            how = "no end is recorded" if self.attempt or self._num_starts(job) else "it never started"
            return "lost", f"SLURM no longer knows job {job.job_id}, and {how}; resume continues it"
        if job is not None and job.is_over:
            self.exit_code = job.exit_code or None
            why = f" ({job.reason})" if job.reason else ""
            code = f" with code {job.exit_code}" if job.exit_code else ""
            printed = f"; `anemoi-dist logs {self.facts.run_id}` has what it printed" if job.nodes else ""
            ended = f"job {job.job_id} is {job.state}{why}{code} without having recorded a status"
            return "failed", f"{ended}{self._ago(job.end_time)}{printed}"
        sign = "" if self.seen is None else f", last seen {format_ago(self.now - self.seen)}"
        return (
            "crashed",
            f"its processes exited without recording a status{sign}; resume continues from what it saved last",
        )

    # Nobody here can tell

    def _unknown(self) -> tuple[str, str]:
        beats, attempt, begun = self.facts.beats, self.attempt, self.begun
        if self.control_has_ended and not self._attempt_is_newer():
            return self._over()
        if attempt is not None and attempt.exit_code is not None and self._attempt_is_of_this_start():
            if self.last is not None and self.last.event == "requeue":
                return "requeued", f"sent back into the queue{self._ago(self.last.time)}"
            if attempt.exit_code == ExitCode.FINISHED or not self.facts.job_id:
                return self._over()
        if self.seen is not None:
            if self.now - self.seen < SILENT_AFTER_S and self._current_attempt() is not None:
                self.notes.append("this is what its heartbeats say; nobody else could be asked")
                return self._alive()
            host = next((beat.host for beat in beats if beat.host), self.facts.owner_host)
            return "unknown", f"last seen {format_ago(self.now - self.seen)}" + (f" on {host}" if host else "")
        if begun is not None:
            action = {"submit": "submitted", "launch": "launched", "restart": "restarted"}[begun.event]
            return "unknown", f"{action} {format_ago(self.now - begun.time)} on {begun.host or '?'}"
        return "unknown", "held by a process" + (f" on {self.facts.owner_host}" if self.facts.owner_host else "")

    # The order of what happened

    def _attempt_is_newer(self) -> bool:
        """Whether the newest attempt began after the control side had ended: somebody else has started it."""
        if self.attempt is None or self.attempt.started is None or self.last is None:
            return False
        return self.control_has_ended and self.attempt.started > self.last.time + SKEW_S

    def _attempt_is_of_this_start(self) -> bool:
        """Whether the newest attempt began or ended after the last start; an older one says nothing about now."""
        if self.attempt is None or self.begun is None or self.begun.time > self.now + SKEW_S:
            return self.attempt is not None
        signs = [sign for sign in (self.attempt.started, self.attempt.ended) if sign is not None]
        return not signs or max(signs) > self.begun.time - SKEW_S

    def _current_attempt(self) -> AttemptRecord | None:
        """Return the attempt that runs; None if the newest is over, or belongs to an earlier start."""
        beats, attempt = self.facts.beats, self.attempt
        if attempt is None and beats:
            attempt = AttemptRecord(beats[0].attempt)  # run.json is damaged: the heartbeats replace it
        if attempt is None or attempt.exit_code is not None:
            return None
        signs = [sign for sign in (attempt.started, self.seen) if sign is not None]
        latest = max(signs, default=self.now)
        return attempt if all(latest > start - SKEW_S for start in self._starts()) else None

    def _starts(self) -> list[float]:
        """Return the times that a sign of the present start comes after: the last start, and SLURM's after a requeue.

        A start that a wrong clock has put into the future says nothing.
        """
        starts = [] if self.begun is None else [self.begun.time]
        # After a requeue by SLURM itself nobody has written into the journal.
        if self.job is not None and self.job.restarts and self.job.start_time is not None:
            starts.append(self.job.start_time)
        return [start for start in starts if start <= self.now + SKEW_S]

    def _has_events(self, attempt: AttemptRecord) -> bool:
        written = self.facts.events_written
        return written is not None and (attempt.started is None or written > attempt.started)

    def _for(self, since: float | None) -> str:
        return "" if since is None else f", for {format_duration(max(0.0, self.now - since))}"

    def _ago(self, when: float | None) -> str:
        return "" if when is None else f", {format_ago(self.now - when)}"


def _with_progress(status: RunStatus, facts: Facts, *, now: float) -> RunStatus:
    """Add the numbers of rank 0's heartbeat, or of the newest ``step`` event where they are not there."""
    main, event = next((beat for beat in facts.beats if beat.rank == 0), None), facts.step_event

    def newest(name: str) -> float | None:
        values = (getattr(source, name, None) for source in (main, event))
        return next((value for value in values if value is not None), None)

    step, total_steps, eta_s = newest("step"), newest("total_steps"), newest("eta_s")
    if total_steps is None and facts.attempts:  # before the first heartbeat of a step
        total_steps = facts.attempts[-1].max_steps
    seen = max((beat.seen for beat in facts.beats), default=facts.events_written)
    known_at = main.seen if main is not None else event.time if event is not None else None
    # The estimate was made when the heartbeat was written, and has been running down since.
    if eta_s is not None:
        eta_s = max(0.0, eta_s - max(0.0, now - (now if known_at is None else known_at)))
    return replace(
        status,
        step=None if step is None else int(step),
        total_steps=None if total_steps is None else int(total_steps),
        loss=newest("loss"),
        samples_per_s=newest("samples_per_s") if status.state in ("running", "silent", "stopping") else None,
        seen_s=None if seen is None else max(0.0, now - seen),
        eta_s=eta_s if status.state in ("running", "stopping") else None,
    )


def _blame(beat: Beat) -> tuple[float, float, float]:
    """Return the key that sorts ranks which wait for each other: first the one that all others wait for."""
    unknown = float("inf")
    collectives, step = (unknown if value is None else value for value in (beat.collectives, beat.step))
    return collectives, step, beat.seen


def _silent(beat: Beat, *, now: float) -> SilentRank:
    return SilentRank(
        beat.rank, host=beat.host or None, pid=beat.pid, phase=beat.phase, step=beat.step, silent_s=now - beat.seen
    )


def _meaning(code: int | None) -> str:
    return _MEANINGS.get(code, "an error of its own")
