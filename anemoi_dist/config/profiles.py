"""Cluster profiles: the values of ``launcher`` that one cluster needs. No torch."""

from __future__ import annotations

import difflib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import anemoi_dist.slurm
from anemoi_dist.config.schema import LauncherConfig, SlurmConfig
from anemoi_dist.config.tree import Tree, read_yaml
from anemoi_dist.errors import ConfigError

PROFILES_DIR = Path(anemoi_dist.slurm.__file__).parent / "profiles"
#: Keys of ``launcher`` that do not describe a cluster.
_NOT_IN_A_PROFILE = ("kind", "profile")


def profile_names() -> list[str]:
    """Return the profiles that come with the package."""
    return sorted(file.stem for file in PROFILES_DIR.glob("*.yaml"))


def read_profile(name: str) -> tuple[Tree, str]:
    """Return the part of ``launcher`` that a profile sets, and the file it comes from.

    Parameters
    ----------
    name : str
        One of :func:`profile_names`, or the path of a YAML file (with a slash or ``.yaml``).

    Raises
    ------
    ConfigError
        There is no such profile, or it holds a key that ``launcher`` does not have.
    """
    if not _is_path(name) and name not in profile_names():
        raise ConfigError(
            "launcher.profile", name, "is not a profile", valid=profile_names(), fix="a path of your own: ./mine.yaml"
        )
    file = Path(name).expanduser() if _is_path(name) else PROFILES_DIR / f"{name}.yaml"
    if not file.is_file():
        raise ConfigError("launcher.profile", name, f"does not exist ({file.absolute()})", valid=profile_names())
    # Checked here although composition would refuse unknown keys too: the message can name the profile's file.
    content = read_yaml(file)
    _refuse_unknown(content, LauncherConfig, file=file, prefix="")
    return content, str(file) if _is_path(name) else f"slurm/profiles/{file.name}"


def absolute_profile(name: str) -> str:
    """Return ``name`` with an absolute path: a run may be resumed from another directory."""
    return str(Path(name).expanduser().absolute()) if _is_path(name) else name


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith((".yaml", ".yml"))


def _refuse_unknown(content: Tree, schema: type, *, file: Path, prefix: str) -> None:
    hints = get_type_hints(schema)
    valid = [item.name for item in fields(schema) if prefix or item.name not in _NOT_IN_A_PROFILE]
    for name, value in content.items():
        key = f"{prefix}{name}"
        if name not in valid:
            fix = "".join(f"did you mean {near}?" for near in difflib.get_close_matches(str(name), valid, n=1))
            if not prefix and name in hints and name in _NOT_IN_A_PROFILE:
                fix = f"launcher.{name} on the command line"
            elif not prefix and name in get_type_hints(SlurmConfig):
                fix = f"slurm: {{{name}: ...}}"
            raise ConfigError(key, value, f"is not a key of a profile (in {file})", valid=valid, fix=fix)
        if is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise ConfigError(key, value, f"must be a mapping of keys to values (in {file})")
            _refuse_unknown(value, hints[name], file=file, prefix=f"{key}.")  # type: ignore[arg-type]
