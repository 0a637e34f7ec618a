"""EMA states of AdEMAMix and their dtypes. No torch: plans read it too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anemoi_dist.config.targets import ALIASES
from anemoi_dist.config.tree import Tree
from anemoi_dist.errors import ConfigError

#: Optimizer states of AdEMAMix, each in the shape of its parameter.
EMA_STATES = ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")
#: Values of ``state_dtype``, for all states or by state. ``bf16`` for all leaves the slow EMA in float32.
STATE_DTYPES = ("fp32", "bf16")
_ADEMAMIX = ("anemoi_dist.optimizers.ademamix.AdEMAMix", "anemoi_dist.optimizers.AdEMAMix")


def is_ademamix(optimizer: Tree) -> bool:
    """Whether ``training.optimizer`` names AdEMAMix."""
    target = str(optimizer.get("_target_"))
    return ALIASES.get(target, target) in _ADEMAMIX


def narrow_states(state_dtype: str | Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the EMA states that a checked ``state_dtype`` keeps in bfloat16."""
    if not isinstance(state_dtype, Mapping):
        return ("exp_avg_fast", "exp_avg_sq") if state_dtype == "bf16" else ()
    return tuple(name for name, dtype in state_dtype.items() if dtype == "bf16")


def checked_state_dtype(chosen: Any, *, beta1: float, key: str = "state_dtype") -> str | dict[str, str]:
    """Check ``state_dtype`` and return it, a mapping completed.

    Parameters
    ----------
    chosen : Any
        Value given by the user.
    beta1 : float
        First beta; with 0 there is no fast EMA.
    key : str
        Name of the option in messages.

    Raises
    ------
    ConfigError
        An unknown state or dtype, or a dtype of a state that does not exist.
    """
    rule = "is no type of states"
    if "8" in str(chosen):
        rule += " (in 8 bits the slow EMA drifts by a third and more)"
    if not isinstance(chosen, Mapping):
        if chosen not in STATE_DTYPES:
            raise ConfigError(key, chosen, rule, valid=(*STATE_DTYPES, "{exp_avg_slow: bf16, ...}"))
        return str(chosen)
    for name, dtype in chosen.items():
        if name not in EMA_STATES:
            raise ConfigError(key, name, "is no EMA state", valid=EMA_STATES)
        if dtype not in STATE_DTYPES:
            raise ConfigError(f"{key}.{name}", dtype, rule, valid=STATE_DTYPES)
    if not beta1 and chosen.get("exp_avg_fast") == "bf16":
        rule = "has no effect: with a first beta of 0 there is no fast EMA"
        raise ConfigError(f"{key}.exp_avg_fast", "bf16", rule, fix="remove it")
    # A plain dictionary: Hydra's own would end up in the optimizer's pickles.
    return {name: str(chosen.get(name, "fp32")) for name in EMA_STATES}
