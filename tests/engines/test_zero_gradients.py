"""Gradients in flat partitions: the same squared norm however it comes about."""

import pytest
import torch

from anemoi_dist.engines.zero_gradients import GradientPartitions


def make(*, eager, last=True):
    flat = torch.zeros(10)
    slices = [flat[0:4], flat[4:7], flat[7:10]]
    return flat, slices, GradientPartitions(slices, is_last=lambda: last, eager=eager)


@pytest.mark.parametrize("eager", [False, True])
def test_gradients_add_up_and_what_gets_none_is_zero(eager):
    flat, slices, partitions = make(eager=eager)
    for part in slices:
        partitions.receive(part, torch.full((part.numel(),), 5.0))
    assert float(partitions.sum_of_squares()) == pytest.approx(250.0)
    partitions.begin()
    partitions.receive(slices[0], torch.ones(2, 2))
    partitions.receive(slices[0], torch.ones(2, 2))
    partitions.receive(None, torch.ones(9))
    assert float(partitions.sum_of_squares()) == pytest.approx(16.0)
    assert flat.tolist() == [2.0] * 4 + [0.0] * 6
    partitions.begin()
    assert partitions.sum_of_squares() is None
    assert not flat.any()


def test_the_sum_does_not_depend_on_when_pieces_are_squared_or_arrive():
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(n, generator=generator) for n in (4, 3, 3)]
    sums = []
    for eager, order in ((False, (0, 1, 2)), (True, (0, 1, 2)), (True, (2, 0, 1))):
        _, slices, partitions = make(eager=eager)
        for index in order:
            partitions.receive(slices[index], values[index])
        sums.append(partitions.sum_of_squares())
    assert sums[0] == sums[1] == sums[2]


def test_before_the_last_micro_batch_nothing_is_squared():
    _, slices, partitions = make(eager=True, last=False)
    partitions.receive(slices[0], torch.ones(4))
    assert not partitions._squares
