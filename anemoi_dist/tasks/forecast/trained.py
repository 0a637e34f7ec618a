"""A trained model in one process, without its engine: ``load_run`` and the forecasts that it makes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from anemoi_dist.checkpoint.ranks import SingleRank
from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.checkpoint.select import select
from anemoi_dist.checkpoint.store import open_store
from anemoi_dist.checkpoint.weights import load_weights
from anemoi_dist.config.parse import from_yaml
from anemoi_dist.config.schema import Config
from anemoi_dist.data.anemoi import open_fields, open_split
from anemoi_dist.data.batch import Batch
from anemoi_dist.data.fields import Fields, seconds
from anemoi_dist.data.forcings import initial_states
from anemoi_dist.errors import CheckpointError, ConfigError
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.tasks.forecast.module import BaseGraphModule
from anemoi_dist.tasks.forecast.output import to_xarray

if TYPE_CHECKING:
    import xarray


class TrainedModel:
    """The model of a run, with the dataset that it was trained on.

    Attributes
    ----------
    config : Config
        The run's frozen configuration.
    step : int
        The optimizer step that the weights are of.
    module : BaseGraphModule
        Model and normalisation, in float32 on the CPU, in evaluation mode.
    fields : Fields
        The whole dataset.
    """

    def __init__(self, config: Config, *, step: int, module: BaseGraphModule, fields: Fields) -> None:
        self.config, self.step, self.module, self.fields = config, step, module, fields

    @torch.no_grad()
    def forecast(self, start: str, num_steps: int) -> xarray.Dataset:
        """Forecast from the states of the dataset up to ``start``.

        Parameters
        ----------
        start : str
            Valid time of the last input state, UTC, such as ``2025-12-28T06``.
        num_steps : int
            Forecast steps of the dataset's frequency.

        Returns
        -------
        xarray.Dataset
            The prognostic variables in physical units with CF's names and coordinates; see :func:`to_xarray`.

        Raises
        ------
        ConfigError
            The input states are not in the dataset, or the forcings of a later date can be neither read nor computed.
        """
        if num_steps < 1:
            raise ConfigError("--steps", num_steps, "must be at least 1")
        try:
            date = np.datetime64(start, "s")
        except ValueError as error:
            raise ConfigError("--start", start, "is not a date", fix="--start 2025-12-28T06") from error
        start_s = int(seconds(np.array([date]))[0])
        states = initial_states(self.fields, self.module.spec, start_s=start_s, num_steps=num_steps)
        batch = Batch(torch.from_numpy(states), torch.tensor([start_s]))
        forecast = self.module(batch, rollout=num_steps)[0].numpy()
        metadata = getattr(self.fields, "variables_metadata", {})
        units = {name: known["units"] for name, known in metadata.items() if "units" in known}
        about = f"run {self.config.run.id}, step {self.step}"
        return to_xarray(forecast, spec=self.module.spec, start=date, units=units, source=about)


def load_run(path: str | Path, *, step: int | None = None) -> TrainedModel:
    """Load the model of a run in this process, whatever engine and number of ranks have trained it.

    Parameters
    ----------
    path : str or Path
        The run's directory.
    step : int, optional
        The checkpoint's step; by default the newest that is whole. Every byte that is read is verified.

    Raises
    ------
    ConfigError
        It is no run, its task has another way to forecasts, or there is no such checkpoint.
    CheckpointError
        The checkpoint is damaged.
    """
    run = RunDirectory(Path(path).absolute())
    try:
        config = from_yaml(run.config_file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError("RUN", str(path), f"is not a run ({run.config_file} is missing)") from error
    if config.task.kind != "forecast":
        fix = (
            f"`anemoi-dist checkpoint export {run.run_id} FILE.ckpt --to inference`, and anemoi-inference runs the file"
        )
        raise ConfigError("RUN", run.run_id, f"is a run of task={config.task.kind}", fix=fix)
    checkpoint = _checkpoint(run, config, step)
    try:
        train = open_split(config.data, "train", rollout=config.training.rollout)
        module = BaseGraphModule(config, spec=train.spec())
        # What validation has scored.
        load_weights(module, checkpoint, averaged=config.training.weight_averaging.decay is not None)
    finally:
        checkpoint.close()
    return TrainedModel(config, step=checkpoint.manifest.step, module=module.eval(), fields=open_fields(config.data))


def _checkpoint(run: RunDirectory, config: Config, step: int | None) -> Checkpoint:
    store = open_store(run, config.checkpoint.url)
    if step is None:
        checkpoint = select(store, world=SingleRank()).checkpoint
        if checkpoint is None:
            raise CheckpointError(f"run {run.run_id} has not saved a checkpoint")
        return checkpoint
    if step not in store.steps():
        raise ConfigError("--checkpoint", step, "is not a checkpoint of the run", valid=[str(s) for s in store.steps()])
    return Checkpoint(store.path(step))
