"""Commands of SLURM's names that answer what a test says, and note what they were asked."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest


class FakeSlurm:
    """A folder at the front of PATH; ``answer`` puts a command into it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        for name in ("squeue", "sacct", "scancel", "scontrol"):
            script = folder / name
            # Written once: the kernel runs no file that is being written, by a thread that answers anew, say.
            script.write_text('#!/bin/sh\nprintf "%s\\n" "$0 $*" >>"${0%/*}/asked"\n. "$0.answer"\n')
            script.chmod(0o755)
            self.answer(name, errors=f"{name} was not expected", code=99)

    def answer(self, name: str, output: str = "", *, errors: str = "", code: int = 0, sleep_s: float = 0) -> None:
        """Let a command answer so from now on."""
        new = self.folder / f"{name}.new"
        new.write_text(
            f"[ {sleep_s} = 0 ] || exec sleep {sleep_s}\n"
            f"printf %s {shlex.quote(output)}\n"
            f"printf %s {shlex.quote(errors)} >&2\n"
            f"exit {code}\n"
        )
        new.replace(self.folder / f"{name}.answer")

    def asked(self) -> list[list[str]]:
        """Return the commands run so far, in words."""
        try:
            lines = (self.folder / "asked").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [[Path(words[0]).name, *words[1:]] for words in (line.split() for line in lines)]


def squeue_line(job_id: str, state: str, *, reason: str = "None", restarts: int = 0, nodes: str = "", **more) -> str:
    """Return a line as squeue prints it for the fields of ``launch/status/slurm_queue.py``."""
    fields = {"array": job_id, "start": "N/A", "end": "N/A", "status": 0, **more}
    values = (job_id, fields["array"], state, reason, restarts, fields["start"], fields["end"], nodes, fields["status"])
    return "|".join(map(str, values)) + "|\n"
