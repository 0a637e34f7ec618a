from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support.many_runs import attempt, make_run, write_beat, write_launch
from support.saving import save_values

from anemoi_dist.checkpoint.store import open_store
from anemoi_dist.launch.cli import main
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.lock import hold_launch


@pytest.fixture
def ended(tmp_path: Path) -> RunDirectory:
    run = make_run(tmp_path, "r", state={"state": "finished", "attempts": [attempt(started=300, code=0)]})
    write_launch(run, {"event": "end", "code": 0})
    for step in (5, 10):
        save_values(open_store(run, None), step=step, values=torch.arange(3.0))
    make_run(tmp_path, "other")
    return run


class Terminal:
    def __init__(self, answer: str) -> None:
        self.answer = answer

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return self.answer + "\n"


def remove(run: RunDirectory, *arguments: str) -> int:
    return main(["remove", run.run_id, "--root", str(run.path.parent), *arguments])


def test_what_is_asked_for_is_deleted_and_nothing_else(ended: RunDirectory, capsys) -> None:
    assert remove(ended, "--yes") == 0
    assert not ended.path.exists() and [path.name for path in ended.path.parent.iterdir()] == ["other"]
    assert "is deleted: " in capsys.readouterr().out


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("Yes", 0), ("", 130), ("n", 130)])
def test_a_person_is_asked(ended: RunDirectory, monkeypatch, capsys, answer: str, code: int) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert remove(ended) == code
    assert ended.path.exists() == (code != 0)
    assert "checkpoints of steps 5 to 10? [y/N]" in capsys.readouterr().out


def test_where_nobody_can_be_asked_nothing_is_deleted(ended: RunDirectory, monkeypatch, capsys) -> None:
    with Path("/dev/null").open() as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        assert remove(ended) == 2
    assert "--yes deletes without asking" in capsys.readouterr().err and ended.path.exists()


def test_a_run_that_is_not_over_is_refused(tmp_path: Path, capsys) -> None:
    state = {"state": "running", "owner": None, "attempts": [attempt(started=300)]}
    run = make_run(tmp_path, "r", state=state)
    write_beat(run, 0)
    assert remove(run, "--yes") == 2
    assert "is not over: it is running" in capsys.readouterr().err and run.path.exists()


def test_a_run_that_somebody_starts_meanwhile_is_refused(ended: RunDirectory, monkeypatch, capsys) -> None:
    from anemoi_dist.launch.commands import remove as command

    holds = []
    monkeypatch.setattr(command, "_is_wanted", lambda what: holds.append(hold_launch(ended)) or True)
    assert remove(ended) == 3
    assert ended.path.exists() and (ended.path / "checkpoints" / "step-00000010").exists()
    holds[0].release()
