"""``anemoi-dist checkpoint``: inspect and export checkpoints, import other programs'. No torch to inspect them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anemoi_dist.checkpoint.compare import differences
from anemoi_dist.checkpoint.manifest import Manifest, TensorRecord
from anemoi_dist.checkpoint.store import Folder, parse_name, store_of
from anemoi_dist.checkpoint.verified import SavedCheckpoint
from anemoi_dist.errors import CheckpointError, ConfigError, ExitCode, print_message
from anemoi_dist.telemetry.progress import format_bytes

from .arguments import locate_run, name_run

#: Exit code of ``diff`` for checkpoints that differ, as of diff(1).
DIFFERENT = 1


def run(options: argparse.Namespace) -> int:
    """Run the command below ``checkpoint`` and return its exit code."""
    return _ACTIONS[options.action](options)


# list


@dataclass
class Listed:
    """One line of ``list``; ``error`` says why the checkpoint is not whole, None if it is."""

    step: int
    size_bytes: int
    world_size: int | None = None
    engine: str | None = None
    error: str | None = None


def _list(options: argparse.Namespace) -> int:
    rows = [_listed(folder) for folder in _folders(options.run, options.root)]
    if options.json:
        _print_json([asdict(row) for row in rows])
        return ExitCode.FINISHED
    print(f"{'step':>10}  {'size':>10}  {'ranks':>5}  {'engine':<14}state")
    for row in rows:
        size = format_bytes(row.size_bytes)
        print(f"{row.step:>10}  {size:>10}  {row.world_size or '?':>5}  {row.engine or '?':<14}{row.error or 'whole'}")
    print("whole: the manifest is valid and every file has its size; `anemoi-dist checkpoint verify` reads every byte")
    return ExitCode.FINISHED


def _listed(folder: Folder) -> Listed:
    files = list(folder.iterdir()) if isinstance(folder, Path) else []
    row = Listed(int(folder.name.removeprefix("step-")), sum(file.stat().st_size for file in files))
    try:
        checkpoint = SavedCheckpoint(folder)
        manifest = checkpoint.manifest
        row.world_size, row.engine, row.size_bytes = manifest.world_size, manifest.engine, _size_bytes(manifest)
        if manifest.step != row.step:
            raise CheckpointError(f"its manifest is of step {manifest.step}")
        checkpoint.check_sizes()  # cheap, and finds what a full disk or a broken copy leaves
        checkpoint.close()
    except CheckpointError as error:
        row.error = str(error)
    return row


# show


@dataclass(frozen=True)
class KindSummary:
    """All tensors of one kind, such as ``exp_avg_slow``."""

    tensors: int
    size_bytes: int
    dtypes: list[str]


@dataclass(frozen=True)
class Summary:
    """Content of a checkpoint in numbers, as ``show`` prints it."""

    path: str
    step: int
    samples_seen: int
    world_size: int
    engine: str
    save_id: str
    config_hash: str
    size_bytes: int
    num_files: int
    num_tensors: int
    kinds: dict[str, KindSummary]
    versions: Mapping[str, str]

    @classmethod
    def of(cls, checkpoint: SavedCheckpoint) -> Summary:
        """Summarize an open checkpoint."""
        manifest = checkpoint.manifest
        by_kind: dict[str, list[TensorRecord]] = {}
        for tensor in sorted(manifest.tensors, key=lambda tensor: tensor.kind):
            by_kind.setdefault(tensor.kind, []).append(tensor)
        return cls(
            path=_path_of(checkpoint.folder),
            step=manifest.step,
            samples_seen=manifest.samples_seen,
            world_size=manifest.world_size,
            engine=manifest.engine,
            save_id=manifest.save_id,
            config_hash=manifest.config_hash,
            size_bytes=_size_bytes(manifest),
            num_files=len(manifest.files),
            num_tensors=len(manifest.tensors),
            kinds={
                kind: KindSummary(
                    len(tensors), sum(each.size_bytes for each in tensors), sorted({each.dtype for each in tensors})
                )
                for kind, tensors in by_kind.items()
            },
            versions=manifest.versions,
        )


def _show(options: argparse.Namespace) -> int:
    checkpoint = _open(options.run, options.root, options.step)
    summary, tensors = Summary.of(checkpoint), checkpoint.manifest.tensors
    if options.json:
        listed = [{"fqn": t.fqn, "kind": t.kind, "shape": t.shape, "dtype": t.dtype} for t in tensors]
        _print_json({**asdict(summary), **({"tensors": listed} if options.tensors else {})})
        return ExitCode.FINISHED
    for name in ("path", "step", "samples_seen", "world_size", "engine", "save_id", "config_hash"):
        print(f"{name:<13} {getattr(summary, name)}")
    print(f"{'size':<13} {format_bytes(summary.size_bytes)} in {summary.num_files} files")
    print(f"{'tensors':<13} {summary.num_tensors}")
    for kind, held in summary.kinds.items():
        print(f"  {kind:<14} {held.tensors:>6} {format_bytes(held.size_bytes):>10}  {', '.join(held.dtypes)}")
    print(f"{'versions':<13} {', '.join(f'{name} {number}' for name, number in summary.versions.items())}")
    if options.tensors:
        for tensor in sorted(tensors, key=lambda t: (t.fqn, t.kind)):
            print(f"{tensor.fqn}  {tensor.kind}  {tuple(tensor.shape)}  {tensor.dtype}")
    return ExitCode.FINISHED


# verify, diff, export and import


def _verify(options: argparse.Namespace) -> int:
    folders = _folders(options.run, options.root, options.step)
    if not folders:
        raise CheckpointError(f"{options.run} has no checkpoint")
    damaged = [folder for folder in folders if not _verify_one(folder)]
    return ExitCode.NO_CHECKPOINT if damaged else ExitCode.FINISHED


def _verify_one(folder: Folder) -> bool:
    """Print everything that is wrong with one checkpoint; return whether nothing is."""
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
    # A copy or a backup tool may have left files; they do no harm, and a reader wonders about them.
    beside = [entry.name for entry in folder.iterdir()] if isinstance(folder, Path) else []
    for name in sorted({*beside} - {"manifest.json", *files}):
        print(f"{folder.name}: note: {name} is not part of the checkpoint, and is never read")
    if not damages:
        size = format_bytes(_size_bytes(checkpoint.manifest))
        print(f"{folder.name}: every byte of {size} in {len(files)} files is as it was saved")
    return not damages


def _diff(options: argparse.Namespace) -> int:
    a, b = _open(options.a, options.root, None), _open(options.b, options.root, None)
    # Which checkpoints these are: RUN alone names the newest, and that changes while the run trains on.
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
    checkpoint = _open(options.run, options.root, options.step)
    if options.to == "inference":
        _export_inference(options, checkpoint)
        return ExitCode.FINISHED
    from anemoi_dist.checkpoint.export import export  # may import torch, which no other action needs

    export(
        checkpoint,
        options.out,
        with_optimizer=options.with_optimizer,
        averaged=options.averaged,
        dtype=options.dtype,
        force=options.force,
    )
    print(f"{options.out}: step {checkpoint.manifest.step}, {options.out.stat().st_size} bytes")
    return ExitCode.FINISHED


def _export_inference(options: argparse.Namespace, checkpoint: SavedCheckpoint) -> None:
    from anemoi_dist.config.parse import from_yaml
    from anemoi_dist.tasks.anemoi.inference import export_inference  # imports torch and anemoi-training

    for option in ("with_optimizer", "dtype"):
        if value := getattr(options, option):
            raise ConfigError(
                f"--{option.replace('_', '-')}", value, "has no effect with --to inference", fix="remove it"
            )
    run = locate_run(options.run.partition("@")[0], options.root)
    config = from_yaml(run.config_file.read_text(encoding="utf-8"))
    export_inference(checkpoint, options.out, config=config, averaged=options.averaged, force=options.force)
    print(f"{options.out}: step {checkpoint.manifest.step}, for anemoi-inference")


def _import(options: argparse.Namespace) -> int:
    from anemoi_dist.checkpoint.importers.run import import_checkpoint  # imports torch

    rename = dict(entry.partition("=")[::2] for entry in options.rename)
    for entry in options.rename:
        if "=" not in entry:
            raise ConfigError("--rename", entry, "must be OLD=NEW", fix="--rename encoder=model.encoder")
    imported = import_checkpoint(
        options.source,
        name_run(options.run, options.root, content="checkpoints"),
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


# Finding a checkpoint


def _open(text: str, root: str, step: int | None) -> SavedCheckpoint:
    """Open the checkpoint that ``RUN``, ``RUN@STEP`` or a directory names; of a run the newest with a manifest."""
    folders = _folders(text, root, step)
    if len(folders) == 1:
        return SavedCheckpoint(folders[0])
    # As training does: a newest checkpoint that was not completed is passed over.
    for folder in folders:
        try:
            return SavedCheckpoint(folder)
        except CheckpointError as error:
            print_message(f"note: checkpoint {folder.name} is passed over: {error}")
    raise CheckpointError(f"{text} has no checkpoint with a valid manifest")


def _size_bytes(manifest: Manifest) -> int:
    return sum(record.size_bytes for record in manifest.files.values())


def _path_of(folder: Folder) -> str:
    return str(getattr(folder, "path", folder))


def _folders(text: str, root: str, step: int | None = None) -> list[Folder]:
    """Return the checkpoints that a name stands for, newest first."""
    folder, name, named_step = parse_name(text)
    if folder is not None:
        return [folder]
    if named_step is not None:
        if step not in (None, named_step):
            raise ConfigError("--step", step, f"is not the step of {text}", fix="give one of the two")
        text, step = name, named_step
    store = store_of(locate_run(text, root, content="checkpoints"))
    steps = store.steps()
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{text} has no checkpoint of step {step}; it has {known}")
    return [store.path(found) for found in steps if step in (None, found)]


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


_ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "list": _list,
    "show": _show,
    "verify": _verify,
    "diff": _diff,
    "export": _export,
    "import": _import,
}
