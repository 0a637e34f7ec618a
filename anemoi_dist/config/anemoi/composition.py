"""Composition of anemoi-training's own configuration, by Hydra or from a composed file. Nothing of it is imported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anemoi_dist.config.overrides import parse_overrides
from anemoi_dist.config.parse import nearest_keys
from anemoi_dist.config.schema import TaskConfig
from anemoi_dist.config.secrets import redact
from anemoi_dist.config.tree import Tree, find, is_below, leaves, place, read_yaml, remove
from anemoi_dist.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

#: Nodes of which nothing is trained from: a value that is missing or cannot be resolved there is null.
_FORGIVEN = ("diagnostics", "system.output")
#: Key of theirs -> key of ours that sets it.
HARDWARE = {"num_nodes": "launcher.nodes", "num_gpus_per_node": "launcher.ranks"}


def compose_anemoi(task: TaskConfig, *, hardware: dict[str, int]) -> tuple[Tree, set[str]]:
    """Compose what ``task.config``, ``task.name`` and ``task.overrides`` name.

    Parameters
    ----------
    task : TaskConfig
        ``config`` is a directory, a YAML file with ``defaults``, or a composed YAML file.
    hardware : dict[str, int]
        ``num_nodes`` and ``num_gpus_per_node``, where the user has set the launcher's numbers: they replace theirs.

    Returns
    -------
    tuple[Tree, set[str]]
        Plain containers with every interpolation resolved, and the keys that interpolations referred to.

    Raises
    ------
    ConfigError
        There is no such configuration, it cannot be composed, a value is missing or cannot be resolved.
    """
    if not task.config:
        raise ConfigError("task.config", task.config, "is mandatory with task=anemoi", fix="task.config=DIR_OR_FILE")
    path = Path(task.config).expanduser()
    if path.is_dir():
        tree = _composed_by_hydra(path, task.name, task.overrides)
    elif not path.is_file():
        raise ConfigError("task.config", task.config, f"does not exist ({path.absolute()})")
    else:
        tree = read_yaml(path)
        if "defaults" in tree:
            tree = _composed_by_hydra(path.parent, path.stem, task.overrides)
        else:
            _apply_overrides(tree, task.overrides)
    referred = {name for _, value in scalars(tree) for name in re.findall(r"\$\{([\w.]+)", str(value))}
    for name, number in hardware.items():
        place(tree, f"system.hardware.{name}", number)
    return _resolved(tree), referred


def _composed_by_hydra(directory: Path, name: str, overrides: list[str]) -> Tree:
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    _check_search_path(directory / f"{name}.yaml", overrides)
    try:
        # Their search path plugin, which Hydra finds, adds the working directory and the packaged configuration.
        with initialize_config_dir(str(directory.absolute()), version_base=None):
            composed = compose(name, list(overrides))
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        names = sorted({file.stem for file in directory.glob("*.yaml")})
        if f"primary config '{name}'" in reason:
            raise ConfigError("task.name", name, f"is no file of {directory}", valid=names) from error
        for text in overrides:
            if text in reason or text.partition("=")[0].lstrip("+~") in reason:
                raise ConfigError("task.overrides", text, f"cannot be applied: {reason}") from error
        raise ConfigError("task.config", str(directory / f"{name}.yaml"), f"cannot be composed: {reason}") from error
    tree = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(tree, dict)
    tree.pop("hydra", None)
    return tree  # type: ignore[return-value]


def _check_search_path(file: Path, overrides: list[str]) -> None:
    """Refuse packages in Hydra's search path: it imports them to find their files."""
    own = find(read_yaml(file), "hydra.searchpath")[1] if file.is_file() else None
    given = [text for text in overrides if text.lstrip("+").startswith("hydra.searchpath")]
    for package in re.findall(r"pkg://([\w.]+)", f"{own} {given}"):
        if not is_below(package, ("anemoi.training",)):
            fix = "file://DIRECTORY, or the directory that task.config names"
            raise ConfigError("hydra.searchpath", f"pkg://{package}", "would be imported", fix=fix)


def _apply_overrides(tree: Tree, overrides: list[str]) -> None:
    """Apply overrides of single keys to a composed file, by Hydra's rules for them."""
    for edit in parse_overrides(overrides, groups={}).edits:
        exists, present = find(tree, edit.key)
        error = f"task.overrides: {edit.key}"
        if isinstance(present, dict) and isinstance(edit.value, str):
            rule = "would choose an option of a group, which a composed file no longer has"
            raise ConfigError(error, edit.value, rule, fix="give task.config the directory")
        if edit.action == "add" and exists:
            raise ConfigError(error, edit.value, f"exists already ({present!r})", fix=f"+{edit.text}")
        if edit.action in ("set", "delete") and not exists:
            near = " or ".join(nearest_keys(edit.key, [key for key, _ in leaves(tree)]))
            raise ConfigError(error, edit.value, "does not exist", fix=f"did you mean {near}?" if near else "")
        if edit.action == "delete":
            remove(tree, edit.key)
        elif isinstance(present, dict) and isinstance(edit.value, dict):
            for key, value in leaves(edit.value):
                place(tree, f"{edit.key}.{key}", value)
        else:
            place(tree, edit.key, edit.value)


def scalars(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield key and value of every scalar, those in lists too: ``edges[0].source_name``."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from scalars(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from scalars(value, f"{key}[{index}]")
    else:
        yield key, node


def _resolved(tree: Tree) -> Tree:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = OmegaConf.create(tree)
    _check_hardware(config, tree)
    for node in _FORGIVEN:
        for key, _ in leaves(find(tree, node)[1], node):
            if not _has_value(config, key):
                OmegaConf.update(config, key, None, force_add=True)
    # Before anything is resolved: an interpolation that refers to a missing value would be reported in its place.
    if missing := [key for key, value in scalars(tree) if value == "???" and not is_below(key, _FORGIVEN)]:
        others = f"; as are {', '.join(missing[1:])}" if missing[1:] else ""
        values = re.sub(r"\[(\d+)\]", r".\1", ",".join(f"{key}=VALUE" for key in missing))  # as Hydra writes an item
        raise ConfigError(missing[0], "???", f"is mandatory and has no value{others}", fix=f"task.overrides=[{values}]")
    try:
        resolved = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "task.config")
        rule = " ".join(str(error).splitlines()[0].split())
        fix = f"task.overrides=[{key}=VALUE], or set what it refers to"
        raise ConfigError(key, find(tree, key)[1], f"cannot be resolved: {rule}", fix=fix) from error
    assert isinstance(resolved, dict)
    _refuse_passwords(resolved)  # type: ignore[arg-type]
    return resolved  # type: ignore[return-value]


def _check_hardware(config: DictConfig, tree: Tree) -> None:
    """Refuse numbers of nodes and GPUs that only a job of theirs would have, by the key of ours that sets them."""
    for name, ours in HARDWARE.items():
        key = f"system.hardware.{name}"
        exists, value = find(tree, key)
        if exists and not _has_value(config, key):
            fix = f"{ours}=N (both: {', '.join(f'{key}=N' for key in HARDWARE.values())})"
            raise ConfigError(key, value, "cannot be resolved here, outside of a job", fix=fix)


def _has_value(config: DictConfig, key: str) -> bool:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        value = OmegaConf.select(config, key, throw_on_resolution_failure=True, throw_on_missing=True)
        if OmegaConf.is_config(value):
            OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException:
        return False
    return True


def _refuse_passwords(resolved: Tree) -> None:
    # The result is frozen with the run, printed and written into files for inference.
    for key, value in scalars(resolved):
        if "://" in str(value) and redact(str(value)) != str(value):
            fix = "give it by the environment, or by a file that the library reads"
            raise ConfigError(key, redact(str(value)), "must hold no password or token", fix=fix)
