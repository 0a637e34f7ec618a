"""From a composed configuration to a run directory with it frozen inside, or to a refusal. No torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anemoi_dist.config.provenance import leaves, read_yaml
from anemoi_dist.config.schema import GUARDED, Config, to_yaml
from anemoi_dist.errors import ConfigError, PreflightError
from anemoi_dist.run.directory import RunDirectory, write_atomically
from anemoi_dist.run.lock import Hold, hold_launch

#: Not part of what a run computes: the same work elsewhere or with other logs is the same run.
_NOT_IDENTITY = ("run.root", "run.id", "run.allow_changed", "checkpoint.strict", "launcher", "watchdog", "telemetry")
#: May change between two attempts of one run without a word said to allow it.
_HARMLESS = ("data.num_workers", "data.prefetch_factor")


def derive_run_id(config: Config, *, choices: dict[str, str]) -> str:
    """Return a readable name that is a function of what the run computes: the same command continues the same run.

    Parameters
    ----------
    config : Config
        The configuration; where it runs and what it logs do not count.
    choices : dict[str, str]
        Group -> option, for the readable part.
    """
    identity = {key: value for key, value in leaves(dataclasses.asdict(config)) if not _is_below(key, _NOT_IDENTITY)}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:8]
    parts = [re.sub(r"[^A-Za-z0-9_.]+", "-", choices[group]).strip("-._")[:16] for group in ("data", "model", "engine")]
    return "-".join([*filter(None, parts), digest])


def _is_below(key: str, nodes: Sequence[str]) -> bool:
    return any(key == node or key.startswith(f"{node}.") for node in nodes)


@dataclass(frozen=True)
class Change:
    """One key that differs between the frozen configuration of a run and a new one; absent values are ``None``."""

    key: str
    was: Any
    now: Any


def config_changes(was: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Return what differs between two configurations, by dotted key; where the run lies does not count."""
    old, new = dict(leaves(was)), dict(leaves(now))
    keys = [key for key in dict.fromkeys([*old, *new]) if key not in ("run.root", "run.allow_changed")]
    return [Change(key, old.get(key), new.get(key)) for key in keys if repr(old.get(key)) != repr(new.get(key))]


def changes_table(changes: Sequence[Change]) -> str:
    """Return the changes as an aligned table with the columns key, was, is."""
    rows = [("key", "was", "is"), *((change.key, str(change.was), str(change.now)) for change in changes)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"  {key:<{widths[0]}}  {was:<{widths[1]}}  {now}" for key, was, now in rows)


def prepare_run(config: Config) -> RunDirectory:
    """Own the run for a moment and prepare it; see :func:`claim_run`."""
    run, hold = claim_run(config)
    hold.release()
    return run


def claim_run(config: Config) -> tuple[RunDirectory, Hold]:
    """Own the run, create its directory and freeze the configuration in it, or check it against the one frozen there.

    What differs from the frozen configuration is left in ``run.json`` under ``changes`` (key, was, is), for the one who
    starts the run to show and for the trainer to record. The run is owned first: of two starts with different
    configurations the one that runs is the one whose configuration is frozen.

    Raises
    ------
    ConfigError
        The run has trained or saved with another model, other data or another seed, and ``run.allow_changed`` does not
        name them.
    PreflightError
        The directory cannot be written, or the run has an owner.
    """
    assert config.run.id is not None
    run = RunDirectory.locate(config.run.root, config.run.id)
    try:
        if run.config_file.exists():  # what is refused leaves no trace, not even a lock file
            _compare(run, config)
        run.create()
        hold = hold_launch(run, say=lambda text: print(text, flush=True))  # noqa: T201
        try:
            _freeze(run, config)
        except BaseException:
            hold.release()
            raise
    except OSError as error:
        raise PreflightError(f"cannot prepare the run directory {run.path}: {error}") from error
    return run, hold


def _freeze(run: RunDirectory, config: Config) -> None:
    changes: list[Change] = []
    if run.config_file.exists():
        changes = _compare(run, config)
    if changes or not run.config_file.exists():
        write_atomically(run.config_file, to_yaml(config))
    with run.changing_state() as state:
        left = [{"key": change.key, "was": change.was, "is": change.now} for change in changes]
        if state.get("changes", []) != left:
            state["changes"] = left


def _compare(run: RunDirectory, config: Config) -> list[Change]:
    """Return what differs from the frozen configuration; refuse what does not fit to what the run has done."""
    frozen = _read_frozen(run)
    changes = config_changes(frozen, dataclasses.asdict(config))
    if _has_begun(run, frozen, config):
        _refuse_breaking(changes, config)
    return changes


def _has_begun(run: RunDirectory, frozen: dict[str, Any], config: Config) -> bool:
    """Whether the run has saved or trained anything, as far as can be told without asking an object store."""
    urls = (config.checkpoint.url, dict(leaves(frozen)).get("checkpoint.url"))
    if any(url is not None for url in urls) or any(run.checkpoints_dir.glob("step-*")):
        return True
    try:
        with run.events_file.open("rb") as lines:
            return any(line.startswith(b'{"event":"step"') for line in lines)
    except FileNotFoundError:
        return False


def _read_frozen(run: RunDirectory) -> dict[str, Any]:
    try:
        return read_yaml(run.config_file)
    except ConfigError as error:
        rule = f"the configuration frozen in {run.config_file} cannot be read: {error.rule}"
        raise ConfigError("run.id", run.run_id, rule, fix="take another run.id, or repair that file") from error


def _refuse_breaking(changes: Sequence[Change], config: Config) -> None:
    for name, node in GUARDED.items():
        broken = [change for change in changes if _is_below(change.key, (node,)) and change.key not in _HARMLESS]
        if broken and name not in config.run.allow_changed:
            allowed = ",".join([*config.run.allow_changed, name])
            raise ConfigError(
                broken[0].key,
                broken[0].now,
                f"differs from what run {config.run.id} was started with; its checkpoints would not fit or not mean "
                f"the same:\n{changes_table(broken)}\n ",
                fix=f"take another run.id, or run.allow_changed=[{allowed}] if it is meant",
            )
