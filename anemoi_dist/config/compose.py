"""Composition of a typed configuration from a command line.

Hydra composes the groups; a user's YAML file is laid over them, and single keys of the command line over that. No
``_target_`` is imported here. No torch: login nodes compose too.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import yaml

from anemoi_dist.config.anemoi.build import REQUEST, anemoi_layer
from anemoi_dist.config.identity import derive_run_id
from anemoi_dist.config.overrides import CONFIGS_DIR, KeyEdit, available_groups, parse_overrides
from anemoi_dist.config.parse import (
    from_container,
    refuse_missing,
    refuse_unknown,
    schema_keys,
    unknown_key,
)
from anemoi_dist.config.profiles import absolute_profile, read_profile
from anemoi_dist.config.provenance import COMMAND_LINE, DERIVED, Provenance
from anemoi_dist.config.schema import FREE_FORM, Config, TaskConfig
from anemoi_dist.config.tree import Tree, escaped, find, leaves, place, read_yaml, remove
from anemoi_dist.errors import ConfigError

#: Nodes that are replaced, not merged, when the given key of theirs changes: AdEMAMix's alpha must not reach Adam.
CHOICE_NODES = {
    "task": "kind",
    "model": "_target_",
    "training.optimizer": "_target_",
    "training.scheduler": "_target_",
    "engine": "kind",
}
#: Sections and groups that only a configuration of anemoi-training has.
_FOREIGN = ("hardware", "system", "dataloader", "datamodule", "diagnostics", "graph", "config_validation")


@dataclass(frozen=True)
class Composed:
    """A composed configuration.

    Parameters
    ----------
    config : Config
        Typed and checked; ``run.id`` is set.
    provenance : dict[str, str]
        Dotted leaf -> the file, ``command line``, ``default (...)`` or ``derived``.
    messages : list[str]
        Notes for the user: translated layouts, ignored sections.
    choices : dict[str, str]
        Group -> option.
    """

    config: Config
    provenance: dict[str, str]
    messages: list[str]
    choices: dict[str, str]

    def container(self) -> Tree:
        """Return the configuration as plain dictionaries."""
        return dataclasses.asdict(self.config)


def compose(overrides: Sequence[str], *, config_file: Path | None = None, config_dir: Path | None = None) -> Composed:
    """Compose a configuration: defaults < groups < ``task.config`` < profile < ``config_file`` < command line.

    Parameters
    ----------
    overrides : Sequence[str]
        ``group=option``, ``key=value``, ``+key=value``, ``++key=value``, ``~key``, in Hydra's grammar.
    config_file : Path, optional
        A YAML file with a part of the configuration, or one of anemoi-training, whose ``training`` is translated.
    config_dir : Path, optional
        A directory with further group files: ``data=mine`` finds ``<config_dir>/data/mine.yaml``.

    Raises
    ------
    ConfigError
        The arguments or a file are wrong; the message says how to correct them.
    """
    groups = available_groups(config_dir)
    parsed = parse_overrides(overrides, groups=groups)
    builder = _Builder(config_dir)
    builder.choose(parsed.choices)
    over = {} if config_file is None else builder.read_overlay(config_file, chosen=parsed.choices, groups=groups)
    # A profile describes a cluster, so the user's file and keys override it although they name it.
    profile = builder.read_profile(over, parsed.edits)
    builder.task(_given(profile, over, parsed.edits), chosen=parsed.choices, is_frozen=find(over, "task.settings")[1])
    builder.merge(*profile)
    if config_file is not None:
        builder.overlay(over, config_file)
    builder.edit(parsed.edits)
    return builder.finish()


class _Builder:
    """The configuration under construction; the methods lay its layers, in their order."""

    def __init__(self, config_dir: Path | None) -> None:
        self.config_dir = config_dir
        self.container: Tree = {}
        self.choices: dict[str, str] = {}
        self.messages: list[str] = []
        self.provenance = Provenance()
        self._overrides: list[str] = []
        self._settings: Tree = {}

    def choose(self, chosen: dict[str, str]) -> None:
        """Let Hydra compose the groups."""
        self.container, files, self.choices = _hydra_compose(chosen, self.config_dir)
        for file, package in files:
            content = read_yaml(file)
            content.pop("defaults", None)
            keys = [".".join(filter(None, (package, key))) for key, _ in leaves(content)]
            self.provenance.record(keys, _shown(file))
        refuse_unknown(self.container, origin="the chosen group files")

    def read_overlay(self, file: Path, *, chosen: dict[str, str], groups: dict[str, tuple[str, ...]]) -> Tree:
        """Return the user's file in our layout."""
        over, messages = _read_overlay(file, groups)
        self.messages += messages
        for node, choice in CHOICE_NODES.items():
            group = node.replace(".", "/")
            if group in chosen and find(over, f"{node}.{choice}")[0]:
                raise ConfigError(
                    group,
                    chosen[group],
                    f"has no effect: {file} says what {node} is",
                    fix=f"leave out {group}={chosen[group]}, or {node} in the file",
                )
        return over

    def read_profile(self, over: Tree, edits: Sequence[KeyEdit]) -> tuple[Tree, str]:
        """Return the keys of the cluster's profile, which a later layer may name, and its origin."""
        named = [edit.value for edit in edits if edit.key == "launcher.profile" and edit.action != "delete"]
        if not named:
            exists, value = find(over, "launcher.profile")
            named = [value if exists else find(self.container, "launcher.profile")[1]]
        if not isinstance(named[-1], str):
            return {}, ""
        content, origin = read_profile(named[-1])
        return {"launcher": content}, origin

    def task(self, given: Tree, *, chosen: dict[str, str], is_frozen: bool) -> None:
        """Lay what ``task.config`` says over the groups; a frozen configuration, given as a file, has it already."""
        composed = copy.deepcopy(self.container)
        _merge_into(composed, given)
        kind = find(composed, "task.kind")[1]
        for name in REQUEST:
            exists, value = find(given, f"task.{name}")
            if exists and kind != "anemoi" and value != getattr(TaskConfig(), name):
                raise ConfigError(f"task.{name}", value, f"has no effect with task={kind}", fix="task=anemoi")
        if kind != "anemoi" or is_frozen:
            return
        layer = anemoi_layer(given, _partly_resolved(composed), choices=chosen)
        for node in ("data", "model"):
            self.container[node] = {}
            self.provenance.forget(node)
        self._settings = layer.settings
        for key, value in layer.values.items():
            place(self.container, key, escaped(value))
            source = layer.origins.get(key)
            self.provenance.record([key], f"task.config ({source})" if source else "task.config")
        self.provenance.record(["task.settings"], "task.config")
        self.messages += layer.messages
        # Theirs, with interpolations of theirs.
        self._overrides = find(composed, "task.overrides")[1]
        self.choices |= {"data": "anemoi", "model": layer.name}

    def overlay(self, over: Tree, file: Path) -> None:
        """Lay the file over the groups; a section with all its keys, as in a frozen file, replaces theirs."""
        for name, section in schema_keys().items():
            given = over.get(name)
            if is_dataclass(section) and isinstance(given, dict) and given.keys() >= {f.name for f in fields(section)}:
                # Merged, a free-form node such as data.options would keep what the default group has in it.
                self.container[name] = {}
                self.provenance.forget(name)
        self.merge(over, str(file))

    def edit(self, edits: Sequence[KeyEdit]) -> None:
        """Apply the keys of the command line, those that replace a node first: the others refer to the new node."""
        replacing = {f"{node}.{choice}" for node, choice in CHOICE_NODES.items()}
        known = schema_keys()
        for edit in sorted(edits, key=lambda edit: edit.key not in replacing):
            _check_edit(edit, self.container, known=known)
            if edit.action == "delete":
                if find(self.container, edit.key)[0]:
                    remove(self.container, edit.key)
                self.provenance.forget(edit.key)
                continue
            # Merging replaces a list as a whole; one item of it has to be set in place.
            if _crosses_list(self.container, edit.key):
                place(self.container, edit.key, edit.value)
                self.provenance.record([edit.key], COMMAND_LINE)
                continue
            patch: Tree = {}
            place(patch, edit.key, edit.value)
            self.merge(patch, COMMAND_LINE)

    def merge(self, over: Tree, origin: str) -> None:
        """Lay keys over those that are there, and record their origin."""
        for node, choice in CHOICE_NODES.items():
            exists, new = find(over, f"{node}.{choice}")
            if not exists:
                continue
            was = find(self.container, f"{node}.{choice}")[1]
            if (choice == "_target_" and origin != COMMAND_LINE) or new != was:
                if origin == COMMAND_LINE and was is not None:
                    self.messages.append(f"{node}.{choice}={new} replaces {was} with all its settings")
                place(self.container, node, {})
                self.provenance.forget(node)
                self.choices[node.replace(".", "/")] = str(new).rpartition(".")[2]
        _merge_into(self.container, over)
        self.provenance.record([key for key, _ in leaves(over)], origin)

    def finish(self) -> Composed:
        """Resolve interpolations, convert to the typed configuration and derive the run id."""
        # Before interpolations are resolved: one that refers to a missing value would be reported in its place.
        refuse_missing(self.container)
        if self._overrides:
            place(self.container, "task.overrides", escaped(self._overrides))
        container = _resolved(self.container)
        if self._settings:
            place(container, "task.settings", self._settings)
        config = from_container(container)
        if config.launcher.profile is not None:
            config.launcher.profile = absolute_profile(config.launcher.profile)
        provenance = self.provenance.of(dataclasses.asdict(config))
        if config.run.id is None:
            config.run.id = derive_run_id(config, choices=self.choices)
            provenance["run.id"] = DERIVED
        return Composed(config, provenance, self.messages, self.choices)


def _given(profile: tuple[Tree, str], over: Tree, edits: Sequence[KeyEdit]) -> Tree:
    """Return the keys that the user has set, by whatever way."""
    given = copy.deepcopy(profile[0])
    _merge_into(given, copy.deepcopy(over))
    for edit in edits:
        if edit.action != "delete":
            place(given, edit.key, edit.value)
    return given


def _partly_resolved(container: Tree) -> Tree:
    """Return the container with interpolations resolved in what decides how a task is composed."""
    from omegaconf import OmegaConf

    config, resolved = OmegaConf.create(container), copy.deepcopy(container)
    for node in ("task", "run", "launcher", "security"):
        for key, value in leaves(find(container, node)[1], node):
            if isinstance(value, str) and "${" in value and not key.startswith("task.overrides"):
                place(resolved, key, OmegaConf.select(config, key))
    return resolved


def _check_edit(edit: KeyEdit, container: Tree, *, known: Iterable[str]) -> None:
    """Raise :class:`ConfigError` where Hydra forbids the edit: ``key=`` needs an existing key, ``+key=`` a new one."""
    exists, present = find(container, edit.key)
    if edit.action == "add" and exists:
        raise ConfigError(edit.key, edit.value, f"exists already ({present!r})", fix=f"{edit.text[1:]} changes it")
    if edit.action == "delete" and exists and edit.value is not None and edit.value != present:
        raise ConfigError(edit.key, edit.value, f"is {present!r}, so nothing was deleted", fix=f"~{edit.key}")
    needs_key = edit.action == "delete" or (edit.action == "set" and edit.key not in set(known))
    if needs_key and not exists:
        hint = f"+{edit.text} adds it" if edit.action == "set" and edit.key.startswith(FREE_FORM) else ""
        raise unknown_key(edit.key, edit.value, known=[key for key, _ in leaves(container)], hint=hint)


def _hydra_compose(
    chosen: dict[str, str], config_dir: Path | None
) -> tuple[Tree, list[tuple[Path, str]], dict[str, str]]:
    """Return the container, its files with their packages in the order of merging, and the chosen options."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # Hydra wants a plus before a group that is not in the defaults list.
    in_defaults = {str(group).removeprefix("override /") for group in _default_groups()}
    overrides = [f"{'' if group in in_defaults else '+'}{group}={_quoted(option)}" for group, option in chosen.items()]
    roots = [CONFIGS_DIR]
    if config_dir is not None:
        roots.append(config_dir.absolute())
        overrides.append(f"hydra.searchpath=[{_quoted(f'file://{config_dir.absolute()}')}]")
    try:
        with initialize_config_dir(str(CONFIGS_DIR.absolute()), version_base="1.3"):
            composed = hydra_compose("config", overrides, return_hydra_config=True)
            loader = GlobalHydra.instance().config_loader()
            defaults = loader.compute_defaults_list("config", overrides, RunMode.RUN).defaults
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        shown = config_dir if config_dir is not None else CONFIGS_DIR
        raise ConfigError("configuration groups", str(shown), " ".join(str(error).split())) from error
    choices = {str(group): str(option) for group, option in composed.hydra.runtime.choices.items()}
    container = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(container, dict)
    container.pop("hydra")
    files = []
    for default in defaults:
        found = [root / f"{default.config_path}.yaml" for root in roots]
        # The user's directory may hold a group of ours, but never the same option; see available_groups.
        files += [(file, default.package or "") for file in found[::-1] if file.is_file()][:1]
    return container, files, {key: value for key, value in choices.items() if not key.startswith("hydra/")}  # type: ignore[return-value]


def _default_groups() -> list[str]:
    return [
        name
        for entry in read_yaml(CONFIGS_DIR / "config.yaml")["defaults"]
        if isinstance(entry, dict)
        for name in entry
    ]


def _quoted(text: str) -> str:
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return f"'{escaped}'"


def _shown(file: Path) -> str:
    return f"configs/{file.relative_to(CONFIGS_DIR).as_posix()}" if file.is_relative_to(CONFIGS_DIR) else str(file)


def _read_overlay(file: Path, groups: dict[str, tuple[str, ...]]) -> tuple[Tree, list[str]]:
    """Return a user's file in this product's layout, and notes on its translation."""
    over, messages = read_yaml(file), []
    chosen = {
        str(name).removeprefix("override ").strip("/")
        for item in over.get("defaults") or []
        if isinstance(item, dict)
        for name in item
    }
    if any(name in over or name in chosen for name in _FOREIGN):
        rule = "is a configuration of anemoi-training: it is trained whole, with its own data and model"
        raise ConfigError("--config", str(file), rule, fix=f"task=anemoi task.config={file}")
    if "defaults" in over:
        raise ConfigError(
            "defaults",
            over["defaults"],
            f"has no effect in {file}",
            fix="choose groups as engine=zero1 on the command line",
        )
    if "optimizer" in over:
        if find(over, "training.optimizer")[0]:
            raise ConfigError("optimizer", over["optimizer"], f"is in {file} twice", fix="keep training.optimizer")
        place(over, "training.optimizer", over.pop("optimizer"))
        messages.append("optimizer became training.optimizer")
    for name, value in over.items():
        if name in groups and isinstance(value, str):
            fix = f"{name}={value} on the command line"
            raise ConfigError(
                name, value, f"is a group's option, not its settings (in {file})", fix=fix, valid=groups[name]
            )
    if isinstance(over.get("training"), dict):
        from anemoi_dist.config.anemoi.layouts import translate_training

        over["training"], translated = translate_training(over["training"])
        messages += translated
    refuse_unknown(over, origin=str(file))
    return over, messages


def _merge_into(base: Tree, over: Tree) -> None:
    for name, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(name), dict):
            _merge_into(base[name], value)
        else:
            base[name] = value


def _crosses_list(container: Tree, key: str) -> bool:
    parents = key.split(".")[:-1]
    return any(isinstance(find(container, ".".join(parents[: end + 1]))[1], list) for end in range(len(parents)))


def _resolved(container: Tree) -> Tree:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        resolved = OmegaConf.to_container(OmegaConf.create(container), resolve=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "configuration")
        rule = " ".join(str(error).splitlines()[0].split())
        raise ConfigError(key, find(container, key)[1], f"cannot be resolved: {rule}") from error
    assert isinstance(resolved, dict)
    return resolved  # type: ignore[return-value]
