import errno
import multiprocessing.synchronize
import multiprocessing.util
import os
import signal
import sys
import textwrap
import time
from typing import Any

import pytest
import torch
from support.waiting import is_alive, wait_until
from support.warm import Script, WarmInterpreter

from anemoi_dist.config.batch import BatchPlan
from anemoi_dist.data.anemoi import open_split
from anemoi_dist.data.batch import collate
from anemoi_dist.data.loader import build_loader
from anemoi_dist.data.sampler import GlobalSampleOrder, MicroBatchSampler
from anemoi_dist.errors import PreflightError

PLAN = BatchPlan(global_size=8, micro_size=2, accumulation=2, world_size=2)


def loader(data, *, start_step=0):
    dataset = open_split(data, "train", rollout=1)
    order = GlobalSampleOrder(len(dataset), seed=5)
    sampler = MicroBatchSampler(order, plan=PLAN, rank=1, start_step=start_step)
    return build_loader(dataset, sampler=sampler, collate=collate, data_config=data)


def steps(data, count, **arguments):
    batches = loader(data, **arguments)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def wait_until_dead(pids):
    assert wait_until(lambda: not any(map(is_alive, pids))), f"still alive: {list(filter(is_alive, pids))}"


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_yields_this_ranks_micro_batches_in_order(waves, num_workers):
    waves.num_workers = num_workers
    dataset = open_split(waves, "train", rollout=1)
    order = GlobalSampleOrder(len(dataset), seed=5)
    for step, micro_batches in enumerate(steps(waves, 4)):
        assert len(micro_batches) == 2
        for micro, batch in enumerate(micro_batches):
            first = step * 8 + 4 + micro * 2
            expected = collate([dataset[order[first]], dataset[order[first + 1]]])
            torch.testing.assert_close(batch, expected, rtol=0, atol=0)
            assert batch.fields.shape == (2, 3, 1, 48, 2) and batch.fields.dtype == torch.float32
            assert batch.dates.shape == (2,) and batch.dates.dtype == torch.int64


def test_resumes_at_a_step(waves):
    whole, resumed = steps(waves, 5), steps(waves, 2, start_step=3)
    torch.testing.assert_close(resumed, whole[3:], rtol=0, atol=0)


def test_real_data_through_a_forked_worker(era5):
    assert torch.isfinite(steps(era5, 2)[1][0].fields).all()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_workers_ignore_signals(waves, number):
    waves.num_workers = 2
    batches = loader(waves)
    try:
        next(batches)  # the workers are past their start
        pids = [worker.pid for worker in batches.workers]
        assert len(pids) == 2
        for pid in pids:
            os.kill(pid, number)
        time.sleep(0.2)
        for _ in range(10):
            next(batches)
        assert all(is_alive(pid) for pid in pids)
    finally:
        batches.close()


def test_close_ends_the_workers_and_may_be_repeated(waves):
    waves.num_workers = 2
    batches = loader(waves)
    next(batches)
    batches.close()
    batches.close()
    assert not any(worker.is_alive() for worker in batches.workers)
    with pytest.raises(StopIteration):
        next(batches)


def test_an_error_in_a_worker_reaches_the_trainer(waves):
    class Broken:
        def read(self, index, *, step):
            raise OSError(f"sample {index} can't be read")

    sampler = MicroBatchSampler(GlobalSampleOrder(8, seed=0), plan=PLAN, rank=0)
    batches = build_loader(Broken(), sampler=sampler, collate=collate, data_config=waves)
    try:
        with pytest.raises(OSError, match="can't be read"):
            next(batches)
    finally:
        batches.close()


SCRIPT = """
    import os, signal, sys, time
    from anemoi_dist.config.batch import BatchPlan
    from anemoi_dist.config.schema import DataConfig
    from anemoi_dist.data.batch import collate
    from anemoi_dist.data.anemoi import open_split
    from anemoi_dist.data.loader import build_loader
    from anemoi_dist.data.sampler import GlobalSampleOrder, MicroBatchSampler

    data = DataConfig(kind="synthetic", dataset={"field_shape": [4, 8], "num_dates": 20}, num_workers=2)
    dataset = open_split(data, "train", rollout=1)
    sampler = MicroBatchSampler(GlobalSampleOrder(len(dataset), seed=0), plan=BatchPlan(2, 2, 1, 1), rank=0)
    batches = build_loader(dataset, sampler=sampler, collate=collate, data_config=data)
    next(batches)
    print(*(worker.pid for worker in batches.workers), flush=True)
"""


def start(warm: WarmInterpreter, ending: str) -> tuple[Script, list[int]]:
    script = warm.start(textwrap.dedent(SCRIPT) + ending)
    pids = [int(pid) for pid in script.stdout.readline().split()]
    assert len(pids) == 2, script.wait().stderr
    return script, pids


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_workers_die_with_a_killed_parent(warm):
    script, pids = start(warm, "time.sleep(600)")
    # DataLoader's own watchdog ends a worker that waits for its next task; these are stopped, and only killed.
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    os.kill(script.pid, signal.SIGKILL)
    wait_until_dead(pids)
    script.wait()


@pytest.mark.parametrize(("ending", "code"), [("", 0), ("raise SystemExit(75)", 75), ("batches.close()", 0)])
def test_a_trainer_that_ends_leaves_nothing_and_does_not_hang(warm, ending, code):
    script, pids = start(warm, ending)
    done = script.wait()
    assert done.returncode == code and done.stderr == ""
    wait_until_dead(pids)


# As CPython's own handlers do after a fork at a bad moment, before any line of the worker.
HANG = """
    from anemoi_dist.data import loader
    loader._PATIENCE_S = ({patience})
    left = [1]  # of a child's own copy nobody else hears
    def hang():
        if left[0] > 0:
            time.sleep(1000)
    def count_down():
        left[0] -= 1
    os.register_at_fork(after_in_child=hang, after_in_parent=count_down)
"""


def run_where_forks_hang(warm: WarmInterpreter, *, patience: str) -> Any:
    """Start two workers, of which the first never gets to run."""
    setup, script = textwrap.dedent(HANG.format(patience=patience)), textwrap.dedent(SCRIPT)
    imports, body = script.split("\ndata =", 1)
    return warm.run(f"{imports}\n{setup}\ndata ={body}")


def test_workers_that_a_fork_leaves_hanging_are_started_again(warm):
    done = run_where_forks_hang(warm, patience="0.5, 300.0")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2
    wait_until_dead([int(pid) for pid in done.stdout.split()])


def test_workers_that_never_start_are_an_error(warm):
    done = run_where_forks_hang(warm, patience="0.5,")
    assert done.returncode == 1
    assert "some of 2 data workers have not started within 0.5 s, in any of 1 attempts" in done.stderr


# Workers that will never deliver


def wait_for_error(batches):
    """Ask for batches, of which some are ready, until there are no more."""
    with pytest.raises(PreflightError) as caught:
        for _ in range(20):
            next(batches)
    batches.close()
    assert caught.value.exit_code == 3
    return str(caught.value)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "was killed by SIGKILL (out of memory? dmesg says)"),
        (signal.SIGBUS, "was killed by SIGBUS (/dev/shm is full)"),
        (signal.SIGSTOP, "was stopped (SIGSTOP)"),
    ],
)
def test_a_worker_that_is_dead_or_stopped_is_named(waves, number, said):
    waves.num_workers = 2
    batches = loader(waves)
    next(batches)
    pid = batches.workers[1].pid
    os.kill(pid, number)
    message = wait_for_error(batches)
    assert f"data worker {pid} {said}" in message
    assert "\n  fix: " in message


def test_a_batch_that_cannot_be_sent_is_an_error_with_its_reason(waves, tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr(multiprocessing.util, "get_temp_dir", lambda: str(folder))
    waves.num_workers = 1
    message = wait_for_error(loader(waves))
    assert message.startswith(
        "a data worker cannot send its batch: OSError: AF_UNIX path too long\n  fix: a shorter TMPDIR"
    )


class Slow:
    """Samples of which one takes longer than the trainer's look at its workers."""

    def __init__(self, dataset):
        self._dataset = dataset

    def read(self, index, *, step):
        if step == 1:
            time.sleep(2.5)
        return self._dataset.read(index, step=step)


def test_a_batch_that_comes_late_is_waited_for(waves):
    waves.num_workers = 1
    expected = steps(waves, 3)
    dataset = open_split(waves, "train", rollout=1)
    order = GlobalSampleOrder(len(dataset), seed=5)
    sampler = MicroBatchSampler(order, plan=PLAN, rank=1, start_step=0)
    batches = build_loader(Slow(dataset), sampler=sampler, collate=collate, data_config=waves)
    try:
        torch.testing.assert_close([next(batches) for _ in range(3)], expected, rtol=0, atol=0)
    finally:
        batches.close()


def test_an_error_of_the_data_set_keeps_its_type(waves):
    class Broken(Slow):
        def read(self, index, *, step):
            raise RuntimeError("no such field")

    waves.num_workers = 1
    dataset = open_split(waves, "train", rollout=1)
    sampler = MicroBatchSampler(GlobalSampleOrder(len(dataset), seed=5), plan=PLAN, rank=1, start_step=0)
    batches = build_loader(Broken(dataset), sampler=sampler, collate=collate, data_config=waves)
    with pytest.raises(RuntimeError, match="no such field"):
        next(batches)
    batches.close()


def test_workers_that_cannot_be_started_are_an_error_with_its_reason(waves, monkeypatch):
    def no_room(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", no_room)
    waves.num_workers = 1
    with pytest.raises(PreflightError, match=r"cannot be started: .*No space left on device\n  fix: more"):
        loader(waves)
