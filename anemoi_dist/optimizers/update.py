"""AdEMAMix's arithmetic: the step scalars and the one definition of the update.

Every implementation (:mod:`anemoi_dist.optimizers.implementations`) is held against :func:`ademamix_update`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypedDict, cast

import torch
from torch import Tensor

from anemoi_dist.optimizers import ademamix_schedules, rounding


class ParamGroup(TypedDict):
    """Options of a parameter group of AdEMAMix, checked; their meaning is that of its arguments."""

    params: list[Tensor]
    lr: float | Tensor
    betas: tuple[float, float, float]
    alpha: float
    beta3_warmup: int | None
    alpha_warmup: int | None
    eps: float
    weight_decay: float
    schedule_start: int
    beta3_form: str
    foreach: bool | None
    maximize: bool
    capturable: bool
    implementation: str
    state_dtype: str | dict[str, str]


class UpdateScalars(NamedTuple):
    """Step scalars: floats, or 0-d tensors on the device of the parameter, of the type that the update computes in.

    The complements of the betas are computed in double: in float32, ``1 - beta`` is off by 1.7e-4 at .9999 and by
    1.3e-2 at .999999.
    """

    lr: float | Tensor
    weight_decay: float | Tensor
    eps: float | Tensor
    #: 1 - beta1
    weight_fast: float | Tensor
    #: 1 - beta3(t)
    weight_slow: float | Tensor
    #: 1 - beta2
    weight_sq: float | Tensor
    #: alpha(t)
    alpha: float | Tensor
    #: 1 / (1 - beta1^t)
    inverse_fast: float | Tensor
    #: 1 / sqrt(1 - beta2^t)
    inverse_sq: float | Tensor
    #: The step, modulo 2^32, in two halves that float32 holds: ``step_low + 65536 * step_high``; for rounding
    step_low: float | Tensor = 0.0
    step_high: float | Tensor = 0.0
    #: Factor of the gradient: clipping, loss scale, -1 to maximize
    grad_factor: float | Tensor = 1.0


class ParamTensors(NamedTuple):
    """The tensors of one parameter's update; see :func:`ademamix_update`."""

    p: Tensor
    g: Tensor
    m1: Tensor | None
    m2: Tensor
    nu: Tensor
    copy: Tensor | None = None
    element_ranges: Tensor | None = None

    @property
    def ema_states(self) -> tuple[Tensor, ...]:
        """The EMA states that are not absent."""
        return tuple(x for x in (self.m1, self.m2, self.nu) if x is not None)

    @property
    def is_rounded(self) -> bool:
        """Whether an EMA state is kept in bfloat16, and so rounded stochastically."""
        return any(x.dtype == torch.bfloat16 for x in self.ema_states)


def ademamix_update(
    p: Tensor,
    g: Tensor,
    m1: Tensor | None,
    m2: Tensor,
    nu: Tensor,
    scalars: UpdateScalars,
    *,
    copy: Tensor | None = None,
    element_ranges: Tensor | None = None,
) -> None:
    """Update one parameter and its EMA states in place. Every path of the optimizer is this arithmetic.

    Each line rounds once: what torch computes as ``a + w * (b - a)`` (``lerp_``) or ``a + x * factor`` (``add_``) is
    one fused multiply-add in its vector code. There is one division an element.

    Parameters
    ----------
    p : Tensor
        Parameter, any floating type; computed in float32 (float64 where the EMA states are) and rounded once.
    g : Tensor
        Gradient, same shape, any floating type.
    m1, m2, nu : Tensor
        EMA states, same shape, float64, or each float32 or bfloat16; ``m1`` is None with ``beta1 = 0``. The update
        reads bfloat16 states before they are rounded again.
    scalars : UpdateScalars
        Step scalars.
    copy : Tensor | None
        Gets the new parameter too, in its own type: a bfloat16 working parameter.
    element_ranges : Tensor | None
        Table of :func:`~anemoi_dist.optimizers.rounding.range_table`; needed with bfloat16 EMA states.
    """
    wide = torch.promote_types(nu.dtype, torch.float32)
    kept = m1, m2, nu
    m1, m2, nu = None if m1 is None else m1.to(wide), m2.to(wide), nu.to(wide)
    g = g.to(wide)
    if isinstance(scalars.grad_factor, Tensor) or scalars.grad_factor != 1.0:
        g = g * scalars.grad_factor
    # lerp_, not mul_(beta).add_(g): beta itself, rounded to float32, would decay with another 1 - beta than the one
    # that weighs the gradient.
    if m1 is not None:
        m1.lerp_(g, scalars.weight_fast)
    m2.lerp_(g, scalars.weight_slow)
    nu.lerp_(g * g, scalars.weight_sq)
    rounding.store(kept, (m1, m2, nu), element_ranges, scalars.step_low + 65536 * scalars.step_high)
    denominator = nu.sqrt().mul_(scalars.inverse_sq).add_(scalars.eps)
    update = (g if m1 is None else m1).mul(scalars.inverse_fast)
    _add_scaled_(update, m2, scalars.alpha)
    update.div_(denominator)
    master = p.to(wide)
    # Decay goes through the update: p * (1 - lr wd) - lr u rounds p twice, with a bias of 19 % of lr wd at 1e-7.
    _add_scaled_(update, master, scalars.weight_decay)
    _add_scaled_(master, update, -scalars.lr)
    if master is not p:
        p.copy_(master)
    if copy is not None:
        copy.copy_(master)


def _add_scaled_(out: Tensor, x: Tensor, factor: float | Tensor) -> None:
    if isinstance(factor, Tensor):
        out.addcmul_(x, factor)
    else:
        out.add_(x, alpha=factor)


def foreach_update(params: list[ParamTensors], scalars: UpdateScalars) -> None:
    """Do :func:`ademamix_update`, operation for operation, for tensors of one device and type.

    Bit for bit the same on a CPU; on accelerators a kernel may fuse a multiplication and an addition that the other
    rounds apart, which is a difference in the last place. The scalars are floats, ``grad_factor`` may be a tensor.
    """
    # Any: torch's stubs of the grouped operations know no list that came out of a zip.
    ps, gs, m1s, m2s, nus, copies, _ = cast(Any, [list(column) for column in zip(*params, strict=True)])
    numbers: Any = scalars
    dtype = nus[0].dtype
    gs = [g.to(dtype) for g in gs]
    if isinstance(scalars.grad_factor, Tensor) or scalars.grad_factor != 1.0:
        gs = torch._foreach_mul(gs, scalars.grad_factor)
    if m1s[0] is not None:
        torch._foreach_lerp_(m1s, gs, numbers.weight_fast)
    torch._foreach_lerp_(m2s, gs, numbers.weight_slow)
    torch._foreach_lerp_(nus, torch._foreach_mul(gs, gs), numbers.weight_sq)
    denominators = torch._foreach_sqrt(nus)
    torch._foreach_mul_(denominators, numbers.inverse_sq)
    torch._foreach_add_(denominators, numbers.eps)
    updates = torch._foreach_mul(gs if m1s[0] is None else m1s, numbers.inverse_fast)
    torch._foreach_add_(updates, m2s, alpha=numbers.alpha)
    torch._foreach_div_(updates, denominators)
    masters = [p.to(dtype) for p in ps]
    torch._foreach_add_(updates, masters, alpha=numbers.weight_decay)
    torch._foreach_add_(masters, updates, alpha=-numbers.lr)
    if ps[0].dtype != dtype:
        torch._foreach_copy_(ps, masters)
    for copy, master in zip(copies, masters, strict=True):
        if copy is not None:
            copy.copy_(master)


def host_scalars(group: ParamGroup, step: float) -> UpdateScalars:
    """Compute the step scalars of update ``step`` (from 1) in double on the host.

    Parameters
    ----------
    group : ParamGroup
        A parameter group of :class:`AdEMAMix`.
    step : float
        Updates of the parameter so far, this one included.
    """
    beta1, beta2, _ = group["betas"]
    scheduled = scheduled_values(group, step)
    return UpdateScalars(
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        weight_fast=1.0 - beta1,
        weight_slow=1.0 - scheduled["beta3"],
        weight_sq=1.0 - beta2,
        alpha=scheduled["alpha"],
        inverse_fast=1.0 / (1.0 - beta1**step),
        inverse_sq=1.0 / math.sqrt(1.0 - beta2**step),
        step_low=step % 65536.0,
        step_high=step // 65536.0 % 65536.0,
    )


def device_scalars(group: ParamGroup, steps: Tensor, *, dtype: torch.dtype) -> list[UpdateScalars]:
    """Compute the step scalars of the updates ``steps`` on their device, in double, without reading them.

    Parameters
    ----------
    group : ParamGroup
        A parameter group of :class:`AdEMAMix`.
    steps : Tensor
        Shape (n,).
    dtype : torch.dtype
        Type of the EMA states, in which the scalars are returned.
    """
    constant = host_scalars({**group, "lr": 0.0}, 1.0)
    lr = group["lr"].to(dtype) if isinstance(group["lr"], Tensor) else group["lr"]
    named = _device_columns(group, steps)
    columns = (column.to(dtype).unbind() for column in named.values())
    return [constant._replace(lr=lr, **dict(zip(named, values, strict=True))) for values in zip(*columns, strict=True)]


def device_table(group: ParamGroup, steps: Tensor, grad_factor: float | Tensor) -> Tensor:
    """Return the scalars of :func:`device_scalars` as a float32 table, columns in the order of :class:`UpdateScalars`.

    Returns
    -------
    Tensor
        Shape (n, 12), on the device of ``steps``.
    """
    constant = host_scalars({**group, "lr": 0.0}, 1.0)
    values = {**constant._asdict(), "lr": group["lr"], "grad_factor": grad_factor, **_device_columns(group, steps)}
    like = torch.zeros_like(steps, dtype=torch.float64)
    return torch.stack([like + values[name] for name in UpdateScalars._fields], dim=1).float()


def _device_columns(group: ParamGroup, steps: Tensor) -> dict[str, Tensor]:
    """Return the scalars that change from step to step, for each step, in double."""
    beta1, beta2, beta3 = group["betas"]
    steps = steps.double()
    since_start = steps - group["schedule_start"]
    alpha = torch.full_like(steps, group["alpha"])
    if group["alpha_warmup"]:
        alpha = (since_start / group["alpha_warmup"]).clamp(0.0, 1.0) * group["alpha"]
    slow = torch.full_like(steps, beta3)
    if group["beta3_warmup"]:
        fraction = since_start / group["beta3_warmup"]
        # Outside of the warm-up the formula is not needed, and at 0 it may divide by zero: any value inside will do.
        inside = torch.where((fraction > 0) & (fraction < 1), fraction, 0.5)
        between = ademamix_schedules.beta_between(inside, beta1=beta1, beta3=beta3, form=group["beta3_form"])
        slow = torch.where(fraction >= 1, slow, torch.where(fraction <= 0, beta1, between))
    return {
        "weight_slow": 1.0 - slow,
        "alpha": alpha,
        "inverse_fast": 1.0 / (1.0 - beta1**steps),
        "inverse_sq": 1.0 / (1.0 - beta2**steps).sqrt(),
        "step_low": steps % 65536.0,
        "step_high": steps.div(65536.0, rounding_mode="floor") % 65536.0,
    }


def scheduled_values(group: ParamGroup, step: float) -> dict[str, float]:
    """Return ``alpha`` and ``beta3`` of a parameter group at update ``step``."""
    beta1, _, beta3 = group["betas"]
    since_start = step - group["schedule_start"]
    return {
        "alpha": ademamix_schedules.alpha_at(since_start, alpha=group["alpha"], warmup=group["alpha_warmup"]),
        "beta3": ademamix_schedules.beta3_at(
            since_start, beta1=beta1, beta3=beta3, warmup=group["beta3_warmup"], form=group["beta3_form"]
        ),
    }
