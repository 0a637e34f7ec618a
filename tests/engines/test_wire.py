"""Collectives of one optimizer step, and what makes the host wait for the device, counted."""

from __future__ import annotations

import math
from collections import Counter
from unittest import mock

import pytest
from support import toy
from torch.profiler import ProfilerActivity, profile

from anemoi_dist.distributed.world import World

#: Elements of gradients that are summed over the ranks in a step of four micro-batches, padding included: 236 a time.
#: A rank that keeps only its part of them cannot add up the micro-batches' before.
GRADIENTS = {"ddp": 236, "zero0": 236, "zero1": 236, "zero2": 4 * 236, "fsdp2": 4 * 266}
GRADIENTS |= {"zero3": 4 * 242, "zero3_offload": 4 * 242}
#: Sums of a few elements: the norm and the loss together; DDP's map of the parameters in use; DeepSpeed's own norm.
SMALL = {"ddp": {(2,): 1, (9,): 1}, "zero3_offload": {(2,): 1, (1,): 1}}
#: The parameters that each rank has stepped. Buffers are not among them.
BROADCASTS = {"zero1": {(118,): 2}, "zero2": {(118,): 2}}


def collectives(world: World, engine: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return name and shape of what each collective of the second step sends."""
    config = toy.make_config(engine, micro_batch_size=1)
    built = toy.build(world, config)
    built.train_step(toy.micro_batches(config, world, 0))
    batches = toy.micro_batches(config, world, 1)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        built.train_step(batches)
    built.close()
    events = [event for event in profiled.events() if event.name.startswith("gloo:")]
    return [(event.name.removeprefix("gloo:"), tuple(event.input_shapes[0])) for event in events]


@pytest.mark.parametrize("engine", toy.ENGINES)
def test_a_step_sends_what_it_has_to(ranks, engine: str) -> None:
    called = ranks(2).run(collectives, engine)[0]
    sums = [shape for name, shape in called if name == "all_reduce"]
    assert sum(math.prod(shape) for shape in sums if math.prod(shape) > 9) == GRADIENTS[engine]
    assert Counter(shape for shape in sums if math.prod(shape) <= 9) == SMALL.get(engine, {(2,): 1})
    assert Counter(shape for name, shape in called if name == "broadcast") == BROADCASTS.get(engine, {})


def synchronisations(world: World, engine: str) -> int:
    """Return how often DeepSpeed waits for the device in the third step; its timer begins after two."""
    from deepspeed.accelerator import get_accelerator

    config = toy.make_config(engine, micro_batch_size=1)
    built = toy.build(world, config)
    for step in range(2):
        built.train_step(toy.micro_batches(config, world, step))
    with mock.patch.object(type(get_accelerator()), "synchronize") as synchronize:
        built.train_step(toy.micro_batches(config, world, 2))
    built.close()
    return synchronize.call_count


@pytest.mark.parametrize("engine", [engine for engine in toy.ENGINES if engine.startswith("zero")])
def test_deepspeed_does_not_wait_for_the_device(ranks, engine: str) -> None:
    assert ranks(2).run(synchronisations, engine) == [0, 0]
