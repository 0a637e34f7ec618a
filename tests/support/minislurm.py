"""A private SLURM cluster of several nodes on one machine: real daemons, real scheduling, loopback only.

    python -m support.minislurm DIRECTORY      start one, print how to reach it, stop it at Ctrl-C

Needs Debian's slurmctld, slurmd, slurm-client and munge. Two ways to be several nodes:

``uts``    root: each slurmd has its own host name, its own /etc/hosts and its own address 127.0.1.N
``multi``  anybody: each slurmd has the machine's host name and 127.0.0.1, and a port of its own

In both the names of the nodes do not resolve outside them, as on some real clusters.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from support.waiting import wait_until

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "munged")
#: Debian keeps daemons where the PATH of a user may not look.
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

_CONFIGURATION = """\
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={dir}/munge/sock,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0,bf_interval=2,bf_resolution=10
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/run/slurmctld.pid
SlurmdPidFile={dir}/run/slurmd.%n.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/slurmd.%n.log
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldParameters=idle_on_node_suspend
CommunicationParameters={binding}
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait={kill_wait_s}
MinJobAge=300
InactiveLimit=0
OverTimeLimit=0
EnforcePartLimits=ALL
JobRequeue=1
MessageTimeout=10
TCPTimeout=2
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""
#: ``low`` gives way to ``high``; ``main`` stands between.
_PARTITIONS = """\
PartitionName=main Nodes=node[1-{nodes}] Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=node[1-{nodes}] MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=node[1-{nodes}] MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
PartitionName=short Nodes=node[1-{nodes}] MaxTime=00:10:00 State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Return what is not installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]


def default_mode() -> str:
    """Return ``uts`` where this process may give a child its own host name, else ``multi``."""
    if os.geteuid() != 0 or shutil.which("unshare", path=_PATH) is None:
        return "multi"
    probe = ["unshare", "--uts", "--mount", "--propagation", "private", "true"]
    return "uts" if subprocess.run(probe, capture_output=True, check=False).returncode == 0 else "multi"


class MiniSlurm:
    """One cluster.

    Parameters
    ----------
    directory : Path
        Everything it writes; its path must be short, a socket lies in it.
    nodes, cpus, gpus : int
        Nodes, and the CPUs and (pretended) GPUs that each claims.
    mode : str, optional
        ``uts`` or ``multi``; default: what this user may do.
    kill_wait_s : int
        Seconds between SIGTERM and SIGKILL when SLURM ends a job.
    """

    def __init__(
        self,
        directory: Path,
        *,
        nodes: int = 4,
        cpus: int = 4,
        gpus: int = 2,
        mode: str | None = None,
        kill_wait_s: int = 5,
    ) -> None:
        self.directory, self.num_nodes, self.mode = directory, nodes, mode or default_mode()
        self._cpus, self._gpus, self._kill_wait_s = cpus, gpus, kill_wait_s
        self._port = _free_ports(nodes + 1)
        self.configuration = directory / "slurm.conf"
        # How every process of this cluster is told from all others: the daemons' children inherit it.
        self.environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(self.configuration)}

    def start(self) -> None:
        """Start the daemons and wait until every node is idle."""
        self._write_files()
        munge = self.directory / "munge"
        self._call(
            "munged",
            f"--key-file={munge}/key",
            f"--socket={munge}/sock",
            f"--pid-file={self.directory}/run/munged.pid",
            f"--log-file={self.directory}/log/munged.log",
            f"--seed-file={munge}/seed",
            "--origin=127.0.0.1",
        )
        self.start_controller(clean=True)
        for number in range(1, self.num_nodes + 1):
            self.start_slurmd(number)
        self.wait_idle(timeout_s=30)

    def start_controller(self, *, clean: bool = False) -> None:
        """Start slurmctld, with the jobs it had unless ``clean``."""
        self._call("slurmctld", "-f", str(self.configuration), *(["-c"] if clean else []))

    def stop_controller(self) -> None:
        """Kill slurmctld as a crash would; the jobs live on."""
        self._kill(self.directory / "run" / "slurmctld.pid")

    def start_slurmd(self, number: int) -> None:
        """Start the daemon of a node, counted from 1."""
        daemon = ["slurmd", "-N", f"node{number}", "-f", str(self.configuration)]
        if self.mode == "uts":
            enter = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
            space = ["unshare", "--uts", "--mount", "--propagation", "private"]
            daemon = [*space, "bash", "-c", enter, "_", f"node{number}", f"{self.directory}/hosts", *daemon]
        self._call(*daemon)

    def kill_slurmd(self, number: int) -> None:
        """Kill the daemon of a node; what runs there lives on."""
        self._kill(self.directory / "run" / f"slurmd.node{number}.pid")

    def crash_node(self, number: int) -> None:
        """Kill all that runs on a node, the daemon first, as when a machine loses its power."""
        self.kill_slurmd(number)
        log = f"{self.directory}/log/slurmd.node{number}.log"
        victims = [p for p, e in self._processes() if e.get("SLURMD_NODENAME") == f"node{number}" or _holds(p, log)]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def run(self, *command: str, check: bool = True, timeout_s: float = 60) -> str:
        """Run one of SLURM's commands against this cluster and return what it printed."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=timeout_s
        )
        if check and done.returncode:
            raise RuntimeError(f"{command}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def wait_idle(self, *, timeout_s: float = 60) -> None:
        """Wait until every node is up and empty."""
        seen = ""

        def idle() -> bool:
            nonlocal seen
            seen = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False)
            return seen.split() == ["idle"] * self.num_nodes

        if not wait_until(idle, timeout_s=timeout_s):
            raise RuntimeError(f"nodes are {seen.split()}; logs are in {self.directory}/log")

    def job_state(self, job_id: int) -> str:
        """Return the state of a job, such as ``RUNNING``."""
        text = self.run("scontrol", "show", "job", str(job_id), "--oneliner")
        return _field(text, "JobState")

    def job_field(self, job_id: int, name: str) -> str:
        """Return one field of ``scontrol show job``."""
        return _field(self.run("scontrol", "show", "job", str(job_id), "--oneliner"), name)

    def cancel_all(self) -> None:
        """Cancel every job and wait until none is left."""
        self.run("scancel", "-Q", "--ctld", "-u", str(os.geteuid()), check=False)
        states = "PD,R,S,CG,CF"
        wait_until(lambda: not self.run("squeue", "-h", "-t", states, "-o", "%i", check=False).strip(), timeout_s=30)

    def stop(self) -> None:
        """Cancel everything and leave no process."""
        self.cancel_all()
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid, _ in self._processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if wait_until(lambda: not self.processes(), timeout_s=8):
                break

    def processes(self) -> list[int]:
        """Return every process of this cluster: daemons, steps and what jobs have started."""
        return [pid for pid, _ in self._processes()]

    def job_processes(self, *job_ids: int) -> list[int]:
        """Return the processes that jobs have started, wherever they went."""
        wanted = {str(job_id) for job_id in job_ids}
        return [p for p, e in self._processes() if (e.get("SLURM_JOB_ID") in wanted if wanted else "SLURM_JOB_ID" in e)]

    def _processes(self) -> list[tuple[int, dict[str, str]]]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                text = (folder / "environ").read_text(errors="replace")
            except OSError:
                continue
            pairs = dict(item.partition("=")[::2] for item in text.split("\0"))
            if pairs.get("SLURM_CONF") == str(self.configuration) and int(folder.name) != os.getpid():
                found.append((int(folder.name), pairs))
        return found

    def _write_files(self) -> None:
        folder = self.directory
        for name in ("munge", "state", "log", "run", "dev", *(f"spool/node{n + 1}" for n in range(self.num_nodes))):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name in (".", "munge"):
            (folder / name).chmod(0o755)
        key = folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        host = socket.gethostname().partition(".")[0]
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        names = [f"{self.address(n)} node{n}" for n in range(1, self.num_nodes + 1)]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"127.0.0.1 {host}", *names, ""]))
        # In their own UTS namespaces slurmd and srun must listen on every address, or srun is not found.
        binding = "NoCtldInAddrAny" if self.mode == "uts" else "NoCtldInAddrAny,NoInAddrAny"
        values = {"dir": folder, "host": host, "user": user, "port": self._port, "binding": binding}
        lines = [_CONFIGURATION.format(**values, kill_wait_s=self._kill_wait_s)]
        for number in range(1, self.num_nodes + 1):
            hostname = f"node{number}" if self.mode == "uts" else host
            lines.append(
                f"NodeName=node{number} NodeHostname={hostname} NodeAddr={self.address(number)} "
                f"Port={self._port + number} CPUs={self._cpus} RealMemory=4000 Gres=gpu:{self._gpus} State=UNKNOWN\n"
            )
        lines.append(_PARTITIONS.format(nodes=self.num_nodes))
        self.configuration.write_text("".join(lines))
        devices = self._devices()
        (folder / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName=node[1-{self.num_nodes}] Name=gpu File={devices}[0-{self._gpus - 1}]\n"
        )
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")

    def _devices(self) -> str:
        """Return the prefix of device files that stand for GPUs; a count without files is not believed."""
        prefix = f"{self.directory}/dev/nvidia"
        for number in range(self._gpus):
            made = subprocess.run(["mknod", f"{prefix}{number}", "c", "1", "3"], capture_output=True, check=False)
            if made.returncode:
                return "/dev/tty"
        return prefix

    def address(self, number: int) -> str:
        """Return the address of a node, counted from 1."""
        return f"127.0.1.{number}" if self.mode == "uts" else "127.0.0.1"

    def _call(self, *command: str) -> None:
        # The daemons put themselves into the background: with pipes of ours they would be waited for.
        log = self.directory / "log" / "start.log"
        with log.open("a") as stream:
            done = subprocess.run(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"{command[0]} returned {done.returncode}:\n{log.read_text()}")

    @staticmethod
    def _kill(pid_file: Path) -> None:
        pid = int(pid_file.read_text())
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not Path("/proc", str(pid)).exists(), timeout_s=5)
        pid_file.unlink()


def _field(text: str, name: str) -> str:
    return next(word.partition("=")[2] for word in text.split() if word.startswith(f"{name}="))


def _holds(pid: int, path: str) -> bool:
    with contextlib.suppress(OSError):
        return any(str(link.readlink()) == path for link in Path("/proc", str(pid), "fd").iterdir())
    return False


def _free_ports(count: int) -> int:
    """Return the first of ``count`` ports in a row that nobody has, below those that the kernel gives out by itself."""
    while True:
        first = random.SystemRandom().randrange(20000, 32000 - count)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    probe = stack.enter_context(socket.socket())
                    probe.bind(("0.0.0.0", port))
            except OSError:
                continue
            return first


if __name__ == "__main__":
    cluster = MiniSlurm(Path(sys.argv[1]).absolute())
    cluster.start()
    print(f"export SLURM_CONF={cluster.configuration}", flush=True)
    try:
        signal.pause()
    except KeyboardInterrupt:
        cluster.stop()
