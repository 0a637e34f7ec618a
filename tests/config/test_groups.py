"""Groups of ranks that share a model or a sample, and the batches that follow from them."""

from __future__ import annotations

import pytest

from anemoi_dist.config.batch import plan_batches
from anemoi_dist.config.groups import GroupSizes, group_sizes
from anemoi_dist.config.schema import Config, TaskConfig, TrainingConfig
from anemoi_dist.config.tree import Tree, place
from anemoi_dist.data.sampler import GlobalSampleOrder, MicroBatchSampler
from anemoi_dist.errors import ConfigError

MODEL, ENSEMBLE, READER = (
    "system.hardware.num_gpus_per_model",
    "system.hardware.num_gpus_per_ensemble",
    "dataloader.read_group_size",
)
KEPT = "model.keep_batch_sharded"
ENCODER, FEATURES = "model.encoders.0.mapper._target_", "model.decoders.0.target_node_features"
GNN, GRAPH_TRANSFORMER = (f"anemoi.models.layers.mapper.{name}ForwardMapper" for name in ("GNN", "GraphTransformer"))
MEMBERS = "training.ensemble_size_per_device"
CRPS = {"training.method._target_": "anemoi.training.train.methods.EnsembleTraining"}


def settings(values: Tree) -> Tree:
    tree: Tree = {}
    for key, value in values.items():
        place(tree, key, value)
    return tree


def config(total: int, micro: int | None, values: Tree) -> Config:
    training = TrainingConfig(max_steps=1, global_batch_size=total, micro_batch_size=micro, optimizer={"_target_": "x"})
    return Config(training=training, task=TaskConfig(settings=settings(values)))


@pytest.mark.parametrize(
    ("values", "sizes"),
    [
        ({}, (1, 1, 1)),
        ({MODEL: 4, READER: 2}, (2, 4, 4)),
        ({MODEL: 2, READER: 2, KEPT: True, ENCODER: GNN, FEATURES: ["encoded_data"]}, (2, 2, 2)),
        ({MODEL: 2, KEPT: False, ENCODER: GNN, FEATURES: ["forcings"]}, (1, 2, 2)),
        ({MODEL: 2, KEPT: False, ENCODER: GRAPH_TRANSFORMER, FEATURES: ["encoded_data"]}, (1, 2, 2)),
        ({ENSEMBLE: 4}, (1, 1, 1)),
        ({**CRPS, ENSEMBLE: 4, MEMBERS: 2}, (1, 1, 4)),
        ({**CRPS, MODEL: 2, ENSEMBLE: 4, MEMBERS: 1}, (1, 2, 4)),
    ],
)
def test_sizes(values, sizes):
    assert group_sizes(settings(values)) == GroupSizes(*sizes)
    assert TaskConfig(settings=settings(values)).groups == GroupSizes(*sizes)


@pytest.mark.parametrize(
    ("values", "key", "fix"),
    [
        ({MODEL: 0}, MODEL, "=1"),
        ({MODEL: True}, MODEL, "=1"),
        ({MODEL: 4, READER: 3}, READER, "=4"),
        ({READER: 2}, READER, "=1"),
        ({MODEL: 4, READER: 2, KEPT: True}, READER, "=4"),
        ({MODEL: 2, KEPT: False, ENCODER: GNN, FEATURES: ["encoded_data"]}, KEPT, "=true"),
        ({**CRPS, MODEL: 2, ENSEMBLE: 3}, ENSEMBLE, "=2"),
        ({**CRPS, MODEL: 2, ENSEMBLE: 2, MEMBERS: 2}, MEMBERS, "=1"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(values, key, fix):
    with pytest.raises(ConfigError) as caught:
        group_sizes(settings(values))
    assert caught.value.key == key and f"task.overrides=[{key}{fix}]" == caught.value.fix


def test_the_global_batch_counts_groups():
    plan = plan_batches(config(6, None, {MODEL: 2}), world_size=4)
    assert (plan.num_shares, plan.micro_size, plan.accumulation, plan.group_size) == (2, 1, 3, 2)
    order = GlobalSampleOrder(12, seed=0)
    ranks = [MicroBatchSampler(order, plan=plan, rank=rank) for rank in range(4)]
    shares = [[sampler.samples(1, micro) for micro in range(3)] for sampler in ranks]
    assert shares[0] == shares[1] and shares[2] == shares[3]
    assert [index for share in shares[::2] for micro in share for index in micro] == [order[i] for i in range(6, 12)]


@pytest.mark.parametrize(
    ("total", "micro", "values", "key", "message"),
    [
        (4, None, {MODEL: 3}, MODEL, "must divide the 4 ranks"),
        (4, None, {**CRPS, ENSEMBLE: 3}, ENSEMBLE, "must divide the 4 ranks"),
        (3, None, {MODEL: 2}, "training.global_batch_size", "multiple of the 2 groups of 2 ranks"),
        (4, 2, {MODEL: 2}, "training.micro_batch_size", "must be 1 where 2 ranks share a model"),
    ],
)
def test_batches_that_do_not_fit_are_refused(total, micro, values, key, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plan_batches(config(total, micro, values), world_size=4)
    assert caught.value.key == key


def test_members_of_an_ensemble_share_a_sample_and_may_take_several_at_once():
    plan = plan_batches(config(4, 2, {**CRPS, ENSEMBLE: 2}), world_size=4)
    assert (plan.num_shares, plan.micro_size, plan.accumulation) == (2, 2, 1)
