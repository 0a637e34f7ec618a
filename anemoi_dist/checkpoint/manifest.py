"""The manifest: what a checkpoint holds, where each range lies, and how to tell that it is whole. JSON, no pickle."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import xxhash

from anemoi_dist.errors import CheckpointError

FORMAT = "anemoi-dist-checkpoint"
VERSION = 1
MANIFEST_FILE = "manifest.json"
TRAINER_FILE = "trainer.json"
BLOCK_BYTES = 4 * 1024 * 1024

#: safetensors' names of the types that a checkpoint may hold.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_FILE_NAME = re.compile(r"rank-\d{5,}\.safetensors")


def file_name(rank: int) -> str:
    """Return the name of the file that holds one rank's ranges."""
    return f"rank-{rank:05d}.safetensors"


@dataclass
class FileRecord:
    """One file: its size, the hash of each block, so that a reader can check what it reads, and a hash of those."""

    size_bytes: int
    xxh3_128: str
    blocks: list[str]


@dataclass
class TensorRecord:
    """One whole tensor. Each range is ``[file, start, numel, offset_bytes]``."""

    fqn: str
    kind: str
    shape: list[int]
    dtype: str
    ranges: list[list[Any]] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


@dataclass
class Manifest:
    """Everything about a checkpoint but its bytes."""

    save_id: str
    step: int
    samples_seen: int
    world_size: int
    engine: str
    config_hash: str
    versions: dict[str, str]
    files: dict[str, FileRecord]
    tensors: list[TensorRecord]

    def to_json(self) -> str:
        """Return the manifest with its own checksum as the last entry."""
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps({**body, "xxh3_128": _checksum(body)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read a manifest and refuse one that is damaged, foreign or absurd.

        Raises
        ------
        CheckpointError
            With what is wrong; nothing of the checkpoint has been opened yet.
        """
        try:
            body = json.loads(text)
            checksum = body.pop("xxh3_128")
            if (body.pop("format"), body.pop("version")) != (FORMAT, VERSION):
                raise CheckpointError(f"not a checkpoint of format {FORMAT} version {VERSION}")
            manifest = cls(
                **{
                    **body,
                    "files": {name: FileRecord(**record) for name, record in body["files"].items()},
                    "tensors": [TensorRecord(**record) for record in body["tensors"]],
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the manifest cannot be read: {error!r}") from error
        if checksum != _checksum({"format": FORMAT, "version": VERSION, **body}):
            raise CheckpointError("the manifest's checksum does not match: it is damaged")
        try:
            manifest._check()
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise CheckpointError(f"the manifest has an entry of the wrong type: {error!r}") from error
        return manifest

    def _check(self) -> None:
        for name, record in self.files.items():
            if name != TRAINER_FILE and not _FILE_NAME.fullmatch(name):
                raise CheckpointError(f"the manifest names a file {name!r}, which no checkpoint has")
            if record.size_bytes < 1 or len(record.blocks) != -(-record.size_bytes // BLOCK_BYTES):
                raise CheckpointError(f"{name}: {len(record.blocks)} hashes for {record.size_bytes} bytes")
        for tensor in self.tensors:
            if tensor.dtype not in DTYPES:
                raise CheckpointError(f"{tensor.fqn} {tensor.kind} has the unknown type {tensor.dtype!r}")
            covered = 0
            itemsize = DTYPES[tensor.dtype].itemsize
            for file, start, numel, offset_bytes in sorted(tensor.ranges, key=lambda r: r[1]):
                if start != covered or numel < 0 or file not in self.files:
                    raise CheckpointError(f"{tensor.fqn} {tensor.kind}: elements from {covered} on are in no file")
                if offset_bytes < 0 or offset_bytes + numel * itemsize > self.files[file].size_bytes:
                    raise CheckpointError(f"{tensor.fqn} {tensor.kind}: its range lies outside {file}")
                covered += numel
            if covered != tensor.numel:
                raise CheckpointError(f"{tensor.fqn} {tensor.kind}: {covered} of {tensor.numel} elements are saved")


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
