"""What ranks find out together, on real gloo ranks, with what is wrong injected at the seams."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.forked import run_ranks
from support.ranks import RankPool

from anemoi_dist.distributed.world import World
from anemoi_dist.errors import PreflightError
from anemoi_dist.preflight import ranks as rank_checks
from anemoi_dist.preflight.machine import RankReport, compare_nodes, find_slow_ranks
from anemoi_dist.preflight.ranks import RankChecks, _neighbours, combine


class Place:
    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9])
def test_partners_are_mutual_and_every_rank_has_two(size: int) -> None:
    partners = [_neighbours(Place(rank, size)) for rank in range(size)]  # type: ignore[arg-type]
    assert [len(each) for each in partners] == [min(size - 1, 2)] * size
    # Ranks do their exchanges in this order: simulate it, and nobody may wait for ever.
    todo = [list(each) for each in partners]
    while any(todo):
        pairs = [(a, b) for a, b in itertools.combinations(range(size), 2) if todo[a][:1] == [b] and todo[b][:1] == [a]]
        assert pairs, f"stuck with {todo}"
        for a, b in pairs:
            todo[a].pop(0)
            todo[b].pop(0)


def faulty_report(world: World, fault: str) -> RankReport:
    is_bad = world.rank == 2

    # Done, and not timed: on a busy machine ranks differ by more than a fault makes.
    def exchange(world: World, peer: int) -> float:
        rank_checks._exchange(world, peer)
        return 1.0 if 2 in (world.rank, peer) and fault == "link" else 0.01

    def work(device: Any) -> float:
        rank_checks._work(device)
        return 1.0 if is_bad and fault == "work" else 0.01

    return rank_checks.measure_rank(
        world,
        exchange=exchange,
        work=work,
        clock=lambda: time.time() + (5.0 if is_bad and fault == "clock" else 0.0),
        found=lambda: {"torch": "2.12.0" if is_bad and fault == "versions" else "2.13.0"},
    )


@pytest.mark.parametrize(
    ("fault", "check", "said"),
    [
        ("link", "ranks", "rank 2 on "),
        ("work", "ranks", "rank 2 on "),
        ("clock", "clock", "+5.0 s off"),
        ("versions", "versions", "torch differs: 2.13.0 on "),
    ],
)
def test_what_is_wrong_with_one_rank_is_found(
    ranks: Callable[[int], RankPool], fault: str, check: str, said: str
) -> None:
    reports = ranks(4).run(faulty_report, fault)
    if fault == "clock":  # ranks of one machine have one clock
        reports = [replace(report, host=f"node{report.rank}") for report in reports]
    failed = [
        f for f in [*compare_nodes(reports), *find_slow_ranks(reports)] if f.level == "failed" and f.check == check
    ]
    assert any(said in finding.text for finding in failed), failed
    if fault == "link":
        assert len(failed) == 1 and "exchanges data" in failed[0].text


def reduce(world: World, spoil: bool) -> tuple[dict[int, float], bool]:
    if spoil and world.rank == 1:
        world = World.__new__(World)
        world.rank, world.world_size, world.device = 0, 2, probe_device()
    return rank_checks.all_reduce_seconds(world)


def probe_device() -> Any:
    import torch

    return torch.device("cpu")


def test_sums_are_checked(ranks: Callable[[int], RankPool]) -> None:
    for seconds, is_right in ranks(2).run(reduce, False):
        assert is_right and seconds.keys() == set(rank_checks.SIZES["cpu"]) and min(seconds.values()) > 0
    assert [is_right for _, is_right in ranks(2).run(reduce, True)] == [False, False]


def inspected(world: World, root: str) -> str:
    try:
        rank_checks.run_preflight(world, Path(root))
    except PreflightError as error:
        return str(error)
    return ""


def test_ranks_that_cannot_train_together_do_not_begin(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    assert ranks(2).run(inspected, str(tmp_path)) == ["", ""]
    for said in ranks(2).run(inspected, "/proc/runs"):
        assert "/proc/runs" in said and "failed" in said and "ok" not in said


def test_wrong_sums_and_disks_apart_are_findings() -> None:
    each = {
        "versions": {},
        "device": "cpu",
        "visible_devices": 0,
        "clock": 1.0,
        "work_s": 0.1,
        "link_s": [],
    }
    checks = [
        RankChecks(RankReport(0, host="a", **each), [], sees_run_root=True, has_right_sums=False),
        RankChecks(RankReport(1, host="b", **each), [], sees_run_root=False, has_right_sums=True),
    ]
    failed = {finding.check: finding for finding in combine(checks) if finding.level == "failed"}
    assert failed.keys() == {"disk", "collectives"}
    assert "b do not see" in failed["disk"].text and "ranks [0]" in failed["collectives"].text


def test_alone_it_prints_lines_and_its_code_says_what_it_found(tmp_path: Path) -> None:
    root = tmp_path / "there" / "runs"
    root.parent.mkdir()
    command = [sys.executable, "-m", "anemoi_dist.preflight.ranks", "--run-root", str(root)]
    good = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert good.returncode == 0, good.stderr
    assert "all-reduce over 1 ranks" in good.stdout and list(root.parent.iterdir()) == []
    arguments = ["--run-root", "/proc/runs"]
    bad = run_ranks("anemoi_dist.preflight.ranks", arguments, num_ranks=1, output=tmp_path / "bad")
    assert bad.codes == [3] and "failed  disk" in bad.output.splitlines()[-1]


def test_a_rank_that_never_comes_does_not_hold_up_the_others_for_long(tmp_path: Path) -> None:
    arguments = ["--run-root", str(tmp_path), "--timeout", "12"]
    done = run_ranks("anemoi_dist.preflight.ranks", arguments, num_ranks=1, output=tmp_path / "printed", WORLD_SIZE="2")
    assert done.codes == [3]
    assert "failed  ranks       rank 0 of 2 cannot join the others" in done.output
