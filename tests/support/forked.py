"""Ranks of the product, forked from a process that has imported torch: for tests that start ranks and need no launcher.

They are processes like any other: they train, hang and are killed. Only their imports have been paid before, once.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch.distributed as dist

from support.waiting import PATIENCE_S

#: There is one such server in a process, and one list of what it imports.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["support.preloaded"])


@dataclass
class Ended:
    """What became of ranks.

    Attributes
    ----------
    codes : list of int
        By rank; negative: the signal that killed it.
    output : str
        What they printed, together.
    left : int
        How many had to be killed after the first had failed.
    """

    codes: list[int]
    output: str
    left: int


def run_ranks(module: str, arguments: Sequence[str], *, num_ranks: int, output: Path, **environ: str) -> Ended:
    """Run ``python -m module`` on ranks that meet in a store of this process; wait until the last has ended.

    As under a launcher the others are killed some time after one has failed.
    """
    context = start_server()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # connect to this store, start none
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        **environ,
    }
    ranks = []
    for rank in range(num_ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **place}
        process = context.Process(target=_run_module, args=(module, [*arguments], own, str(output)))
        process.start()
        ranks.append(process)
    deadline, failed_at = time.monotonic() + PATIENCE_S, None
    while any(process.exitcode is None for process in ranks):
        if failed_at is None and any(process.exitcode for process in ranks):
            failed_at = time.monotonic()
        if time.monotonic() > deadline or (failed_at is not None and time.monotonic() > failed_at + 60):
            break
        time.sleep(0.05)
    left = [process for process in ranks if process.exitcode is None]
    for process in left:
        process.kill()
        process.join()
    return Ended([process.exitcode or 0 for process in ranks], output.read_text(), len(left))


def start_server() -> ForkServerContext:
    """Start what ranks are forked from, where it does not run yet; return what starts processes by it."""
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server passes over what it cannot import
    multiprocessing.forkserver.ensure_running()
    del os.environ["PYTHONPATH"]
    if path is not None:
        os.environ["PYTHONPATH"] = path
    return _CONTEXT


def _run_module(module: str, arguments: Sequence[str], environ: Mapping[str, str], output: str) -> None:
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ.update(environ)
    import importlib

    code = importlib.import_module(module).main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
