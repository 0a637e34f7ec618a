"""The layer that a configuration of anemoi-training lays over the groups of ``task=anemoi``."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anemoi_dist.config.anemoi import facts
from anemoi_dist.config.anemoi.audit import audit, graph_file
from anemoi_dist.config.anemoi.composition import HARDWARE, compose_anemoi
from anemoi_dist.config.anemoi.facts import Facts
from anemoi_dist.config.anemoi.layouts import newer_layout
from anemoi_dist.config.anemoi.places import check_target_names
from anemoi_dist.config.anemoi.translate import Layer, translate
from anemoi_dist.config.anemoi.versions import check_versions
from anemoi_dist.config.groups import group_sizes
from anemoi_dist.config.parse import from_yaml
from anemoi_dist.config.schema import TaskConfig
from anemoi_dist.config.tree import Tree, find, is_below, leaves, place, remove
from anemoi_dist.errors import ConfigError

#: Groups and keys of ours that do not act with ``task=anemoi`` -> what to write instead.
_INEFFECTIVE = {
    "data": "task.overrides=[dataloader...] and [data...]; data.num_workers and data.prefetch_factor do act",
    "model": "task.overrides=[model...]",
    "training.rollout": "task.overrides=[task.rollout.start=N,task.rollout.maximum=N]",
    "validation.lead_steps": "task.overrides=[task.validation_rollout=N]",
    "task.settings": "task.overrides=[...]",
    "task.translated": "the keys themselves",
    "task.steps_per_epoch": "task.overrides=[dataloader.limit_batches.training=N]",
}
_EFFECTIVE = ("data.num_workers", "data.prefetch_factor")
#: Groups that are laid below anemoi-training's configuration, which has all their keys.
_COVERED = ("training", "training/optimizer", "training/scheduler", "checkpoint")
#: Keys of ``task`` that the user sets.
REQUEST = ("config", "name", "overrides")

#: Diagnostics and paths of output, which anemoi-training's schema wants and nothing here uses. Their targets go.
_DIAGNOSTICS: Tree = {
    "plot": {"callbacks": []},
    "callbacks": [],
    "benchmark_profiler": {
        "memory": {"enabled": False, "steps": 1, "warmup": 0, "extra_plots": False, "trace_rank0_only": False},
        "snapshot": {"enabled": False, "steps": 1, "warmup": 0},
        **{name: {"enabled": False} for name in ("time", "speed", "system", "model_summary")},
    },
    "debug": {"anomaly_detection": False},
    "log": {
        "interval": 100,
        "mlflow": {
            **dict.fromkeys(("enabled", "offline", "authentication", "system", "terminal"), False),
            "on_resume_create_child": False,
            "http_max_retries": 1,
            "experiment_name": "",
            "project_name": "",
            "run_name": None,
            "tracking_uri": None,
        },
    },
    "enable_progress_bar": False,
    "print_memory_summary": False,
    "enable_checkpointing": False,
    "check_val_every_n_epoch": 1,
}
_OUTPUT: Tree = {
    "root": None,
    "logs": {"root": "logs", "wandb": None, "mlflow": None, "tensorboard": None},
    "checkpoints": {"root": "checkpoints"},
    "plots": "plots",
    "profiler": "profiler",
}


def anemoi_layer(given: Tree, composed: Tree, *, choices: Mapping[str, str]) -> Layer:
    """Return the layer of ``task.config``.

    Parameters
    ----------
    given : Tree
        Keys that the user has set: those of the cluster's profile, of the file and of the command line.
    composed : Tree
        The whole configuration so far, with these.
    choices : Mapping[str, str]
        Groups that the user has chosen.

    Raises
    ------
    ConfigError
        A key of the user has no effect with this task, or anemoi-training's configuration is refused.
    """
    check_versions()
    task = TaskConfig(**{name: value for name in REQUEST if (value := find(composed, f"task.{name}")[1]) is not None})
    _refuse_ineffective(given, choices)
    hardware = {name: int(number) for name, key in HARDWARE.items() if (number := find(given, key)[1]) is not None}
    frozen = _frozen(task, run_id=find(composed, "run.id")[1], root=str(find(composed, "run.root")[1]))
    if frozen is None:
        allowed = tuple(find(composed, "security.allowed_targets")[1] or ())
        precision = find(given, "training.precision")[1]
        layer = _composed(task, hardware, allowed=allowed, precision=precision)
    else:
        layer = Layer(dict(frozen.translated), dict.fromkeys(frozen.translated, "as at the start"))
        layer.values["task.steps_per_epoch"] = frozen.steps_per_epoch
        layer.messages.append("task.config is not composed again: the run goes on with what it was started with")
        layer.settings = frozen.settings
    translated = {key: value for key, value in layer.values.items() if not is_below(key, ("task",))}
    _fit_micro_batch(layer.values, layer.settings, hardware)
    path = _absolute(task.config)
    layer.name = task.name if path.is_dir() else path.stem
    method = find(layer.settings, "training.method._target_")[1]
    layer.values |= {
        "task.config": str(path),
        "task.translated": translated,
        # A configuration names a model and data; here they are the task's.
        "model._target_": method,
        "data.kind": "anemoi",
    }
    return layer


def _composed(task: TaskConfig, hardware: dict[str, int], *, allowed: tuple[str, ...], precision: str | None) -> Layer:
    composed, referred = compose_anemoi(task, hardware=hardware)
    composed["training"] = newer_layout(composed.get("training") or {})
    left_out = audit(composed, referred=referred)
    settings = _without_diagnostics(composed, graph=graph_file(composed, allowed=allowed))
    check_target_names(settings, allowed=allowed)
    # All that can be refused without the data is refused before the seconds that they take.
    translate(composed, Facts(10**9, 10**9), precision=precision)
    layer = translate(composed, facts.describe(settings, config=str(task.config), allowed=allowed), precision=precision)
    layer.messages.append(f"left out, for it does not change the result: {', '.join(left_out)}")
    layer.settings = settings
    return layer


def _refuse_ineffective(given: Tree, choices: Mapping[str, str]) -> None:
    for group, option in choices.items():
        if group in _COVERED or group in _INEFFECTIVE:
            rule = "has no effect with task=anemoi, whose configuration says it"
            raise ConfigError(
                group, option, rule, fix=_INEFFECTIVE.get(group, f"single keys: {group.split('/')[0]}.KEY=VALUE")
            )
    for key, value in leaves(given):
        for node, fix in _INEFFECTIVE.items():
            if value is not None and is_below(key, (node,)) and not is_below(key, _EFFECTIVE):
                raise ConfigError(key, value, "has no effect with task=anemoi", fix=fix)


def _absolute(config: str | None) -> Path:
    """Return the path of ``task.config``: a run may be resumed from another directory."""
    return Path(str(config)).expanduser().absolute()


def _frozen(task: TaskConfig, *, run_id: str | None, root: str) -> TaskConfig | None:
    """Return the task of the run that the user names, if it was asked for as now: its data may have grown since."""
    file = Path(root, str(run_id), "config.yaml")
    if run_id is None or not file.is_file():
        return None
    frozen = from_yaml(file.read_text()).task
    asked = dataclasses.replace(task, config=str(_absolute(task.config)))
    same = all(getattr(frozen, name) == getattr(asked, name) for name in REQUEST)
    return frozen if same and frozen.settings else None


def _fit_micro_batch(values: Tree, settings: Tree, hardware: dict[str, int]) -> None:
    """Let each rank take its share at once where other ranks than at the start leave no whole batches of theirs."""
    theirs = settings["system"]["hardware"]
    ranks = {name: hardware.get(name, theirs.get(name) or 1) for name in HARDWARE}
    num_ranks = ranks["num_nodes"] * ranks["num_gpus_per_node"]
    share, rest = divmod(values["training.global_batch_size"], num_ranks // group_sizes(settings).sample or 1)
    if rest or share % (values["training.micro_batch_size"] or 1):
        values["training.micro_batch_size"] = None


def _without_diagnostics(composed: Tree, *, graph: str | None) -> Tree:
    """Return what is frozen and given to anemoi-training's objects: nothing in it is run that is not trained."""
    settings: dict[str, Any] = copy.deepcopy(composed)
    settings["diagnostics"] = copy.deepcopy(_DIAGNOSTICS)
    place(settings, "system.output", copy.deepcopy(_OUTPUT))
    place(settings, "system.input.graph", graph)
    if find(settings, "training.weight_averaging")[0]:
        remove(settings, "training.weight_averaging")
    return settings
