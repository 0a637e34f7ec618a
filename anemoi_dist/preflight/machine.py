"""Checks of one machine before a run starts on it. No torch: both sides use it."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.lock import SILENCE_S, Holder
from anemoi_dist.telemetry.progress import format_bytes

PACKAGES = ("anemoi-dist", "torch", "deepspeed")
#: Largest difference of clocks between nodes: times that they record are compared with each other.
MAX_SKEW_S = 1.0
#: Ranks this many times slower than the median are a warning, or a failure.
SLOW_FACTOR, TOO_SLOW_FACTOR = 2.0, 5.0
_TRIAL_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes
    ----------
    check : str
        ``versions``, ``devices``, ``disk``, ``clock``, ``port``, ``host``, ``owner``, ``ranks``, ``collectives``,
        ``slurm``, ``nodes``.
    level : str
        ``ok``, ``warning``, or ``failed`` if a run could not train.
    text : str
        The result in one line.
    fix : str
        How to correct it; empty for ``ok``.
    """

    check: str
    level: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{self.level:8}{self.check:12}{self.text}"
        return f"{line}; fix: {self.fix}" if self.fix else line

    def as_dict(self) -> dict[str, str]:
        """Return the finding for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class RankReport:
    """Measurements of one rank, compared with those of all others.

    Attributes
    ----------
    rank, host : int, str
        The rank and its machine.
    clock : float
        Unix seconds, taken on all ranks at the same moment.
    versions : Mapping[str, str]
        Package -> version.
    device, visible_devices : str, int
        Name of its device, and number of GPUs that it sees.
    work_s : float
        Seconds for a fixed amount of arithmetic.
    link_s : Sequence[float]
        Seconds for an exchange of the same data with each of its neighbours.
    """

    rank: int
    host: str
    clock: float
    versions: Mapping[str, str]
    device: str
    visible_devices: int
    work_s: float
    link_s: Sequence[float]


def format_findings(findings: Sequence[Finding]) -> str:
    """Return one line a finding; failures come last, where they are seen."""
    order = ("ok", "warning", "failed")
    return "\n".join(str(finding) for finding in sorted(findings, key=lambda finding: order.index(finding.level)))


def check_versions(found: Mapping[str, str]) -> Finding:
    """Look among the versions of what is installed for the packages that this product cannot do without."""
    missing = [package for package in PACKAGES if package not in found]
    if missing:
        return Finding("versions", "failed", f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return Finding("versions", "ok", ", ".join(f"{name} {number}" for name, number in found.items()))


def nearest_existing(path: Path) -> Path:
    """Return the path itself, or its closest parent that exists: where a directory would be created."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def check_disk(root: Path, *, needed_bytes: int = 0, trial_bytes: int = _TRIAL_BYTES) -> Finding:
    """Write a file below ``run.root``, measure the rate, and compare the free space with the need of checkpoints.

    Parameters
    ----------
    root : Path
        ``run.root``; it need not exist yet.
    needed_bytes : int
        Bytes of checkpoints still to be written there; 0 if unknown.
    trial_bytes : int
        Size of the file.
    """
    place = nearest_existing(root)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as file:
            block = os.urandom(2**20)  # zeros would measure the compression of some file systems
            begun = time.monotonic()
            for _ in range(max(1, trial_bytes // len(block))):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            rate = trial_bytes / (time.monotonic() - begun)
        free = shutil.disk_usage(place).free
    except OSError as error:
        fix = f"make room or permission there, or give another run.root than {root}"
        return Finding("disk", "failed", f"{place} cannot be written: {error.strerror or error}", fix)
    text = f"{place}: {format_bytes(rate)}/s written, {format_bytes(free)} free"
    if free < needed_bytes:
        fix = "a lower checkpoint.keep_last, or another run.root"
        return Finding("disk", "failed", f"{text}, {format_bytes(needed_bytes)} needed for checkpoints", fix)
    needed = f", {format_bytes(needed_bytes)} needed for checkpoints" if needed_bytes else ""
    return Finding("disk", "ok", text + needed)


def check_file_clock(root: Path, *, clock: Callable[[], float] = time.time) -> Finding | None:
    """Compare this machine's clock with that of the file system; None if nothing can be written there."""
    place = nearest_existing(root)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as file:
            before = clock()
            file.write(b"x")
            file.flush()
            skew_s = os.fstat(file.fileno()).st_mtime - before
    except OSError:
        return None
    if abs(skew_s) > MAX_SKEW_S:
        text = f"this machine's clock is {-skew_s:+.1f} s off that of the file system of {place}"
        return Finding("clock", "failed", text, "synchronise the clocks (chrony, ntpd)")
    return Finding("clock", "ok", f"within {MAX_SKEW_S:g} s of the file system's")


def check_host(name: str | None = None) -> Finding:
    """Resolve this machine's own name, as other nodes must to reach it."""
    name = socket.gethostname() if name is None else name
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
    except OSError as error:
        fix = f"enter {name} in DNS or /etc/hosts, or name the interface: launcher.slurm.interface, GLOO_SOCKET_IFNAME"
        return Finding("host", "failed", f"host name {name} does not resolve: {error.strerror or error}", fix)
    return Finding("host", "ok", f"{name} is {address}")


def check_port(address: str = "") -> Finding:
    """Bind a free port, as the rendezvous does; on all addresses of this machine unless one is given."""
    try:
        with socket.socket() as server:
            server.bind((address, 0))
            server.listen()
            return Finding("port", "ok", f"free ports can be bound on {address or 'all addresses'}")
    except OSError as error:
        fix = "allow this user to listen (limits, seccomp, network namespace), or give the address of a local interface"
        return Finding("port", "failed", f"no port can be bound on {address or 'any address'}: {error.strerror}", fix)


def check_owner(run: RunDirectory) -> Finding:
    """Check whether the run has an owner, without touching its locks."""
    for path in (run.launch_lock_file, run.lock_file):
        holder = Holder.read(path)
        if holder is None:
            continue
        alive = holder.is_alive()
        if alive is None:  # on another host: a recent sign of life, or a lock that is visible from here, shows it
            alive = time.time() - path.stat().st_mtime < SILENCE_S or _is_locked(path)
        if alive:
            fix = f"wait for it, `anemoi-dist stop {run.run_id}`, or another run.id"
            return Finding("owner", "failed", f"run {run.run_id} is held by {holder}", fix)
        text = f"run {run.run_id}: stale lock {path.name} of {holder}, which has ended"
        return Finding("owner", "warning", text, "none needed: the next start takes it over")
    return Finding("owner", "ok", f"nobody holds run {run.run_id}")


def _is_locked(path: Path) -> bool:
    with path.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def compare_nodes(reports: Sequence[RankReport]) -> list[Finding]:
    """Return the differences between ranks that should be alike. Pure."""
    return [*_compare_versions(reports), _compare_clocks(reports), *_compare_devices(reports)]


def _compare_versions(reports: Sequence[RankReport]) -> list[Finding]:
    findings = []
    names = dict.fromkeys(name for report in reports for name in report.versions)
    for name in names:
        hosts: dict[str, list[str]] = {}
        for report in reports:
            hosts.setdefault(report.versions.get(name, "missing"), []).append(report.host)
        if len(hosts) > 1:
            listed = ", ".join(f"{number} on {_some(where)}" for number, where in hosts.items())
            findings.append(Finding("versions", "failed", f"{name} differs: {listed}", "one environment for all nodes"))
    if findings:
        return findings
    same = ", ".join(f"{name} {number}" for name, number in reports[0].versions.items())
    return [Finding("versions", "ok", f"the same on all nodes: {same}")]


def _compare_clocks(reports: Sequence[RankReport]) -> Finding:
    middle = statistics.median(report.clock for report in reports)
    off = {report.host: report.clock - middle for report in reports}
    host, worst_s = max(off.items(), key=lambda item: abs(item[1]))
    spread_s = max(off.values()) - min(off.values())
    if spread_s > MAX_SKEW_S:
        text = f"clocks differ by {spread_s:.1f} s; {host} is {worst_s:+.1f} s off"
        return Finding("clock", "failed", text, f"synchronise the clock of {host} (chrony, ntpd)")
    return Finding("clock", "ok", f"all within {spread_s:.3f} s")


def _compare_devices(reports: Sequence[RankReport]) -> list[Finding]:
    kinds: dict[tuple[str, int], list[str]] = {}
    for report in reports:
        kinds.setdefault((report.device, report.visible_devices), []).append(report.host)
    listed = "; ".join(
        f"{device} ({count} visible) on {_some(hosts)}" if count else f"{device} on {_some(hosts)}"
        for (device, count), hosts in kinds.items()
    )
    if len(kinds) > 1:
        return [Finding("devices", "failed", f"not the same everywhere: {listed}", "give every node the same devices")]
    return [Finding("devices", "ok", listed)]


def find_slow_ranks(reports: Sequence[RankReport]) -> list[Finding]:
    """Return a finding for each rank that computes or exchanges data much more slowly than the others. Pure.

    A slow link has two ends, so only a rank all of whose links are slow is named.
    """
    findings = []
    seconds = {
        "computes": {report.rank: report.work_s for report in reports},
        "exchanges data": {report.rank: min(report.link_s, default=0.0) for report in reports},
    }
    for what, best in seconds.items():
        if not any(best.values()) or (what == "exchanges data" and len(reports) < 3):
            continue  # two ranks have one link, with two ends
        middle = statistics.median_low(best.values())
        for report in reports:
            factor = best[report.rank] / middle
            if factor > SLOW_FACTOR:
                level = "failed" if factor > TOO_SLOW_FACTOR else "warning"
                text = f"rank {report.rank} on {report.host} {what} {factor:.1f} times slower than the median"
                fix = f"leave {report.host} out, or look what else runs there"
                findings.append(Finding("ranks", level, text, fix))
    fine = f"none of {len(reports)} is {SLOW_FACTOR:g} times slower than the median"
    return findings or [Finding("ranks", "ok", fine)]


def _some(hosts: Sequence[str]) -> str:
    unique = list(dict.fromkeys(hosts))
    return ", ".join(unique[:4]) + (f" and {len(unique) - 4} more" if len(unique) > 4 else "")
