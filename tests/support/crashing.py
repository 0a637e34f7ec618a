"""Saves that meet a fault at each of their system calls in turn, by ``strace -e inject``; a script of its own.

    python -m support.crashing FOLDER

One warm process forks a child for each fault, so that a point costs a fraction of a second. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch

from anemoi_dist.checkpoint.saver import Outcome, Saver
from anemoi_dist.checkpoint.select import select
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.config.schema import CheckpointConfig
from support.saving import ORIGIN, SingleRank, read_all, save_values, shard
from support.waiting import PATIENCE_S

#: Those that this kernel knows; strace passes over the others.
CALLS = ("write", "pwrite64", "fsync", "fdatasync", "rename", "renameat", "renameat2")
CALLS += ("mkdir", "mkdirat", "unlink", "unlinkat", "rmdir")
FAULTS = {"SIGKILL": "signal=KILL", "ENOSPC": "error=ENOSPC", "EIO": "error=EIO"}
OLD, NEW = 10, 20
SAVED, FAILED = 0, 3


def values(step: int) -> torch.Tensor:
    return torch.arange(2_500_000, dtype=torch.float32) + step  # three blocks


def save_new(folder: Path) -> int:
    """Save as the trainer does, with the thread; return what was reported."""
    outcomes: list[Outcome] = []
    saver = Saver(
        LocalStore(folder),
        world=SingleRank(),
        config=CheckpointConfig(keep_last=1),
        origin=ORIGIN,
        report=outcomes.append,
    )
    shards = [shard(values(NEW)), shard(torch.tensor([float(NEW)]), kind="step")]
    saver.prepare(shards)
    saver.save(NEW, lambda: shards, samples_seen=0, trainer={"progress": {"step": NEW}})
    while not outcomes:
        saver.advance(saver.word(stop=0, save_due=False))
        time.sleep(0.001)
    return FAILED if outcomes[0].error else SAVED


def run_traced(folder: Path, log: Path, *inject: str) -> int:
    """Fork a child that saves into ``folder`` under strace; return its wait status."""
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        code = 70
        try:
            code = save_new(folder)
        finally:
            os._exit(code)
    os.waitpid(child, os.WUNTRACED)
    trace = ",".join(f"?{name}" for name in CALLS)
    command = ["strace", "-f", "-qq", "-p", str(child), "-e", f"trace={trace}", "-e", "signal=none", "-o", str(log)]
    tracer = subprocess.Popen([*command, *inject], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE_S
    try:
        while "TracerPid:\t0\n" in Path(f"/proc/{child}/status").read_text():
            if tracer.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"strace does not attach: {tracer.communicate()[1]}")
            time.sleep(0.001)
        os.kill(child, signal.SIGCONT)
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status
            if time.monotonic() > deadline:
                raise SystemExit(f"the save hangs with {inject}")
            time.sleep(0.001)
    finally:
        with_child = Path(f"/proc/{child}").exists()
        if with_child:
            os.kill(child, signal.SIGKILL)
        tracer.wait()
        tracer.stderr.close()


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save_values(LocalStore(folder), step=OLD, values=values(OLD))
    return folder


def points(folder: Path, log: Path) -> list[tuple[str, int]]:
    """Return (system call, n-th) of everything that an undisturbed save does."""
    if run_traced(fresh(folder), log) != SAVED:
        raise SystemExit("the undisturbed save fails")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for line in log.read_text().splitlines():
        if match := re.match(r"(\d+)\s+(\w+)\(", line):
            counts[match[2]][match[1]] += 1
    for call, threads in counts.items():  # strace counts each thread's calls by themselves
        if len(threads) > 1:
            raise SystemExit(f"{call} is called in {len(threads)} threads: some calls would not be reached")
    return [(call, n) for call, threads in sorted(counts.items()) for n in range(1, max(threads.values()) + 1)]


def check(folder: Path, status: int) -> str:
    """Return what is left, ``old`` or ``new``, after making sure that it is exactly that and that life goes on."""
    store = LocalStore(folder)
    checkpoint = select(store, world=SingleRank()).checkpoint
    assert checkpoint is not None, "no checkpoint is left"
    step = checkpoint.manifest.step
    assert step in (OLD, NEW) and torch.equal(read_all(checkpoint), values(step)), f"step {step} is not what was saved"
    assert checkpoint.trainer() == {"progress": {"step": step}}
    checkpoint.close()
    if os.WIFEXITED(status):
        code = os.WEXITSTATUS(status)
        assert code in (SAVED, FAILED), f"the save ended with {code}"
        assert step == NEW or code == FAILED, "a save that was reported is not there"
    save_values(store, step=30, values=values(30))
    after = select(store, world=SingleRank(), strict=True).checkpoint
    assert after is not None and torch.equal(read_all(after), values(30)), "training does not go on"
    after.close()
    left = [path.name for path in folder.iterdir() if not re.fullmatch(r"step-\d{8}", path.name)]
    assert not left, f"left behind: {left}"
    return "old" if step == OLD else "new"


def main(root: Path) -> None:
    folder, log = root / "checkpoints", root / "strace.log"
    results: Counter[str] = Counter()
    problems = []
    todo = points(folder, log)
    for call, n in todo:
        for fault, inject in FAULTS.items():
            status = run_traced(fresh(folder), log, "-e", f"inject={call}:{inject}:when={n}")
            try:
                if fault == "SIGKILL":
                    assert os.WIFSIGNALED(status), "the kill did not come"
                results[f"{fault} {check(folder, status)}"] += 1
            except Exception as error:
                problems.append(f"{fault} at {call} {n}: {error}")
    num_calls = dict(Counter(call for call, _ in todo))
    print(json.dumps({"points": sum(results.values()), "calls": num_calls, "results": results, "problems": problems}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
