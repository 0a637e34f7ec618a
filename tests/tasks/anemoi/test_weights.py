"""A run begins with weights of anemoi-training's own checkpoint, of which nothing is run."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anemoi.models.data_indices.collection import IndexCollection
from hypothesis import given
from hypothesis import strategies as st
from support.anemoi import SMALL_GAPS, compose_small, steps_of, train_theirs

from anemoi_dist.checkpoint.importers.pickles import load_tensors
from anemoi_dist.checkpoint.importers.run import import_checkpoint
from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.config.schema import Config
from anemoi_dist.distributed.world import World
from anemoi_dist.engines.registry import create_engine
from anemoi_dist.errors import ConfigError
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.tasks import create_task
from anemoi_dist.tasks.anemoi.inspect import _count
from anemoi_dist.tasks.anemoi.weights import StartFile, are_mixed_up, check_start, load_start
from anemoi_dist.tasks.base import Start

NAME = ("config", SMALL_GAPS, "graph.nodes.hidden.node_builder.resolution=1")


def begin(world: World, config: Config) -> tuple[list[str], dict[str, torch.Tensor], list[str]]:
    task = create_task(config)
    module = task.create_module(world_size=1)
    notes = list(task.load_initial(module).notes)
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
    result = import_checkpoint(tmp_path / "last.ckpt", RunDirectory(tmp_path / "run"), rename={"": "method"})
    source = Checkpoint(result.folder)
    assert result.step == 2 and {kind for _, kind in source.tensors()} >= {"exp_avg_fast", "exp_avg_sq", "step"}
    for name, value in trained["parameters"].items():
        read = torch.empty(value.numel())
        source.read(name, "param", start=0, out=read)
        assert torch.equal(read, value.reshape(-1)), name
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


#: Epochs of two steps, at whose ends the rollout grows.
EPOCHS = (
    "dataloader.limit_batches.training=2",
    "training.optimization.lr_scheduler.t_initial=8",
    "task.rollout={start:1,epoch_increment:1,maximum:3}",
)


def go_on(world: World, config: Config) -> dict[str, Any]:
    """Train from where the file has left off."""
    task = create_task(config)
    module = task.create_module(world_size=world.world_size)
    start = task.load_initial(module)
    engine = create_engine(module, config=config, world=world)
    task.load_state_dict(start.task)
    engine.load(start.source, num_updates=start.step)
    steps = steps_of(task, config, world, start=start.step)
    losses = [engine.train_step(micro_batches).loss for _, micro_batches in steps]
    parameters = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    rollout = task.state_dict()
    engine.close()
    return {"notes": start.notes, "losses": losses, "parameters": parameters, "rollout": rollout}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "ademamix"])
def test_a_run_of_theirs_goes_on_here_with_the_same_numbers(ranks, tmp_path: Path, optimizer: str) -> None:
    given = (*NAME, *EPOCHS, f"training/optimization/optimizer={optimizer}")
    straight = ranks(2).run(train_theirs, compose_small(*given, "training.max_steps=8", root=tmp_path, ranks=2))
    half = compose_small(*given, "training.max_steps=4", root=tmp_path, ranks=2)
    ranks(2).run(train_theirs, half, None, tmp_path / "last.ckpt")
    start = ("training.max_steps=8", f"system.input.warm_start={tmp_path / 'last.ckpt'}")
    config = compose_small(*given, *start, root=tmp_path, ranks=2)
    results = ranks(2).run(go_on, config)
    assert results[0]["notes"] == [f"goes on at step 4 of {tmp_path / 'last.ckpt'}, with the states of its optimizer"]
    expected = np.mean([rank["losses"] for rank in straight], axis=0)[4:]
    assert results[0]["losses"] == pytest.approx(expected.tolist(), rel=1e-6)
    for name, value in straight[0]["parameters"].items():
        torch.testing.assert_close(results[0]["parameters"][name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert results[0]["rollout"]["runtime"]["rollout"]["step"] == 3


class Method(torch.nn.Module):
    """Of a training method what going on needs."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(3))
        self.data_indices = {"data": Collection(t=0)}
        self.task = SimpleNamespace(training_runtime_state_dict=lambda: {"rollout": 2})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        pass


def begun(folder: Path, *, ended: int = 2, **parts: Any) -> Start:
    """Go on from a file of step 4 in a configuration with epochs of two steps."""
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]}
    saved = {
        "state_dict": {"w": torch.arange(3.0)},
        "global_step": 4,
        "optimizer_states": [optimizer],
        "loops": {"fit_loop": {"epoch_progress": {"current": {"processed": ended}}}},
        "hyper_parameters": {"data_indices": {"data": Collection(t=0)}},
        **parts,
    }
    torch.save(saved, folder / "last.ckpt")
    settings = {"system": {"input": {"warm_start": str(folder / "last.ckpt")}}, "training": {}}
    return load_start(Method(), settings, metadata={}, steps_per_epoch=2)


@pytest.mark.parametrize(("ended", "counted", "num_notes"), [(2, 2, 1), (1, 1, 1), (3, 2, 2), (0, 2, 2)])
def test_epochs_count_on_from_the_file(tmp_path: Path, ended: int, counted: int, num_notes: int) -> None:
    start = begun(tmp_path, ended=ended)
    assert (start.step, start.task) == (4, {"epochs": counted, "runtime": {"rollout": 2}})
    assert len(start.notes) == num_notes and start.source is not None
    assert {key: info.global_shape for key, info in start.source.tensors().items()} == {
        ("method.w", "param"): (3,),
        ("method.w", "exp_avg"): (3,),
    }


@pytest.mark.parametrize(
    ("parts", "rule"),
    [
        ({"optimizer_states": []}, "holds no global_step with the states of one optimizer"),
        ({"global_step": None}, "holds no global_step with the states of one optimizer"),
        ({"current_model_state": {}}, "holds an average of the weights, which is not continued"),
        ({"optimizer_states": [{"state": {}, "param_groups": [{"params": [0, 1]}]}]}, "of 2 parameters, and 1 are"),
    ],
)
def test_a_file_that_cannot_be_continued_is_one_error(tmp_path: Path, parts: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        begun(tmp_path, **parts)


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
        (__file__, {"transfer_learning": True}, "has no effect without training.load_weights_only"),
        ("/nowhere.ckpt", {}, "is no file"),
        ("/nowhere.ckpt", {"load_weights_only": True}, "is no file"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(warm_start: Any, training: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        check_start({"system": {"input": {"warm_start": warm_start}}, "training": training})
