"""One suite for every store: a directory, and object storage as fsspec shows it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from support.saving import SingleRank, read_all, save_values, shard

from anemoi_dist.checkpoint.fsspec_store import FsspecStore
from anemoi_dist.checkpoint.manifest import MANIFEST_FILE
from anemoi_dist.checkpoint.retention import Policy, prune
from anemoi_dist.checkpoint.select import select
from anemoi_dist.checkpoint.store import LocalStore, Store
from anemoi_dist.checkpoint.writer import write_rank
from anemoi_dist.errors import CheckpointError


@pytest.fixture(params=["directory", "memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "directory":
        yield LocalStore(tmp_path)
    elif request.param == "file":
        yield FsspecStore(f"file://{tmp_path}/run")
    else:
        root = f"memory://{uuid.uuid4().hex}"
        yield FsspecStore(root)
        fsspec.filesystem("memory").rm(root, recursive=True)


def values(step: int) -> torch.Tensor:
    return torch.arange(3_000_000, dtype=torch.float32) * step  # three blocks


def newest(store: Store, **options: Any) -> tuple[int, torch.Tensor] | None:
    checkpoint = select(store, world=SingleRank(), **options).checkpoint  # type: ignore[arg-type]
    if checkpoint is None:
        return None
    result = checkpoint.manifest.step, read_all(checkpoint)
    checkpoint.close()
    return result


def test_what_is_saved_is_found(store: Store) -> None:
    assert newest(store) is None and store.steps() == []
    for step in (2, 10):
        assert save_values(store, step=step, values=values(step)).name == f"step-{step:08d}"
    step, loaded = newest(store, strict=True)
    assert step == 10 and torch.equal(loaded, values(10)) and store.steps() == [10, 2]


def test_a_save_that_is_not_committed_is_not_there_and_is_cleared_by_the_next(store: Store) -> None:
    save_values(store, step=1, values=values(1))
    folder = store.begin(2, "0123456789abcdef")
    write_rank(folder, [shard(values(2))], save_id="0123456789abcdef", rank=0)
    step, loaded = newest(store)
    assert step == 1 and torch.equal(loaded, values(1))
    save_values(store, step=3, values=values(3))
    assert newest(store, strict=True)[0] == 3
    with pytest.raises(FileNotFoundError):
        (folder / "rank-00000.safetensors").open("rb", buffering=0)


def test_a_failed_save_can_be_discarded(store: Store) -> None:
    folder = store.begin(2, "0123456789abcdef")
    write_rank(folder, [shard(values(2))], save_id="0123456789abcdef", rank=0)
    store.discard(folder)
    assert newest(store) is None
    with pytest.raises(FileNotFoundError):
        (folder / "rank-00000.safetensors").open("rb", buffering=0)


def test_a_damaged_one_is_passed_over_and_replaced(store: Store) -> None:
    save_values(store, step=1, values=values(1))
    save_values(store, step=2, values=values(2))
    file = store.path(2) / "rank-00000.safetensors"
    with file.open("rb", buffering=0) as stream:
        data = bytearray(stream.read())
    data[-3] ^= 1
    with file.open("wb", buffering=0) as stream:
        stream.write(data)
    assert newest(store)[0] == 1
    with pytest.raises(CheckpointError, match="damaged between bytes"):
        newest(store, strict=True)
    save_values(store, step=2, values=values(5))
    step, loaded = newest(store, strict=True)
    assert step == 2 and torch.equal(loaded, values(5))


def test_retention(store: Store) -> None:
    for step in range(1, 6):
        save_values(store, step=step, values=torch.ones(3))
    assert prune(store, Policy(2, keep_every=2)) == [3, 1]
    assert store.steps() == [5, 4, 2] and newest(store, strict=True)[0] == 5


def test_an_object_store_commits_with_one_object_and_no_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    store, filesystem = FsspecStore(root), fsspec.filesystem("memory")
    for name in ("mv", "move", "rename", "mv_file"):
        monkeypatch.setattr(type(filesystem), name, lambda *a, **k: pytest.fail("a rename"), raising=False)
    put: list[str] = []
    pipe = type(filesystem).pipe_file
    monkeypatch.setattr(
        type(filesystem), "pipe_file", lambda self, path, *a, **k: (put.append(path), pipe(self, path, *a, **k))[1]
    )
    save_values(store, step=1, values=values(1))
    assert [path.rsplit("/", 1)[1] for path in put] == [MANIFEST_FILE]
    assert newest(store, strict=True)[0] == 1


def test_a_manifest_cannot_lead_out_of_the_store(tmp_path: Path) -> None:
    store = FsspecStore(f"file://{tmp_path}")
    save_values(store, step=1, values=torch.ones(3))
    manifest = tmp_path / "step-00000001" / MANIFEST_FILE
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "save_id": "../../etc"}))
    with pytest.raises(CheckpointError, match="no checkpoint has"):
        store.path(1).save_id  # noqa: B018
