"""Writing: each rank streams its shards into one safetensors file; rank 0 commits."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
import xxhash

from anemoi_dist.checkpoint.manifest import (
    HASH_BLOCK_BYTES,
    TRAINER_FILE,
    FileRecord,
    Manifest,
    Origin,
    RankReport,
    TensorRecord,
    TrainerState,
    file_name,
)
from anemoi_dist.checkpoint.ranks import Ranks
from anemoi_dist.checkpoint.safetensors_format import header
from anemoi_dist.checkpoint.shard import DTYPE_NAMES, Shard
from anemoi_dist.checkpoint.store import File, Folder, Store, make_durable
from anemoi_dist.checkpoint.verified import VerifiedFile
from anemoi_dist.errors import CheckpointError
from anemoi_dist.telemetry.heartbeat import beat

#: Smaller writes are collected: an optimizer's counters are 4 bytes each.
_SMALL_BYTES = 256 * 1024
#: Bytes that are hashed and then written: few enough to be in the processor's cache still when the kernel copies them,
#: which takes a quarter of the time.
_CHUNK_BYTES = 1024 * 1024


class SaveCancelledError(Exception):
    """Another rank failed: the rest of this rank's file is not needed."""


class HashingFile:
    """A new file that hashes what is written to it, by blocks; closing makes it durable.

    Parameters
    ----------
    file : File
        Its place in a store; nothing is there yet.
    """

    def __init__(self, file: File) -> None:
        self._stream = file.open("xb", buffering=0)
        self._block = xxhash.xxh3_128()
        self._blocks: list[str] = []
        self._small = bytearray()
        self._in_block = self.size_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``."""
        view = memoryview(data).cast("B")
        self.size_bytes += len(view)
        if len(view) + len(self._small) < _SMALL_BYTES:
            self._small += view
            return
        self._flush()
        self._append(view)

    def _flush(self) -> None:
        if self._small:
            self._append(memoryview(bytes(self._small)))
            self._small.clear()

    def _append(self, view: memoryview) -> None:
        """Hash and write, cut at block borders; both let go of the interpreter lock."""
        while len(view):
            chunk = view[: min(_CHUNK_BYTES, HASH_BLOCK_BYTES - self._in_block)]
            self._block.update(chunk)
            self._in_block += len(chunk)
            if self._in_block == HASH_BLOCK_BYTES:
                self._end_block()
            view = view[len(chunk) :]
            while len(chunk):  # an unbuffered stream may write less than it is given
                chunk = chunk[self._stream.write(chunk) :]
            beat()  # this thread is alive: a save may take longer than the watchdog's patience

    def _end_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block = xxhash.xxh3_128()
        self._in_block = 0

    def close(self) -> FileRecord:
        """Flush to the disk and return size and hashes."""
        self._flush()
        if self._in_block:
            self._end_block()
        make_durable(self._stream)
        self._stream.close()
        # The file's hash is one of the blocks' hashes: hashing the bytes a second time would cost as much as the first.
        return FileRecord(self.size_bytes, xxhash.xxh3_128_hexdigest("".join(self._blocks).encode()), self._blocks)

    def abandon(self) -> None:
        """Close without making anything durable."""
        with suppress(OSError):
            self._stream.close()


def write_shards(
    path: File, shards: Iterable[Shard], *, save_id: str, cancelled: Callable[[], bool] = lambda: False
) -> tuple[FileRecord, list[TensorRecord]]:
    """Write one rank's shards as a safetensors file.

    Parameters
    ----------
    path : File
        A file that does not exist yet.
    shards : Iterable[Shard]
        This rank's shards.
    save_id : str
        Recorded in the file.
    cancelled : Callable[[], bool], optional
        Called now and then: whether to give up.

    Returns
    -------
    tuple[FileRecord, list[TensorRecord]]
        The file, and one record with one range for each shard.

    Raises
    ------
    OSError
        The file could not be written or made durable.
    SaveCancelledError
        ``cancelled`` returned True.
    """
    # Widest types first, as `header` asks for.
    ordered = sorted(shards, key=lambda shard: -shard.tensor.element_size())
    file = HashingFile(path)
    try:
        entries = ((f"{s.fqn}:{s.kind}:{s.start}", DTYPE_NAMES[s.tensor.dtype], s.tensor.shape) for s in ordered)
        file.write(header(entries, metadata={"save_id": save_id}))
        records = []
        for shard in ordered:
            location = [path.name, shard.start, shard.tensor.numel(), file.size_bytes]
            dtype = DTYPE_NAMES[shard.tensor.dtype]
            records.append(TensorRecord(shard.fqn, shard.kind, list(shard.global_shape), dtype, [location]))
            data = _bytes_of(shard.tensor)
            # A slice at a time: a rank that has lost its save must not write the rest of a 10 GB tensor first.
            for begin in range(0, len(data), 8 * HASH_BLOCK_BYTES):
                if cancelled():
                    raise SaveCancelledError("another rank could not write")
                file.write(data[begin : begin + 8 * HASH_BLOCK_BYTES])
        return file.close(), records
    except BaseException:
        file.abandon()
        raise


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """View a 1-D tensor's bytes without a copy on the CPU; numpy knows no bf16, so all go as bytes."""
    return tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data


def begin(store: Store, step: int, *, world: Ranks) -> tuple[Folder, str]:
    """Open a save; return the folder that every rank writes its file into, and the save's id. Collective.

    Raises
    ------
    CheckpointError
        Rank 0 could not make the folder; raised on every rank.
    """
    answer: dict[str, str] = {}
    if world.is_main:
        # Random: the leftovers of an earlier save of the same step must not be taken for this one's files.
        save_id = secrets.token_hex(8)
        try:
            store.begin(step, save_id)
            answer = {"save_id": save_id}
        except OSError as error:
            answer = {"error": str(error)}
    answer = json.loads(world.broadcast_text(json.dumps(answer) if world.is_main else None))
    if "error" in answer:
        raise CheckpointError(f"step {step} was not saved: {answer['error']}; older checkpoints are intact")
    return store.staging_path(step, answer["save_id"]), answer["save_id"]


def write_rank(
    folder: Folder,
    shards: Iterable[Shard],
    *,
    save_id: str,
    rank: int,
    read_back: bool = False,
    cancelled: Callable[[], bool] = lambda: False,
) -> str:
    """Write one rank's file and return its :class:`~anemoi_dist.checkpoint.manifest.RankReport` as JSON.

    Parameters
    ----------
    folder, save_id
        As :func:`begin` gave them.
    shards : Iterable[Shard]
        This rank's shards.
    rank : int
        This rank's number.
    read_back : bool, optional
        Check every byte of the file once it is durable.
    cancelled : Callable[[], bool], optional
        As in :func:`write_shards`.

    Raises
    ------
    OSError, CheckpointError, SaveCancelledError
        The file could not be written, does not read back as it was written, or is no longer wanted.
    """
    file = folder / file_name(rank)
    record, tensors = write_shards(file, shards, save_id=save_id, cancelled=cancelled)
    if read_back:  # older checkpoints are deleted on the strength of this one
        written = VerifiedFile(file, record)
        try:
            written.verify()
        finally:
            written.close()
    return RankReport(record, tensors).to_json()


def commit(
    store: Store,
    folder: Folder,
    reports: Iterable[str],
    *,
    save_id: str,
    step: int,
    samples_seen: int,
    origin: Origin,
    trainer: TrainerState,
) -> str:
    """Write ``trainer.json`` and the manifest, which makes the save a checkpoint. On rank 0 alone.

    Parameters
    ----------
    store, folder, save_id
        As :func:`begin` used and gave them; every rank has written its file.
    reports : Iterable[str]
        What :func:`write_rank` returned on each rank, in rank order.
    step, samples_seen : int
        Optimizer steps done and samples consumed.
    origin : Origin
        For the manifest.
    trainer : TrainerState
        What else the trainer needs to resume.

    Returns
    -------
    str
        The checkpoint's name.

    Raises
    ------
    OSError
        It is not committed; the older checkpoints are as they were.
    """
    parsed = [RankReport.from_json(report) for report in reports]
    file = HashingFile(folder / TRAINER_FILE)
    try:
        file.write(json.dumps(trainer, indent=1).encode())
        files = {TRAINER_FILE: file.close()}
    except BaseException:
        file.abandon()
        raise
    files |= {file_name(rank): report.file for rank, report in enumerate(parsed)}
    manifest = Manifest(
        save_id=save_id,
        step=step,
        samples_seen=samples_seen,
        world_size=len(parsed),
        engine=origin.engine,
        config_hash=origin.config_hash,
        versions=origin.versions,
        files=files,
        tensors=_merge(parsed),
    )
    return store.commit(folder, manifest).name


def _merge(reports: Iterable[RankReport]) -> list[TensorRecord]:
    """Join the ranges that the ranks hold of each tensor."""
    merged: dict[tuple[str, str], TensorRecord] = {}
    for report in reports:
        for record in report.tensors:
            known = merged.setdefault((record.fqn, record.kind), record)
            if known is not record:
                known.ranges += record.ranges
    return list(merged.values())
