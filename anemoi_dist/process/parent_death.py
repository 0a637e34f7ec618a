"""Processes that end with the one that started them, and the identity of a process. No torch: both sides use it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

#: Environment variable with the pid of the process that started this one; getppid may be asked too late for it.
PARENT_PID = "ANEMOI_DIST_PARENT_PID"
_PR_SET_PDEATHSIG = 1


def die_with_parent(*, parent_pid: int | None = None, number: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to send ``number`` to this process when its parent ends (Linux), and leave if it has ended.

    A torchrun agent that is killed with SIGKILL leaves its workers behind, holding GPUs and ports.

    Parameters
    ----------
    parent_pid : int, optional
        The process that started this one. By default the present parent, and then one that has ended is not noticed.
    number : signal.Signals
        The signal.
    """
    if sys.platform != "linux":
        return
    expected = os.getppid() if parent_pid is None else parent_pid
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, number) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The parent may have ended before the call above, and then no signal ever comes.
    if os.getppid() != expected:
        os.kill(os.getpid(), number)


def parent_in_environment() -> int | None:
    """Return the pid in :data:`PARENT_PID`, or None if it is not set."""
    text = os.environ.get(PARENT_PID, "")
    return int(text) if text.isdigit() else None


def process_started(pid: int) -> int | None:
    """Return the start of a process of this machine in clock ticks since boot, or None if there is no such process.

    The kernel reuses pids: only pid and start together identify a process.
    """
    try:
        text = Path("/proc", str(pid), "stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the program's name before it may hold spaces and parentheses
    return None if fields[0] == "Z" else int(fields[19])


def main(arguments: list[str]) -> None:
    """Replace this process by a command, which gets SIGTERM when the process that started this one ends."""
    die_with_parent(parent_pid=parent_in_environment(), number=signal.SIGTERM)
    os.execvp(arguments[0], arguments)  # noqa: S606 - exec keeps the death signal


if __name__ == "__main__":
    main(sys.argv[1:])
