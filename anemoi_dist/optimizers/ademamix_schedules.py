"""Warm-up of AdEMAMix's ``alpha`` and ``beta3`` as pure functions of the optimizer step.

Source: Pagliardini et al., "The AdEMAMix Optimizer", arXiv 2409.03137, section 3 and appendix A, and Apple's PyTorch
code, which differs from the paper by a 1e-8 inside the logarithm. Steps count from 1: the first update is ``step=1``.

The ``fraction`` functions take floats or tensors, so that a captured graph can evaluate them on the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

BETA3_FORMS = ("apple", "paper")

#: What Apple's code adds to a beta inside the logarithm.
_APPLE_OFFSET = 1e-8

Number = TypeVar("Number")


def warmup_fraction(step: float, warmup: float | None) -> float:
    """Return how much of a warm-up is done at ``step``: 0 at step 0 or before, 1 from ``warmup`` on.

    Parameters
    ----------
    step : float
        Optimizer step counted from the start of the schedules.
    warmup : float | None
        Steps of warm-up; None or 0: there is none.
    """
    if not warmup:
        return 1.0
    return min(max(step / warmup, 0.0), 1.0)


def alpha_at(step: float, *, alpha: float, warmup: float | None) -> float:
    """Return the weight of the slow EMA: linear from 0 to ``alpha``."""
    return warmup_fraction(step, warmup) * alpha


def beta3_at(step: float, *, beta1: float, beta3: float, warmup: float | None, form: str = "apple") -> float:
    """Return the decay of the slow EMA: linear in half-life from ``beta1`` to ``beta3``.

    Parameters
    ----------
    step : float
        Optimizer step counted from the start of the schedule.
    beta1, beta3 : float
        First and last value.
    warmup : float | None
        Steps of warm-up; None or 0: ``beta3`` from the first step on.
    form : str
        ``apple`` adds 1e-8 to each beta inside the logarithm, ``paper`` does not.
    """
    fraction = warmup_fraction(step, warmup)
    if fraction >= 1.0:
        return beta3
    if fraction <= 0.0:
        return beta1
    return beta_between(fraction, beta1=beta1, beta3=beta3, form=form)


def beta_between(fraction: Number, *, beta1: float, beta3: float, form: str) -> Number:
    """Return the beta whose half-life lies at ``fraction`` (0 < fraction < 1) between those of two betas."""
    start, end = half_life(beta1, form=form), half_life(beta3, form=form)
    if start == end == 0.0:
        return 0.0 * fraction  # type: ignore[operator,return-value]
    return 0.5 ** (1.0 / ((1.0 - fraction) * start + fraction * end))  # type: ignore[operator,return-value]


def half_life(beta: float, *, form: str) -> float:
    """Return the number of steps after which an exponential moving average has forgotten half."""
    # A beta of 0 forgets at once; its logarithm would be minus infinity.
    base = beta + (_APPLE_OFFSET if form == "apple" else 0.0)
    return 0.0 if base == 0.0 else math.log(0.5) / math.log(base)


def late_start(group: Mapping[str, Any], *, num_updates: int) -> str:
    """Return advice for warm-ups that count from step 0 in a run whose slow EMA starts at ``num_updates``, or ``""``.

    Parameters
    ----------
    group : Mapping[str, Any]
        As in :func:`unfinished_warmups`.
    num_updates : int
        Optimizer steps done.
    """
    if not (group.get("alpha_warmup") or group.get("beta3_warmup")) or group.get("schedule_start"):
        return ""
    return (
        f"; this continues at step {num_updates}, but the warm-ups of alpha and beta3 count from step 0: set "
        f"++training.optimizer.schedule_start={num_updates}"
    )


def unfinished_warmups(group: Mapping[str, Any], *, max_steps: int) -> list[str]:
    """Return a message for each warm-up of an AdEMAMix parameter group, or configuration, that ends after the run.

    Parameters
    ----------
    group : Mapping[str, Any]
        ``alpha_warmup``, ``beta3_warmup`` and ``schedule_start``; what is missing counts as off.
    max_steps : int
        Optimizer steps of the run.

    Returns
    -------
    list[str]
        One message for each such warm-up; it names both numbers.
    """
    start = group.get("schedule_start") or 0
    messages = []
    for name in ("alpha_warmup", "beta3_warmup"):
        warmup = group.get(name)
        if warmup and start + warmup > max_steps:
            begins = f", which starts at step {start}," if start else ""
            messages.append(
                f"training.optimizer.{name}={warmup}{begins} is longer than training.max_steps={max_steps}: "
                f"{name.removesuffix('_warmup')} never reaches its configured value. "
                f"Set {name}={max(max_steps - start, 0)} (the paper warms up over the whole run) or train longer."
            )
    return messages
