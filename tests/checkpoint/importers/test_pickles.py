"""Bytes that are no checkpoint of anybody's: one error each, whatever the unpicklers make of them."""

from __future__ import annotations

import pickle
import random
import warnings
from pathlib import Path

import pytest

from anemoi_dist.checkpoint.importers.pickles import load_dcp_metadata, load_tensor, load_torch_file
from anemoi_dist.errors import ConfigError

OPCODES = [value for value in vars(pickle).values() if isinstance(value, bytes) and len(value) == 1]


def garbage(seed: int) -> bytes:
    """Return opcodes of pickles and other bytes, one after the other."""
    drawn = random.Random(seed)
    length = drawn.randint(1, 40)
    words = [drawn.choice(OPCODES) if drawn.random() < 0.5 else drawn.randbytes(1) for _ in range(length)]
    return (b"\x80\x02" if drawn.random() < 0.3 else b"") + b"".join(words)


@pytest.mark.parametrize("kind", ["torch", "tensor", "dcp"])
def test_garbage_is_one_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "garbage"
    num_opened = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(500):
            content = garbage(seed)
            path.write_bytes(content)
            try:
                if kind == "tensor":
                    load_tensor(content, path=path)
                else:
                    {"torch": load_torch_file, "dcp": load_dcp_metadata}[kind](path, trust=False)
                num_opened += 1
            except ConfigError as error:
                assert str(path) in str(error)
    assert num_opened < 10, "some garbage is a pickle, of a number or of nothing"
