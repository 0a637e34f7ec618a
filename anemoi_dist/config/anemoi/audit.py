"""Account of every key of anemoi-training's configuration: nothing that changes the result is ignored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from anemoi_dist.config.parse import nearest_keys
from anemoi_dist.config.tree import Tree, find, is_below, leaves
from anemoi_dist.errors import ConfigError

#: Read by anemoi-training's own objects, as they are. What is below is theirs to check.
READ = (
    "config_validation",
    "data",
    "graph",
    "model",
    "task",
    "system.input",
    "system.hardware.num_gpus_per_model",
    "system.hardware.num_gpus_per_ensemble",
    "dataloader.training",
    "dataloader.validation",
    "dataloader.test",
    "dataloader.dataset",
    "dataloader.trajectory_sampling",
    "dataloader.read_group_size",
    "training.method",
    "training.training_loss",
    "training.validation_metrics",
    "training.metrics",
    "training.scalers",
    "training.variable_groups",
    "training.loss_gradient_scaling",
    "training.recompile_limit",
    "training.ensemble_size_per_device",
    "training.transport",
    "training.strategy.num_gpus_per_model",
    "training.strategy.num_gpus_per_ensemble",
    "training.strategy.read_group_size",
    "training.transfer_learning",
    "training.load_weights_only",
    "training.submodules_to_freeze",
    "training.check_variables_compatibility",
    "training.update_ds_stats_on_ckpt_load",
)
#: Translated to keys of ours; see :mod:`~anemoi_dist.config.anemoi.translate`.
TRANSLATED = (
    "system.hardware.num_nodes",
    "system.hardware.num_gpus_per_node",
    "dataloader.batch_size",
    "dataloader.limit_batches",
    "dataloader.num_workers",
    "dataloader.prefetch_factor",
    "training.max_steps",
    "training.max_epochs",
    "training.accum_grad_batches",
    "training.optimization",
    "training.precision",
    "training.gradient_clip",
    "training.weight_averaging",
    "diagnostics.check_val_every_n_epoch",
    "diagnostics.enable_checkpointing",
    "diagnostics.checkpoint",
    "diagnostics.log.interval",
    "diagnostics.log.mlflow",
    "diagnostics.log.tensorboard",
)
#: No effect on the result: diagnostics, plots, paths of output, and what our own engine, loader or launcher decides.
LEFT_OUT = (
    "diagnostics",
    "system.output",
    "system.hardware.accelerator",
    "dataloader.pin_memory",
    "dataloader.persistent_workers",
    "dataloader.validation_rollout",  # some of their configurations have it; they read task.validation_rollout
    "training.num_sanity_val_steps",
    "training.strategy.use_local_synchronization",
    "training.strategy.device",
)


@dataclass(frozen=True)
class Fixed:
    """A key of which only the values are accepted that change nothing here, its default first."""

    valid: tuple[Any, ...]
    rule: str
    fix: str = ""


_STRATEGIES = "anemoi.training.distributed.strategy"
FIXED = {
    "training.deterministic": Fixed((False, None), "is not done: the order of sums is the engine's"),
    "training.preferred_blas_backend": Fixed((None, ""), "is not done"),
    "training.strategy._target_": Fixed(
        (
            f"{_STRATEGIES}.DDPGroupStrategy",
            f"{_STRATEGIES}.DDPEnsGroupStrategy",
            "anemoi.training.distributed.single.SingleDeviceStrategy",
        ),
        "is not run: the engine takes the strategy's place",
        "engine=ddp, zero1, zero2, zero3 or fsdp2, with ",
    ),
    "training.strategy.broadcast_buffers": Fixed((False, None), "is not done: buffers are the same on all ranks"),
    "training.run_id": Fixed(
        (None,),
        "is a run of anemoi-training",
        "system.input.warm_start=ITS_LAST_CKPT goes on from it, run.id=NAME names or continues a run here, with ",
    ),
    "training.fork_run_id": Fixed(
        (None,),
        "is a run of anemoi-training",
        "system.input.warm_start=ITS_LAST_CKPT goes on from it, in run.id=NEW, with ",
    ),
    "dataloader.multiprocessing_context": Fixed((None,), "is not done"),
    "diagnostics.debug.anomaly_detection": Fixed((False, None), "is not done"),
    "diagnostics.log.wandb.enabled": Fixed((False, None), "is not done", "telemetry=mlflow or tensorboard, with "),
}
#: Callbacks that only look at a run. Any other may change it.
_WATCHING = tuple(
    f"anemoi.training.diagnostics.callbacks.{name}"
    for name in ("evaluation", "per_timestep_metrics", "plot", "plot_adapter", "profiler", "provenance", "sanity")
)


def audit(settings: Tree, *, referred: Iterable[str] = ()) -> list[str]:
    """Account for every key of a composed configuration.

    Parameters
    ----------
    settings : Tree
        anemoi-training's configuration.
    referred : Iterable[str]
        Keys that interpolations have referred to: through these, keys that nothing else reads act.

    Returns
    -------
    list[str]
        The keys that have no effect here.

    Raises
    ------
    ConfigError
        A key is not known, or has a value that would change the result and has no counterpart here.
    """
    referred = set(referred)
    left_out: dict[str, None] = {}
    for key, value in leaves(settings):
        if key in FIXED:
            _check_fixed(key, value, FIXED[key])
        elif is_below(key, TRANSLATED):
            continue
        elif node := next((node for node in LEFT_OUT if is_below(key, (node,))), None):
            # Two names say enough of where the plots are.
            left_out[".".join(key.split(".")[: max(2, node.count(".") + 1)])] = None
        elif not is_below(key, READ) and not is_below(key, referred) and not any(is_below(r, (key,)) for r in referred):
            known = (*READ, *TRANSLATED, *LEFT_OUT, *FIXED)
            near = " or ".join(nearest_keys(key, known))
            fix = f"did you mean {near}?" if near else f"task.overrides=[~{key}] if it says nothing"
            raise ConfigError(key, value, "is no key of anemoi-training's configuration that is known here", fix=fix)
    for callback in find(settings, "diagnostics.callbacks")[1] or []:
        _check_callback(callback)
    return list(left_out)


def _check_fixed(key: str, value: Any, fixed: Fixed) -> None:
    # By repr: 0 equals False.
    if repr(value) not in map(repr, fixed.valid):
        default = yaml.safe_dump(fixed.valid[0]).split()[0]
        fix = f"{fixed.fix}task.overrides=[{key}={default}]"
        raise ConfigError(key, value, f"{fixed.rule}; its default is {default}", fix=fix)


def _check_callback(callback: Any) -> None:
    name = callback.get("_target_") if isinstance(callback, dict) else callback
    if not is_below(str(name), _WATCHING):
        raise ConfigError(
            "diagnostics.callbacks",
            name,
            "may change training and is not called here; only those that look on may be left out",
            valid=_WATCHING,
            fix="task.overrides=[diagnostics.callbacks=[]]",
        )


def graph_file(settings: Tree, *, allowed: Iterable[str]) -> str | None:
    """Return the file that the graph has to be read from; None if the graph is built from its nodes and edges.

    Raises
    ------
    ConfigError
        The file would be read and is not trusted: it is a pickle, which runs what it says.
    """
    path = find(settings, "system.input.graph")[1]
    graph = settings.get("graph") or {}
    is_built = bool(graph.get("nodes") or graph.get("edges"))
    # Never written either: each rank would write it, and a later start would read it instead of building the graph.
    if is_built and (not path or graph.get("overwrite") or not Path(path).exists()):
        return None
    if path and not is_below("anemoi.graphs.create.load_graph_from_file", allowed):
        fix = "security.allowed_targets=[anemoi.graphs.create.load_graph_from_file] if you trust the file"
        fix += ", or task.overrides=[graph.overwrite=true], which builds the graph" if is_built else ""
        raise ConfigError("system.input.graph", path, "is a pickle, and reading it runs what it says", fix=fix)
    return path  # type: ignore[no-any-return]
