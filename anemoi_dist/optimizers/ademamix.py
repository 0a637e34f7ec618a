r"""AdEMAMix: Adam with a second, slow average of the gradient.

Source: Pagliardini, Ablin, Grangier, "The AdEMAMix Optimizer: Better, Faster, Older", arXiv 2409.03137; the update is
that of Apple's PyTorch code (https://github.com/apple/ml-ademamix). With ``t`` counted from 1::

    m1 = b1 m1 + (1 - b1) g
    m2 = b3(t) m2 + (1 - b3(t)) g
    nu = b2 nu + (1 - b2) g^2
    p -= lr ((m1 / (1 - b1^t) + alpha(t) m2) / (sqrt(nu) / sqrt(1 - b2^t) + eps) + wd p)

State of each parameter:

================ ====================== ==================================================================
``step``         0-d float32            on the CPU; on the parameter's device with ``capturable``
``exp_avg_fast`` shape of the parameter m1; absent with ``beta1 = 0``, where the gradient stands for it
``exp_avg_slow`` shape of the parameter m2; never bias-corrected
``exp_avg_sq``   shape of the parameter nu
================ ====================== ==================================================================

The averages are float32 (float64 for float64 parameters) whatever the parameter's type, and stay so when they are
loaded: at ``b3 = .9999`` an average in bfloat16 stalls, because one step changes it by less than half a unit in the
last place.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from anemoi_dist.errors import ConfigError
from anemoi_dist.optimizers import schedules

AVERAGES = ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")

#: What a state dictionary written before these options existed (Apple's, anemoi-training's) means by their absence.
_ABSENT = {
    "schedule_start": 0,
    "beta3_form": "apple",
    "foreach": None,
    "maximize": False,
    "capturable": False,
}


class UpdateScalars(NamedTuple):
    """What one update needs beside the tensors: floats, or 0-d tensors of the averages' type on their device.

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
    #: 1 - beta1^t
    correction_fast: float | Tensor
    #: sqrt(1 - beta2^t)
    correction_sq: float | Tensor


def ademamix_update(p: Tensor, g: Tensor, m1: Tensor | None, m2: Tensor, nu: Tensor, scalars: UpdateScalars) -> None:
    """Update one parameter and its averages in place. Every path of the optimizer is this arithmetic.

    Parameters
    ----------
    p : Tensor
        Parameter, any floating type; a type narrower than the averages' is computed in theirs and rounded once.
    g : Tensor
        Gradient, same shape, any floating type.
    m1, m2, nu : Tensor
        Averages, float32 or float64, same shape; ``m1`` is None with ``beta1 = 0``.
    scalars : UpdateScalars
        The step's numbers.
    """
    g = g.to(nu.dtype)
    # lerp_, not mul_(beta).add_(g): beta itself, rounded to float32, would decay with another 1 - beta than the one
    # that weighs the gradient.
    if m1 is not None:
        m1.lerp_(g, scalars.weight_fast)
    m2.lerp_(g, scalars.weight_slow)
    nu.lerp_(g * g, scalars.weight_sq)
    denominator = nu.sqrt().div_(scalars.correction_sq).add_(scalars.eps)
    update = (g if m1 is None else m1).div(scalars.correction_fast)
    _add_scaled_(update, m2, scalars.alpha)
    update.div_(denominator)
    master = p.to(nu.dtype)
    # Decay goes through the update: p * (1 - lr wd) - lr u rounds p twice, with a bias of 19 % of lr wd at 1e-7.
    _add_scaled_(update, master, scalars.weight_decay)
    _add_scaled_(master, update, -scalars.lr)
    if master is not p:
        p.copy_(master)


def _add_scaled_(out: Tensor, x: Tensor, factor: float | Tensor) -> None:
    if isinstance(factor, Tensor):
        out.addcmul_(x, factor)
    else:
        out.add_(x, alpha=factor)


def _foreach_update(
    ps: list[Tensor],
    gs: list[Tensor],
    m1s: list[Tensor] | None,
    m2s: list[Tensor],
    nus: list[Tensor],
    scalars: Any,
) -> None:
    """Do :func:`ademamix_update`, operation for operation, for tensors of one device and type.

    Bit for bit the same on a CPU; on accelerators a kernel may fuse a multiplication and an addition that the other
    rounds apart, which is a difference in the last place. The scalars are floats.
    """
    dtype = nus[0].dtype
    gs = [g.to(dtype) for g in gs]
    if m1s is not None:
        torch._foreach_lerp_(m1s, gs, scalars.weight_fast)
    torch._foreach_lerp_(m2s, gs, scalars.weight_slow)
    torch._foreach_lerp_(nus, torch._foreach_mul(gs, gs), scalars.weight_sq)
    denominators = torch._foreach_sqrt(nus)
    torch._foreach_div_(denominators, scalars.correction_sq)
    torch._foreach_add_(denominators, scalars.eps)
    updates = torch._foreach_div(gs if m1s is None else m1s, scalars.correction_fast)
    torch._foreach_add_(updates, m2s, alpha=scalars.alpha)
    torch._foreach_div_(updates, denominators)
    masters = [p.to(dtype) for p in ps]
    torch._foreach_add_(updates, masters, alpha=scalars.weight_decay)
    torch._foreach_add_(masters, updates, alpha=-scalars.lr)
    if ps[0].dtype != dtype:
        torch._foreach_copy_(ps, masters)


class AdEMAMix(Optimizer):
    """AdEMAMix with Apple's update and defaults.

    A state dictionary carries its own ``param_groups``, as everywhere in torch: loading one brings back the ``alpha``
    and warm-ups it was saved with. To keep newly configured ones, load
    ``{"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]}``.

    To switch from AdamW in mid-training, load its averages as ``exp_avg_fast`` and ``exp_avg_sq`` with its ``step``,
    and give that step as ``schedule_start``; the missing slow average starts at zero.

    Parameters
    ----------
    params : ParamsT
        Parameters, named parameters or parameter groups.
    lr : float | Tensor
        Learning rate; a tensor must have one element.
    betas : Iterable[float]
        Decay of the fast average, of the squared gradient and of the slow average, each in [0, 1).
    alpha : float
        Weight of the slow average beside the fast one; the paper uses 4 to 10, with warm-ups.
    beta3_warmup, alpha_warmup : int | None
        Steps over which ``beta3`` rises from ``beta1`` and ``alpha`` from 0; None: no warm-up.
    eps : float
        Added to the denominator.
    weight_decay : float
        Decoupled decay; it is multiplied by the learning rate.
    schedule_start : int
        The step from which the warm-ups count.
    beta3_form : str
        ``apple`` or ``paper``; see :func:`anemoi_dist.optimizers.schedules.beta3_at`.
    foreach : bool | None
        Update tensors in groups; None: on accelerators, for plain tensors.
    maximize : bool
        Climb instead of descend.
    capturable : bool
        Keep ``step`` on the device and compute the step's numbers there, without a host synchronization.

    Raises
    ------
    ConfigError
        An argument breaks its rule; a parameter is complex; at :meth:`step`, a gradient is sparse.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Iterable[float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        beta3_warmup: int | None = None,
        alpha_warmup: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        schedule_start: int = 0,
        beta3_form: str = "apple",
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "beta3_warmup": beta3_warmup,
            "alpha_warmup": alpha_warmup,
            "eps": eps,
            "weight_decay": weight_decay,
            "schedule_start": schedule_start,
            "beta3_form": beta3_form,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, {**defaults, **_checked_options(defaults)})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; what it does not set comes from the constructor's arguments."""
        if isinstance(param_group, dict):
            param_group = {**param_group, **_checked_options({**self.defaults, **param_group})}
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.is_complex():
                del self.param_groups[-1]
                raise ConfigError(
                    "params", str(p.dtype), "AdEMAMix needs real parameters", fix="pass torch.view_as_real(parameter)"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in {**self.defaults, **_ABSENT}.items():
                group.setdefault(name, value)
            group.update(_checked_options(group))
            for p in group["params"]:
                if p in self.state:
                    _tidy_state(p, self.state[p], capturable=group["capturable"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state as torch does, but keep the averages in float32 (float64) whatever the parameters' type."""
        # torch would cast them to the parameter's type, and a bfloat16 average has lost what it was kept for.
        hook = self.register_load_state_dict_pre_hook(_hide_averages)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def init_state(self, p: Tensor) -> None:
        """Create what is missing of the state of ``p`` now; otherwise its first update does.

        Engines call it that partition or link states before the first step.
        """
        for group in self.param_groups:
            if any(p is q for q in group["params"]):
                self._init_state(p, group)
                return
        raise ValueError("the tensor is in no parameter group of this optimizer")

    def _init_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if group["capturable"] else "cpu")
        for name in AVERAGES if group["betas"][0] else AVERAGES[1:]:
            if name not in state:
                state[name] = torch.zeros_like(p, dtype=state_dtype(p), requires_grad=False)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one update.

        Parameters
        ----------
        closure : Callable[[], Any] | None
            Evaluates the model again and returns the loss, which is handed back.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # All gradients are looked at before any parameter changes: a refused step leaves nothing half done.
        ready = [(group, _with_gradient(group["params"])) for group in self.param_groups]
        for group, params in ready:
            if group["capturable"]:
                self._update_captured(group, params)
            else:
                self._update(group, params)
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update with scalars from the host."""
        if not params:
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "AdEMAMix(capturable=False) in a captured graph would repeat one step's numbers for ever"
            )
        foreach = _foreach_by_default(params) if group["foreach"] is None else group["foreach"]
        # Parameters that had no gradient in some step are at another one than the rest.
        buckets: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        for p in params:
            state = self._init_state(p, group)
            state["step"].add_(1)
            buckets[state["step"].item(), p.device, p.dtype, state["exp_avg_sq"].dtype].append(p)
        for (step, *_), bucket in buckets.items():
            scalars = host_scalars(group, step)
            tensors = [self._tensors(p, group) for p in bucket]
            if foreach:
                ps, gs, m1s, m2s, nus = (list(column) for column in zip(*tensors, strict=True))
                _foreach_update(ps, gs, m1s if group["betas"][0] else None, m2s, nus, scalars)
            else:
                for p, g, m1, m2, nu in tensors:
                    ademamix_update(p, g, m1, m2, nu, scalars)

    def _update_captured(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update with scalars computed on the device from ``step``; nothing is read back."""
        buckets: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        for p in params:
            self._init_state(p, group)["step"].add_(1)
            buckets[p.device, self.state[p]["exp_avg_sq"].dtype].append(p)
        for (_, dtype), bucket in buckets.items():
            steps = torch.stack([self.state[p]["step"] for p in bucket])
            for p, scalars in zip(bucket, device_scalars(group, steps, dtype=dtype), strict=True):
                ademamix_update(*self._tensors(p, group), scalars)

    def _tensors(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        state = self.state[p]
        assert p.grad is not None
        g = p.grad.neg() if group["maximize"] else p.grad
        return p, g, state["exp_avg_fast"] if group["betas"][0] else None, state["exp_avg_slow"], state["exp_avg_sq"]


def state_dtype(p: Tensor) -> torch.dtype:
    """Return the type in which the averages of ``p`` are kept."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def host_scalars(group: Mapping[str, Any], step: float) -> UpdateScalars:
    """Compute the numbers of update ``step`` (from 1) in double on the host.

    Parameters
    ----------
    group : Mapping[str, Any]
        A parameter group of :class:`AdEMAMix`.
    step : float
        Updates of the parameter so far, this one included.
    """
    beta1, beta2, _ = group["betas"]
    scheduled = _scheduled(group, step)
    return UpdateScalars(
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        weight_fast=1.0 - beta1,
        weight_slow=1.0 - scheduled["beta3"],
        weight_sq=1.0 - beta2,
        alpha=scheduled["alpha"],
        correction_fast=1.0 - beta1**step,
        correction_sq=math.sqrt(1.0 - beta2**step),
    )


def device_scalars(group: Mapping[str, Any], steps: Tensor, *, dtype: torch.dtype) -> list[UpdateScalars]:
    """Compute the numbers of the updates ``steps`` on their device, in double, without reading them.

    Parameters
    ----------
    group : Mapping[str, Any]
        A parameter group of :class:`AdEMAMix`.
    steps : Tensor
        Shape (n,), float32.
    dtype : torch.dtype
        Type of the averages, in which the numbers are returned.
    """
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
        between = schedules.beta_between(inside, beta1=beta1, beta3=beta3, form=group["beta3_form"])
        slow = torch.where(fraction >= 1, slow, torch.where(fraction <= 0, beta1, between))
    columns = (1.0 - slow, alpha, 1.0 - beta1**steps, (1.0 - beta2**steps).sqrt())
    lr = group["lr"].to(dtype) if isinstance(group["lr"], Tensor) else group["lr"]
    rows = zip(*(column.to(dtype).unbind() for column in columns), strict=True)
    return [
        UpdateScalars(
            lr=lr,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            weight_fast=1.0 - beta1,
            weight_slow=weight_slow,
            weight_sq=1.0 - beta2,
            alpha=alpha_t,
            correction_fast=correction_fast,
            correction_sq=correction_sq,
        )
        for weight_slow, alpha_t, correction_fast, correction_sq in rows
    ]


def schedule_values(optimizer: Any) -> dict[str, float]:
    """Return ``alpha`` and ``beta3`` of the last update, for telemetry.

    Parameters
    ----------
    optimizer : Any
        An :class:`AdEMAMix`, or an engine's wrapper that holds one as ``optimizer``, DeepSpeed's for instance.

    Returns
    -------
    dict[str, float]
        Values of the first parameter group; empty for any other optimizer.
    """
    while not isinstance(optimizer, AdEMAMix):
        optimizer = getattr(optimizer, "optimizer", None)
        if optimizer is None:
            return {}
    group = optimizer.param_groups[0]
    # Between steps an engine may leave the group empty; all its partitions are at the same step.
    own = [optimizer.state[p] for p in group["params"] if p in optimizer.state]
    steps = [state["step"] for state in own or optimizer.state.values() if "step" in state]
    return _scheduled(group, float(steps[0]) if steps else 0.0)


def _scheduled(group: Mapping[str, Any], step: float) -> dict[str, float]:
    beta1, _, beta3 = group["betas"]
    since_start = step - group["schedule_start"]
    return {
        "alpha": schedules.alpha_at(since_start, alpha=group["alpha"], warmup=group["alpha_warmup"]),
        "beta3": schedules.beta3_at(
            since_start, beta1=beta1, beta3=beta3, warmup=group["beta3_warmup"], form=group["beta3_form"]
        ),
    }


class _Hidden:
    """An average on its way through ``Optimizer.load_state_dict``, which casts tensors but not this."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _hide_averages(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    hidden = {
        key: {name: _Hidden(x) if name in AVERAGES and isinstance(x, Tensor) else x for name, x in state.items()}
        if isinstance(state, dict)
        else state
        for key, state in state_dict["state"].items()
    }
    return {**state_dict, "state": hidden}


def _tidy_state(p: Tensor, state: dict[str, Any], *, capturable: bool) -> None:
    """Bring the state of one parameter, loaded from wherever, into the form that this class keeps."""
    for name in AVERAGES:
        if isinstance(state.get(name), _Hidden):
            state[name] = state[name].tensor.to(device=p.device, dtype=state_dtype(p))
        elif name in state and state[name] is None:  # Apple's way of saying beta1 = 0
            del state[name]
    if "step" in state:
        step = torch.as_tensor(state["step"], dtype=torch.float32)
        state["step"] = step.to(p.device if capturable else "cpu")


def _with_gradient(params: Iterable[Tensor]) -> list[Tensor]:
    ready = [p for p in params if p.grad is not None]
    for p in ready:
        assert p.grad is not None
        if p.grad.layout != torch.strided:
            raise ConfigError(
                f"gradient of a parameter of shape {tuple(p.shape)}",
                str(p.grad.layout),
                "AdEMAMix needs dense gradients",
                fix="build the embedding with sparse=False",
            )
    return ready


def _foreach_by_default(params: Iterable[Tensor]) -> bool:
    # On a CPU the grouped operations are a loop with more temporaries; subclasses (DTensor) may lack them.
    return all(type(p) in (Tensor, torch.nn.Parameter) and p.device.type in ("cuda", "xpu") for p in params)


def _checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a parameter group that need another type, after checking all of them."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ConfigError(
            "lr", tuple(lr.shape), "a tensor learning rate must have one element", fix="lr=torch.tensor(1e-3)"
        )
    _number("lr", float(lr) if isinstance(lr, Tensor) else lr, fix="lr=1e-3")
    betas = _checked_betas(options["betas"])
    checked: dict[str, Any] = {"betas": betas}
    for name, fix in (("alpha", "alpha=2.0"), ("eps", "eps=1e-8"), ("weight_decay", "weight_decay=0.01")):
        checked[name] = _number(name, options[name], fix=fix)
    for name in ("beta3_warmup", "alpha_warmup", "schedule_start"):
        if options[name] is not None or name == "schedule_start":
            checked[name] = _number(name, options[name], fix=f"{name}=0 or more optimizer steps", whole=True)
    if options["beta3_form"] not in schedules.BETA3_FORMS:
        raise ConfigError("beta3_form", options["beta3_form"], "is not a valid name", valid=schedules.BETA3_FORMS)
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
    return checked


def _checked_betas(betas: Any) -> tuple[float, float, float]:
    fix = "betas=[0.9, 0.999, 0.9999]"
    # Any sequence will do, and becomes a tuple: Hydra's ListConfig would follow the optimizer into its pickles.
    values = tuple(betas) if isinstance(betas, Iterable) and not isinstance(betas, str) else (betas,)
    if len(values) != 3:
        rule = "must be three numbers: decay of the fast average, of the squared gradient, of the slow average"
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
