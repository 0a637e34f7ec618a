"""Conversion between YAML, plain containers and the typed configuration; unknown keys are refused."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf._utils import get_omega_conf_dumper
from omegaconf.errors import OmegaConfBaseException

from anemoi_dist.config.checks import check
from anemoi_dist.config.launcher_checks import check_lines
from anemoi_dist.config.schema import Config
from anemoi_dist.config.tree import Tree, escaped
from anemoi_dist.errors import ConfigError


def from_container(container: Tree) -> Config:
    """Convert a composed configuration to its types and check it.

    Parameters
    ----------
    container : Tree
        Plain dictionaries, lists and scalars, interpolations resolved.

    Raises
    ------
    ConfigError
        A key is unknown or has no value, a value has the wrong type or breaks a rule.
    """
    refuse_unknown(container)
    refuse_missing(container)
    _refuse_scalar_nodes(container)
    check_lines(container.get("launcher", {}).get("slurm", {}).get("setup"))  # OmegaConf makes a text of false
    try:
        # Somebody else's configuration has no types here, and OmegaConf takes a second for a large one.
        task = container.get("task", {})
        shell = container | {"task": {name: value for name, value in task.items() if name != "settings"}}
        merged = OmegaConf.merge(OmegaConf.structured(Config), escaped(shell))
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise _missing(missing[0])
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _wrong_type(error, container) from error
    assert isinstance(config, Config)
    config.task.settings = task.get("settings") or {}
    check(config)
    return config


def refuse_missing(container: Tree, prefix: str = "") -> None:
    """Raise :class:`ConfigError` for the first mandatory value (``???``) that is not set."""
    for name, value in container.items():
        if isinstance(value, dict):
            refuse_missing(value, f"{prefix}{name}.")
        elif value == MISSING:
            raise _missing(f"{prefix}{name}")


@functools.cache
def schema_keys() -> Mapping[str, Any]:
    """Return every dotted key of the schema with its type, nodes before the keys in them."""
    return MappingProxyType(dict(_walk_schema(Config, "")))


def _walk_schema(node: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(node)
    for item in fields(node):
        yield prefix + item.name, hints[item.name]
        if is_dataclass(hints[item.name]):
            yield from _walk_schema(hints[item.name], f"{prefix}{item.name}.")


def refuse_unknown(container: Tree, *, origin: str = "") -> None:
    """Raise :class:`ConfigError` for keys that the schema does not know, naming the nearest valid ones.

    Parameters
    ----------
    container : Tree
        A configuration or a part of one, from its root on.
    origin : str, optional
        The file it comes from, for the message.
    """
    unknown = list(unknown_keys(container))
    if unknown:
        key, value = unknown[0]
        raise unknown_key(key, value, others=[other for other, _ in unknown[1:]], origin=origin)


def unknown_keys(container: Tree) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of keys that are not in the schema; inside free-form nodes every key is valid."""
    schema = schema_keys()

    def walk(node: Tree, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            key = f"{prefix}{name}"
            if key not in schema:
                yield key, value
            elif isinstance(value, dict) and is_dataclass(schema[key]):
                yield from walk(value, f"{key}.")

    return walk(container, "")


def unknown_key(
    key: str, value: Any, *, known: Iterable[str] = (), others: Sequence[str] = (), origin: str = "", hint: str = ""
) -> ConfigError:
    """Return the error for a key that does not exist.

    Parameters
    ----------
    key : str
        The dotted key.
    value : Any
        What it was to be set to.
    known : Iterable[str], optional
        Keys that exist besides the schema's.
    others : Sequence[str], optional
        Further unknown keys, listed in the same message.
    origin : str, optional
        Where it was read.
    hint : str, optional
        Another way to correct it.
    """
    keys = [*schema_keys(), *known]
    rule = "is not a configuration key" + (f" (in {origin})" if origin else "")
    if others:
        rule += f", nor are: {', '.join(others)}"
    near = nearest_keys(key, keys)
    parent = key.rpartition(".")[0]
    siblings = [name for name in keys if name.rpartition(".")[0] == parent]
    if near:
        fix = f"did you mean {' or '.join(near)}?"
    elif siblings and parent:
        names = dict.fromkeys(name.rpartition(".")[2] for name in siblings)
        fix = f"the keys of {parent} are {', '.join(names)}"
    else:
        fix = f"the top-level keys are {', '.join(item.name for item in fields(Config))}"
    return ConfigError(key, value, rule, fix="; ".join(filter(None, (fix, hint))))


def nearest_keys(key: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """Return the valid keys that ``key`` most probably meant: the same last name elsewhere, or a similar spelling."""
    keys = list(dict.fromkeys(known))
    last = key.rpartition(".")[2]
    by_name: dict[str, list[str]] = {}
    for candidate in keys:
        by_name.setdefault(candidate.rpartition(".")[2], []).append(candidate)
    # The right name under the wrong parent is the most frequent mistake.
    if exact := by_name.get(last):
        return exact[:count]
    # A whole key is long, so its spelling must be closer than that of a single name.
    found = difflib.get_close_matches(key, keys, n=count, cutoff=0.85)
    for name in difflib.get_close_matches(last, by_name, n=count, cutoff=0.75):
        found += by_name[name]
    return list(dict.fromkeys(found))[:count]


_EXAMPLES = {
    "training.max_steps": "training.max_steps=1000",
    "training.global_batch_size": "training.global_batch_size=16",
    "training.optimizer": "training/optimizer=ademamix",
    "engine.kind": "engine=zero2",
    "data.kind": "data=era5_sample",
    "data.dataset": "data.dataset=/path/to/dataset.zarr",
    "model": "model=latlon",
}


def _missing(key: str) -> ConfigError:
    return ConfigError(
        key, "???", "is mandatory and has no value", fix=f"for example {_EXAMPLES.get(key, key + '=VALUE')}"
    )


def _wrong_type(error: OmegaConfBaseException, container: Tree) -> ConfigError:
    key = str(getattr(error, "full_key", None) or "configuration")
    value: Any = container
    for name in re.split(r"[.\[\]]+", key.rstrip("]")):
        if isinstance(value, list) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        elif isinstance(value, dict) and name in value:
            value = value[name]
    expected = schema_keys().get(key)
    if expected is None:
        return ConfigError(key, value, str(error).splitlines()[0])
    # 1e5 is a float in YAML, and the usual way to write a large number of steps.
    fix = f"{key}={int(value)}" if isinstance(value, float) and value.is_integer() else ""
    return ConfigError(key, value, f"must be {_describe(expected)}", fix=fix)


def _refuse_scalar_nodes(container: Tree, prefix: str = "") -> None:
    schema = schema_keys()
    for name, value in container.items():
        expected = schema[f"{prefix}{name}"]
        if not is_dataclass(expected):
            continue
        if not isinstance(value, dict):
            fix = f"its keys are {', '.join(item.name for item in fields(expected))}"
            raise ConfigError(f"{prefix}{name}", value, f"must be {_describe(expected)}", fix=fix)
        _refuse_scalar_nodes(value, f"{prefix}{name}.")


def _describe(expected: Any) -> str:
    arguments = get_args(expected)
    if type(None) in arguments:
        return " or ".join([*(_describe(part) for part in arguments if part is not type(None)), "null"])
    if get_origin(expected) is list:
        return f"a list, each item {_describe(arguments[0])}"
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    return names.get(expected, "a mapping of keys to values")


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML; :func:`from_yaml` gives it back."""
    structured = OmegaConf.create(escaped(dataclasses.asdict(config)))
    text = OmegaConf.to_yaml(structured)
    if "\x85" not in text:
        return text
    # U+0085 ends a line in YAML. PyYAML writes it unescaped and reads it back as a space; escaped it survives.
    container = OmegaConf.to_container(structured, enum_to_str=True)
    return str(yaml.dump(container, Dumper=get_omega_conf_dumper(), default_flow_style=False, sort_keys=False))


def from_yaml(text: str) -> Config:
    """Read a frozen configuration."""
    container = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    assert isinstance(container, dict)
    return from_container(container)  # type: ignore[arg-type]
