import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anemoi_dist.config.batch import BatchPlan, plan_batches
from anemoi_dist.config.schema import Config, TrainingConfig
from anemoi_dist.data.sampler import GlobalSampleOrder, MicroBatchSampler

SEEDS = st.integers(0, 2**63)


def plans(global_size: int) -> list[BatchPlan]:
    """Return every way to cut a global batch into ranks and micro-batches."""
    result = []
    for world_size in range(1, global_size + 1):
        if global_size % world_size:
            continue
        share = global_size // world_size
        for micro in range(1, share + 1):
            if share % micro == 0:
                training = TrainingConfig(
                    max_steps=1, global_batch_size=global_size, micro_batch_size=micro, optimizer={}
                )
                result.append(plan_batches(Config(training=training), world_size=world_size))
    return result


def global_batch(order: GlobalSampleOrder, plan: BatchPlan, step: int) -> list[int]:
    """Return what all ranks see in one step, in rank order."""
    samplers = [MicroBatchSampler(order, plan=plan, rank=rank) for rank in range(plan.world_size)]
    return [i for sampler in samplers for micro in range(plan.accumulation) for i in sampler.samples(step, micro)]


@given(num_samples=st.integers(1, 40), seed=SEEDS, global_size=st.integers(1, 12), step=st.integers(0, 50))
def test_same_samples_for_any_number_of_ranks(num_samples, seed, global_size, step):
    order = GlobalSampleOrder(num_samples, seed=seed)
    expected = [order[i] for i in range(step * global_size, (step + 1) * global_size)]
    for plan in plans(global_size):
        assert global_batch(order, plan, step) == expected


@given(num_samples=st.integers(1, 60), seed=SEEDS, epoch=st.integers(0, 5))
def test_an_epoch_has_each_sample_once(num_samples, seed, epoch):
    order = GlobalSampleOrder(num_samples, seed=seed)
    start = epoch * num_samples
    assert sorted(order[i] for i in range(start, start + num_samples)) == list(range(num_samples))


@given(
    num_samples=st.integers(1, 40),
    seed=SEEDS,
    global_size=st.integers(1, 8),
    start_step=st.integers(0, 30),
    data=st.data(),
)
def test_resuming_continues_the_sequence(num_samples, seed, global_size, start_step, data):
    plan = data.draw(st.sampled_from(plans(global_size)))
    rank = data.draw(st.integers(0, plan.world_size - 1))
    count = 3 * plan.accumulation
    whole = MicroBatchSampler(GlobalSampleOrder(num_samples, seed=seed), plan=plan, rank=rank)
    resumed = MicroBatchSampler(GlobalSampleOrder(num_samples, seed=seed), plan=plan, rank=rank, start_step=start_step)
    skipped = start_step * plan.accumulation
    assert list(itertools.islice(resumed, count)) == list(itertools.islice(whole, skipped, skipped + count))


def test_a_changed_batch_neither_repeats_nor_skips():
    order = GlobalSampleOrder(1000, seed=3)
    before = [i for step in range(4) for i in global_batch(order, BatchPlan(4, 2, 1, 2), step)]
    plan = BatchPlan(8, 2, 2, 2)
    samplers = [MicroBatchSampler(order, plan=plan, rank=rank, start_step=4, start_sample=16) for rank in range(2)]
    after = [i for step in (4, 5) for s in samplers for micro in range(2) for i in s.samples(step, micro)]
    assert before + after == [order[i] for i in range(32)]


def test_seed_and_epoch_change_the_order():
    first, second = GlobalSampleOrder(100, seed=0), GlobalSampleOrder(100, seed=1)
    orders = [[order[start + i] for i in range(100)] for order in (first, second) for start in (0, 100)]
    assert len({tuple(order) for order in orders}) == 4


def test_order_is_fixed_for_ever():
    order = GlobalSampleOrder(10, seed=7)
    assert [order[i] for i in range(20)] == GOLDEN, "a change here breaks the resumption of every existing run"


GOLDEN = [8, 4, 1, 6, 3, 2, 7, 5, 9, 0, 3, 9, 1, 6, 2, 5, 4, 8, 0, 7]


def test_order_does_not_use_the_global_random_state():
    np.random.seed(0)
    before = [GlobalSampleOrder(10, seed=3)[i] for i in range(10)]
    np.random.seed(1)
    assert [GlobalSampleOrder(10, seed=3)[i] for i in range(10)] == before


@pytest.mark.parametrize("rank", [-1, 2])
def test_rank_outside_the_plan(rank):
    with pytest.raises(ValueError, match="from 0 to 1"):
        MicroBatchSampler(GlobalSampleOrder(4, seed=0), plan=BatchPlan(4, 2, 1, 2), rank=rank)


def test_empty_dataset_and_negative_index():
    with pytest.raises(ValueError, match="at least 1"):
        GlobalSampleOrder(0, seed=0)
    with pytest.raises(IndexError, match="negative"):
        GlobalSampleOrder(3, seed=0)[-1]
