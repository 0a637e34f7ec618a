"""Each thing that can be wrong with a machine is provoked, and found with its fix."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from anemoi_dist.preflight import machine
from anemoi_dist.preflight.machine import (
    Finding,
    RankReport,
    check_disk,
    check_file_clock,
    check_host,
    check_owner,
    check_port,
    check_versions,
    compare_nodes,
    find_slow_ranks,
    format_findings,
)
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.lock import Hold, Holder
from anemoi_dist.run.versions import installed_versions

MIB = 2**20


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.locate(tmp_path, "r")
    run.create()
    return run


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_line_has_what_was_found_and_its_fix() -> None:
    findings = [Finding("disk", "failed", "full", "make room"), Finding("host", "ok", "n1 is 10.0.0.1")]
    assert format_findings(findings).splitlines() == [
        "ok      host        n1 is 10.0.0.1",
        "failed  disk        full; fix: make room",
    ]


def test_what_is_not_installed() -> None:
    assert check_versions(installed_versions(*machine.PACKAGES)).level == "ok"
    found = check_versions({"python": "3.11", "anemoi-dist": "0.1"})
    assert found.level == "failed" and "torch, deepspeed" in found.text and "pip install" in found.fix


def test_a_disk_with_room(tmp_path: Path) -> None:
    found = check_disk(tmp_path / "not" / "there yet", trial_bytes=4 * MIB)
    assert found.level == "ok" and "/s written" in found.text and "free" in found.text
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written() -> None:
    found = check_disk(Path("/proc/runs"))
    assert found.level == "failed" and "/proc cannot be written" in found.text and "run.root" in found.fix


def test_a_disk_that_is_full(tmpfs: Path) -> None:
    found = check_disk(tmpfs, trial_bytes=4 * MIB)
    assert found.level == "failed" and "No space left" in found.text
    assert list(tmpfs.iterdir()) == []


def test_a_disk_too_small_for_the_checkpoints(tmp_path: Path) -> None:
    found = check_disk(tmp_path, needed_bytes=2**60, trial_bytes=MIB)
    assert found.level == "failed" and "1048576.0 TiB needed" in found.text and "checkpoint.keep_last" in found.fix


def test_a_clock_that_is_off(tmp_path: Path) -> None:
    good = check_file_clock(tmp_path / "runs")
    assert good is not None and good.level == "ok"
    bad = check_file_clock(tmp_path, clock=lambda: time.time() + 30)
    assert bad is not None and bad.level == "failed" and "+30.0 s off" in bad.text and "chrony" in bad.fix
    assert check_file_clock(Path("/proc/runs")) is None


def test_a_host_name_that_does_not_resolve() -> None:
    assert check_host("localhost").level == "ok"
    found = check_host("no-such-host.invalid")
    assert found.level == "failed" and "no-such-host.invalid does not resolve" in found.text
    assert "/etc/hosts" in found.fix


def test_a_port_that_cannot_be_bound() -> None:
    assert check_port().level == check_port("127.0.0.1").level == "ok"
    found = check_port("192.0.2.1")  # an address of nobody's, RFC 5737
    assert found.level == "failed" and "192.0.2.1" in found.text


def test_who_holds_a_run(run: RunDirectory) -> None:
    assert check_owner(run).level == "ok"
    hold = Hold(run, run.launch_lock_file)
    held = check_owner(run)
    assert held.level == "failed" and f"held by process {os.getpid()} on " in held.text
    assert "anemoi-dist stop r" in held.fix
    hold.release()
    assert check_owner(run).level == "ok"


def test_a_lock_that_a_dead_process_left(run: RunDirectory) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    dead = Holder(host=socket.gethostname(), pid=process.pid, started=1)
    run.lock_file.write_text(json.dumps(asdict(dead)))
    found = check_owner(run)
    assert found.level == "warning" and "stale lock lock" in found.text and "takes it over" in found.fix


def test_a_holder_on_another_host_lives_by_its_touch_or_its_lock(run: RunDirectory) -> None:
    path = run.launch_lock_file
    path.write_text(json.dumps(asdict(Holder(host="elsewhere", pid=1, started=1))))
    assert check_owner(run).level == "failed"
    old = time.time() - 3600
    os.utime(path, (old, old))
    assert check_owner(run).level == "warning"
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert check_owner(run).level == "failed"


def report(rank: int, **more: Any) -> RankReport:
    content = {
        "rank": rank,
        "host": f"node{rank // 2}",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "device": "H100",
        "visible_devices": 2,
        "clock": 1000.0 + rank / 1000,
        "work_s": 0.1,
        "link_s": [0.2, 0.2],
        **more,
    }
    return RankReport(**content)


def levels(*reports: RankReport) -> dict[str, str]:
    return {finding.check: finding.level for finding in compare_nodes(reports)}


def test_nodes_that_are_alike() -> None:
    found = compare_nodes([report(rank) for rank in range(4)])
    assert {finding.level for finding in found} == {"ok"}
    assert [finding.check for finding in found] == ["versions", "clock", "devices"]
    assert "H100 (2 visible) on node0, node1" in found[-1].text


def test_versions_that_differ_or_are_missing() -> None:
    [found] = [
        finding
        for finding in compare_nodes([report(0), report(2, versions={"python": "3.11.7", "torch": "2.12.0"})])
        if finding.check == "versions"
    ]
    assert found.level == "failed" and found.text == "torch differs: 2.13.0 on node0, 2.12.0 on node1"
    assert levels(report(0), report(2, versions={"python": "3.11.7"}))["versions"] == "failed"


def test_the_clock_that_is_off_is_named() -> None:
    reports = [report(0), report(2), report(4), report(6, clock=1003.5)]
    [found] = [finding for finding in compare_nodes(reports) if finding.check == "clock"]
    assert found.level == "failed" and "node3 is +3.5 s off" in found.text and "node3" in found.fix


def test_devices_that_differ() -> None:
    assert levels(report(0), report(2, visible_devices=1))["devices"] == "failed"
    assert levels(report(0), report(2, device="cpu", visible_devices=0))["devices"] == "failed"


def test_the_slow_rank_is_named() -> None:
    fine = [report(rank) for rank in range(4)]
    assert [finding.level for finding in find_slow_ranks(fine)] == ["ok"]
    # Each of its neighbours has another link, which is not slow.
    links = {0: [0.2, 1.5], 1: [0.2, 0.2], 2: [0.2, 1.4], 3: [1.4, 1.5]}
    [found] = find_slow_ranks([report(rank, link_s=seconds) for rank, seconds in links.items()])
    assert found.level == "failed" and "rank 3 on node1 exchanges data 7.0 times slower" in found.text
    [busy] = find_slow_ranks([*fine[:3], report(3, work_s=0.3)])
    assert busy.level == "warning" and "rank 3 on node1 computes 3.0 times slower" in busy.text


def test_of_two_ranks_with_one_link_only_work_tells() -> None:
    assert [f.level for f in find_slow_ranks([report(0, link_s=[9.0]), report(1, link_s=[0.1])])] == ["ok"]
    assert [f.level for f in find_slow_ranks([report(0), report(1, work_s=0.9)])] == ["failed"]
    assert [f.level for f in find_slow_ranks([report(0, link_s=[])])] == ["ok"]
