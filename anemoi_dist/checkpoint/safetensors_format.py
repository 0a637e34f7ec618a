"""The safetensors format: its types and its header. Without torch and numpy, so that the control side stays quick."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence

#: safetensors' name of each type that a checkpoint may hold -> torch's name and the bytes of one element.
TYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
ITEM_BYTES = {name: size_bytes for name, (_, size_bytes) in TYPES.items()}


def header(entries: Iterable[tuple[str, str, Sequence[int]]], *, metadata: dict[str, str]) -> bytes:
    """Return what a safetensors file begins with: the length of a JSON text, and the text.

    Parameters
    ----------
    entries : Iterable[tuple[str, str, Sequence[int]]]
        Name, type and shape of each tensor, in the order of their data. Types must not widen: a tensor then starts at a
        multiple of its item size, as safetensors wants it.
    metadata : dict[str, str]
        Free text for readers.
    """
    body: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape in entries:
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        body[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(body, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
