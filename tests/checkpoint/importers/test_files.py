"""Checkpoints that other programs' own code wrote become checkpoints of a run; no pickle is trusted unasked."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import toy
from support.foreign_model import TiedModel, trained
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, get_state_dict

from anemoi_dist.checkpoint.compare import differences
from anemoi_dist.checkpoint.export import export
from anemoi_dist.checkpoint.importers.run import Imported, import_checkpoint
from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.distributed.world import World
from anemoi_dist.errors import ConfigError, PreflightError
from anemoi_dist.optimizers import AdEMAMix
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.run.lock import owned

ADEMAMIX = ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")


def imported(source: Path, tmp_path: Path, **options: Any) -> tuple[Imported, dict[str, torch.Tensor]]:
    """Import into a new run; return what was said and every tensor as ``fqn:kind``."""
    result = import_checkpoint(source, RunDirectory(tmp_path / "run"), **options)
    checkpoint = Checkpoint(result.folder)
    checkpoint.verify()
    assert checkpoint.trainer()["progress"]["step"] == result.step == checkpoint.manifest.step
    tensors = {}
    for (fqn, kind), info in checkpoint.tensors().items():
        out = torch.empty(info.global_shape, dtype=info.dtype)
        checkpoint.read(fqn, kind, start=0, out=out.view(-1))
        tensors[f"{fqn}:{kind}"] = out
    return result, tensors


def expect(model: torch.nn.Module, optimizer: torch.optim.Optimizer, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Return parameters and the optimizer's states under the ``names`` of their kinds."""
    expected = {}
    for name, parameter in model.named_parameters():
        expected[f"{name}:param"] = parameter.detach()
        for kind, value in optimizer.state.get(parameter, {}).items():
            expected[f"{name}:{names.get(kind, kind)}"] = torch.as_tensor(value)
    return expected


def assert_holds(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for key, value in expected.items():
        assert torch.equal(tensors[key], value), key


# Plain files


@pytest.mark.parametrize("named", [False, True])
def test_plain_adamw_becomes_ademamix(tmp_path: Path, named: bool) -> None:
    model, adamw = trained(torch.optim.AdamW, named=named)
    torch.save({"model": model.state_dict(), "optimizer": adamw.state_dict()}, tmp_path / "plain.pt")
    result, tensors = imported(tmp_path / "plain.pt", tmp_path)
    assert result.format == "torch" and result.step == 3
    expected = expect(model, adamw, {"exp_avg": "exp_avg_fast"})
    assert_holds(tensors, expected)
    others = {key.partition(":")[0] for key in tensors} - {key.partition(":")[0] for key in expected}
    assert others == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert not any(key.endswith((":exp_avg", ":exp_avg_slow")) for key in tensors)
    assert "last.weight:param" not in tensors, "a tied weight has one name"
    assert "training.optimizer.schedule_start=3" in result.notes[0]


def test_adamw_stays_adamw_if_asked(tmp_path: Path) -> None:
    model, adamw = trained(torch.optim.AdamW)
    torch.save({"model": model.state_dict(), "optimizer": adamw.state_dict(), "step": 7}, tmp_path / "plain.pt")
    result, tensors = imported(tmp_path / "plain.pt", tmp_path, keep_adamw=True)
    assert_holds(tensors, expect(model, adamw, {}))
    assert result.step == 7 and result.notes == []


def test_a_bare_state_dictionary(tmp_path: Path) -> None:
    model = TiedModel().bfloat16()
    torch.save({f"module.{name}": t for name, t in model.state_dict().items()}, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="--step"):
        imported(tmp_path / "weights.pt", tmp_path)
    _, tensors = imported(tmp_path / "weights.pt", tmp_path, step=0, rename={"second": "third", "": "model"})
    assert tensors["third.weight:param"].dtype == torch.float32
    assert torch.equal(tensors["third.weight:param"], model.second.weight.float())
    assert "model.first.weight:param" in tensors and tensors["model.norm.num_batches_tracked:buffer"] == 0


def test_what_export_wrote_is_read_again(tmp_path: Path) -> None:
    model, ademamix = trained(AdEMAMix)
    torch.save({"model": model.state_dict(), "optimizer": ademamix.state_dict()}, tmp_path / "plain.pt")
    first, tensors = imported(tmp_path / "plain.pt", tmp_path)
    export(first_checkpoint := Checkpoint(first.folder), tmp_path / "out.pt", with_optimizer=True, force=False)
    again = import_checkpoint(tmp_path / "out.pt", RunDirectory(tmp_path / "again"))
    assert list(differences(first_checkpoint, Checkpoint(again.folder))) == []
    assert again.step == first.step == 3 and "second.weight:exp_avg_slow" in tensors


def test_an_optimizer_that_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    # Three vectors of one length, of which the optimizer has two; a state dictionary does not say which.
    model = torch.nn.LayerNorm(4)
    model.register_buffer("mask", torch.ones(4))
    adamw = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 4)).square().sum().backward()
    adamw.step()
    content = {"model": model.state_dict(), "optimizer": adamw.state_dict()}
    torch.save(content, tmp_path / "plain.pt")
    with pytest.raises(ConfigError, match="the shapes leave a choice"):
        imported(tmp_path / "plain.pt", tmp_path)
    _, tensors = imported(tmp_path / "plain.pt", tmp_path, weights_only=True, step=1)
    assert not any("exp_avg" in key for key in tensors)
    content["optimizer"]["param_groups"] *= 2
    torch.save(content, tmp_path / "groups.pt")
    with pytest.raises(ConfigError, match="several parameter groups"):
        imported(tmp_path / "groups.pt", tmp_path)


def test_renames_must_mean_something(tmp_path: Path) -> None:
    torch.save(TiedModel().state_dict(), tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"is the name of nothing in the source\n  nearest: first"):
        imported(tmp_path / "w.pt", tmp_path, step=0, rename={"frist": "x"})
    with pytest.raises(ConfigError, match="would be the name of both"):
        imported(tmp_path / "w.pt", tmp_path, step=0, rename={"first.weight": "second.weight"})


def test_a_run_that_is_further_or_running_is_left_alone(tmp_path: Path) -> None:
    torch.save(TiedModel().state_dict(), tmp_path / "w.pt")
    imported(tmp_path / "w.pt", tmp_path, step=10)
    for step in (9, 10):
        with pytest.raises(ConfigError, match=f"has a checkpoint of step 10, not before step {step}"):
            imported(tmp_path / "w.pt", tmp_path, step=step)
    with owned(RunDirectory(tmp_path / "run")), pytest.raises(PreflightError, match="is held by"):
        imported(tmp_path / "w.pt", tmp_path, step=11)
    imported(tmp_path / "w.pt", tmp_path, step=11)


# Pickles


class Bomb:
    """Runs something when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def lightning_file(path: Path, mark: Path, **parts: Any) -> Path:
    hyper_parameters = {"task": Bomb(mark), "data_indices": [Bomb(mark)]}
    content = {"state_dict": TiedModel().state_dict(), "global_step": 3, "hyper_parameters": hyper_parameters, **parts}
    torch.save({"pytorch-lightning_version": "2.6.0", **content}, path)
    return path


def test_objects_among_the_hyperparameters_of_lightning_are_left_where_they_are(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    weights = TiedModel().state_dict()
    result, tensors = imported(lightning_file(tmp_path / "last.ckpt", mark, state_dict=weights), tmp_path)
    assert (result.format, result.step) == ("lightning", 3) and not mark.exists()
    name, weight = next(iter(weights.items()))
    assert torch.equal(tensors[f"{name}:param"], weight)


@pytest.mark.parametrize("part", ["state_dict", "optimizer_states"])
def test_but_not_among_weights_and_states(tmp_path: Path, part: str) -> None:
    mark = tmp_path / "ran"
    held = {"state_dict": {"w": torch.ones(2), "v": Bomb(mark)}, "optimizer_states": [{"state": {0: Bomb(mark)}}]}
    with pytest.raises(ConfigError, match=r"it would run \w+\.mkdir(.|\n)*--trust-pickle"):
        imported(lightning_file(tmp_path / "last.ckpt", mark, **{part: held[part]}), tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_planted_pickle_is_refused_and_does_not_run(tmp_path: Path, legacy: bool) -> None:
    mark = tmp_path / "ran"
    content = {"model": TiedModel().state_dict(), "hyper_parameters": Bomb(mark), "step": 1}
    torch.save(content, tmp_path / "bad.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ConfigError, match=r"it would run \w+\.mkdir(.|\n)*--trust-pickle"):
        imported(tmp_path / "bad.pt", tmp_path)
    assert not mark.exists() and not (tmp_path / "run").exists()
    imported(tmp_path / "bad.pt", tmp_path, trust_pickle=True)
    assert mark.exists()


def test_a_planted_dcp_metadata_is_refused_and_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    source = tmp_path / "dcp"
    dcp.save({"model": TiedModel().state_dict()}, checkpoint_id=source)
    metadata = pickle.loads((source / ".metadata").read_bytes())
    metadata.storage_meta.modules = [Bomb(mark)]
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError, match=r"it would run posix\.mkdir"):
        imported(source, tmp_path, step=1)
    assert not mark.exists()


def test_a_planted_dcp_chunk_is_refused_and_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    source = tmp_path / "dcp"
    dcp.save({"model": {"w": torch.ones(3)}}, checkpoint_id=source)
    torch.save(Bomb(mark), source / "evil.distcp")
    metadata = pickle.loads((source / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path, place.offset = "evil.distcp", 0
        place.length = (source / "evil.distcp").stat().st_size
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    for trust in (False, True):  # a tensor needs no trust
        with pytest.raises(ConfigError, match=r"it would run posix\.mkdir"):
            imported(source, tmp_path, step=1, trust_pickle=trust)
    for place in metadata.storage_data.values():
        place.relative_path = "../plain.pt"
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    torch.save(torch.ones(3), tmp_path / "plain.pt")
    with pytest.raises(ConfigError, match="outside of the directory"):
        imported(source, tmp_path, step=1)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04garbage", b"\x80\x04garbage", b"U\x9b\xfa\xf8/3garbage"])
def test_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"SOURCE=.*bad\.pt"):
        imported(tmp_path / "bad.pt", tmp_path, step=1)
    (tmp_path / "d").mkdir()
    with pytest.raises(ConfigError, match="no DCP directory"):
        imported(tmp_path / "d", tmp_path, step=1)
    for metadata, said in ((content, r"SOURCE=.*metadata"), (pickle.dumps(None), "not laid out as a dcp checkpoint")):
        (tmp_path / "d" / ".metadata").write_bytes(metadata)
        with pytest.raises(ConfigError, match=said):
            imported(tmp_path / "d", tmp_path, step=1)


# DCP


@pytest.mark.parametrize("optimizer", [AdEMAMix, torch.optim.AdamW])
def test_dcp_of_one_process(tmp_path: Path, optimizer: type[torch.optim.Optimizer]) -> None:
    model, built = trained(optimizer)
    weights, states = get_state_dict(model, built)
    dcp.save({"model": weights, "optim": states}, checkpoint_id=tmp_path / "dcp")
    result, tensors = imported(tmp_path / "dcp", tmp_path)
    assert result.format == "dcp" and result.step == 3
    assert_holds(tensors, expect(model, built, {"exp_avg": "exp_avg_fast"}))
    assert torch.equal(tensors["norm.running_mean:buffer"], model.norm.running_mean)


class App:
    """A ``Stateful``, as torch's tutorial has it."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.parts = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        weights, states = get_state_dict(*self.parts)
        return {"model": weights, "optim": states, "epoch": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def test_dcp_of_a_stateful_application(tmp_path: Path) -> None:
    model, built = trained(AdEMAMix)
    dcp.save({"app": App(model, built)}, checkpoint_id=tmp_path / "dcp")
    _, tensors = imported(tmp_path / "dcp", tmp_path)
    assert_holds(tensors, expect(model, built, {}))


def save_dcp(world: World, folder: Path) -> list[Any]:
    config = toy.make_config("fsdp2")
    engine = toy.build(world, config)
    for step in range(3):
        engine.train_step(toy.micro_batches(config, world, step))
    state = {
        "model": get_model_state_dict(engine.module),
        "optim": get_optimizer_state_dict(engine.module, engine.optimizer),
    }
    dcp.save(state, checkpoint_id=folder)
    shards = toy.clone_shards(engine)
    engine.close()
    return shards


def load(world: World, engine: str, folder: Path) -> list[Any]:
    built = toy.build(world, toy.make_config(engine))
    source = Checkpoint(folder)
    built.load(source, num_updates=source.manifest.step)
    shards = toy.clone_shards(built)
    built.train_step(toy.micro_batches(toy.make_config(engine), world, 3))
    built.close()
    return shards


def test_dcp_of_fsdp2_ranks_loads_under_zero2(ranks, tmp_path: Path) -> None:
    written = toy.whole_tensors(ranks(2).run(save_dcp, tmp_path / "dcp"))
    result, _ = imported(tmp_path / "dcp", tmp_path)
    loaded = toy.whole_tensors(ranks(2).run(load, "zero2", result.folder))
    assert result.step == 3 and written.keys() == loaded.keys()
    assert_holds(loaded, written)


# DeepSpeed


def save_deepspeed(world: World, engine_name: str, folder: Path, training: dict[str, Any]) -> list[Any]:
    config = toy.make_config(engine_name, **training)
    engine = toy.build(world, config)
    for step in range(3):
        engine.train_step(toy.micro_batches(config, world, step))
    engine._engine.save_checkpoint(folder, tag="global_step3")
    shards = toy.clone_shards(engine)
    engine.close()
    return shards


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_deepspeed_partitions(ranks, tmp_path: Path, engine: str, precision: str) -> None:
    written = toy.whole_tensors(ranks(2).run(save_deepspeed, engine, tmp_path / "ds", {"precision": precision}))
    result, tensors = imported(tmp_path / "ds", tmp_path)
    assert result.format == engine and result.step == 3
    assert written.keys() == tensors.keys() and {key.partition(":")[2] for key in tensors} >= {*ADEMAMIX, "buffer"}
    assert_holds(tensors, {key: value.to(tensors[key].dtype) for key, value in written.items()})
    if precision == "fp32":
        loaded = toy.whole_tensors(ranks(2).run(load, "fsdp2", result.folder))
        assert_holds(loaded, written)


def test_deepspeed_with_adamw(ranks, tmp_path: Path) -> None:
    adamw = {"optimizer": {"_target_": "torch.optim.AdamW"}}
    written = toy.whole_tensors(ranks(2).run(save_deepspeed, "zero2", tmp_path / "ds", adamw))
    result, tensors = imported(tmp_path / "ds" / "global_step3", tmp_path)
    assert "schedule_start=3" in result.notes[0]
    assert torch.equal(tensors["model.head.weight:exp_avg_fast"], written["model.head.weight:exp_avg"])


def test_deepspeed_with_a_rank_missing(ranks, tmp_path: Path) -> None:
    ranks(2).run(save_deepspeed, "zero3", tmp_path / "ds", {})
    (tmp_path / "ds" / "global_step3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ConfigError, match="has the partitions of 1 ranks, saved were 2"):
        imported(tmp_path / "ds", tmp_path)
    (tmp_path / "ds" / "latest").write_text("../elsewhere")
    with pytest.raises(ConfigError, match="which is not in it"):
        imported(tmp_path / "ds", tmp_path)


@pytest.mark.parametrize("step", [-5, 10**30, True, 2.5, "7", math.nan, math.inf])
def test_a_step_that_is_none_is_refused_and_leaves_nothing(tmp_path: Path, step: Any) -> None:
    counter = {"step": torch.tensor(step)} if isinstance(step, float) else {}
    content = {"model": {"w": torch.ones(2)}, "optimizer": {"w": {**counter, "exp_avg": torch.ones(2)}}}
    torch.save(content if counter else {**content, "global_step": step}, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match="step"):
        imported(tmp_path / "x.pt", tmp_path)
    if isinstance(step, int):
        with pytest.raises(ConfigError, match=r"^--step"):
            imported(tmp_path / "x.pt", tmp_path, step=step)
    assert not (tmp_path / "run").exists()


UNFIT = {
    "meta": torch.ones(2, device="meta"),
    "sparse_coo": torch.ones(2).to_sparse(),
    "sparse_csr": torch.eye(2).to_sparse_csr(),
    "qint8": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "float8": torch.ones(2).to(torch.float8_e4m3fn),
    "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["weight", "state"])
@pytest.mark.parametrize("what", UNFIT)
def test_a_tensor_that_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path: Path, what: str, place: str) -> None:
    weights = {"v": torch.ones(2), "w": UNFIT[what] if place == "weight" else torch.ones(2)}
    states = {"w": {"exp_avg": UNFIT[what]}} if place == "state" else {}
    torch.save({"model": weights, "optimizer": states}, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match=f"{what}|cannot be read"):
        imported(tmp_path / "x.pt", tmp_path, step=1)
    assert not (tmp_path / "run").exists()


def test_a_dcp_of_other_sizes_than_its_files_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "dcp"
    dcp.save({"w": torch.arange(4.0)}, checkpoint_id=source)
    whole = (source / ".metadata").read_bytes()

    def refuse(change: Callable[[Any, Any], object], said: str) -> None:
        metadata = pickle.loads(whole)
        info = metadata.state_dict_metadata["w"]
        change(info, next(iter(metadata.storage_data.values())))
        (source / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(ConfigError, match=said):
            imported(source, tmp_path, step=1)
        assert not (tmp_path / "run").exists()

    refuse(lambda info, place: setattr(info, "size", torch.Size([2**45])), "larger than all the files")
    refuse(lambda info, place: setattr(info, "size", torch.Size([8])), "4 of 8 elements")
    refuse(lambda info, place: info.chunks.append(info.chunks[0]) or setattr(info, "size", torch.Size([8])), "4 of 8")
    refuse(lambda info, place: setattr(info.chunks[0], "offsets", torch.Size([2**62])), "no data at")
    refuse(lambda info, place: setattr(place, "offset", 2**70), "not laid out as a dcp")
    refuse(lambda info, place: setattr(info.chunks[0], "sizes", torch.Size([2**62])), "saved was")
    refuse(lambda info, place: setattr(place, "length", -3), "SOURCE")
