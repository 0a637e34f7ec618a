"""From ``training.optimizer`` to an optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from anemoi_dist.config.instantiate import call, check_arguments, split_node
from anemoi_dist.config.tree import Tree
from anemoi_dist.errors import ConfigError
from anemoi_dist.optimizers.ademamix import AdEMAMix
from anemoi_dist.optimizers.ademamix_schedules import unfinished_warmups

KEY = "training.optimizer"


def create_optimizer(
    node: Tree,
    params: Iterable[Any],
    *,
    lr: float,
    allowed: Iterable[str] = (),
    max_steps: int | None = None,
) -> Optimizer:
    """Build the optimizer that a configuration node names.

    Parameters
    ----------
    node : Tree
        ``_target_`` and the optimizer's own arguments; the learning rate and the parameters are injected.
    params : Iterable[Any]
        Parameters, named parameters or parameter groups.
    lr : float
        Learning rate, scaled already (:func:`anemoi_dist.optimizers.learning_rate.scaled_rate`).
    allowed : Iterable[str]
        ``security.allowed_targets``.
    max_steps : int | None
        Optimizer steps of the run, to warn of AdEMAMix warm-ups that never finish; None: not known.

    Raises
    ------
    ConfigError
        The target is refused or builds no optimizer, or an argument is unknown or breaks a rule.
    """
    target, arguments = split_node(node, key=KEY, allowed=allowed, base=Optimizer)
    check_arguments(target, arguments, key=KEY, injected={"lr": "training.lr.rate", "params": "the model"})
    optimizer = call(target, key=KEY, arguments={"params": params, "lr": lr, **arguments})
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"{KEY}._target_", node["_target_"], "built no torch.optim.Optimizer", fix="torch.optim.AdamW"
        )
    if isinstance(optimizer, AdEMAMix) and max_steps is not None:
        for message in dict.fromkeys(
            m for g in optimizer.param_groups for m in unfinished_warmups(g, max_steps=max_steps)
        ):
            warnings.warn(message, stacklevel=2)
    return optimizer
