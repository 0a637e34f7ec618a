"""From ``training.scheduler`` and ``training.lr`` to a scheduler, and the rate of any update.

The rate is a function of (configuration, number of updates done). No scheduler state is ever saved: a state
dictionary would bring back the old length and rates of a run that continues with new ones.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from anemoi_dist.config.instantiate import call, check_arguments, describe, split_node
from anemoi_dist.config.schema import LrConfig
from anemoi_dist.config.timm_scheduler import load_timm_scheduler
from anemoi_dist.config.tree import Tree
from anemoi_dist.errors import ConfigError

KEY = "training.scheduler"

#: State of each torch scheduler and the options of its groups before the first update, to go back to.
_beginnings: WeakKeyDictionary[LRScheduler, tuple[dict[str, Any], list[dict[str, Any]]]] = WeakKeyDictionary()


def scaled_rate(lr: LrConfig, world_size: int) -> float:
    """Return the learning rate after warm-up.

    Parameters
    ----------
    lr : LrConfig
        ``rate`` and ``scale_with``: ``none``, or ``world_size``, which is anemoi-training's rule.
    world_size : int
        Data-parallel ranks.
    """
    return lr.rate * world_size if lr.scale_with == "world_size" else lr.rate


def create_scheduler(
    node: Tree | None,
    optimizer: Optimizer,
    *,
    lr: LrConfig,
    max_steps: int,
    allowed: Iterable[str] = (),
) -> Any:
    """Build the scheduler that a configuration node names, set to the rate of the first update.

    Parameters
    ----------
    node : Tree | None
        ``_target_`` (a scheduler of timm or torch, or one with their methods) and its arguments. What it takes and
        the node leaves out comes from ``lr``: timm's ``t_initial``, ``lr_min``, ``warmup_t``, ``warmup_lr_init`` and
        ``t_in_epochs``, torch's ``T_max`` and ``eta_min``. None: a constant rate.
    optimizer : Optimizer
        Its rate is the one after warm-up.
    lr : LrConfig
        ``training.lr``.
    max_steps : int
        Optimizer steps of the run.
    allowed : Iterable[str]
        ``security.allowed_targets``.

    Returns
    -------
    Any
        The scheduler, or None for a constant rate. Advance it with :func:`set_num_updates` only.

    Raises
    ------
    ConfigError
        The target is refused, an argument is unknown or breaks a rule, or the rate would depend on more than the
        number of updates, or fails, is negative or not finite at some step of the run.
    """
    if node is None:
        _warn_of_unused(lr, used=(), name="a constant rate (training.scheduler=null)")
        return None
    target, given = split_node(
        node, key=KEY, allowed=allowed, base=(LRScheduler, load_timm_scheduler().scheduler.Scheduler)
    )
    parameters = inspect.signature(target).parameters
    _refuse_unsteady(target, given, parameters, name=node["_target_"])
    offered = _injections(lr, optimizer, given, max_steps=max_steps)
    injected = {name: value for name, value in offered.items() if name in parameters}
    _warn_of_unused(lr, used=injected, name=node["_target_"])
    arguments = {**injected, **given}
    check_arguments(target, arguments, key=KEY, injected={"optimizer": "training.optimizer"})
    _check_lengths(arguments, max_steps=max_steps)
    scheduler = call(target, key=KEY, arguments={"optimizer": optimizer, **arguments})
    # torch's schedulers compute a rate from the one before. Without a copy of the beginning, a run that loads an
    # earlier step than it stands at could not get back to that step's rate.
    if not hasattr(scheduler, "step_update"):
        options = [{name: value for name, value in g.items() if name != "params"} for g in optimizer.param_groups]
        _beginnings[scheduler] = (copy.deepcopy(scheduler.state_dict()), copy.deepcopy(options))
    _check_rates(scheduler, optimizer, arguments, max_steps=max_steps)
    set_num_updates(scheduler, 0)
    return scheduler


def _check_rates(scheduler: Any, optimizer: Optimizer, arguments: Tree, *, max_steps: int) -> None:
    """Go through the whole schedule: what fails or turns negative only later would do so hours into the run."""
    largest, error = 0.0, ""
    for step in range(max_steps + 1):
        try:
            set_num_updates(scheduler, step)
            rates = [float(group["lr"]) for group in optimizer.param_groups]
        except Exception as raised:  # of timm's, torch's or the user's code
            rates, error = [], describe(raised)
        largest = max([largest, *rates])
        # A cosine may end below zero by a rounding error.
        if error or not all(-1e-12 * largest <= rate < math.inf for rate in rates):
            rule = f"has no rate for the update after step {step}: {error or f'it gives {rates}'}"
            raise ConfigError(KEY, arguments, rule, fix=f"a rate of 0 or more up to training.max_steps={max_steps}")


def set_num_updates(scheduler: Any, num_updates: int) -> None:
    """Set the rate for the update that follows ``num_updates`` updates.

    The rate is the same however one gets there: timm's schedulers compute it from the number; torch's compute it
    from the one before, so they are stepped forward from where they stand, or from their beginning.

    Parameters
    ----------
    scheduler : Any
        What :func:`create_scheduler` returned; None does nothing.
    num_updates : int
        Optimizer steps done.
    """
    if scheduler is None:
        return
    if hasattr(scheduler, "step_update"):
        scheduler.step_update(num_updates)
        return
    if num_updates < scheduler.last_epoch:
        _rewind(scheduler)
    with warnings.catch_warnings():
        # It asks for optimizer.step() first, which a resumed run has done in another process.
        warnings.filterwarnings("ignore", message=r".*lr_scheduler\.step\(\)")
        while scheduler.last_epoch < num_updates:
            scheduler.step()


def _rewind(scheduler: LRScheduler) -> None:
    if scheduler not in _beginnings:
        raise RuntimeError("only a scheduler that create_scheduler() built can be set back to an earlier update")
    state, options = copy.deepcopy(_beginnings[scheduler])
    scheduler.load_state_dict(state)
    for group, saved in zip(scheduler.optimizer.param_groups, options, strict=True):
        for name, value in saved.items():
            if isinstance(value, Tensor) and isinstance(group.get(name), Tensor):
                group[name].copy_(value)  # whoever holds the tensor, a captured graph say, sees the change
            else:
                group[name] = value


def _injections(lr: LrConfig, optimizer: Optimizer, given: Tree, *, max_steps: int) -> Tree:
    """Return the arguments that ``training.lr`` stands for, less those the node gives itself."""
    group = optimizer.param_groups[0]
    iterations = max_steps if lr.iterations is None else lr.iterations
    warmup = given.get("warmup_t", lr.warmup)
    values = {
        "t_initial": iterations,
        "lr_min": lr.min,
        "warmup_t": lr.warmup,
        # Not 0, which would waste the first update.
        "warmup_lr_init": float(group.get("initial_lr", group["lr"])) / (warmup + 1),
        "t_in_epochs": False,
        "T_max": iterations,
        "eta_min": lr.min,
    }
    return {name: value for name, value in values.items() if name not in given}


def _refuse_unsteady(target: Any, given: Tree, parameters: Mapping[str, inspect.Parameter], *, name: str) -> None:
    """Refuse what makes the rate depend on more than the number of updates."""
    fix = "use timm.scheduler.CosineLRScheduler"
    for argument, value in given.items():
        if "_target_" in str(value) or callable(value):
            rule = "schedulers and functions within a scheduler are not built"
            write = (
                "timm.scheduler.CosineLRScheduler, which has a warm-up (training.lr.warmup) and restarts; or a class "
                "of yours, class Mine(torch.optim.lr_scheduler.SequentialLR), that takes the optimizer and numbers and "
                "builds the others itself, from a module that security.allowed_targets names"
            )
            raise ConfigError(f"{KEY}.{argument}", value, rule, fix=write)
    if given.get("t_in_epochs"):
        raise ConfigError(f"{KEY}.t_in_epochs", True, "the rate is set every optimizer step", fix="give times in steps")
    if "last_epoch" in given:
        raise ConfigError(f"{KEY}.last_epoch", given["last_epoch"], "comes from the checkpoint", fix="remove it")
    if "metrics" in inspect.signature(getattr(target, "step", target)).parameters or "patience_t" in parameters:
        raise ConfigError(f"{KEY}._target_", name, "the rate must depend on the step alone, not on a score", fix=fix)
    if not (hasattr(target, "step_update") or (hasattr(target, "step") and hasattr(target, "get_last_lr"))):
        raise ConfigError(f"{KEY}._target_", name, "is no scheduler: it has neither step_update() nor step()", fix=fix)


def _warn_of_unused(lr: LrConfig, *, used: Iterable[str], name: str) -> None:
    takes = {"iterations": {"t_initial", "T_max"}, "min": {"lr_min", "eta_min"}, "warmup": {"warmup_t"}}
    default = LrConfig()
    for field, arguments in takes.items():
        if getattr(lr, field) != getattr(default, field) and not arguments & set(used):
            warnings.warn(f"training.lr.{field}={getattr(lr, field)} has no effect with {name}", stacklevel=3)


def _check_lengths(arguments: Tree, *, max_steps: int) -> None:
    """Refuse a schedule that ends before the run, and warn of a warm-up that does not end in it."""
    if isinstance(total := arguments.get("total_steps"), int) and total < max_steps:
        raise ConfigError(
            f"{KEY}.total_steps",
            total,
            f"ends before training.max_steps={max_steps}: the schedule has no rate from there on",
            fix=f"{KEY}.total_steps={max_steps}",
        )
    warmup = arguments.get("warmup_t", 0)
    if warmup > max_steps:
        warnings.warn(
            f"training.lr.warmup={warmup} is longer than training.max_steps={max_steps}: the rate never reaches "
            "training.lr.rate",
            stacklevel=3,
        )
