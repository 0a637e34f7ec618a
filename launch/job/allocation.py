"""The nodes of a SLURM job as its batch script sees them, and the srun commands that start ranks on them."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from anemoi_dist.config.schema import LauncherConfig
from anemoi_dist.distributed.rendezvous import own_address
from anemoi_dist.errors import PreflightError
from anemoi_dist.process.parent_death import PARENT_PID
from anemoi_dist.run.directory import RunDirectory

from ..launchers.slurm import num_ranks_per_node
from ..status import slurm_queue

#: How long to wait for slurmctld, which may be restarted just when a job begins or ends.
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Allocation:
    """One start of a SLURM job.

    Attributes
    ----------
    job_id : str
        The job.
    requeues : int
        How often SLURM had put it back into the queue.
    nodes : tuple[str, ...]
        Names of its nodes; the batch script runs on the first.
    cpus_per_node : int
        Those of the node that gives the fewest.
    cpus_per_task : int
        Those asked for each rank.
    """

    job_id: str
    requeues: int
    nodes: tuple[str, ...]
    cpus_per_node: int
    cpus_per_task: int

    @classmethod
    def here(cls, environ: Mapping[str, str]) -> Allocation:
        """Return the allocation of the batch script that this process belongs to.

        Raises
        ------
        PreflightError
            This is no batch script, or SLURM does not name its nodes.
        """
        if "SLURM_JOB_ID" not in environ or "SLURM_JOB_NODELIST" not in environ:
            raise PreflightError("not in a SLURM job: `anemoi-dist submit` writes the script that starts this")
        answer = slurm_queue.call(
            ["scontrol", "show", "hostnames", environ["SLURM_JOB_NODELIST"]], timeout_s=_PATIENCE_S
        )
        nodes = tuple(answer.stdout.split())
        if answer.returncode or not nodes:
            raise PreflightError(f"scontrol show hostnames {environ['SLURM_JOB_NODELIST']}: {answer.stderr.strip()}")
        return cls(
            job_id=environ["SLURM_JOB_ID"],
            requeues=int(environ.get("SLURM_RESTART_COUNT", "0")),
            nodes=nodes,
            cpus_per_node=fewest_cpus(environ.get("SLURM_JOB_CPUS_PER_NODE", "1")),
            cpus_per_task=int(environ.get("SLURM_CPUS_PER_TASK", "1")),
        )

    def fields(self, *names: str, timeout_s: float = _PATIENCE_S) -> tuple[str | None, ...]:
        """Return fields of ``scontrol show job``, None where SLURM no longer knows the job.

        Raises
        ------
        QueueError
            slurmctld does not answer.
        """
        answer = slurm_queue.call(["scontrol", "--oneliner", "show", "job", self.job_id], timeout_s=timeout_s)
        # A job that SLURM has forgotten is an answer; a slurmctld that is down is none.
        if answer.returncode and not answer.stdout and "Invalid job id" not in answer.stderr:
            raise slurm_queue.QueueError(" ".join(answer.stderr.split()))
        return tuple(field(answer.stdout, name) for name in names)

    def head_address(self, environ: Mapping[str, str]) -> str:
        """Return the address of the first node, which this process runs on, that the others reach.

        It is that of the interface if one is chosen, else of the node's name if that resolves, else the one by which
        SLURM reaches the node: on the node itself its own name may resolve to nothing but loopback.
        """
        if len(self.nodes) == 1:
            return "127.0.0.1"
        if environ.get("GLOO_SOCKET_IFNAME"):
            return own_address(environ)
        if found := _addresses(self.nodes[0]):
            return found[0]
        answer = slurm_queue.call(["scontrol", "--oneliner", "show", "node", self.nodes[0]], timeout_s=_PATIENCE_S)
        known = field(answer.stdout, "NodeAddr")
        if not known:
            raise PreflightError(f"node {self.nodes[0]} has no address: neither its name resolves nor SLURM knows one")
        return next(iter(_addresses(known, loopback=True)), known)


def field(text: str, name: str) -> str | None:
    """Return the value of ``name=value`` in the one line that scontrol prints."""
    return next((word.partition("=")[2] for word in text.split() if word.startswith(f"{name}=")), None)


def fewest_cpus(text: str) -> int:
    """Return the smallest number in SLURM's short form, such as ``72(x2),36``."""
    # Nodes may differ: a task that asks for the CPUs of the largest would not start on the smallest.
    return min(int(part.partition("(")[0]) for part in text.split(","))


def _addresses(name: str, *, loopback: bool = False) -> list[str]:
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    except OSError:
        return []
    return [address for address in found if loopback or not ipaddress.ip_address(address).is_loopback]


def start_command(
    run: RunDirectory, launcher: LauncherConfig, allocation: Allocation, *, python: str, head: str, start: int
) -> list[str]:
    """Return the srun command that starts the ranks on all nodes of the job and ends with them; pure.

    Parameters
    ----------
    run : RunDirectory
        A prepared run.
    launcher : LauncherConfig
        Ranks on each node, and what starts them.
    allocation : Allocation
        Where.
    python : str
        The interpreter, a path that every node sees.
    head : str
        Address of the first node.
    start : int
        Restarts of the ranks so far in this start of the job.
    """
    ranks = num_ranks_per_node(launcher)
    train = ["-m", "anemoi_dist.train", "--run-directory", str(run.path)]
    if launcher.ranks_by == "srun":
        return [*srun(allocation, tasks_per_node=ranks), python, *train]
    # The first node writes its port here. An old file would send agents to a port where nobody listens: no name is
    # used twice.
    meeting = run.control_dir / f"agents-{allocation.job_id}-{allocation.requeues}-{start}.json"
    return [
        *srun(allocation, tasks_per_node=1),
        python,
        "-m",
        "anemoi_dist.launch.job.agent",
        f"--nnodes={len(allocation.nodes)}",
        f"--nproc-per-node={ranks}",
        "--rdzv-backend=anemoi-dist",
        f"--rdzv-endpoint={head}",
        f"--rdzv-conf=file={meeting}",
        "--max-restarts=0",
        *train,
    ]


def srun(allocation: Allocation, *, tasks_per_node: int) -> list[str]:
    """Return the beginning of the srun command for so many tasks on each node; pure."""
    # One task holds all CPUs of the job on its node; srun has ignored the job's --cpus-per-task since 22.05.
    cpus = allocation.cpus_per_node if tasks_per_node == 1 else allocation.cpus_per_task
    return [
        "srun",
        f"--nodes={len(allocation.nodes)}",
        f"--ntasks={len(allocation.nodes) * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        f"--cpus-per-task={cpus}",
        # A job that was submitted with --export=NONE would otherwise start ranks without PATH.
        "--export=ALL",
        # The other ranks would wait for one that is gone until their collectives time out.
        "--kill-on-bad-exit=1",
        # Ranks meet by themselves; an MPI plugin would need its library on the nodes.
        "--mpi=none",
        "--input=none",
        # It names the parent of srun: the tasks, whose parent is slurmstepd, would take themselves for orphans.
        "env",
        f"--unset={PARENT_PID}",
    ]


def interface_variables(launcher: LauncherConfig) -> dict[str, str]:
    """Return the variables that make NCCL and gloo use ``launcher.slurm.interface``."""
    interface = launcher.slurm.interface
    if interface is None:
        return {}
    # NCCL's signs "=" (exactly) and "^" (not) mean nothing to gloo, which takes a name.
    gloo = {} if interface.startswith("^") else {"GLOO_SOCKET_IFNAME": interface.lstrip("=")}
    return {"NCCL_SOCKET_IFNAME": interface, **gloo}


def meeting_files(run: RunDirectory, allocation: Allocation) -> list[Path]:
    """Return the files in which the agents of this start of the job have written their port."""
    return list(run.control_dir.glob(f"agents-{allocation.job_id}-{allocation.requeues}-*.json"))
