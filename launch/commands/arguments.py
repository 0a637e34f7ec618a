"""The configuration and the run that a command line names."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anemoi_dist.errors import ConfigError, print_message
from anemoi_dist.run.directory import RunDirectory

if TYPE_CHECKING:
    from anemoi_dist.config.compose import Composed

#: Of more runs than this an error names only those that are near to what was typed.
_MOST_NAMES = 20


def compose_options(options: argparse.Namespace) -> Composed:
    """Compose what the user typed; see :func:`compose_arguments`."""
    return compose_arguments(options.overrides, config_file=options.config, config_dir=options.config_dir)


def compose_arguments(
    overrides: Sequence[str], *, config_file: Path | None = None, config_dir: Path | None = None
) -> Composed:
    """Compose a configuration, and print how what was typed is understood; as :func:`compose` otherwise."""
    # Hydra and OmegaConf would slow down the commands that only name a run.
    from anemoi_dist.config.compose import compose

    composed = compose(overrides, config_file=config_file, config_dir=config_dir)
    for message in composed.messages:
        print_message(f"note: {message}")
    if (name := composed.config.checkpoint.init_from) is not None:
        from anemoi_dist.checkpoint.initial import find_initial

        find_initial(name, root=composed.config.run.root)  # before ranks start, or a job waits in a queue
    return composed


def name_run(name: str, root: str, *, content: str = "config.yaml") -> RunDirectory:
    """Return the directory of the run that a user means: an id below ``root``, or a path. It need not exist.

    Parameters
    ----------
    name : str
        What was typed: a path if it holds a slash or is a directory with ``content`` in it.
    root : str
        Directory of the runs.
    content : str, optional
        What a run has that this command needs.
    """
    # A bare name may be a directory here too, as completed by the shell; an id never holds a slash.
    is_path = "/" in name or Path(name, content).exists()
    return RunDirectory(Path(name).absolute()) if is_path else RunDirectory.locate(root, name)


def locate_run(name: str, root: str, *, content: str = "config.yaml") -> RunDirectory:
    """Return the existing run that a user means; see :func:`name_run`.

    Raises
    ------
    ConfigError
        There is no such run.
    """
    run = name_run(name, root, content=content)
    if not (run.path / content).exists():
        # Near names help against typing errors, a list of hundreds does not.
        known = sorted(path.parent.name for path in run.path.parent.glob(f"*/{content}"))
        if len(known) > _MOST_NAMES:
            known = difflib.get_close_matches(run.run_id, known, n=_MOST_NAMES)
        fix = "" if known else "--root DIR, where run.root of the run is, or the path of the run's directory"
        raise ConfigError("RUN", name, f"is not a run ({run.path / content} is missing)", valid=known, fix=fix)
    return run
