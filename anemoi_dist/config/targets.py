"""Import of the object that a ``_target_`` names, if the allow-list covers it.

A configuration may come from an untrusted source, and importing a name runs code. So a name is checked against the
allow-list before anything is imported; each module on its path is checked again, and so is the canonical name of the
object found: ``torch.optim.lr_scheduler.types.FunctionType`` begins with an allowed prefix and ends in ``builtins``.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from anemoi_dist.config.timm_scheduler import load_timm_scheduler
from anemoi_dist.config.tree import is_below
from anemoi_dist.errors import ConfigError

BUILT_IN_ALLOWED = ("torch.optim", "timm.scheduler", "anemoi_dist", "anemoi.models")

#: Names of anemoi-training -> names of the same objects here.
ALIASES = {"anemoi.training.optimizers.AdEMAMix.AdEMAMix": "anemoi_dist.optimizers.ademamix.AdEMAMix"}

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def resolve_target(
    name: str,
    *,
    key: str,
    allowed: Iterable[str] = (),
    base: type | tuple[type, ...] = object,
    built_in: tuple[str, ...] = BUILT_IN_ALLOWED,
) -> Callable[..., Any]:
    """Import what a ``_target_`` names.

    Parameters
    ----------
    name : str
        Import path of a class or function.
    key : str
        The configuration key that holds it, for error messages.
    allowed : Iterable[str]
        Import paths that the user allows (``security.allowed_targets``) in addition to ``built_in``. Each covers
        itself and everything below it.
    base : type or tuple[type, ...]
        Required base class. Built-in targets must be such classes: a function of an allowed package could do anything
        with its arguments, for example call an object that they name.
    built_in : tuple[str, ...]
        Import paths that are allowed in any case.

    Raises
    ------
    ConfigError
        The name is not an import path, is not allowed (then nothing has been imported), does not exist, is not
        callable, is not a class of the required kind, or is another name of an object that is not allowed.
    """
    trusted = _checked_prefixes(allowed)
    prefixes = (*built_in, *trusted)
    # No dunder: torch.optim.AdamW.__init__.__globals__ would lead out of the allow-list.
    if not isinstance(name, str) or not _DOTTED.fullmatch(name) or "__" in name:
        raise ConfigError(key, name, "must be an import path such as torch.optim.AdamW", valid=prefixes)
    name = ALIASES.get(name, name)
    if not is_below(name, prefixes):
        raise _refusal(key, name, name, prefixes)
    target = _walk(name, key=key, prefixes=prefixes)
    if not callable(target):
        raise ConfigError(key, name, f"must name a class or function, not a {type(target).__name__}")
    # An instance or a partial has no name of its own, so its origin cannot be checked and it is refused.
    canonical = f"{getattr(target, '__module__', None)}.{getattr(target, '__qualname__', None)}"
    if not is_below(canonical, prefixes):
        raise _refusal(key, name, canonical, prefixes)
    is_kind = isinstance(target, type) and issubclass(target, base)
    if not is_kind and (isinstance(target, type) or not is_below(canonical, trusted)):
        kinds = " or ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in _as_tuple(base))
        raise ConfigError(
            key,
            name,
            f"must be a kind of {kinds}" if base is not object else "must be a class",
            fix=f"name such a class, or add the function {canonical} to security.allowed_targets if you trust it",
        )
    return target


def nested_targets(node: Any, *, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield key and value of every ``_target_`` below ``node``: Hydra would call each of them unchecked."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            if name == "_target_":
                yield f"{key}._target_", value
            yield from nested_targets(value, key=f"{key}.{name}" if key else str(name))
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for index, value in enumerate(node):
            yield from nested_targets(value, key=f"{key}[{index}]")


def _as_tuple(base: type | tuple[type, ...]) -> tuple[type, ...]:
    return base if isinstance(base, tuple) else (base,)


def _walk(name: str, *, key: str, prefixes: tuple[str, ...]) -> Any:
    """Walk from the first module to the object; modules on the way are imported only if the allow-list covers them."""
    parts = name.split(".")
    target: Any
    target, done = _first_module(name, key=key, prefixes=prefixes)
    for depth in range(done, len(parts)):
        part, path = parts[depth], ".".join(parts[: depth + 1])
        found = getattr(target, part, None)
        if not hasattr(target, part):
            found = _import_if_there(path, key=key, name=name) if isinstance(target, ModuleType) else None
            if found is None:
                near = difflib.get_close_matches(part, dir(target), n=5, cutoff=0.5)
                raise ConfigError(key, name, f"{'.'.join(parts[:depth])} has no {part!r}", valid=near)
        # A module may be imported under another name (torch.optim.os): its own name decides.
        if isinstance(found, ModuleType) and found.__name__ != path and not is_below(found.__name__, prefixes):
            raise _refusal(key, name, found.__name__, prefixes)
        target = found
    return target


def _first_module(name: str, *, key: str, prefixes: tuple[str, ...]) -> tuple[ModuleType, int]:
    """Import the longest part of ``name`` that a prefix spells out and that is a module."""
    if is_below(name, ("timm.scheduler",)):
        return load_timm_scheduler(), 2
    parts = name.split(".")
    longest = max(len(prefix.split(".")) for prefix in prefixes if is_below(name, (prefix,)))
    for depth in range(1, longest + 1):
        path = ".".join(parts[:depth])
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            # A prefix may name a class; its module is then one level up.
            if error.name != path or depth == 1:
                raise ConfigError(
                    key, name, f"cannot be imported: {error}", fix="install it, or correct the path"
                ) from error
            return module, depth - 1
        except ImportError as error:
            raise ConfigError(key, name, f"cannot be imported: {error}") from error
    return module, longest


def _import_if_there(path: str, *, key: str, name: str) -> ModuleType | None:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name == path:
            return None
        raise ConfigError(key, name, f"cannot be imported: {error}", fix=f"install {error.name}") from error
    except ImportError as error:
        raise ConfigError(key, name, f"cannot be imported: {error}") from error


def _checked_prefixes(allowed: Iterable[str]) -> tuple[str, ...]:
    allowed = tuple(allowed)
    for prefix in allowed:
        if not isinstance(prefix, str) or not _DOTTED.fullmatch(prefix):
            raise ConfigError(
                "security.allowed_targets", prefix, "must be an import path, without wildcards", fix="my_package.models"
            )
    return allowed


def _refusal(key: str, name: str, canonical: str, prefixes: tuple[str, ...]) -> ConfigError:
    what = "is not on the allow-list" if canonical == name else f"is {canonical}, which is not on the allow-list"
    return ConfigError(
        key,
        name,
        what,
        valid=prefixes,
        fix=f"add {canonical} or its package to security.allowed_targets if you trust it",
    )
