"""What rank 0 prints stands on the terminal and in its log file."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TextIO


class LoggedStream(io.TextIOBase):
    """A text stream that also writes into a log.

    Parameters
    ----------
    stream : TextIO
        Where text went before.
    log : TextIO
        The log. A bar that redraws itself does not belong in it: where ``copies`` is false, only who asks for ``log``
        writes there.
    copies : bool
        Whether everything is written to both.
    """

    def __init__(self, stream: TextIO, log: TextIO, *, copies: bool) -> None:
        self.log = log
        self._stream, self._copies = stream, copies

    def write(self, text: str) -> int:  # noqa: D102
        if self._copies:
            self.log.write(text)
        return self._stream.write(text)

    def flush(self) -> None:  # noqa: D102
        self.log.flush()
        self._stream.flush()

    def isatty(self) -> bool:  # noqa: D102
        return self._stream.isatty()

    def fileno(self) -> int:  # noqa: D102
        return self._stream.fileno()

    def writable(self) -> bool:  # noqa: D102
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream."""
        return self._stream.encoding


def keep_log(path: Path) -> None:
    """Write standard output and standard error of this process into ``path`` too."""
    log = path.open("a", buffering=1, encoding="utf-8")
    sys.stdout = LoggedStream(sys.stdout, log, copies=not sys.stdout.isatty())
    sys.stderr = LoggedStream(sys.stderr, log, copies=True)
