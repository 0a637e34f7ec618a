"""What is promised before anyone queues is what every engine then holds, on 1, 2 and 4 ranks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from support import toy
from torch import nn

from anemoi_dist.checkpoint.staging import required_bytes
from anemoi_dist.data.batch import DataSpec
from anemoi_dist.distributed.world import World
from anemoi_dist.engines.memory_estimate import ModelSize, Parameter, expected_memory, state_bytes
from anemoi_dist.engines.sharded import local
from anemoi_dist.optimizers import create_optimizer

PRECISIONS = ("fp32", "bf16")
BUCKET = 30_000


class WideModel(nn.Module):
    """One matrix that ZeRO 3 does not keep gathered, and the odd sizes of :class:`toy.OddModel`."""

    def __init__(self, *, data: DataSpec) -> None:
        super().__init__()
        self.odd = toy.OddModel(data=data)
        self.wide = nn.Linear(331, 401)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.odd(x)
        return out + self.wide(out.new_ones(1, 331)).mean()


def make_config(engine: str, precision: str, **training: Any):
    config = toy.make_config(engine, precision=precision, weight_averaging={"decay": 0.9}, **training)
    config.model = {"_target_": f"{__name__}.WideModel"}
    config.security.allowed_targets = [__name__]
    if config.engine.kind == "deepspeed" and config.engine.stage:
        config.engine.options = {"zero_optimization": {"reduce_bucket_size": BUCKET}}
    return config


def size_of(module: nn.Module) -> ModelSize:
    return ModelSize([Parameter(tuple(p.shape), p.requires_grad) for p in module.parameters()])


def held_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes behind the tensors, each storage once."""
    storages = [local(tensor).untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure(world: World, name: str, precision: str, training: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train two steps and count the bytes behind the engine: of gradients when all are there and when they are read."""
    engine: Any = toy.build(world, make_config(name, precision, **(training or {})))
    measured: dict[str, Any] = {"staging": required_bytes(engine.shards()), "communication": 0, "update": 0}
    zero = engine._engine.optimizer if name in ("zero1", "zero2", "zero3", "zero3_offload") else None

    def gradients() -> list[torch.Tensor | None]:
        found = [parameter.grad for parameter in engine.module.parameters()]
        for attribute in ("averaged_gradients", "all_grad_tensors"):
            for tensors in (getattr(zero, attribute, None) or {}).values():
                found += tensors or []
        return [*found, getattr(zero, "grad_partitions_flat_buffer", None)]

    def before(owner: Any, method: str, look: Callable[[], None]) -> None:
        original = getattr(owner, method)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            look()
            return original(*args, **kwargs)

        setattr(owner, method, wrapped)

    def look_at_gradients() -> None:
        if name == "zero2":  # pieces of whole gradients, each once as averaged_gradients
            measured["gradients"] = sum(piece.nbytes for pieces in zero.averaged_gradients.values() for piece in pieces)
        else:
            measured["gradients"] = held_bytes(gradients())

    def look_at_buckets() -> None:
        buffers = [bucket.buffer for bucket in zero.ipg_buckets.values()]
        lists = [buffer if isinstance(buffer, list) else [buffer] for buffer in buffers]
        measured["communication"] = held_bytes(buffer for each in lists for buffer in each)

    def look_at_update() -> None:
        averaged = {g.untyped_storage().data_ptr() for g in gradients() if g is not None}
        own = [p.grad for group in engine.optimizer.param_groups for p in group["params"]]
        measured["update"] += sum(g.nbytes for g in own if g.untyped_storage().data_ptr() not in averaged)

    if name == "zero1":
        before(zero, "reduce_gradients", look_at_gradients)
    else:
        before(engine, "_update", look_at_gradients)
    if zero is not None:
        # Stages 1 and 2 let go of them when all is reduced.
        before(*((engine, "_update") if "zero3" in name else (zero, "reduce_ipg_grads")), look_at_buckets)
        before(engine.optimizer, "step", look_at_update)
    for step in range(2):
        measured["update"] = 0
        engine.train_step(toy.micro_batches(engine.config, world, step))
    measured["memory"] = engine.memory()
    engine.close()
    return measured


@pytest.mark.parametrize(
    ("num_ranks", "precision"),
    [
        *((num_ranks, precision) for num_ranks in (1, 2) for precision in PRECISIONS),
        (4, "fp32"),
        pytest.param(4, "bf16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("engine", toy.ENGINES)
def test_what_an_engine_holds(ranks, engine: str, num_ranks: int, precision: str) -> None:
    config = make_config(engine, precision)
    model = size_of(toy.make_module(config))
    for rank, measured in enumerate(ranks(num_ranks).run(measure, engine, precision)):
        expected = expected_memory(config, model, world_size=num_ranks, rank=rank)
        memory = measured["memory"]
        states = {kind: size for kind, size in memory.states.items() if kind != "step"}
        assert (expected.parameters, expected.master) == (memory.parameters, memory.master)
        assert expected.states == states
        unpadded = 4 * 2 * num_ranks if engine == "zero2" else 0
        assert expected.gradients - unpadded <= measured["gradients"] <= expected.gradients
        if engine in ("zero1", "zero2", "zero3", "zero3_offload"):
            assert expected.update == measured["update"]
            assert expected.communication == measured["communication"]
        # Each shard begins at a multiple of 16 bytes; pieces are equal to a few elements.
        num_shards = len(model.parameters) * (2 + len(states))
        padding = 16 * num_shards + 16 * num_ranks * len(model.parameters)
        assert measured["staging"] <= expected.staging + padding
        if rank == 0:
            assert expected.staging <= measured["staging"] + padding


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_other_optimizers_get_a_copy_of_narrow_gradients(ranks, engine: str, precision: str) -> None:
    training = {"optimizer": {"_target_": "torch.optim.AdamW"}}
    config = make_config(engine, precision, **training)
    expected = expected_memory(config, size_of(toy.make_module(config)), world_size=2)
    for measured in ranks(2).run(measure, engine, precision, training):
        assert measured["update"] == expected.update
        assert measured["memory"].master == expected.master


def test_a_state_for_every_element_of_every_known_optimizer() -> None:
    arguments: dict[str, dict[str, Any]] = {"AdamW": {"amsgrad": True}, "RMSprop": {"centered": True, "momentum": 0.9}}
    for name in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "ASGD", "RMSprop", "Rprop", "SGD"):
        for more in ({}, arguments.get(name, {}), {"momentum": 0.9} if name == "SGD" else {}):
            node = {"_target_": f"torch.optim.{name}", **more}
            assert state_bytes(node) == created_states(node), node
    ademamix = "anemoi_dist.optimizers.ademamix.AdEMAMix"
    for betas in ([0.9, 0.999, 0.9999], [0.0, 0.999, 0.9999]):
        node = {"_target_": ademamix, "betas": betas}
        assert state_bytes(node) == created_states(node)
    aliases = ("anemoi_dist.optimizers.AdEMAMix", "anemoi.training.optimizers.AdEMAMix.AdEMAMix")
    assert [len(state_bytes({"_target_": name}) or {}) for name in aliases] == [3, 3]
    assert state_bytes({"_target_": "torch.optim.adamw.AdamW"}) == {"exp_avg": 4, "exp_avg_sq": 4}
    for unknown in ("torch.optim.Adafactor", "mine.AdamW", None):
        assert state_bytes({"_target_": unknown}) is None


@pytest.mark.parametrize(
    ("state_dtype", "expected"),
    [
        ("fp32", (12, 8)),
        ("bf16", (8, 6)),
        ({"exp_avg_fast": "bf16"}, (10, 8)),
        ({"exp_avg_slow": "bf16", "exp_avg_sq": "fp32"}, (10, 6)),
        (dict.fromkeys(("exp_avg_fast", "exp_avg_slow", "exp_avg_sq"), "bf16"), (6, 4)),
    ],
)
def test_narrow_averages(state_dtype: Any, expected: tuple[int, int]) -> None:
    node = {"_target_": "anemoi_dist.optimizers.ademamix.AdEMAMix", "state_dtype": state_dtype}
    sizes = [state_bytes({**node, "betas": [beta, 0.999, 0.9999]}) or {} for beta in (0.9, 0.0)]
    assert tuple(sum(size.values()) for size in sizes) == expected


def created_states(node: dict[str, Any]) -> dict[str, int]:
    parameter = nn.Parameter(torch.ones(10, 10))
    optimizer = create_optimizer(node, [parameter], lr=1e-3)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter].items()
    return {name: x.nbytes // 100 for name, x in state if isinstance(x, torch.Tensor) and x.numel() == 100}


def test_offload_moves_what_the_optimizer_needs_to_the_host() -> None:
    model = ModelSize([Parameter((1000, 1000))], buffer_bytes=7)
    on_device, offloaded = (
        expected_memory(toy.make_config(engine), model, world_size=4) for engine in ("zero3", "zero3_offload")
    )
    assert offloaded.movable >= (4 + 12 + 4) * 250_000
    assert offloaded.host == offloaded.staging + offloaded.movable
    assert offloaded.device == offloaded.parameters + offloaded.communication + 7
    assert on_device.device == on_device.parameters + on_device.communication + 7 + on_device.movable
    assert on_device.host == on_device.staging == 16 * 250_000


def test_without_asynchronous_checkpoints_nothing_is_staged() -> None:
    config = toy.make_config("zero2")
    config.checkpoint.asynchronous = False
    assert expected_memory(config, ModelSize([Parameter((9,))]), world_size=2).host == 0


@pytest.mark.parametrize("engine", toy.ENGINES)
def test_more_ranks_hold_less_or_the_same_each(engine: str) -> None:
    model = ModelSize([Parameter((4096, 4097)), Parameter((33,)), Parameter((5, 7), trained=False)])
    sizes = [expected_memory(toy.make_config(engine), model, world_size=2**n).device for n in range(11)]
    assert sizes == sorted(sizes, reverse=True)
    states = sum(expected_memory(toy.make_config(engine), model, world_size=64).states.values())
    whole = 12 * sum(p.numel for p in model.parameters if p.trained)
    share = whole / (64 if engine in toy.SHARDED else 1)
    assert math.isclose(states, share, rel_tol=0.01)
    assert dataclasses.asdict(model)["buffer_bytes"] == 0
