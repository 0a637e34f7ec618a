"""Tasks: each is one object behind one Protocol, and defines what is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anemoi_dist.config.schema import Config
    from anemoi_dist.tasks.base import Task


def create_task(config: Config) -> Task:
    """Return the task of a configuration; its training data are opened.

    Raises
    ------
    ConfigError
        The data cannot be opened or hold no sample.
    """
    # The task, not this package, decides which libraries a rank loads.
    if config.task.kind == "anemoi":
        from anemoi_dist.tasks.anemoi.task import AnemoiTask

        return AnemoiTask(config)
    from anemoi_dist.tasks.forecast.task import ForecastTask

    return ForecastTask(config)
