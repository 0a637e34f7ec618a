"""Preparation of a run directory: the configuration is frozen in it, or checked against the frozen one. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from anemoi_dist.config.identity import HARMLESS, Change, changes_table, config_changes
from anemoi_dist.config.parse import to_yaml
from anemoi_dist.config.schema import GUARDED, Config
from anemoi_dist.config.tree import Tree, escaped, is_below, leaves, read_yaml
from anemoi_dist.errors import ConfigError, PreflightError
from anemoi_dist.run.directory import RunDirectory, write_atomically
from anemoi_dist.run.lock import Hold, hold_launch


def prepare_run(config: Config) -> RunDirectory:
    """Prepare the run as :func:`claim_run` does, and release it again."""
    run, hold = claim_run(config)
    hold.release()
    return run


def claim_run(config: Config) -> tuple[RunDirectory, Hold]:
    """Own the run, create its directory and freeze the configuration in it, or check it against the one frozen there.

    Differences from the frozen configuration are left in ``run.json`` under ``changes``; the next attempt shows and
    records them. The run is owned before anything is written, so that of two simultaneous starts with different
    configurations the frozen one is that of the start that trains.

    Raises
    ------
    ConfigError
        The run has trained or saved with another model, other data or another seed, and ``run.allow_changed`` does not
        name the difference.
    PreflightError
        The directory cannot be written, or the run has an owner.
    """
    assert config.run.id is not None
    run = RunDirectory.locate(config.run.root, config.run.id)
    try:
        if run.config_file.exists():  # before anything is created: a refused start leaves no trace
            _compare(run, config)
        run.create()
        # From here on the frozen configuration can only be changed by this process.
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
        if (state.changes or []) != changes:
            state.changes = changes


def _compare(run: RunDirectory, config: Config) -> list[Change]:
    """Return the differences from the frozen configuration; refuse those that the run's checkpoints do not allow."""
    frozen = _read_frozen(run)
    changes = config_changes(frozen, escaped(dataclasses.asdict(config)))
    if _has_begun(run, frozen, config):
        _refuse_breaking(changes, config)
    return changes


def _has_begun(run: RunDirectory, frozen: Tree, config: Config) -> bool:
    """Whether the run has saved or trained anything; with an object store, which is not asked, the answer is yes."""
    urls = (config.checkpoint.url, dict(leaves(frozen)).get("checkpoint.url"))
    if any(url is not None for url in urls) or any(run.checkpoints_dir.glob("step-*")):
        return True
    try:
        with run.events_file.open("rb") as lines:
            return any(line.startswith(b'{"event":"step"') for line in lines)
    except FileNotFoundError:
        return False


def _read_frozen(run: RunDirectory) -> Tree:
    try:
        return read_yaml(run.config_file)
    except ConfigError as error:
        rule = f"the configuration frozen in {run.config_file} cannot be read: {error.rule}"
        raise ConfigError("run.id", run.run_id, rule, fix="take another run.id, or repair that file") from error


def _refuse_breaking(changes: Sequence[Change], config: Config) -> None:
    for name, node in GUARDED.items():
        broken = [change for change in changes if is_below(change.key, (node,)) and not is_below(change.key, HARMLESS)]
        if broken and name not in config.run.allow_changed:
            allowed = ",".join([*config.run.allow_changed, name])
            raise ConfigError(
                broken[0].key,
                broken[0].now,
                f"differs from what run {config.run.id} was started with; its checkpoints would not fit or not mean "
                f"the same:\n{changes_table(broken)}\n ",
                fix=f"take another run.id, or run.allow_changed=[{allowed}] if it is meant",
            )
