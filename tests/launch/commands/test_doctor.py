"""``anemoi-dist doctor`` as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from anemoi_dist.config.compose import compose
from anemoi_dist.launch.commands import doctor
from anemoi_dist.launch.launchers import local
from anemoi_dist.preflight.machine import Finding
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.lock import Hold

CHECKS = {"versions", "devices", "disk", "clock", "host", "port", "owner"}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.locate(tmp_path, "r")
    run.create()
    return run


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose name resolves, as that of a test machine need not."""
    monkeypatch.setattr(doctor, "check_host", lambda: Finding("host", "ok", "n is 10.0.0.1"))


def examine(run: RunDirectory, *overrides: str, **options: bool) -> int:
    config = compose([f"run.root={run.path.parent}", "run.id=r", *overrides]).config
    return doctor.run_doctor(config, nodes=options.get("nodes", False), as_json=options.get("as_json", False))


def test_a_healthy_machine(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert examine(run) == 0
    assert {line.split()[1] for line in capsys.readouterr().out.splitlines()} == CHECKS
    assert examine(run, as_json=True) == 0
    assert {entry["check"] for entry in json.loads(capsys.readouterr().out)} == CHECKS


def test_what_fails_is_last_and_the_code_is_3(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    hold = Hold(run, run.launch_lock_file)
    assert examine(run) == 3
    hold.release()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("failed  owner") and "; fix: wait for it" in last


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_slurm_is_asked_and_the_nodes_are_left_to_the_job(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))

    def found() -> dict[str, str]:
        examine(run, "launcher=slurm", nodes=True, as_json=True)
        return {entry["check"]: f"{entry['level']}: {entry['text']}" for entry in json.loads(capsys.readouterr().out)}

    assert found()["slurm"] == "failed: there is no sbatch on this machine"
    program(tools, "sbatch", "exit 0")
    program(tools, "scontrol", "echo 'Slurmctld(primary) at head is UP'")
    assert found()["slurm"] == "ok: Slurmctld(primary) at head is UP"
    assert "only this machine was checked" in found()["nodes"] and "ranks" not in found()
    program(tools, "scontrol", "echo 'Slurmctld(primary) at head is DOWN'; exit 1")
    assert found()["slurm"].startswith("failed: Slurmctld(primary) at head is DOWN")


def save(run: RunDirectory, step: int, size: int) -> None:
    folder = run.checkpoints_dir / f"step-{step:08d}"
    folder.mkdir()
    (folder / "rank-00000.safetensors").write_bytes(bytes(size))


def test_the_space_that_checkpoints_still_need(run: RunDirectory) -> None:
    config = compose(["run.id=r", "checkpoint.keep_last=3"]).config
    assert doctor.space_needed(run, config) == 0  # nothing is known of a new run
    run.events_file.write_text('{"event":"start","step":0,"num_parameters":1000}\n')
    assert doctor.space_needed(run, config) == 4 * 16_000
    save(run, 10, 500)
    save(run, 20, 700)
    assert doctor.space_needed(run, config) == 2 * 700
    config.checkpoint.keep_last = None
    assert doctor.space_needed(run, config) == 700
    config.checkpoint.url = "s3://bucket/runs"
    assert doctor.space_needed(run, config) == 0


def test_the_command_that_starts_the_probe(run: RunDirectory) -> None:
    command = doctor.nodes_command(run, 4, needed_bytes=7, timeout_s=90.0)
    train = local.torchrun_command(run, 4)
    shared = train.index("anemoi_dist.train")
    assert command[:shared] == train[:shared]
    root = str(run.path.parent)
    rest = ["anemoi_dist.preflight.ranks", "--run-root", root, "--needed-bytes", "7", "--timeout", "90", "--json"]
    assert command[shared:] == rest


def test_findings_are_read_from_whatever_ranks_print() -> None:
    found = [Finding("disk", "failed", "full", "make room")]
    output = f"[W1122] Warning\n[]\n{json.dumps([finding.as_dict() for finding in found])}\nbye"
    assert doctor.parse_findings(output) == found
    assert doctor.parse_findings("Traceback") == []


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "anemoi_dist.launch.cli", "doctor", *arguments],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        timeout=240,
        check=False,
    )


def test_ranks_look_at_each_other(tmp_path: Path) -> None:
    done = command("--nodes", "--json", f"run.root={tmp_path}", "run.id=r", "launcher.ranks=2")
    findings = [Finding(**entry) for entry in json.loads(done.stdout.splitlines()[-1])]
    checks = [finding.check for finding in findings]
    assert CHECKS | {"ranks", "collectives"} == set(checks) and checks.count("disk") == 1
    expected = 3 if any(finding.level == "failed" for finding in findings) else 0
    assert done.returncode == expected, done.stderr
    # On a busy machine a rank may be slow, and a test machine's name need not resolve; nothing else is wrong.
    assert {finding.check for finding in findings if finding.level != "ok"} <= {"ranks", "host"}
    assert list(tmp_path.iterdir()) == []


def test_a_probe_that_ends_without_a_word_is_a_finding(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "nodes_command", lambda *_, **__: [sys.executable, "-c", "raise SystemExit(9)"])
    config = compose([f"run.root={run.path.parent}", "run.id=r"]).config
    [found] = doctor.check_ranks(run, config, needed_bytes=0)
    assert found.level == "failed" and "code 9" in found.text


def test_the_command_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from anemoi_dist.launch import cli; "
        f"cli.main(['doctor', 'run.root={tmp_path}']); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
