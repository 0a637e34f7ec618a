"""The rules that span several keys. Every error names the key to change."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from anemoi_dist.config.engines import ENGINE_KINDS, ENGINES
from anemoi_dist.config.identity import check_run_id
from anemoi_dist.config.launcher_checks import check_launcher
from anemoi_dist.config.optimizer_states import checked_state_dtype, is_ademamix
from anemoi_dist.config.schema import (
    DATA_KINDS,
    GUARDED,
    LAUNCHER_KINDS,
    LR_SCALINGS,
    PRECISIONS,
    RANKS_BY,
    SAVE_METRICS,
    SAVE_ON_ERROR,
    SAVE_WHEN_BUSY,
    Config,
    EngineConfig,
)
from anemoi_dist.errors import ConfigError


def check(config: Config) -> None:
    """Raise :class:`ConfigError` for the first rule that the configuration breaks."""
    if config.run.id is not None:
        check_run_id(config.run.id)
    training, lr = config.training, config.training.lr
    _one_of("training.precision", training.precision, PRECISIONS)
    _one_of("training.lr.scale_with", lr.scale_with, LR_SCALINGS)
    _one_of("engine.kind", config.engine.kind, ENGINE_KINDS)
    _one_of("data.kind", config.data.kind, DATA_KINDS)
    _one_of("launcher.kind", config.launcher.kind, LAUNCHER_KINDS)
    _one_of("launcher.ranks_by", config.launcher.ranks_by, RANKS_BY)
    if config.launcher.hostfile is not None and config.launcher.kind != "mpi":
        rule = f"has no effect with launcher.kind={config.launcher.kind}"
        raise ConfigError("launcher.hostfile", config.launcher.hostfile, rule, fix="launcher=mpi, or leave it out")
    for name in config.run.allow_changed:
        _one_of("run.allow_changed", name, tuple(GUARDED))
    for key, value, lowest in (
        ("run.seed", config.run.seed, 0),
        ("training.max_steps", training.max_steps, 1),
        ("training.global_batch_size", training.global_batch_size, 1),
        ("training.rollout", training.rollout, 1),
        ("training.lr.iterations", lr.iterations, 1),
        ("training.lr.warmup", lr.warmup, 0),
        ("training.max_skipped", training.max_skipped, 0),
        ("data.multistep_input", config.data.multistep_input, 1),
        ("data.num_workers", config.data.num_workers, 0),
        ("data.prefetch_factor", config.data.prefetch_factor, 1),
        ("validation.interval_steps", config.validation.interval_steps, 1),
        ("validation.max_samples", config.validation.max_samples, 1),
        ("checkpoint.interval_steps", config.checkpoint.interval_steps, 1),
        ("checkpoint.keep_last", config.checkpoint.keep_last, 1),
        ("checkpoint.keep_every", config.checkpoint.keep_every, 1),
        ("telemetry.interval_steps", config.telemetry.interval_steps, 1),
        ("launcher.ranks", config.launcher.ranks, 1),
        ("launcher.nodes", config.launcher.nodes, 1),
        ("launcher.gpus_per_node", config.launcher.gpus_per_node, 0),
        ("launcher.max_restarts", config.launcher.max_restarts, 0),
        ("launcher.backoff_s", config.launcher.backoff_s, 0),
        ("launcher.max_requeues", config.launcher.max_requeues, 0),
        ("launcher.max_retries", config.launcher.max_retries, 0),
        ("launcher.slurm.signal_s", config.launcher.slurm.signal_s, 1),
    ):
        if value is not None and value < lowest:
            raise ConfigError(key, value, f"must be at least {lowest}", fix=f"{key}={lowest}")
    if not 0 < lr.rate < float("inf"):
        raise ConfigError("training.lr.rate", lr.rate, "must be a positive, finite number", fix="training.lr.rate=1e-3")
    if not 0 <= lr.min <= lr.rate:
        raise ConfigError(
            "training.lr.min", lr.min, f"must lie between 0 and training.lr.rate={lr.rate}", fix="training.lr.min=0"
        )
    if training.clip_grad_norm is not None and not 0 < training.clip_grad_norm < float("inf"):
        raise ConfigError(
            "training.clip_grad_norm", training.clip_grad_norm, "must be positive", fix="null switches clipping off"
        )
    timeout_s = config.watchdog.timeout_s
    if timeout_s is not None and not 0 < timeout_s < float("inf"):
        raise ConfigError("watchdog.timeout_s", timeout_s, "must be positive", fix="null switches the watchdog off")
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
    _check_target("model", config.model)
    _check_target("training.optimizer", training.optimizer)
    if "lr" in training.optimizer:
        value = training.optimizer["lr"]
        raise ConfigError("training.optimizer.lr", value, "is injected", fix=f"training.lr.rate={value}")
    _check_state_dtype(training.optimizer)
    if training.scheduler is not None:
        _check_target("training.scheduler", training.scheduler)


def _one_of(key: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(key, value, "is not a valid name", valid=valid)


def _check_rename(rename: dict[str, str]) -> None:
    """Refuse renames that would be done again, to something else, when the renamed checkpoint is resumed."""
    for old, new in rename.items():
        key = f"checkpoint.rename.{old}"
        if not old or "" in old.split(".") or (new and "" in new.split(".")):
            raise ConfigError(key, new, "must be names, or prefixes without a dot at the end")
        if not new:
            raise ConfigError(key, new, "must name what it becomes", fix="checkpoint.rename={old: new}")
        for other in rename:
            if new == other or new.startswith(f"{other}."):
                raise ConfigError(
                    key, new, f"would be renamed again by {other} when the run is resumed", fix="choose another name"
                )


def _check_engine(engine: EngineConfig) -> None:
    if engine.stage not in (0, 1, 2, 3):
        raise ConfigError("engine.stage", engine.stage, "must be a ZeRO stage", valid=("0", "1", "2", "3"))
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
    checkpoint = config.checkpoint
    _one_of("checkpoint.when_busy", checkpoint.when_busy, SAVE_WHEN_BUSY)
    _one_of("checkpoint.on_error", checkpoint.on_error, SAVE_ON_ERROR)
    if checkpoint.url is not None and not re.match(r"[a-z0-9+.-]+://.", checkpoint.url):
        raise ConfigError(
            "checkpoint.url", checkpoint.url, "must have a protocol", fix=f"file://{checkpoint.url}, s3://..., or null"
        )
    minutes = checkpoint.interval_minutes
    if minutes is not None and not 0 < minutes < float("inf"):
        raise ConfigError("checkpoint.interval_minutes", minutes, "must be positive", fix="null: by steps alone")
    for key in ("keep_every", "keep_best"):
        value = getattr(checkpoint, key)
        if value is not None and checkpoint.keep_last is None:
            raise ConfigError(
                f"checkpoint.{key}", value, "has no effect while all are kept", fix="checkpoint.keep_last=3"
            )
    if checkpoint.keep_best is None:
        return
    _one_of("checkpoint.keep_best", checkpoint.keep_best, SAVE_METRICS)
    interval, scored = checkpoint.interval_steps, config.validation.interval_steps
    if interval is not None and (scored is None or interval % scored):
        raise ConfigError(
            "checkpoint.keep_best",
            checkpoint.keep_best,
            f"needs a score for every checkpoint: checkpoint.interval_steps={interval} is no multiple of "
            f"validation.interval_steps={scored}",
            fix=f"validation.interval_steps={interval}",
        )


def _check_target(key: str, node: dict[str, Any]) -> None:
    if not isinstance(node.get("_target_"), str):
        raise ConfigError(f"{key}._target_", node.get("_target_"), "must be an import path such as torch.optim.AdamW")


def _check_state_dtype(optimizer: dict[str, Any]) -> None:
    """Refuse before a queue is waited in what every rank would refuse."""
    if is_ademamix(optimizer) and "state_dtype" in optimizer:
        betas = optimizer.get("betas")
        beta1 = betas[0] if isinstance(betas, Sequence) and betas else 1.0
        checked_state_dtype(optimizer["state_dtype"], beta1=beta1, key="training.optimizer.state_dtype")
