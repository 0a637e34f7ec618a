"""Metrics back ends: curves for other tools, in addition to the event log."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from anemoi_dist.config.schema import TelemetryConfig
from anemoi_dist.errors import PreflightError
from anemoi_dist.process.output import LOSSES
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.telemetry.mlflow import MlflowMetrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

#: Name in the account of losses; seconds until a writer that failed is opened again; more than its first record takes.
_TENSORBOARD, _RETRY_S, _PROBE_BYTES = "TensorBoard's files", 30.0, 4096
#: Seconds between flushes by the writer's own thread, which would print a traceback: every write is flushed here.
_NEVER_S = 10**9


class MetricWriter(Protocol):
    """A back end for curves."""

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        """Write one point of every curve in ``values``, by its name."""

    def close(self, state: str) -> None:
        """Write what waits and close; ``state`` is that of the run after this attempt. A second call does nothing."""


def open_writers(
    run: RunDirectory, config: TelemetryConfig, *, first_step: int, say: Callable[[str], None]
) -> list[MetricWriter]:
    """Open the back ends that the configuration asks for.

    Parameters
    ----------
    run : RunDirectory
        An existing run.
    config : TelemetryConfig
        ``tensorboard`` and ``mlflow``.
    first_step : int
        Optimizer steps done before this attempt.
    say : Callable[[str], None]
        Shows a warning.

    Raises
    ------
    PreflightError
        The package of one of them is not installed.
    """
    writers: list[MetricWriter] = []
    if config.tensorboard:
        writers.append(TensorBoardMetrics(run.metrics_dir, first_step=first_step))
    if config.mlflow.tracking_uri is not None:
        writers.append(MlflowMetrics(run, config.mlflow, say=say))
    return writers


class TensorBoardMetrics:
    """Writes scalars for TensorBoard.

    Parameters
    ----------
    directory : Path
        ``metrics`` of a run, for ``tensorboard --logdir``.
    first_step : int
        Optimizer steps done before. Points beyond them, of an earlier attempt, are hidden: this attempt repeats them.
    clock : Callable[[], float], optional
        Monotonic seconds.

    Raises
    ------
    PreflightError
        The package ``tensorboard`` is not installed.
    """

    def __init__(self, directory: Path, *, first_step: int, clock: Callable[[], float] = time.monotonic) -> None:
        # Optional dependency, imported only if the configuration asks for it.
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise PreflightError(
                f"telemetry.tensorboard=true needs the package tensorboard, which cannot be imported here ({error})\n"
                "  fix: pip install 'anemoi-dist[tensorboard]', or telemetry.tensorboard=false"
            ) from error
        self._open_writer, self._directory, self._clock = SummaryWriter, directory, clock
        # TensorBoard hides everything from this step on that was written before; a new run has nothing to hide.
        self._purge_step = first_step + 1 if first_step else None
        self._writer: SummaryWriter | None = None
        self._next_try, self._error = -math.inf, OSError(0, "")

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        """Write one point of every curve in ``values``, by its tag; points for which there is no room are counted."""
        try:
            self._ensure_open()
            assert self._writer is not None, "opened above"
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, global_step=step)
            # Now: the writer's thread would find minutes later that the disk is full, and die of it with a traceback.
            self._writer.flush()
        except OSError as error:
            self._give_up(error)
            LOSSES.note(_TENSORBOARD, error, count=len(values))
        else:
            LOSSES.end(_TENSORBOARD)

    def close(self, state: str) -> None:
        """Flush and close the event file."""
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            LOSSES.note(_TENSORBOARD, error)
        self._writer = None

    def _ensure_open(self) -> None:
        if self._writer is not None:
            return
        # Every try leaves a file: not one a step.
        if self._clock() < self._next_try:
            raise self._error
        # Tried first, because the writer's own thread would print a traceback.
        with tempfile.TemporaryFile(dir=self._directory) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
        self._writer = self._open_writer(str(self._directory), purge_step=self._purge_step, flush_secs=_NEVER_S)
        self._purge_step = None  # a second file of this attempt must not hide the points of the first

    def _give_up(self, error: OSError) -> None:
        """Leave the file, whose last record may be torn: what TensorBoard finds behind it, it does not read."""
        self._writer = None  # not closed: that would write again what could not be written
        if self._clock() >= self._next_try:
            self._error, self._next_try = error, self._clock() + _RETRY_S
