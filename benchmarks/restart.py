"""A rank is killed again and again in the middle of a run: how long until the next step, and what comes out.

    python benchmarks/restart.py --kills 20

Two ranks on this machine under ``anemoi-dist train launcher.max_restarts=N``; a rank drawn at random gets SIGKILL at a
random step. The time is from the signal to the end of the next optimizer step; what the interpreter takes to import
torch, DeepSpeed and this package in the agent and then in both ranks is measured in the same run and shown beside it.
Writes ``results/restart.{md,json}``, and ends with 1 where a restart failed or the final parameters differ.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from anemoi_dist.checkpoint.compare import differences
from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.run.events import read_events

RESULTS = Path(__file__).parent / "results"
JOB = ["model.hidden_channels=6", "model.dilations=[1]", "training.global_batch_size=4", "training.lr.warmup=4"]
JOB += ["telemetry.interval_steps=1", "validation.interval_steps=null", "validation.lead_steps=[1]"]
AGENT, RANK = (
    "import torch.distributed.run",
    "import deepspeed, anemoi_dist.training.setup, anemoi_dist.engines.zero",
)


def start(root: Path, run_id: str, *, num_steps: int, restarts: int) -> subprocess.Popen[bytes]:
    """Start the job; its output goes to a file beside the run."""
    command = [sys.executable, "-m", "anemoi_dist.launch.cli", "train", *JOB, f"run.root={root}", f"run.id={run_id}"]
    command += [f"training.max_steps={num_steps}", "checkpoint.interval_steps=5", "launcher.ranks=2"]
    command += [f"launcher.max_restarts={restarts}", "launcher.backoff_s=0"]
    with (root / f"{run_id}.txt").open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def ranks(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the ranks below a launcher, without their data workers, in order."""
    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        try:
            rank = process.environ().get("RANK")
            parent = process.parent()
            if rank is not None and parent is not None and "RANK" not in parent.environ():
                found[int(rank)] = process
        except psutil.Error:
            continue
    return [found[rank] for rank in sorted(found)]


def steps_of_attempt(run: Path, attempt: int) -> list[dict]:
    """Return the step events that one attempt has written so far."""
    current, steps = 0, []
    for event in read_events(run / "events.jsonl"):
        if event["event"] == "start":
            current = event["attempt"]
        elif event["event"] == "step" and current == attempt:
            steps.append(event)
    return steps


def kill_one(launcher: subprocess.Popen[bytes], run: Path, *, attempt: int, steps: int) -> float:
    """Kill a rank once an attempt has done so many steps; return when."""
    while len(steps_of_attempt(run, attempt)) < steps or len(ranks(launcher)) < 2:
        if launcher.poll() is not None:
            raise RuntimeError(f"the launcher ended with {launcher.returncode} before attempt {attempt} did its steps")
        time.sleep(0.02)
    random.choice(ranks(launcher)).kill()
    return time.time()


def import_seconds() -> float:
    """Return how long the imports take: the agent's, then those of two ranks at once."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", AGENT], check=True)
    both = [subprocess.Popen([sys.executable, "-c", RANK]) for _ in range(2)]
    if any(each.wait() for each in both):
        raise RuntimeError("the imports failed")
    return time.monotonic() - began


def same_end(run: Path, other: Path, step: int) -> bool:
    """Whether two runs ended with the same parameters and optimizer states, bit for bit."""
    name = f"checkpoints/step-{step:08d}"
    return not any(differences(Checkpoint(run / name), Checkpoint(other / name)))


def main() -> int:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "restart")
    options = parser.parse_args()
    random.seed(options.seed)
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    num_steps = 12 * options.kills + 20
    seconds: list[float] = []
    imports = [import_seconds() for _ in range(3)]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if start(root, "undisturbed", num_steps=num_steps, restarts=0).wait() != 0:
            raise RuntimeError((root / "undisturbed.txt").read_text())
        launcher = start(root, "killed", num_steps=num_steps, restarts=options.kills)
        for attempt in range(1, options.kills + 1):
            killed = kill_one(launcher, root / "killed", attempt=attempt, steps=random.randint(6, 10))
            while not (steps := steps_of_attempt(root / "killed", attempt + 1)):
                if launcher.poll() is not None:
                    raise RuntimeError((root / "killed.txt").read_text()[-4000:])
                time.sleep(0.02)
            seconds.append(steps[0]["time"] - killed)
        code = launcher.wait()
        imports += [import_seconds() for _ in range(3)]
        equal = code == 0 and same_end(root / "undisturbed", root / "killed", num_steps)
    return report(options.output, seconds=seconds, imports=imports, code=code, equal=equal)


def report(output: Path, *, seconds: list[float], imports: list[float], code: int, equal: bool) -> int:
    """Print the table and write it."""
    total, imported = statistics.median(seconds), statistics.median(imports)
    lines = [
        "| kills | clean | next step after (median, worst) | of which imports (median) | final state |",
        "|---|---|---|---|---|",
        f"| {len(seconds)} | {len(seconds) if code == 0 else 'the run failed'} | {total:.1f} s, {max(seconds):.1f} s | "
        f"{imported:.1f} s | {'bit for bit that of an undisturbed run' if equal else 'DIFFERS'} |",
    ]
    print("\n".join(lines))
    output.parent.mkdir(parents=True, exist_ok=True)
    machine = f"{os.cpu_count()} CPU cores, load {os.getloadavg()[1]:.1f}, Python {platform.python_version()}"
    output.with_suffix(".md").write_text("\n".join(["# Restarts after SIGKILL", "", machine, "", *lines, ""]))
    facts = {"machine": machine, "seconds": seconds, "imports_s": imports, "exit_code": code, "equal": equal}
    output.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
