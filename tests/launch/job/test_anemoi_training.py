"""anemoi-training's own trainer as a run: how it is started, and how it saves and leaves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support import quiet_lightning  # noqa: F401 # before Lightning: past a torchvision that cannot be imported

from anemoi_dist.config.compose import compose
from anemoi_dist.launch.job import command
from anemoi_dist.launch.job.allocation import Allocation
from anemoi_dist.launch.job.batch import BatchJob
from anemoi_dist.launch.status import journal
from anemoi_dist.run.attempt import Attempt
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.events import read_events

pl = pytest.importorskip("pytorch_lightning")
WORDS = ("anemoi-training", "train", "--config-name=mine", "a=b")


def test_only_a_saved_run_of_theirs_is_continued(run: RunDirectory, tmp_path: Path) -> None:
    first = [sys.executable, "-m", "anemoi_dist.launch.job.anemoi_training", str(run.path), "--config-name=mine", "a=b"]
    assert command._anemoi_training(run, WORDS) == first
    last = tmp_path / "6c74" / "last.ckpt"
    run.foreign_checkpoint_file.write_text(str(last))
    assert command._anemoi_training(run, WORDS) == first, "it ended before it had saved"
    last.parent.mkdir()
    last.touch()
    *program, run_id, fork, weights, warm = command._anemoi_training(run, WORDS)
    assert program == first and run_id == "training.run_id=6c74"
    assert {fork, weights, warm} == {
        "training.fork_run_id=null",
        "training.load_weights_only=false",
        "system.input.warm_start=null",
    }


@pytest.mark.parametrize(
    ("words", "known"),
    [
        (WORDS, True),
        (WORDS[:1], False),
        (("/env/bin/anemoi-training", "train"), False),
        (("true",), False),
        (None, False),
    ],
)
def test_it_is_known_by_its_name(words: tuple[str, ...] | None, known: bool) -> None:
    assert journal.is_anemoi_training(words) is known


def test_before_the_time_limit_it_gets_a_stop_file_and_no_signal(run: RunDirectory) -> None:
    config = compose(["launcher=slurm", "run.id=r"]).config
    job = BatchJob(run, config, Allocation("1", 0, ("n",), 4, 2), command=WORDS, by_srun=True)
    job._ask_to_stop(None, 10)  # type: ignore[arg-type]
    assert run.stop_file.exists()


class Toy(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(run: RunDirectory, folder: Path, *, resume: bool, **options: object) -> pl.Trainer:
    from anemoi_dist.launch.job.anemoi_training import SaveOnRequest

    attempt = Attempt(run, world_size=1, max_steps=0)
    attempt._hold.release()
    saving = pl.callbacks.ModelCheckpoint(folder, save_last=True, every_n_epochs=100)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=25,
        max_epochs=100,
        callbacks=[saving, SaveOnRequest(run)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,  # type: ignore[arg-type]
    )
    data = torch.utils.data.DataLoader(torch.ones(16, 2), batch_size=1)
    trainer.fit(Toy(), data, ckpt_path=str(folder / "last.ckpt") if resume else None)
    return trainer


def test_it_saves_leaves_and_continues(run: RunDirectory, tmp_path: Path) -> None:
    folder = tmp_path / "theirs" / "6c74"
    run.stop_file.touch()
    with pytest.raises(SystemExit) as left:
        train(run, folder, resume=False)
    assert left.value.code == 0, "srun would kill the other ranks"
    assert run.foreign_checkpoint_file.read_text() == str(folder / "last.ckpt")
    assert not run.stop_file.exists() and [file.name for file in folder.iterdir()] == ["last.ckpt"]
    assert command._num_stops(run) == 1
    assert train(run, folder, resume=True).global_step == 25
    events = [(event["event"], event["step"]) for event in read_events(run.events_file)]
    assert events == [("step", 10), ("checkpoint", 10), ("stop_requested", 10), ("step", 20), ("step", 25)]
    assert [attempt.max_steps for attempt in run.read_state().attempts] == [25, 25]


def test_gradients_that_are_being_accumulated_are_not_lost(run: RunDirectory, tmp_path: Path) -> None:
    run.stop_file.touch()
    with pytest.raises(SystemExit):
        train(run, tmp_path / "6c74", resume=False, accumulate_grad_batches=4)
    saved = torch.load(tmp_path / "6c74" / "last.ckpt", weights_only=False)
    assert saved["global_step"] == 10
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == 40


def test_a_trainer_that_never_saves_is_refused(run: RunDirectory) -> None:
    from anemoi_dist.errors import PreflightError
    from anemoi_dist.launch.job.anemoi_training import SaveOnRequest

    Attempt(run, world_size=1, max_steps=0)._hold.release()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, callbacks=[SaveOnRequest(run)], logger=False, enable_checkpointing=False
    )
    with pytest.raises(PreflightError, match="enable_checkpointing=true"):
        trainer.fit(Toy(), torch.utils.data.DataLoader(torch.ones(4, 2)))
