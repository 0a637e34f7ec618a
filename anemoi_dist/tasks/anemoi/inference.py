"""The file that anemoi-inference loads, from a checkpoint of any engine; needs neither ranks nor a GPU."""

from __future__ import annotations

import pickle
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import torch

import anemoi_dist
from anemoi_dist.checkpoint.export import check_out, replacing
from anemoi_dist.checkpoint.manifest import Manifest
from anemoi_dist.checkpoint.verified import SavedCheckpoint
from anemoi_dist.checkpoint.weights import load_weights
from anemoi_dist.config.schema import Config
from anemoi_dist.config.secrets import redact_values
from anemoi_dist.config.tree import Tree
from anemoi_dist.errors import ConfigError
from anemoi_dist.tasks.anemoi.build import create_builder
from anemoi_dist.tasks.anemoi.module import PREFIX

#: ``training.precision`` -> its name in anemoi-inference, which computes in it.
_PRECISIONS = {"fp32": "32", "bf16": "bf16-mixed"}


def export_inference(
    checkpoint: SavedCheckpoint, out: Path, *, config: Config, averaged: bool = False, force: bool = False
) -> None:
    """Write model, metadata and supporting arrays as anemoi-training does for anemoi-inference.

    Parameters
    ----------
    checkpoint : SavedCheckpoint
        Every hash block is verified as it is read.
    out : Path
        Written under a temporary name until it is complete.
    config : Config
        The run's frozen configuration.
    averaged : bool
        The averaged weights in the place of the weights.
    force : bool
        Replace an existing file.

    Raises
    ------
    ConfigError
        The run trains another task, the file exists, or there are no averaged weights.
    CheckpointError
        The checkpoint is damaged or does not fit the model; no file is left behind.
    """
    if config.task.kind != "anemoi":
        raise ConfigError("--to", "inference", f"needs a run of task=anemoi, and this one trains {config.task.kind}")
    check_out(out, force=force)
    builder = create_builder(config)
    method = builder.model
    load_weights(method, checkpoint, averaged=averaged, prefix=PREFIX)
    _write(method.model, out, metadata=_metadata(builder.metadata, config, checkpoint.manifest))


def _metadata(metadata: Tree, config: Config, manifest: Manifest) -> Tree:
    """Return anemoi-training's metadata with what has really run, and without secrets."""
    assert config.task.steps_per_epoch is not None
    metadata = redact_values(metadata)
    metadata["config"]["training"]["precision"] = _PRECISIONS[config.training.precision]
    metadata["uuid"] = str(uuid.uuid4())  # of this file: a catalogue tells two of one run apart by it
    metadata["training"] = {
        "current_epoch": manifest.step // config.task.steps_per_epoch,
        "global_step": manifest.step,
    }
    metadata["anemoi_dist"] = {
        "version": anemoi_dist.__version__,
        "run_id": config.run.id,
        "step": manifest.step,
        "engine": manifest.engine,
        "checkpoint": manifest.save_id,
    }
    return metadata


def _write(interface: Any, out: Path, *, metadata: dict[str, Any]) -> None:
    from anemoi.training.utils.checkpoint import clear_imputer_runtime_state
    from anemoi.utils.checkpoints import save_metadata

    arrays = interface.supporting_arrays
    interface.config = interface.metadata = interface.supporting_arrays = None
    clear_imputer_runtime_state(interface)
    with replacing(out) as temporary:
        torch.save(interface, temporary, pickle_module=_ModelPickle)
        save_metadata(str(temporary), metadata, supporting_arrays=arrays)


class _ModelPickle:
    """The module that :func:`torch.save` pickles a model with."""

    class Pickler(pickle.Pickler):
        """Cuts nodes of a configuration off from the rest of it.

        Layers keep nodes of OmegaConf, and each node its parent: with them goes the whole configuration.
        """

        def reducer_override(self, value: Any) -> Any:
            from omegaconf import DictConfig, ListConfig, OmegaConf

            if isinstance(value, DictConfig | ListConfig):
                # A node may hold arrays, such as statistics, of which OmegaConf has to be told.
                build = partial(type(value), flags={"allow_objects": True})
                return build, (redact_values(OmegaConf.to_container(value, resolve=True)),)
            return NotImplemented
