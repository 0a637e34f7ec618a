"""Verified reading: any range of bytes of a checkpoint, from hash blocks that have been checked. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import xxhash

from anemoi_dist.checkpoint.manifest import (
    HASH_BLOCK_BYTES,
    MANIFEST_FILE,
    TRAINER_FILE,
    FileRecord,
    Manifest,
    TensorRecord,
    TrainerState,
)
from anemoi_dist.checkpoint.safetensors_format import ITEM_BYTES
from anemoi_dist.checkpoint.store import File, Folder
from anemoi_dist.errors import CheckpointError
from anemoi_dist.telemetry.heartbeat import beat

#: Of one checkpoint, each with a buffer of 4 MiB; a checkpoint of a thousand ranks has a thousand files.
MAX_OPEN_FILES = 16


@dataclass(frozen=True)
class Damage:
    """Bytes ``[begin, end)`` of a file that are not as they were saved."""

    file: str
    begin: int
    end: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}: bytes {self.begin} to {self.end}: {self.what}"


class VerifiedFile:
    """A file that is read by ranges through one buffer, each hash block checked before a byte of it is used."""

    def __init__(self, path: File, record: FileRecord) -> None:
        self._path, self._record = path, record
        try:
            self._stream = path.open("rb", buffering=0)
            size_bytes = self._stream.seek(0, os.SEEK_END)
        except OSError as error:
            raise CheckpointError(f"{path.name} cannot be opened: {error.strerror or error}") from error
        if size_bytes != record.size_bytes:
            self._stream.close()
            raise CheckpointError(f"{path.name} has {size_bytes} bytes, the manifest says {record.size_bytes}")
        self._loaded: int | None = None

    @cached_property
    def _buffer(self) -> memoryview:
        # Not before it is needed: whoever looks at the sizes of a thousand files reads none of them.
        return memoryview(bytearray(min(HASH_BLOCK_BYTES, max(self._record.size_bytes, 1))))

    def read_into(self, offset_bytes: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``offset_bytes`` on."""
        done = 0
        while done < len(out):
            index, begin = divmod(offset_bytes + done, HASH_BLOCK_BYTES)
            size_bytes = self._block_bytes(index)
            # A whole block goes straight to its destination: the copy through the buffer would be a third pass, after
            # reading and hashing, over most of a checkpoint.
            if begin == 0 and len(out) - done >= size_bytes:
                self._read_block(index, out[done : done + size_bytes])
                done += size_bytes
                continue
            if index != self._loaded:
                self._loaded = None  # should the block be damaged, the buffer holds no block that may be used
                self._read_block(index, self._buffer[:size_bytes])
                self._loaded = index
            part = self._buffer[begin : min(begin + len(out) - done, size_bytes)]
            out[done : done + len(part)] = part
            done += len(part)

    def verify(self, first: int = 0, last: int | None = None) -> None:
        """Check the blocks from ``first`` to before ``last``, by default all."""
        self._loaded = None
        for index in range(len(self._record.blocks))[first:last]:
            self._read_block(index, self._buffer[: self._block_bytes(index)])

    def _block_bytes(self, index: int) -> int:
        return min(HASH_BLOCK_BYTES, self._record.size_bytes - index * HASH_BLOCK_BYTES)

    def _read_block(self, index: int, out: memoryview) -> None:
        beat()  # a slow file system is not a rank that hangs
        begin = index * HASH_BLOCK_BYTES
        try:
            self._stream.seek(begin)
            done = 0
            while done < len(out):
                count = self._stream.readinto(out[done:])
                if not count:
                    raise CheckpointError(f"{self._path.name} ends at byte {begin + done}")
                done += count
        except OSError as error:
            raise CheckpointError(f"{self._path.name} cannot be read: {error}") from error
        if xxhash.xxh3_128_hexdigest(out) != self._record.blocks[index]:
            raise CheckpointError(f"{self._path.name} is damaged between bytes {begin} and {begin + len(out)}")

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class SavedCheckpoint:
    """A committed checkpoint, read as bytes.

    Parameters
    ----------
    folder : Folder
        The checkpoint's directory, or its counterpart in another store.

    Raises
    ------
    CheckpointError
        There is no manifest, or it cannot be trusted.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        try:
            text = (folder / MANIFEST_FILE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{folder.name} has no readable manifest: {error}") from error
        self.manifest = Manifest.from_json(text)
        self._tensors: dict[tuple[str, str], TensorRecord] = {(t.fqn, t.kind): t for t in self.manifest.tensors}
        self._files: dict[str, VerifiedFile] = {}

    @property
    def records(self) -> dict[tuple[str, str], TensorRecord]:
        """Records of all tensors, by ``(fqn, kind)``."""
        return self._tensors

    def read_bytes(self, fqn: str, kind: str, *, start: int, out: memoryview) -> None:
        """Fill ``out``, a number of whole elements, with the elements from ``start`` on."""
        record = self._tensors[fqn, kind]
        item = ITEM_BYTES[record.dtype]
        end = start + len(out) // item
        for file, first, numel, offset_bytes in record.ranges:
            low, high = max(start, first), min(end, first + numel)
            if low < high:
                part = out[(low - start) * item : (high - start) * item]
                self._open(file).read_into(offset_bytes + (low - first) * item, part)

    def trainer(self) -> TrainerState:
        """Return the trainer's own state, which is saved with the tensors.

        Raises
        ------
        CheckpointError
            It is damaged, or no such state.
        """
        data = bytearray(self.manifest.files[TRAINER_FILE].size_bytes)
        self._open(TRAINER_FILE).read_into(0, memoryview(data))
        try:
            state = json.loads(data)
            if any(type(count) is not int or count < 0 for count in state.get("progress", {}).values()):
                raise ValueError(f"progress={state['progress']}")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{TRAINER_FILE} cannot be read: {error!r}") from error
        return state

    def check_sizes(self) -> None:
        """Raise :class:`CheckpointError` for the first file that is missing or has another size than it was saved."""
        for name in self.manifest.files:
            self._open(name)

    def verify(self, *, share: int = 0, num_shares: int = 1) -> None:
        """Check every byte of every file, or one of ``num_shares`` equal shares of all blocks.

        Raises
        ------
        CheckpointError
            Naming the first file, and the bytes in it, that are not as they were saved.
        """
        # Shares of the blocks of all files together: a checkpoint of one rank is then checked by all that load it.
        total = sum(len(record.blocks) for record in self.manifest.files.values())
        first, last = total * share // num_shares, total * (share + 1) // num_shares
        for name, record in self.manifest.files.items():
            low, high = max(first, 0), min(last, len(record.blocks))
            if low < high:
                self._open(name).verify(low, high)
            first, last = first - len(record.blocks), last - len(record.blocks)

    def damages(self) -> Iterator[Damage]:
        """Check every byte of every file and yield every damage, where :meth:`verify` stops at the first."""
        for name, record in self.manifest.files.items():
            yield from _damages(self.folder / name, record)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _open(self, name: str) -> VerifiedFile:
        """Return a file, which is the last that will be closed to keep no more than ``MAX_OPEN_FILES`` open."""
        file = self._files.pop(name, None) or VerifiedFile(self.folder / name, self.manifest.files[name])
        if len(self._files) >= MAX_OPEN_FILES:
            self._files.pop(next(iter(self._files))).close()
        self._files[name] = file
        return file


def _damages(path: File, record: FileRecord) -> Iterator[Damage]:
    """Compare a file with its record, block by block; adjacent damaged blocks are one region."""
    try:
        stream = path.open("rb", buffering=0)
    except OSError as error:
        yield Damage(path.name, 0, record.size_bytes, f"cannot be opened ({error.strerror or error})")
        return
    with stream:
        size_bytes = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        found: Damage | None = None
        for index, expected in enumerate(record.blocks):
            begin = index * HASH_BLOCK_BYTES
            end = min(begin + HASH_BLOCK_BYTES, record.size_bytes)
            if end > size_bytes:
                break
            if xxhash.xxh3_128_hexdigest(_read(stream, end - begin)) != expected:
                found = Damage(path.name, found.begin if found else begin, end, "not what was saved")
            elif found:
                yield found
                found = None
        if found:
            yield found
        if size_bytes < record.size_bytes:
            yield Damage(path.name, size_bytes, record.size_bytes, "missing")
        elif size_bytes > record.size_bytes:
            yield Damage(path.name, record.size_bytes, size_bytes, "appended after it was saved")


def _read(stream: Any, num_bytes: int) -> bytes:
    parts = []
    while num_bytes and (part := stream.read(num_bytes)):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)
