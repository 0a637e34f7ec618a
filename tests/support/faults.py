"""What goes wrong with SLURM jobs, done to a real one: each fault, what became of the run, and a table of it.

python -m support.faults [NAME ...]      on a cluster of its own; prints the table
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from anemoi_dist.run.events import read_events
from support.minislurm import MiniSlurm
from support.runs import ENVIRONMENT, SMALL
from support.waiting import wait_until

#: Long enough to be hit in the middle, on an idle machine too.
STEPS, INTERVAL = 40, 5
TWO_BY_TWO = [
    "launcher=slurm",
    "launcher.nodes=2",
    "launcher.profile=minislurm",
    *SMALL,
    "data.num_workers=0",
    f"training.max_steps={STEPS}",
    f"checkpoint.interval_steps={INTERVAL}",
    "launcher.backoff_s=0.2",
]
#: For what SLURM needs half a minute to notice: as long again on an idle machine.
LONG = ("training.max_steps=500", "checkpoint.interval_steps=50", "validation.interval_steps=250")
_OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}


class SlurmRun:
    """A run in the queue of a cluster.

    Parameters
    ----------
    cluster : MiniSlurm
        Where.
    root : Path
        Directory of its runs.
    run_id : str
        The run.
    *overrides : str
        Beside its name.
    """

    def __init__(self, cluster: MiniSlurm, root: Path, run_id: str, *overrides: str) -> None:
        self.cluster, self.directory = cluster, root / run_id
        quoted = str(root).replace("'", "\\'")
        answer = anemoi_dist(cluster, "submit", "--no-check", *overrides, f"run.root='{quoted}'", f"run.id={run_id}")
        assert answer.returncode == 0, answer.stderr
        self.job_id = int(answer.stdout.partition(": job ")[2].partition(",")[0])

    def events(self, name: str) -> list[dict[str, object]]:
        path = self.directory / "events.jsonl"
        return [event for event in read_events(path) if event["event"] == name] if path.exists() else []

    def launches(self, name: str) -> list[dict[str, object]]:
        return [event for event in read_events(self.directory / "launch.jsonl") if event["event"] == name]

    @property
    def log(self) -> str:
        path = self.directory / "logs" / f"slurm-{self.job_id}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def nodes(self) -> list[int]:
        """Return the numbers of the job's nodes."""
        listed = self.cluster.job_field(self.job_id, "NodeList")
        names = self.cluster.run("scontrol", "show", "hostnames", listed).split()
        return [int(name.removeprefix("node")) for name in names]

    def wait_for_step(self, step: int, *, after: float = 0.0, timeout_s: float = 600) -> float:
        """Wait for a step that was taken after a time; return when."""
        found: list[float] = []

        def reached() -> bool:
            taken = [e for e in self.events("step") if int(e["step"]) >= step and float(e["time"]) > after]
            found.extend(float(e["time"]) for e in taken[:1])
            return bool(found)

        assert wait_until(reached, timeout_s=timeout_s, every_s=0.02), f"no step {step}\n{self.log}"
        return found[0]

    def wait_until_over(self, *, timeout_s: float = 900) -> str:
        """Wait until the job will not run again; return its state."""
        seen = ""

        def over() -> bool:
            nonlocal seen
            seen = self.cluster.job_state(self.job_id)
            return seen in _OVER

        assert wait_until(over, timeout_s=timeout_s, every_s=0.2), f"job is {seen}\n{self.log}"
        return seen

    def processes(self, module: str, **variables: str) -> list[int]:
        """Return the processes of the job that run a module of ours and have these variables, data workers left out."""
        found = []
        for pid in self.cluster.job_processes(self.job_id):
            try:
                words = Path("/proc", str(pid), "cmdline").read_bytes().decode().split("\0")
                text = Path("/proc", str(pid), "environ").read_bytes().decode(errors="replace")
                parent = int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[1])
                above = Path("/proc", str(parent), "cmdline").read_bytes().decode().split("\0")
            except (OSError, ValueError):
                continue
            own = dict(pair.partition("=")[::2] for pair in text.split("\0"))
            if _module(words) == module != _module(above) and variables.items() <= own.items():
                found.append(pid)
        return found

    def steps_repeated(self) -> int:
        """Return how many optimizer steps were done more than once."""
        return sum(count - 1 for count in Counter(e["step"] for e in self.events("step")).values())

    def left_running(self) -> list[int]:
        """Return processes of the job that are there some seconds after its end."""
        wait_until(lambda: not self.cluster.job_processes(self.job_id), timeout_s=15)
        return self.cluster.job_processes(self.job_id)


def _module(words: Sequence[str]) -> str:
    return words[words.index("-m") + 1] if "-m" in words[:-1] else ""


def anemoi_dist(cluster: MiniSlurm, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program against a cluster."""
    return subprocess.run(
        [sys.executable, "-m", "anemoi_dist.launch.cli", *arguments],
        env={**cluster.environment, "OMP_NUM_THREADS": "1", **ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes
    ----------
    inflict : Callable[[SlurmRun], None]
        Do it.
    mend : Callable[[SlurmRun], None]
        Undo it once the run is over, for the next one.
    overrides : tuple[str, ...]
        What the run is submitted with beside the usual.
    interrupts : bool
        Whether ranks have to start again.
    """

    inflict: Callable[[SlurmRun], None]
    mend: Callable[[SlurmRun], None] = lambda run: None
    overrides: tuple[str, ...] = ()
    interrupts: bool = True


def _usr1(run: SlurmRun) -> None:
    run.cluster.run("scancel", "--signal=USR1", "--batch", str(run.job_id))


def _end_time(run: SlurmRun) -> None:
    run.cluster.run("scontrol", "update", f"jobid={run.job_id}", "EndTime=now+55seconds")
    told = wait_until(lambda: run.launches("requeue"), timeout_s=90, every_s=0.5)
    assert told, f"the signal did not come\n{run.log}"
    run.cluster.run("scontrol", "update", f"jobid={run.job_id}", "TimeLimit=UNLIMITED")


def _preempt(run: SlurmRun) -> None:
    run.cluster.run(
        "sbatch", "-p", "high", "-N4", "-n16", "--output=/dev/null", "--job-name=preempting", "--wrap", "sleep 2"
    )


def _requeue(run: SlurmRun) -> None:
    run.cluster.run("scontrol", "requeue", str(run.job_id))


def _kill(module: str, **variables: str) -> Callable[[SlurmRun], None]:
    def kill(run: SlurmRun) -> None:
        victim = run.processes(module, **variables)[-1]
        os.kill(victim, signal.SIGKILL)

    return kill


def _kill_slurmd(place: int) -> Callable[[SlurmRun], None]:
    def kill(run: SlurmRun) -> None:
        run.cluster.kill_slurmd(run.nodes()[place])

    return kill


def _start_slurmds(run: SlurmRun) -> None:
    for number in range(1, run.cluster.num_nodes + 1):
        if not (run.cluster.directory / "run" / f"slurmd.node{number}.pid").exists():
            run.cluster.start_slurmd(number)


def _node_down(run: SlurmRun) -> None:
    run.cluster.run("scontrol", "update", f"nodename=node{run.nodes()[1]}", "state=down", "reason=test")


def _nodes_up(run: SlurmRun) -> None:
    states = run.cluster.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t").splitlines()
    for name, state in (line.split() for line in states):
        if state.startswith(("down", "drain")):
            run.cluster.run("scontrol", "update", f"nodename={name}", "state=resume")


def _restart_controller(run: SlurmRun) -> None:
    run.cluster.stop_controller()
    time.sleep(2)
    run.cluster.start_controller()


FAULTS = {
    "time limit": Fault(_usr1),
    "time limit, by the clock": Fault(_end_time, overrides=LONG),
    "preemption": Fault(_preempt, overrides=("launcher.slurm.partition=low",)),
    "scontrol requeue": Fault(_requeue),
    "kill -9 of a rank": Fault(_kill("anemoi_dist.train", SLURM_NODEID="1")),
    "kill -9 of rank 0": Fault(_kill("anemoi_dist.train", RANK="0")),
    "kill -9 of a rank that srun started": Fault(
        _kill("anemoi_dist.train", SLURM_NODEID="1"), overrides=("launcher.ranks_by=srun",)
    ),
    "kill -9 of a torchrun agent": Fault(_kill("anemoi_dist.launch.job.agent", SLURM_NODEID="1")),
    "kill -9 of the first node's slurmd": Fault(_kill_slurmd(0), _start_slurmds, LONG),
    "kill -9 of the second node's slurmd": Fault(_kill_slurmd(1), _start_slurmds, LONG),
    "a node set down": Fault(_node_down, _nodes_up),
    "slurmctld killed and started": Fault(_restart_controller, interrupts=False),
}


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes
    ----------
    run : SlurmRun
        The run, which is over.
    state : str
        SLURM's word for its job.
    seconds : float
        From the fault to the first step after it.
    """

    run: SlurmRun
    state: str
    seconds: float


def play(cluster: MiniSlurm, root: Path, name: str, *overrides: str) -> Outcome:
    """Submit a run, inflict a fault on it in the middle and wait for its end."""
    fault = FAULTS[name]
    cluster.wait_idle()
    run_id = name.replace(" ", "-").replace(",", "").replace("'", "")
    run = SlurmRun(cluster, root, run_id, *overrides, *fault.overrides)
    run.wait_for_step(STEPS // 3)
    struck = time.time()
    fault.inflict(run)
    try:
        if fault.interrupts:
            first_start = run.events("start")[0]
            begun = wait_until(lambda: len(run.events("start")) > 1, timeout_s=600, every_s=0.05)
            assert begun, f"no second start after {first_start}\n{run.log}"
            second = float(run.events("start")[1]["time"])
            seconds = run.wait_for_step(1, after=second) - struck
        else:
            seconds = run.wait_for_step(1, after=struck) - struck
        state = run.wait_until_over()
    finally:
        fault.mend(run)
    return Outcome(run, state, seconds)


def table(outcomes: Sequence[tuple[str, Outcome]]) -> str:
    """Return the table of faults."""
    rows = [("fault", "seconds to running again", "steps repeated")]
    rows += [(name, f"{o.seconds:.1f}", str(o.run.steps_repeated())) for name, o in outcomes]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"| {line} |" for line in [lines[0], " | ".join("-" * width for width in widths), *lines[1:]])


def main(names: Sequence[str]) -> None:
    cluster = MiniSlurm(Path(tempfile.mkdtemp(prefix="minislurm-", dir="/tmp")))
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    cluster.start()
    try:
        outcomes = []
        for name in names or FAULTS:
            outcomes.append((name, play(cluster, root, name, *TWO_BY_TWO)))
            print(table(outcomes[-1:]).splitlines()[-1], outcomes[-1][1].state, flush=True)
        print(table(outcomes))
    finally:
        cluster.stop()
        shutil.rmtree(cluster.directory)
    print(f"runs are in {root}")


if __name__ == "__main__":
    main(sys.argv[1:])
