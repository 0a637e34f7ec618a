"""The command line of ``anemoi-dist``: every command and its options. ``NAME`` is run by ``commands/NAME.py``.

Parsing imports no command, so that ``--help`` answers in a fraction of a second; each command module imports what it
needs at its top.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from anemoi_dist import __version__
from anemoi_dist.config.overrides import available_groups

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

RUN_HELP = "a run's id, or the path of its directory"
_CHECKPOINT_HELP = "RUN, RUN@STEP, or the directory of a checkpoint"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse a command line.

    In the result ``name`` is the command, ``words`` what stands after ``--`` of ``submit``, and ``first_line`` what a
    command that starts ranks prints at once.

    Parameters
    ----------
    arguments : list[str]
        Without the name of the program. Errors, ``--help`` and ``--version`` end the process, as argparse does.
    """
    parser = build_parser()
    own, words = split_command(arguments)
    options, rest = parser.parse_known_args(own)
    options.words = words
    # argparse takes positional arguments in one piece; overrides may stand on both sides of an option.
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized argument: {(unknown or rest)[0]} (see anemoi-dist {options.name} --help)")
    if rest:
        options.overrides += rest
    return options


def split_command(arguments: list[str]) -> tuple[list[str], list[str] | None]:
    """Return the arguments of ``anemoi-dist submit``, and after ``--`` those of the command; None without one."""
    if arguments[:1] != ["submit"] or "--" not in arguments:
        return arguments, None
    # Before argparse sees it, which would take options of the command for ours.
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="anemoi-dist", description="Distributed training of data-driven weather models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"anemoi-dist {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="name", required=True)
    _add_train_and_plan(commands)
    _add_submit(commands)
    _add_watching(commands)
    _add_ending(commands)
    report = _add(commands, "report", "write a run's HTML report")
    _add_run(report)
    _add_forecast(commands)
    doctor = _add(commands, "doctor", "look for what would end a run before it gets far", composes=True)
    doctor.add_argument("--nodes", action="store_true", help="start the ranks and let them check each other")
    doctor.add_argument("--json", action="store_true", help="print one JSON list")
    checkpoint = _add(commands, "checkpoint", "list, show, verify, compare, export and import checkpoints")
    _add_checkpoint_actions(checkpoint)
    return parser


def _add(commands: Commands, name: str, summary: str, *, composes: bool = False) -> argparse.ArgumentParser:
    """Add a command; one that composes a configuration takes overrides and files."""
    command = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_groups_text(name) if composes else None,
        allow_abbrev=False,  # an abbreviation that works today is ambiguous as soon as there is another option
    )
    if composes:
        _add_overrides(command)
        command.add_argument("--config", type=Path, metavar="FILE", help="YAML laid over the groups, under key=value")
        command.add_argument("--config-dir", type=Path, metavar="DIR", help="directory with further group files")
    return command


def _groups_text(name: str) -> str:
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


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, in Hydra's grammar")


def _add_root(command: argparse.ArgumentParser) -> None:
    command.add_argument("--root", default="runs", help="directory of the runs (default: %(default)s)")


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help=RUN_HELP)
    _add_root(command)


def _add_train_and_plan(commands: Commands) -> None:
    train = _add(commands, "train", "compose a configuration and train it on this machine", composes=True)
    train.add_argument("--dry-run", action="store_true", help="print the plan and start nothing")
    train.add_argument(
        "--strict",
        action="store_true",
        help="refuse a damaged newest checkpoint instead of continuing from the one before it",
    )
    train.set_defaults(first_line="composing the configuration")
    plan = _add(commands, "plan", "show what would be started, and the memory of a rank", composes=True)
    plan.add_argument("--sweep", action="store_true", help="memory of a rank for every engine on 1 to 1024 ranks")
    plan.add_argument("--num-parameters", metavar="N", help="size of the model (1e9), instead of building it")
    plan.add_argument("--device-memory-gib", metavar="GIB", help="memory of each GPU, where it is not this machine's")
    plan.add_argument("--json", action="store_true", help="print JSON")
    _add(commands, "config", "print the resolved configuration and where each value came from", composes=True)


def _add_submit(commands: Commands) -> None:
    submit = _add(commands, "submit", "put a run into SLURM's queue; after --, any other command", composes=True)
    submit.add_argument("--dry-run", action="store_true", help="print the batch script and submit nothing")
    submit.add_argument("--multirun", action="store_true", help="one run for each combination: key=a,b key=range(1,4)")
    submit.add_argument("--after", metavar="RUN", help="start when that run is finished, and not at all if it fails")
    submit.add_argument("--after-any", metavar="RUN", help="start when that run has ended, however")
    submit.add_argument("--no-check", action="store_true", help="submit without having built the model here first")
    submit.add_argument("--srun", action="store_true", help="start the command after -- by srun, one task a rank")


def _add_watching(commands: Commands) -> None:
    runs = _add(commands, "runs", "list the runs: state, progress, last sign of life")
    _add_root(runs)
    runs.add_argument("--state", action="append", metavar="STATE", help="these alone; may be given several times")
    runs.add_argument(
        "--sort", choices=("started", "loss"), default="started", help="what is last: the newest, or the least"
    )
    runs.add_argument("--json", action="store_true", help="print JSON")
    status = _add(commands, "status", "say what a run is doing, and why")
    _add_run(status)
    status.add_argument("--json", action="store_true", help="print JSON; with --follow one object a line")
    status.add_argument("--follow", action="store_true", help="print a line when something changes, until the run ends")
    logs = _add(commands, "logs", "print what a rank has printed")
    _add_run(logs)
    logs.add_argument("--rank", type=int, help="default: 0")
    logs.add_argument("--attempt", type=int, help="counted from 1 (default: the newest)")
    logs.add_argument("--follow", action="store_true", help="keep printing, also what later attempts print")


def _add_forecast(commands: Commands) -> None:
    forecast = _add(commands, "forecast", "forecast with a run's model, into a netCDF file")
    _add_run(forecast)
    forecast.add_argument("--start", required=True, metavar="DATE", help="valid time of the last input state, UTC")
    forecast.add_argument("--steps", required=True, type=int, metavar="N", help="forecast steps")
    forecast.add_argument("-o", "--output", required=True, type=Path, metavar="FILE.nc", help="what to write")
    forecast.add_argument("--checkpoint", type=int, metavar="STEP", help="default: the newest that is whole")
    forecast.add_argument("--force", action="store_true", help="replace an existing file")


def _add_ending(commands: Commands) -> None:
    _add_run(_add(commands, "stop", "ask a run to save and stop"))
    _add_run(_add(commands, "cancel", "end a run now, whether it has saved or not"))
    remove = _add(commands, "remove", "delete a run and everything that it has saved")
    _add_run(remove)
    remove.add_argument("--yes", action="store_true", help="do not ask")
    resume = _add(commands, "resume", "resume a run, optionally with changed settings")
    _add_run(resume)
    resume.add_argument("--dry-run", action="store_true", help="print what would be started, and start nothing")
    _add_overrides(resume)
    resume.set_defaults(first_line="inspecting the run")


def _add_checkpoint_actions(checkpoint: argparse.ArgumentParser) -> None:
    actions = checkpoint.add_subparsers(title="commands", metavar="COMMAND", dest="action", required=True)

    listing = _add_action(actions, "list", "list the checkpoints of a run: step, size, whole or why not")
    listing.add_argument("run", metavar="RUN", help=RUN_HELP)
    listing.add_argument("--json", action="store_true", help="print JSON")

    show = _add_action(actions, "show", "print what a checkpoint holds")
    _add_checkpoint(show)
    show.add_argument("--tensors", action="store_true", help="list every tensor")
    show.add_argument("--json", action="store_true", help="print JSON")

    verify = _add_action(actions, "verify", "check every byte; exit with 4 where one is not as it was saved")
    verify.add_argument("run", metavar="RUN", help=f"{_CHECKPOINT_HELP}; of a RUN all its checkpoints")
    verify.add_argument("--step", type=int, help="check this one only")

    diff = _add_action(actions, "diff", "compare two checkpoints tensor by tensor; exit with 1 where they differ")
    diff.add_argument("a", metavar="A", help=_CHECKPOINT_HELP)
    diff.add_argument("b", metavar="B", help=_CHECKPOINT_HELP)

    export = _add_action(actions, "export", "write the weights to one file")
    _add_checkpoint(export)
    export.add_argument("out", metavar="OUT", type=Path, help="FILE.safetensors, or FILE.pt (all in memory)")
    choice = export.add_mutually_exclusive_group()
    choice.add_argument("--with-optimizer", action="store_true", help="the optimizer's states too")
    choice.add_argument("--averaged", action="store_true", help="the averaged weights (training.weight_averaging)")
    export.add_argument("--dtype", choices=("F32", "BF16", "F16"), help="type of the parameters (default: as saved)")
    export.add_argument("--force", action="store_true", help="replace an existing file")
    export.add_argument(
        "--to", choices=("weights", "inference"), default="weights", help="inference: the file of anemoi-inference"
    )
    _add_import(_add_action(actions, "import", "convert another program's checkpoint to one that train resumes from"))


def _add_action(actions: Commands, name: str, summary: str) -> argparse.ArgumentParser:
    action = _add(actions, name, summary)
    _add_root(action)
    return action


def _add_checkpoint(action: argparse.ArgumentParser) -> None:
    action.add_argument("run", metavar="RUN", help=_CHECKPOINT_HELP)
    action.add_argument("--step", type=int, help="which one (default: the newest that has a valid manifest)")


def _add_import(action: argparse.ArgumentParser) -> None:
    action.add_argument("source", metavar="SOURCE", type=Path, help="a file of torch.save, or a directory")
    action.add_argument("--run", required=True, metavar="RUN", help=f"{RUN_HELP}; created where it does not exist")
    action.add_argument(
        "--format", choices=("lightning", "torch", "deepspeed", "dcp"), help="default: what SOURCE looks like"
    )
    action.add_argument("--step", type=int, help="optimizer steps done, where SOURCE does not say it")
    action.add_argument(
        "--rename", action="append", default=[], metavar="OLD=NEW", help="a name or prefix; may be given several times"
    )
    action.add_argument("--weights-only", action="store_true", help="leave the optimizer's states")
    action.add_argument("--keep-adamw", action="store_true", help="continue with AdamW, not AdEMAMix")
    # Off by default: unpickling a file from somebody else runs whatever code is in it.
    action.add_argument("--trust-pickle", action="store_true", help="run whatever code SOURCE holds; refused otherwise")
