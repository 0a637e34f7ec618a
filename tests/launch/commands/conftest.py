from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from types import SimpleNamespace

import pytest

from anemoi_dist.launch.launchers import model_size
from anemoi_dist.preflight import model_size as measured


@pytest.fixture
def measured_here(monkeypatch):
    """The process that measures is this one: it has imported torch already."""

    def run(command, *, input, env, timeout, **more):
        assert command == [sys.executable, "-m", "anemoi_dist.preflight.model_size"] and timeout > 0
        answer, errors = io.StringIO(), io.StringIO()
        answer.close = lambda: None
        monkeypatch.setattr(sys, "stdin", io.StringIO(input))
        streams = {"dup": lambda number: number, "dup2": lambda number, other: other, "fdopen": lambda *_: answer}
        monkeypatch.setattr(measured, "os", SimpleNamespace(**streams))
        with contextlib.redirect_stderr(errors):
            code = measured.main()
        return subprocess.CompletedProcess(command, code, answer.getvalue(), errors.getvalue())

    here = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(model_size, "subprocess", here)
