"""Ranks that work together on one sample."""

from __future__ import annotations

from dataclasses import dataclass

from anemoi_dist.config.tree import Tree, find
from anemoi_dist.errors import ConfigError

_HARDWARE = "system.hardware"


@dataclass(frozen=True)
class GroupSizes:
    """Sizes of the groups of consecutive ranks; each size divides the next.

    Attributes
    ----------
    reader : int
        Ranks that each read a part of the grid of a sample.
    model : int
        Ranks that share a model: each computes a part of the grid, and all draw the same noise.
    sample : int
        Ranks that share a sample: those of a model, or of all members of an ensemble.
    """

    reader: int = 1
    model: int = 1
    sample: int = 1


def group_sizes(settings: Tree) -> GroupSizes:
    """Return the groups that a configuration of anemoi-training asks for; empty settings ask for none.

    Raises
    ------
    ConfigError
        A size is no whole number or does not divide the next, or the model cannot be shared.
    """
    reader, model = _size(settings, "dataloader.read_group_size"), _size(settings, f"{_HARDWARE}.num_gpus_per_model")
    key, sample = f"{_HARDWARE}.num_gpus_per_model", model
    if is_ensemble(settings):
        key = f"{_HARDWARE}.num_gpus_per_ensemble"
        sample = _size(settings, key)
        if sample % model:
            raise _refused(key, sample, f"must be a multiple of num_gpus_per_model={model}", model)
        members = find(settings, "training.ensemble_size_per_device")[1] or 1
        if model > 1 and members > 1:
            rule = f"must be 1 where {model} ranks share a model (num_gpus_per_model)"
            raise _refused("training.ensemble_size_per_device", members, rule, 1)
    if model % reader:
        raise _refused("dataloader.read_group_size", reader, f"must divide num_gpus_per_model={model}", model)
    if find(settings, "model.keep_batch_sharded")[1]:
        if reader != model:
            rule = f"must be num_gpus_per_model={model} with model.keep_batch_sharded=true"
            raise _refused("dataloader.read_group_size", reader, rule, model)
    elif model > 1 and _divides_encoded_data_twice(settings):
        rule = f"does not work where {model} ranks share a model: GNNForwardMapper leaves encoded_data divided"
        raise _refused("model.keep_batch_sharded", False, rule, "true")
    return GroupSizes(reader, model, sample)


def check_ranks(settings: Tree, num_ranks: int) -> GroupSizes:
    """Return the groups, into which ``num_ranks`` can be divided.

    Raises
    ------
    ConfigError
        They cannot.
    """
    groups = group_sizes(settings)
    if num_ranks % groups.sample:
        key = f"{_HARDWARE}.num_gpus_per_{'ensemble' if is_ensemble(settings) else 'model'}"
        raise _refused(key, groups.sample, f"must divide the {num_ranks} ranks", 1)
    return groups


def is_ensemble(settings: Tree) -> bool:
    """Whether anemoi-training's ensemble method trains, whose members may lie on several ranks."""
    return str(find(settings, "training.method._target_")[1]).endswith(".EnsembleTraining")


def _divides_encoded_data_twice(settings: Tree) -> bool:
    """Whether a decoder divides once more what an encoder has left divided; so anemoi-models 0.19 fails."""
    encoders, decoders = (find(settings, f"model.{part}")[1] or {} for part in ("encoders", "decoders"))
    mappers = [str(find(node, "mapper._target_")[1]) for node in encoders.values()]
    features = [find(node, "target_node_features")[1] or () for node in decoders.values()]
    return any(name.endswith(".GNNForwardMapper") for name in mappers) and any("encoded_data" in f for f in features)


def _size(settings: Tree, key: str) -> int:
    value = find(settings, key)[1]
    value = 1 if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _refused(key, value, "must be a whole number, 1 or more", 1)
    return value


def _refused(key: str, value: object, rule: str, better: object) -> ConfigError:
    return ConfigError(key, value, rule, fix=f"task.overrides=[{key}={better}]")
