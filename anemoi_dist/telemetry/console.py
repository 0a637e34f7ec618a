"""Output of a rank: copies in its log file, and its warnings."""

from __future__ import annotations

import io
import os
import sys
import warnings
from pathlib import Path
from typing import TextIO

from anemoi_dist.process.output import LOSSES, open_log


class LoggedStream(io.TextIOBase):
    """A text stream that also writes into a log.

    Parameters
    ----------
    stream : TextIO
        The original stream.
    log : TextIO
        The log file.
    copies : bool
        Whether everything that is written goes to the log too. False on a terminal: a bar that redraws itself does not
        belong into a log, so only callers that write to ``log`` themselves reach it.
    """

    def __init__(self, stream: TextIO, log: TextIO, *, copies: bool) -> None:
        self.log = log
        self._stream, self._copies = stream, copies

    def write(self, text: str) -> int:  # noqa: D102
        # The log first: if the reader of a pipe is gone, the text is in the log all the same.
        if self._copies:
            self.log.write(text)
        return self._stream.write(text)

    def flush(self) -> None:  # noqa: D102
        self.log.flush()
        self._stream.flush()

    # The progress display, rich and faulthandler ask the stream itself for these.

    def isatty(self) -> bool:  # noqa: D102
        return self._stream.isatty()

    def fileno(self) -> int:  # noqa: D102
        return self._stream.fileno()

    def writable(self) -> bool:  # noqa: D102
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the original stream."""
        return self._stream.encoding


def print_warnings_plainly() -> None:
    """Print warnings of this package, which are the user's to read, without the line of code that they come from."""
    package, python_format = Path(__file__).parents[1], warnings.formatwarning

    def format_warning(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if Path(filename).is_relative_to(package):
            return f"warning: {message}\n"
        return python_format(message, category, filename, lineno, line)

    warnings.formatwarning = format_warning


def keep_log(path: Path) -> None:
    """Copy standard output and standard error of this process into ``path``."""
    log: TextIO = open_log(path)  # type: ignore[assignment] # it has what is used of one
    sys.stdout = LoggedStream(sys.stdout, log, copies=not sys.stdout.isatty())
    # Never a bar: errors and warnings go to both even on a terminal.
    sys.stderr = LoggedStream(sys.stderr, log, copies=True)


def redirect_to_log(path: Path) -> None:
    """Send all output of this process to ``path`` alone; the terminal belongs to rank 0."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:  # a disk without room for another file: the output stays where it went until now
        LOSSES.note(str(path), error)
        return
    # The descriptors, not sys.stdout: NCCL, faulthandler and other C code write there too.
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
