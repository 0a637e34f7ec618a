"""Arguments of a command: group choices (``engine=zero1``) and single keys (``training.lr.rate=1e-3``).

The grammar is Hydra's. Hydra applies the choices; keys are applied by :mod:`~anemoi_dist.config.compose`, because a
file given with ``--config`` lies between the two. Hydra is imported only to parse: ``--help`` needs the groups alone.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anemoi_dist.configs
from anemoi_dist.errors import ConfigError

#: The package's own groups.
CONFIGS_DIR = Path(anemoi_dist.configs.__file__).parent
#: Argument after which, or in whose list, overrides of anemoi-training's configuration stand.
THEIRS = "task.overrides"


@dataclass(frozen=True)
class KeyEdit:
    """One key set or deleted on the command line.

    Parameters
    ----------
    action : str
        ``set`` (the key must exist), ``add`` (it must not), ``force`` (either), ``delete``.
    key : str
        Dotted key.
    value : Any
        New value; for ``delete`` the value that the key must have, or None for any.
    text : str
        As typed, for messages.
    """

    action: str
    key: str
    value: Any
    text: str


@dataclass(frozen=True)
class ParsedOverrides:
    """Command-line arguments, sorted into group choices and edits of keys."""

    choices: dict[str, str] = field(default_factory=dict)
    edits: list[KeyEdit] = field(default_factory=list)


def available_groups(config_dir: Path | None = None) -> dict[str, tuple[str, ...]]:
    """Return each configuration group with its options, the user's among them.

    Raises
    ------
    ConfigError
        ``config_dir`` is not a directory, or one of its files has the name of a built-in option.
    """
    builtin = _groups_below(CONFIGS_DIR)
    if config_dir is None:
        return _sorted(builtin)
    if not config_dir.is_dir():
        raise ConfigError(
            "--config-dir", str(config_dir), "is not a directory", fix="give the directory of your groups"
        )
    for group, options in _groups_below(config_dir).items():
        # Hydra would silently take the built-in one.
        if hidden := options & builtin.get(group, set()):
            name = f"{group}/{min(hidden)}.yaml"
            raise ConfigError(
                "--config-dir", str(config_dir / name), "has the name of a built-in option", fix="rename it"
            )
        builtin[group] = builtin.get(group, set()) | options
    return _sorted(builtin)


def _groups_below(root: Path) -> dict[str, set[str]]:
    groups: dict[str, set[str]] = {}
    for file in root.rglob("*.yaml"):
        if file.parent != root:
            groups.setdefault(file.parent.relative_to(root).as_posix(), set()).add(file.stem)
    return groups


def _sorted(groups: dict[str, set[str]]) -> dict[str, tuple[str, ...]]:
    return {group: tuple(sorted(options)) for group, options in sorted(groups.items())}


def parse_overrides(overrides: Sequence[str], *, groups: dict[str, tuple[str, ...]]) -> ParsedOverrides:
    """Sort arguments into group choices and key edits.

    Raises
    ------
    ConfigError
        An argument is not in Hydra's grammar, is a sweep, or names an option that its group does not have.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    actions = {
        OverrideType.CHANGE: "set",
        OverrideType.ADD: "add",
        OverrideType.FORCE_ADD: "force",
        OverrideType.DEL: "delete",
    }
    parsed = ParsedOverrides()
    overrides, theirs = _split_theirs(overrides)
    if theirs:
        parsed.edits.append(KeyEdit("set", THEIRS, theirs, f"{THEIRS}=[{','.join(theirs)}]"))
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise _not_an_override(text, str(error)) from error
        key = override.key_or_group
        if override.is_sweep_override():
            raise ConfigError(
                key,
                text.partition("=")[2],
                "is a sweep: one run takes one value",
                fix=f"{key}=[a,b] is a list; anemoi-dist submit --multirun takes a sweep",
            )
        if not key or override.package is not None:
            raise _not_an_override(text, "no key" if not key else "packages (@) cannot be moved")
        edit = KeyEdit(actions[override.type], key, override.value(), text)
        if _is_choice(edit, groups):
            _choose(edit, groups, parsed.choices)
        else:
            parsed.edits.append(edit)
    return parsed


def _split_theirs(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return our arguments and anemoi-training's: in ``task.overrides=[a=1,b=2]``, or after ``task.overrides``."""
    start = list(overrides).index(THEIRS) if THEIRS in overrides else len(overrides)
    ours, theirs = [], []
    for text in overrides[:start]:
        if text.startswith(f"{THEIRS}=[") and text.endswith("]"):
            # In Hydra's grammar each would need quotes within those of the shell.
            theirs += _split_list(text[len(THEIRS) + 2 : -1])
        else:
            ours.append(text)
    return ours, [*theirs, *overrides[start + 1 :]]


def _split_list(text: str) -> list[str]:
    """Split at commas outside of brackets and quotes; quotes around a whole item are dropped."""
    items, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        depth += (letter in "[{(") - (letter in "]})") if not quote else 0
        if letter == "," and not depth and not quote:
            items.append("")
        else:
            items[-1] += letter
    items = [item.strip() for item in items]
    return [item[1:-1] if re.fullmatch(r"'[^']*'|\"[^\"]*\"", item) else item for item in items if item]


def _not_an_override(text: str, reason: str) -> ConfigError:
    fix = "write key=value (no spaces around '='), group=option, +key=value or ~key; quote special characters"
    if text.endswith((".yaml", ".yml")):
        fix = f"--config {text}"
    return ConfigError("argument", text, f"is not key=value: {reason.strip().splitlines()[0]}", fix=fix)


def _is_choice(edit: KeyEdit, groups: dict[str, tuple[str, ...]]) -> bool:
    if edit.key in groups:
        return not isinstance(edit.value, dict)
    slashed = edit.key.replace(".", "/")
    if slashed in groups and isinstance(edit.value, str):
        raise ConfigError(
            edit.key, edit.value, "names a group with dots", fix=f"{slashed}={edit.value}", valid=groups[slashed]
        )
    if "/" in edit.key:
        near = difflib.get_close_matches(edit.key, groups, n=2)
        fix = f"did you mean {' or '.join(f'{group}=' for group in near)}?" if near else ""
        raise ConfigError(edit.key, edit.value, "is not a group", fix=fix or f"the groups are {', '.join(groups)}")
    return False


def _choose(edit: KeyEdit, groups: dict[str, tuple[str, ...]], choices: dict[str, str]) -> None:
    group, options = edit.key, groups[edit.key]
    if edit.action == "delete" or edit.value is None:
        raise ConfigError(group, edit.value, "a group needs an option", valid=options)
    option = str(edit.value)
    if option not in options:
        raise ConfigError(group, option, "is not an option of this group", valid=options)
    if group in choices:
        raise ConfigError(group, option, f"the group was already set to {choices[group]!r}", fix="give one of the two")
    choices[group] = option
