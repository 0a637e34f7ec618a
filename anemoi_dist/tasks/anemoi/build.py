"""Anemoi-training's own builder of data, graph and model, without its trainer."""

from __future__ import annotations

import copy
import logging
import os
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from anemoi_dist.config.anemoi.places import check_target_bases
from anemoi_dist.config.schema import Config
from anemoi_dist.tasks.anemoi.environment import import_anemoi_training

if TYPE_CHECKING:
    from anemoi.training.train.train import AnemoiTrainer


def create_builder(config: Config) -> AnemoiTrainer:
    """Return anemoi-training's builder for ``task.settings``; it builds each part when it is first asked for.

    Its random draws follow ``run.seed`` as they follow ``ANEMOI_BASE_SEED`` in anemoi-training.

    Raises
    ------
    ConfigError
        A class that the settings name is not of the kind that belongs in its place.
    PreflightError
        Anemoi-training cannot be imported.
    """
    from omegaconf import DictConfig

    os.environ["ANEMOI_BASE_SEED"] = str(config.run.seed)
    # One line for each variable and scaler of each dataset is for its own logs, not for every rank's.
    logging.getLogger("anemoi").setLevel(logging.WARNING)
    trainer = import_anemoi_training().AnemoiTrainer
    check_target_bases(config.task.settings, allowed=config.security.allowed_targets)

    class Builder(trainer):  # type: ignore[misc, valid-type]
        """Anemoi-training's trainer up to its model: what logs, resumes and writes is this package's."""

        run_id = config.run.id
        logger = False
        last_checkpoint = None
        strategy = SimpleNamespace(global_rank=dist.get_rank() if dist.is_initialized() else 0)

        def _update_paths(self) -> None:
            pass

        @cached_property
        def graph_data(self) -> Any:
            # Only one rank may build and write the file; the others read it.
            if self.config.system.input.graph is None or not dist.is_initialized():
                return super().graph_data
            if dist.get_rank() > 0:
                dist.barrier()
            graph = super().graph_data
            if dist.get_rank() == 0:
                dist.barrier()
            return graph

    builder = Builder(DictConfig(copy.deepcopy(config.task.settings)))
    builder.load_weights_only = False  # it would unpickle the file; see weights.py
    return builder
