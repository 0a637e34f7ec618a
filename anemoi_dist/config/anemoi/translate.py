"""Translation of anemoi-training's configuration to keys of ours, where both know a thing. Every rule is told."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from anemoi_dist.config.anemoi.facts import Facts
from anemoi_dist.config.anemoi.layouts import translate_training
from anemoi_dist.config.groups import check_ranks
from anemoi_dist.config.tree import Tree, find, is_below
from anemoi_dist.errors import ConfigError

_PRECISIONS = {
    "32": "fp32",
    "32-true": "fp32",
    "bf16": "bf16",
    "bf16-mixed": "bf16",
    "bf16-true": "bf16",
}
_AVERAGING = (
    "anemoi.training.diagnostics.callbacks.weight_averaging.EMAWeightAveraging",
    "pytorch_lightning.callbacks.EMAWeightAveraging",
)
#: Their default, where neither run.seed nor ANEMOI_BASE_SEED is set.
_SEED = 42


@dataclass
class Layer:
    """Keys of ours that another configuration sets.

    Parameters
    ----------
    values : dict[str, Any]
        Dotted key -> value.
    origins : dict[str, str]
        Dotted key -> the key of theirs that it comes from.
    messages : list[str]
        One line for each rule.
    name : str
        Readable name of the configuration.
    settings : Tree
        The configuration itself, as its own objects read it.
    """

    values: Tree = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    name: str = ""
    settings: Tree = field(default_factory=dict)

    def put(self, source: str, **values: Any) -> None:
        """Set keys of ours, written with ``__`` for a dot, from one rule."""
        keys = {name.replace("__", "."): value for name, value in values.items()}
        self.values |= keys
        self.origins |= dict.fromkeys(keys, source)
        said = ", ".join(f"{key}={'null' if value is None else value}" for key, value in keys.items())
        self.messages.append(f"{source} -> {said}")


@dataclass(frozen=True)
class Ranks:
    """Ranks of anemoi-training's configuration, and how many of them share a sample.

    Parameters
    ----------
    nodes, per_node : int
        Their product is the number of ranks.
    per_sample : int
        Ranks that share a sample: those of a model, or of an ensemble.
    """

    nodes: int
    per_node: int
    per_sample: int

    @property
    def parallel(self) -> int:
        """Samples that are computed at once for each that a rank reads."""
        return self.nodes * self.per_node // self.per_sample


class _Source:
    """Typed access to their values; an error names their key."""

    def __init__(self, settings: Tree) -> None:
        self._settings = settings

    def get(self, key: str, default: Any = None) -> Any:
        exists, value = find(self._settings, key)
        return default if not exists or value is None else value

    def count(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            rule = f"must be a whole number, {minimum} or more"
            raise ConfigError(key, value, rule, fix=f"task.overrides=[{key}={minimum}]")
        return value

    def ranks(self) -> Ranks:
        hardware = "system.hardware"
        nodes, per_node = self.count(f"{hardware}.num_nodes", 1), self.count(f"{hardware}.num_gpus_per_node", 1)
        return Ranks(nodes, per_node, check_ranks(self._settings, nodes * per_node).sample)

    def batches(self, split: str, available: int) -> int:
        """Return how many of the available batches of one epoch are taken."""
        key = f"dataloader.limit_batches.{split}"
        limit = self.get(key)
        if limit is None:
            return available
        if isinstance(limit, float) and 0 <= limit <= 1:
            return int(available * limit)
        return min(self.count(key, minimum=0), available)


def translate(settings: Tree, facts: Facts, *, precision: str | None = None) -> Layer:
    """Return what a composed configuration of anemoi-training says about keys of ours.

    Parameters
    ----------
    settings : Tree
        The whole configuration, interpolations resolved.
    facts : Facts
        About its data.
    precision : str, optional
        What the user says ``training.precision`` is; theirs may then have no counterpart.

    Raises
    ------
    ConfigError
        A value has no counterpart here; the message names the key of theirs.
    """
    layer, source = Layer(), _Source(settings)
    ranks = source.ranks()
    layer.put("system.hardware", launcher__nodes=ranks.nodes, launcher__ranks=ranks.per_node)
    steps_per_epoch = _batches_and_steps(layer, source, ranks, facts)
    _optimization(layer, source, ranks)
    _update(layer, source, precision)
    _validation(layer, source, ranks, facts, steps_per_epoch=steps_per_epoch)
    _checkpoints(layer, source, steps_per_epoch)
    _rest(layer, source)
    return layer


def _batches_and_steps(layer: Layer, source: _Source, ranks: Ranks, facts: Facts) -> int:
    batch = source.count("dataloader.batch_size.training")
    accumulation = source.count("training.accum_grad_batches", 1)
    total = batch * ranks.parallel * accumulation
    layer.put(
        f"dataloader.batch_size.training x {ranks.parallel} parallel x {accumulation} accumulated",
        training__global_batch_size=total,
        training__micro_batch_size=batch,
    )
    batches = source.batches("training", facts.training // (batch * ranks.parallel))
    if batches < 1:
        rule = f"leaves no batch of {batch * ranks.parallel} of the {facts.training} samples of training"
        raise ConfigError("dataloader.limit_batches.training", source.get("dataloader.limit_batches.training"), rule)
    steps_per_epoch = max(1, batches // accumulation)
    layer.put(f"{batches} batches of training in an epoch", task__steps_per_epoch=steps_per_epoch)
    limits = {}
    if source.get("training.max_steps", -1) != -1:
        limits["training.max_steps"] = source.count("training.max_steps")
    if source.get("training.max_epochs", -1) != -1:
        limits["training.max_epochs"] = source.count("training.max_epochs") * steps_per_epoch
    if not limits:
        raise ConfigError(
            "training.max_steps", None, "must end the run", fix="task.overrides=[training.max_steps=1000]"
        )
    key = min(limits, key=lambda key: limits[key])
    layer.put(key, training__max_steps=limits[key])
    return steps_per_epoch


def _optimization(layer: Layer, source: _Source, ranks: Ranks) -> None:
    key = "training.optimization"
    training, _ = translate_training({"optimization": source.get(key)})
    rate = training["lr"].get("rate") if "lr" in training else None
    if isinstance(rate, bool) or not isinstance(rate, int | float) or rate < 0:
        raise ConfigError(f"{key}.lr", rate, "must be a number", fix=f"task.overrides=[{key}.lr=1e-4]")
    # In their order of multiplication, so that the last bit is the same.
    effective = ranks.nodes * ranks.per_node * rate / ranks.per_sample
    layer.put(
        f"{key}.lr x {ranks.parallel}",
        training__lr__rate=effective,
        # The rest is the scheduler's; with other ranks the rate stays.
        training__lr__iterations=None,
        training__lr__min=0.0,
        training__lr__warmup=0,
        training__lr__scale_with="none",
    )
    optimizer = training.get("optimizer")
    if not isinstance(optimizer, Mapping):
        raise ConfigError(f"{key}.optimizer", optimizer, "must have a _target_ and its arguments")
    layer.put(f"{key}.optimizer", training__optimizer=dict(optimizer))
    layer.put(f"{key}.lr_scheduler", training__scheduler=_scheduler(training.get("scheduler")))


def _scheduler(node: Any) -> Tree | None:
    if not node:
        return None
    scheduler = dict(node)
    if is_below(str(scheduler.get("_target_")), ("timm.scheduler",)):
        # timm's default: anemoi-training asks by step then, and the rate never changes.
        if scheduler.get("t_in_epochs", True):
            key = "training.optimization.lr_scheduler.t_in_epochs"
            raise ConfigError(key, True, "must be false: the rate is set by step", fix=f"task.overrides=[{key}=false]")
        # timm's default too; left out, ours would begin above 0.
        scheduler.setdefault("warmup_lr_init", 0.0)
    return scheduler


def _update(layer: Layer, source: _Source, precision: str | None) -> None:
    theirs = str(source.get("training.precision", "16-mixed"))
    if theirs in _PRECISIONS:
        layer.put(f"training.precision {theirs}", training__precision=_PRECISIONS[theirs])
    elif precision is None:
        rule = "is not done: scaled fp16 gradients are no part of any engine"
        raise ConfigError("training.precision", theirs, rule, fix="training.precision=bf16 or training.precision=fp32")
    else:
        layer.put(f"training.precision {theirs}, replaced by yours", training__precision=precision)
    value = source.get("training.gradient_clip.val") or None
    algorithm = source.get("training.gradient_clip.algorithm", "norm")
    if value is not None and algorithm not in ("norm", "value"):
        raise ConfigError("training.gradient_clip.algorithm", algorithm, "is not known", valid=("norm", "value"))
    layer.put(
        f"training.gradient_clip by {algorithm}",
        training__clip_grad_norm=value if algorithm == "norm" else None,
        training__clip_grad_value=value if algorithm == "value" else None,
    )
    _weight_averaging(layer, dict(source.get("training.weight_averaging") or {}))


def _weight_averaging(layer: Layer, node: Tree) -> None:
    key = "training.weight_averaging"
    if not node:
        layer.put(key, training__weight_averaging__decay=None)
        return
    if node.pop("_target_", None) not in _AVERAGING:
        rule = "is not done here; the exponential moving average is"
        raise ConfigError(key, node, rule, fix=f"task.overrides=[{key}._target_={_AVERAGING[0]}]", valid=_AVERAGING)
    decay = node.pop("decay", 0.999)
    defaults = {"update_every_n_steps": 1, "use_buffers": False, "device": None}
    for name, value in node.items():
        if value is not None and (name not in defaults or defaults[name] != value):
            raise ConfigError(f"{key}.{name}", value, "is not done here", fix=f"task.overrides=[~{key}.{name}]")
    layer.put(f"{key}.decay", training__weight_averaging__decay=decay)


def _validation(layer: Layer, source: _Source, ranks: Ranks, facts: Facts, *, steps_per_epoch: int) -> None:
    epochs = source.count("diagnostics.check_val_every_n_epoch", 1)
    batch = source.count("dataloader.batch_size.validation", 1) * ranks.parallel
    batches = source.batches("validation", max(1, facts.validation // batch))
    has_limit = source.get("dataloader.limit_batches.validation") is not None
    layer.put(
        f"diagnostics.check_val_every_n_epoch {epochs} x {steps_per_epoch} steps, limit_batches.validation",
        # No batch at all: Lightning does not validate then; the end of a run here always does, on one sample.
        validation__interval_steps=epochs * steps_per_epoch if batches else None,
        validation__max_samples=max(1, batches * batch) if has_limit else None,
    )


def _checkpoints(layer: Layer, source: _Source, steps_per_epoch: int) -> None:
    key = "diagnostics.checkpoint"
    if source.get("diagnostics.enable_checkpointing", True) is False:
        layer.put(
            "diagnostics.enable_checkpointing false: only the end is saved",
            checkpoint__interval_steps=None,
            checkpoint__interval_minutes=None,
        )
        return
    kept, steps, keep_all = [], [], []
    for name, unit in (("every_n_train_steps", 1), ("every_n_epochs", steps_per_epoch), ("every_n_minutes", 0)):
        frequency, number = source.get(f"{key}.{name}.save_frequency"), source.get(f"{key}.{name}.num_models_saved", 0)
        if not frequency or not number:
            continue
        kept += [number] if number > 0 else []
        if unit:
            steps.append(frequency * unit)
            keep_all += [frequency * unit] if number < 0 else []
    minutes = source.get(f"{key}.every_n_minutes.save_frequency")
    layer.put(
        key,
        checkpoint__interval_steps=min(steps, default=None),
        checkpoint__interval_minutes=minutes if source.get(f"{key}.every_n_minutes.num_models_saved") else None,
        checkpoint__keep_last=max(kept, default=3),
        checkpoint__keep_every=max(keep_all, default=None),
    )


def _rest(layer: Layer, source: _Source) -> None:
    seed = os.environ.get("ANEMOI_BASE_SEED")
    if seed is not None and not seed.isdigit():
        raise ConfigError("ANEMOI_BASE_SEED", seed, "must be a whole number", fix="run.seed=42")
    layer.put(
        "anemoi-training's default seed" if seed is None else "ANEMOI_BASE_SEED",
        run__seed=_SEED if seed is None else int(seed),
    )
    workers = source.count("dataloader.num_workers.training", 0, minimum=0)
    layer.put("dataloader.num_workers.training", data__num_workers=workers)
    layer.put("dataloader.prefetch_factor", data__prefetch_factor=source.count("dataloader.prefetch_factor", 2))
    layer.put("diagnostics.log.interval", telemetry__interval_steps=source.count("diagnostics.log.interval", 100))
    if source.get("diagnostics.log.tensorboard.enabled"):
        layer.put("diagnostics.log.tensorboard", telemetry__tensorboard=True)
    mlflow = "diagnostics.log.mlflow"
    if source.get(f"{mlflow}.enabled") and source.get(f"{mlflow}.tracking_uri"):
        layer.put(
            mlflow,
            telemetry__mlflow__tracking_uri=source.get(f"{mlflow}.tracking_uri"),
            telemetry__mlflow__experiment=source.get(f"{mlflow}.experiment_name", "anemoi-dist"),
            telemetry__mlflow__run_name=source.get(f"{mlflow}.run_name"),
        )
