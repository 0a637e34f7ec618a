"""Text between ranks, seeds, and workers that do not outlive their parent."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import jobs
from support.waiting import is_alive, wait_until

from anemoi_dist.distributed.world import seed_step


def test_text_travels_between_ranks(ranks) -> None:
    results = ranks(2).run(jobs.exchange_text)
    assert [r[0] for r in results] == ["é" * 1000] * 2
    assert [r[1] for r in results] == [["", "x"], []]
    assert [r[2] for r in results] == ["", ""]


def test_seed_is_a_function_of_seed_step_and_rank() -> None:
    def draw(seed: int, step: int, rank: int) -> float:
        seed_step(seed, step=step, rank=rank)
        return torch.rand(()).item()

    assert draw(0, 5, 1) == draw(0, 5, 1)
    assert len({draw(0, 5, 1), draw(1, 5, 1), draw(0, 6, 1), draw(0, 5, 0), draw(0, 1, 5)}) == 5


def test_a_worker_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    child = (
        "import sys, time; from pathlib import Path\n"
        "from anemoi_dist.process.parent_death import die_with_parent as die; die();"
        f"import os; Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"]
    )
    assert wait_until(lambda: ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) or parent.poll())
    pid = int((tmp_path / "pid").read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert wait_until(lambda: not is_alive(pid)), "the worker is still there"
    assert os.getpid() != pid


def test_a_parent_that_has_gone_already_is_noticed() -> None:
    code = (
        "import os; from anemoi_dist.process import parent_death as p; p.die_with_parent(parent_pid=os.getppid() + 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL


def test_ranks_that_cannot_meet_are_a_preflight_error() -> None:
    code = "from anemoi_dist.distributed.world import World; World.join()"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
    environment |= {"RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "PreflightError: rank 0 of 1 cannot join the others" in done.stderr and "MASTER_ADDR" in done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no such setting")
def test_a_rank_without_a_gpu_keeps_the_memory_that_it_frees() -> None:
    script = """
import resource, torch
from anemoi_dist.distributed.world import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(25_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = faults()
assert keep_freed_memory()
faults()
print(given_back, faults())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 1000 and kept < given_back / 100, (given_back, kept)
