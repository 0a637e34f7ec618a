"""A checkpoint's tensors as numpy arrays, a chunk at a time. No torch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from anemoi_dist.checkpoint.safetensors_format import ITEM_BYTES, TYPES
from anemoi_dist.checkpoint.verified import SavedCheckpoint

#: numpy's types by safetensors' names. It knows no bf16, whose bits travel as ``uint16``.
NUMPY_DTYPES = {
    name: np.dtype("uint16" if torch_name == "bfloat16" else torch_name) for name, (torch_name, _) in TYPES.items()
}
FLOATS = ("F64", "F32", "F16", "BF16")
#: Elements that are in memory at a time.
CHUNK_NUMEL = 256 * 1024


def chunks(checkpoint: SavedCheckpoint, fqn: str, kind: str) -> Iterator[np.ndarray]:
    """Yield one flattened tensor in verified chunks, ``BF16`` as its bits."""
    record = checkpoint.records[fqn, kind]
    for start in range(0, record.numel, CHUNK_NUMEL):
        data = bytearray(min(CHUNK_NUMEL, record.numel - start) * ITEM_BYTES[record.dtype])
        checkpoint.read_bytes(fqn, kind, start=start, out=memoryview(data))
        yield np.frombuffer(data, dtype=NUMPY_DTYPES[record.dtype])


def to_float(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return values of any type, ``BF16`` bits among them, as numpy numbers that can be subtracted in double."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def to_dtype(values: np.ndarray, dtype: str, target: str) -> np.ndarray:
    """Convert floats of one type to another, rounded to the nearest, ties to even; ``BF16`` is its bits."""
    if dtype == target:
        return values
    values = to_float(values, dtype)
    if target != "BF16":
        with np.errstate(over="ignore"):  # what is too large for the target becomes infinite, as everywhere
            return values.astype(NUMPY_DTYPES[target])
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    # Adding could carry a NaN's bits over into another number.
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)
