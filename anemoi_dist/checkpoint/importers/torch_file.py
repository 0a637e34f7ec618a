"""Files of ``torch.save``: Lightning's (and anemoi-training's) ``.ckpt``, and dictionaries with model and optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from anemoi_dist.checkpoint.importers.foreign import ForeignCheckpoint, checked, kind_of, state_tensors, whole
from anemoi_dist.checkpoint.importers.pickles import Placeholder, load_tensors, load_torch_file
from anemoi_dist.errors import ConfigError

_LIGHTNING = "pytorch-lightning_version"
_MODEL_KEYS = ("state_dict", "model", "model_state_dict", "module")
_OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optim")
_STEP_KEYS = ("global_step", "step", "iteration")


def read_torch_file(source: Path, *, trust: bool, weights_only: bool) -> ForeignCheckpoint:
    """Read one file.

    Parameters
    ----------
    source : Path
        Written by torch.save: a Lightning checkpoint, ``{"model": ..., "optimizer": ..., "step": ...}``, or a state
        dictionary.
    trust : bool
        As in :func:`anemoi_dist.checkpoint.importers.pickles.load_torch_file`.
    weights_only : bool
        Leave the optimizer's states.

    Returns
    -------
    ForeignCheckpoint
        Whole tensors. Parameters are those with an optimizer state and other floating tensors; the rest are buffers.
    """
    content = _open(source, trust=trust)
    if not isinstance(content, Mapping):
        raise ConfigError("SOURCE", str(source), f"holds a {type(content).__name__}, not a dictionary")
    is_lightning = _LIGHTNING in content
    weights = _weights(source, content)
    states: dict[str, dict[str, torch.Tensor]] = {}
    if not weights_only and (optimizer := _optimizer(source, content)) is not None:
        states = named_states(source, optimizer, weights)
    shards = [whole(name, kind_of(name, t, trained=states), t) for name, t in weights.items()]
    shards += [whole(name, kind, t) for name, held in states.items() for kind, t in held.items()]
    step = next((content[key] for key in _STEP_KEYS if isinstance(content.get(key), int)), None)
    return ForeignCheckpoint("lightning" if is_lightning else "torch", step, shards)


def _open(source: Path, *, trust: bool) -> Any:
    """Open the file; one of Lightning's also where it has objects, as anemoi-training's hyperparameters do."""
    try:
        return load_torch_file(source, trust=trust)
    except ConfigError:
        # What else is in a file of an unknown layout may matter: of Lightning's it is known which parts do not.
        content = None if trust else _lightning_parts(source)
        if content is None:
            raise
        return content


def _lightning_parts(source: Path) -> dict[str, Any] | None:
    """Return the parts of Lightning's file that an import needs, or None where one of them holds an object."""
    try:
        content = load_tensors(source)
    except ConfigError:
        return None
    if not isinstance(content, dict) or _LIGHTNING not in content:
        return None
    parts = {
        key: content[key] for key in (_LIGHTNING, "state_dict", "optimizer_states", "global_step") if key in content
    }
    return None if _has_placeholder(parts) else parts


def _has_placeholder(node: Any) -> bool:
    """Whether an object was left out of a tree of dictionaries and lists: a weight of an unknown type, for one."""
    if isinstance(node, Mapping):
        return any(map(_has_placeholder, [*node, *node.values()]))
    if isinstance(node, list | tuple):
        return any(map(_has_placeholder, node))
    return isinstance(node, Placeholder) or (isinstance(node, type) and issubclass(node, Placeholder))


def _weights(source: Path, content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the model's tensors in their order, one name for each that is tied."""
    found = next((content[key] for key in _MODEL_KEYS if isinstance(content.get(key), Mapping)), content)
    weights: dict[str, torch.Tensor] = {}
    known: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    for name, tensor in found.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        checked(name, tensor)
        # Tied weights are saved under each of their names, and are one parameter of the model. Two empty tensors may
        # share an address by chance.
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in known:
            continue
        known.add(place)
        weights[name] = tensor
    if not weights:
        keys = ", ".join(map(str, list(content)[:10]))
        raise ConfigError("SOURCE", str(source), f"has no model among {keys}", fix=f"save it as {_MODEL_KEYS[0]!r}")
    return weights


def _optimizer(source: Path, content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if several := content.get("optimizer_states"):
        if len(several) > 1:
            raise ConfigError("SOURCE", str(source), f"has {len(several)} optimizers, a run has one")
        return several[0]
    return next((content[key] for key in _OPTIMIZER_KEYS if isinstance(content.get(key), Mapping)), None)


def named_states(
    source: Path,
    optimizer: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    *,
    trained: Sequence[str] | None = None,
) -> dict[str, dict[str, torch.Tensor]]:
    """Return the optimizer's states by the names of the parameters.

    Parameters
    ----------
    source : Path
        For errors.
    optimizer : Mapping[str, Any]
        State dictionary of an optimizer.
    weights : Mapping[str, torch.Tensor]
        The model's tensors in their order.
    trained : Sequence[str], optional
        Names of the parameters that the optimizer has, in its order. By default they follow from names in the file, or
        from the shapes.

    Raises
    ------
    ConfigError
        The states do not fit the parameters, or it cannot be told whose they are.
    """
    states, groups = optimizer.get("state", optimizer), optimizer.get("param_groups", [])
    held = {key: state_tensors(state) for key, state in states.items() if isinstance(state, Mapping)}
    held = {key: state for key, state in held.items() if state}
    if all(isinstance(key, str) for key in held) and (held or trained is None):
        return held
    order = [index for group in groups for index in group["params"]]
    if trained is not None:
        names = list(trained)
        if len(names) != len(order):
            rule = f"has an optimizer of {len(order)} parameters, and {len(names)} are trained"
            raise ConfigError("SOURCE", str(source), rule, fix="freeze the same, or take the weights alone")
    elif all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    else:
        shapes = [next((tuple(t.shape) for t in held.get(i, {}).values() if t.dim()), None) for i in order]
        names = _align(source, shapes, weights, num_groups=len(groups))
    named = dict(zip(order, names, strict=True))
    for index, state in held.items():
        for kind, tensor in state.items():
            if tensor.dim() and tensor.shape != weights[named[index]].shape:
                rule = f"{kind} {tuple(tensor.shape)} does not fit {named[index]} {tuple(weights[named[index]].shape)}"
                raise ConfigError("SOURCE", str(source), rule, fix="--weights-only leaves the optimizer's states")
    return {named[index]: state for index, state in held.items()}


def _align(
    source: Path, shapes: Sequence[tuple[int, ...] | None], weights: Mapping[str, torch.Tensor], *, num_groups: int
) -> list[str]:
    """Name the parameters of an optimizer that knows them by their order alone, if only one answer is possible.

    The order is that of the model, in which buffers and frozen parameters stand between. The states' shapes say which
    are left out; where they leave a choice, the states are refused rather than guessed.
    """
    names = [name for name, tensor in weights.items() if kind_of(name, tensor, trained=()) == "param"]
    # First match from the front and first match from the back: where they agree there is no third way between them.
    forward = _embed(shapes, names, weights)
    backward = _embed(shapes[::-1], names[::-1], weights)
    if num_groups == 1 and forward is not None and backward is not None and forward == backward[::-1]:
        return forward
    reason = "it has several parameter groups" if num_groups > 1 else "the shapes leave a choice, or none"
    raise ConfigError(
        "SOURCE",
        str(source),
        f"has an optimizer that knows its parameters by number, and {reason}: their names cannot be told",
        fix="save an optimizer that was built from model.named_parameters(), or --weights-only",
    )


def _embed(
    shapes: Sequence[tuple[int, ...] | None], names: Sequence[str], weights: Mapping[str, torch.Tensor]
) -> list[str] | None:
    """Return the first names, in order, whose shapes are ``shapes``; None is any shape."""
    chosen: list[str] = []
    remaining = iter(names)
    for shape in shapes:
        name = next((name for name in remaining if shape in (None, tuple(weights[name].shape))), None)
        if name is None:
            return None
        chosen.append(name)
    return chosen
