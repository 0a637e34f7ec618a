"""``anemoi-dist checkpoint``: look at what a run has saved, take it out, bring other programs' in. No torch to look."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anemoi_dist.errors import CheckpointError, ConfigError, ExitCode

if TYPE_CHECKING:
    from anemoi_dist.checkpoint.store import Folder
    from anemoi_dist.checkpoint.verified import SavedCheckpoint
    from anemoi_dist.run.directory import RunDirectory

#: What ``diff`` returns where the checkpoints differ, as diff(1) does.
DIFFERENT = 1

_RUN_HELP = "a run's id, or the path of its directory"
_ONE_HELP = "RUN, RUN@STEP, or the directory of a checkpoint"


def add_commands(command: argparse.ArgumentParser) -> None:
    """Add the commands below ``checkpoint`` to its parser."""
    actions = command.add_subparsers(title="commands", metavar="COMMAND", dest="action", required=True)

    listing = _add(actions, "list", _list, "list the checkpoints of a run: step, size, whole or why not")
    listing.add_argument("run", metavar="RUN", help=_RUN_HELP)
    listing.add_argument("--json", action="store_true", help="print JSON")

    show = _add(actions, "show", _show, "print what a checkpoint holds")
    _add_one(show)
    show.add_argument("--tensors", action="store_true", help="list every tensor")
    show.add_argument("--json", action="store_true", help="print JSON")

    verify = _add(actions, "verify", _verify, "check every byte; exit with 4 where one is not as it was saved")
    verify.add_argument("run", metavar="RUN", help=f"{_ONE_HELP}; of a RUN all its checkpoints")
    verify.add_argument("--step", type=int, help="check this one only")

    diff = _add(actions, "diff", _diff, "compare two checkpoints tensor by tensor; exit with 1 where they differ")
    diff.add_argument("a", metavar="A", help=_ONE_HELP)
    diff.add_argument("b", metavar="B", help=_ONE_HELP)

    export = _add(actions, "export", _export, "write the weights to one file")
    _add_one(export)
    export.add_argument("out", metavar="OUT", type=Path, help="FILE.safetensors, or FILE.pt (all in memory)")
    export.add_argument("--with-optimizer", action="store_true", help="the optimizer's states too")
    export.add_argument("--dtype", choices=("F32", "BF16", "F16"), help="type of the parameters (default: as saved)")
    export.add_argument("--force", action="store_true", help="replace an existing file")
    _add_import(actions)


def _add_import(actions: Any) -> None:
    command = _add(actions, "import", _import, "make another program's checkpoint one that train goes on from")
    command.add_argument("source", metavar="SOURCE", type=Path, help="a file of torch.save, or a directory")
    command.add_argument("--run", required=True, metavar="RUN", help=f"{_RUN_HELP}; created where it does not exist")
    command.add_argument(
        "--format", choices=("lightning", "torch", "deepspeed", "dcp"), help="default: what SOURCE looks like"
    )
    command.add_argument("--step", type=int, help="optimizer steps done, where SOURCE does not say it")
    command.add_argument(
        "--rename", action="append", default=[], metavar="OLD=NEW", help="a name or prefix; may be given several times"
    )
    command.add_argument("--weights-only", action="store_true", help="leave the optimizer's states")
    command.add_argument("--keep-adamw", action="store_true", help="go on with AdamW, not AdEMAMix")
    command.add_argument(
        "--trust-pickle", action="store_true", help="run whatever code SOURCE holds; refused otherwise"
    )


def _add(actions: Any, name: str, function: object, summary: str) -> argparse.ArgumentParser:
    description = summary[0].upper() + summary[1:] + "."
    action = actions.add_parser(name, help=summary, description=description, allow_abbrev=False)
    action.set_defaults(command=function)
    action.add_argument("--root", default="runs", help="directory of the runs (default: %(default)s)")
    return action


def _add_one(action: argparse.ArgumentParser) -> None:
    action.add_argument("run", metavar="RUN", help=_ONE_HELP)
    action.add_argument("--step", type=int, help="which one (default: the newest that has a valid manifest)")


def _list(options: argparse.Namespace) -> int:
    from anemoi_dist.telemetry.progress import format_bytes

    rows = [_row(folder) for folder in _folders(options.run, options.root)]
    if options.json:
        _print_json(rows)
        return ExitCode.FINISHED
    print(f"{'step':>10}  {'size':>10}  {'ranks':>5}  {'engine':<14}state")
    for row in rows:
        size = format_bytes(row["size_bytes"])
        state = "whole" if row["error"] is None else row["error"]
        print(f"{row['step']:>10}  {size:>10}  {row['world_size'] or '?':>5}  {row['engine'] or '?':<14}{state}")
    print("whole: the manifest is valid and every file has its size; `anemoi-dist checkpoint verify` reads every byte")
    return ExitCode.FINISHED


def _row(folder: Folder) -> dict[str, Any]:
    from anemoi_dist.checkpoint.verified import SavedCheckpoint

    row: dict[str, Any] = {
        "step": int(folder.name.removeprefix("step-")),
        "size_bytes": sum(f.stat().st_size for f in folder.iterdir()) if isinstance(folder, Path) else 0,
        "world_size": None,
        "engine": None,
        "error": None,
    }
    try:
        checkpoint = SavedCheckpoint(folder)
        row |= {"world_size": checkpoint.manifest.world_size, "engine": checkpoint.manifest.engine}
        row["size_bytes"] = sum(record.size_bytes for record in checkpoint.manifest.files.values())
        if checkpoint.manifest.step != row["step"]:
            raise CheckpointError(f"its manifest is of step {checkpoint.manifest.step}")
        checkpoint.check_sizes()
        checkpoint.close()
    except CheckpointError as error:
        row["error"] = str(error)
    return row


def _show(options: argparse.Namespace) -> int:
    from anemoi_dist.telemetry.progress import format_bytes

    checkpoint = _open(options.run, options.root, options.step)
    facts = _facts(checkpoint)
    if options.json:
        tensors = [
            {"fqn": t.fqn, "kind": t.kind, "shape": t.shape, "dtype": t.dtype} for t in checkpoint.manifest.tensors
        ]
        _print_json({**facts, **({"tensors": tensors} if options.tensors else {})})
        return ExitCode.FINISHED
    for name in ("path", "step", "samples_seen", "world_size", "engine", "save_id", "config_hash"):
        print(f"{name:<13} {facts[name]}")
    print(f"{'size':<13} {format_bytes(facts['size_bytes'])} in {facts['num_files']} files")
    print(f"{'tensors':<13} {facts['num_tensors']}")
    for kind, held in facts["kinds"].items():
        print(f"  {kind:<14} {held['tensors']:>6} {format_bytes(held['size_bytes']):>10}  {', '.join(held['dtypes'])}")
    print(f"{'versions':<13} {', '.join(f'{name} {number}' for name, number in facts['versions'].items())}")
    if options.tensors:
        for tensor in sorted(checkpoint.manifest.tensors, key=lambda t: (t.fqn, t.kind)):
            print(f"{tensor.fqn}  {tensor.kind}  {tuple(tensor.shape)}  {tensor.dtype}")
    return ExitCode.FINISHED


def _facts(checkpoint: SavedCheckpoint) -> dict[str, Any]:
    manifest = checkpoint.manifest
    kinds: dict[str, dict[str, Any]] = {}
    for kind, count in sorted(Counter(tensor.kind for tensor in manifest.tensors).items()):
        records = [tensor for tensor in manifest.tensors if tensor.kind == kind]
        kinds[kind] = {
            "tensors": count,
            "size_bytes": sum(record.size_bytes for record in records),
            "dtypes": sorted({record.dtype for record in records}),
        }
    return {
        "path": _path_of(checkpoint.folder),
        "step": manifest.step,
        "samples_seen": manifest.samples_seen,
        "world_size": manifest.world_size,
        "engine": manifest.engine,
        "save_id": manifest.save_id,
        "config_hash": manifest.config_hash,
        "size_bytes": sum(record.size_bytes for record in manifest.files.values()),
        "num_files": len(manifest.files),
        "num_tensors": len(manifest.tensors),
        "kinds": kinds,
        "versions": manifest.versions,
    }


def _verify(options: argparse.Namespace) -> int:
    folders = _folders(options.run, options.root, options.step)
    if not folders:
        raise CheckpointError(f"{options.run} has no checkpoint")
    damaged = [folder for folder in folders if not _verify_one(folder)]
    return ExitCode.NO_CHECKPOINT if damaged else ExitCode.FINISHED


def _verify_one(folder: Folder) -> bool:
    """Print everything that is wrong with one checkpoint; return whether nothing is."""
    from anemoi_dist.checkpoint.verified import SavedCheckpoint
    from anemoi_dist.telemetry.progress import format_bytes

    try:
        checkpoint = SavedCheckpoint(folder)
    except CheckpointError as error:
        print(f"{folder.name}: damaged: {error}")
        return False
    damages = list(checkpoint.damages())
    for damage in damages:
        print(f"{folder.name}: damaged: {damage}")
    files = checkpoint.manifest.files
    beside = [entry.name for entry in folder.iterdir()] if isinstance(folder, Path) else []
    for name in sorted({*beside} - {"manifest.json", *files}):
        print(f"{folder.name}: note: {name} is not part of the checkpoint, and is never read")
    if not damages:
        size = format_bytes(sum(record.size_bytes for record in files.values()))
        print(f"{folder.name}: every byte of {size} in {len(files)} files is as it was saved")
    return not damages


def _diff(options: argparse.Namespace) -> int:
    from anemoi_dist.checkpoint.compare import differences

    a, b = _open(options.a, options.root, None), _open(options.b, options.root, None)
    for letter, checkpoint in (("A", a), ("B", b)):
        manifest = checkpoint.manifest
        ranks = f"{manifest.engine} on {manifest.world_size} ranks"
        print(f"{letter}: {_path_of(checkpoint.folder)}: step {manifest.step}, {ranks}")
    differing = set()
    for difference in differences(a, b):
        differing.add((difference.fqn, difference.kind))
        print(f"{difference.fqn} {difference.kind}: {difference.text}")
    num_tensors = len({*a.records, *b.records})
    print(f"{num_tensors - len(differing)} of {num_tensors} tensors are equal, {len(differing)} differ")
    return DIFFERENT if differing else ExitCode.FINISHED


def _export(options: argparse.Namespace) -> int:
    from anemoi_dist.checkpoint.export import export

    checkpoint = _open(options.run, options.root, options.step)
    export(checkpoint, options.out, with_optimizer=options.with_optimizer, dtype=options.dtype, force=options.force)
    print(f"{options.out}: step {checkpoint.manifest.step}, {options.out.stat().st_size} bytes")
    return ExitCode.FINISHED


def _import(options: argparse.Namespace) -> int:
    from anemoi_dist.checkpoint.importers.run import import_checkpoint

    rename = dict(entry.partition("=")[::2] for entry in options.rename)
    for entry in options.rename:
        if "=" not in entry:
            raise ConfigError("--rename", entry, "must be OLD=NEW", fix="--rename encoder=model.encoder")
    imported = import_checkpoint(
        options.source,
        _run(options.run, options.root),
        format=options.format,
        step=options.step,
        rename=rename,
        weights_only=options.weights_only,
        keep_adamw=options.keep_adamw,
        trust_pickle=options.trust_pickle,
    )
    print(f"{_path_of(imported.folder)}: step {imported.step}, from {options.source} ({imported.format})")
    for note in imported.notes:
        print(f"note: {note}")
    return ExitCode.FINISHED


# Where a checkpoint is


def _open(text: str, root: str, step: int | None) -> SavedCheckpoint:
    """Open the checkpoint that ``RUN``, ``RUN@STEP`` or a directory names; of a run the newest with a manifest."""
    from anemoi_dist.checkpoint.verified import SavedCheckpoint

    folders = _folders(text, root, step)
    if len(folders) == 1:
        return SavedCheckpoint(folders[0])
    for folder in folders:
        try:
            return SavedCheckpoint(folder)
        except CheckpointError as error:
            print(f"note: checkpoint {folder.name} is passed over: {error}", file=sys.stderr)
    raise CheckpointError(f"{text} has no checkpoint with a valid manifest")


def _path_of(folder: Folder) -> str:
    return str(getattr(folder, "path", folder))


def _folders(text: str, root: str, step: int | None = None) -> list[Folder]:
    """Return the checkpoints that a name stands for, newest first."""
    from anemoi_dist.checkpoint.locate import store_of

    path = Path(text)
    if re.fullmatch(r"step-\d{8,}", path.absolute().name) and path.is_dir():
        return [path.absolute()]
    name, at, number = text.rpartition("@")
    if at and number.isdecimal() and not path.is_dir():
        if step is not None and step != int(number):
            raise ConfigError("--step", step, f"is not the step of {text}", fix="give one of the two")
        text, step = name, int(number)
    store = store_of(_existing_run(text, root))
    steps = store.steps()
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{text} has no checkpoint of step {step}; it has {known}")
    return [store.path(found) for found in steps if step in (None, found)]


def _existing_run(text: str, root: str) -> RunDirectory:
    run = _run(text, root)
    if not run.checkpoints_dir.is_dir():
        parent = run.path.parent
        known = sorted(path.parent.name for path in parent.glob("*/checkpoints")) if parent.is_dir() else []
        raise ConfigError("RUN", text, f"is not a run ({run.checkpoints_dir} is missing)", valid=known)
    return run


def _run(text: str, root: str) -> RunDirectory:
    from anemoi_dist.run.directory import RunDirectory

    is_path = "/" in text or Path(text, "checkpoints").is_dir()
    return RunDirectory(Path(text).absolute()) if is_path else RunDirectory.locate(root, text)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


__all__ = ["DIFFERENT", "add_commands"]
