"""The world of a rank: its device, its process groups, and its random seeds."""

from __future__ import annotations

import ctypes
import hashlib
import os
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from anemoi_dist.errors import PreflightError
from anemoi_dist.process.limits import raise_open_files

#: Parameters of glibc's mallopt: how many allocations get a mapping of their own, and how many free bytes at the end
#: of the heap are returned to the system.
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1


class World:
    """The place of one rank among all ranks, and the groups it talks through.

    Attributes
    ----------
    rank, world_size, local_rank : int
        As in the environment that the rendezvous has set.
    device : torch.device
        ``cuda:<local_rank>`` if there are GPUs, else the CPU.
    control_group : dist.ProcessGroup
        gloo on the CPU, for the control word and for text: it neither waits for the GPU nor delays it.
    """

    def __init__(self, *, rank: int, world_size: int, local_rank: int, device: torch.device) -> None:
        self.rank, self.world_size, self.local_rank, self.device = rank, world_size, local_rank, device
        self.control_group = dist.new_group(backend="gloo")

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes what is written once."""
        return self.rank == 0

    @classmethod
    def join(cls, *, timeout_s: float = 1800.0) -> World:
        """Join the process group that the environment describes, or a group of this process alone if it describes none.

        Raises
        ------
        PreflightError
            More ranks than GPUs on this machine, or than it has connections for.
        """
        alone = "RANK" not in os.environ
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        raise_open_files(world_size)
        device = torch.device("cpu")
        if torch.cuda.is_available():
            if local_rank >= torch.cuda.device_count():
                raise PreflightError(
                    f"local rank {local_rank} has no GPU: this machine shows {torch.cuda.device_count()}. "
                    "Start at most one rank a GPU (--nproc-per-node)."
                )
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        else:
            keep_freed_memory()
        try:
            cls._init_process_group(device, alone=alone, timeout_s=timeout_s)
        except (ValueError, RuntimeError) as error:  # dist.DistError is a RuntimeError
            raise PreflightError(
                f"rank {rank} of {world_size} cannot join the others: {error}. Start ranks with torchrun, or set RANK, "
                "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
            ) from error
        return cls(rank=rank, world_size=world_size, local_rank=local_rank, device=device)

    @staticmethod
    def _init_process_group(device: torch.device, *, alone: bool, timeout_s: float) -> None:
        backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout_s)
        if alone:
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")  # DeepSpeed reads these nevertheless
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        else:
            # With a device NCCL connects now: a failure shows here, and the first step is not the slow one.
            dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)

    def broadcast_text(self, text: str | None) -> str:
        """Return rank 0's ``text`` on every rank. JSON goes through here; nothing is pickled."""
        length = torch.zeros(1, dtype=torch.int64)
        payload = torch.empty(0, dtype=torch.uint8)
        if self.is_main:
            assert text is not None, "rank 0 has the text"
            payload = torch.frombuffer(bytearray(text.encode("utf-8")) or bytearray(1), dtype=torch.uint8)
            length[0] = len(text.encode("utf-8"))
        dist.broadcast(length, src=0, group=self.control_group)
        if not self.is_main:
            payload = torch.empty(max(int(length), 1), dtype=torch.uint8)
        dist.broadcast(payload, src=0, group=self.control_group)
        return payload[: int(length)].numpy().tobytes().decode("utf-8")

    def gather_text(self, text: str) -> list[str]:
        """Return every rank's ``text`` on rank 0, an empty list elsewhere."""
        payload = torch.frombuffer(bytearray(text.encode("utf-8")) or bytearray(1), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        own = torch.tensor([len(text.encode("utf-8"))])
        # gather needs tensors of one shape, so all are padded to the longest.
        dist.all_gather(lengths, own, group=self.control_group)
        longest = max(1, *(int(length) for length in lengths))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(payload)] = payload
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world_size)] if self.is_main else None
        dist.gather(padded, texts, dst=0, group=self.control_group)
        if texts is None:
            return []
        return [t[: int(n)].numpy().tobytes().decode("utf-8") for t, n in zip(texts, lengths, strict=True)]

    def num_collectives(self) -> int:
        """Return how many collective operations this rank has begun, in all groups."""
        total = 0
        for group in list(_world.pg_map):
            with suppress(RuntimeError):  # a backend that does not count
                total += group._get_sequence_number_for_group()  # type: ignore[attr-defined]
        return total

    def extend_collective_timeouts(self, seconds: float | None) -> None:
        """Give collectives of all existing groups a timeout longer than ``seconds``; None leaves them as they are.

        The watchdog should end a run that hangs, because it knows which rank is to blame. A group's own timeout, 10
        minutes with NCCL and 30 with gloo, would end it first, as an internal error.
        """
        if seconds is None:
            return
        for group in list(_world.pg_map):
            _set_pg_timeout(timedelta(seconds=1.5 * seconds + 120.0), group)

    def leave(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, as torch's CUDA allocator does; return whether it can.

    Gradients and activations are freed and allocated again in every step. By default glibc returns large blocks to the
    system at once, and touching a fresh page costs more than the arithmetic on it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries than glibc have none
    if mallopt is None:
        return False
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1)])


def seed_step(seed: int, *, step: int, rank: int) -> None:
    """Seed torch for one optimizer step on one rank.

    Dropout and noise are then functions of (seed, step, rank), as the sample order and the learning rate are: a resumed
    run needs no saved random state.
    """
    digest = hashlib.blake2b(f"{seed}:{step}:{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
