"""Rules of the ``launcher`` group: time limits, and names and values that go into a batch script. No torch."""

from __future__ import annotations

import re
from typing import Any

from anemoi_dist.config.schema import LauncherConfig, SlurmConfig
from anemoi_dist.errors import ConfigError

#: ``#SBATCH`` options that follow from other keys, with the key to set instead; empty if no key sets them.
TAKEN_OPTIONS = {
    "nodes": "launcher.nodes",
    "ntasks": "launcher.ranks",
    "ntasks-per-node": "launcher.ranks",
    "gpus-per-node": "launcher.gpus_per_node",
    "time": "launcher.time",
    "partition": "launcher.slurm.partition",
    "account": "launcher.slurm.account",
    "qos": "launcher.slurm.qos",
    "constraint": "launcher.slurm.constraint",
    "signal": "launcher.slurm.signal_s",
    "job-name": "run.id",
    "dependency": "--after",
    "requeue": "launcher.max_requeues",
    "no-requeue": "launcher.max_requeues",
    "array": "--multirun",
    "open-mode": "",
    "output": "",
    "error": "",
    "kill-on-invalid-dep": "",
    "parsable": "",
    "test-only": "",
    "wait": "",
    "wrap": "",
}
#: Seconds in which a small run can be saved; shorter values are never suggested.
_SHORTEST_SIGNAL_S = 30
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>\d\d):(?P<seconds>\d\d)")
_DAYS = re.compile(r"(?P<days>\d+)-(?P<hours>\d+)(?::(?P<minutes>\d\d))?")
_MODULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/@=~-]*")
_OPTION = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_INTERFACE = re.compile(r"[=^]{0,2}[A-Za-z0-9_.:-]+(,[A-Za-z0-9_.:-]+)*")


def parse_time_limit(text: str) -> int:
    """Return the seconds of ``HH:MM:SS``, ``D-HH``, ``D-HH:MM`` or ``D-HH:MM:SS``.

    SLURM's two shorter forms are refused: it would read ``90``, or the integer that YAML makes of ``24:00:00``, as
    minutes.

    Raises
    ------
    ConfigError
        The text has another form, or the time is zero.
    """
    match = _TIME.fullmatch(text) or _DAYS.fullmatch(text)
    if match is None:
        fix = "launcher.time=24:00:00; in a YAML file with quotes, or it is read as a number of seconds"
        if text.isdigit() and int(text) > 0:
            fix = f"{format_time_limit(int(text))} for seconds, {format_time_limit(60 * int(text))} for minutes; {fix}"
        raise ConfigError("launcher.time", text, "must be HH:MM:SS, D-HH:MM:SS, D-HH:MM or D-HH", fix=fix)
    parts = {name: int(value or 0) for name, value in match.groupdict().items()}
    minutes, seconds = parts.get("minutes", 0), parts.get("seconds", 0)
    if minutes > 59 or seconds > 59:
        raise ConfigError("launcher.time", text, "has more than 59 minutes or seconds", fix="launcher.time=01:30:00")
    total = ((parts.get("days", 0) * 24 + parts["hours"]) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ConfigError("launcher.time", text, "is no time at all", fix="null: the queue's own limit")
    return total


def format_time_limit(seconds: int) -> str:
    """Return seconds as ``HH:MM:SS``."""
    return f"{seconds // 3600:02d}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"


def _longer(limit_s: int, signal_s: int) -> str:
    """Return the fix for a time limit that leaves no time between the start of a job and its request to save."""
    fix = f"launcher.time={format_time_limit(4 * (signal_s + 60))}"
    less_s = min(signal_s, limit_s // 4 - 60)
    return f"launcher.slurm.signal_s={less_s}, or {fix}" if less_s >= _SHORTEST_SIGNAL_S else fix


def check_launcher(launcher: LauncherConfig) -> None:
    """Raise :class:`ConfigError` for the first rule that ``launcher`` breaks."""
    slurm = launcher.slurm
    if launcher.hostfile is not None and launcher.kind != "mpi":
        rule = f"has no effect with launcher.kind={launcher.kind}"
        raise ConfigError("launcher.hostfile", launcher.hostfile, rule, fix="launcher=mpi, or leave it out")
    if launcher.kind == "local":
        _refuse_without_effect(launcher)
    if launcher.time is not None:
        limit_s = parse_time_limit(launcher.time)
        if limit_s <= slurm.signal_s + 60:
            raise ConfigError(
                "launcher.time",
                launcher.time,
                f"leaves no time to train: the run is asked to save launcher.slurm.signal_s={slurm.signal_s} s before "
                "it, and SLURM may be 60 s early",
                fix=_longer(limit_s, slurm.signal_s),
            )
    for key in ("partition", "account", "qos", "constraint"):
        if (value := getattr(slurm, key)) is not None:
            check_value(f"launcher.slurm.{key}", value)
    for name, value in slurm.options.items():
        _check_option(name, value)
    for module in slurm.modules:
        if not _MODULE.fullmatch(module):
            raise ConfigError(
                "launcher.slurm.modules", module, "is not a module's name", fix="a name such as gcc/12 or openmpi"
            )
    for line in slurm.setup:
        if "\0" in line:
            raise ConfigError("launcher.slurm.setup", line, "holds a character that no script can", fix="leave it out")
    if slurm.interface is not None and not _INTERFACE.fullmatch(slurm.interface):
        fix = "a name of `ip link`, such as ib0"
        raise ConfigError("launcher.slurm.interface", slurm.interface, "is not a network interface", fix=fix)


def check_lines(setup: Any) -> None:
    """Refuse lines of ``launcher.slurm.setup`` that YAML does not read as text: ``false`` is no command then."""
    for line in setup if isinstance(setup, list) else ():
        if not isinstance(line, str):
            fix = f"in quotes: launcher.slurm.setup=['{str(line).lower()}']"
            raise ConfigError("launcher.slurm.setup", line, "is not a line of shell", fix=fix)


def _refuse_without_effect(launcher: LauncherConfig) -> None:
    if launcher.nodes != 1:
        raise ConfigError(
            "launcher.nodes", launcher.nodes, "is more than this machine", fix="launcher=slurm, launcher=mpi, or 1"
        )
    for prefix, group, defaults, keys in (
        ("", launcher, LauncherConfig(), ("profile", "time", "max_requeues", "max_retries", "ranks_by")),
        ("slurm.", launcher.slurm, SlurmConfig(), vars(launcher.slurm)),
    ):
        for key in keys:
            # Compared with the default, not with None: a frozen configuration has all keys.
            if (value := getattr(group, key)) != getattr(defaults, key):
                raise ConfigError(
                    f"launcher.{prefix}{key}", value, "has no effect with launcher=local", fix="launcher=slurm"
                )


def check_value(key: str, value: str) -> None:
    """Raise :class:`ConfigError` for a value that does not fit into one ``#SBATCH`` line."""
    if not value or any(ord(char) < 32 or ord(char) == 127 for char in value):
        raise ConfigError(key, value, "must be one line of text", fix=f"{key}=null leaves it out")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(key, value, "is not text", fix="write it in UTF-8") from error


def _check_option(name: str, value: Any) -> None:
    key = f"launcher.slurm.options.{name}"
    if not isinstance(name, str) or not _OPTION.fullmatch(name):
        fix = "the long name without dashes in front: mem, mail-type"
        raise ConfigError(key, value, "is not the name of an #SBATCH option", fix=fix)
    if name in TAKEN_OPTIONS:
        instead = TAKEN_OPTIONS[name]
        raise ConfigError(key, value, "is set by anemoi-dist", fix=f"{instead} sets it" if instead else "leave it out")
    # sbatch accepts every unique abbreviation of a long option.
    if name != "gpus" and (whole := [taken for taken in TAKEN_OPTIONS if taken.startswith(name)]):
        rule = f"sbatch takes it for {' or '.join(whole)}, which anemoi-dist sets"
        raise ConfigError(key, value, rule, fix="write the option's name out, or leave it out")
    if value is None or isinstance(value, bool):
        return
    if not isinstance(value, str | int | float):
        raise ConfigError(key, value, "must be a text, a number, true or null", fix=f"{key}='a,b' for a list")
    check_value(key, str(value))
