"""A process that has imported what takes seconds, and forks a child for each script that needs one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

# The child runs its script and then leaves the loop: it ends as any interpreter does.
SERVER = """
import json, os, sys
import torch
from anemoi_dist.data import anemoi, loader
while line := sys.stdin.buffer.raw.readline():
    request = json.loads(line)
    if "wait" in request:
        print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
    elif child := os.fork():
        print(child, flush=True)
    else:
        for number, path in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
            os.dup2(os.open(path, os.O_RDWR if number == 0 else os.O_WRONLY | os.O_CREAT, 0o600), number)
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        exec(compile(request["script"], "<script>", "exec"), {"__name__": "__main__"})
        break
"""


class WarmInterpreter:
    """Runs scripts in interpreters that have imported torch and the data loader."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")

    def start(self, script: str, *, folder: Path | None = None, **environment: str) -> Script:
        """Begin to run ``script`` in ``folder``."""
        place = Path(tempfile.mkdtemp(dir=self._folder.name))
        os.mkfifo(place / "stdout")
        request = {"script": script, "stdout": str(place / "stdout"), "stderr": str(place / "stderr")}
        pid = self._ask(**request, environment=environment, folder=str(folder or place))
        return Script(self, place, pid)

    def run(self, script: str, *, folder: Path | None = None, **environment: str) -> SimpleNamespace:
        """Run ``script``; return what ``subprocess.run`` would."""
        return self.start(script, folder=folder, **environment).wait()

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()
        self._folder.cleanup()

    def _ask(self, **request: object) -> int:
        self._server.stdin.write(json.dumps(request) + "\n")
        return int(self._server.stdout.readline())


class Script:
    """One child of a :class:`WarmInterpreter`."""

    def __init__(self, interpreter: WarmInterpreter, place: Path, pid: int) -> None:
        self._interpreter, self._place, self.pid = interpreter, place, pid
        self.stdout = (place / "stdout").open()

    def wait(self) -> SimpleNamespace:
        """Wait for the end; ``returncode``, ``stdout`` (what has not been read) and ``stderr``."""
        returncode = self._interpreter._ask(wait=self.pid)
        with self.stdout:
            return SimpleNamespace(
                returncode=returncode, stdout=self.stdout.read(), stderr=(self._place / "stderr").read_text()
            )
