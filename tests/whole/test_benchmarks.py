"""The benchmarks run: small, with few rounds, to the table and the plot."""

import importlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="the stream needs a C compiler")
def test_optimizer_step(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "optimizer_step.py"), "--numel", "60000", "--rounds", "2"]
    command += ["--threads", "1", "--shapes", "tensors", "--output", str(tmp_path / "out" / "result")]
    subprocess.run([*command, "--plot", str(tmp_path / "plot.svg")], check=True, timeout=300)
    results = json.loads((tmp_path / "out" / "result.json").read_text())["results"]["tensors-1"]
    measured = {name for name, result in results.items() if "missing" not in result}
    assert {
        "AdEMAMix, Apple's loop (reimplemented)",
        "AdamW, torch fused",
        "AdEMAMix, this package: c, bf16 states",
    } <= measured
    assert all(results[name]["ratio"] > 0 for name in measured)
    table = (tmp_path / "out" / "result.md").read_text()
    assert "0.06M in 300 tensors, 1 thread" in table and "AdEMAMix, this package: eager |" in table
    assert "AdamW, torch fused" in (tmp_path / "plot.svg").read_text()


@pytest.fixture
def gpu_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_optimizer_step")


def test_optimizer_step_on_a_gpu_says_what_it_needs(gpu_benchmark, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_optimizer_step.py"])
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        gpu_benchmark.main()
    monkeypatch.setattr(sys, "argv", ["gpu_optimizer_step.py", "--rounds", "1"])
    with pytest.raises(SystemExit, match="2"):
        gpu_benchmark.main()


def test_optimizer_step_on_a_gpu_goes_on_without_what_can_not_be_had(gpu_benchmark, monkeypatch):
    """On a CPU, where Triton and graphs are what can't be had."""

    def seconds(function, repeat):
        begin = time.perf_counter()
        for _ in range(repeat):
            function()
        return (time.perf_counter() - begin) / repeat

    monkeypatch.setattr(gpu_benchmark, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_benchmark, "seconds", seconds)
    results = {"60 elements": gpu_benchmark.measure("flat", numel=60, rounds=2)}
    measured = {name for name, result in results["60 elements"].items() if "ratio" in result}
    assert {"AdEMAMix, this package: auto", "AdEMAMix, Apple's loop (reimplemented)", "AdamW, torch fused"} <= measured
    assert "works on CUDA" in results["60 elements"]["AdEMAMix, this package: triton"]["missing"]
    machine = {"gpu": "no GPU", "versions": {"torch": "2"}}
    table = gpu_benchmark.report({"machine": machine, "rounds": 2, "results": results})
    assert "| AdEMAMix, this package: triton | - |" in table and "no GPU; torch 2." in table


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="the stream needs a C compiler")
def test_engine_step(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "engine_step.py"), "--numel", "100000", "--rounds", "2"]
    command += ["--engines", "zero2", "fsdp2", "DeepSpeed stage 2, its own step", "--output", str(tmp_path / "result")]
    subprocess.run(command, check=True, timeout=300)
    results = json.loads((tmp_path / "result.json").read_text())["results"]
    assert len(results) == 6 and all(result["step"]["ratio"] > 0 for result in results.values())
    table = (tmp_path / "result.md").read_text()
    assert "| zero2 | bf16 |" in table and "| DeepSpeed stage 2, its own step | fp32 |" in table


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs a network namespace")
def test_overlap(tmp_path):
    if subprocess.run(["unshare", "--map-root-user", "--net", "true"], capture_output=True).returncode:
        pytest.skip("network namespaces are not allowed here")
    command = [sys.executable, str(ROOT / "benchmarks" / "overlap.py"), "--numel", "5000000", "--rounds", "3"]
    command += ["--rates", "full speed", "--output", str(tmp_path / "result")]
    subprocess.run(command, check=True, timeout=300)
    results = json.loads((tmp_path / "result.json").read_text())["results"]
    assert list(results) == ["zero2:full speed", "fsdp2:full speed"]
    for result in results.values():
        sent = result["bytes_sent"]
        assert sent["with"] == pytest.approx(sent["without"], rel=0.05)
    sent = results["zero2:full speed"]["bytes_sent"]["without"]
    assert sent == pytest.approx(3 * 4 * 5_000_000, rel=0.05), "an all-reduce of the gradients, and each rank's half"


@pytest.mark.slow
def test_five_killed_ranks(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "restart.py"), "--kills", "5"]
    subprocess.run([*command, "--output", str(tmp_path / "result")], check=True, timeout=1500)
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["equal"] and found["exit_code"] == 0 and len(found["seconds"]) == 5
