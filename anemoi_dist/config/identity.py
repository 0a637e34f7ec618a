"""Identity of a run: its derived name, and the differences between two of its configurations. No torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anemoi_dist.config.tree import Tree, is_below, leaves
from anemoi_dist.errors import ConfigError

if TYPE_CHECKING:  # OmegaConf, which the schema imports, would slow down every command about a run
    from anemoi_dist.config.schema import Config

#: Keys and nodes that do not change what a run computes: the same work elsewhere or with other logs is the same run.
_NOT_IDENTITY = (
    "run.root",
    "run.id",
    "run.allow_changed",
    "checkpoint.strict",
    "launcher",
    "watchdog",
    "telemetry",
    # The way to task.settings, which count; and what follows from these, which counts by its own keys.
    "task.config",
    "task.name",
    "task.overrides",
    "task.translated",
    "task.inference",
)


#: Keys that may change between two attempts of a run without ``run.allow_changed``.
HARMLESS = (
    "data.num_workers",
    "data.prefetch_factor",
    "task.config",
    "task.name",
    "task.overrides",
    "task.translated",
    "task.inference",
    # Ranks, and how they share a model: checkpoints do not depend on them.
    "task.settings.system.hardware.num_nodes",
    "task.settings.system.hardware.num_gpus_per_node",
    "task.settings.system.hardware.num_gpus_per_model",
    "task.settings.dataloader.read_group_size",
    "task.settings.model.keep_batch_sharded",
    "task.settings.training.strategy",
)


def derive_run_id(config: Config, *, choices: dict[str, str]) -> str:
    """Return a readable name that is a function of what the run computes: the same command continues the same run.

    Parameters
    ----------
    config : Config
        The configuration; its place and its logs do not count.
    choices : dict[str, str]
        Group -> option, for the readable part of the name.
    """
    added = _added_defaults()
    identity = {
        key: value
        for key, value in leaves(dataclasses.asdict(config))
        # A key that came later and has its default says nothing: a run of an older version keeps its name.
        if not is_below(key, _NOT_IDENTITY) and not (key in added and added[key] == value)
    }
    # Eight hexadecimal digits: names stay readable, and 10 000 runs of one configuration group collide with 1 %.
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:8]
    parts = [re.sub(r"[^A-Za-z0-9_.]+", "-", choices[group]).strip("-._")[:16] for group in ("data", "model", "engine")]
    return "-".join([*filter(None, parts), digest])


@dataclass(frozen=True)
class Change:
    """One key whose value in a new configuration differs from the frozen one; an absent value is None."""

    key: str = ""
    was: Any = None
    now: Any = None


def config_changes(was: Tree, now: Tree) -> list[Change]:
    """Return the keys whose values differ between two configurations; the location of the run does not count."""
    old, new = ({**_added_defaults(), **dict(leaves(tree))} for tree in (was, now))
    # By repr: 1, 1.0, True and "1" are different values in a configuration.
    keys = [key for key in dict.fromkeys([*old, *new]) if key not in ("run.root", "run.allow_changed")]
    return [Change(key, old.get(key), new.get(key)) for key in keys if repr(old.get(key)) != repr(new.get(key))]


def changes_table(changes: Sequence[Change]) -> str:
    """Return the changes as an aligned table with the columns key, was, is."""
    rows = [("key", "was", "is"), *((change.key, str(change.was), str(change.now)) for change in changes)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"  {key:<{widths[0]}}  {was:<{widths[1]}}  {now}" for key, was, now in rows)


def _added_defaults() -> Tree:
    from anemoi_dist.config.schema import added_defaults  # here, for OmegaConf; see above

    return added_defaults()


RUN_ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_run_id(run_id: str) -> str:
    """Return ``run_id``, or raise :class:`ConfigError` if some file system could not have a directory of that name."""
    if not RUN_ID_PATTERN.fullmatch(run_id):
        raise ConfigError(
            "run.id",
            run_id,
            f"must match {RUN_ID_PATTERN.pattern} (it names a directory)",
            fix="use letters, digits, '.', '_' and '-', at most 64, starting with a letter or digit",
        )
    return run_id
