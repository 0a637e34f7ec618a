"""The rules that a configuration must obey. Every error names the key to change."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from anemoi_dist.config.engines import ENGINES
from anemoi_dist.config.identity import check_run_id
from anemoi_dist.config.launcher_checks import check_launcher
from anemoi_dist.config.optimizer_states import checked_state_dtype, is_ademamix
from anemoi_dist.config.schema import GUARDED, SAVE_METRICS, Config, EngineConfig, MlflowConfig, TrainingConfig
from anemoi_dist.config.secrets import redact
from anemoi_dist.config.tree import Tree, find, is_below
from anemoi_dist.errors import ConfigError


def check(config: Config) -> None:
    """Raise :class:`ConfigError` for the first rule that the configuration breaks."""
    if config.run.id is not None:
        check_run_id(config.run.id)
    # First, so that the rules across keys below meet valid names and numbers only.
    _check_fields(config)
    for name in config.run.allow_changed:
        if name not in GUARDED:
            raise ConfigError("run.allow_changed", name, "is not a valid name", valid=GUARDED)
    _check_training(config.training)
    if not config.validation.lead_steps or min(config.validation.lead_steps) < 1:
        raise ConfigError(
            "validation.lead_steps",
            config.validation.lead_steps,
            "must be a list of steps from 1 on",
            fix="validation.lead_steps=[1,2,4]",
        )
    check_launcher(config.launcher)
    _check_rename(config.checkpoint.rename)
    _check_engine(config.engine)
    _check_checkpoint(config)
    _check_mlflow(config.telemetry.mlflow)
    _check_target("model", config.model)


def _check_fields(node: Any, prefix: str = "") -> None:
    """Check every value against the bound or the valid names that its field declares in the schema."""
    for item in dataclasses.fields(node):
        key, value = f"{prefix}{item.name}", getattr(node, item.name)
        if dataclasses.is_dataclass(value):
            _check_fields(value, f"{key}.")
        elif value is not None:
            _check_value(key, value, item.metadata)


def _check_value(key: str, value: Any, declared: Mapping[str, Any]) -> None:
    if "minimum" in declared and value < declared["minimum"]:
        lowest = declared["minimum"]
        raise ConfigError(key, value, f"must be at least {lowest}", fix=f"{key}={lowest}")
    if "positive" in declared and not 0 < value < float("inf"):
        raise ConfigError(key, value, declared["positive"], fix=declared["fix"])
    if "valid" in declared and value not in declared["valid"]:
        raise ConfigError(key, value, declared["rule"], valid=map(str, declared["valid"]))


def _check_training(training: TrainingConfig) -> None:
    lr = training.lr
    if not 0 <= lr.min <= lr.rate:
        raise ConfigError(
            "training.lr.min", lr.min, f"must lie between 0 and training.lr.rate={lr.rate}", fix="training.lr.min=0"
        )
    if training.clip_grad_norm is not None and training.clip_grad_value is not None:
        raise ConfigError(
            "training.clip_grad_value",
            training.clip_grad_value,
            f"clips by value, and training.clip_grad_norm={training.clip_grad_norm} by norm: choose one",
            fix="training.clip_grad_norm=null",
        )
    decay = training.weight_averaging.decay
    if decay is not None and not 0 <= decay < 1:
        key = "training.weight_averaging.decay"
        raise ConfigError(key, decay, "must be at least 0 and below 1", fix=f"{key}=0.999")
    _check_target("training.optimizer", training.optimizer)
    if "lr" in training.optimizer:
        value = training.optimizer["lr"]
        raise ConfigError("training.optimizer.lr", value, "is injected", fix=f"training.lr.rate={value}")
    _check_state_dtype(training.optimizer)
    if training.scheduler is not None:
        _check_target("training.scheduler", training.scheduler)


def _check_rename(rename: dict[str, str]) -> None:
    """Refuse renames that would apply again to the renamed checkpoint when it is resumed."""
    for old, new in rename.items():
        key = f"checkpoint.rename.{old}"
        # Matching compares whole dotted parts: an empty one would match nothing, silently.
        if not old or "" in old.split(".") or (new and "" in new.split(".")):
            raise ConfigError(key, new, "must be names, or prefixes without a dot at the end")
        if not new:
            raise ConfigError(key, new, "must name what it becomes", fix="checkpoint.rename={old: new}")
        for other in rename:
            if is_below(new, (other,)):
                raise ConfigError(
                    key, new, f"would be renamed again by {other} when the run is resumed", fix="choose another name"
                )


def _check_engine(engine: EngineConfig) -> None:
    # A setting without effect is an error: the user believes that it acts.
    if engine.kind != "deepspeed":
        for key, value in (("stage", engine.stage), ("offload", engine.offload), ("options", engine.options)):
            if value:
                raise ConfigError(
                    f"engine.{key}",
                    value,
                    f"has no effect with engine.kind={engine.kind}",
                    fix=f"engine={engine.kind}, or engine=zero1, zero2, zero3",
                )
    if engine.offload and engine.stage != 3:
        raise ConfigError("engine.offload", True, "needs ZeRO stage 3", fix="engine=zero3_offload")
    if engine.overlap and not engine.spec.can_overlap:
        rule = f"has no effect with engine={engine.spec.name}, which gathers nothing by our own plan"
        *others, last = (f"engine={spec.name}" for spec in ENGINES.values() if spec.can_overlap)
        raise ConfigError("engine.overlap", True, rule, fix=f"{', '.join(others)} or {last}")


def _check_checkpoint(config: Config) -> None:
    if config.checkpoint.init_optimizer and config.checkpoint.init_from is None:
        key = "checkpoint.init_optimizer"
        raise ConfigError(key, True, "has no effect without checkpoint.init_from", fix="checkpoint.init_from=RUN")
    if config.checkpoint.init_from is not None and find(config.task.settings, "system.input.warm_start")[1]:
        rule = "is a second thing to begin with, besides system.input.warm_start"
        raise ConfigError("checkpoint.init_from", config.checkpoint.init_from, rule, fix="leave one of them out")
    checkpoint = config.checkpoint
    if checkpoint.url is not None and not re.match(r"[a-z0-9+.-]+://.", checkpoint.url):
        raise ConfigError(
            "checkpoint.url", checkpoint.url, "must have a protocol", fix=f"file://{checkpoint.url}, s3://..., or null"
        )
    # Both are exceptions from deletion, and with keep_last null nothing is deleted.
    for key in ("keep_every", "keep_best"):
        value = getattr(checkpoint, key)
        if value is not None and checkpoint.keep_last is None:
            raise ConfigError(
                f"checkpoint.{key}", value, "has no effect while all are kept", fix="checkpoint.keep_last=3"
            )
    if checkpoint.keep_best is None:
        return
    if checkpoint.keep_best not in (valid := SAVE_METRICS[config.task.kind]):
        rule = f"is no score of task={config.task.kind}"
        raise ConfigError("checkpoint.keep_best", checkpoint.keep_best, rule, valid=valid)
    # A checkpoint without a score can never be the best, and the user would wonder which one is kept.
    interval, scored = checkpoint.interval_steps, config.validation.interval_steps
    if interval is not None and (scored is None or interval % scored):
        raise ConfigError(
            "checkpoint.keep_best",
            checkpoint.keep_best,
            f"needs a score for every checkpoint: checkpoint.interval_steps={interval} is no multiple of "
            f"validation.interval_steps={scored}",
            fix=f"validation.interval_steps={interval}",
        )


def _check_mlflow(mlflow: MlflowConfig) -> None:
    uri = mlflow.tracking_uri
    if uri is None and mlflow != MlflowConfig():
        raise ConfigError(
            "telemetry.mlflow", None, "has no effect without tracking_uri", fix="telemetry.mlflow.tracking_uri=URL"
        )
    # The configuration is frozen in the run directory, printed and sent.
    if uri is not None and redact(uri) != uri:
        raise ConfigError(
            "telemetry.mlflow.tracking_uri",
            redact(uri),
            "must hold no password or token",
            fix="give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, as variables",
        )


def _check_target(key: str, node: Tree) -> None:
    if not isinstance(node.get("_target_"), str):
        raise ConfigError(f"{key}._target_", node.get("_target_"), "must be an import path such as torch.optim.AdamW")


def _check_state_dtype(optimizer: Tree) -> None:
    """Refuse now, before the job queues, what every rank would refuse."""
    if is_ademamix(optimizer) and "state_dtype" in optimizer:
        betas = optimizer.get("betas")
        # Without betas in the configuration the optimizer's default holds, which has a fast EMA.
        beta1 = betas[0] if isinstance(betas, Sequence) and betas else 1.0
        checked_state_dtype(optimizer["state_dtype"], beta1=beta1, key="training.optimizer.state_dtype")
