"""The loop of a rank: fetch, step, report, validate, save, agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from anemoi_dist.checkpoint.reader import Checkpoint, prune
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.checkpoint.writer import save
from anemoi_dist.config import Config
from anemoi_dist.control import REASONS, ControlWord, StopRequest
from anemoi_dist.data.batch import Batch
from anemoi_dist.engines.base import Engine, StepReport
from anemoi_dist.errors import DivergedError, StopRequestedError
from anemoi_dist.telemetry.telemetry import Telemetry
from anemoi_dist.world import World, seed_step


@dataclass
class Progress:
    """What the trainer itself must remember from one process to the next."""

    step: int = 0
    num_skipped_in_row: int = 0


class Trainer:
    """Trains until ``training.max_steps``, a stop request or divergence.

    Parameters
    ----------
    config : Config
        The run's configuration.
    world : World
        This rank's place.
    engine : Engine
        Model, optimizer and schedule, spread over the ranks.
    store : LocalStore
        Where checkpoints go.
    telemetry : Telemetry
        What is shown and recorded.
    stop : StopRequest
        This rank's own wish to stop.
    validate : Callable[[str, int], None]
        Scores the forecast on a block of the data (``validation`` or ``test``) at a step. Collective.
    facts : dict[str, Any]
        ``engine``, ``config_hash`` and ``versions``, recorded in every checkpoint.
    """

    def __init__(
        self,
        *,
        config: Config,
        world: World,
        engine: Engine,
        store: LocalStore,
        telemetry: Telemetry,
        stop: StopRequest,
        validate: Callable[[str, int], None],
        facts: dict[str, Any],
    ) -> None:
        self.config, self.world, self.engine, self.store = config, world, engine, store
        self.telemetry, self.stop, self.validate, self.facts = telemetry, stop, validate, facts
        self.progress = Progress()
        self._saved_step: int | None = None

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        self.progress = Progress(**checkpoint.trainer()["progress"])
        self.engine.load(checkpoint, num_updates=self.progress.step)
        self._saved_step = self.progress.step

    def fit(self, batches: Iterator[list[Batch]]) -> None:
        """Train to the end on ``batches``, one list of micro-batches for each optimizer step.

        Raises
        ------
        StopRequestedError
            Saved, on request, before the end.
        DivergedError
            More than ``training.max_skipped`` updates in a row were not finite.
        """
        word = ControlWord(self.world)
        while self.progress.step < self.config.training.max_steps:
            with self.telemetry.phase("data"):
                micro_batches = [batch.to(self.world.device) for batch in next(batches)]
            with self.telemetry.phase("step"):
                seed_step(self.config.run.seed, step=self.progress.step, rank=self.world.rank)
                report = self.engine.train_step(micro_batches)
            self.progress.step += 1
            self._record(report)
            if self._is_due(self.config.validation.interval_steps):
                self._validate("validation")
            if self._is_due(self.config.checkpoint.interval_steps):
                self._save()
            if reason := word.exchange(self.stop.value()):
                word.finish()
                self._leave(REASONS[reason])
        word.finish()
        self._save()
        self._validate("validation")
        self._validate("test")
        self.stop.clear()  # a request that came too late must not stop a continuation with more steps

    def _record(self, report: StepReport) -> None:
        self.telemetry.step(
            self.progress.step,
            report,
            num_samples=self.config.training.global_batch_size,
            schedule_values=self.engine.schedule_values(),
        )
        self.progress.num_skipped_in_row = self.progress.num_skipped_in_row + 1 if report.skipped else 0
        if self.progress.num_skipped_in_row > self.config.training.max_skipped:
            raise DivergedError(self.progress.num_skipped_in_row, self.progress.step)

    def _is_due(self, interval_steps: int | None) -> bool:
        """Whether this step ends an interval; the last step is validated and saved anyway."""
        step = self.progress.step
        return interval_steps is not None and step % interval_steps == 0 and step < self.config.training.max_steps

    def _validate(self, split: str) -> None:
        with self.telemetry.phase("validation"):
            self.validate(split, self.progress.step)

    def _save(self) -> None:
        if self._saved_step == self.progress.step:
            return
        with self.telemetry.phase("checkpoint"):
            path = save(
                self.store,
                self.engine.shards(),
                world=self.world,
                step=self.progress.step,
                samples_seen=self.progress.step * self.config.training.global_batch_size,
                trainer={"progress": vars(self.progress)},
                facts=self.facts,
            )
            deleted = self._prune() if self.world.is_main else []
        self._saved_step = self.progress.step
        self.telemetry.event("checkpoint", step=self.progress.step, path=path.name, deleted_steps=deleted)

    def _prune(self) -> list[int]:
        """Delete what retention does not keep; a file system that refuses is no reason to stop training."""
        try:
            return prune(self.store, keep_last=self.config.checkpoint.keep_last)
        except OSError as error:
            self.telemetry.message(f"warning: an old checkpoint was not deleted: {error}")
            self.telemetry.event("prune_failed", step=self.progress.step, error=str(error))
            return []

    def _leave(self, reason: str) -> None:
        self.telemetry.event("stop_requested", step=self.progress.step, reason=reason)
        self._save()
        self.stop.clear()
        raise StopRequestedError(self.progress.step, reason)
