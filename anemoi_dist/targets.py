"""From a ``_target_`` to the object it names, for names that the allow-list covers.

A configuration may come from anywhere, and importing a name runs code. So a name is compared with the allow-list
before anything is imported, each module that it leads through is compared again, and so is the canonical name of what
it leads to: ``torch.optim.lr_scheduler.types.FunctionType`` starts well and ends in ``builtins``.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from anemoi_dist.errors import ConfigError

BUILT_IN_ALLOWED = ("torch.optim", "timm.scheduler", "anemoi_dist", "anemoi.models")

#: Names of anemoi-training for what is ours here.
ALIASES = {"anemoi.training.optimizers.AdEMAMix.AdEMAMix": "anemoi_dist.optimizers.ademamix.AdEMAMix"}

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def resolve_target(name: str, *, key: str, allowed: Iterable[str] = ()) -> Callable[..., Any]:
    """Import what a ``_target_`` names.

    Parameters
    ----------
    name : str
        Import path of a class or function.
    key : str
        The configuration key that holds it, for error messages.
    allowed : Iterable[str]
        Import paths that the user allows (``security.allowed_targets``), beside :data:`BUILT_IN_ALLOWED`. Each
        covers itself and whatever lies below it.

    Raises
    ------
    ConfigError
        The name is no import path, is not allowed (nothing of it has been imported then), does not exist, is not
        callable, or is another name for something that is not allowed.
    """
    prefixes = (*BUILT_IN_ALLOWED, *_checked_prefixes(allowed))
    if not isinstance(name, str) or not _DOTTED.fullmatch(name) or "__" in name:
        raise ConfigError(key, name, "must be an import path such as torch.optim.AdamW", valid=prefixes)
    name = ALIASES.get(name, name)
    if not _covered(name, prefixes):
        raise _refusal(key, name, name, prefixes)
    target = _walk(name, key=key, prefixes=prefixes)
    if not callable(target):
        raise ConfigError(key, name, f"must name a class or function, not a {type(target).__name__}")
    # An instance or a partial has no name of its own, so nothing says where it is from.
    canonical = f"{getattr(target, '__module__', None)}.{getattr(target, '__qualname__', None)}"
    if not _covered(canonical, prefixes):
        raise _refusal(key, name, canonical, prefixes)
    return target


def _walk(name: str, *, key: str, prefixes: tuple[str, ...]) -> Any:
    """Go from the first module to the object, importing only modules that are allowed or lead to an allowed name."""
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
        if isinstance(found, ModuleType) and found.__name__ != path and not _covered(found.__name__, prefixes):
            raise _refusal(key, name, found.__name__, prefixes)
        target = found
    return target


def _first_module(name: str, *, key: str, prefixes: tuple[str, ...]) -> tuple[ModuleType, int]:
    """Import the longest part of ``name`` that a prefix spells out and that is a module."""
    if _covered(name, ("timm.scheduler",)):
        from anemoi_dist.schedulers.cosine import load_timm_scheduler

        return load_timm_scheduler(), 2
    parts = name.split(".")
    longest = max(len(prefix.split(".")) for prefix in prefixes if _covered(name, (prefix,)))
    for depth in range(1, longest + 1):
        path = ".".join(parts[:depth])
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            # A prefix may name a class: then the module is what lies above it.
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


def _covered(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


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
