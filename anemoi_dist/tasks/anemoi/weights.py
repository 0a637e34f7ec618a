"""The checkpoint of anemoi-training that a new run of ``task=anemoi`` begins with: ``system.input.warm_start``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from anemoi_dist.checkpoint.importers.foreign import checked
from anemoi_dist.checkpoint.importers.pickles import load_tensors
from anemoi_dist.checkpoint.importers.torch_file import named_states
from anemoi_dist.checkpoint.shard import WholeTensors
from anemoi_dist.config.tree import Tree
from anemoi_dist.errors import ConfigError
from anemoi_dist.tasks.anemoi.module import PREFIX
from anemoi_dist.tasks.base import Start

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
    if training.get("transfer_learning") and not training.get("load_weights_only"):
        rule = "has no effect without training.load_weights_only: an optimizer goes on with the model that it has"
        raise ConfigError("training.transfer_learning", True, rule, fix="training.load_weights_only=true")
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


class StartFile:
    """A checkpoint of anemoi-training's trainer; nothing in it is run.

    Parameters
    ----------
    path : Path
        The file.

    Attributes
    ----------
    content : Tree
        Its parts, in which objects are placeholders.
    variables : dict[str, dict[str, int]]
        Dataset -> variable -> its place among the variables of the data.
    units : dict[str, Tree]
        Dataset -> variable -> what the dataset says of it; only those that say something.

    Raises
    ------
    ConfigError
        It is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.content = path, load_tensors(path)
        if not isinstance(self.content, dict) or not isinstance(self.content.get("state_dict"), dict):
            raise ConfigError(_KEY, str(path), "holds no state_dict, as a checkpoint of anemoi-training does")
        indices = _below(self.content, "hyper_parameters", "data_indices")
        self.variables = {
            name: named
            for name, saved in (indices or {}).items()
            if (named := _below(getattr(saved, "state", None), "name_to_index")) and _are_places(named)
        }
        if not self.variables:
            rule = "does not say which variables its datasets have, as checkpoints of anemoi-training 0.7 and later do"
            raise ConfigError(_KEY, str(path), rule)
        described = _below(self.content, "hyper_parameters", "metadata", "dataset") or {}
        units = {name: _below(described.get(name), "variables_metadata") for name in self.variables}
        self.units = {name: said for name, said in units.items() if said is not None}

    def check_variables(
        self, data_indices: Mapping[str, Any], metadata: Mapping[str, Any], settings: Tree
    ) -> list[str]:
        """Compare variables and units with those of the data, by anemoi-training's own rules; return notes.

        Parameters
        ----------
        data_indices : Mapping[str, anemoi.models.data_indices.collection.IndexCollection]
            The data's, by dataset.
        metadata : Mapping[str, Any]
            What each dataset says of itself.
        settings : Tree
            ``training.check_variables_compatibility`` is used.

        Raises
        ------
        ConfigError
            A variable has another place, is missing or is new, or its units differ: channels would be mixed up.
        """
        notes = []
        for name, own in data_indices.items():
            if name not in self.variables:
                notes.append(f"the dataset {name} is not in the file: its encoder and decoder begin untrained")
                continue
            difference = _difference(self.variables[name], own.name_to_index)
            if are_mixed_up(self.variables[name], own.name_to_index):
                fix = "rename and reorder in dataloader.dataset give the data the variables of the file, in its order"
                raise ConfigError(_KEY, str(self.path), f"has other variables of {name}: {difference}", fix=fix)
            notes += [f"variables of {name} go by their places: {difference}"] if difference else []
        ignored = self.variables.keys() - data_indices.keys()
        notes += [f"the dataset {name} of the file is not used" for name in sorted(ignored)]
        self._check_units(metadata, settings["training"].get("check_variables_compatibility") or {})
        return notes

    def _check_units(self, metadata: Mapping[str, Any], options: Tree) -> None:
        from anemoi.training.utils.variables_metadata import check_variables_metadata_compatibility

        try:
            check_variables_metadata_compatibility(self.units or None, dict(metadata), **options)
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # the file may say anything
            key = "training.check_variables_compatibility"
            fix = f"{key}.ignore_units=[NAME] or {key}.ignore_processing_period=[NAME], if the values are alike"
            raise ConfigError(_KEY, str(self.path), str(error), fix=fix) from error

    def migrate(self, method: Any) -> dict[str, torch.Tensor]:
        """Return the tensors as anemoi-training's module of today names and orders them.

        Its own hook does it: an older order of edges, and whose statistics hold
        (``training.update_ds_stats_on_ckpt_load``).
        """
        indices = {name: SimpleNamespace(name_to_index=places) for name, places in self.variables.items()}
        described = {name: {"variables_metadata": units} for name, units in self.units.items()}
        hyper_parameters = {"data_indices": indices, "metadata": {"dataset": described}}
        saved = {name: t for name, t in self.content["state_dict"].items() if isinstance(t, torch.Tensor)}
        method.on_load_checkpoint({**self.content, "state_dict": saved, "hyper_parameters": hyper_parameters})
        return saved


def _below(node: Any, *names: str) -> dict[Any, Any] | None:
    """Return the dictionary at the end of a path through dictionaries, or None."""
    for name in names:
        node = node.get(name) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else None


def _are_places(named: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(place, int) for name, place in named.items())


def are_mixed_up(saved: Mapping[str, int], own: Mapping[str, int]) -> bool:
    """Return whether a model would take variables for others: anemoi-training's rule, by which a new name is none."""
    moved = any(saved[name] != own[name] for name in saved.keys() & own.keys())
    left, right = ({a[name] for name in a.keys() - b.keys()} for a, b in ((saved, own), (own, saved)))
    return moved or left != right


def _difference(saved: Mapping[str, int], own: Mapping[str, int]) -> str:
    """Name the variables that differ between a file and the data; empty if none does."""
    parts = {
        "only in the file": [f"{name} ({saved[name]})" for name in saved if name not in own],
        "only in the data": [f"{name} ({own[name]})" for name in own if name not in saved],
        "in another place": [
            f"{name} ({saved[name]} in the file, {own[name]} in the data)"
            for name in saved
            if name in own and own[name] != saved[name]
        ],
    }
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)


def load_start(method: Any, settings: Tree, *, metadata: Mapping[str, Any], steps_per_epoch: int) -> Start:
    """Begin with the file of ``system.input.warm_start`` as anemoi-training does; nothing in it is run.

    Parameters
    ----------
    method : anemoi.training.train.methods.base.BaseTrainingModule
        With ``training.load_weights_only``, its parameters and buffers are changed in place.
    settings : Tree
        The composed configuration.
    metadata : Mapping[str, Any]
        What each dataset says of itself.
    steps_per_epoch : int
        Optimizer steps of an epoch.

    Returns
    -------
    Start
        Without ``training.load_weights_only``, weights, states of the optimizer, step and rollout of the file.

    Raises
    ------
    ConfigError
        The file holds no weights, those of other variables, or those of another size and
        ``training.transfer_learning`` is not set; or it lacks the states to go on with.
    """
    path = check_start(settings)
    if path is None:
        return Start()
    file = StartFile(path)
    notes = file.check_variables(method.data_indices, metadata, settings)
    if settings["training"].get("load_weights_only"):
        return Start([*_load_weights(method, file, settings), *notes])
    return _continued(method, file, notes, steps_per_epoch=steps_per_epoch)


def _load_weights(method: Any, file: StartFile, settings: Tree) -> list[str]:
    """Load what the file and the model share; return notes on what they do not."""
    path = file.path
    saved, own = file.migrate(method), method.state_dict()
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


def _continued(method: Any, file: StartFile, notes: list[str], *, steps_per_epoch: int) -> Start:
    """Return where anemoi-training's trainer has left off."""
    step, states = file.content.get("global_step"), file.content.get("optimizer_states")
    # With an average of the weights, theirs takes the place of the weights.
    current = file.content.get("current_model_state")
    weights_only = "training.load_weights_only=true begins with the weights, at step 0"
    if not isinstance(step, int) or not isinstance(states, list) or len(states) != 1 or current is not None:
        rule = "holds no global_step with the states of one optimizer"
        rule = rule if current is None else "holds an average of the weights, which is not continued"
        raise ConfigError(_KEY, str(file.path), rule, fix=weights_only)
    saved = file.migrate(method)
    parameters = dict(method.named_parameters())
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    named = named_states(file.path, states[0], saved, trained=trained)
    tied = method.state_dict().keys() - parameters.keys() - dict(method.named_buffers()).keys()
    tensors = {
        (f"{PREFIX}{name}", "param" if name in parameters else "buffer"): checked(f"{PREFIX}{name}", tensor).detach()
        for name, tensor in saved.items()
        if name not in tied
    }
    tensors |= {(f"{PREFIX}{name}", kind): t for name, held in named.items() for kind, t in held.items()}
    epochs, more = _epochs(file, step, steps_per_epoch=steps_per_epoch)
    notes = [f"goes on at step {step} of {file.path}, with the states of its optimizer", *notes, *more]
    runtime = method.task.training_runtime_state_dict()
    return Start(notes, WholeTensors(tensors), step, {"epochs": epochs, "runtime": runtime})


def _epochs(file: StartFile, step: int, *, steps_per_epoch: int) -> tuple[int, list[str]]:
    """Return the number of epochs whose end the rollout has seen, and a note where epochs have another length here."""
    progress = _below(file.content, "loops", "fit_loop", "epoch_progress", "current") or {}
    ended, expected = progress.get("processed"), step // steps_per_epoch
    if ended == expected or (ended == expected - 1 and step % steps_per_epoch == 0):
        return ended, []
    note = f"step {step} ends {ended} epochs in the file, and {expected} here: epochs count on from there, and"
    return expected, [f"{note} the rollout is the file's"]
