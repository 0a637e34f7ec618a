"""Checks that ranks do together before they train: ``torchrun ... -m anemoi_dist.preflight.ranks --run-root DIR``.

Takes the places of ranks that train, under the same rendezvous (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT), for less than a minute. Rank 0 prints the findings; every rank ends with 3 where one has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from anemoi_dist.errors import AnemoiDistError, ExitCode, PreflightError
from anemoi_dist.preflight.machine import (
    PACKAGES,
    Finding,
    RankReport,
    check_disk,
    check_host,
    check_port,
    compare_nodes,
    find_slow_ranks,
    format_findings,
    nearest_existing,
)
from anemoi_dist.process.deadman import Deadman
from anemoi_dist.process.parent_death import die_with_parent, parent_in_environment
from anemoi_dist.run.versions import installed_versions

if TYPE_CHECKING:
    import torch

    from anemoi_dist.distributed.world import World

#: Bytes of the all-reduces, without and with a GPU.
SIZES = {"cpu": (2**16, 2**20, 2**23), "cuda": (2**20, 2**24, 2**28)}
_REPEATS = 10
_MAX_ERROR_CHARS = 400


def main(argv: Sequence[str] | None = None) -> int:
    """Check the ranks and return the exit code."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(parent_pid=parent_in_environment())
    parser = argparse.ArgumentParser(prog="python -m anemoi_dist.preflight.ranks", description=__doc__)
    parser.add_argument("--run-root", type=Path, required=True, help="where runs are to lie")
    parser.add_argument("--needed-bytes", type=int, default=0, help="what checkpoints still need there")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="give up after so many seconds")
    parser.add_argument("--json", action="store_true", help="print the findings as one line of JSON")
    options = parser.parse_args(argv)
    deadline = time.monotonic() + options.timeout
    # A node that does not answer would hold up all others for as long as the queue lets them. Collectives that wait
    # notice it by themselves; this is for whatever else may hang.
    switch = Deadman(grace_s=0.5, code=ExitCode.PREFLIGHT, log=sys.stderr)
    switch.hold(options.timeout)
    try:
        findings = _join_and_check(options, deadline=deadline)
    except (AnemoiDistError, RuntimeError) as error:  # dist.DistError is a RuntimeError
        text = " ".join(str(error).split())[:_MAX_ERROR_CHARS]
        findings = [Finding("ranks", "failed", text, "check that all ranks were started and reach the first node")]
    switch.close()
    if os.environ.get("RANK", "0") == "0":
        as_json = json.dumps([finding.as_dict() for finding in findings])
        print(as_json if options.json else format_findings(findings), flush=True)  # noqa: T201
    failed = any(finding.level == "failed" for finding in findings)
    return ExitCode.PREFLIGHT if failed else ExitCode.FINISHED


def _join_and_check(options: argparse.Namespace, *, deadline: float) -> list[Finding]:
    """Join the other ranks and return the findings of all until ``deadline`` (monotonic clock). Collective."""
    from anemoi_dist.distributed.world import World

    left_s = deadline - time.monotonic()
    world = World.join(timeout_s=max(1.0, 0.7 * left_s))  # with time left to say that somebody is missing
    findings = run_rank_checks(world, options.run_root, needed_bytes=options.needed_bytes)
    world.leave()
    return findings


def run_preflight(world: World, root: Path) -> None:
    """Check the ranks before training and print the findings on rank 0. Collective.

    A slow rank is shown and tolerated: whatever else runs on its machine may be gone the next minute.

    Raises
    ------
    PreflightError
        These ranks cannot train together.
    """
    findings = run_rank_checks(world, root, needed_bytes=0)
    if world.is_main:
        print(format_findings(findings), flush=True)  # noqa: T201
    if failed := [finding for finding in findings if finding.level == "failed" and finding.check != "ranks"]:
        raise PreflightError(format_findings(failed))


@dataclass(frozen=True)
class RankChecks:
    """Results of one rank.

    Attributes
    ----------
    report : RankReport
        Its measurements.
    findings : Sequence[Finding]
        Findings that concern its node alone; empty for all but one rank of a node.
    sees_run_root : bool
        Whether it sees a file that rank 0 has written into ``run.root``.
    has_right_sums : bool
        Whether the sums of the all-reduces were right.
    """

    report: RankReport
    findings: Sequence[Finding]
    sees_run_root: bool
    has_right_sums: bool

    @classmethod
    def from_json(cls, text: str) -> RankChecks:
        """Read what :meth:`to_json` has written."""
        content = json.loads(text)
        findings = [Finding(**entry) for entry in content["findings"]]
        return cls(**{**content, "report": RankReport(**content["report"]), "findings": findings})

    def to_json(self) -> str:
        """Return the results as text for another rank."""
        return json.dumps(asdict(self))


def run_rank_checks(world: World, root: Path, *, needed_bytes: int) -> list[Finding]:
    """Return the findings of all ranks, the same list on every rank. Collective.

    Parameters
    ----------
    world : World
        The ranks.
    root : Path
        ``run.root``.
    needed_bytes : int
        Bytes of the checkpoints that are still to be written there.
    """
    report = measure_rank(world)
    findings = _check_node(root, needed_bytes=needed_bytes)
    sees_run_root = _sees_run_root(root, world=world)
    seconds, is_right = all_reduce_seconds(world)
    gathered = world.gather_text(RankChecks(report, findings, sees_run_root, is_right).to_json())
    if world.is_main:
        checks = [RankChecks.from_json(text) for text in gathered]
        findings = [*combine(checks), _describe_collectives(seconds, world_size=world.world_size)]
    text = world.broadcast_text(json.dumps([finding.as_dict() for finding in findings]) if world.is_main else None)
    return [Finding(**entry) for entry in json.loads(text)]


def combine(checks: Sequence[RankChecks]) -> list[Finding]:
    """Return the findings that follow from the results of all ranks. Pure."""
    reports = [each.report for each in checks]
    findings = [*compare_nodes(reports), *find_slow_ranks(reports)]
    for each in checks:
        host = each.report.host
        findings += [replace(finding, text=f"{host}: {finding.text}") for finding in each.findings]
    apart = sorted({each.report.host for each in checks if not each.sees_run_root})
    if apart:
        text = f"{', '.join(apart[:4])} do not see what rank 0 writes into run.root"
        findings.append(Finding("disk", "failed", text, "give a run.root on a file system that all nodes share"))
    wrong = [each.report.rank for each in checks if not each.has_right_sums]
    if wrong:
        text = f"an all-reduce gives wrong sums on ranks {wrong[:8]}"
        findings.append(Finding("collectives", "failed", text, "take these nodes out; check NCCL and its network"))
    return findings


def measure_rank(
    world: World,
    *,
    work: Callable[[torch.device], float] | None = None,
    exchange: Callable[[World, int], float] | None = None,
    clock: Callable[[], float] = time.time,
    found: Callable[[], dict[str, str]] | None = None,
) -> RankReport:
    """Return what this rank is and how fast. Collective.

    Parameters
    ----------
    world : World
        The ranks.
    work : Callable[[torch.device], float], optional
        Does a fixed amount of arithmetic and returns its seconds.
    exchange : Callable[[World, int], float], optional
        Exchanges data with another rank and returns the seconds it took.
    clock : Callable[[], float], optional
        Unix seconds.
    found : Callable[[], dict[str, str]], optional
        Versions of what is installed.
    """
    import torch
    import torch.distributed as dist

    # Links before arithmetic: an exchange waits for the slower partner, and all are still at the same point here.
    link_s = [(exchange or _exchange)(world, peer) for peer in _neighbours(world)]
    work_s = (work or _work)(world.device)
    dist.barrier(group=world.control_group)  # so that all read their clocks at the same moment
    return RankReport(
        rank=world.rank,
        host=socket.gethostname(),
        clock=clock(),
        versions=(found or _versions)(),
        device=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        visible_devices=torch.cuda.device_count(),
        work_s=work_s,
        link_s=link_s,
    )


def all_reduce_seconds(world: World) -> tuple[dict[int, float], bool]:
    """Return the median seconds of an all-reduce by its bytes, and whether the sums were right. Collective."""
    import torch
    import torch.distributed as dist

    seconds, is_right = {}, True
    expected = world.world_size * (world.world_size + 1) / 2
    for size in SIZES[world.device.type]:
        times = []
        for _ in range(_REPEATS):
            values = torch.full((size // 4,), float(world.rank + 1), device=world.device)
            _synchronise(world.device)
            begun = time.perf_counter()
            dist.all_reduce(values)
            _synchronise(world.device)
            times.append(time.perf_counter() - begun)
            is_right = is_right and bool((values == expected).all())
        # The median: the first repetition sets up connections, and single ones meet other work on the machine.
        seconds[size] = sorted(times)[_REPEATS // 2]
    return seconds, is_right


def _describe_collectives(seconds: dict[int, float], *, world_size: int) -> Finding:
    speeds = ", ".join(
        f"{size / 2**20:g} MiB in {taken * 1e3:.2f} ms ({size / 2**20 / taken:.0f} MiB/s)"
        for size, taken in seconds.items()
    )
    return Finding("collectives", "ok", f"all-reduce over {world_size} ranks: {speeds}")


def _neighbours(world: World) -> list[int]:
    """Return the ranks to exchange with, one after the other; in each round every rank has at most one partner.

    Rounds are the even and the odd links of a ring, and the link that closes a ring of odd length.
    """
    size, rank = world.world_size, world.rank
    if size < 3:
        return [1 - rank] if size == 2 else []
    rounds: list[list[tuple[int, int]]] = [
        [(a, a + 1) for a in range(0, size - 1, 2)],
        [(a, (a + 1) % size) for a in range(1, size - size % 2, 2)],
    ]
    if size % 2:
        rounds.append([(size - 1, 0)])
    partners = []
    for links in rounds:
        partners += [b if a == rank else a for a, b in links if rank in (a, b)]
    return partners


def _exchange(world: World, peer: int) -> float:
    """Send to and receive from another rank at once; return the fastest of a few."""
    import torch
    import torch.distributed as dist

    size = SIZES[world.device.type][1] // 4
    out, into = torch.ones(size, device=world.device), torch.empty(size, device=world.device)
    times = []
    for _ in range(_REPEATS):
        _synchronise(world.device)
        begun = time.perf_counter()
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, into, peer)]):
            work.wait()
        _synchronise(world.device)
        times.append(time.perf_counter() - begun)
    return min(times)


def _work(device: torch.device) -> float:
    """Multiply matrices; return the seconds of the fastest of a few."""
    import torch

    size = 4096 if device.type == "cuda" else 256
    matrix = torch.full((size, size), 1.0 / size, device=device)
    times = []
    # One more: the first loads kernels.
    for _ in range(_REPEATS + 1):
        _synchronise(device)
        begun = time.perf_counter()
        for _ in range(10):
            matrix = matrix @ matrix
        _synchronise(device)
        times.append(time.perf_counter() - begun)
    return min(times)


def _synchronise(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _versions() -> dict[str, str]:
    import torch

    found = installed_versions(*PACKAGES)
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _check_node(root: Path, *, needed_bytes: int) -> list[Finding]:
    """Return the findings about this node, on one of its ranks."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return []
    return [check_disk(root, needed_bytes=needed_bytes), check_host(), check_port()]


def _sees_run_root(root: Path, *, world: World) -> bool:
    """Whether this rank sees what rank 0 writes. Collective."""
    token = nearest_existing(root) / f".doctor-{os.getpid()}-{socket.gethostname()}"
    written = ""
    if world.is_main:
        try:
            token.write_text(token.name, encoding="utf-8")
            written = str(token)
        except OSError:
            written = ""  # check_disk says it
    path = world.broadcast_text(written if world.is_main else None)
    seen = not path or Path(path).exists()
    world.gather_text("")  # rank 0 removes the file only when all have looked
    if world.is_main and path:
        Path(path).unlink(missing_ok=True)
    return seen


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # where a rank is missing, a clean-up that talks to it would hang
