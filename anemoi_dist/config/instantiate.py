"""Build what a ``_target_`` names. No torch: callers pass the base classes that it must derive from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from anemoi_dist.config.targets import resolve_target
from anemoi_dist.config.tree import Tree
from anemoi_dist.errors import AnemoiDistError, ConfigError


def split_node(
    node: Tree, *, key: str, allowed: Iterable[str], base: type | tuple[type, ...]
) -> tuple[Callable[..., Any], Tree]:
    """Return what ``_target_`` names and the other entries, as plain containers."""
    arguments = {name: _plain(value) for name, value in node.items()}
    name = arguments.pop("_target_", None)
    return resolve_target(name, key=f"{key}._target_", allowed=allowed, base=base), arguments


def check_arguments(target: Callable[..., Any], arguments: Tree, *, key: str, injected: Mapping[str, str]) -> None:
    """Refuse arguments that ``target`` does not take, or that come from elsewhere (``injected``: name to source)."""
    for name, source in injected.items():
        if name in arguments:
            value = arguments[name]
            fix = f"remove it and set {source}={value}" if source.startswith("training.") else "remove it"
            raise ConfigError(f"{key}.{name}", value, f"comes from {source}", fix=fix)
    parameters = inspect.signature(target).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    valid = [name for name, p in parameters.items() if p.kind in named and name not in injected]
    for name, value in arguments.items():
        if name not in valid and not takes_any:
            raise ConfigError(
                key,
                name,
                f"is no argument of {target.__qualname__} (given {value!r})",
                valid=valid,
                fix="defaults: " + ", ".join(_shown(parameters[n]) for n in valid),
            )
    for name in valid:
        if parameters[name].default is inspect.Parameter.empty and name not in arguments:
            rule, fix = f"{target.__qualname__} needs it", f"give {key}.{name} a value"
            raise ConfigError(f"{key}.{name}", None, rule, fix=fix)


def call(target: Callable[..., Any], *, key: str, arguments: Tree) -> Any:
    """Call ``target``; what it says against its arguments is the user's to mend."""
    try:
        return target(**arguments)
    except ConfigError as error:  # our own classes name the argument only; the user needs the whole key
        raise ConfigError(f"{key}.{error.key}", error.value, error.rule, fix=error.fix, valid=error.valid) from error
    except AnemoiDistError:
        raise
    except Exception as error:  # IndexError, ZeroDivisionError, ...: libraries index and divide before they check
        shown = {name: value for name, value in arguments.items() if name not in ("params", "optimizer")}
        raise ConfigError(key, shown, f"{target.__qualname__} refuses it: {describe(error)}") from error


def describe(error: Exception) -> str:
    """Return type and text of an exception of somebody else's code; the text alone may be empty, or just a key."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _shown(parameter: inspect.Parameter) -> str:
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"


def _plain(value: Any) -> Any:
    """Turn Hydra's lists and dictionaries, which would end up in pickles, into Python's."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return value
