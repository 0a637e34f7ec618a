"""Weights that a new run of ``task=anemoi`` begins with: ``system.input.warm_start`` and what goes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from anemoi_dist.checkpoint.importers.pickles import load_tensors
from anemoi_dist.config.tree import Tree
from anemoi_dist.errors import ConfigError

_KEY = "system.input.warm_start"


def check_start(settings: Tree) -> Path | None:
    """Return the file that a new run begins with, or None.

    Raises
    ------
    ConfigError
        The keys contradict each other, or there is no such file.
    """
    path, training = settings["system"]["input"].get("warm_start"), settings["training"]
    for key in ("load_weights_only", "transfer_learning"):
        if training.get(key) and not path:
            raise ConfigError(f"training.{key}", True, "needs a file to load", fix=f"{_KEY}=/path/to/last.ckpt")
    if not path:
        return None
    if not training.get("load_weights_only"):
        fix = (
            f"training.load_weights_only=true; or anemoi-dist checkpoint import {path} RUN --rename model=method.model"
        )
        raise ConfigError(_KEY, path, "begins with the weights alone", fix=fix)
    if not Path(path).is_file():
        raise ConfigError(_KEY, path, "is no file")
    return Path(path)


def check_frozen(method: Any, settings: Tree) -> None:
    """Raise :class:`ConfigError` where ``training.submodules_to_freeze`` names what the model does not have."""
    modules = dict(method.model.model.named_modules())
    for name in settings["training"].get("submodules_to_freeze") or ():
        if name not in modules:
            valid = [known for known, _ in method.model.model.named_children()]
            raise ConfigError("training.submodules_to_freeze", name, "is no submodule of the model", valid=valid)


def load_start(method: Any, settings: Tree) -> list[str]:
    """Load the weights of ``system.input.warm_start`` as anemoi-training does; nothing in the file is run.

    Parameters
    ----------
    method : anemoi.training.train.methods.base.BaseTrainingModule
        Its parameters and buffers are changed in place.
    settings : Tree
        The composed configuration.

    Returns
    -------
    list[str]
        Notes on what the file and the model do not share.

    Raises
    ------
    ConfigError
        The file holds no weights, or those of another size and ``training.transfer_learning`` is not set.
    """
    path = check_start(settings)
    if path is None:
        return []
    content = load_tensors(path)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise ConfigError(_KEY, str(path), "holds no state_dict, as a checkpoint of anemoi-training does")
    # By its own rule: processors of the file, or those of today's data (training.update_ds_stats_on_ckpt_load).
    method._update_checkpoint_state_dict_for_load(content)
    saved, own = content["state_dict"], method.state_dict()
    saved = {name: tensor for name, tensor in saved.items() if isinstance(tensor, torch.Tensor)}
    changed = [name for name in saved if name in own and saved[name].shape != own[name].shape]
    if changed and not settings["training"].get("transfer_learning"):
        rule = f"{changed[0]} has shape {list(saved[changed[0]].shape)}, and {list(own[changed[0]].shape)} in the model"
        raise ConfigError(_KEY, str(path), rule, fix="training.transfer_learning=true leaves out what does not fit")
    for name in changed:
        del saved[name]
    result = method.load_state_dict(saved, strict=False)
    notes = [f"{path}: {len(own) - len(result.missing_keys)} of {len(own)} tensors of the model are loaded"]
    if result.missing_keys:
        notes.append(f"not in the file, or of another shape: {', '.join(result.missing_keys)}")
    if result.unexpected_keys:
        notes.append(f"not in the model: {', '.join(result.unexpected_keys)}")
    return notes
