"""AdEMAMix beside AdamW on the default job: the same steps, three seeds, each with its own best rate from one grid.

    python benchmarks/ademamix_vs_adamw.py

The rate is chosen on the validation block with the first seed; the test block is only reported. Runs go through
``anemoi-dist train`` on one rank each, as many at a time as there are cores, and continue where they were interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from anemoi_dist.run.events import latest_by_step, read_events

RESULTS = Path(__file__).parent / "results"
OPTIMIZERS = {
    "AdEMAMix": ("training/optimizer=ademamix",),
    "AdamW": ("training/optimizer=adamw",),
}
RATES = (2e-3, 4e-3, 6e-3, 1e-2)


@dataclass(frozen=True)
class Job:
    """One training run."""

    optimizer: str
    rate: float
    seed: int

    @property
    def run_id(self) -> str:
        """Name of the run's directory."""
        return f"{self.optimizer.lower()}-{self.rate:g}-seed{self.seed}"


def train(job: Job, *, root: Path, overrides: list[str]) -> Path:
    """Train, or continue, one run and return its directory."""
    command = [sys.executable, "-m", "anemoi_dist.launch.cli", "train", *OPTIMIZERS[job.optimizer], *overrides]
    command += [f"training.lr.rate={job.rate}", f"run.seed={job.seed}", f"run.root={root}", f"run.id={job.run_id}"]
    command += ["engine=ddp", "launcher.ranks=1", "validation.interval_steps=null"]
    log = root / f"{job.run_id}.log"
    with log.open("w") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False)
    # 5 is divergence, a result like any other for a rate that is too high.
    if done.returncode not in (0, 5):
        raise SystemExit(f"{job.run_id} ended with {done.returncode}; see {log}")
    print(f"{job.run_id}: {score(root / job.run_id, 'validation')}", flush=True)
    return root / job.run_id


def score(run: Path, split: str) -> dict[int, float]:
    """Return the model's last RMSE on a block, by lead time in hours; empty where it diverged."""
    events = latest_by_step(read_events(run / "events.jsonl"), "validation", split=split)
    if not events:
        return {}
    scores = events[max(events)]["scores"]
    return {s["lead_s"] // 3600: s["rmse"] for s in scores if s["forecast"] == "model" and s["rmse"] is not None}


def best_rate(optimizer: str, *, root: Path, seed: int) -> float:
    """Return the rate with the lowest first-lead RMSE on the validation block."""

    def rmse(rate: float) -> float:
        scores = score(root / Job(optimizer, rate, seed).run_id, "validation")
        return scores[min(scores)] if scores else float("inf")

    return min(RATES, key=rmse)


def run_all(jobs: Iterable[Job], *, root: Path, overrides: list[str], num_parallel: int) -> None:
    """Train all jobs, a few at a time."""
    with ThreadPoolExecutor(num_parallel) as pool:
        list(pool.map(lambda job: train(job, root=root, overrides=overrides), jobs))


def table(rates: dict[str, float], *, root: Path, seeds: list[int]) -> tuple[str, dict[str, object]]:
    """Return the result as Markdown and as data."""
    lines, data = [], {}
    leads: list[int] = []
    for optimizer, rate in rates.items():
        runs = {seed: root / Job(optimizer, rate, seed).run_id for seed in seeds}
        by_split = {s: {seed: score(run, s) for seed, run in runs.items()} for s in ("validation", "test")}
        leads = leads or sorted(by_split["test"][seeds[0]])
        data[optimizer] = {
            "rate": rate,
            "grid": {f"{r:g}": score(root / Job(optimizer, r, seeds[0]).run_id, "validation") for r in RATES},
            **by_split,
        }
        cells = []
        for lead in leads:
            values = [by_split["test"][seed][lead] for seed in seeds]
            cells.append(f"{statistics.mean(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})")
        lines.append(f"| {optimizer} | {rate:g} | " + " | ".join(cells) + " |")
    head = "| optimizer | rate | " + " | ".join(f"{lead} h, Pa" for lead in leads) + " |"
    return "\n".join([head, "|" + "---|" * (2 + len(leads)), *lines]), data


def main() -> None:
    """Run the comparison and write ``results/ademamix_vs_adamw.{md,json}``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/ademamix_vs_adamw"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=max(1, len(os.sched_getaffinity(0))))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    arguments.root.mkdir(parents=True, exist_ok=True)
    root, seeds = arguments.root.absolute(), arguments.seeds
    options = {"root": root, "overrides": arguments.overrides, "num_parallel": arguments.parallel}

    run_all((Job(o, rate, seeds[0]) for rate in RATES for o in OPTIMIZERS), **options)
    rates = {optimizer: best_rate(optimizer, root=root, seed=seeds[0]) for optimizer in OPTIMIZERS}
    run_all((Job(o, rate, seed) for seed in seeds[1:] for o, rate in rates.items()), **options)

    text, data = table(rates, root=root, seeds=seeds)
    start = next(e for e in read_events(root / Job("AdamW", rates["AdamW"], seeds[0]).run_id / "events.jsonl"))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, one rank and one thread a run"
    RESULTS.mkdir(exist_ok=True)
    heading = (
        "# AdEMAMix beside AdamW on the default job\n\n"
        "RMSE of mean sea level pressure on the test block, mean over seeds (and each seed). The rate was chosen on "
        f"the validation block with seed {seeds[0]} from {', '.join(f'{r:g}' for r in RATES)}.\n"
        f"{machine}; torch {start['versions']['torch']}; "
        f"{' '.join(arguments.overrides) or 'default configuration'}.\n\n"
    )
    edges = [o for o, rate in rates.items() if rate in (min(RATES), max(RATES))]
    if edges:
        text += f"\n\nThe best rate of {' and '.join(edges)} lies at the edge of the grid."
    (RESULTS / "ademamix_vs_adamw.md").write_text(heading + text + "\n")
    (RESULTS / "ademamix_vs_adamw.json").write_text(json.dumps(data, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
