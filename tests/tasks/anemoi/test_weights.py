"""A run begins with weights of anemoi-training's own checkpoint, of which nothing is run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from anemoi.models.data_indices.collection import IndexCollection
from hypothesis import given
from hypothesis import strategies as st
from support.anemoi import SMALL_GAPS, compose_small, train_theirs

from anemoi_dist.checkpoint.importers.pickles import load_tensors
from anemoi_dist.config.schema import Config
from anemoi_dist.distributed.world import World
from anemoi_dist.errors import ConfigError
from anemoi_dist.tasks import create_task
from anemoi_dist.tasks.anemoi.inspect import _count
from anemoi_dist.tasks.anemoi.weights import StartFile, are_mixed_up, check_start

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
    dropped = "dataloader.dataset={dataset:${system.input.dataset},drop:[sst,q_850]}"
    other = compose_small("config", dropped, NAME[-1], *start, "training.transfer_learning=true", root=tmp_path)
    with pytest.raises(
        AssertionError, match=r"only in the file: q_850 \(16\); in another place: tp \(17 in the file, 16"
    ):
        ranks(1).run(begin, other)
    with pytest.raises(ConfigError, match="only in the file: q_850"):  # and before any rank starts
        _count(other.task.settings, allowed=[])


places = st.dictionaries(st.sampled_from("abcde"), st.integers(0, 5))


@given(places, places)
def test_variables_are_compared_by_their_own_rule(saved: dict[str, int], own: dict[str, int]) -> None:
    logging.getLogger("anemoi.models.data_indices.collection").setLevel(logging.CRITICAL)
    try:
        IndexCollection.compare_variables(None, saved, own)
        refused = False
    except ValueError:
        refused = True
    assert are_mixed_up(saved, own) == refused


class Collection:
    """Pickled as anemoi-training's own is: by its class and its attributes."""

    def __init__(self, **places: int) -> None:
        self.name_to_index = places


def file_with(folder: Path, units: str | None = "K", **variables: int) -> StartFile:
    described = {"t": {"units": units, "mars": {"param": "t"}}} if units else None
    content = {
        "state_dict": {"model.w": torch.arange(3.0)},
        "hyper_parameters": {
            "data_indices": {"data": Collection(**variables)},
            "metadata": {"dataset": {"data": {"variables_metadata": described}}},
        },
    }
    torch.save(content, folder / "last.ckpt")
    return StartFile(folder / "last.ckpt")


def compared(file: StartFile, units: str = "K", **options: Any) -> list[str]:
    metadata = {"data": {"variables_metadata": {"t": {"units": units, "mars": {"param": "t"}}}}}
    settings = {"training": {"check_variables_compatibility": options}}
    return file.check_variables({"data": Collection(t=0)}, metadata, settings)


def test_variables_and_units_of_the_file_must_be_those_of_the_data(tmp_path: Path) -> None:
    assert compared(file_with(tmp_path, t=0)) == []
    assert compared(file_with(tmp_path, units=None, t=0)) == []
    with pytest.raises(
        ConfigError, match=r"other variables of data: in another place: t \(1 in the file, 0 in the data"
    ):
        compared(file_with(tmp_path, t=1))
    with pytest.raises(ConfigError, match=r"only in the file: q \(1\)\n.*rename and reorder in dataloader"):
        compared(file_with(tmp_path, t=0, q=1))
    with pytest.raises(ConfigError, match=r"(?s)units.*check_variables_compatibility.ignore_units"):
        compared(file_with(tmp_path, t=0), units="degC")
    assert compared(file_with(tmp_path, t=0), units="degC", ignore_units=True) == []
    # A variable of another name in the same place is theirs to allow, and told.
    (note,) = compared(file_with(tmp_path, units=None, temperature=0))
    assert "only in the file: temperature (0); only in the data: t (0)" in note


def test_a_file_without_variables_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.arange(3.0)}}, tmp_path / "last.ckpt")
    with pytest.raises(ConfigError, match="does not say which variables"):
        StartFile(tmp_path / "last.ckpt")
    with pytest.raises(ConfigError, match="does not say which variables"):
        file_with(tmp_path, t="first")  # type: ignore[arg-type]


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
