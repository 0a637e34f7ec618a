"""The command ``anemoi-dist``. Import-light: ``--help`` answers in a fraction of a second, torch is never imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from anemoi_dist import __version__
from anemoi_dist.errors import AnemoiDistError, ConfigError, ExitCode

from .commands import checkpoint, logs, status, stop, submit
from .commands.arguments import RUN_HELP, add_command, compose_arguments, locate_run


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
    except OSError as error:  # the disk is full, a directory is not ours
        print(f"anemoi-dist: {error}", file=sys.stderr)
        return int(ExitCode.PREFLIGHT)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _parser()
    own, words = submit.split_command(arguments)
    options, rest = parser.parse_known_args(own)
    options.words = words
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

    train = add_command(commands, "train", _train, "compose a configuration and train it on this machine", groups=True)
    train.add_argument("--dry-run", action="store_true", help="print the plan and start nothing")
    train.add_argument(
        "--strict",
        action="store_true",
        help="refuse a damaged newest checkpoint instead of going on from the one before it",
    )
    plan = add_command(commands, "plan", _plan, "show what would be started, and the memory of a rank", groups=True)
    plan.add_argument("--sweep", action="store_true", help="memory of a rank for every engine on 1 to 1024 ranks")
    plan.add_argument("--num-parameters", metavar="N", help="size of the model (1e9), instead of building it")
    plan.add_argument("--device-memory-gib", metavar="GIB", help="memory of each GPU, where it is not this machine's")
    plan.add_argument("--json", action="store_true", help="print JSON")
    add_command(
        commands, "config", _config, "print the resolved configuration and where each value came from", groups=True
    )

    submit.add_commands(commands)
    status.add_commands(commands)
    logs.add_commands(commands)
    stop.add_commands(commands)

    report = add_command(commands, "report", _report, "write a run's HTML report")
    report.add_argument("run", metavar="RUN", help=RUN_HELP)
    report.add_argument("--root", default="runs", help="directory of the runs (default: %(default)s)")

    doctor = add_command(commands, "doctor", _doctor, "look for what would end a run before it gets far", groups=True)
    doctor.add_argument("--nodes", action="store_true", help="start the ranks and let them look at each other")
    doctor.add_argument("--json", action="store_true", help="print one JSON list")

    checkpoint.add_commands(
        add_command(commands, "checkpoint", None, "list, show, verify, compare, export and import checkpoints")
    )
    return parser


def _train(options: argparse.Namespace) -> int:
    from anemoi_dist.run.directory import RunDirectory
    from anemoi_dist.run.prepare import claim_run

    from .launchers import local, mpi
    from .launchers.base import plan
    from .launchers.machine import look

    if options.strict:
        options.overrides.append("checkpoint.strict=true")
    config = compose_arguments(options).config
    if options.dry_run:
        from .commands.plan import show

        print(show(config))
        return ExitCode.FINISHED
    if config.launcher.kind == "slurm":
        raise ConfigError(
            "launcher", "slurm", "is submitted, not started here", fix="anemoi-dist submit launcher=slurm"
        )
    run = RunDirectory.locate(config.run.root, str(config.run.id))
    submit.refuse_queued(run)
    machine = look(config.launcher.kind)
    planned = plan(config, run, machine)  # refuses before the run is touched
    if planned.kind == "mpi":
        mpi.check(config, machine)
    run, hold = claim_run(config)
    try:
        if planned.kind == "mpi":
            return mpi.train(run, config, planned)
        return local.train(run, config, num_ranks=planned.ranks_per_node)
    finally:
        hold.release()


def _doctor(options: argparse.Namespace) -> int:
    from .commands.doctor import run_doctor

    return run_doctor(compose_arguments(options).config, nodes=options.nodes, as_json=options.json)


def _plan(options: argparse.Namespace) -> int:
    from .commands.plan import show

    print(
        show(
            compose_arguments(options).config,
            sweep=options.sweep,
            as_json=options.json,
            num_parameters=options.num_parameters,
            device_gib=options.device_memory_gib,
        )
    )
    return ExitCode.FINISHED


def _config(options: argparse.Namespace) -> int:
    from anemoi_dist.config.provenance import annotated_yaml

    composed = compose_arguments(options)
    print(annotated_yaml(composed.container(), composed.provenance), end="")
    return ExitCode.FINISHED


def _report(options: argparse.Namespace) -> int:
    from anemoi_dist.report.page import write_report

    print(write_report(locate_run(options.run, options.root)))
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
