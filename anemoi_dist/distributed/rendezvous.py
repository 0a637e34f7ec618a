"""Rendezvous of ranks that torchrun, MPI or SLURM started. No torch until rank 0 serves the store."""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from anemoi_dist.errors import ExitCode, PreflightError
from anemoi_dist.process.deadman import Deadman
from anemoi_dist.process.parent_death import die_with_parent
from anemoi_dist.run.directory import RunDirectory, write_atomically

if TYPE_CHECKING:
    from torch.distributed import TCPStore

#: Seconds that ranks which MPI or SLURM started wait for the address of rank 0.
WAIT_S = 300.0
_LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915
#: Size of the one message that is broadcast by MPI.
_MESSAGE_BYTES = 512


@dataclass(frozen=True)
class Place:
    """The place of one rank among all, and among those of its node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    def __post_init__(self) -> None:
        fits = 0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size <= self.world_size
        if not fits:
            raise PreflightError(
                f"rank {self.rank} of {self.world_size}, on its node {self.local_rank} of {self.local_world_size}, "
                "contradict each other: start the ranks again, and set none of RANK, WORLD_SIZE, LOCAL_RANK by hand"
            )

    @property
    def is_one_node(self) -> bool:
        """Whether no other node takes part."""
        return self.local_world_size == self.world_size


@dataclass(frozen=True)
class Address:
    """The address that the first process listens on."""

    host: str
    port: int

    def to_json(self) -> str:
        """Return the address as :meth:`from_json` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Address:
        """Read what another process has written."""
        return cls(**json.loads(text))


class Meeting:
    """Holds rank 0's port, bound before any other rank learns it. Enter it to join; keep it until the ranks leave.

    Parameters
    ----------
    listener : socket.socket, optional
        Rank 0's socket, which listens already, so that ranks that connect before the store serves it wait.
    note : Path, optional
        The file with the address for the other ranks; it is deleted when all have joined.
    kills_others : bool
        Whether the launcher kills all ranks, at once or after a second, when one leaves with a code other than 0.
        mpirun and ``srun --kill-on-bad-exit`` do; torchrun gives the others time to save.
    """

    def __init__(
        self, *, listener: socket.socket | None = None, note: Path | None = None, kills_others: bool = False
    ) -> None:
        self._listener, self._note, self.kills_others = listener, note, kills_others
        self._store: TCPStore | None = None  # kept: the store ends with its last reference

    def __enter__(self) -> Meeting:
        if self._listener is not None:
            self._store = serve(self._listener)
            self._listener = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._note is not None:
            self._note.unlink(missing_ok=True)


def meet(run_directory: Path | None, environ: MutableMapping[str, str] = os.environ) -> Meeting:
    """Put RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT into the environment.

    torchrun has done so already. Where MPI or SLURM started the ranks, rank 0 binds a port and then passes the address
    on, by an MPI broadcast or through a file in the run directory. If MASTER_ADDR and MASTER_PORT are set, they stay.

    Parameters
    ----------
    run_directory : Path, optional
        The run, if every rank knows it.
    environ : MutableMapping[str, str]
        The environment, changed in place.

    Raises
    ------
    PreflightError
        The launcher and the environment contradict each other, or there is no way to pass the address on.
    """
    kind = starter(environ)
    if kind in ("mpi", "slurm"):
        die_with_parent()  # mpirun or slurmstepd; Open MPI's leaves its ranks behind when it is killed
    if kind == "mpi":
        return _meet_by_mpi(environ)
    if kind == "slurm":
        return _meet_by_file(run_directory, environ)
    return Meeting()


def starter(environ: Mapping[str, str]) -> str | None:
    """Return what started this rank: ``environment`` (torchrun, or by hand), ``mpi``, ``slurm``, or None.

    Raises
    ------
    PreflightError
        RANK contradicts WORLD_SIZE, or what mpirun or srun say.
    """
    mpi, slurm = _mpi_numbers(environ), _slurm_numbers(environ)
    if "RANK" in environ:
        own = _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE", default=1)
        if not 0 <= own[0] < own[1]:
            raise PreflightError(f"RANK={own[0]} is not below WORLD_SIZE={own[1]}: unset both, or set both right")
        for name, numbers in (("mpirun", mpi), ("srun", slurm)):
            # Fewer ranks than processes, or another order, is left over from elsewhere, and two processes would take
            # the same rank. More ranks are legitimate: each process has started several.
            if numbers and "TORCHELASTIC_RUN_ID" not in environ and own != numbers and own[1] <= numbers[1]:
                raise PreflightError(
                    f"{name} started this process as rank {numbers[0]} of {numbers[1]}, but its environment has "
                    f"RANK={own[0]} and WORLD_SIZE={own[1]}: unset RANK and WORLD_SIZE before {name}"
                )
        return "environment"
    # mpirun in a SLURM job starts its ranks below a step of its own, whose numbers count nodes. srun itself may set
    # those of PMI, never Open MPI's.
    if mpi and ("OMPI_COMM_WORLD_RANK" in environ or mpi != slurm):
        return "mpi"
    return "slurm" if slurm else None


def _mpi_numbers(environ: Mapping[str, str]) -> tuple[int, int] | None:
    for prefix in ("OMPI_COMM_WORLD_", "PMI_"):
        if f"{prefix}RANK" in environ and f"{prefix}SIZE" in environ:
            return _integer(environ, f"{prefix}RANK"), _integer(environ, f"{prefix}SIZE")
    return None


def _slurm_numbers(environ: Mapping[str, str]) -> tuple[int, int] | None:
    if "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ:
        return None  # without a step this is the batch script, whose variables are those of a first task
    # In the shell of salloc SLURM_NTASKS counts the job's tasks; the step has one.
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    return _integer(environ, "SLURM_PROCID"), _integer(environ, size)


def _integer(environ: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    text = environ.get(name, "" if default is None else str(default))
    if not re.fullmatch(r"\d+", text):
        raise PreflightError(f"{name}={text!r} in the environment must be a number: start the ranks again without it")
    return int(text)


# MPI


def _meet_by_mpi(environ: MutableMapping[str, str]) -> Meeting:
    started = _mpi_numbers(environ)
    assert started is not None
    # MPI has no timeouts and no watchdog runs yet, but some MPI libraries occasionally hang in MPI_Init.
    switch = Deadman(grace_s=1.0, code=ExitCode.HANG, log=sys.stderr)
    switch.hold(WAIT_S)
    try:
        place, address, listener = _agree_by_mpi(started, environ)
    finally:
        switch.close()
    _publish(environ, place, address)
    return Meeting(listener=listener, kills_others=True)


def _agree_by_mpi(
    started: tuple[int, int], environ: Mapping[str, str]
) -> tuple[Place, Address | None, socket.socket | None]:
    """Return this rank's place, the address of rank 0 unless it is set already, and on rank 0 the listening socket."""
    mpi = _import_mpi(started[1])
    world = mpi.COMM_WORLD
    if world.size != started[1]:
        raise PreflightError(
            f"mpirun started {started[1]} ranks, but mpi4py sees a world of {world.size}: it is linked to another MPI "
            f"({mpi.Get_library_version().splitlines()[0].strip()}). Take the mpirun of that one, or point "
            "MPI4PY_LIBMPI to the library of this mpirun"
        )
    node = world.Split_type(mpi.COMM_TYPE_SHARED)
    place = Place(world.rank, world.size, node.rank, node.size)
    listener, message = None, b""
    if not _has_address(environ):
        if place.rank == 0:
            try:
                listener, own = _listen_as_main(place, environ)
                message = own.to_json().encode()
            except PreflightError as error:  # the others wait in the broadcast and must hear of it
                message = str(error).encode()[: _MESSAGE_BYTES // 2]
        buffer = bytearray(message.ljust(_MESSAGE_BYTES))
        world.Bcast([buffer, mpi.BYTE], root=0)
        message = bytes(buffer).strip()
    node.Free()
    mpi.Finalize()  # mpirun would report every rank that ends later without it as aborted
    if message and not message.startswith(b"{"):
        raise PreflightError(f"rank 0 cannot listen: {message.decode(errors='replace')}")
    return place, Address.from_json(message.decode()) if message else None, listener


def _import_mpi(num_ranks: int) -> Any:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise PreflightError(
            f"mpirun started {num_ranks} ranks, and they find each other through mpi4py, which is missing ({error}): "
            "pip install 'anemoi-dist[mpi]'"
        ) from error
    except RuntimeError as error:  # what mpi4py's wheels say without a library
        raise PreflightError(
            f"mpi4py finds no MPI library ({str(error).splitlines()[0]}): load the cluster's MPI module, or point "
            "MPI4PY_LIBMPI to its libmpi.so"
        ) from error
    return MPI


# SLURM


def _meet_by_file(run_directory: Path | None, environ: MutableMapping[str, str]) -> Meeting:
    place = slurm_place(environ)
    if _has_address(environ):
        _publish(environ, place, None)
        return Meeting(kills_others=True)
    if run_directory is None:
        raise PreflightError(
            f"srun started {place.world_size} ranks, which meet through the run directory: give --run-directory, or "
            "set MASTER_ADDR and MASTER_PORT in the batch script"
        )
    note = RunDirectory(run_directory.absolute()).rendezvous_file(step_key(environ))
    if place.rank == 0:
        listener, address = _listen_as_main(place, environ)
        write_atomically(note, address.to_json())
        _publish(environ, place, address)
        return Meeting(listener=listener, note=note, kills_others=True)
    _publish(environ, place, wait_for(note))
    return Meeting(kills_others=True)


def slurm_place(environ: Mapping[str, str]) -> Place:
    """Return the place of a task of a SLURM step."""
    numbers = _slurm_numbers(environ)
    assert numbers is not None
    rank, world_size = numbers
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", str(world_size)))
    counts = [int(count) for count, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks) for _ in range(int(nodes or 1))]
    node = _integer(environ, "SLURM_NODEID", default=0)
    if node >= len(counts):
        raise PreflightError(f"SLURM_NODEID={node} is not among the nodes of SLURM_STEP_TASKS_PER_NODE={tasks!r}")
    return Place(rank, world_size, _integer(environ, "SLURM_LOCALID"), counts[node])


def step_key(environ: Mapping[str, str]) -> str:
    """Return a name that is unique to this start of the ranks: SLURM counts requeues, and within one the steps."""
    names = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    return ".".join(re.sub(r"[^A-Za-z0-9_-]", "_", environ.get(name, "0")) for name in names)


def wait_for(note: Path) -> Address:
    """Return the address that the first process has written.

    Raises
    ------
    PreflightError
        It has written nothing in time.
    """
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        # Listing the directory makes an NFS client ask the server; that a name is missing it would cache.
        if note.parent.is_dir() and note in note.parent.iterdir():
            return Address.from_json(note.read_text(encoding="utf-8"))
        time.sleep(0.05)
    raise PreflightError(
        f"rank 0 has not said within {WAIT_S:.0f} s where it listens ({note}): it has ended, or run.root does not lie "
        "on a file system that all nodes share"
    )


# Addresses


def _has_address(environ: Mapping[str, str]) -> bool:
    return bool(environ.get("MASTER_ADDR")) and bool(environ.get("MASTER_PORT"))


def _publish(environ: MutableMapping[str, str], place: Place, address: Address | None) -> None:
    environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.local_world_size),
    )
    if address is not None:
        environ.update(MASTER_ADDR=address.host, MASTER_PORT=str(address.port))
        environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # torch then connects to the store and starts none itself


def _listen_as_main(place: Place, environ: Mapping[str, str]) -> tuple[socket.socket, Address]:
    """Listen as rank 0; on loopback if all ranks are on one node, so that no other machine can connect."""
    host = environ.get("MASTER_ADDR") or (_LOOPBACK if place.is_one_node else own_address(environ))
    return listen(host, num_callers=place.world_size)


def listen(host: str, *, num_callers: int) -> tuple[socket.socket, Address]:
    """Bind a free port of ``host`` for the lifetime of this process; return the socket and the address.

    Raises
    ------
    PreflightError
        The address is not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind(address)
        listener.listen(min(num_callers + 16, 4096))
    except OSError as error:
        raise PreflightError(
            f"cannot listen on {host} ({error}): name the right address by MASTER_ADDR, or the interface by "
            "GLOO_SOCKET_IFNAME"
        ) from error
    bound, port = listener.getsockname()[:2]
    return listener, Address(bound, port)


def serve(listener: socket.socket) -> TCPStore:
    """Return a store that takes over a listening socket, so that no other process can take the port in between."""
    from torch.distributed import TCPStore

    host, port = listener.getsockname()[:2]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def own_address(environ: Mapping[str, str]) -> str:
    """Return an address of this node that other nodes reach.

    In this order: the address of the interface that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names, that of this
    host's name, and that of the interface with the default route.

    Raises
    ------
    PreflightError
        There is no such address.
    """
    for name in (environ.get("GLOO_SOCKET_IFNAME"), environ.get("NCCL_SOCKET_IFNAME", "")):
        interface = (name or "").split(",")[0].lstrip("=")
        if interface and not interface.startswith("^"):
            return _address_of(interface)
    named = _addresses_of_this_host()
    if reachable := [address for address in named if not ipaddress.ip_address(address).is_loopback]:
        return reachable[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unconnected:
        try:
            unconnected.connect(("10.255.255.255", 9))  # sends nothing: the kernel only chooses the interface
            return unconnected.getsockname()[0]
        except OSError:
            pass
    if named:
        return named[0]  # a cluster whose nodes all run on one machine
    raise PreflightError(
        f"host {socket.gethostname()} has no address that other nodes could reach: set GLOO_SOCKET_IFNAME or "
        "MASTER_ADDR"
    )


def _addresses_of_this_host() -> list[str]:
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, family=socket.AF_INET, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [str(address[0]) for *_, address in found]


def _address_of(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            request = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)[20:24])
        except OSError as error:
            present = ", ".join(name for _, name in socket.if_nameindex())
            raise PreflightError(
                f"interface {interface} has no IPv4 address ({error}); GLOO_SOCKET_IFNAME must name one of: {present}"
            ) from error
