"""Stop requests and how ranks agree on them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from support import jobs

from anemoi_dist.distributed.control_word import REASONS, StopRequest, Word
from anemoi_dist.run.directory import RunDirectory


def test_ranks_agree_one_step_later_on_the_largest_wish(ranks) -> None:
    stops = [[0, 0, 1, 0, 0], [0, 0, 0, 4, 0]]
    results = ranks(2).run(jobs.agree, [[Word(stop=stop) for stop in row] for row in stops])
    assert results[0] == results[1] == [Word(stop=stop) for stop in (0, 0, 0, 1, 4, 0, 0)]


def test_a_save_is_written_when_all_have_written_and_failed_when_one_has(ranks) -> None:
    words = [[Word(written=2), Word(written=3, committed=2)], [Word(written=1, failed=2), Word(save_due=1, written=3)]]
    agreed = ranks(2).run(jobs.agree, words)
    expected = [Word(), Word(written=1, failed=2), Word(save_due=1, written=3, committed=2), Word()]
    assert agreed[0] == agreed[1] == expected


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.locate(tmp_path, "r")
    run.create()
    return run


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1")])
def test_a_signal_only_sets_the_wish(run: RunDirectory, number: int, reason: str) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        stop = StopRequest(run, is_main=False)
        stop.listen()
        assert stop.value() == 0
        os.kill(os.getpid(), number)
        assert REASONS[stop.value()] == reason
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert REASONS[stop.value()] == reason, "the stronger reason stays"
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_a_second_interrupt_ends_at_once(run: RunDirectory) -> None:
    before = signal.getsignal(signal.SIGINT)
    usual = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        stop = StopRequest(run, is_main=True)
        stop.listen()
        os.kill(os.getpid(), signal.SIGINT)
        assert REASONS[stop.value()] == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
        for n, handler in usual.items():
            signal.signal(n, handler)


def test_only_rank_0_looks_for_the_stop_file_and_clears_it(run: RunDirectory) -> None:
    run.stop_file.touch()
    assert StopRequest(run, is_main=False).value() == 0
    main = StopRequest(run, is_main=True)
    assert main.reason(main.value()) == "the stop file"
    run.stop_file.write_text("time limit of SLURM job 7\nmore\n")
    assert main.reason(main.value()) == "time limit of SLURM job 7"
    assert main.reason(4) == "SIGTERM"
    assert StopRequest(run, is_main=False).reason(1) == "the stop file", "only rank 0 reads it"
    main.clear()
    assert main.value() == 0 and not run.stop_file.exists()
