"""One rank of ``anemoi-training train``, which saves and leaves when its run is asked to stop.

    python -m anemoi_dist.launch.job.anemoi_training RUN_DIRECTORY OVERRIDE ...

Nothing of anemoi-training is changed: it is started here with one more Lightning callback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from anemoi_dist.config.timm_scheduler import enter_bare_timm
from anemoi_dist.errors import ExitCode, PreflightError
from anemoi_dist.run.directory import RunDirectory, write_atomically
from anemoi_dist.run.events import EventLog

#: Optimizer steps between two looks at the run directory, on which all ranks then agree: agreeing waits for the GPU.
_INTERVAL_STEPS = 10


class SaveOnRequest(pl.Callback):
    """Saves ``last.ckpt`` and ends training if the run's stop file is there. Collective.

    Rank 0 records steps, saves and the stop as events, by which ``status`` and the requeues of the job know of them.

    Parameters
    ----------
    run : RunDirectory
        The run; an attempt is recorded in it.

    Raises
    ------
    PreflightError
        The configuration writes no checkpoints.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._saved: tuple[int, int] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note where the checkpoints are: the name of their directory is the id that continues them."""
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        if folder is None:
            raise PreflightError("a job that cannot save cannot resume: diagnostics.enable_checkpointing=true")
        self._last = Path(folder) / "last.ckpt"
        self._saved, self._seen_step = _version(self._last), trainer.global_step
        if trainer.is_global_zero:
            write_atomically(self._run.foreign_checkpoint_file, str(self._last))
            with self._run.changing_state() as state:
                state.attempts[-1].max_steps = int(trainer.estimated_stepping_batches)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the step, and save and leave if that is asked for."""
        step = trainer.global_step
        # Between two optimizer steps the gradients that are being accumulated would be lost.
        if step % _INTERVAL_STEPS or step == self._seen_step:
            return
        self._seen_step = step
        if trainer.is_global_zero:
            self._record("step", step=step, loss=float(outputs["loss"]))
            self._record_save(step)
        asked = trainer.is_global_zero and self._run.stop_file.exists()
        if trainer.strategy.reduce_boolean_decision(asked, all=False):
            self._save_and_leave(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the last step, if that ended no interval."""
        if trainer.is_global_zero and trainer.global_step != self._seen_step:
            self._record("step", step=trainer.global_step)

    def _save_and_leave(self, trainer: pl.Trainer) -> None:
        # Under another name first: the time limit may come in the middle, and there is no second last.ckpt.
        unfinished = self._last.with_name("last.ckpt.unfinished")
        trainer.save_checkpoint(unfinished)
        if trainer.is_global_zero:
            unfinished.replace(self._last)
            self._record_save(trainer.global_step)
            self._record("stop_requested", step=trainer.global_step, reason="saved, and leaves")
            self._run.stop_file.unlink(missing_ok=True)
        # With code 0 and not 75: srun kills all other ranks, which are still leaving, as soon as one fails.
        raise SystemExit(ExitCode.FINISHED)

    def _record_save(self, step: int) -> None:
        if (version := _version(self._last)) != self._saved:
            self._saved = version
            self._record("checkpoint", step=step, path=str(self._last))

    def _record(self, event: str, *, step: int, **fields: Any) -> None:
        log = EventLog(self._run.events_file)
        log.write(event, step=step, **fields)
        log.close()


def _version(file: Path) -> tuple[int, int] | None:
    """Return what changes when a file is written again; None if it is not there."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


def main(arguments: Sequence[str] | None = None) -> None:
    """Train on this rank as ``anemoi-training train`` does."""
    path, *overrides = sys.argv[1:] if arguments is None else arguments
    run = RunDirectory(Path(path))
    enter_bare_timm()
    # Imported here: it imports timm.
    from anemoi.training.__main__ import main as anemoi_training

    class Trainer(pl.Trainer):
        def __init__(self, *, callbacks: Sequence[pl.Callback] = (), **options: Any) -> None:
            super().__init__(callbacks=[*callbacks, SaveOnRequest(run)], **options)

    # anemoi-training takes it from there, and offers no other way for a callback that its configuration does not name.
    pl.Trainer = Trainer  # type: ignore[misc, assignment]
    sys.argv = ["anemoi-training", "train", *overrides]
    anemoi_training()


if __name__ == "__main__":
    main()
