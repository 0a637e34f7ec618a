"""Capabilities that engines use beyond torch's optimizer interface, and substitutes for optimizers without them.

An engine gets its :class:`Capabilities` once, from :func:`capabilities`, and then calls them without asking what the
optimizer is.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

from anemoi_dist.optimizers.rounding import ElementRange


@runtime_checkable
class FusedOptimizer(Protocol):
    """An optimizer that scales gradients and writes working copies in the one pass of its update.

    It also creates its states on request, counts the steps of each parameter apart, reads gradients of any floating
    type, and divides them by its attribute ``grad_scale`` where there is one, as torch's fused optimizers do.
    :class:`~anemoi_dist.optimizers.ademamix.AdEMAMix` is one.
    """

    #: Parameters to tensors of their shape that get the new value too, in another type.
    copies: dict[Tensor, Tensor]

    def init_state(self, p: Tensor) -> None:
        """Create what is missing of the state of ``p``."""

    def set_element_ranges(self, p: Tensor, ranges: Iterable[ElementRange], *, seed: int) -> None:
        """Say which elements of which parameters ``p`` holds."""


class Capabilities:
    """A plain optimizer: clipping and copying are passes of their own, and its first step creates the states.

    Attributes
    ----------
    is_fused : bool
        Clipping and copying happen inside the update.
    has_all_states : bool
        Every state exists before the first step; otherwise a state appears with its parameter's first gradient.
    counts_per_parameter : bool
        A part of the parameters may be stepped at a time: the steps of each are counted apart.
    """

    is_fused = has_all_states = False

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._copies: Mapping[Tensor, Tensor] = {}
        self.counts_per_parameter = type(optimizer).__module__.startswith("torch.optim")

    def allocate_states(self) -> None:
        """Create the states of the parameters that are in the groups now, where the optimizer can."""

    def state_kinds(self) -> tuple[set[str], set[str]] | None:
        """Return the names of the states, and of those without which the optimizer fails; None: they are not known."""
        # A step of a copy on one tensor of its own: which states there are depends on the options.
        probe = copy.copy(self._optimizer)
        group = probe.param_groups[0]
        device = next((p.device for p in group["params"]), None)
        p = torch.nn.Parameter(torch.zeros(2, 2, device=device))
        p.grad = torch.zeros_like(p)
        probe.state, probe.param_groups = defaultdict(dict), [{**group, "params": [p]}]
        try:
            probe.step()
        except Exception:  # an optimizer of the user's that wants more than a tensor: it takes what was saved
            return None
        kinds = {kind for kind, value in probe.state[p].items() if isinstance(value, Tensor)}
        return kinds, kinds

    def set_element_ranges(self, p: Tensor, ranges: Iterable[ElementRange], *, seed: int) -> None:
        """Say which elements of which parameters ``p`` holds: what is rounded at random must not depend on ranks."""

    def attach_grad(self, p: Tensor, gradient: Tensor) -> None:
        """Make ``gradient``, flat and of any floating type, the gradient of ``p``; as a copy in its type if need be."""
        p.grad = gradient.to(p.dtype)

    def set_copies(self, copies: Mapping[Tensor, Tensor]) -> None:
        """Keep the values of ``copies`` equal to their parameters, from :meth:`finish_copies` to the next step."""
        self._copies = copies

    def finish_copies(self, p: Tensor) -> None:
        """Bring the copy of ``p``, if it has one, up to date after a step."""
        # fp32 working parameters are the masters themselves, and have no copy.
        if p in self._copies:
            self._copies[p].copy_(p)

    def scale_gradients(self, gradients: Sequence[Tensor], factor: Tensor) -> None:
        """Multiply the gradients of the next steps by ``factor``, 0-d, until :meth:`reset_scale`."""
        torch._foreach_mul_(list(gradients), factor)

    def reset_scale(self) -> None:
        """Leave the gradients of later steps as they are."""


class _FusedCapabilities(Capabilities):
    is_fused = has_all_states = True

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self._fused = cast(FusedOptimizer, optimizer)
        self.counts_per_parameter = True

    def allocate_states(self) -> None:
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                self._fused.init_state(p)

    def state_kinds(self) -> tuple[set[str], set[str]] | None:
        kinds = super().state_kinds()
        # At the step of a longer past, a second moment of zero makes the updates far too large; an EMA only small ones.
        return kinds and (kinds[0], kinds[0] & {"exp_avg_sq"})

    def set_element_ranges(self, p: Tensor, ranges: Iterable[ElementRange], *, seed: int) -> None:
        self._fused.set_element_ranges(p, ranges, seed=seed)

    def attach_grad(self, p: Tensor, gradient: Tensor) -> None:
        # torch refuses a gradient of another type than the parameter's unless it is told; older versions have
        # no way to tell it.
        if gradient.dtype != p.dtype and hasattr(p, "grad_dtype"):
            p.grad_dtype = gradient.dtype
            p.grad = gradient
        else:
            super().attach_grad(p, gradient)

    def set_copies(self, copies: Mapping[Tensor, Tensor]) -> None:
        self._fused.copies = dict(copies)

    def scale_gradients(self, gradients: Sequence[Tensor], factor: Tensor) -> None:
        self._fused.grad_scale = factor.reciprocal()  # type: ignore[attr-defined]  # absent where nothing is scaled

    def reset_scale(self) -> None:
        # Removed, not set to 1: the update then leaves out the multiplication. Twice is no error: at ZeRO 3 nothing
        # says whether DeepSpeed got as far as scaling before it skipped the step.
        vars(self._fused).pop("grad_scale", None)


def capabilities(optimizer: Optimizer) -> Capabilities:
    """Return what engines may ask of ``optimizer``; a plain one gets passes of its own around its step."""
    return (_FusedCapabilities if isinstance(optimizer, FusedOptimizer) else Capabilities)(optimizer)
