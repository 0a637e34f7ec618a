"""A save that is killed, or refused by the disk, at every one of its system calls."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (apt-get install strace)")
def test_after_a_fault_at_any_call_there_is_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "support.crashing", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        timeout=900,
        check=True,
    )
    outcome = json.loads(done.stdout)
    print(f"{outcome['points']} points tried: {outcome['calls']}; {outcome['results']}")
    assert outcome["problems"] == []
    calls = outcome["calls"]
    assert calls["write"] >= 6 and calls["fsync"] >= 5 and calls["rename"] == 2 and calls["mkdir"] == 1
    assert outcome["points"] == 3 * sum(calls.values())
    for fault in ("SIGKILL", "ENOSPC", "EIO"):
        assert outcome["results"][f"{fault} old"] and outcome["results"][f"{fault} new"]
