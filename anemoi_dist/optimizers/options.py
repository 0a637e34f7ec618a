"""The rules of AdEMAMix's options."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from anemoi_dist.config.optimizer_states import checked_state_dtype, narrow_states
from anemoi_dist.errors import ConfigError
from anemoi_dist.optimizers import ademamix_schedules, implementations


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a parameter group that need another type, after checking all of them."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ConfigError("lr", tuple(lr.shape), "Tensor lr must be 1-element", fix="lr=torch.tensor(1e-3)")
    _number("lr", float(lr) if isinstance(lr, Tensor) else lr, fix="lr=1e-3")
    betas = _checked_betas(options["betas"])
    checked: dict[str, Any] = {"betas": betas}
    for name, fix in (("alpha", "alpha=2.0"), ("eps", "eps=1e-8"), ("weight_decay", "weight_decay=0.01")):
        checked[name] = _number(name, options[name], fix=fix)
    for name in ("beta3_warmup", "alpha_warmup", "schedule_start"):
        if options[name] is not None or name == "schedule_start":
            checked[name] = _number(name, options[name], fix=f"{name}=0 or more optimizer steps", whole=True)
    for name, valid in (("foreach", (None, True, False)), ("maximize", (True, False)), ("capturable", (True, False))):
        if not any(options[name] is value for value in valid):
            raise ConfigError(name, options[name], "must be true or false", valid=[str(x) for x in valid])
    if options["beta3_form"] not in ademamix_schedules.BETA3_FORMS:
        raise ConfigError(
            "beta3_form", options["beta3_form"], "is not a valid name", valid=ademamix_schedules.BETA3_FORMS
        )
    if options["beta3_form"] == "apple" and options["beta3_warmup"] and max(betas[0], betas[2]) + 1e-8 >= 1.0:
        raise ConfigError(
            "betas", betas, "Apple's warm-up adds 1e-8 to a beta, which takes this one to 1", fix="beta3_form='paper'"
        )
    if options["foreach"] and options["capturable"]:
        raise ConfigError(
            "foreach",
            True,
            "has no effect with capturable=True, which updates one tensor at a time",
            fix="foreach=None",
        )
    checked["state_dtype"] = checked_state_dtype(options["state_dtype"], beta1=betas[0])
    implementations.check_name(options)
    if narrow_states(checked["state_dtype"]) and (options["foreach"] or options["implementation"] == "foreach"):
        rule = "can't be done by foreach, which has no stochastic rounding"
        raise ConfigError("state_dtype", checked["state_dtype"], rule, fix="implementation='auto', foreach=None")
    return checked


def _checked_betas(betas: Any) -> tuple[float, float, float]:
    fix = "betas=[0.9, 0.999, 0.9999]"
    # Any sequence will do, and becomes a tuple: Hydra's ListConfig would follow the optimizer into its pickles.
    values = tuple(betas) if isinstance(betas, Iterable) and not isinstance(betas, str) else (betas,)
    if len(values) != 3:
        rule = "must be three numbers: decay of the fast EMA, of the squared gradient, of the slow EMA"
        raise ConfigError("betas", values, rule, fix=fix)
    for value in values:
        _number("betas", value, fix=fix)
        if not value < 1.0:
            raise ConfigError("betas", values, "must each lie in [0, 1)", fix=fix)
    return tuple(float(value) for value in values)  # type: ignore[return-value]


def _number(name: str, value: Any, *, fix: str, whole: bool = False) -> Any:
    try:
        valid = 0.0 <= value < math.inf and not isinstance(value, bool) and (not whole or int(value) == value)
    except TypeError:
        valid = False
    if not valid:
        kind = "a whole number of steps" if whole else "a finite number"
        raise ConfigError(name, value, f"must be {kind}, 0 or more", fix=fix)
    return int(value) if whole else value
