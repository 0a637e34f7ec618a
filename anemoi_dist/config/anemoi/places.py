"""Places of anemoi-training's configuration where objects are built, each with its modules and its base class.

Hydra calls whatever a ``_target_`` names, with arguments of the configuration, so that a configuration could run any
code. :func:`check_target_names` compares names alone; :func:`check_target_bases` imports what has passed, before
anything is built.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from anemoi_dist.config.anemoi.layouts import ZERO_OPTIMIZER
from anemoi_dist.config.targets import ALIASES, BUILT_IN_ALLOWED, nested_targets, resolve_target
from anemoi_dist.config.tree import Tree, find, is_below
from anemoi_dist.errors import ConfigError

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@dataclass(frozen=True)
class Kind:
    """Objects that belong in a place.

    Parameters
    ----------
    base : str
        Import path of the base class; empty: nothing is built from there.
    modules : tuple[str, ...]
        Modules that a class may be named in; ``.*`` at the end covers those below, too.
    """

    base: str
    modules: tuple[str, ...]

    def __str__(self) -> str:
        if not self.base:
            return "an optimizer or scheduler"
        return f"one of {' or '.join(self.modules)}, derived from {self.base}"

    def covers(self, name: str) -> bool:
        """Whether ``name`` spells a public class in one of the modules."""
        module, _, last = name.rpartition(".")
        # Only classes are written with a capital; modules on the path are not, so a method of a class is none.
        if not re.fullmatch(r"[A-Z]\w*", last) or "._" in name or module != module.lower():
            return False
        return any(
            module == allowed.removesuffix(".*") or (allowed.endswith(".*") and is_below(module, (allowed[:-2],)))
            for allowed in self.modules
        )


_NODES = Kind(
    "anemoi.graphs.nodes.builders.base.BaseNodeBuilder", ("anemoi.graphs.nodes", "anemoi.graphs.nodes.builders.*")
)
_NODE_ATTRIBUTE = Kind(
    "anemoi.graphs.nodes.attributes.base_attributes.BaseNodeAttribute", ("anemoi.graphs.nodes.attributes.*",)
)
_EDGES = Kind(
    "anemoi.graphs.edges.builders.base.BaseEdgeBuilder", ("anemoi.graphs.edges", "anemoi.graphs.edges.builders.*")
)
_EDGE_ATTRIBUTE = Kind("anemoi.graphs.edges.attributes.BaseEdgeAttributeBuilder", ("anemoi.graphs.edges.attributes",))
_LAYERS = "anemoi.models.layers"
_KERNEL = Kind(
    "torch.nn.Module", ("torch.nn", "torch.nn.modules.*", f"{_LAYERS}.normalization", f"{_LAYERS}.activations")
)
_MAPPER = Kind(f"{_LAYERS}.mapper.BaseMapper", (f"{_LAYERS}.mapper",))
_LOSS = Kind("anemoi.training.losses.base.BaseLoss", ("anemoi.training.losses.*",))

#: Patterns of dotted keys -> what belongs there; ``*`` is one name, ``**`` any number. Indices of lists do not count,
#: and of several patterns the first holds.
PLACES = {
    # Of a truncation or projection, in a residual connection or a loss.
    "**.node_builder": _NODES,
    "graph.nodes.*.attributes.**": _NODE_ATTRIBUTE,
    "graph.attributes.nodes.**": _NODE_ATTRIBUTE,
    "graph.edges.edge_builders": _EDGES,
    "graph.edge_builders.*": _EDGES,
    "graph.edges.attributes.*": _EDGE_ATTRIBUTE,
    "graph.attributes.edges.*": _EDGE_ATTRIBUTE,
    "graph.post_processors": Kind(
        "anemoi.graphs.processors.post_process.PostProcessor", ("anemoi.graphs.processors.*",)
    ),
    "graph.post_processors.**.attributes.*": _EDGE_ATTRIBUTE,
    "model.model": Kind("anemoi.models.models.base.BaseGraphModel", ("anemoi.models.models.*",)),
    "model.model.transport.noise_embedder": Kind("torch.nn.Module", (f"{_LAYERS}.diffusion",)),
    "model.**.layer_kernels.*": _KERNEL,
    "model.compile": Kind("torch.nn.Module", (f"{_LAYERS}.*", "anemoi.models.models.*", "anemoi.training.losses.*")),
    # NoOpProcessor is not derived from BaseProcessor.
    "model.processor": Kind("torch.nn.Module", (f"{_LAYERS}.processor",)),
    "model.encoders.*.mapper": _MAPPER,
    "model.decoders.*.mapper": _MAPPER,
    "model.downscale_mapper": _MAPPER,
    "model.upscale_mapper": _MAPPER,
    "model.latent_aggregator": Kind(f"{_LAYERS}.aggregator.BaseLatentAggregator", (f"{_LAYERS}.aggregator",)),
    "model.noise_injector": Kind(f"{_LAYERS}.ensemble.BaseNoiseInjector", (f"{_LAYERS}.ensemble",)),
    "model.residual.**": Kind(f"{_LAYERS}.residual.BaseResidualConnection", (f"{_LAYERS}.residual",)),
    "model.bounding.**": Kind(f"{_LAYERS}.bounding.BaseBounding", (f"{_LAYERS}.bounding",)),
    "model.output_mask.**": Kind("anemoi.training.utils.masks.BaseMask", ("anemoi.training.utils.masks",)),
    "data.datasets.*.processors.*": Kind(
        "anemoi.models.preprocessing.BasePreprocessor", ("anemoi.models.preprocessing.*",)
    ),
    "task": Kind("anemoi.training.tasks.base.BaseTask", ("anemoi.training.tasks.*",)),
    "training.method": Kind(
        "anemoi.training.train.methods.base.BaseTrainingModule", ("anemoi.training.train.methods.*",)
    ),
    "training.training_loss.**": _LOSS,
    "training.validation_metrics.**": _LOSS,
    "training.scalers.**": Kind(
        "anemoi.training.losses.scalers.base_scaler.BaseScaler", ("anemoi.training.losses.scalers.*",)
    ),
    # Not built from: the optimizer is built from our own keys, the strategy is the engine.
    "training.optimization.**": Kind("", ()),
    "training.strategy": Kind("", ("anemoi.training.distributed.*",)),  # the audit says which
}


def targets(settings: Tree) -> Iterator[tuple[str, Any]]:
    """Yield key and value of every entry that names a class to Hydra, by ``_target_`` or to be compiled."""
    yield from nested_targets(settings)
    for index, entry in enumerate(find(settings, "model.compile")[1] or ()):
        if isinstance(entry, dict) and "module" in entry:
            yield f"model.compile[{index}].module", entry["module"]


def find_kind(key: str) -> Kind | None:
    """Return what belongs at ``key``, that of a name, or None if nothing is called there."""
    place = re.sub(r"\[\d+\]", "", key).split(".")[:-1]
    return next((kind for pattern, kind in PLACES.items() if _matches(pattern.split("."), place)), None)


def _matches(pattern: list[str], place: list[str]) -> bool:
    if not pattern:
        return not place
    if pattern[0] == "**":
        return any(_matches(pattern[1:], place[start:]) for start in range(len(place) + 1))
    return bool(place) and pattern[0] in ("*", place[0]) and _matches(pattern[1:], place[1:])


def check_target_names(settings: Tree, *, allowed: Iterable[str] = ()) -> None:
    """Check every ``_target_`` of a composed configuration by its name; nothing is imported.

    Parameters
    ----------
    settings : Tree
        The whole configuration of anemoi-training.
    allowed : Iterable[str]
        ``security.allowed_targets``: import paths that every place may name, themselves and what is below them.

    Raises
    ------
    ConfigError
        A name is neither of its place's modules nor allowed, or stands where nothing is built.
    """
    allowed = tuple(allowed)
    for key, name in targets(settings):
        kind = find_kind(key)
        is_path = isinstance(name, str) and _PATH.fullmatch(name) and "__" not in name
        if is_path and (is_below(name, allowed) or (kind is not None and _is_covered(kind, name))):
            continue
        fix = f"add {name} or its package to security.allowed_targets if you trust it" if is_path else ""
        rule = "stands where nothing is built" if kind is None else f"must name a class that belongs there: {kind}"
        raise ConfigError(key, name, rule, fix=fix)


def check_target_bases(settings: Tree, *, allowed: Iterable[str] = ()) -> None:
    """Import every class that a configuration names and check that it is derived from its place's base class.

    To be called by each process before anything is instantiated: imports torch. Arguments and errors are those of
    :func:`check_target_names`, which comes first.
    """
    check_target_names(settings, allowed=allowed)
    for key, name in targets(settings):
        kind = find_kind(key)
        base = None if kind is None else kind.base
        if base == "":
            continue
        modules = () if kind is None else tuple(module.removesuffix(".*") for module in kind.modules)
        resolve_target(
            name,
            key=key,
            allowed=allowed,
            built_in=modules,
            base=object if base is None else _import(base),
        )


def _is_covered(kind: Kind, name: str) -> bool:
    # An optimizer or scheduler is built from training.optimizer and training.scheduler, by the rules for those.
    return kind.covers(name) if kind.modules else is_below(ALIASES.get(name, name), (*BUILT_IN_ALLOWED, ZERO_OPTIMIZER))


def _import(path: str) -> type:
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert isinstance(found, type)
    return found
