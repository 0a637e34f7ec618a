"""A checkpoint's weights as one file for inference: safetensors, streamed without torch, or a torch file."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from anemoi_dist.checkpoint.arrays import FLOATS, chunks, to_dtype
from anemoi_dist.checkpoint.manifest import AVERAGE, Manifest, TensorRecord
from anemoi_dist.checkpoint.safetensors_format import ITEM_BYTES, header
from anemoi_dist.checkpoint.verified import SavedCheckpoint
from anemoi_dist.errors import ConfigError
from anemoi_dist.run.directory import fsync_directory

SUFFIXES = (".safetensors", ".pt")
EXPORT_DTYPES = ("F32", "BF16", "F16")


def export(
    checkpoint: SavedCheckpoint,
    out: Path,
    *,
    with_optimizer: bool = False,
    averaged: bool = False,
    dtype: str | None = None,
    force: bool,
) -> None:
    """Write whole tensors to one file, under a temporary name until it is complete.

    Parameters
    ----------
    checkpoint : SavedCheckpoint
        The checkpoint; every hash block is verified as it is read.
    out : Path
        ``.safetensors`` holds at most one chunk of a tensor in memory, ``.pt`` everything that it writes.
    with_optimizer : bool
        The optimizer's states too, and the average of the weights where it is kept.
    averaged : bool
        The averaged weights in the place of the weights.
    dtype : str, optional
        Type of the floating parameters; buffers and states keep theirs.
    force : bool
        Replace an existing file.

    Raises
    ------
    ConfigError
        The file exists, its name says no format, or there are no averaged weights.
    CheckpointError
        The checkpoint is damaged; no file is left behind.
    """
    if out.suffix not in SUFFIXES:
        raise ConfigError("OUT", str(out), "must say the format by its suffix", valid=SUFFIXES)
    check_out(out, force=force)
    tensors = checkpoint.manifest.tensors
    named = {_name(r): r for r in tensors if with_optimizer or r.kind in ("param", "buffer")}
    if averaged:
        named |= averages(checkpoint.manifest)  # frozen weights and buffers have no average, and stay
    write = _write_torch if out.suffix == ".pt" else _write_safetensors
    with replacing(out) as temporary, temporary.open("xb") as stream:
        write(stream, checkpoint, named, dtype)


def check_out(out: Path, *, force: bool) -> None:
    """Raise :class:`ConfigError` if ``out`` cannot be written, or exists and is not to be replaced."""
    if out.exists() and not force:
        raise ConfigError("OUT", str(out), "exists", fix="take another name, or --force to replace it")
    if not out.parent.is_dir():
        raise ConfigError("OUT", str(out), f"{out.parent} is no directory")


def averages(manifest: Manifest) -> dict[str, TensorRecord]:
    """Return the averaged weights by name; raise :class:`ConfigError` if there are none."""
    found = {record.fqn: record for record in manifest.tensors if record.kind == AVERAGE}
    if not found:
        fix = "train with training.weight_averaging.decay=0.999"
        raise ConfigError("--averaged", True, "the checkpoint has none", fix=fix)
    return found


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yield a path next to ``out`` for a file that takes its name when everything is written and durable."""
    # Beside it, so that the rename stays within one file system; random, for two exports may run at once.
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(out)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(out.parent)


def _name(record: TensorRecord) -> str:
    return record.fqn if record.kind in ("param", "buffer") else f"{record.fqn}:{record.kind}"


def _target(name: str, record: TensorRecord, dtype: str | None) -> str:
    is_parameter = name == record.fqn and record.kind != "buffer"
    return dtype if dtype and is_parameter and record.dtype in FLOATS else record.dtype


def _write_safetensors(
    stream: BinaryIO, checkpoint: SavedCheckpoint, named: dict[str, TensorRecord], dtype: str | None
) -> None:
    targets = {name: _target(name, record, dtype) for name, record in named.items()}
    # Widest types first, as `header` asks for.
    ordered = sorted(named, key=lambda name: -ITEM_BYTES[targets[name]])
    manifest = checkpoint.manifest
    entries = ((name, targets[name], named[name].shape) for name in ordered)
    metadata = {"format": "pt", "step": str(manifest.step), "save_id": manifest.save_id}
    stream.write(header(entries, metadata=metadata))
    for name in ordered:
        record = named[name]
        for values in chunks(checkpoint, record.fqn, record.kind):
            stream.write(to_dtype(values, record.dtype, targets[name]).data)


def _write_torch(
    stream: BinaryIO, checkpoint: SavedCheckpoint, named: dict[str, TensorRecord], dtype: str | None
) -> None:
    """Write a state dictionary; with states ``{"model": ..., "optimizer": {name: {kind: ...}}, "step": ...}``."""
    # torch takes seconds to import; exporting to safetensors does without.
    import torch

    from anemoi_dist.checkpoint.shard import DTYPES

    weights: dict[str, Any] = {}
    states: dict[str, dict[str, Any]] = {}
    for name, record in named.items():
        tensor = torch.empty(record.numel, dtype=DTYPES[record.dtype])
        view = tensor.view(torch.uint8).numpy().data
        checkpoint.read_bytes(record.fqn, record.kind, start=0, out=view)
        tensor = tensor.view(record.shape).to(DTYPES[_target(name, record, dtype)])
        if name == record.fqn:
            weights[name] = tensor
        else:
            states.setdefault(record.fqn, {})[record.kind] = tensor
    torch.save({"model": weights, "optimizer": states, "step": checkpoint.manifest.step} if states else weights, stream)
