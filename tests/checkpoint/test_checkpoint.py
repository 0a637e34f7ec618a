"""Saving and loading: exact, atomic, verified; every engine's ranges load under every other engine."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from support import toy
from support.saving import ORIGIN, SingleRank, read_all, save, save_values, shard

from anemoi_dist.checkpoint import store as store_module
from anemoi_dist.checkpoint.manifest import HASH_BLOCK_BYTES, MANIFEST_FILE, Manifest
from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.checkpoint.retention import Policy, prune
from anemoi_dist.checkpoint.select import select
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.checkpoint.writer import write_shards
from anemoi_dist.distributed.world import World, seed_step
from anemoi_dist.errors import CheckpointError


def save_one(folder: Path, *, step: int, fill: float = 1.0) -> Path:
    # More than one block, so that damage in the second is not seen by whoever reads only the first.
    values = torch.arange(HASH_BLOCK_BYTES // 4 + 1000, dtype=torch.float32) * fill
    return save_values(LocalStore(folder), step=step, values=values)


def test_a_shard_file_is_plain_safetensors(tmp_path: Path) -> None:
    shards = [
        shard(torch.randn(3, 5)),
        shard(torch.randn(7).bfloat16(), fqn="b"),
        shard(torch.tensor([3], dtype=torch.int64), fqn="n", kind="buffer"),
        shard(torch.tensor([True, False]), fqn="m", kind="buffer"),
        shard(torch.empty(0), fqn="e"),
    ]
    record, _ = write_shards(tmp_path / "rank-00000.safetensors", shards, save_id="ab")
    loaded = load_file(tmp_path / "rank-00000.safetensors")
    assert len(loaded) == len(shards)
    for one in shards:
        assert torch.equal(loaded[f"{one.fqn}:{one.kind}:0"], one.tensor)
    data = (tmp_path / "rank-00000.safetensors").read_bytes()
    block = xxhash.xxh3_128_hexdigest(data)
    assert record.size_bytes == len(data) and record.blocks == [block]
    assert record.xxh3_128 == xxhash.xxh3_128_hexdigest(block.encode())


def test_round_trip_and_ranged_read(tmp_path: Path) -> None:
    path = save_one(tmp_path, step=3, fill=0.5)
    assert path.name == "step-00000003" and sorted(p.name for p in tmp_path.iterdir()) == [path.name]
    checkpoint = Checkpoint(path)
    whole = read_all(checkpoint)
    assert torch.equal(whole, torch.arange(whole.numel(), dtype=torch.float32) * 0.5)
    for start, numel in ((0, 1), (HASH_BLOCK_BYTES // 4 - 30, 60), (whole.numel() - 5, 5)):
        out = torch.empty(numel)
        checkpoint.read("w", "param", start=start, out=out)
        assert torch.equal(out, whole[start : start + numel])
    double = torch.empty(4, dtype=torch.float64)
    checkpoint.read("w", "param", start=9, out=double)
    assert torch.equal(double, whole[9:13].double())
    assert checkpoint.trainer() == {"progress": {"step": 3}}


@pytest.mark.parametrize("damage", ["flip", "truncate", "append", "delete", "swap"])
@pytest.mark.parametrize("file", ["rank-00000.safetensors", "trainer.json", MANIFEST_FILE])
def test_damage_is_found_and_the_older_checkpoint_is_taken(tmp_path: Path, file: str, damage: str) -> None:
    store = LocalStore(tmp_path)
    save_one(tmp_path, step=1)
    newer = save_one(tmp_path, step=2, fill=2.0) / file
    data = bytearray(newer.read_bytes())
    if damage == "flip":
        data[-7] ^= 4
        newer.write_bytes(data)
    elif damage == "truncate":
        newer.write_bytes(data[:-1])
    elif damage == "append":
        newer.write_bytes(bytes(data) + b"\n{}")
    elif damage == "delete":
        newer.unlink()
    else:
        shutil.copy(tmp_path / "step-00000001" / file, newer)
    selection = select(store, world=SingleRank())
    assert selection.checkpoint is not None and selection.checkpoint.manifest.step == 1
    assert list(selection.passed_over) == [2] and selection.passed_over[2]
    with pytest.raises(CheckpointError, match="step-00000002 is damaged") as raised:
        select(store, world=SingleRank(), strict=True)
    assert raised.value.exit_code == 4


def test_none_that_is_whole_is_an_error_and_nothing_saved_is_not(tmp_path: Path) -> None:
    assert select(LocalStore(tmp_path), world=SingleRank()).checkpoint is None
    for step in (1, 2):
        (save_one(tmp_path, step=step) / MANIFEST_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"(?s)none .* whole.*step-00000002.*step-00000001") as raised:
        select(LocalStore(tmp_path), world=SingleRank())
    assert raised.value.exit_code == 4


def test_every_flipped_byte_region_of_a_shard_is_named(tmp_path: Path) -> None:
    path = save_one(tmp_path, step=1) / "rank-00000.safetensors"
    data = path.read_bytes()
    for position in (0, 8, 60, HASH_BLOCK_BYTES - 1, HASH_BLOCK_BYTES, len(data) - 1):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(CheckpointError, match=r"rank-00000.safetensors is damaged between bytes"):
            Checkpoint(path.parent).verify()
    path.write_bytes(data)
    Checkpoint(path.parent).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"].update({"../../etc/passwd": m["files"]["trainer.json"]}), "names a file"),
        (lambda m: m["tensors"][0].update(shape=[10**15]), "elements are saved"),
        (lambda m: m["tensors"][0]["ranges"][0].__setitem__(3, 10**15), "lies outside"),
        (lambda m: m["tensors"][0].update(dtype="PICKLE"), "unknown type"),
        (lambda m: m.update(version=99), "not a checkpoint of format"),
        (lambda m: m["files"]["rank-00000.safetensors"]["blocks"].pop(), "block hashes for"),
        (lambda m: m["files"]["trainer.json"].update(size_bytes="9"), "cannot be read: TypeError"),
        (lambda m: m["tensors"][0].update(shape=[-1, -m["tensors"][0]["shape"][0]]), "has the shape"),
        (lambda m: m["tensors"][0]["ranges"][0].pop(), "cannot be read: ValueError"),
    ],
)
def test_a_hostile_manifest_is_refused(tmp_path: Path, change, message: str) -> None:
    path = save_one(tmp_path, step=1) / MANIFEST_FILE
    body = json.loads(path.read_text())
    change(body)
    body.pop("xxh3_128")
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps({**body, "xxh3_128": xxhash.xxh3_128_hexdigest(canonical)}))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(path.parent)


def test_a_failed_write_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_one(tmp_path, step=1)
    calls = {"n": 0}

    def full(descriptor: int) -> None:
        calls["n"] += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"step 2 was not saved: rank 0: .*No space left.*older .* intact"):
        save_one(tmp_path, step=2)
    monkeypatch.undo()
    assert calls["n"] == 1 and [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    Checkpoint(tmp_path / "step-00000001").verify()


def test_a_killed_save_is_no_checkpoint_and_is_cleared_by_the_next(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    half = store.begin(5, "0123456789abcdef")
    (half / "rank-00000.safetensors").write_bytes(b"half")
    assert select(store, world=SingleRank()).checkpoint is None
    save_one(tmp_path, step=6)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000006"]


def test_saving_over_a_broken_step_replaces_it(tmp_path: Path) -> None:
    broken = save_one(tmp_path, step=4)
    (broken / MANIFEST_FILE).unlink()
    save_one(tmp_path, step=4, fill=3.0)
    assert read_all(Checkpoint(broken))[1] == 3.0
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]


def test_a_link_is_dropped_and_what_it_points_to_is_kept(tmp_path: Path) -> None:
    archive, folder = _new(tmp_path / "archive"), _new(tmp_path / "checkpoints")
    save_one(archive, step=1)
    (folder / "step-00000001").symlink_to(archive / "step-00000001")
    for step in (2, 3):
        save_one(folder, step=step)
    assert prune(LocalStore(folder), Policy(2)) == [1]
    assert not (folder / "step-00000001").exists()
    Checkpoint(archive / "step-00000001").verify()


def test_a_file_in_the_place_of_a_checkpoint_does_not_stop_saving(tmp_path: Path) -> None:
    (tmp_path / "step-00000004").touch()
    path = save_one(tmp_path, step=4)
    Checkpoint(path).verify()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]
    save_one(tmp_path, step=5)


def test_order_of_names_not_of_time_decides(tmp_path: Path) -> None:
    for step in (2, 10):
        save_one(tmp_path, step=step)
    os.utime(tmp_path / "step-00000002", (2e9, 2e9))
    os.utime(tmp_path / "step-00000010", (0, 0))
    found = select(LocalStore(tmp_path), world=SingleRank()).checkpoint
    assert found is not None and found.manifest.step == 10


# Engines


def train_and_save(world: World, engine: str, folder: Path, steps: range, resume: bool) -> dict:
    """Train over ``steps``; begin from the newest checkpoint if ``resume``; save at the end."""
    config = toy.make_config(engine, micro_batch_size=1 if world.world_size == 4 else None)
    built = toy.build(world, config)
    store = LocalStore(folder)
    if resume:
        found = select(store, world=world).checkpoint
        assert found is not None
        built.load(found, num_updates=found.manifest.step)
        assert found.manifest.step == steps.start
    loaded = toy.clone_shards(built)
    losses = []
    for step in steps:
        seed_step(0, step=step, rank=world.rank)
        losses.append(built.train_step(toy.micro_batches(config, world, step)).loss)
    if steps:
        save(
            store,
            built.shards(),
            world=world,
            step=steps.stop,
            samples_seen=0,
            trainer={},
            origin=replace(ORIGIN, engine=engine),
        )
    result = {"loaded": loaded, "shards": toy.clone_shards(built), "losses": losses}
    built.close()
    return result


@pytest.mark.parametrize("engine", toy.ENGINES)
def test_resumes_bit_for_bit(ranks, tmp_path: Path, engine: str) -> None:
    pool = ranks(2)
    straight = pool.run(train_and_save, engine, _new(tmp_path / "a"), range(9), False)
    pool.run(train_and_save, engine, _new(tmp_path / "b"), range(5), False)
    resumed = pool.run(train_and_save, engine, tmp_path / "b", range(5, 9), True)
    expected = toy.whole_tensors([r["shards"] for r in straight])
    actual = toy.whole_tensors([r["shards"] for r in resumed])
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key
    assert resumed[0]["losses"] == straight[0]["losses"][5:]


@pytest.fixture(scope="module")
def written(ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[Path, list[dict]]]:
    """Return ``written(engine, num_ranks)``: a checkpoint of theirs, and what they held."""

    @cache
    def get(engine: str, num_ranks: int) -> tuple[Path, list[dict]]:
        folder = tmp_path_factory.mktemp("written")
        return folder, ranks(num_ranks).run(train_and_save, engine, folder, range(3), False)

    return get


@pytest.mark.parametrize("loader", toy.ENGINES)
@pytest.mark.parametrize(("writer_engine", "num_writers", "num_loaders"), [("zero2", 2, 4), ("fsdp2", 4, 1)])
def test_any_engine_loads_what_another_wrote(
    ranks, written, writer_engine: str, num_writers: int, loader: str, num_loaders: int
) -> None:
    folder, held = written(writer_engine, num_writers)
    loaded = ranks(num_loaders).run(train_and_save, loader, folder, range(3, 3), True)
    expected = toy.whole_tensors([r["shards"] for r in held])
    actual = toy.whole_tensors([r["loaded"] for r in loaded])
    assert expected.keys() == actual.keys() and len({k.split(":")[1] for k in expected}) == 6
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def test_another_model_is_refused_by_name(ranks, tmp_path: Path) -> None:
    folder = _new(tmp_path / "d")
    written = ranks(1).run(train_and_save, "ddp", folder, range(1), False)
    assert written
    manifest = Manifest.from_json((folder / "step-00000001" / MANIFEST_FILE).read_text())
    names = {tensor.fqn for tensor in manifest.tensors}
    assert "model.head.weight" in names
    source = Checkpoint(folder / "step-00000001")
    del source._tensors["model.head.weight", "param"]
    with pytest.raises(CheckpointError, match=r"only in the model:\n  model\.head\.weight: parameter"):
        _load_into_single(source)


def _load_into_single(source: Checkpoint) -> None:
    from anemoi_dist.engines.sharded import ShardedEngine

    class Lone(ShardedEngine):
        def _wrap(self) -> None:
            self._create_optimizer()

        def _forward(self, batch, *, rollout): ...
        def _backward(self, loss, *, is_last): ...
        def _update(self): ...
        def local_shards(self):
            from anemoi_dist.engines.replicated import replicated_shards

            yield from replicated_shards(self.module)

    config = toy.make_config("ddp")
    Lone(toy.make_module(config), config=config, world=SingleRank()).load(source, num_updates=1)  # type: ignore[arg-type]


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder
