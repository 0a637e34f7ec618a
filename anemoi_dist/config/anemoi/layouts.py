"""Translation of anemoi-training's older and newer layouts of ``training``. No torch: the control side uses it.

=============== =====================================================================================
up to 0.7       ``optimizer.{zero, kwargs}`` (always AdamW) and ``lr.{rate, iterations, min, warmup}``
then            ``optimizer._target_`` with the same ``lr``: ours
from 0.12       ``optimization.{lr, optimizer, lr_scheduler, pl_lr_scheduler}``
=============== =====================================================================================
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from anemoi_dist.config.tree import Tree
from anemoi_dist.errors import ConfigError

_OPTIMIZATION = ("lr", "optimizer", "lr_scheduler", "pl_lr_scheduler")
_LR = ("rate", "iterations", "min", "warmup")
#: torch's wrapper that partitions states, in which configurations of anemoi-training put an optimizer.
ZERO_OPTIMIZER = "torch.distributed.optim.ZeroRedundancyOptimizer"
_USE_ENGINE = "engine=zero1 partitions the states of any optimizer (zero2, zero3 and fsdp2 partition more)"


def translate_training(training: Tree) -> tuple[Tree, list[str]]:
    """Translate the ``training`` node that a user wrote, before it is merged with defaults.

    Parameters
    ----------
    training : Tree
        The node in any of the three layouts; it is not modified.

    Returns
    -------
    tuple[Tree, list[str]]
        The node in this product's layout, and a message for each translation; none if nothing changed.

    Raises
    ------
    ConfigError
        An entry of an older or newer layout has no counterpart here.
    """
    translated = copy.deepcopy(dict(training))
    messages: list[str] = []
    if "optimization" in translated:
        _translate_optimization(translated, messages)
    optimizer = translated.get("optimizer")
    if isinstance(optimizer, Mapping):
        translated["optimizer"] = _translate_optimizer(dict(optimizer), messages)
    return translated, messages


def newer_layout(training: Tree) -> Tree:
    """Return the ``training`` node of a composed configuration with ``optimization``, from an older layout too.

    Older versions always had a cosine schedule by step.
    """
    if "optimization" in training:
        return training
    rest = {name: value for name, value in training.items() if name not in ("lr", "optimizer")}
    lr = training.get("lr") or {}
    _refuse_leftovers("training.lr", lr, _LR)
    schedule = {
        "_target_": "timm.scheduler.CosineLRScheduler",
        "lr_min": lr.get("min", 0.0),
        "t_initial": lr.get("iterations") or training.get("max_steps"),
        "warmup_t": lr.get("warmup", 1000),
        "t_in_epochs": False,
    }
    optimizer = _translate_optimizer(dict(training.get("optimizer") or {}), [])
    optimization = {"lr": lr.get("rate"), "optimizer": optimizer, "lr_scheduler": schedule}
    return rest | {"optimization": optimization | {"pl_lr_scheduler": {"interval": "step"}}}


def _translate_optimization(training: Tree, messages: list[str]) -> None:
    """Spread ``optimization`` over ``lr``, ``optimizer`` and ``scheduler``, in place."""
    key = "training.optimization"
    node = training.pop("optimization")
    if not isinstance(node, Mapping):
        raise ConfigError(key, node, "must be a group of entries", valid=_OPTIMIZATION)
    _refuse_leftovers(key, node, _OPTIMIZATION)
    if "lr" in node:
        training["lr"] = _merge_lr(training.get("lr"), node["lr"], messages)
    if "optimizer" in node:
        training["optimizer"] = node["optimizer"]
        messages.append(f"{key}.optimizer became training.optimizer")
    if "lr_scheduler" in node:
        training["scheduler"] = node["lr_scheduler"]
        constant = "" if node["lr_scheduler"] else ": the rate is constant"
        messages.append(f"{key}.lr_scheduler became training.scheduler{constant}")
    if "pl_lr_scheduler" in node:
        _drop_lightning_options(node["pl_lr_scheduler"] or {}, has_scheduler=bool(node.get("lr_scheduler", True)))
        messages.append(f"{key}.pl_lr_scheduler was dropped: the rate is set after every optimizer step")


def _merge_lr(ours: Any, theirs: Any, messages: list[str]) -> Tree:
    key = "training.optimization.lr"
    merged = dict(ours or {})
    if isinstance(theirs, Mapping):
        _refuse_leftovers(key, theirs, _LR)
        messages.extend(f"{key}.{name} became training.lr.{name}" for name in theirs)
        merged.update(theirs)
    else:
        merged["rate"] = theirs
        messages.append(f"{key} became training.lr.rate")
    # Without it the same file would train with another rate here.
    if "scale_with" not in merged:
        merged["scale_with"] = "world_size"
        messages.append(
            "training.lr.scale_with became world_size: anemoi-training multiplies this rate by the number of ranks; "
            "set it to none for a rate that the number of ranks does not change"
        )
    return merged


def _drop_lightning_options(options: Tree, *, has_scheduler: bool) -> None:
    key = "training.optimization.pl_lr_scheduler"
    _refuse_leftovers(key, options, ("interval", "frequency"))
    if not has_scheduler:
        return
    # Lightning's own default is "epoch".
    for name, needed in (("interval", "step"), ("frequency", 1)):
        value = options.get(name, "epoch" if name == "interval" else 1)
        if value != needed:
            raise ConfigError(
                f"{key}.{name}", value, "the rate is set after every optimizer step here", fix=f"{key}.{name}={needed}"
            )


def _translate_optimizer(node: Tree, messages: list[str]) -> Tree:
    key = "training.optimizer"
    if "_target_" not in node and ("kwargs" in node or "zero" in node):
        _refuse_leftovers(key, node, ("zero", "kwargs"))
        if node.get("zero"):
            messages.append(f"{key}.zero was dropped: {_USE_ENGINE}")
        messages.append(f"{key}.kwargs became arguments of torch.optim.AdamW, with {key}._target_")
        return {"_target_": "torch.optim.AdamW", **(node.get("kwargs") or {})}
    if node.get("_target_") == ZERO_OPTIMIZER:
        return _unwrap_zero_optimizer(node, messages)
    return node


def _unwrap_zero_optimizer(node: Tree, messages: list[str]) -> Tree:
    """Take the optimizer out of torch's partitioning wrapper: engines do the partitioning here."""
    key = "training.optimizer.optimizer_class"
    arguments = {name: value for name, value in node.items() if name not in ("_target_", "optimizer_class")}
    inner = node.get("optimizer_class")
    inner = {"_target_": inner} if isinstance(inner, str) else dict(inner or {})
    inner.pop("_partial_", None)
    target = inner.pop("_target_", None)
    if not isinstance(target, str):
        raise ConfigError(f"{key}._target_", target, "must name the optimizer to partition", fix="torch.optim.AdamW")
    messages.append(f"training.optimizer._target_={ZERO_OPTIMIZER} became {target}: {_USE_ENGINE}")
    return {"_target_": target, **inner, **arguments}


def _refuse_leftovers(key: str, node: Mapping[str, Any], valid: tuple[str, ...]) -> None:
    for name, value in node.items():
        if name not in valid:
            raise ConfigError(
                key,
                name,
                f"has no counterpart in this layout (given {value!r})",
                valid=valid,
                fix=f"remove {key}.{name}",
            )
