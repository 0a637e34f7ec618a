"""Saving: each rank streams its ranges into one safetensors file; rank 0 commits the directory by one rename."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash

from anemoi_dist.checkpoint.dtypes import DTYPE_NAMES
from anemoi_dist.checkpoint.manifest import (
    BLOCK_BYTES,
    MANIFEST_FILE,
    TRAINER_FILE,
    FileRecord,
    Manifest,
    TensorRecord,
    file_name,
)
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.engines.base import Shard
from anemoi_dist.errors import CheckpointError
from anemoi_dist.world import World


class HashingFile:
    """A new file that hashes what is written to it, whole and by blocks; closing makes it durable."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("xb", buffering=0)
        self._whole, self._block = xxhash.xxh3_128(), xxhash.xxh3_128()
        self._blocks: list[str] = []
        self._in_block = self.size_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``, cut at block borders."""
        view = memoryview(data).cast("B")
        while len(view):
            piece = view[: BLOCK_BYTES - self._in_block]
            written = self._stream.write(piece)
            self._whole.update(piece[:written])
            self._block.update(piece[:written])
            self._in_block += written
            self.size_bytes += written
            if self._in_block == BLOCK_BYTES:
                self._end_block()
            view = view[written:]

    def _end_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block = xxhash.xxh3_128()
        self._in_block = 0

    def close(self) -> FileRecord:
        """Flush to the disk and return size and hashes."""
        if self._in_block:
            self._end_block()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return FileRecord(self.size_bytes, self._whole.hexdigest(), self._blocks)

    def abandon(self) -> None:
        """Close without making anything durable."""
        self._stream.close()


def write_shards(path: Path, shards: Iterable[Shard], *, save_id: str) -> tuple[FileRecord, list[TensorRecord]]:
    """Write one rank's ranges as a safetensors file.

    Returns
    -------
    tuple[FileRecord, list[TensorRecord]]
        The file, and one record with one range for each shard.

    Raises
    ------
    OSError
        The file could not be written or made durable.
    """
    # Widest types first: every tensor then starts at a multiple of its item size, as safetensors wants it.
    ordered = sorted(shards, key=lambda shard: -shard.tensor.element_size())
    header: dict[str, Any] = {"__metadata__": {"save_id": save_id}}
    offset = 0
    for shard in ordered:
        end = offset + shard.tensor.nbytes
        header[f"{shard.fqn}:{shard.kind}:{shard.start}"] = {
            "dtype": DTYPE_NAMES[shard.tensor.dtype],
            "shape": [shard.tensor.numel()],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file = HashingFile(path)
    try:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        records = []
        for shard in ordered:
            location = [path.name, shard.start, shard.tensor.numel(), file.size_bytes]
            dtype = DTYPE_NAMES[shard.tensor.dtype]
            records.append(TensorRecord(shard.fqn, shard.kind, list(shard.global_shape), dtype, [location]))
            file.write(_bytes_of(shard.tensor))
        return file.close(), records
    except BaseException:
        file.abandon()
        raise


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """View a 1-D tensor's bytes without a copy on the CPU; numpy knows no bf16, so all go as bytes."""
    return tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data


def save(
    store: LocalStore,
    shards: Iterable[Shard],
    *,
    world: World,
    step: int,
    samples_seen: int,
    trainer: dict[str, Any],
    facts: dict[str, Any],
) -> Path:
    """Save and commit a checkpoint. Collective.

    Parameters
    ----------
    store : LocalStore
        Where committed checkpoints live; every rank sees the same.
    shards : Iterable[Shard]
        This rank's ranges.
    world : World
        The ranks that save.
    step, samples_seen : int
        Optimizer steps done and samples consumed.
    trainer : dict[str, Any]
        What else the trainer needs to go on; JSON.
    facts : dict[str, Any]
        ``engine``, ``config_hash`` and ``versions``, for the manifest.

    Returns
    -------
    Path
        The committed directory.

    Raises
    ------
    CheckpointError
        Some rank could not write, on every rank; the older checkpoints are as they were.
    """
    folder = Path(world.broadcast_text(str(_begin(store, step)) if world.is_main else None))
    save_id = folder.name.split(".")[1]
    report: dict[str, Any]
    try:
        record, tensors = write_shards(folder / file_name(world.rank), shards, save_id=save_id)
        report = {"file": asdict(record), "tensors": [asdict(tensor) for tensor in tensors]}
    except OSError as error:
        report = {"error": f"rank {world.rank}: {error}"}
    reports = [json.loads(text) for text in world.gather_text(json.dumps(report))]
    outcome = None
    if world.is_main:
        outcome = _commit(store, folder, reports, step, {**facts, "samples_seen": samples_seen}, trainer)
    outcome = json.loads(world.broadcast_text(json.dumps(outcome) if world.is_main else None))
    if "error" in outcome:
        raise CheckpointError(f"step {step} was not saved: {outcome['error']}; older checkpoints are intact")
    return Path(outcome["path"])


def _begin(store: LocalStore, step: int) -> Path:
    return store.begin(step, secrets.token_hex(8))


def _commit(
    store: LocalStore,
    folder: Path,
    reports: list[dict[str, Any]],
    step: int,
    facts: dict[str, Any],
    trainer: dict[str, Any],
) -> dict[str, str]:
    """Write what rank 0 writes and rename; an error is returned, for all ranks to raise."""
    try:
        if failures := [report["error"] for report in reports if "error" in report]:
            raise OSError("; ".join(failures))
        file = HashingFile(folder / TRAINER_FILE)
        file.write(json.dumps(trainer, indent=1).encode())
        files = {TRAINER_FILE: file.close()}
        files |= {file_name(rank): FileRecord(**report["file"]) for rank, report in enumerate(reports)}
        manifest = Manifest(
            save_id=folder.name.split(".")[1],
            step=step,
            world_size=len(reports),
            files=files,
            tensors=_merge(reports),
            **facts,
        )
        return {"path": str(store.commit(folder, manifest))}
    except (OSError, CheckpointError) as error:
        store.discard(folder)
        return {"error": str(error)}


def _merge(reports: list[dict[str, Any]]) -> list[TensorRecord]:
    """Join the ranges that the ranks hold of each tensor."""
    merged: dict[tuple[str, str], TensorRecord] = {}
    for report in reports:
        for entry in report["tensors"]:
            record = TensorRecord(**entry)
            known = merged.setdefault((record.fqn, record.kind), record)
            if known is not record:
                known.ranges += record.ranges
    return list(merged.values())


__all__ = ["MANIFEST_FILE", "HashingFile", "save", "write_shards"]
