"""Nested dictionaries by dotted key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from anemoi_dist.errors import ConfigError

#: A configuration or a part of one as plain dictionaries, lists and scalars.
Tree = dict[str, Any]


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf; a list or an empty mapping is one leaf."""
    if isinstance(node, dict) and node:
        for name, value in node.items():
            yield from leaves(value, f"{prefix}.{name}" if prefix else str(name))
    elif prefix:
        yield prefix, node


def is_below(key: str, nodes: Iterable[str]) -> bool:
    """Whether a dotted key is one of ``nodes`` or lies below one."""
    return any(key == node or key.startswith(f"{node}.") for node in nodes)


def read_yaml(file: Path) -> Tree:
    """Read a YAML file as Hydra does (dates stay texts), without resolving interpolations."""
    # Most users of this module read no file; both imports would slow down commands such as status.
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        container = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except OSError as error:
        raise ConfigError("--config", str(file), f"cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError("--config", str(file), f"is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(container, dict):
        raise ConfigError(
            "--config", str(file), "must hold a mapping of keys to values", fix="training: {max_steps: 100}"
        )
    return container  # type: ignore[return-value]


def escaped(node: Any) -> Any:
    """Return a copy in which OmegaConf takes every text literally: ``${`` of a resolved value refers to nothing."""
    if isinstance(node, dict):
        return {name: escaped(value) for name, value in node.items()}
    if isinstance(node, list):
        return [escaped(value) for value in node]
    # A backslash before it has to be doubled, or it would escape what follows.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", node) if isinstance(node, str) else node


def find(container: Any, key: str) -> tuple[bool, Any]:
    """Return whether the dotted ``key`` exists in nested mappings and lists, and its value."""
    for name in key.split("."):
        if isinstance(container, dict) and name in container:
            container = container[name]
        elif isinstance(container, list) and name.isdigit() and int(name) < len(container):
            container = container[int(name)]
        else:
            return False, None
    return True, container


def place(container: Tree, key: str, value: Any) -> None:
    """Set the dotted ``key``; missing mappings on its path are created, and a scalar there is replaced by one."""
    *parents, last = key.split(".")
    node: Any = container
    for name in parents:
        if isinstance(node, list):
            node = node[int(name)]
            continue
        if not isinstance(node.get(name), dict | list):
            node[name] = {}
        node = node[name]
    if isinstance(node, list):
        node[int(last)] = value
    else:
        node[last] = value


def remove(container: Tree, key: str) -> None:
    """Delete the dotted ``key``, which exists."""
    parent, _, last = key.rpartition(".")
    node: Any = find(container, parent)[1] if parent else container
    del node[int(last) if isinstance(node, list) else last]
