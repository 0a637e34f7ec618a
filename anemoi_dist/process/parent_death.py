"""Processes that end with the one that started them, and how to tell one from another. No torch: both sides use it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

#: In the environment of a process: who started it. Its own look at its parent may come too late.
PARENT_PID = "ANEMOI_DIST_PARENT_PID"
_PR_SET_PDEATHSIG = 1


def die_with_parent(*, parent_pid: int | None = None, number: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to send ``number`` to this process when its parent ends (Linux), and leave if it has ended.

    A torchrun agent that is killed with SIGKILL leaves its workers behind, holding GPUs and ports.

    Parameters
    ----------
    parent_pid : int, optional
        The process that started this one. Without it, whoever is the parent now: one that ended before is not noticed.
    number : signal.Signals
        What to send.
    """
    if sys.platform != "linux":
        return
    expected = os.getppid() if parent_pid is None else parent_pid
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, number) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != expected:
        os.kill(os.getpid(), number)


def parent_in_environment() -> int | None:
    """Return the process that :data:`PARENT_PID` names, None where nobody has set it."""
    text = os.environ.get(PARENT_PID, "")
    return int(text) if text.isdigit() else None


def process_started(pid: int) -> int | None:
    """Return when a process of this machine began, in clock ticks since boot: with it a pid is never taken for another.

    None where there is no such process.
    """
    try:
        text = Path("/proc", str(pid), "stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # a program's name may hold anything
    return None if fields[0] == "Z" else int(fields[19])


def main(arguments: list[str]) -> None:
    """Become the command that the arguments are, which now gets SIGTERM when whoever started this process ends."""
    die_with_parent(parent_pid=parent_in_environment(), number=signal.SIGTERM)
    os.execvp(arguments[0], arguments)  # noqa: S606 - what the kernel was asked for stays asked


if __name__ == "__main__":
    main(sys.argv[1:])
