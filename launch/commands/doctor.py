"""``anemoi-dist doctor``: check this machine, or all ranks together, before a run starts. No torch."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess

from anemoi_dist.config.schema import Config
from anemoi_dist.errors import ExitCode
from anemoi_dist.preflight.machine import (
    PACKAGES,
    Finding,
    check_disk,
    check_file_clock,
    check_host,
    check_owner,
    check_port,
    check_versions,
    format_findings,
)
from anemoi_dist.process.parent_death import PARENT_PID
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.events import read_events
from anemoi_dist.run.versions import installed_versions

from ..launchers import local
from ..launchers.machine import detect_machine
from ..status.slurm_queue import QueueError, call
from .arguments import compose_options

#: Seconds for the ranks of ``--nodes``, their imports included.
NODES_TIMEOUT_S = 180.0
_PING_TIMEOUT_S = 20.0
#: fp32 parameter and the three EMAs of AdEMAMix: what a checkpoint holds of each parameter.
_BYTES_PER_PARAMETER = 16


def run(options: argparse.Namespace) -> int:
    """Print the findings and return 3 where one has failed, else 0."""
    return run_doctor(compose_options(options).config, nodes=options.nodes, as_json=options.json)


def run_doctor(config: Config, *, nodes: bool, as_json: bool) -> int:
    """Print the findings and return 3 where one has failed, else 0.

    Parameters
    ----------
    config : Config
        The job that is to run.
    nodes : bool
        Whether to start ranks.
    as_json : bool
        Whether to print JSON.
    """
    run = RunDirectory.locate(config.run.root, str(config.run.id))
    needed_bytes = space_needed(run, config)
    findings = check_machine(run, needed_bytes=needed_bytes)
    if config.launcher.kind == "slurm":
        findings.append(check_slurm())
    if nodes and config.launcher.kind == "slurm" and "SLURM_JOB_ID" not in os.environ:
        findings.append(_only_here())
    elif nodes:
        # torch alone takes seconds to import, and a collective that hangs is waited for.
        if not as_json:
            print(f"starting ranks that check each other, which takes up to {NODES_TIMEOUT_S:g} s", flush=True)
        found = check_ranks(run, config, needed_bytes=needed_bytes)
        # The ranks compare the clocks of nodes: that check comes next to the one of files.
        repeated = {finding.check for finding in found} - {"clock"}
        findings = [finding for finding in findings if finding.check not in repeated] + found
    print(json.dumps([finding.as_dict() for finding in findings]) if as_json else format_findings(findings))
    failed = any(finding.level == "failed" for finding in findings)
    return ExitCode.PREFLIGHT if failed else ExitCode.FINISHED


def check_machine(run: RunDirectory, *, needed_bytes: int) -> list[Finding]:
    """Return the findings of this machine alone."""
    root = run.path.parent
    clock = check_file_clock(root)
    return [
        check_versions(installed_versions(*PACKAGES)),
        _check_devices(local.count_gpus()),
        check_disk(root, needed_bytes=needed_bytes),
        *([] if clock is None else [clock]),
        check_host(),
        check_port(),
        check_owner(run),
    ]


def check_slurm() -> Finding:
    """Return whether a job can be submitted from here."""
    # slurmctld may answer on a machine from which nobody can submit, and the other way round: both are checked.
    if shutil.which("sbatch") is None:
        return Finding("slurm", "failed", "there is no sbatch on this machine", "submit on a login node of the cluster")
    try:
        answer = call(["scontrol", "ping"], timeout_s=_PING_TIMEOUT_S)
    except QueueError as error:
        return Finding("slurm", "failed", str(error), "try again when slurmctld answers (`scontrol ping`)")
    answers = "; ".join(
        " ".join(line.split()) for line in (answer.stdout or answer.stderr).splitlines() if line.strip()
    )
    if answer.returncode or " is UP" not in answers:
        return Finding("slurm", "failed", answers or "slurmctld does not answer", "try again when it does")
    return Finding("slurm", "ok", answers)


def _only_here() -> Finding:
    text = "only this machine was checked: the job's own preflight checks its nodes (launcher.preflight=true)"
    return Finding("nodes", "ok", text)


def _check_devices(num_gpus: int) -> Finding:
    return Finding("devices", "ok", f"{num_gpus} GPUs here" if num_gpus else "no GPU here: ranks would run on the CPU")


def space_needed(run: RunDirectory, config: Config) -> int:
    """Return the bytes that the checkpoints of a run are still going to take in its directory; 0 if unknown.

    One more than ``checkpoint.keep_last`` is there for a moment. Without that limit one more is counted, at least.
    """
    if config.checkpoint.url is not None:  # an object store, whose space nobody can measure
        return 0
    sizes = _checkpoint_sizes(run)
    each = max(sizes, default=_BYTES_PER_PARAMETER * _num_parameters(run))
    return max(0, (config.checkpoint.keep_last or len(sizes)) + 1 - len(sizes)) * each


def _checkpoint_sizes(run: RunDirectory) -> list[int]:
    return [
        sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        for folder in sorted(run.checkpoints_dir.glob("step-????????"))
    ]


def _num_parameters(run: RunDirectory) -> int:
    """Return the number of parameters that an earlier start of the run has recorded; 0 for a new run."""
    counts = [event.get("num_parameters", 0) for event in read_events(run.events_file) if event["event"] == "start"]
    return int(counts[-1]) if counts else 0


def nodes_command(run: RunDirectory, num_ranks: int, *, needed_bytes: int, timeout_s: float) -> list[str]:
    """Return the command that starts the rank checks on this machine as ``train`` starts ranks; pure."""
    command = local.torchrun_command(run, num_ranks)
    agent = command[: command.index("anemoi_dist.train") - 1]
    return [
        *agent,
        "-m",
        "anemoi_dist.preflight.ranks",
        *rank_check_arguments(run, needed_bytes=needed_bytes, timeout_s=timeout_s),
    ]


def rank_check_arguments(run: RunDirectory, *, needed_bytes: int, timeout_s: float) -> list[str]:
    """Return the arguments of ``-m anemoi_dist.preflight.ranks``."""
    return [
        "--run-root",
        str(run.path.parent),
        "--needed-bytes",
        str(needed_bytes),
        "--timeout",
        f"{timeout_s:g}",
        "--json",
    ]


def check_ranks(run: RunDirectory, config: Config, *, needed_bytes: int) -> list[Finding]:
    """Start ranks on this machine that check each other, and return their findings."""
    num_ranks = local.plan(config, run, detect_machine()).ranks_per_node
    command = nodes_command(run, num_ranks, needed_bytes=needed_bytes, timeout_s=NODES_TIMEOUT_S)
    environment = {**local.rank_environment(), PARENT_PID: str(os.getpid())}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            # The ranks have their own time limit, and say more when they reach it.
            timeout=NODES_TIMEOUT_S + 30.0,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [_no_answer(f"the ranks were not done after {NODES_TIMEOUT_S:g} s")]
    findings = parse_findings(done.stdout)
    return findings or [_no_answer(f"the ranks ended with code {done.returncode} and found nothing")]


def parse_findings(output: str) -> list[Finding]:
    """Return the findings in the output of the rank checks, whatever else the ranks have printed."""
    # Libraries print banners on stdout, before and after.
    for line in reversed(output.splitlines()):
        if line.startswith('[{"check"'):
            return [Finding(**entry) for entry in json.loads(line)]
    return []


def _no_answer(text: str) -> Finding:
    return Finding("ranks", "failed", text, "read above what they printed; anemoi-dist doctor --nodes launcher.ranks=1")
