"""Saving in the background: what the step waits for, what failures do, and that ranks agree on both."""

from __future__ import annotations

import dataclasses
import errno
import io
import itertools
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xxhash
from support.saving import ORIGIN, SingleRank, read_all, save_values, shard
from support.waiting import PATIENCE_S, wait_until

from anemoi_dist.checkpoint import saver as saver_module
from anemoi_dist.checkpoint import staging, worker, writer
from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.checkpoint.saver import Outcome, Saver
from anemoi_dist.checkpoint.select import select
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.config.schema import CheckpointConfig
from anemoi_dist.distributed.control_word import ControlWord, Word
from anemoi_dist.distributed.world import World
from anemoi_dist.errors import CheckpointError, PreflightError


def make(folder: Path, *, world: Any = None, **config: Any) -> tuple[Saver, list[Outcome]]:
    outcomes: list[Outcome] = []
    saver = Saver(
        LocalStore(folder),
        world=world or SingleRank(),
        config=CheckpointConfig(**config),
        origin=ORIGIN,
        report=outcomes.append,
    )
    return saver, outcomes


def begin(saver: Saver, step: int, values: torch.Tensor) -> None:
    saver.save(step, lambda: [shard(values)], samples_seen=step, trainer={})


def boundary(saver: Saver) -> Word:
    """What the control word does where there is one rank."""
    word = saver.word(stop=0, save_due=False)
    saver.advance(word)
    return word


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits until this is set."""
    event = threading.Event()
    write = writer.write_rank

    def gated(*args: Any, **kwargs: Any) -> str:
        assert event.wait(PATIENCE_S)
        return write(*args, **kwargs)

    monkeypatch.setattr(saver_module, "write_rank", gated)
    return event


def test_training_goes_on_while_the_values_of_that_step_are_written(tmp_path: Path, gate: threading.Event) -> None:
    saver, outcomes = make(tmp_path)
    values = torch.arange(1000.0)
    saver.prepare([shard(values)])
    begin(saver, 1, values)
    values += 100  # the next step
    for _ in range(5):
        assert boundary(saver).written == 0 and not outcomes
    assert select(LocalStore(tmp_path), world=SingleRank()).checkpoint is None
    gate.set()
    assert wait_until(lambda: (boundary(saver), outcomes)[1], every_s=0.001)
    (outcome,) = outcomes
    assert (outcome.step, outcome.name, outcome.error) == (1, "step-00000001", "")
    assert outcome.stalled_s < outcome.seconds
    assert torch.equal(read_all(Checkpoint(tmp_path / "step-00000001")), torch.arange(1000.0))


def test_a_save_that_is_due_while_one_is_written_is_skipped(tmp_path: Path, gate: threading.Event) -> None:
    saver, outcomes = make(tmp_path, when_busy="skip")
    saver.prepare([shard(torch.ones(5))])
    begin(saver, 1, torch.ones(5))
    begin(saver, 2, torch.ones(5))
    assert [(o.step, o.skipped) for o in outcomes] == [(2, True)]
    gate.set()
    saver.wait()
    assert LocalStore(tmp_path).steps() == [1]


def test_or_waited_for(tmp_path: Path, gate: threading.Event) -> None:
    saver, outcomes = make(tmp_path, when_busy="wait")
    saver.prepare([shard(torch.ones(5))])
    begin(saver, 1, torch.ones(5))
    threading.Timer(0.2, gate.set).start()
    begin(saver, 2, torch.ones(5) * 2)
    assert [o.step for o in outcomes] == [1] and outcomes[0].stalled_s > 0.05
    saver.wait()
    assert [o.step for o in outcomes] == [1, 2] and LocalStore(tmp_path).steps() == [2, 1]
    assert read_all(Checkpoint(tmp_path / "step-00000001"))[0] == 1


def test_without_a_thread_it_is_committed_when_save_returns(tmp_path: Path) -> None:
    saver, outcomes = make(tmp_path, asynchronous=False)
    saver.prepare([shard(torch.ones(5))])
    begin(saver, 1, torch.ones(5))
    assert [o.step for o in outcomes] == [1] and LocalStore(tmp_path).steps() == [1]
    assert saver._staging is None


def test_what_is_read_back_wrong_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_values(LocalStore(tmp_path), step=1, values=torch.ones(5))

    def lie(stream: Any) -> None:  # a disk that says yes and keeps something else
        stream.seek(-1, 2)
        stream.write(b"\x55")

    monkeypatch.setattr(writer, "make_durable", lie)
    saver, outcomes = make(tmp_path)
    saver.prepare([shard(torch.ones(5))])
    begin(saver, 2, torch.ones(5))
    saver.wait()
    assert "rank-00000.safetensors is damaged" in outcomes[0].error
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_dead_thread_is_a_failure_and_the_next_save_has_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, outcomes = make(tmp_path)
    saver.prepare([shard(torch.ones(5))])
    with monkeypatch.context() as patch:
        patch.setattr(worker.Worker, "_serve", lambda self: None)
        begin(saver, 1, torch.ones(5))
        saver._worker._thread.join()  # type: ignore[union-attr]
        assert boundary(saver).failed == 1
    assert "thread that writes checkpoints is dead" in outcomes[0].error and not list(tmp_path.iterdir())
    begin(saver, 2, torch.ones(5))
    saver.wait()
    assert outcomes[1].error == "" and LocalStore(tmp_path).steps() == [2]


# Ranks


def fail_on(world: World, folder: Path, rank: int, number: int, on_error: str, phase: str) -> dict[str, Any]:
    """Save once well, then a second time with one rank's disk broken; report what each step boundary brought."""
    saver, outcomes = make(folder, world=world, on_error=on_error, keep_last=None)
    values = torch.arange(100.0) + world.rank
    shards = [dataclasses.replace(shard(values, fqn=f"w{world.rank}"))]
    saver.prepare(shards)
    word, seen, raised = ControlWord(world), [], None
    module, name = (saver_module, "write_rank") if phase == "write" else (saver_module, "commit")
    original = getattr(module, name)

    def broken(*args: Any, **kwargs: Any) -> Any:
        if saver._number == 2 and world.rank == rank:
            raise OSError(number, "Injected")
        return original(*args, **kwargs)

    setattr(module, name, broken)
    try:
        for step in itertools.count(1):
            saver.advance(word.exchange(saver.word(stop=0, save_due=False)))
            seen.append(len(outcomes))
            if saver._pending is None and len(outcomes) == saver._number and saver._number < 3:
                saver.save(10 * (saver._number + 1), lambda: shards, samples_seen=step, trainer={})
            if len(outcomes) == 3:
                break
            time.sleep(0.002)
    except CheckpointError as error:
        raised = str(error)
    finally:
        setattr(module, name, original)
        word.finish()
    return {"outcomes": [(o.step, o.error) for o in outcomes], "seen": seen, "raised": raised}


@pytest.mark.parametrize(
    ("rank", "number", "phase"), [(1, errno.ENOSPC, "write"), (0, errno.EIO, "write"), (0, errno.EFBIG, "commit")]
)
def test_one_ranks_failure_reaches_all_at_the_same_step(
    ranks, tmp_path: Path, rank: int, number: int, phase: str
) -> None:
    results = ranks(2).run(fail_on, tmp_path, rank, number, "warn", phase)
    assert results[0] == results[1]
    assert [step for step, _ in results[0]["outcomes"]] == [10, 20, 30]
    assert [bool(error) for _, error in results[0]["outcomes"]] == [False, True, False]
    assert f"rank {rank}: [Errno {number}] Injected; older checkpoints are intact" in results[0]["outcomes"][1][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000030"]
    assert len(select(LocalStore(tmp_path), world=SingleRank()).checkpoint.manifest.files) == 3  # type: ignore[union-attr]


def test_or_stops_all(ranks, tmp_path: Path) -> None:
    results = ranks(2).run(fail_on, tmp_path, 1, errno.ENOSPC, "stop", "write")
    assert results[0] == results[1] and "step 20 was not saved: rank 1" in results[0]["raised"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def prepare_with(world: World, folder: Path, available: int) -> str:
    original, staging.available_bytes = staging.available_bytes, lambda: available
    saver, _ = make(folder, world=world)
    try:
        saver.prepare([shard(torch.ones(1024))])
    except PreflightError as error:
        return str(error)
    finally:
        staging.available_bytes = original
    return ""


def test_memory_that_does_not_suffice_is_refused_before_the_first_step(ranks, tmp_path: Path) -> None:
    assert ranks(2).run(prepare_with, tmp_path, 2 * 4096) == ["", ""]
    problems = ranks(2).run(prepare_with, tmp_path, 2 * 4096 - 1)
    assert problems[0] == problems[1] and "2 ranks need 0.00 GiB" in problems[0]
    assert "checkpoint.asynchronous=false" in problems[0]


def test_what_is_available_is_a_plausible_number() -> None:
    total = staging._meminfo_bytes("MemTotal")
    assert 0 < staging.available_bytes() <= total


def test_states_that_appear_later_are_staged_too(tmp_path: Path) -> None:
    saver, _ = make(tmp_path)
    saver.prepare([shard(torch.ones(4))])
    begin(saver, 1, torch.arange(1000.0))
    saver.wait()
    assert torch.equal(read_all(Checkpoint(tmp_path / "step-00000001")), torch.arange(1000.0))


# The interpreter lock


def test_the_writer_lets_the_training_thread_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds the interpreter lock is short: hashes and writes let go of it, and take a MiB at most each."""
    sizes: dict[str, list[int]] = {"hash": [], "write": []}

    class Hash:
        def __init__(self) -> None:
            self._real = xxhash.xxh3_128()
            self.hexdigest = self._real.hexdigest

        def update(self, piece: memoryview) -> None:
            sizes["hash"].append(len(piece))
            self._real.update(piece)

    class Stream(io.FileIO):
        def write(self, piece: Any) -> int:
            sizes["write"].append(len(piece))
            return super().write(piece)

    hashes = SimpleNamespace(xxh3_128=Hash, xxh3_128_hexdigest=xxhash.xxh3_128_hexdigest)
    monkeypatch.setattr(writer, "xxhash", hashes)
    monkeypatch.setattr(Path, "open", lambda path, mode, **_: Stream(path, mode.replace("b", "")))
    # Many small tensors and a large one.
    shards = [shard(torch.ones(64), fqn=f"small{i}") for i in range(2000)]
    shards.append(shard(torch.ones(4 * 1024 * 1024), fqn="large"))
    writer.write_shards(tmp_path / "rank-00000.safetensors", shards, save_id="ab")
    for name, each in sizes.items():
        assert sum(each) > 16 * 2**20 and max(each) <= 2**20, name
        assert len(each) < 40, f"{name}: small tensors are collected"
