"""A checkpoint's tensors as numpy arrays, a piece at a time. No torch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from anemoi_dist.checkpoint.manifest import ITEM_BYTES
from anemoi_dist.checkpoint.verified import SavedCheckpoint

#: numpy knows no bf16: its bits travel as ``uint16``.
NUMPY_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
FLOATS = ("F64", "F32", "F16", "BF16")
#: Elements that are in memory at a time.
PIECE_NUMEL = 256 * 1024


def pieces(checkpoint: SavedCheckpoint, fqn: str, kind: str) -> Iterator[np.ndarray]:
    """Yield one flattened tensor in verified pieces, ``BF16`` as its bits."""
    record = checkpoint.records[fqn, kind]
    for start in range(0, record.numel, PIECE_NUMEL):
        data = bytearray(min(PIECE_NUMEL, record.numel - start) * ITEM_BYTES[record.dtype])
        checkpoint.read_bytes(fqn, kind, start=start, out=memoryview(data))
        yield np.frombuffer(data, dtype=NUMPY_DTYPES[record.dtype])


def to_float(piece: np.ndarray, dtype: str) -> np.ndarray:
    """Return values of any type, ``BF16`` bits among them, as numpy numbers that can be subtracted in double."""
    if dtype == "BF16":
        return (piece.astype(np.uint32) << 16).view(np.float32)
    return piece


def to_dtype(piece: np.ndarray, dtype: str, target: str) -> np.ndarray:
    """Convert floats of one type to another, rounded to the nearest, ties to even; ``BF16`` is its bits."""
    if dtype == target:
        return piece
    values = to_float(piece, dtype)
    if target != "BF16":
        with np.errstate(over="ignore"):  # what is too large for the target becomes infinite, as everywhere
            return values.astype(NUMPY_DTYPES[target])
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    # Adding could carry a NaN's bits over into another number.
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)
