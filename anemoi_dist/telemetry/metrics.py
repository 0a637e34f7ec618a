"""Metrics back ends: curves for other tools, in addition to the event log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from anemoi_dist.config.schema import TelemetryConfig
from anemoi_dist.errors import PreflightError
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.telemetry.mlflow import MlflowMetrics


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

    Raises
    ------
    PreflightError
        The package ``tensorboard`` is not installed.
    """

    def __init__(self, directory: Path, *, first_step: int) -> None:
        # Optional dependency, imported only if the configuration asks for it.
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise PreflightError(
                f"telemetry.tensorboard=true needs the package tensorboard, which cannot be imported here ({error})\n"
                "  fix: pip install 'anemoi-dist[tensorboard]', or telemetry.tensorboard=false"
            ) from error
        # TensorBoard hides everything from this step on that was written before; a new run has nothing to hide.
        purge_step = first_step + 1 if first_step else None
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        """Write one point of every curve in ``values``, by its tag."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, global_step=step)

    def close(self, state: str) -> None:
        """Flush and close the event file."""
        self._writer.close()
