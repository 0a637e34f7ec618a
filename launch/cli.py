"""The command ``anemoi-dist``. Import-light: ``--help`` answers in a fraction of a second, torch is never imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anemoi_dist import __version__
from anemoi_dist.errors import AnemoiDistError, ConfigError, ExitCode

from . import checkpoint

if TYPE_CHECKING:
    from anemoi_dist.compose import Composed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (``anemoi_dist.errors.ExitCode``).

    Parameters
    ----------
    arguments : Sequence[str], optional
        Command-line arguments; those of this process where left out.
    """
    options = _parse(sys.argv[1:] if arguments is None else list(arguments))
    try:
        return int(options.command(options))
    except AnemoiDistError as error:
        print(f"anemoi-dist: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        # Output was piped into something that stopped reading, such as head: nobody is left to tell.
        sys.stderr.close()
        return int(ExitCode.FINISHED)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments in one piece; overrides may stand on both sides of an option.
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized argument: {(unknown or rest)[0]} (see anemoi-dist {options.name} --help)")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="anemoi-dist", description="Distributed training of data-driven weather models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"anemoi-dist {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="name", required=True)

    train = _add(commands, "train", _train, "compose a configuration and train it on this machine", groups=True)
    train.add_argument("--dry-run", action="store_true", help="print the plan and start nothing")
    train.add_argument(
        "--strict",
        action="store_true",
        help="refuse a damaged newest checkpoint instead of going on from the one before it",
    )
    plan = _add(commands, "plan", _plan, "show what would be started, and the memory of a rank", groups=True)
    plan.add_argument("--sweep", action="store_true", help="memory of a rank for every engine on 1 to 1024 ranks")
    plan.add_argument("--num-parameters", metavar="N", help="size of the model (1e9), instead of building it")
    plan.add_argument("--device-memory-gib", metavar="GIB", help="memory of each GPU, where it is not this machine's")
    plan.add_argument("--json", action="store_true", help="print JSON")
    _add(commands, "config", _config, "print the resolved configuration and where each value came from", groups=True)

    report = _add(commands, "report", _report, "write a run's HTML report")
    report.add_argument("run", metavar="RUN", help="a run's id, or the path of its directory")
    report.add_argument("--root", default="runs", help="directory of the runs (default: %(default)s)")

    checkpoint.add_commands(
        _add(commands, "checkpoint", None, "list, show, verify, compare, export and import checkpoints")
    )
    return parser


def _add(commands: argparse._SubParsersAction, name: str, function: object, summary: str, *, groups: bool = False):
    command = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_groups_text() if groups else None,
        allow_abbrev=False,
    )
    command.set_defaults(command=function)
    if groups:
        command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, in Hydra's grammar")
        command.add_argument("--config", type=Path, metavar="FILE", help="YAML laid over the groups, under key=value")
        command.add_argument("--config-dir", type=Path, metavar="DIR", help="directory with further group files")
    return command


def _groups_text() -> str:
    from anemoi_dist.overrides import available_groups

    groups = available_groups()
    width = max(map(len, groups))
    lines = "\n".join(f"  {group + '=':<{width + 1}} {' | '.join(options)}" for group, options in groups.items())
    return (
        f"groups and their options:\n{lines}\n\n"
        "example:\n"
        "  anemoi-dist train engine=zero1 training.max_steps=200 training.lr.rate=5e-3 run.id=first\n"
        "`anemoi-dist config` prints every key with its value."
    )


def _compose(options: argparse.Namespace) -> Composed:
    from anemoi_dist.compose import compose

    composed = compose(options.overrides, config_file=options.config, config_dir=options.config_dir)
    for message in composed.messages:
        print(f"note: {message}", file=sys.stderr)
    return composed


def _train(options: argparse.Namespace) -> int:
    from anemoi_dist.prepare import claim_run

    from . import local

    if options.strict:
        options.overrides.append("checkpoint.strict=true")
    composed = _compose(options)
    if options.dry_run:
        from .planning import show

        print(show(composed.config))
        return ExitCode.FINISHED
    ranks = local.num_ranks(composed.config)
    run, hold = claim_run(composed.config)
    try:
        return local.train(run, composed.config, num_ranks=ranks)
    finally:
        hold.release()


def _plan(options: argparse.Namespace) -> int:
    from .planning import show

    print(
        show(
            _compose(options).config,
            sweep=options.sweep,
            as_json=options.json,
            num_parameters=options.num_parameters,
            device_gib=options.device_memory_gib,
        )
    )
    return ExitCode.FINISHED


def _config(options: argparse.Namespace) -> int:
    from anemoi_dist.provenance import annotated_yaml

    composed = _compose(options)
    print(annotated_yaml(composed.container(), composed.provenance), end="")
    return ExitCode.FINISHED


def _report(options: argparse.Namespace) -> int:
    from anemoi_dist.run_directory import RunDirectory
    from anemoi_dist.telemetry.report import write_report

    is_path = "/" in options.run or Path(options.run, "config.yaml").is_file()
    run = RunDirectory(Path(options.run).absolute()) if is_path else RunDirectory.locate(options.root, options.run)
    if not run.config_file.is_file():
        root = run.path.parent
        known = sorted(path.parent.name for path in root.glob("*/config.yaml")) if root.is_dir() else []
        raise ConfigError("RUN", options.run, f"is not a run ({run.config_file} is missing)", valid=known)
    print(write_report(run))
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
