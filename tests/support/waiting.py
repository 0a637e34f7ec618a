"""Waiting for an event: as long as the slowest machine needs, so that no test asserts seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

#: A machine that is busy with other things may take a hundred times as long as an idle one.
PATIENCE_S = 600.0


def wait_until(condition: Callable[[], object], *, timeout_s: float = PATIENCE_S, every_s: float = 0.05) -> bool:
    """Ask until it holds; return whether it did."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
    return True


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
