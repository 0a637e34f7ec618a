"""Loading by ranges: every block that is read is checked against the manifest before a byte of it is used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from anemoi_dist.checkpoint.manifest import (
    BLOCK_BYTES,
    DTYPES,
    MANIFEST_FILE,
    TRAINER_FILE,
    FileRecord,
    Manifest,
    TensorRecord,
)
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.engines.base import TensorInfo
from anemoi_dist.errors import CheckpointError


class VerifiedFile:
    """Reads any range of a file through one block-sized buffer, and only from blocks whose hash is right."""

    def __init__(self, path: Path, record: FileRecord) -> None:
        self._path, self._record = path, record
        try:
            self._stream = path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{path.name} cannot be opened: {error.strerror}") from error
        size_bytes = os.fstat(self._stream.fileno()).st_size
        if size_bytes != record.size_bytes:
            raise CheckpointError(f"{path.name} has {size_bytes} bytes, the manifest says {record.size_bytes}")
        self._buffer = memoryview(bytearray(min(BLOCK_BYTES, max(size_bytes, 1))))
        self._loaded: int | None = None

    def read_into(self, offset_bytes: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``offset_bytes`` on."""
        done = 0
        while done < len(out):
            index, begin = divmod(offset_bytes + done, BLOCK_BYTES)
            block = self._block(index)
            piece = block[begin : begin + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)

    def verify(self) -> None:
        """Check every block."""
        for index in range(len(self._record.blocks)):
            self._block(index)

    def _block(self, index: int) -> memoryview:
        begin = index * BLOCK_BYTES
        block = self._buffer[: min(BLOCK_BYTES, self._record.size_bytes - begin)]
        if index != self._loaded:
            self._loaded = None
            self._stream.seek(begin)
            done = 0
            while done < len(block):
                count = self._stream.readinto(block[done:])
                if not count:
                    raise CheckpointError(f"{self._path.name} ends at byte {begin + done}")
                done += count
            if xxhash.xxh3_128_hexdigest(block) != self._record.blocks[index]:
                raise CheckpointError(f"{self._path.name} is damaged between bytes {begin} and {begin + len(block)}")
            self._loaded = index
        return block

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class Checkpoint:
    """A committed checkpoint, as a source for an engine to load from.

    Parameters
    ----------
    folder : Path
        The checkpoint's directory.

    Raises
    ------
    CheckpointError
        There is no manifest, or it cannot be trusted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            text = (folder / MANIFEST_FILE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{folder.name} has no readable manifest: {error}") from error
        self.manifest = Manifest.from_json(text)
        self._tensors: dict[tuple[str, str], TensorRecord] = {(t.fqn, t.kind): t for t in self.manifest.tensors}
        self._files: dict[str, VerifiedFile] = {}

    def tensors(self) -> Mapping[tuple[str, str], TensorInfo]:
        """Return what there is, by ``(fqn, kind)``."""
        return {key: TensorInfo(tuple(t.shape), DTYPES[t.dtype]) for key, t in self._tensors.items()}

    def read(self, fqn: str, kind: str, *, start: int, out: torch.Tensor) -> None:
        """Fill the 1-D ``out`` with the elements from ``start`` on, converted to its type."""
        record = self._tensors[fqn, kind]
        dtype = DTYPES[record.dtype]
        direct = out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous()
        target = out if direct else torch.empty(out.numel(), dtype=dtype)
        view = target.detach().view(torch.uint8).numpy().data
        end = start + out.numel()
        for file, first, numel, offset_bytes in record.ranges:
            low, high = max(start, first), min(end, first + numel)
            if low < high:
                begin = (low - start) * dtype.itemsize
                piece = view[begin : begin + (high - low) * dtype.itemsize]
                self._open(file).read_into(offset_bytes + (low - first) * dtype.itemsize, piece)
        if not direct:
            out.copy_(target)

    def trainer(self) -> dict[str, Any]:
        """Return what the trainer saved beside the tensors."""
        data = bytearray(self.manifest.files[TRAINER_FILE].size_bytes)
        self._open(TRAINER_FILE).read_into(0, memoryview(data))
        return json.loads(data)

    def verify(self) -> None:
        """Check every byte of every file.

        Raises
        ------
        CheckpointError
            Naming the first file, and the bytes in it, that are not as they were saved.
        """
        for name in self.manifest.files:
            self._open(name).verify()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _open(self, name: str) -> VerifiedFile:
        if name not in self._files:
            self._files[name] = VerifiedFile(self.folder / name, self.manifest.files[name])
        return self._files[name]


def find_newest(store: LocalStore, *, report: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, or None where nothing was ever saved.

    Parameters
    ----------
    store : LocalStore
        Where to look.
    report : Callable[[str], None]
        Told of each directory that was passed over, and why.

    Raises
    ------
    CheckpointError
        There are checkpoints and none is whole: to start anew in silence would bury them.
    """
    steps = store.steps()
    for step in steps:
        try:
            checkpoint = Checkpoint(store.path(step))
            if checkpoint.manifest.step != step:
                raise CheckpointError(f"its manifest is of step {checkpoint.manifest.step}")
            checkpoint.verify()
        except CheckpointError as error:
            report(f"checkpoint {store.path(step).name} is passed over: {error}")
        else:
            return checkpoint
    if steps:
        raise CheckpointError(
            f"none of the {len(steps)} checkpoints in {store.folder} is whole; restore one, or take another run.id to "
            "start anew"
        )
    return None


def prune(store: LocalStore, *, keep_last: int | None) -> list[int]:
    """Delete all but the newest ``keep_last`` checkpoints that have a valid manifest; return the steps deleted."""
    if keep_last is None:
        return []
    valid = []
    for step in store.steps():
        try:
            Checkpoint(store.path(step))
        except CheckpointError:
            continue
        valid.append(step)
    for step in valid[keep_last:]:
        store.remove(step)
    return valid[keep_last:]
