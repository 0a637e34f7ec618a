"""From ``training.optimizer`` to an optimizer."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from anemoi_dist.config.targets import resolve_target
from anemoi_dist.errors import ConfigError
from anemoi_dist.optimizers.ademamix import AdEMAMix
from anemoi_dist.optimizers.schedules import unfinished_warmups

KEY = "training.optimizer"


def create_optimizer(
    node: Mapping[str, Any],
    params: Iterable[Any],
    *,
    lr: float,
    allowed: Iterable[str] = (),
    max_steps: int | None = None,
) -> Optimizer:
    """Build the optimizer that a configuration node names.

    Parameters
    ----------
    node : Mapping[str, Any]
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


def split_node(
    node: Mapping[str, Any], *, key: str, allowed: Iterable[str], base: type | tuple[type, ...]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return what ``_target_`` names and the other entries, as plain containers."""
    arguments = {name: _plain(value) for name, value in node.items()}
    name = arguments.pop("_target_", None)
    return resolve_target(name, key=f"{key}._target_", allowed=allowed, base=base), arguments


def check_arguments(
    target: Callable[..., Any], arguments: Mapping[str, Any], *, key: str, injected: Mapping[str, str]
) -> None:
    """Refuse arguments that ``target`` does not take, or that come from elsewhere (``injected``: name to source)."""
    for name, source in injected.items():
        if name in arguments:
            value = arguments[name]
            fix = f"remove it and set {source}={value}" if source.startswith("training.") else "remove it"
            raise ConfigError(f"{key}.{name}", value, f"comes from {source}", fix=fix)
    parameters = inspect.signature(target).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    valid = [name for name in parameters if name not in injected]
    for name, value in arguments.items():
        if name not in valid:
            raise ConfigError(
                key,
                name,
                f"is no argument of {target.__qualname__} (given {value!r})",
                valid=valid,
                fix="defaults: " + ", ".join(_shown(parameters[n]) for n in valid),
            )
    for name in valid:
        parameter = parameters[name]
        if (
            parameter.default is parameter.empty
            and parameter.kind is not parameter.VAR_POSITIONAL
            and name not in arguments
        ):
            raise ConfigError(
                f"{key}.{name}", None, f"{target.__qualname__} needs it", fix=f"give {key}.{name} a value"
            )


def call(target: Callable[..., Any], *, key: str, arguments: dict[str, Any]) -> Any:
    """Call ``target``; what it says against its arguments is the user's to mend."""
    try:
        return target(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{key}.{error.key}", error.value, error.rule, fix=error.fix, valid=error.valid) from error
    except (TypeError, ValueError, AssertionError) as error:
        shown = {name: value for name, value in arguments.items() if name not in ("params", "optimizer")}
        raise ConfigError(key, shown, f"{target.__qualname__} refuses it: {error or type(error).__name__}") from error


def _shown(parameter: inspect.Parameter) -> str:
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"


def _plain(value: Any) -> Any:
    """Turn Hydra's lists and dictionaries, which would end up in pickles, into Python's."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return value
