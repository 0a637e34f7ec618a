"""Every kind of damage to every region of every file: found, named, and the older checkpoint taken."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from support.saving import ORIGIN, SingleRank, read_all

from anemoi_dist.checkpoint import writer
from anemoi_dist.checkpoint.manifest import HASH_BLOCK_BYTES, MANIFEST_FILE, TRAINER_FILE
from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.checkpoint.select import select
from anemoi_dist.checkpoint.shard import Shard
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.errors import CheckpointError

FILES = ("rank-00000.safetensors", "rank-00001.safetensors", TRAINER_FILE, MANIFEST_FILE)
HALF = HASH_BLOCK_BYTES // 4 + 5000  # elements of each rank: two blocks


def save_two_ranks(folder: Path, *, step: int, fill: float, trainer: Any = None) -> Path:
    store = LocalStore(folder)
    save_id = f"{step:016x}"
    save = store.begin(step, save_id)
    whole = torch.arange(2 * HALF, dtype=torch.float32) * fill
    reports = [
        writer.write_rank(
            save,
            [Shard("w", "param", (2 * HALF,), rank * HALF, whole[rank * HALF : (rank + 1) * HALF])],
            save_id=save_id,
            rank=rank,
        )
        for rank in range(2)
    ]
    trainer = {"progress": {"step": step}, "fill": fill} if trainer is None else trainer
    writer.commit(store, save, reports, save_id=save_id, step=step, samples_seen=0, origin=ORIGIN, trainer=trainer)
    return store.path(step)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 1 and step 2, and, elsewhere, another run's step 2 with other values."""
    root = tmp_path_factory.mktemp("damage")
    for name, fill in (("run", 1.0), ("other", 3.0)):
        (root / name).mkdir()
        for step in (1, 2):
            save_two_ranks(root / name, step=step, fill=fill * step)
    return root


def regions(size: int) -> list[int]:
    """Offsets in each region: the header's length, the header, data at both sides of each block border, the end."""
    borders = [b + d for b in range(HASH_BLOCK_BYTES, size, HASH_BLOCK_BYTES) for d in (-1, 0, 1)]
    return sorted({o for o in (0, 7, 8, 40, 200, size // 3, size // 2, *borders, size - 2, size - 1) if 0 <= o < size})


def damages(path: Path, run: Path, other: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield (name, what does it) for one file of step 2."""
    data = path.read_bytes()
    for offset in regions(len(data)):
        for bit in (0, 7):
            flipped = data[:offset] + bytes([data[offset] ^ (1 << bit)]) + data[offset + 1 :]
            yield f"bit {bit} of byte {offset} flipped", lambda flipped=flipped: path.write_bytes(flipped)
        yield f"truncated at {offset}", lambda offset=offset: os.truncate(path, offset)
        zeroed = data[:offset] + bytes(min(512, len(data) - offset)) + data[offset + 512 :]
        if zeroed != data:
            yield f"zeros from {offset}", lambda zeroed=zeroed: path.write_bytes(zeroed)
    yield "deleted", path.unlink
    yield "doubled", lambda: path.write_bytes(data + data)
    yield "one byte more", lambda: path.write_bytes(data + b"\0")
    yield "another run's", lambda: shutil.copy(other / "step-00000002" / path.name, path)
    yield "an older save's", lambda: shutil.copy(run / "step-00000001" / path.name, path)
    yield "a directory", lambda: (path.unlink(), path.mkdir())
    if path.name == FILES[0]:
        yield "the other rank's", lambda: shutil.copy(path.with_name(FILES[1]), path)


@pytest.mark.parametrize("name", FILES)
def test_all_damage_is_found_by_name_and_the_older_is_used(pristine: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(pristine / "run", run)
    path = run / "step-00000002" / name
    original, tried = path.read_bytes(), 0
    for what, damage in damages(path, run, pristine / "other"):
        damage()
        selection = select(LocalStore(run), world=SingleRank())  # type: ignore[arg-type]
        assert selection.checkpoint is not None and selection.checkpoint.manifest.step == 1, f"{name} {what}: not found"
        selection.checkpoint.close()
        assert list(selection.passed_over) == [2]
        # A manifest that is whole but another save's: then none of the files is right, and the first one is named.
        foreign = name == MANIFEST_FILE and what == "another run's"
        named = TRAINER_FILE if foreign else "manifest" if name == MANIFEST_FILE else name
        assert named in selection.passed_over[2], f"{what}: {selection.passed_over[2]}"
        if path.is_dir():
            path.rmdir()
        path.write_bytes(original)
        tried += 1
    selection = select(LocalStore(run), world=SingleRank(), strict=True)  # type: ignore[arg-type]
    assert torch.equal(read_all(selection.checkpoint), torch.arange(2.0 * HALF) * 2)  # type: ignore[arg-type]
    print(f"{name}: {tried} kinds of damage")
    assert tried > 20


def forge(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest and give it a checksum that matches, as somebody who means harm would."""
    body = json.loads(path.read_text())
    change(body)
    body.pop("xxh3_128")
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps({**body, "xxh3_128": xxhash.xxh3_128_hexdigest(canonical)}))


def _rename_file(body: dict[str, Any], name: str) -> None:
    body["files"][name] = body["files"].pop(FILES[0])
    body["tensors"][0]["ranges"][0][0] = name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: _rename_file(b, "../../../etc/passwd"), "names a file"),
        (lambda b: _rename_file(b, "/etc/passwd"), "names a file"),
        (lambda b: _rename_file(b, "rank-00000.pkl"), "names a file"),
        (lambda b: _rename_file(b, "rank-00000.safetensors\n"), "names a file"),
        (lambda b: b["files"][FILES[0]].update(size_bytes=2**62), "hashes for"),
        (lambda b: b["files"][FILES[0]].update(size_bytes=-1), "hashes for"),
        (lambda b: b["files"][FILES[0]].update(size_bytes="1"), "cannot be read"),
        (lambda b: b["files"][FILES[0]].update(blocks=[]), "hashes for"),
        (lambda b: b["tensors"][0].update(shape=[2**40, 2**40]), "elements are saved"),
        (lambda b: b["tensors"][0].update(shape=[-1]), "has the shape"),
        (lambda b: b["tensors"][0].update(shape=[True, 2 * HALF]), "True is no whole number"),
        (lambda b: b["tensors"][0].update(shape=[2.0 * HALF]), "is no whole number"),
        (lambda b: b["tensors"][0]["ranges"][0].__setitem__(3, 8.5), "8.5 is no whole number"),
        (lambda b: b["tensors"][0]["ranges"][0].__setitem__(1, None), "None is no whole number"),
        (lambda b: b["tensors"].append(b["tensors"][0]), "w param is there twice"),
        (lambda b: b["tensors"].append({**b["tensors"][0], "fqn": "v"}), "two ranges share the bytes"),
        (lambda b: b["tensors"][0].update(shape=[10**4000, 10**4000]), "cannot be read"),
        (lambda b: b.update(step=-2), "of step -2"),
        (lambda b: b.update(step=True), "True is no whole number"),
        (lambda b: b.update(samples_seen=1.5), "1.5 is no whole number"),
        (lambda b: b["tensors"][0]["ranges"][0].__setitem__(2, 2**60), "outside|in no file"),
        (lambda b: b["tensors"][0]["ranges"][0].__setitem__(3, -8), "outside"),
        (lambda b: b["tensors"][0]["ranges"].append(["rank-00000.safetensors", 0, 5, 0]), "in no file"),
        (lambda b: b["tensors"][0].update(ranges=[]), "elements are saved"),
        (lambda b: b["tensors"][0].update(ranges=[[1, 2]]), "cannot be read"),
        (lambda b: b.update(tensors={}, files=[]), "cannot be read"),
        (lambda b: b.update(format="torch"), "not a checkpoint of format"),
    ],
)
def test_a_hostile_manifest_is_refused_unopened(pristine: Path, tmp_path: Path, change, message: str) -> None:
    folder = tmp_path / "step-00000002"
    shutil.copytree(pristine / "run" / folder.name, folder)
    forge(folder / MANIFEST_FILE, change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "text", ['{"step": ' + "1" * 5000 + "}", "[" * 100_000, '{"versions": ' + '{"a":' * 900 + "1" + "}" * 901]
)
def test_json_that_python_cannot_hold_is_one_error(pristine: Path, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "step-00000002"
    shutil.copytree(pristine / "run" / folder.name, folder)
    (folder / MANIFEST_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint(folder)


@pytest.mark.parametrize("trainer", [{"progress": 3}, {"progress": {"step": True}}, {"progress": {"step": -1}}, []])
def test_a_trainer_state_that_is_none_is_passed_over(tmp_path: Path, trainer: Any) -> None:
    for step in (1, 2):
        save_two_ranks(tmp_path, step=step, fill=1.0, trainer=trainer if step == 2 else None)
    selection = select(LocalStore(tmp_path), world=SingleRank())
    assert selection.checkpoint is not None and selection.checkpoint.manifest.step == 1
    assert f"{TRAINER_FILE} cannot be read" in selection.passed_over[2]


def test_a_planted_pickle_is_never_executed(pristine: Path, tmp_path: Path) -> None:
    witness = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return (Path.touch, (witness,))

    payload = pickle.dumps(Payload())
    pickle.loads(payload)
    assert witness.exists(), "the payload works where it is loaded"
    witness.unlink()
    for name in FILES:
        run = tmp_path / name
        shutil.copytree(pristine / "run", run)
        (run / "step-00000002" / name).write_bytes(payload)
        for beside in ("data.pkl", ".metadata", "latest"):
            (run / "step-00000002" / beside).write_bytes(payload)
        selection = select(LocalStore(run), world=SingleRank())  # type: ignore[arg-type]
        assert selection.checkpoint is not None and selection.checkpoint.manifest.step == 1
        selection.checkpoint.trainer()
        read_all(selection.checkpoint)
    assert not witness.exists()


def test_the_shares_of_the_ranks_are_all_of_it(pristine: Path, tmp_path: Path) -> None:
    """Whichever block is damaged, with any number of ranks exactly one rank finds it."""
    folder = tmp_path / "step-00000002"
    shutil.copytree(pristine / "run" / folder.name, folder)
    for name in FILES[:3]:
        data = (folder / name).read_bytes()
        for offset in (0, len(data) - 1):
            (folder / name).write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
            for num_ranks in (1, 2, 3, 5, 9):
                found = []
                for rank in range(num_ranks):
                    checkpoint = Checkpoint(folder)
                    try:
                        checkpoint.verify(share=rank, num_shares=num_ranks)
                    except CheckpointError:
                        found.append(rank)
                    checkpoint.close()
                assert len(found) == 1, f"{name} byte {offset}, {num_ranks} ranks: found by {found}"
            (folder / name).write_bytes(data)
