"""The averages that AdEMAMix keeps of every parameter, and the rule of their types. No torch: plans read it too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anemoi_dist.config.targets import ALIASES
from anemoi_dist.config.tree import Tree
from anemoi_dist.errors import ConfigError

#: States of AdEMAMix in the shape of their parameter.
AVERAGES = ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")
#: What ``state_dtype`` may be, or say of each average. ``bf16`` alone leaves the slow one in float32.
STATE_DTYPES = ("fp32", "bf16")
_ADEMAMIX = ("anemoi_dist.optimizers.ademamix.AdEMAMix", "anemoi_dist.optimizers.AdEMAMix")


def is_ademamix(optimizer: Tree) -> bool:
    """Whether ``training.optimizer`` names AdEMAMix."""
    target = str(optimizer.get("_target_"))
    return ALIASES.get(target, target) in _ADEMAMIX


def checked_state_dtype(chosen: Any, *, beta1: float, key: str = "state_dtype") -> str | dict[str, str]:
    """Return ``state_dtype``, a mapping of it completed, after checking it.

    Parameters
    ----------
    chosen : Any
        As the user gave it.
    beta1 : float
        Where it is 0 there is no fast average.
    key : str
        What the user would call it.
    """
    rule = "is no type of states"
    if "8" in str(chosen):
        rule += " (in 8 bits the slow average drifts by a third and more)"
    if not isinstance(chosen, Mapping):
        if chosen not in STATE_DTYPES:
            raise ConfigError(key, chosen, rule, valid=(*STATE_DTYPES, "{exp_avg_slow: bf16, ...}"))
        return str(chosen)
    for name, dtype in chosen.items():
        if name not in AVERAGES:
            raise ConfigError(key, name, "is no average", valid=AVERAGES)
        if dtype not in STATE_DTYPES:
            raise ConfigError(f"{key}.{name}", dtype, rule, valid=STATE_DTYPES)
    if not beta1 and chosen.get("exp_avg_fast") == "bf16":
        rule = "has no effect: with a first beta of 0 there is no fast average"
        raise ConfigError(f"{key}.exp_avg_fast", "bf16", rule, fix="remove it")
    # Plain: Hydra's dictionary would follow the optimizer into its pickles.
    return {name: str(chosen.get(name, "fp32")) for name in AVERAGES}
