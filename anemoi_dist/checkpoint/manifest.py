"""The manifest: the tensors of a checkpoint, the file of each of their ranges, and the hashes. JSON, no pickle.

No torch: the control side reads manifests too.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

import xxhash

from anemoi_dist.checkpoint.safetensors_format import ITEM_BYTES
from anemoi_dist.errors import CheckpointError

FORMAT = "anemoi-dist-checkpoint"
VERSION = 1
MANIFEST_FILE = "manifest.json"
TRAINER_FILE = "trainer.json"
#: Kind of the averaged weights, beside ``param``, ``buffer`` and the names of optimizer states.
AVERAGE = "weight_average"
#: Bytes that are hashed at once, and the least that a reader has to read to trust a byte.
HASH_BLOCK_BYTES = 4 * 1024 * 1024

_FILE_NAME = re.compile(r"rank-\d{5,}\.safetensors")


def file_name(rank: int) -> str:
    """Return the name of the file that holds one rank's ranges."""
    return f"rank-{rank:05d}.safetensors"


@dataclass
class FileRecord:
    """One file: its size, the hash of each hash block, so that any range can be verified, and a hash of those."""

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

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class RankReport:
    """One rank's part of a save: its file, and one record with one range for each of its shards."""

    file: FileRecord
    tensors: list[TensorRecord]

    def to_json(self) -> str:
        """Return the report as rank 0 gathers it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RankReport:
        """Read what :meth:`to_json` returned on another rank."""
        body = json.loads(text)
        return cls(FileRecord(**body["file"]), [TensorRecord(**record) for record in body["tensors"]])


@dataclass(frozen=True)
class Origin:
    """The program that saves: recorded in every manifest, read by people.

    Attributes
    ----------
    engine : str
        Name of the engine, or of the format that was imported.
    config_hash : str
        Hash of the run's configuration; empty where there was none.
    versions : dict[str, str]
        Package name -> version.
    """

    engine: str
    config_hash: str
    versions: dict[str, str]


class TrainerState(TypedDict, total=False):
    """``trainer.json``: what the trainer needs to resume, in addition to the tensors.

    ``progress`` holds the trainer's counters, ``scores`` the metrics of this step's validation, where there was one,
    ``task`` what the task remembers.
    """

    progress: dict[str, int]
    scores: dict[str, float]
    task: dict[str, Any]


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
        """Read a manifest and refuse one that is damaged, foreign or contradicts itself.

        Raises
        ------
        CheckpointError
            The manifest cannot be trusted. Nothing of the checkpoint has been opened yet.
        """
        # Whatever is wrong with the text, a wrong type deep inside for one, is one error: selection passes the
        # checkpoint over, where a TypeError would end the run.
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
            if checksum != _checksum({"format": FORMAT, "version": VERSION, **body}):
                raise CheckpointError("the manifest's checksum does not match: it is damaged")
            manifest._check()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"the manifest cannot be read: {error!r}") from error
        return manifest

    def _check(self) -> None:
        _check_whole("the manifest", self.step, self.samples_seen, self.world_size)
        if min(self.step, self.samples_seen, self.world_size) < 0:
            raise CheckpointError(f"the manifest is of step {self.step}, {self.samples_seen} samples")
        for name, record in self.files.items():
            _check_whole(name, record.size_bytes)
            if name != TRAINER_FILE and not _FILE_NAME.fullmatch(name):
                raise CheckpointError(f"the manifest names a file {name!r}, which no checkpoint has")
            # A block without a hash would be read unverified. A name with a slash could lead out of the folder.
            if record.size_bytes < 0 or len(record.blocks) != -(-record.size_bytes // HASH_BLOCK_BYTES):
                raise CheckpointError(f"{name}: {len(record.blocks)} block hashes for {record.size_bytes} bytes")
        # The ranges must cover each tensor once, without gap or overlap: loading reads them without another look, and a
        # gap would leave initial values in the middle of trained ones.
        places: list[tuple[str, int, int]] = []
        for tensor in self.tensors:
            if tensor.dtype not in ITEM_BYTES:
                raise CheckpointError(f"{tensor.fqn} {tensor.kind} has the unknown type {tensor.dtype!r}")
            _check_whole(f"{tensor.fqn} {tensor.kind}", *tensor.shape, *(x for r in tensor.ranges for x in r[1:]))
            if any(length < 0 for length in tensor.shape):
                raise CheckpointError(f"{tensor.fqn} {tensor.kind} has the shape {tensor.shape}")
            covered = 0
            for file, start, numel, offset_bytes in sorted(tensor.ranges, key=lambda r: r[1]):
                if start != covered or numel < 0 or file not in self.files:
                    raise CheckpointError(f"{tensor.fqn} {tensor.kind}: elements from {covered} on are in no file")
                end_bytes = offset_bytes + numel * ITEM_BYTES[tensor.dtype]
                if offset_bytes < 0 or end_bytes > self.files[file].size_bytes:
                    raise CheckpointError(f"{tensor.fqn} {tensor.kind}: its range lies outside {file}")
                covered += numel
                places.append((file, offset_bytes, end_bytes))
            if covered != tensor.numel:
                raise CheckpointError(f"{tensor.fqn} {tensor.kind}: {covered} of {tensor.numel} elements are saved")
        if twice := [key for key, count in Counter((t.fqn, t.kind) for t in self.tensors).items() if count > 1]:
            raise CheckpointError(f"{' '.join(twice[0])} is there twice")
        for (file, _, end), (following, begin, _) in itertools.pairwise(sorted(places)):
            if file == following and begin < end:
                raise CheckpointError(f"{file}: two ranges share the bytes from {begin} on")


def _check_whole(what: str, *numbers: Any) -> None:
    """Refuse what is no whole number: JSON has floats too, and true is 1 to Python."""
    for number in numbers:
        if type(number) is not int:
            raise TypeError(f"{what}: {number!r} is no whole number")


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
