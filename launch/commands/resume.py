"""``anemoi-dist resume``: resume a run, optionally with changed settings. No torch."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import yaml

from anemoi_dist.config.overrides import available_groups, parse_overrides
from anemoi_dist.config.tree import find, read_yaml, remove
from anemoi_dist.errors import ConfigError, ExitCode, PreflightError
from anemoi_dist.run.attempt import is_finished
from anemoi_dist.run.directory import RunDirectory

from ..status.files import gather
from ..status.inspection import inspect_run
from . import submit, train
from .arguments import compose_arguments, locate_run


def run(options: argparse.Namespace) -> int:
    """Train or submit again with the frozen configuration, which overrides the defaults as a file of the user."""
    run = locate_run(options.run, options.root)
    status = inspect_run(run)
    if status.is_active:
        raise PreflightError(f"run {status.run_id} is {status.described}; it needs no resume")
    if gather(run).is_command:
        raise ConfigError(
            "RUN",
            options.run,
            "is a command, and has no settings to resume with",
            fix=f"anemoi-dist submit launcher=slurm run.id={run.run_id} ... -- COMMAND again",
        )
    # A copy of the settings under another id would begin at step 0, without the checkpoints of this run.
    for text in options.overrides:
        if _names(text, "run", "run.id", "run.root"):
            raise ConfigError("resume", text, "cannot name another run", fix="anemoi-dist train run.id=... for that")
    given = any(_names(text, "training.max_steps") for text in options.overrides)
    if status.state == "finished" and not given and _is_all_done(run):
        print(
            f"run {status.run_id} is {status.described}; to train on: "
            f"anemoi-dist resume {status.run_id} training.max_steps=N"
        )
        return ExitCode.FINISHED
    if not options.dry_run:
        print("composing the configuration", flush=True)
    with tempfile.TemporaryDirectory(prefix="anemoi-dist-") as folder:
        file, kind = _frozen(run, options.overrides, Path(folder))
        # Composed as the first time, with the frozen configuration over the defaults.
        overrides = submit.with_queue(options.overrides) if kind == "slurm" else options.overrides
        config = compose_arguments(overrides, config_file=file).config
    if kind == "slurm":
        return submit.submit_all([submit.Request(config)], dry_run=options.dry_run)
    return train.train(config, dry_run=options.dry_run)


def _is_all_done(run: RunDirectory) -> bool:
    """Whether the frozen configuration asks for no more steps than were done."""
    asked = find(read_yaml(run.config_file), "training.max_steps")[1]
    return isinstance(asked, int) and is_finished(run, max_steps=asked)


def _names(override: str, *keys: str) -> bool:
    return override.lstrip("+~").partition("=")[0] in keys


def _frozen(run: RunDirectory, overrides: list[str], folder: Path) -> tuple[Path, str]:
    """Return the frozen configuration as a file, less the groups that the user chooses now, and ``launcher.kind``.

    A file overrides the groups: with its ``engine`` in it, ``engine=zero1`` would change nothing.
    """
    content = read_yaml(run.config_file)
    chosen = parse_overrides(overrides, groups=available_groups()).choices
    for group in chosen:
        if find(content, group.replace("/", "."))[0]:
            remove(content, group.replace("/", "."))
    # What is not given is as it was: a run of SLURM goes back into the queue, whoever resumes it and where.
    kind = chosen.get("launcher") or find(content, "launcher.kind")[1] or "local"
    # Where it lies now: it may have been moved, and run.root may be relative to where it was started.
    content["run"] = {**content.get("run", {}), "id": run.run_id, "root": str(run.path.parent)}
    file = folder / run.config_file.name
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file, str(kind)
