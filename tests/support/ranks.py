"""Real processes for tests: a pool of gloo ranks that runs functions collectively, started once for many tests."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from anemoi_dist.distributed.world import World
from support.forked import start_server
from support.waiting import PATIENCE_S

#: How long the others are waited for where one has raised: they may be waiting for it.
GRACE_S = 10


class RankError(AssertionError):
    """A rank raised; the message holds every rank's traceback."""


class RankPool:
    """``num_ranks`` processes that have joined one gloo process group on loopback."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = start_server()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, num_ranks, self._store.port), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``function(world, *args)`` on every rank and return the results in rank order."""
        for pipe in self._pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        silent = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while silent and (ready := wait(list(silent), GRACE_S if failures else PATIENCE_S)):
            for pipe in ready:
                rank = silent.pop(pipe)
                try:
                    ok, value = pipe.recv()
                except (EOFError, OSError):
                    ok, value = False, f"--- rank {rank} has died ---"
                (results if ok else failures)[rank] = value
        if failures or silent:
            self.kill()  # the ranks may be out of step now
            missing = [f"--- rank {rank} gave no answer ---" for rank in silent.values()]
            raise RankError("\n".join([*failures.values(), *missing]))
        return [results[rank] for rank in range(self.num_ranks)]

    @property
    def is_alive(self) -> bool:
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        """Let the ranks leave and end as any process does; only then has coverage.py written what it saw of them."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(PATIENCE_S)
        self.kill()

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes.clear()


def _serve(pipe: Connection, rank: int, num_ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage whenever it builds an engine, and would look at all that is imported
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # connect to the pool's store, start none
        CUDA_VISIBLE_DEVICES="",
    )
    world = World.join(timeout_s=timedelta(seconds=PATIENCE_S).total_seconds())
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            world.leave()
            return
        try:
            pipe.send((True, function(world, *args)))
        except Exception:
            pipe.send((False, f"--- rank {rank} ---\n{traceback.format_exc()}"))
