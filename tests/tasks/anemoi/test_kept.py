"""Inference files follow the checkpoints of a run, and training does not depend on them."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
from support import toy
from support.saved import example_tensors, save_tensors
from support.waiting import PATIENCE_S

from anemoi_dist.config.parse import to_yaml
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.tasks.anemoi.kept import KeptFiles


class Written:
    """In the place of the process that writes: remembers the steps, and fails for some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, failing: tuple[int, ...] = ()) -> None:
        self.steps: list[int] = []
        self.failing, self.text = failing, ""
        monkeypatch.setattr(KeptFiles, "_run_process", lambda _, arguments: self.write(*arguments))

    def write(self, run: str, step: str, out: str) -> str | None:
        self.steps.append(int(step))
        if int(step) in self.failing:
            return "No space left"
        Path(out).write_text(self.text)
        return None


def make_run(root: Path, *steps: int) -> RunDirectory:
    run = RunDirectory(root / "run")
    run.create()
    for step in steps:
        save_tensors(run.checkpoints_dir, example_tensors(), step=step)
    return run


def brought_up_to_date(files: KeptFiles, *, saved: int | None = None) -> list[str]:
    files.update(saved=saved)
    files.wait()
    return files.messages()


def names(run: RunDirectory) -> list[str]:
    return sorted(entry.name for entry in run.inference_dir.iterdir())


def test_each_checkpoint_has_its_file_and_what_is_deleted_has_none(tmp_path: Path, monkeypatch) -> None:
    run, written = make_run(tmp_path, 2, 4), Written(monkeypatch)
    files = KeptFiles(run, toy.make_config("ddp"))
    assert brought_up_to_date(files, saved=4) == []
    assert written.steps == [4, 2] and names(run) == ["step-00000002.ckpt", "step-00000004.ckpt"]
    save_tensors(run.checkpoints_dir, example_tensors(), step=6)
    shutil.rmtree(run.checkpoints_dir / "step-00000002")
    (run.inference_dir / ".step-00000002.ckpt.01ab.tmp").touch()  # of a process that was killed
    (run.inference_dir / "mine.ckpt").touch()
    assert brought_up_to_date(files, saved=6) == []
    assert written.steps == [4, 2, 6]
    assert names(run) == ["mine.ckpt", "step-00000004.ckpt", "step-00000006.ckpt"]


def test_a_step_that_is_saved_again_is_written_again(tmp_path: Path, monkeypatch) -> None:
    run, written = make_run(tmp_path, 2), Written(monkeypatch)
    brought_up_to_date(KeptFiles(run, toy.make_config("ddp")), saved=2)
    written.text = "of today"
    again = KeptFiles(run, toy.make_config("ddp"))
    brought_up_to_date(again)
    assert (run.inference_dir / "step-00000002.ckpt").read_text() == ""
    brought_up_to_date(again, saved=2)
    assert (run.inference_dir / "step-00000002.ckpt").read_text() == "of today"


def test_a_file_that_fails_is_told_once_and_the_others_are_written(tmp_path: Path, monkeypatch) -> None:
    run, written = make_run(tmp_path, 2, 4), Written(monkeypatch, failing=(4,))
    files = KeptFiles(run, toy.make_config("ddp"))
    (message,) = brought_up_to_date(files, saved=4)
    assert message == f"warning: {run.inference_dir / 'step-00000004.ckpt'} was not written: No space left"
    assert brought_up_to_date(files) == [] and names(run) == ["step-00000002.ckpt"]
    assert written.steps == [4, 2]


def test_a_checkpoint_that_goes_while_it_is_read_is_no_failure(tmp_path: Path, monkeypatch) -> None:
    run = make_run(tmp_path, 2)

    def fail(_: KeptFiles, arguments: list[str]) -> str:
        shutil.rmtree(run.checkpoints_dir / "step-00000002")
        return "no manifest"

    monkeypatch.setattr(KeptFiles, "_run_process", fail)
    assert brought_up_to_date(KeptFiles(run, toy.make_config("ddp")), saved=2) == []


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch) -> None:
    run = make_run(tmp_path, 2)
    run.inference_dir.touch()
    (message,) = brought_up_to_date(KeptFiles(run, toy.make_config("ddp")), saved=2)
    assert "is not up to date" in message and "File exists" in message


def test_training_does_not_wait_for_a_file(tmp_path: Path, monkeypatch) -> None:
    run, release = make_run(tmp_path, 2), threading.Event()
    monkeypatch.setattr(KeptFiles, "_run_process", lambda *_: str(release.wait(PATIENCE_S)))
    files = KeptFiles(run, toy.make_config("ddp"))
    files.update(saved=2)  # returns, although the process is not done
    assert files.messages() == []
    release.set()
    files.wait()
    (message,) = files.messages()
    assert message.endswith("was not written: True")


def test_what_the_process_says_is_shown_and_a_hanging_one_is_killed(tmp_path: Path, monkeypatch) -> None:
    run, config = make_run(tmp_path, 2), toy.make_config("ddp")
    run.config_file.write_text(to_yaml(config))
    (message,) = brought_up_to_date(KeptFiles(run, config), saved=2)
    assert "step-00000002.ckpt was not written: " in message and "needs a run of task=anemoi" in message
    config.watchdog.timeout_s = config.watchdog.startup_timeout_s = 0.5
    os.mkfifo(tmp_path / "fifo")
    run.config_file.unlink()
    run.config_file.symlink_to(tmp_path / "fifo")  # whoever reads it waits for ever
    (message,) = brought_up_to_date(KeptFiles(run, config), saved=2)
    assert "ended with code -9" in message and names(run) == []
