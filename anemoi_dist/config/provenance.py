"""Origin of every value of a configuration, and the configuration as YAML annotated with it. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from anemoi_dist.config.tree import Tree, is_below, leaves

DEFAULT = "default (anemoi_dist/config/schema.py)"
COMMAND_LINE = "command line"
DERIVED = "derived"


class Provenance:
    """Records, layer by layer, which origin set a key last.

    Setting a key drops the records of all keys below it: the node was replaced, or a mapping became a scalar.
    """

    def __init__(self) -> None:
        self._origins: dict[str, str] = {}

    def record(self, keys: Iterable[str], origin: str) -> None:
        """Record that ``origin`` set these dotted keys."""
        for key in keys:
            self.forget(key)
            self._origins[key] = origin

    def forget(self, key: str) -> None:
        """Drop the records of ``key`` and of all keys below it."""
        for name in [name for name in self._origins if is_below(name, (key,))]:
            del self._origins[name]

    def of(self, container: Tree) -> dict[str, str]:
        """Return dotted leaf -> origin for a final configuration."""
        return {key: self._nearest(key) for key, _ in leaves(container)}

    def _nearest(self, key: str) -> str:
        # A value inside a list or a replaced node has the origin of the nearest node above it.
        while key:
            if key in self._origins:
                return self._origins[key]
            key = key.rpartition(".")[0]
        return DEFAULT


def annotated_yaml(container: Tree, provenance: dict[str, str]) -> str:
    """Return ``container`` as YAML, the origin of each value in an aligned comment; it loads as plain YAML."""
    lines = list(_lines(container, provenance, "", 0))
    # A single very long value must not push all comments off the screen.
    width = max((len(text) for text, _ in lines if len(text) <= 72), default=0)
    return "".join(f"{text:<{width}}  # {origin}".rstrip() + "\n" if origin else f"{text}\n" for text, origin in lines)


def _lines(node: Tree, provenance: dict[str, str], prefix: str, depth: int) -> Iterator[tuple[str, str]]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        label = "  " * depth + _inline(name) + ":"
        if isinstance(value, dict) and value:
            yield label, ""
            yield from _lines(value, provenance, f"{key}.", depth + 1)
        else:
            origin = provenance.get(key, DEFAULT).removeprefix("configs/")
            yield f"{label} {_inline(value)}", origin


def _inline(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
