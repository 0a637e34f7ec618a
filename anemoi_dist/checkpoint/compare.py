"""Two checkpoints, tensor by tensor. No torch; a chunk of two tensors is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from anemoi_dist.checkpoint.arrays import chunks, to_float
from anemoi_dist.checkpoint.manifest import TensorRecord
from anemoi_dist.checkpoint.verified import SavedCheckpoint


@dataclass(frozen=True)
class Difference:
    """One way in which a tensor is not the same in two checkpoints.

    Attributes
    ----------
    fqn, kind : str
        The tensor.
    what : str
        ``only_in_a``, ``only_in_b``, ``shape``, ``dtype`` or ``values``.
    text : str
        The difference in words.
    count : int
        Elements whose bits differ, for ``values``; with another type, elements whose value differs.
    max_abs : float
        Largest absolute difference, NaN where one of two differing elements is; for ``values``.
    """

    fqn: str
    kind: str
    what: str
    text: str
    count: int = 0
    max_abs: float = 0.0


def differences(a: SavedCheckpoint, b: SavedCheckpoint) -> Iterator[Difference]:
    """Yield what differs, in the order of names.

    Raises
    ------
    CheckpointError
        A block that is read is damaged.
    """
    for fqn, kind in sorted({*a.records, *b.records}):
        in_a, in_b = a.records.get((fqn, kind)), b.records.get((fqn, kind))
        if in_a is None or in_b is None:
            what = "only_in_a" if in_b is None else "only_in_b"
            yield Difference(fqn, kind, what, f"{_describe(in_a or in_b)}, only in {'A' if in_b is None else 'B'}")
            continue
        if in_a.shape != in_b.shape:
            text = f"shape {tuple(in_a.shape)} in A, {tuple(in_b.shape)} in B"
            yield Difference(fqn, kind, "shape", text)
            continue
        if in_a.dtype != in_b.dtype:
            yield Difference(fqn, kind, "dtype", f"type {in_a.dtype} in A, {in_b.dtype} in B")
        count, max_abs = _compare(a, b, fqn, kind)
        if count:
            text = f"{count} of {in_a.numel} elements differ, by at most {max_abs:g}"
            yield Difference(fqn, kind, "values", text, count, max_abs)


def _describe(record: TensorRecord | None) -> str:
    assert record is not None
    return f"{tuple(record.shape)} {record.dtype}"


def _compare(a: SavedCheckpoint, b: SavedCheckpoint, fqn: str, kind: str) -> tuple[int, float]:
    types = a.records[fqn, kind].dtype, b.records[fqn, kind].dtype
    count, largest = 0, 0.0
    for ours, theirs in zip(chunks(a, fqn, kind), chunks(b, fqn, kind), strict=True):
        # Bits, not values: NaN is not equal to itself, and -0.0 is equal to 0.0.
        if types[0] == types[1]:
            if ours.tobytes() == theirs.tobytes():
                continue
            bits = f"u{ours.itemsize}"
            differ = ours.view(bits) != theirs.view(bits)
        else:
            differ = to_float(ours, types[0]) != to_float(theirs, types[1])
        if not differ.any():
            continue
        count += int(np.count_nonzero(differ))
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            apart = to_float(ours, types[0])[differ].astype(np.float64) - to_float(theirs, types[1])[differ]
        # np.maximum, not max(): a NaN stays.
        largest = float(np.maximum(largest, np.max(np.abs(apart))))
    return count, largest
