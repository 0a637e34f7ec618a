"""The loop of a rank: fetch, step, report, validate, agree, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.checkpoint.saver import Outcome, Saver
from anemoi_dist.checkpoint.shard import ShardSource
from anemoi_dist.config.schema import Config
from anemoi_dist.distributed.control_word import ControlWord, StopRequest
from anemoi_dist.distributed.world import World, seed_step
from anemoi_dist.engines.base import Engine, StepReport
from anemoi_dist.errors import CheckpointError, ConfigError, DivergedError, StopRequestedError
from anemoi_dist.tasks.base import Batch, Start, Task
from anemoi_dist.training.recorder import Recorder


@dataclass
class Progress:
    """Counters of the trainer that checkpoints carry from one process to the next."""

    step: int = 0
    num_skipped_in_row: int = 0
    samples_seen: int = 0


class SaveClock:
    """Reports once that ``checkpoint.interval_minutes`` have passed since the last save. Rank 0's clock counts."""

    def __init__(self, interval_minutes: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = None if interval_minutes is None else 60 * interval_minutes
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Count from now."""
        self._since, self._fired = self._clock(), False

    def is_due(self) -> bool:
        """Whether the interval has passed; True only once until the next restart."""
        # Once: ranks agree on it a step later, and a second report meanwhile would save twice.
        if self._interval_s is None or self._fired:
            return False
        self._fired = self._clock() - self._since >= self._interval_s
        return self._fired


class Trainer:
    """Trains until ``training.max_steps``, a stop request or divergence.

    Parameters
    ----------
    config : Config
        The run's configuration.
    world : World
        Rank, number of ranks, device.
    engine : Engine
        Model, optimizer and schedule, distributed over the ranks.
    task : Task
        Scores the model, and holds the state that is neither tensor nor step.
    saver : Saver
        Saves the shards of the engine.
    recorder : Recorder
        Shows and records steps, scores and events.
    stop : StopRequest
        Stop requests to this rank.
    """

    def __init__(
        self,
        *,
        config: Config,
        world: World,
        engine: Engine,
        task: Task,
        saver: Saver,
        recorder: Recorder,
        stop: StopRequest,
    ) -> None:
        self.config, self.world, self.engine = config, world, engine
        self.task, self.saver, self.recorder, self.stop = task, saver, recorder, stop
        self.progress = Progress()
        self._seed_rank = world.rank // config.task.groups.model
        saver.report = self._record_save
        self._clock = SaveClock(config.checkpoint.interval_minutes if world.is_main else None)
        self._saved_step: int | None = None
        self._scores: tuple[int, Mapping[str, float]] = (0, {})

    def resume(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint and continue from its step. Collective.

        Raises
        ------
        ConfigError
            The checkpoint is beyond ``training.max_steps``.
        """
        saved = checkpoint.trainer()
        # What was read is counted on, and not computed from today's batch size. Importers know of no samples.
        step, seen = (
            checkpoint.manifest.step,
            checkpoint.manifest.samples_seen or self._samples_of(checkpoint.manifest.step),
        )
        progress = Progress(**{"step": step, "samples_seen": seen, **saved.get("progress", {})})
        self._continue(progress, saved.get("task", {}), checkpoint, what="the newest checkpoint")  # 0.1.0 saved no task
        self._saved_step = self.progress.step

    def begin(self, start: Start, source: ShardSource) -> None:
        """Begin a run with the weights and states of another program's, at its step. Collective.

        Raises
        ------
        ConfigError
            It is beyond ``training.max_steps``.
        """
        progress = Progress(step=start.step, samples_seen=self._samples_of(start.step))
        self._continue(progress, start.task, source, what="what the run begins with")

    def _samples_of(self, step: int) -> int:
        return step * self.config.training.global_batch_size

    def _continue(self, progress: Progress, task: Mapping[str, Any], source: ShardSource, *, what: str) -> None:
        max_steps = self.config.training.max_steps
        if progress.step > max_steps:
            rule = f"{what} is of step {progress.step} already"
            fix = f"training.max_steps={progress.step} or more, or another run.id"
            raise ConfigError("training.max_steps", max_steps, rule, fix=fix)
        self.progress = progress
        self.task.load_state_dict(task)
        self.engine.load(source, num_updates=progress.step)

    def fit(self, batches: Iterator[list[Batch]]) -> None:
        """Train to the end on ``batches``, one list of micro-batches for each optimizer step.

        Raises
        ------
        StopRequestedError
            A stop was requested; the run is saved.
        DivergedError
            More than ``training.max_skipped`` updates in a row were not finite.
        """
        word = ControlWord(self.world)
        # Before the first step: too little host memory must fail now, and not at the first checkpoint hours later.
        self.saver.prepare(self.engine.shards())
        while self.progress.step < self.config.training.max_steps:
            with self.recorder.phase("data"):
                micro_batches = [batch.to(self.world.device) for batch in next(batches)]
            with self.recorder.phase("step"):
                # Dropout depends on (seed, step, rank) alone, so a resumed run repeats an uninterrupted one. Ranks that
                # share a model draw the same, of which each takes its part.
                self.task.begin_step(self.progress.step)
                seed_step(self.config.run.seed, step=self.progress.step, rank=self._seed_rank)
                report = self.engine.train_step(micro_batches)
            self.progress.step += 1
            self.progress.samples_seen += self.config.training.global_batch_size
            self._record(report)
            if self._is_due(self.config.validation.interval_steps):
                self._validate("validation")
            # Stopping and saving are collective: a rank that acted on its own signal or clock would leave the others in
            # a collective that never completes. All ranks get the same answer, one step later.
            agreed = word.exchange(self.saver.word(stop=self.stop.value(), save_due=self._clock.is_due()))
            with self.recorder.phase("checkpoint"):
                self.saver.advance(agreed)
                if agreed.save_due or self._is_due(self.config.checkpoint.interval_steps):
                    self._save()
            if agreed.stop:
                word.finish()
                self._leave(self.stop.reason(agreed.stop))
        word.finish()
        self._validate("validation")  # before the save, so that the last checkpoint carries its scores
        self._save_and_wait()
        self._validate("test")
        self.stop.clear()  # a request that came too late must not stop a continuation with more steps

    def _record(self, report: StepReport) -> None:
        self.recorder.step(
            self.progress.step,
            report,
            num_samples=self.config.training.global_batch_size,
            schedule_values=self.engine.schedule_values(),
        )
        self.progress.num_skipped_in_row = self.progress.num_skipped_in_row + 1 if report.skipped else 0
        if self.progress.num_skipped_in_row > self.config.training.max_skipped:
            # Loss and gradient norm are global, so every rank is here; a save in progress may still complete.
            self.saver.wait()
            raise DivergedError(self.progress.num_skipped_in_row, self.progress.step)

    def _is_due(self, interval_steps: int | None) -> bool:
        """Whether this step ends an interval; False for the last step, which is validated and saved anyway."""
        step = self.progress.step
        return interval_steps is not None and step % interval_steps == 0 and step < self.config.training.max_steps

    def _validate(self, split: str) -> None:
        # Noise in the model (an ensemble's) is the same at this step whatever has been drawn before.
        seed_step(self.config.run.seed, step=self.progress.step, rank=self._seed_rank)
        with self.recorder.phase("validation"), self.engine.averaged_weights():
            evaluation = self.task.evaluate(split, evaluate=self.engine.evaluate, world=self.world)
            self.recorder.validation(self.progress.step, split, evaluation)
        if split == "validation":
            self._scores = (self.progress.step, evaluation.summary)

    def _save(self) -> None:
        """Begin to save, unless this step is saved already."""
        # Right after resuming, or if both intervals end at this step.
        if self._saved_step == self.progress.step:
            return
        self._saved_step = self.progress.step
        self._clock.restart()
        scored_step, scores = self._scores
        self.saver.save(
            self.progress.step,
            self.engine.shards,
            samples_seen=self.progress.samples_seen,
            trainer={
                "progress": dict(vars(self.progress)),
                # Retention ranks checkpoints by these: scores of another step would keep the wrong one.
                "scores": dict(scores) if scored_step == self.progress.step else {},
                "task": self.task.state_dict(),
            },
        )

    def _save_and_wait(self) -> None:
        """Save, wait, and raise if it failed: no later save could make up for it."""
        with self.recorder.phase("checkpoint"):
            self.saver.wait()  # first: with ``when_busy=skip`` a save in progress would make this one a skip
            self._save()
            self.saver.wait()
        if self._saved_step != self.progress.step:
            raise CheckpointError(f"step {self.progress.step}, the last, was not saved; older checkpoints are intact")

    def _record_save(self, outcome: Outcome) -> None:
        """Record how a save ended, which may have begun some steps ago."""
        if outcome.error or outcome.skipped:
            # Not saved after all: the final save must not take it for done.
            if self._saved_step == outcome.step:
                self._saved_step = None
            reason = outcome.error or f"step {outcome.step} is not saved: the save before is not done"
            self.recorder.event("save_failed", step=outcome.step, reason=reason, skipped=outcome.skipped)
            self.recorder.message(reason)
            return
        self.recorder.event(
            "checkpoint",
            step=outcome.step,
            path=outcome.name,
            deleted_steps=outcome.deleted_steps,
            seconds=round(outcome.seconds, 3),
            stalled_s=round(outcome.stalled_s, 4),
        )
        if outcome.note:
            self.recorder.message(f"warning: {outcome.note}")
            self.recorder.event("prune_failed", step=outcome.step, error=outcome.note)
        for message in self.task.after_save(outcome.step, run=self.recorder.run, world=self.world):
            self.recorder.message(message)

    def _leave(self, reason: str) -> None:
        self.recorder.event("stop_requested", step=self.progress.step, reason=reason)
        self._save_and_wait()
        self.stop.clear()  # after the save: if it fails, the request still stands
        raise StopRequestedError(self.progress.step, reason)
