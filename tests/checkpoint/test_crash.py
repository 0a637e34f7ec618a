"""Saves that are killed, or refused by the disk, at every one of their system calls; runs whose ranks are killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run_script(module: str, *arguments: object) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        timeout=5400,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (apt-get install strace)")
def test_after_a_fault_at_any_call_there_is_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    outcome = run_script("support.crashing", tmp_path)
    print(f"{outcome['points']} points tried: {outcome['calls']}; {outcome['results']}")
    assert outcome["problems"] == []
    calls = outcome["calls"]
    assert calls["write"] >= 6 and calls["fsync"] >= 5 and calls["rename"] == 2 and calls["mkdir"] == 1
    assert outcome["points"] == 3 * sum(calls.values())
    for fault in ("SIGKILL", "ENOSPC", "EIO"):
        assert outcome["results"][f"{fault} old"] and outcome["results"][f"{fault} new"]


@pytest.mark.slow
def test_ranks_killed_at_random_leave_what_was_saved_and_other_ranks_go_on(tmp_path: Path) -> None:
    outcome = run_script("support.killing", tmp_path, 0, 24)
    print(outcome)
    assert outcome["problems"] == []
    assert outcome["seeds"] == outcome["done"] == 24 and outcome["killed"] >= 24
