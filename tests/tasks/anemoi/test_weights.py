"""A run begins with weights of anemoi-training's own checkpoint, of which nothing is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.anemoi import SMALL_GAPS, compose_small, train_theirs

from anemoi_dist.checkpoint.importers.pickles import load_tensors
from anemoi_dist.config.schema import Config
from anemoi_dist.distributed.world import World
from anemoi_dist.errors import ConfigError
from anemoi_dist.tasks import create_task
from anemoi_dist.tasks.anemoi.weights import check_start

NAME = ("config", SMALL_GAPS, "graph.nodes.hidden.node_builder.resolution=1")


def begin(world: World, config: Config) -> tuple[list[str], dict[str, torch.Tensor], list[str]]:
    task = create_task(config)
    module = task.create_module(world_size=1)
    notes = task.load_initial(module)
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    return notes, {name: p.detach().clone() for name, p in module.named_parameters()}, frozen


@pytest.mark.slow
def test_weights_of_their_checkpoint_are_loaded_without_running_it(ranks, tmp_path: Path) -> None:
    batches = ("training.max_steps=2", "dataloader.limit_batches.training=2")
    theirs = compose_small(*NAME, *batches, root=tmp_path)
    (trained,) = ranks(1).run(train_theirs, theirs, None, tmp_path / "last.ckpt")
    start = (f"system.input.warm_start={tmp_path / 'last.ckpt'}", "training.load_weights_only=true")
    config = compose_small(*NAME, *start, "training.submodules_to_freeze=[processor]", root=tmp_path)
    ((notes, parameters, frozen),) = ranks(1).run(begin, config)
    for name, value in trained["parameters"].items():
        assert torch.equal(parameters[name], value), name
    assert "tensors of the model are loaded" in notes[0] and len(notes) <= 2
    assert frozen and all(name.startswith("method.model.model.processor.") for name in frozen)
    wider = compose_small(*NAME, *start, "model.num_channels=16", root=tmp_path)
    with pytest.raises(AssertionError, match="transfer_learning=true leaves out"):
        ranks(1).run(begin, wider)
    wider = compose_small(*NAME, *start, "model.num_channels=16", "training.transfer_learning=true", root=tmp_path)
    ((notes, _, _),) = ranks(1).run(begin, wider)
    assert "of another shape: model.model" in notes[1]


class Evil:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.victim,)


def test_whatever_else_is_in_the_file_is_not_built(tmp_path: Path) -> None:
    content = {"state_dict": {"w": torch.arange(3.0)}, "hyper_parameters": Evil(tmp_path / "victim"), "more": {1: {2}}}
    torch.save(content, tmp_path / "last.ckpt")
    loaded = load_tensors(tmp_path / "last.ckpt")
    assert torch.equal(loaded["state_dict"]["w"], torch.arange(3.0))
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    ("warm_start", "training", "rule"),
    [
        (None, {"load_weights_only": True}, "needs a file"),
        (None, {"transfer_learning": True}, "needs a file"),
        (__file__, {}, "(?s)the weights alone.*checkpoint import"),
        ("/nowhere.ckpt", {"load_weights_only": True}, "is no file"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(warm_start: Any, training: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        check_start({"system": {"input": {"warm_start": warm_start}}, "training": training})
