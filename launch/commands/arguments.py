"""What the commands of ``anemoi-dist`` have in common: how a parser is made, how a run is named."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anemoi_dist.errors import ConfigError

if TYPE_CHECKING:
    from anemoi_dist.config.compose import Composed
    from anemoi_dist.run.directory import RunDirectory

RUN_HELP = "a run's id, or the path of its directory"
#: Of more runs than this an error names only those that are near to what was typed.
_MOST_NAMES = 20


def add_command(
    commands: Any, name: str, function: object, summary: str, *, groups: bool = False
) -> argparse.ArgumentParser:
    """Add a command; with ``groups`` it composes a configuration."""
    command = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_groups_text(name) if groups else None,
        allow_abbrev=False,
    )
    command.set_defaults(command=function)
    if groups:
        command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, in Hydra's grammar")
        command.add_argument("--config", type=Path, metavar="FILE", help="YAML laid over the groups, under key=value")
        command.add_argument("--config-dir", type=Path, metavar="DIR", help="directory with further group files")
    return command


def _groups_text(name: str) -> str:
    from anemoi_dist.config.overrides import available_groups

    groups = available_groups()
    width = max(map(len, groups))
    example = "launcher.nodes=2 launcher.gpus_per_node=4 launcher.time=24:00:00" if name == "submit" else "engine=zero1"
    lines = "\n".join(f"  {group + '=':<{width + 1}} {' | '.join(options)}" for group, options in groups.items())
    return (
        f"groups and their options:\n{lines}\n\n"
        "example:\n"
        f"  anemoi-dist {name} {example} training.max_steps=200 training.lr.rate=5e-3 run.id=first\n"
        "`anemoi-dist config` prints every key with its value."
    )


def compose_arguments(options: argparse.Namespace, overrides: Sequence[str] | None = None) -> Composed:
    """Compose what the user typed, and say what was made of it.

    Parameters
    ----------
    options : argparse.Namespace
        Of a command with groups.
    overrides : Sequence[str], optional
        Instead of those that were typed.
    """
    from anemoi_dist.config.compose import compose

    overrides = options.overrides if overrides is None else overrides
    composed = compose(overrides, config_file=options.config, config_dir=options.config_dir)
    for message in composed.messages:
        print(f"note: {message}", file=sys.stderr)
    return composed


def locate_run(name: str, root: str) -> RunDirectory:
    """Return the run that a user means: an id below ``root``, or a path.

    Raises
    ------
    ConfigError
        There is no such run.
    """
    from anemoi_dist.run.directory import RunDirectory

    is_path = "/" in name or Path(name, "config.yaml").is_file()
    run = RunDirectory(Path(name).absolute()) if is_path else RunDirectory.locate(root, name)
    if not run.config_file.is_file():
        folder = run.path.parent
        known = sorted(path.parent.name for path in folder.glob("*/config.yaml")) if folder.is_dir() else []
        if len(known) > _MOST_NAMES:
            known = difflib.get_close_matches(run.run_id, known, n=_MOST_NAMES)
        fix = "" if known else "--root DIR, where run.root of the run is, or the path of the run's directory"
        raise ConfigError("RUN", name, f"is not a run ({run.config_file} is missing)", valid=known, fix=fix)
    return run
