"""A dead man's switch: unless it is held, the process dumps its stacks and ends, even if C code holds the GIL.

A Python thread can do nothing while C code holds the GIL. The two threads that act here are C threads: that of
faulthandler, which writes the stacks, and that of a timer of the C library, which calls ``_exit``.
"""

from __future__ import annotations

import ctypes
import faulthandler
import sys
from contextlib import suppress
from typing import IO

_CLOCK_MONOTONIC = 1
_SIGEV_THREAD = 2


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))

    @classmethod
    def of(cls, seconds: float) -> _TimeSpec:
        return cls(int(seconds), int(seconds % 1 * 1e9))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", _TimeSpec), ("value", _TimeSpec))


class _SigEvent(ctypes.Structure):
    """``struct sigevent`` of Linux with the members that SIGEV_THREAD uses."""

    _fields_ = (
        ("argument", ctypes.c_size_t),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    )


class Deadman:
    """Ends the process unless :meth:`hold` is called again in time.

    Parameters
    ----------
    grace_s : float
        Seconds from the stacks to the end.
    code : int
        Exit code. Without such a timer (not Linux, or an old glibc) faulthandler ends the process, with code 1.
    log : IO
        Destination of the stacks; it has a file descriptor and stays open.
    """

    def __init__(self, *, grace_s: float, code: int, log: IO[str]) -> None:
        self._grace_s, self._log = grace_s, log
        self._timer = _exit_timer(code)

    def hold(self, seconds: float) -> None:
        """Restart the countdown: without another call the stacks of all threads are written after ``seconds``."""
        # The exit first: if writing the stacks hangs, on a full or lost file system, the process still ends.
        if self._timer is not None:
            _set_timer(self._timer, seconds + self._grace_s)
        with suppress(RuntimeError):  # no thread can be started: the process then ends without its stacks
            faulthandler.dump_traceback_later(seconds, exit=self._timer is None, file=self._log)

    def close(self) -> None:
        """Stop the countdown."""
        if self._timer is not None:
            _set_timer(self._timer, 0.0)
        faulthandler.cancel_dump_traceback_later()


def _exit_timer(code: int) -> ctypes.c_void_p | None:
    """Return a timer of the C library, not armed yet, that calls ``_exit(code)``; None if there is no such timer."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "timer_create"):
        return None  # before glibc 2.34 it was in librt, which this process may not have loaded
    event = _SigEvent(
        argument=code, notify=_SIGEV_THREAD, function=ctypes.cast(libc._exit, ctypes.c_void_p), attributes=None
    )
    timer = ctypes.c_void_p()
    created = libc.timer_create(ctypes.c_int(_CLOCK_MONOTONIC), ctypes.byref(event), ctypes.byref(timer))
    return timer if created == 0 else None


def _set_timer(timer: ctypes.c_void_p, seconds: float) -> None:
    spec = _TimerSpec(_TimeSpec(), _TimeSpec.of(seconds))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.timer_settime(timer, ctypes.c_int(0), ctypes.byref(spec), None) != 0:
        raise OSError(ctypes.get_errno(), "timer_settime failed")
