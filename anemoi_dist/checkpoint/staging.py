"""Staging of a checkpoint in host memory, so that training continues while it is written."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from anemoi_dist.checkpoint.ranks import Ranks
from anemoi_dist.checkpoint.shard import Shard
from anemoi_dist.errors import PreflightError

#: Copies begin at multiples of this: a view of the buffer in any type needs its item size, and memcpy likes 16.
_ALIGNMENT_BYTES = 16
_GIB = 1024**3
_CGROUP = Path("/sys/fs/cgroup")


class Staging:
    """A buffer that is allocated once; for shards on a GPU it is pinned, and filled on a stream of its own.

    Parameters
    ----------
    shards : Iterable[Shard]
        The shards of a save; only their sizes count.
    device : torch.device
        Device of the shards.
    """

    def __init__(self, shards: Iterable[Shard], *, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._grow(required_bytes(shards))

    @property
    def size_bytes(self) -> int:
        """Bytes held."""
        return self._buffer.numel()

    def copy(self, shards: Iterable[Shard]) -> list[Shard]:
        """Return the shards as copies in the buffer, which a later copy overwrites.

        Raises
        ------
        MemoryError
            The shards have grown (an optimizer that makes its states at its first step) and memory has not.
        """
        held = list(shards)
        self._grow(required_bytes(held))
        if self._stream is None:
            return self._fill(held)
        # The step's kernels may still be writing the parameters. Waiting on the stream, not on the device, copies as
        # soon as they are done, and leaves what other streams do (NCCL) alone.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            staged = self._fill(held)
        # The next step overwrites the parameters: until the copies are complete it must not begin.
        self._stream.synchronize()
        return staged

    def _fill(self, shards: Sequence[Shard]) -> list[Shard]:
        staged, offset = [], 0
        for shard in shards:
            copy = self._buffer[offset : offset + shard.tensor.nbytes].view(shard.tensor.dtype)
            copy.copy_(shard.tensor.detach(), non_blocking=True)
            staged.append(replace(shard, tensor=copy))
            offset += _aligned(shard.tensor.nbytes)
        return staged

    def _grow(self, size_bytes: int) -> None:
        if size_bytes <= self.size_bytes:
            return
        self._unpin()
        # Free the old buffer before allocating the new one: a host that fits one copy of the state may not fit two.
        self._buffer = torch.empty(0, dtype=torch.uint8)
        try:
            # Filled: Linux hands out pages when they are touched, and an untouched buffer would meet the out-of-memory
            # killer in the middle of a save instead of an error here.
            self._buffer = torch.zeros(size_bytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise MemoryError(f"{size_bytes} bytes to stage a checkpoint in cannot be allocated") from error
        if self._stream is not None:
            # Not torch's pinned allocator: it rounds up to the next power of two, up to twice the memory.
            code = int(torch.cuda.cudart().cudaHostRegister(self._buffer.data_ptr(), size_bytes, 1))
            if code != 0:
                raise MemoryError(f"{size_bytes} bytes to stage a checkpoint in cannot be pinned (CUDA error {code})")

    def _unpin(self) -> None:
        if self._stream is not None and self.size_bytes:
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())


def required_bytes(shards: Iterable[Shard]) -> int:
    """Return the bytes that copies of the shards take."""
    return sum(_aligned(shard.tensor.nbytes) for shard in shards)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def check_host_memory(size_bytes: int, *, world: Ranks) -> None:
    """Refuse to stage more than the memory of some machine holds. Collective.

    Parameters
    ----------
    size_bytes : int
        Bytes that this rank is going to allocate.
    world : Ranks
        The ranks that stage; those on one machine share its memory.

    Raises
    ------
    PreflightError
        On every rank, with the figures of the machines that are too small.
    """
    # Measured on every rank and summed by host: a rank alone does not see what its neighbours are about to allocate.
    own = _HostMemory(socket.gethostname(), required_bytes=size_bytes, available_bytes=available_bytes())
    reports = [_HostMemory(**json.loads(text)) for text in world.gather_text(json.dumps(asdict(own)))]
    problem = world.broadcast_text(_too_small(reports) if world.is_main else None)
    if problem:
        raise PreflightError(problem)


@dataclass(frozen=True)
class _HostMemory:
    """Bytes that one rank needs, and that its host has to give."""

    host: str
    required_bytes: int
    available_bytes: int


def _too_small(reports: Iterable[_HostMemory]) -> str:
    hosts: dict[str, list[_HostMemory]] = {}
    for report in reports:
        hosts.setdefault(report.host, []).append(report)
    lines = []
    for host, ranks in sorted(hosts.items()):
        # The minimum: the ranks measure one after the other, and each may sit in a control group of its own.
        required, available = sum(r.required_bytes for r in ranks), min(r.available_bytes for r in ranks)
        if required > available:
            lines.append(
                f"{host}: {len(ranks)} ranks need {required / _GIB:.2f} GiB to stage checkpoints in, "
                f"{available / _GIB:.2f} GiB of memory are available"
            )
    if lines:
        lines.append("use more ranks or machines, or write without staging: checkpoint.asynchronous=false")
    return "\n".join(lines)


def available_bytes() -> int:
    """Return the bytes that this machine, and the control group of this process, can still give."""
    available = [_meminfo_bytes("MemAvailable")]
    # Under SLURM or in a container the job's limit, not the machine's memory, is what the kernel kills for.
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
            available.append(int(limit) - used + _reclaimable_bytes())
    except (OSError, ValueError):
        pass  # no control group of version 2
    return max(0, min(available))


def _meminfo_bytes(name: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise PreflightError(f"/proc/meminfo does not say {name}")


def _reclaimable_bytes() -> int:
    """Return the page cache that counts as used in the control group and would be given back."""
    entries = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    return int(entries.get("inactive_file", 0))
