"""Output that never ends a process: standard streams, logs, events, metrics.

A disk fills up, the reader of a pipe goes away, a terminal is closed. What cannot be written is counted and reported
once (:data:`LOSSES`); the next line that can be written begins on a line of its own.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

from anemoi_dist.errors import print_message

STANDARD_STREAMS = {"stdout": (1, "standard output"), "stderr": (2, "standard error")}


class Losses:
    """Counts of what could not be written, by destination.

    A destination that fails is reported on standard error, and again only after it has worked in between.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._reasons: dict[str, str] = {}
        self._failing: set[str] = set()
        self._reporting = threading.local()

    def note(self, what: str, error: OSError, *, count: int = 1) -> None:
        """Count ``count`` lines, events or points of ``what`` as lost."""
        # Standard error may be what cannot be written: the report of that is no further loss.
        if getattr(self._reporting, "is_active", False):
            return
        self._counts[what] = self._counts.get(what, 0) + count
        self._reasons[what] = error.strerror or str(error)
        if what in self._failing:
            return
        self._failing.add(what)
        self._reporting.is_active = True
        try:
            print_message(f"{what} cannot be written ({self._reasons[what]}); the process goes on without")
        finally:
            self._reporting.is_active = False

    def end(self, what: str) -> None:
        """Note that ``what`` could be written again."""
        self._failing.discard(what)

    def take(self, *, failing: bool = False) -> list[dict[str, Any]]:
        """Return the losses of every destination that works again, or with ``failing`` of all, and forget them."""
        chosen = [what for what in self._counts if failing or what not in self._failing]
        return [
            {"what": what, "count": self._counts.pop(what), "reason": self._reasons.pop(what, "")} for what in chosen
        ]

    def put_back(self, losses: list[dict[str, Any]]) -> None:
        """Count again what :meth:`take` has returned and nobody could write."""
        for loss in losses:
            self._counts[loss["what"]] = self._counts.get(loss["what"], 0) + loss["count"]
            self._reasons.setdefault(loss["what"], loss["reason"])


#: The losses of this process.
LOSSES = Losses()


class AppendedFile:
    """Appends lines to a file or to an open descriptor, and never raises ``OSError``.

    Parameters
    ----------
    what : str
        Name of the destination in :data:`LOSSES`.
    path : Path, optional
        The file. If it cannot be opened, every write tries again. A torn last line of a killed process is ended.
    descriptor : int, optional
        An open descriptor, which stays open.
    marks_gaps : bool
        Write a line that says how many are missing, where they are missing.
    """

    def __init__(self, what: str, *, path: Path | None = None, descriptor: int = -1, marks_gaps: bool = False) -> None:
        self._what, self._path, self._descriptor, self._marks_gaps = what, path, descriptor, marks_gaps
        self._is_torn, self._num_lost, self._reason = False, 0, ""
        self._is_closed = False
        try:
            self._open()
        except OSError as error:
            self._lose(error, 0)

    def append(self, data: bytes) -> bool:
        """Append ``data``, whole lines as a rule, with a single write; return whether all of it was written."""
        if self._is_closed:
            return False
        gap = f"[{self._num_lost} lines are missing here: {self._reason}]\n".encode()
        before = b"\n" * self._is_torn + gap * (self._marks_gaps and self._num_lost > 0)
        whole = before + data
        written = 0
        try:
            descriptor = self._open()
            # One write as a rule: lines of two processes that append to one file never mix.
            while written < len(whole):
                written += os.write(descriptor, whole[written:])
        except OSError as error:
            # Even a torn line is kept apart from the next.
            self._is_torn = self._is_torn if written == 0 else not whole[:written].endswith(b"\n")
            self._lose(error, max(1, whole[max(written, len(before)) :].count(b"\n")))
            return False
        self._is_torn, self._num_lost = False, 0
        LOSSES.end(self._what)
        return True

    def fileno(self) -> int:
        """Return the descriptor, that of standard error if the file cannot be opened."""
        return self._descriptor if self._descriptor >= 0 else 2

    def close(self) -> None:
        """Close the file; a second call does nothing, and nothing is written after it."""
        self._is_closed = True
        if self._path is not None and self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> int:
        if self._descriptor < 0 and self._path is not None:
            # O_APPEND: what several processes write goes to the end, whatever the others have written meanwhile.
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            size = os.fstat(self._descriptor).st_size
            self._is_torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"
        return self._descriptor

    def _lose(self, error: OSError, count: int) -> None:
        self._num_lost += count
        self._reason = error.strerror or str(error)
        LOSSES.note(self._what, error, count=count)


class Output(io.TextIOBase):
    """A text stream on an :class:`AppendedFile`: whole lines at once, the rest when it is flushed.

    Parameters
    ----------
    file : AppendedFile
        The destination.
    original : TextIO, optional
        The stream that this one replaces; it answers for whatever a file has no name for.
    """

    def __init__(self, file: AppendedFile, original: TextIO | None = None) -> None:
        self._file, self._original = file, original
        # A line begun by one thread is not continued by another, and no lock is held when a process forks.
        self._begun = threading.local()

    def write(self, text: str) -> int:  # noqa: D102
        lines, newline, rest = (getattr(self._begun, "text", "") + text).rpartition("\n")
        self._begun.text = rest
        if newline:
            self._append(lines + newline)
        return len(text)

    def flush(self) -> None:  # noqa: D102
        begun, self._begun.text = getattr(self._begun, "text", ""), ""
        if begun:
            self._append(begun)

    def _append(self, text: str) -> None:
        self._file.append(text.encode(self.encoding, errors="backslashreplace"))

    def fileno(self) -> int:  # noqa: D102
        return self._file.fileno()

    def isatty(self) -> bool:  # noqa: D102
        return os.isatty(self.fileno())

    def writable(self) -> bool:  # noqa: D102
        return True

    def close(self) -> None:
        """Close the destination, unless it is a descriptor that belongs to the process."""
        self.flush()
        self._file.close()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the original stream."""
        return getattr(self._original, "encoding", None) or "utf-8"

    def __getattr__(self, name: str) -> Any:
        if name == "_original" or self._original is None:
            raise AttributeError(name)
        return getattr(self._original, name)


def open_log(path: Path) -> Output:
    """Return a stream that appends to a log file, also to one that cannot be opened yet."""
    return Output(AppendedFile(str(path), path=path, marks_gaps=True))


def fill_descriptors() -> None:
    """Open the null device as whichever of the descriptors 0, 1 and 2 is closed.

    The next file that the process opens would otherwise be its standard output, and that of its children.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            os.dup2(opened, number)  # inheritable, unlike what open returns
            if opened == number:
                os.set_inheritable(number, True)
            else:
                os.close(opened)


def protect_output() -> None:
    """Make the standard streams of this process such that writing to them never raises ``OSError``."""
    fill_descriptors()
    for name, (number, what) in STANDARD_STREAMS.items():
        stream = getattr(sys, name)
        if isinstance(stream, Output) or not _is_descriptor(stream, number):
            continue
        setattr(sys, name, Output(AppendedFile(what, descriptor=number, marks_gaps=True), stream))


def write_to_descriptor(number: int, data: bytes) -> None:
    """Write from a signal handler, which may have interrupted a print."""
    try:
        os.write(number, data)
    except OSError as error:
        LOSSES.note(next(what for known, what in STANDARD_STREAMS.values() if known == number), error)


def _is_descriptor(stream: TextIO | None, number: int) -> bool:
    if stream is None:
        return True
    try:
        stream.flush()
        return stream.fileno() == number
    except (OSError, ValueError):  # a test's capture has no descriptor, and can be written
        return False
