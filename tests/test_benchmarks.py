"""The benchmarks run: small, with few rounds, to the table and the plot."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="the stream needs a C compiler")
def test_optimizer_step(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "optimizer_step.py"), "--numel", "60000", "--rounds", "2"]
    command += ["--threads", "1", "--shapes", "tensors", "--output", str(tmp_path / "out" / "result")]
    subprocess.run([*command, "--plot", str(tmp_path / "plot.svg")], check=True, timeout=300)
    results = json.loads((tmp_path / "out" / "result.json").read_text())["results"]["tensors-1"]
    measured = {name for name, result in results.items() if "missing" not in result}
    assert {"AdEMAMix, Apple's loop (reimplemented)", "AdamW, torch fused"} <= measured
    assert all(results[name]["ratio"] > 0 for name in measured)
    table = (tmp_path / "out" / "result.md").read_text()
    assert "0.06M in 300 tensors, 1 thread" in table and "AdEMAMix, this package: eager |" in table
    assert "AdamW, torch fused" in (tmp_path / "plot.svg").read_text()


@pytest.mark.slow
def test_twenty_killed_ranks(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "restart.py"), "--kills", "20"]
    subprocess.run([*command, "--output", str(tmp_path / "result")], check=True, timeout=1500)
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["equal"] and found["exit_code"] == 0 and len(found["seconds"]) == 20
