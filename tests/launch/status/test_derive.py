"""What a run is said to do, in every phase, and where its files or clocks contradict each other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anemoi_dist.launch.status.derive import SILENT_AFTER_S, derive
from anemoi_dist.launch.status.files import Beat, Facts, StepEvent
from anemoi_dist.launch.status.journal import Entry
from anemoi_dist.launch.status.run_status import ACTIVE, STATES, RunStatus, format_ago
from anemoi_dist.launch.status.slurm_queue import GONE, JobView
from anemoi_dist.run.records import AttemptRecord, Failure, from_json

NOW = 1_000_000.0
DOWN = "slurmctld does not answer (squeue was given 3 s); jobs keep running without it"


def event(name: str, ago: float, **fields: Any) -> Entry:
    return from_json(Entry, {"event": name, "time": NOW - ago, "step": 0, "host": "login", "pid": 7, **fields})


def submit(ago: float, job: str = "12") -> Entry:
    return event("submit", ago, kind="slurm", job_id=job)


def launch(ago: float, job: str | None = "12", life: int = 0) -> Entry:
    more = {"kind": "local"} if job is None else {"kind": "slurm", "job_id": job, "life": life}
    return event("launch", ago, started=99, **more)


def attempt(started: float, ended: float | None = None, code: int | None = None, number: int = 1) -> AttemptRecord:
    end = None if ended is None else NOW - ended
    return AttemptRecord(number, started=NOW - started, ended=end, exit_code=code, world_size=2, max_steps=500)


def beat(rank: int = 0, ago: float = 3.0, phase: str = "step", step: int = 40, number: int = 1, **more: Any) -> Beat:
    at = {"time": NOW - ago, "written": NOW - ago}
    return Beat(rank=rank, attempt=number, **at, step=step, phase=phase, host=f"n{rank}", **more)


def job(state: str, **fields: Any) -> JobView:
    return JobView("12", state, **fields)


def beats(**more: Any) -> tuple[Beat, ...]:
    return beat(0, **more), beat(1, **more)


@dataclass
class Case:
    """What is known, and what must be said."""

    name: str
    state: str
    says: str = ""
    launch: tuple[Entry, ...] = ()
    attempts: tuple[AttemptRecord, ...] = ()
    beats: tuple[Beat, ...] = ()
    job: JobView | None = None
    error: str = ""
    note: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    def facts(self) -> Facts:
        return Facts("r", launch=self.launch, attempts=self.attempts, beats=self.beats, **self.more)

    def status(self) -> RunStatus:
        return derive(self.facts(), now=NOW, job=self.job, queue_error=self.error)


LOCAL_ALIVE = {"launcher_alive": True, "owner_alive": True, "owner_host": "login"}
LOCAL_DEAD = {"launcher_alive": False, "owner_alive": False, "owner_host": "login"}

NEVER_RUN = [
    Case("prepared", "planned"),
    Case("empty directory", "planned", "no configuration", more={"has_config": False}),
    Case("damaged and never started", "planned", more={"damage": "torn"}, note="run.json is passed over: torn"),
]

QUEUE = [
    Case("pending", "submitted", "waits: Priority", launch=(submit(60),), job=job("PENDING", reason="Priority")),
    Case(
        "pending, with a forecast",
        "submitted",
        "expected to start in 10:00",
        launch=(submit(60),),
        job=job("PENDING", reason="Resources", start_time=NOW + 600),
    ),
    Case("held", "submitted", "scontrol release 12", launch=(submit(60),), job=job("PENDING", reason="JobHeldUser")),
    Case(
        "a dependency that failed",
        "submitted",
        "never start",
        launch=(submit(60),),
        job=job("PENDING", reason="DependencyNeverSatisfied"),
    ),
    Case(
        "pending, after an older job has run",
        "submitted",
        launch=(launch(900, "11"), event("end", 500, code=75), submit(60)),
        attempts=(attempt(890, 500, 75),),
        job=job("PENDING", reason="Priority"),
    ),
    Case(
        "pending, and a stop is asked for",
        "submitted",
        launch=(submit(60),),
        job=job("PENDING"),
        more={"stop_requested": True},
        note="first step",
    ),
    Case(
        "requeued by us",
        "requeued",
        "BeginTime",
        launch=(submit(900), launch(890), event("requeue", 20, code=75, count=1)),
        attempts=(attempt(880, 21, 75),),
        job=job("PENDING", reason="BeginTime", restarts=1),
    ),
    Case(
        "preempted without a record: the old attempt looks open",
        "requeued",
        launch=(submit(900), launch(890)),
        attempts=(attempt(880),),
        beats=beats(ago=15),
        job=job("PENDING", reason="BeginTime", restarts=1),
    ),
    Case(
        "requeued before it launched anything",
        "requeued",
        launch=(submit(900),),
        job=job("PENDING", reason="Resources", restarts=1),
    ),
    Case(
        "requeued and held",
        "requeued",
        "scontrol release",
        launch=(submit(900), launch(890)),
        job=job("REQUEUE_HOLD", restarts=1),
    ),
    Case(
        "completing on its way back",
        "requeued",
        "leaves its nodes",
        launch=(submit(900), launch(890), event("requeue", 2, code=75)),
        attempts=(attempt(880, 3, 75),),
        job=job("COMPLETING", restarts=1),
    ),
    Case(
        "completing on its way back, by scontrol requeue",
        "requeued",
        launch=(submit(900), launch(890)),
        attempts=(attempt(880),),
        beats=beats(),
        job=job("COMPLETING", restarts=1),
    ),
    Case(
        "preempted: the launcher noted its end, SLURM has the job back in the queue",
        "requeued",
        launch=(submit(900), launch(890), event("end", 20, code=75)),
        attempts=(attempt(880, 21, 75),),
        job=job("PENDING", reason="BeginTime", restarts=1),
    ),
    Case(
        "preempted, on its way back",
        "requeued",
        launch=(submit(900), launch(890), event("end", 2, code=75)),
        attempts=(attempt(880, 3, 75),),
        job=job("COMPLETING", restarts=1),
    ),
    Case(
        "preempted before, given nodes again",
        "starting",
        launch=(submit(900), launch(890), event("end", 20, code=75)),
        attempts=(attempt(880, 21, 75),),
        job=job("RUNNING", restarts=1, start_time=NOW - 3),
    ),
    Case(
        "a life without a launch before, completing for good",
        "preempted",
        launch=(submit(900), launch(400, life=1), event("end", 2, code=75)),
        attempts=(attempt(380, 3, 75),),
        job=job("COMPLETING", restarts=1),
    ),
    Case(
        "the launcher has ended, its job not yet",
        "stopping",
        "launcher ended with code 3",
        launch=(submit(900), launch(890), event("end", 1, code=3)),
        job=job("RUNNING", start_time=NOW - 895),
    ),
    Case(
        "completing, the second life",
        "stopping",
        "SLURM ends",
        launch=(submit(900), launch(890), launch(400, life=1)),
        attempts=(attempt(380),),
        job=job("COMPLETING", restarts=1),
    ),
    Case(
        "completing, all said",
        "finished",
        launch=(submit(900), launch(890), event("end", 2, code=0)),
        attempts=(attempt(880, 3, 0),),
        job=job("COMPLETING"),
    ),
    Case(
        "a command of another program",
        "running",
        "its command runs, for 13:20",
        launch=(replace(submit(900), command=["true"]), launch(800)),
        job=job("RUNNING", start_time=NOW - 810),
    ),
    Case(
        "a command of another program, given nodes again",
        "starting",
        launch=(replace(submit(900), command=["true"]), launch(800)),
        job=job("RUNNING", restarts=1, start_time=NOW - 3),
    ),
    Case(
        "given nodes, nothing launched yet",
        "starting",
        "for 0:05",
        launch=(submit(900),),
        job=job("RUNNING", start_time=NOW - 5),
    ),
    Case(
        "running again after a requeue, the old heartbeats still there",
        "starting",
        "for 0:05",
        launch=(submit(900), launch(890), event("requeue", 30, code=75)),
        attempts=(attempt(880, 31, 75),),
        beats=beats(ago=32),
        job=job("RUNNING", restarts=1, start_time=NOW - 5),
    ),
    Case(
        "running again after a node died, the old attempt open",
        "starting",
        launch=(submit(900), launch(890)),
        attempts=(attempt(880),),
        beats=beats(ago=60),
        job=job("RUNNING", restarts=1, start_time=NOW - 20),
    ),
    Case(
        "running in its second life",
        "running",
        launch=(submit(900), launch(890), event("requeue", 300, code=75), launch(280, life=1)),
        attempts=(attempt(880, 301, 75), attempt(270, number=2)),
        beats=beats(number=2),
        job=job("RUNNING", restarts=1, start_time=NOW - 290, end_time=NOW + 600),
    ),
]

ALIVE = [
    Case("launched", "starting", "started, for 0:04", launch=(launch(4, None),), more=LOCAL_ALIVE),
    Case(
        "loading",
        "starting",
        "import and load",
        launch=(launch(40, None),),
        attempts=(attempt(30),),
        beats=beats(phase="startup"),
        more=LOCAL_ALIVE,
    ),
    Case(
        "training",
        "running",
        "2 ranks train",
        launch=(launch(400, None),),
        attempts=(attempt(390),),
        beats=beats(),
        more=LOCAL_ALIVE,
    ),
    Case(
        "scoring",
        "running",
        "score",
        launch=(launch(400, None),),
        attempts=(attempt(390),),
        beats=beats(phase="validation"),
        more=LOCAL_ALIVE,
    ),
    Case(
        "under SLURM",
        "running",
        launch=(submit(900), launch(800)),
        attempts=(attempt(790),),
        beats=beats(),
        job=job("RUNNING", start_time=NOW - 810),
    ),
    Case(
        "by hand, without a launcher",
        "running",
        attempts=(attempt(390),),
        beats=beats(),
        more={"owner_alive": True, "owner_host": "login"},
    ),
    Case(
        "by hand, after our launcher had ended",
        "running",
        launch=(launch(900, None), event("end", 600, code=75)),
        attempts=(attempt(890, 600, 75), attempt(100, number=2)),
        beats=beats(number=2),
        more={"launcher_alive": False, "owner_alive": True, "owner_host": "login"},
    ),
    Case(
        "without heartbeats, events come",
        "running",
        launch=(launch(400, None),),
        attempts=(attempt(390),),
        more={**LOCAL_ALIVE, "events_written": NOW - 2},
        note="no heartbeats",
    ),
    Case(
        "without heartbeats or events of this attempt",
        "starting",
        launch=(launch(40, None),),
        attempts=(attempt(39),),
        more={**LOCAL_ALIVE, "events_written": NOW - 90},
    ),
    Case(
        "asked to stop",
        "stopping",
        "saves at the end of a step",
        launch=(launch(400, None),),
        attempts=(attempt(390),),
        beats=beats(),
        more={**LOCAL_ALIVE, "stop_requested": True},
    ),
    Case(
        "waiting to start again",
        "restarting",
        "a rank hung; its ranks start again, in 0:06",
        launch=(launch(400, None), event("restart", 4, code=6, wait_s=10)),
        attempts=(attempt(390, 4.5, 6),),
        beats=beats(ago=200),
        more={**LOCAL_ALIVE, "owner_alive": None, "owner_host": ""},
    ),
    Case(
        "starting again after a rank was killed: the old attempt looks open",
        "restarting",
        "a rank crashed or was killed; its ranks start again, for 0:04",
        launch=(launch(400, None), event("restart", 4, code=70, reason="run r: rank 1 was killed", wait_s=0)),
        attempts=(attempt(390),),
        beats=beats(ago=7),
        more={"launcher_alive": True, "owner_alive": False, "owner_host": "login"},
    ),
    Case(
        "its ranks have ended, its launcher has not",
        "stopping",
        "ended with code 75",
        launch=(launch(400, None),),
        attempts=(attempt(390, 1, 75),),
        beats=beats(phase="end"),
        more={"launcher_alive": True},
    ),
    Case(
        "a rank crashed, its launcher has not said yet what follows",
        "restarting",
        "its ranks ended with code 70, 1 s ago",
        launch=(launch(400, None),),
        attempts=(attempt(390, 1, 70),),
        beats=beats(),
        more={"launcher_alive": True},
    ),
    Case(
        "a rank crashed while a stop was asked for",
        "stopping",
        "its ranks ended with code 70, 1 s ago",
        launch=(launch(400, None),),
        attempts=(attempt(390, 1, 70),),
        beats=beats(),
        more={"launcher_alive": True, "stop_requested": True},
    ),
    Case(
        "its ranks have finished, its launcher has not ended",
        "finished",
        launch=(launch(400, None),),
        attempts=(attempt(390, 1, 0),),
        beats=beats(phase="end"),
        more={"launcher_alive": True},
    ),
    Case(
        "cancelled, and not yet gone",
        "stopping",
        "cancelled",
        launch=(submit(900), launch(800), event("cancel", 2)),
        attempts=(attempt(790),),
        beats=beats(),
        job=job("RUNNING"),
    ),
    Case(
        "one rank silent",
        "silent",
        "rank 1 on n1 is silent for 5:00 in step at step 40",
        launch=(launch(900, None),),
        attempts=(attempt(890),),
        beats=(beat(0), beat(1, ago=300)),
        more=LOCAL_ALIVE,
    ),
    Case(
        "all silent: the one that has begun the fewest collectives is named",
        "silent",
        "rank 1 on n1 is silent for 5:01 in checkpoint at step 40; 1 more silent",
        launch=(launch(900, None),),
        attempts=(attempt(890),),
        beats=(beat(0, ago=302, collectives=81), beat(1, ago=301, phase="checkpoint", collectives=80)),
        more=LOCAL_ALIVE,
    ),
    Case(
        "all silent: the one that is behind is named",
        "silent",
        "rank 1 on n1",
        launch=(launch(900, None),),
        attempts=(attempt(890),),
        beats=(beat(0, ago=302, step=41), beat(1, ago=301)),
        more=LOCAL_ALIVE,
    ),
    Case(
        "silent, and asked to stop",
        "silent",
        "needs every rank",
        launch=(launch(900, None),),
        attempts=(attempt(890),),
        beats=(beat(0), beat(1, ago=300)),
        more={**LOCAL_ALIVE, "stop_requested": True},
    ),
    Case(
        "slow to load is not silent",
        "starting",
        launch=(launch(400, None),),
        attempts=(attempt(390),),
        beats=beats(phase="startup", ago=380),
        more=LOCAL_ALIVE,
    ),
    Case(
        "rank 0 has never been seen",
        "silent",
        "rank 0 has given no sign of life for 14:50",
        launch=(launch(900, None),),
        attempts=(attempt(890),),
        beats=(beat(1),),
        more=LOCAL_ALIVE,
    ),
    Case(
        "a node's clock is behind",
        "silent",
        "rank 1",
        launch=(launch(900, None),),
        attempts=(attempt(890),),
        beats=(beat(0), replace(beat(1, ago=3600), written=NOW - 2)),
        more=LOCAL_ALIVE,
        note="behind",
    ),
]

OVER = [
    Case(
        "finished",
        "finished",
        "all its steps are done, 5 s ago",
        launch=(launch(400, None), event("end", 5, code=0)),
        attempts=(attempt(390, 5, 0),),
        beats=beats(phase="end"),
        more={"launcher_alive": False},
    ),
    Case("finished under torchrun, without a journal", "finished", attempts=(attempt(390, 60, 0),)),
    Case(
        "finished, long purged",
        "finished",
        launch=(submit(90000), launch(89000), event("end", 80000, code=0)),
        attempts=(attempt(88990, 80001, 0),),
        job=job(GONE),
    ),
    Case(
        "finished, and started again for nothing",
        "finished",
        launch=(launch(900, None), event("end", 500, code=0), launch(60, None), event("end", 50, code=0)),
        attempts=(attempt(890, 500, 0),),
        more={"launcher_alive": False},
    ),
    Case(
        "a command of another program, done",
        "finished",
        launch=(submit(900), launch(890), event("end", 60, code=0)),
        job=job("COMPLETED"),
    ),
    Case(
        "stopped and saved",
        "preempted",
        "it saved on request, 5 s ago; resume continues it",
        launch=(launch(400, None), event("end", 5, code=75, reason="the stop file")),
        attempts=(attempt(390, 6, 75),),
        more={"launcher_alive": False},
    ),
    Case(
        "diverged",
        "failed",
        "code 5: training diverged, 5 s ago",
        launch=(launch(400, None), event("end", 5, code=5)),
        attempts=(attempt(390, 6, 5),),
        more={"launcher_alive": False},
    ),
    Case(
        "refused before an attempt began",
        "failed",
        "code 3: the preflight failed, 5 s ago",
        launch=(launch(400, None), event("end", 5, code=3, reason="no disk")),
        more={"launcher_alive": False},
    ),
    Case(
        "interrupted",
        "cancelled",
        "before anything new was saved",
        launch=(launch(400, None), event("end", 5, code=130)),
        attempts=(attempt(390, 6, 130),),
        more={"launcher_alive": False},
    ),
    Case(
        "cancelled by our command",
        "cancelled",
        launch=(launch(400, None), event("cancel", 9)),
        attempts=(attempt(390),),
        more=LOCAL_DEAD,
    ),
    Case(
        "cancelled by our command, and its end noted after that",
        "cancelled",
        launch=(submit(900), launch(800), event("cancel", 9), event("end", 8, code=75)),
        attempts=(attempt(790, 8, 75),),
        job=job("CANCELLED"),
    ),
    Case(
        "finished while it was being cancelled",
        "finished",
        launch=(submit(900), launch(800), event("cancel", 9)),
        attempts=(attempt(790, 8, 0),),
        job=job("CANCELLED"),
    ),
    Case(
        "cancelled by scancel",
        "cancelled",
        "by scancel by 1000",
        launch=(submit(900), launch(800)),
        attempts=(attempt(790),),
        beats=beats(),
        job=job("CANCELLED", reason="by 1000", end_time=NOW - 5),
    ),
    Case("cancelled in the queue", "cancelled", launch=(submit(900),), job=job("CANCELLED")),
    Case(
        "crashed without a record",
        "crashed",
        "last seen 60 s ago",
        launch=(launch(400, None),),
        attempts=(attempt(390),),
        beats=beats(ago=60),
        more=LOCAL_DEAD,
    ),
    Case(
        "crashed while it waited to start again",
        "crashed",
        launch=(launch(400, None), event("restart", 60, code=70)),
        attempts=(attempt(390),),
        more=LOCAL_DEAD,
    ),
    Case(
        "crashed at once, an older attempt had finished",
        "crashed",
        launch=(launch(900, None), event("end", 800, code=0), launch(60, None)),
        attempts=(attempt(890, 801, 0),),
        more={"launcher_alive": False},
    ),
    Case(
        "by hand in an allocation that goes on, crashed",
        "crashed",
        attempts=(replace(attempt(390), job_id="12"),),
        job=job("RUNNING"),
        more={"owner_alive": False, "owner_host": "login"},
    ),
    Case(
        "by hand in an allocation that goes on, saved",
        "preempted",
        attempts=(replace(attempt(390, 9, 75), job_id="12"),),
        job=job("RUNNING"),
    ),
    Case("by hand, crashed", "crashed", attempts=(attempt(390),), more={"owner_alive": False, "owner_host": "login"}),
    Case(
        "the launcher was killed after its ranks had failed",
        "failed",
        "code 70",
        launch=(launch(400, None),),
        attempts=(attempt(390, 60, 70),),
        more={"launcher_alive": False},
    ),
    Case(
        "out of time, without a record",
        "failed",
        "job 12 is TIMEOUT with code 143",
        launch=(submit(900), launch(800)),
        attempts=(attempt(790),),
        job=job("TIMEOUT", exit_code=143, end_time=NOW - 60),
    ),
    Case(
        "failed on its node before a rank reported",
        "failed",
        "without having recorded a status; `anemoi-dist logs r` has what it printed",
        launch=(submit(900), launch(800)),
        job=replace(job("FAILED", reason="NonZeroExitCode", exit_code=1), nodes="node1"),
    ),
    Case(
        "refused by SLURM",
        "failed",
        "FAILED (BadConstraints)",
        launch=(submit(900),),
        job=job("FAILED", reason="BadConstraints", exit_code=1),
    ),
    Case(
        "purged, without a record",
        "lost",
        "no end is recorded",
        launch=(submit(90000), launch(89000)),
        attempts=(attempt(88990),),
        beats=beats(ago=80000),
        job=job(GONE),
    ),
    Case(
        "not known to SLURM, and alive",
        "running",
        launch=(submit(900), launch(800)),
        attempts=(attempt(790),),
        beats=beats(),
        job=job(GONE),
        note="another cluster",
    ),
    Case("purged, never started", "lost", "never started", launch=(submit(90000),), job=job(GONE)),
    Case(
        "to be requeued, and gone",
        "lost",
        "sent back into the queue, but job 12 is GONE",
        launch=(submit(90000), launch(89000), event("requeue", 80000, code=75)),
        attempts=(attempt(88990, 80001, 75),),
        job=job(GONE),
    ),
    Case(
        "resumed with another job, which failed",
        "failed",
        "job 12",
        launch=(launch(9000, "11"), event("end", 8000, code=0), submit(60)),
        attempts=(attempt(8990, 8001, 0),),
        job=job("FAILED", exit_code=1),
    ),
]

UNKNOWN = [
    Case(
        "slurmctld is down, heartbeats come",
        "running",
        launch=(submit(900), launch(800)),
        attempts=(attempt(790),),
        beats=beats(),
        error=DOWN,
        note="slurmctld does not answer",
    ),
    Case(
        "slurmctld is down, no heartbeats lately",
        "unknown",
        "last seen 10 min ago on n0",
        launch=(submit(9000), launch(8000)),
        attempts=(attempt(7990),),
        beats=beats(ago=600),
        error=DOWN,
    ),
    Case("slurmctld is down, never launched", "unknown", "submitted 15 min ago", launch=(submit(900),), error=DOWN),
    Case(
        "slurmctld is down, it went back into the queue",
        "requeued",
        launch=(submit(900), launch(800), event("requeue", 30, code=75)),
        attempts=(attempt(790, 31, 75),),
        error=DOWN,
    ),
    Case(
        "slurmctld is down, it had finished",
        "finished",
        launch=(submit(900), launch(800), event("end", 30, code=0)),
        attempts=(attempt(790, 31, 0),),
        error=DOWN,
    ),
    Case(
        "slurmctld is down, it has recorded the last step",
        "finished",
        launch=(submit(900), launch(800)),
        attempts=(attempt(790, 31, 0),),
        error=DOWN,
    ),
    Case(
        "slurmctld is down, rank 0 lives here",
        "running",
        launch=(submit(900), launch(800)),
        attempts=(attempt(790),),
        beats=beats(ago=30),
        error=DOWN,
        more={"owner_alive": True, "owner_host": "login"},
    ),
    Case(
        "on another host, heartbeats come",
        "running",
        launch=(launch(800, None),),
        attempts=(attempt(790),),
        beats=beats(),
        more={"owner_host": "elsewhere"},
        note="heartbeats say",
    ),
    Case(
        "on another host, silent for an hour",
        "unknown",
        "last seen 60 min ago on n0",
        launch=(launch(8000, None),),
        attempts=(attempt(7990),),
        beats=beats(ago=3600),
        more={"owner_host": "elsewhere"},
    ),
    Case(
        "on another host, no heartbeats",
        "unknown",
        "held by a process on elsewhere",
        attempts=(attempt(7990),),
        more={"owner_host": "elsewhere"},
    ),
]

DAMAGED = [
    Case(
        "run.json damaged, running",
        "running",
        launch=(launch(800, None),),
        beats=beats(),
        more={"launcher_alive": True, "damage": "torn"},
        note="run.json is passed over",
    ),
    Case(
        "run.json damaged, only heartbeats",
        "running",
        beats=beats(),
        more={"damage": "torn"},
        note="run.json is passed over",
    ),
    Case(
        "run.json damaged, ended",
        "preempted",
        launch=(launch(800, None), event("end", 60, code=75)),
        beats=beats(ago=70, phase="end"),
        more={"launcher_alive": False, "damage": "torn"},
    ),
    Case("the journal lost, run.json kept", "finished", attempts=(attempt(390, 60, 0),)),
    Case(
        "the journal lost, rank 0 dead here",
        "crashed",
        attempts=(attempt(390),),
        beats=beats(ago=100),
        more={"owner_alive": False, "owner_host": "login"},
    ),
    Case(
        "an end without a code",
        "crashed",
        launch=(launch(800, None), event("end", 60)),
        attempts=(attempt(790),),
        more=LOCAL_DEAD,
    ),
    Case(
        "the launching host's clock is an hour ahead",
        "running",
        launch=(launch(-3600, None),),
        attempts=(attempt(390),),
        beats=beats(),
        more=LOCAL_ALIVE,
        note="ahead",
    ),
    Case(
        "the ranks' clocks are ahead",
        "running",
        launch=(launch(400, None),),
        attempts=(attempt(390),),
        beats=beats(ago=-50),
        more=LOCAL_ALIVE,
    ),
    Case(
        "a job id that is none",
        "unknown",
        launch=(submit(900, "; rm -rf"),),
    ),
]

CASES = [*NEVER_RUN, *QUEUE, *ALIVE, *OVER, *UNKNOWN, *DAMAGED]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_phase(case: Case):
    status = case.status()
    assert (status.state, status.detail) == (case.state, status.detail)
    assert case.says in status.detail
    assert any(case.note in note for note in status.notes) or not case.note
    if case.error:
        assert case.error in status.notes
    assert (status.eta_s is None) or status.state in ("running", "stopping")
    assert bool(status.silent) == (status.state == "silent")


def test_reasons_stand_alone():
    reasons = {case.name: case.status().reason for case in CASES}
    assert reasons["starting again after a rank was killed: the old attempt looks open"] == "rank 1 was killed"
    assert reasons["stopped and saved"] == "the stop file"
    assert reasons["refused before an attempt began"] == "no disk"
    assert reasons["finished"] is None
    refused = replace(attempt(390, 5, 2), failure=Failure(0, host="n0", pid=7, error="a.b=[0]: must be"))
    case = Case("", "", launch=(launch(400, None), event("end", 5, code=2)), attempts=(refused,), more=LOCAL_DEAD)
    assert case.status().reason == "rank 0 on n0 (pid 7): a.b=[0]: must be"
    assert case.status().detail == "code 2: the configuration was refused, 5 s ago"


def test_every_state_has_a_case():
    assert {case.state for case in CASES} == set(STATES)
    assert set(ACTIVE) <= set(STATES)


def test_numbers_are_rank_0s_and_as_old_as_they_are():
    main = beat(0, ago=10, total_steps=500, loss=0.5, samples_per_s=20.0, eta_s=100.0)
    case = Case("", "", launch=(launch(400, None),), attempts=(attempt(390),), beats=(main, beat(1)), more=LOCAL_ALIVE)
    status = case.status()
    assert (status.step, status.total_steps, status.loss, status.samples_per_s) == (40, 500, 0.5, 20.0)
    assert (status.eta_s, status.seen_s) == (90.0, 3.0)
    case.beats = (replace(main, time=NOW - 119), beat(1))
    assert case.status().eta_s == 0.0, "never negative"
    case.beats = ()
    case.more = {**LOCAL_ALIVE, "events_written": NOW - 1}
    case.more["step_event"] = StepEvent(30, loss=0.7, samples_per_s=9.0, eta_s=50.0, time=NOW - 5)
    status = case.status()
    assert (status.step, status.total_steps, status.loss, status.eta_s, status.seen_s) == (30, 500, 0.7, 45.0, 1.0)


def test_the_job_is_told():
    case = next(case for case in QUEUE if case.name == "running in its second life")
    case = replace(case, job=replace(case.job, nodes="node[1-2]"))
    status = case.status()
    assert (status.job_id, status.nodes, status.restarts, status.limit_s) == ("12", "node[1-2]", 1, 600.0)
    assert (status.attempt, status.kind) == (2, "slurm")


def test_how_it_ended_is_told():
    codes = {case.name: case.status().exit_code for case in OVER}
    assert (codes["finished"], codes["diverged"], codes["stopped and saved"]) == (0, 5, 75)
    assert codes["out of time, without a record"] == 143
    assert codes["crashed without a record"] is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "just now"),
        (0.4, "just now"),
        (12.2, "12 s ago"),
        (99, "99 s ago"),
        (125, "2 min ago"),
        (7200, "2 h ago"),
        (2e5, "2 d ago"),
    ],
)
def test_ages(seconds, text):
    assert format_ago(seconds) == text


# Whatever the files say, there is an answer, and it is a sane one

times = st.one_of(st.none(), st.floats(NOW - 1e5, NOW + 1e4))
words = st.sampled_from(["submit", "launch", "restart", "requeue", "end", "cancel"])
events = st.builds(
    lambda name, time, job, code: from_json(
        Entry, {"event": name, "time": time, "step": 0, "job_id": job, "code": code, "wait_s": code}
    ),
    words,
    st.floats(NOW - 1e5, NOW + 1e4),
    st.sampled_from([None, "12", 12, ["x"]]),
    st.sampled_from([None, 0, 5, 70, 75, 130, "x", -9]),
)
codes = st.sampled_from([None, 0, 70, 75, -15])
numbers = st.one_of(st.none(), st.floats(-1e3, 1e9))
all_facts = st.builds(
    Facts,
    st.just("r"),
    attempts=st.lists(st.builds(AttemptRecord, st.just(1), times, times, codes, st.none(), st.none()), max_size=2).map(
        tuple
    ),
    launch=st.lists(events, max_size=4).map(tuple),
    beats=st.lists(
        st.builds(
            Beat,
            rank=st.integers(0, 3),
            attempt=st.just(1),
            time=st.floats(NOW - 1e5, NOW + 1e4),
            written=st.floats(NOW - 1e5, NOW + 1e4),
            phase=st.sampled_from(["", "startup", "step", "end", "?"]),
            eta_s=numbers,
        ),
        max_size=3,
        unique_by=lambda beat: beat.rank,
    ).map(lambda found: tuple(sorted(found, key=lambda beat: beat.rank))),
    events_written=times,
    stop_requested=st.booleans(),
    launcher_alive=st.sampled_from([None, True, False]),
    owner_alive=st.sampled_from([None, True, False]),
    damage=st.sampled_from(["", "torn"]),
)
views = st.one_of(
    st.none(),
    st.builds(
        JobView,
        st.just("12"),
        st.sampled_from(["PENDING", "RUNNING", "COMPLETING", "COMPLETED", "FAILED", "CANCELLED", GONE, "NEW_WORD"]),
        restarts=st.sampled_from([None, 0, 2]),
        start_time=times,
        end_time=times,
    ),
)


@settings(max_examples=150, deadline=None)
@given(all_facts, views, st.sampled_from(["", DOWN]))
def test_there_is_always_an_answer(facts, view, error):
    status = derive(facts, now=NOW, job=view, queue_error="" if view else error)
    assert status.state in STATES
    if view is not None and view.is_waiting and (facts.launch or facts.attempts or facts.beats):
        assert status.state in ("submitted", "requeued")
    if view is not None and view.is_over and view.state != GONE:
        assert not status.is_active, "no job, no activity"
    for age in (status.seen_s, status.eta_s, status.limit_s):
        assert age is None or age >= 0
    assert all(rank.silent_s > SILENT_AFTER_S for rank in status.silent)
