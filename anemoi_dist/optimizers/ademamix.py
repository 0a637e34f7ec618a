r"""AdEMAMix: Adam with a second, slow average of the gradient.

Source: Pagliardini, Ablin, Grangier, "The AdEMAMix Optimizer: Better, Faster, Older", arXiv 2409.03137; the update is
that of Apple's PyTorch code (https://github.com/apple/ml-ademamix). With ``t`` counted from 1::

    m1 = b1 m1 + (1 - b1) g
    m2 = b3(t) m2 + (1 - b3(t)) g
    nu = b2 nu + (1 - b2) g^2
    p -= lr ((m1 / (1 - b1^t) + alpha(t) m2) / (sqrt(nu) / sqrt(1 - b2^t) + eps) + wd p)

State of each parameter:

================ ====================== ==================================================================
``step``         0-d float64            on the CPU; on the parameter's device with ``capturable``; counts to 2^53
``exp_avg_fast`` shape of the parameter m1; with ``beta1 = 0`` the gradient stands for it: None in dictionaries
``exp_avg_slow`` shape of the parameter m2; never bias-corrected
``exp_avg_sq``   shape of the parameter nu
================ ====================== ==================================================================

The EMA states are float32 (float64 for float64 parameters) whatever the parameter's type, and stay so when they are
loaded, unless ``state_dtype`` says otherwise. Rounded to nearest, an EMA state in bfloat16 stalls: at ``b3 = .9999``
one step changes it by less than half a unit in the last place. So bfloat16 is rounded stochastically
(:mod:`anemoi_dist.optimizers.rounding`). Bytes of state per parameter:

======================================================= ==== =============
``state_dtype``                                         all  ``beta1 = 0``
======================================================= ==== =============
``fp32``                                                12   8
``bf16``: the fast EMA and that of the squared gradient 8    6
``{exp_avg_fast: bf16}``, ``{exp_avg_sq: bf16}``        10   6 (square)
``bf16`` for each of the three by name                  6    4
======================================================= ==== =============
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, ParamsT

from anemoi_dist.config.optimizer_states import EMA_STATES, narrow_states
from anemoi_dist.errors import ConfigError
from anemoi_dist.optimizers import gpu, implementations
from anemoi_dist.optimizers.options import checked_options
from anemoi_dist.optimizers.rounding import ElementRange, range_table, whole_range
from anemoi_dist.optimizers.update import (
    ParamGroup,
    ParamTensors,
    UpdateScalars,
    ademamix_update,
    device_scalars,
    device_table,
    host_scalars,
    scheduled_values,
)

__all__ = [
    "EMA_STATES",
    "AdEMAMix",
    "UpdateScalars",
    "ademamix_update",
    "device_scalars",
    "host_scalars",
    "schedule_values",
]

#: Values of options that a state dictionary does not have, because it was written before they existed (Apple's,
#: anemoi-training's).
_ABSENT = {
    "schedule_start": 0,
    "beta3_form": "apple",
    "foreach": None,
    "maximize": False,
    "capturable": False,
    "implementation": "auto",
    "state_dtype": "fp32",
}


class AdEMAMix(Optimizer):
    """AdEMAMix with Apple's update and defaults.

    A state dictionary carries its own ``param_groups``, as everywhere in torch: loading one brings back the ``alpha``
    and warm-ups it was saved with. To keep newly configured ones, load
    ``{"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]}``.

    To switch from AdamW in mid-training, load its EMA states as ``exp_avg_fast`` and ``exp_avg_sq`` with its ``step``,
    and give that step as ``schedule_start``; the missing slow EMA starts at zero.

    Parameters
    ----------
    params : ParamsT
        Parameters, named parameters or parameter groups.
    lr : float | Tensor
        Learning rate; a tensor must have one element.
    betas : Iterable[float]
        Decay of the fast EMA, of the squared gradient and of the slow EMA, each in [0, 1).
    alpha : float
        Weight of the slow EMA relative to the fast one; the paper uses 4 to 10, with warm-ups.
    beta3_warmup, alpha_warmup : int | None
        Steps over which ``beta3`` rises from ``beta1`` and ``alpha`` from 0; None: no warm-up.
    eps : float
        Added to the denominator.
    weight_decay : float
        Decoupled decay; it is multiplied by the learning rate.
    schedule_start : int
        The step from which the warm-ups count.
    beta3_form : str
        ``apple`` or ``paper``; see :func:`anemoi_dist.optimizers.ademamix_schedules.beta3_at`.
    foreach : bool | None
        ``True`` is ``implementation="foreach"``, ``False`` is ``"eager"``; None: as ``implementation`` says.
    maximize : bool
        Maximize the objective instead of minimizing it.
    capturable : bool
        Keep ``step`` on the device and compute the step scalars there, without a host synchronization.
    implementation : str
        Which code does the update, ``c``, ``triton``, ``foreach`` or ``eager``; ``auto`` chooses for each
        tensor (:mod:`anemoi_dist.optimizers.implementations`). It is not loaded from a state dictionary.
    state_dtype : str | Mapping[str, str]
        ``fp32``; ``bf16``, which keeps the fast EMA and that of the squared gradient in bfloat16 and the slow EMA in
        float32; or a mapping from EMA states to ``fp32`` or ``bf16``, float32 where a state is not named. It is not
        loaded from a state dictionary: EMA states of another type are converted, with a warning.

    Attributes
    ----------
    grad_scale, found_inf : Tensor
        Not there until someone sets them, who also deletes them, as with torch's fused optimizers: every gradient is
        divided by ``grad_scale``, a tensor of one element, inside the update; where ``found_inf`` is not zero,
        :meth:`step` does nothing. ``torch.amp.GradScaler`` uses both; ``grad_scale = max(1, norm / limit)`` clips
        without a pass over the gradients.
    copies : dict[Tensor, Tensor]
        Parameters to tensors of their shape that get the new value too, in the same pass: bfloat16 working parameters.

    Raises
    ------
    ConfigError
        An argument breaks its rule; a parameter is complex, or float64 with bfloat16 states; at :meth:`step`, a
        gradient is sparse, or the ``implementation`` can't update a tensor.
    """

    grad_scale: Tensor
    found_inf: Tensor

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
        implementation: str = "auto",
        state_dtype: str | Mapping[str, str] = "fp32",
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
            "implementation": implementation,
            "state_dtype": state_dtype,
        }
        self.copies: dict[Tensor, Tensor] = {}
        self._element_ranges: dict[Tensor, Tensor] = {}
        super().__init__(params, {**defaults, **checked_options(defaults)})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; what it does not set comes from the constructor's arguments."""
        if isinstance(param_group, dict):
            param_group = {**param_group, **checked_options({**self.defaults, **param_group})}
        super().add_param_group(param_group)
        is_narrow = bool(narrow_states(self.param_groups[-1]["state_dtype"]))
        for p in self.param_groups[-1]["params"]:
            rule = fix = ""
            if p.is_complex():
                rule, fix = "AdEMAMix needs real parameters", "pass torch.view_as_real(parameter)"
            elif is_narrow and p.dtype == torch.float64:
                rule, fix = "has its EMA states in float64, not in bfloat16", "state_dtype=fp32"
            if rule:
                del self.param_groups[-1]  # as if the call had not been made: the optimizer continues without the group
                raise ConfigError("params", str(p.dtype), rule, fix=fix)

    def __setstate__(self, state: dict[str, Any]) -> None:
        defaults = dict(state.get("defaults") or self.defaults)
        super().__setstate__(state)
        self.defaults = defaults  # torch adds an option, differentiable, that this class does not have
        self.__dict__.setdefault("copies", {})
        self.__dict__.setdefault("_element_ranges", {})
        for group in self.param_groups:
            for name, value in {**defaults, **_ABSENT}.items():
                group.setdefault(name, value)
            group.update(checked_options(group))
            for p in group["params"]:
                if p in self.state:
                    _normalize_loaded_state(p, self.state[p], cast(ParamGroup, group))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state as torch does, but keep the EMA states in ``state_dtype`` whatever the parameters' type."""
        # torch would cast them to the parameter's type, and a bfloat16 EMA state has lost what it was kept for.
        hook = self.register_load_state_dict_pre_hook(_hide_ema_states)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for note in conversions(_ema_dtypes(state_dict["state"]), _ema_dtypes(self.state)):
            warnings.warn(note, stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's dictionary, with None for the fast EMA where ``beta1 = 0``: other AdEMAMix classes read it."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            for index in group["params"]:
                if not group["betas"][0] and index in saved["state"]:
                    saved["state"][index] = {"exp_avg_fast": None, **saved["state"][index]}
        return saved

    @property
    def _groups(self) -> list[ParamGroup]:
        return cast(list[ParamGroup], self.param_groups)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether ``torch.amp.GradScaler`` leaves the scaling to :meth:`step`, which reads ``found_inf`` back."""
        return not any(group["capturable"] for group in self.param_groups)

    def implementation_in_use(self) -> dict[str, int]:
        """Return how many parameters each implementation updates, by its name, gradients or not."""
        names = Counter[str]()
        for group in self._groups:
            for p in group["params"]:
                local = p.to_local() if isinstance(p, DTensor) else p
                fast, slow, square = (
                    torch.empty_like(local, dtype=_ema_dtype(name, p, group), requires_grad=False, device="meta")
                    for name in EMA_STATES
                )
                names[implementations.select(ParamTensors(local, local, fast, slow, square), group)] += 1
        return dict(names)

    def set_element_ranges(self, p: Tensor, ranges: Iterable[ElementRange], *, seed: int = 0) -> None:
        """Say which elements of which parameters ``p`` holds: their stochastic rounding to bfloat16 depends on it.

        Engines call it for the flat partitions that they have made of parameters. A tensor that it is not called for is
        a parameter, all of it or this rank's rows of a DTensor, and is named by its index among the optimizer's
        parameters.

        Parameters
        ----------
        p : Tensor
            In a parameter group, now or at the time of a step.
        ranges : Iterable[ElementRange]
            Ranges of parameters that lie in it; the rest is padding.
        seed : int
            The run's seed.
        """
        device = p.to_local().device if isinstance(p, DTensor) else p.device
        self._element_ranges[p] = range_table(ranges, seed=seed).to(device)

    def init_state(self, p: Tensor) -> None:
        """Create what is missing of the state of ``p`` now; otherwise its first update does.

        Engines call it to have the memory allocated before the first step.

        Raises
        ------
        ValueError
            ``p`` is in no parameter group.
        """
        for group in self._groups:
            if any(p is q for q in group["params"]):
                self._init_state(p, group)
                return
        raise ValueError("the tensor is in no parameter group of this optimizer")

    def _init_state(self, p: Tensor, group: ParamGroup) -> dict[str, Tensor]:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float64, device=p.device if group["capturable"] else "cpu")
        elif state["step"].dtype != torch.float64:  # float32, in what others saved, counts to 2^24 only
            state["step"] = state["step"].double()
        for name in EMA_STATES if group["betas"][0] else EMA_STATES[1:]:
            if name not in state:
                state[name] = torch.zeros_like(p, dtype=_ema_dtype(name, p, group), requires_grad=False)
        return state

    def _set_default_ranges(self) -> None:
        """Give a range to every parameter that no engine has set one for."""
        for index, p in enumerate(p for group in self.param_groups for p in group["params"]):
            if p not in self._element_ranges:
                self.set_element_ranges(p, [whole_range(p, str(index))])

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
        if float(getattr(self, "found_inf", 0.0)):
            return loss
        # All gradients are looked at before any parameter changes: a refused step leaves nothing half done.
        ready = [(group, _with_gradient(group["params"])) for group in self._groups]
        is_rehearsal = not self.state and _is_rehearsal(ready)
        chosen = [self._collect(group, params) for group, params in ready]
        if is_rehearsal:
            return loss
        for (group, _), updates in zip(ready, chosen, strict=True):
            if updates and group["capturable"]:
                self._update_captured(group, updates)
            elif updates:
                self._update(group, updates)
        return loss

    def _collect(self, group: ParamGroup, params: list[Tensor]) -> list[tuple[str, ParamTensors, Tensor]]:
        """Return for each parameter the implementation that updates it, this rank's tensors, and its step."""
        updates = []
        if narrow_states(group["state_dtype"]) and any(p not in self._element_ranges for p in params):
            self._set_default_ranges()
        # A look-up by a tensor calls its hash, written in Python: none without need.
        copies, element_ranges, has_fast = self.copies, self._element_ranges, bool(group["betas"][0])
        for p in params:
            state = self._init_state(p, group)
            param = ParamTensors(
                p,
                p.grad,  # type: ignore[arg-type]  # those without are left out
                state["exp_avg_fast"] if has_fast else None,
                state["exp_avg_slow"],
                state["exp_avg_sq"],
                copies.get(p) if copies else None,
                element_ranges.get(p) if element_ranges else None,
            )
            param = implementations.local_tensors(param)
            updates.append((implementations.select(param, group), param, state["step"]))
        return updates

    def _update(self, group: ParamGroup, updates: list[tuple[str, ParamTensors, Tensor]]) -> None:
        """Update with scalars from the host."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "AdEMAMix(capturable=False) in a captured graph would repeat one step's scalars for ever"
            )
        torch._foreach_add_(
            [step for *_, step in updates], torch.ones((), dtype=torch.float64)
        )  # a number would become a tensor for each
        # By step: parameters that had no gradient at some point have done fewer updates, and their bias corrections and
        # warm-ups differ from the others'.
        buckets: dict[tuple[Any, ...], list[ParamTensors]] = defaultdict(list)
        for name, param, step in updates:
            # The kernel in C takes all types at once; torch's grouped operations take one device and one type.
            kind = () if name == "c" else (param.p.device, param.p.dtype, param.nu.dtype)
            buckets[step.item(), name, *kind].append(param)
        for (step, name, *_), bucket in buckets.items():
            factor = self._grad_factor(group, bucket[0].p.device)
            implementations.run(name, bucket, host_scalars(group, step)._replace(grad_factor=factor))

    def _update_captured(self, group: ParamGroup, updates: list[tuple[str, ParamTensors, Tensor]]) -> None:
        """Update with scalars computed on the device from ``step``; nothing is read back."""
        buckets: dict[tuple[Any, ...], list[tuple[Tensor, ParamTensors]]] = defaultdict(list)
        for name, param, step in updates:
            key = name, param.p.device, torch.promote_types(param.nu.dtype, torch.float32)
            buckets[key].append((step.add_(1), param))
        for (name, device, dtype), bucket in buckets.items():
            steps = torch.stack([step for step, _ in bucket])
            factor = self._grad_factor(group, device)
            if name == "triton":
                for (_, param), numbers in zip(bucket, device_table(group, steps, factor).unbind(), strict=True):
                    gpu.launch(param, numbers)
            else:
                for (_, param), scalars in zip(bucket, device_scalars(group, steps, dtype=dtype), strict=True):
                    ademamix_update(
                        *param[:5],
                        scalars._replace(grad_factor=factor),
                        copy=param.copy,
                        element_ranges=param.element_ranges,
                    )

    def _grad_factor(self, group: ParamGroup, device: torch.device) -> float | Tensor:
        """Return what the gradients are multiplied by: a number, or a tensor where ``grad_scale`` is one."""
        sign = -1.0 if group["maximize"] else 1.0
        scale: Tensor | None = getattr(self, "grad_scale", None)
        return sign if scale is None else sign / scale.to(device, torch.float32).view(())


def _ema_dtype(name: str, p: Tensor, group: ParamGroup) -> torch.dtype:
    """Return the type that an EMA state of ``p`` is kept in."""
    if p.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if name in narrow_states(group["state_dtype"]) else torch.float32


def conversions(saved: Mapping[str, set[torch.dtype]], kept: Mapping[str, set[torch.dtype]]) -> list[str]:
    """Return a note for each state whose type changes to or from bfloat16 on loading; types by the states' names."""
    notes = []
    for name in sorted(saved.keys() & kept.keys()):
        if saved[name] != kept[name] and torch.bfloat16 in saved[name] | kept[name]:
            was, now = (", ".join(sorted(str(x).removeprefix("torch.") for x in y[name])) for y in (saved, kept))
            rounded = ", rounded to nearest once" if torch.bfloat16 in kept[name] else ""
            notes.append(f"{name} was saved in {was} and continues in {now}{rounded} (state_dtype)")
    return notes


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
    group = optimizer._groups[0]
    # Between steps an engine may leave the group empty; all its partitions are at the same step.
    own = [optimizer.state[p] for p in group["params"] if p in optimizer.state]
    steps = [state["step"] for state in own or optimizer.state.values() if "step" in state]
    return scheduled_values(group, float(steps[0]) if steps else 0.0)


class _Hidden:
    """Wrapper that takes an EMA state through ``Optimizer.load_state_dict``, which casts tensors but not this."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _hide_ema_states(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    hidden = {
        key: {name: _Hidden(x) if name in EMA_STATES and isinstance(x, Tensor) else x for name, x in state.items()}
        if isinstance(state, dict)
        else state
        for key, state in state_dict["state"].items()
    }
    # These options belong to this machine, not to the one that saved. Groups that don't fit are torch's to refuse.
    own = [{name: group[name] for name in ("implementation", "state_dtype")} for group in optimizer.param_groups]
    own += [{}] * (len(state_dict["param_groups"]) - len(own))
    groups = [{**group, **kept} for group, kept in zip(state_dict["param_groups"], own, strict=False)]
    return {**state_dict, "state": hidden, "param_groups": groups}


def _ema_dtypes(states: Mapping[Any, Any]) -> dict[str, set[torch.dtype]]:
    """Return the types of the EMA states in a state dictionary's, or an optimizer's, states."""
    found: dict[str, set[torch.dtype]] = {name: set() for name in EMA_STATES}
    for state in states.values():
        for name in EMA_STATES:
            if isinstance(state, dict) and isinstance(x := state.get(name), Tensor):
                found[name].add(x.dtype)
    return {name: dtypes for name, dtypes in found.items() if dtypes}


def _normalize_loaded_state(p: Tensor, state: dict[str, Any], group: ParamGroup) -> None:
    """Convert the state of one parameter, loaded from any source, to the form that this class keeps."""
    for name in EMA_STATES:
        if isinstance(state.get(name), _Hidden):
            state[name] = state[name].tensor.to(device=p.device, dtype=_ema_dtype(name, p, group))
        elif name in state and state[name] is None:  # Apple's way of saying beta1 = 0
            del state[name]
    if "step" in state:
        step = torch.as_tensor(state["step"], dtype=torch.float64)
        state["step"] = step.to(p.device if group["capturable"] else "cpu")


def _is_rehearsal(ready: list[tuple[ParamGroup, list[Tensor]]]) -> bool:
    """Whether a first step is one that moves nothing: rate 0, all gradients 0. Collective for DTensors.

    ``torch.distributed.checkpoint`` takes such a step to see the states. It must not count: ``alpha`` and ``beta3``
    would be a step ahead from then on; and with ``eps = 0`` it would leave parameters that are not numbers.
    """
    if any(float(group["lr"]) for group, params in ready if params):
        return False
    sums = [p.grad.abs().sum() for _, params in ready for p in params if p.grad is not None]
    return bool(sums) and not any(float(x.full_tensor() if isinstance(x, DTensor) else x) for x in sums)


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
