"""Recorder: shows and records steps, scores and events for the training loop."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from anemoi_dist.config.schema import Config
from anemoi_dist.engines.base import StepReport
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.events import EventLog
from anemoi_dist.tasks.base import Evaluation
from anemoi_dist.telemetry import heartbeat
from anemoi_dist.telemetry.metrics import MetricWriter, open_writers
from anemoi_dist.telemetry.phases import PhaseTimer
from anemoi_dist.telemetry.progress import SpeedMeter, StepLine, open_progress

#: Names of phases in heartbeats, if they differ: a rank that waits for data is stuck in its step.
_PHASES_OF_HEARTBEAT = {"data": "step"}


class Recorder:
    """Progress, event log and metrics of one attempt at a run.

    Every rank has one. Only that of rank 0 writes and shows anything; the others only measure phases.

    Parameters
    ----------
    run : RunDirectory
        An existing run.
    config : Config
        ``config.telemetry`` is read.
    is_main : bool
        Whether this is rank 0.
    first_step : int
        Optimizer steps done before this attempt: 0 for a new run.

    Attributes
    ----------
    run : RunDirectory
        The run.

    Raises
    ------
    PreflightError
        TensorBoard or MLflow is configured and not installed.
    """

    def __init__(self, run: RunDirectory, config: Config, *, is_main: bool, first_step: int) -> None:
        self.run = run
        self._timer = PhaseTimer()
        self._is_main = is_main
        self._writers: list[MetricWriter] = []
        heartbeat.beat(step=first_step)
        if not is_main:
            return
        self._total_steps = total_steps = config.training.max_steps
        heartbeat.note(total_steps=total_steps)
        self._interval_steps = config.telemetry.interval_steps
        self._speed = SpeedMeter(total_steps=total_steps)
        self._writers = open_writers(run, config.telemetry, first_step=first_step, say=self.message)
        self._log = EventLog(run.events_file)
        # Last: from here on a bar owns the terminal, and an error without close() would leave it without a cursor.
        self._progress = open_progress(
            total_steps=total_steps, first_step=first_step, interval_steps=self._interval_steps
        )

    def event(self, name: str, *, step: int, **fields: Any) -> None:
        """Append an event to the run's log; nothing is shown."""
        if self._is_main:
            self._log.write(name, step=step, **fields)

    def step(self, step: int, report: StepReport, *, num_samples: int, schedule_values: Mapping[str, Any]) -> None:
        """Show one optimizer step; record it every ``telemetry.interval_steps``, and whenever its update was skipped.

        Parameters
        ----------
        step : int
            Optimizer steps done, this one included.
        report : StepReport
            Result of the step, global over the ranks.
        num_samples : int
            Samples of this step, over all ranks.
        schedule_values : Mapping[str, Any]
            Step-dependent values of the optimizer, such as ``alpha`` and ``beta3``.
        """
        heartbeat.beat(step=step)  # on every rank: a hang names the step of the rank to blame
        if not self._is_main:
            return
        seconds = self._timer.seconds()
        self._speed.add(step, num_samples=num_samples, paused_s=seconds["validation"] + seconds["checkpoint"])
        line = StepLine(
            step=step,
            loss=report.loss,
            lr=report.lr,
            grad_norm=report.grad_norm,
            samples_per_s=self._speed.samples_per_s,
            eta_s=self._speed.eta_s,
            memory_bytes=memory_bytes(),
            skipped=report.skipped,
        )
        self._progress.update(line)
        heartbeat.note(loss=line.loss, samples_per_s=line.samples_per_s, eta_s=line.eta_s)
        if report.skipped:
            self._log.write("skipped_update", step=step, loss=report.loss, grad_norm=report.grad_norm, lr=report.lr)
        # Steps 1 and last too: curves begin and end where training does, whatever the interval.
        if step % self._interval_steps == 0 or step in (1, self._total_steps):
            self._record(line, schedule_values)

    def _record(self, line: StepLine, schedule_values: Mapping[str, Any]) -> None:
        values = {
            "loss": line.loss,
            "lr": line.lr,
            "grad_norm": line.grad_norm,
            **schedule_values,
            "samples_per_s": line.samples_per_s,
            "eta_s": line.eta_s,
            "memory_bytes": line.memory_bytes,
        }
        self._log.write("step", step=line.step, **values)
        scalars = {f"training/{key}": float(value) for key, value in values.items() if value is not None}
        self._write(scalars, step=line.step)

    def _write(self, scalars: Mapping[str, float], *, step: int) -> None:
        for writer in self._writers:
            writer.write(scalars, step=step)

    def validation(self, step: int, split: str, evaluation: Evaluation) -> None:
        """Record the scores of one validation and show their table.

        Parameters
        ----------
        step : int
            Optimizer steps done.
        split : str
            ``validation`` or ``test``.
        evaluation : Evaluation
            Scores and table.
        """
        if not self._is_main:
            return
        self._log.write("validation", step=step, split=split, scores=list(evaluation.scores))
        self._progress.message(f"{split} split after step {step}:\n{evaluation.table}")
        self._write({f"{split}/{name}": value for name, value in evaluation.metrics.items()}, step=step)

    def message(self, text: str) -> None:
        """Show a text that stays, above the bar if there is one."""
        if self._is_main:
            self._progress.message(text)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the ``with`` block as ``name``; see :data:`anemoi_dist.telemetry.phases.PHASES`."""
        with self._timer.phase(name), heartbeat.during(_PHASES_OF_HEARTBEAT.get(name, name)):
            yield

    def seconds(self) -> dict[str, float]:
        """Return this rank's seconds in each phase so far."""
        return self._timer.seconds()

    def close(self, state: str = "failed") -> None:
        """Close log, metrics and display, with the run's state after this attempt.

        The terminal is restored even if the rest fails.
        """
        if not self._is_main:
            return
        try:
            self._log.close()
            for writer in self._writers:
                writer.close(state)
        finally:
            self._progress.close()


def memory_bytes() -> int:
    """Return the peak of memory allocated on this rank's GPU, or without one the resident memory of its process."""
    # Not initialized: asking for memory would create a CUDA context of half a gigabyte.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    resident_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return resident_pages * os.sysconf("SC_PAGE_SIZE")
