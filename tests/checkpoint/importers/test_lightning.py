"""A ``.ckpt`` that Lightning's own Trainer wrote of a ``BaseGraphModule`` goes on under our engines."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from support import toy
from support.quiet_lightning import quiet_trainer
from torch.utils.data import DataLoader

from anemoi_dist.checkpoint.importers.run import import_checkpoint
from anemoi_dist.checkpoint.reader import Checkpoint
from anemoi_dist.checkpoint.shard import Shard
from anemoi_dist.distributed.world import World
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.tasks.forecast.lightning import as_lightning

NUM_STEPS = 4


def fit_and_save(tmp_path: Path, **training: object) -> tuple[dict[str, torch.Tensor], Path]:
    """Train the toy with Lightning; return its tensors as ``fqn:kind`` and the file."""
    module = toy.make_module(toy.make_config("ddp", **training))
    trainer = quiet_trainer(max_steps=NUM_STEPS)
    batches = [toy.make_batch(step) for step in range(NUM_STEPS)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(as_lightning(module), DataLoader(batches, batch_size=None))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    (optimizer,) = trainer.optimizers
    expected = {f"{name}:param": p.detach() for name, p in module.named_parameters()}
    for name, parameter in module.named_parameters():
        for kind, state in optimizer.state.get(parameter, {}).items():
            expected[f"{name}:{kind}"] = state
    expected["model.num_calls:buffer"] = module.model.num_calls
    return expected, tmp_path / "last.ckpt"


def load(world: World, engine: str, folder: Path, training: dict) -> tuple[list[Shard], list[str], float, dict]:
    config = toy.make_config(engine, **training)
    built = toy.build(world, config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built.load(Checkpoint(folder), num_updates=NUM_STEPS)
    shards = toy.clone_shards(built)
    lr = built.train_step(toy.micro_batches(config, world, NUM_STEPS)).lr
    schedule = built.schedule_values()
    built.close()
    return shards, [str(w.message) for w in caught if "the checkpoint" in str(w.message)], lr, schedule


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_ademamix_of_lightning_goes_on(ranks, tmp_path: Path, engine: str) -> None:
    expected, file = fit_and_save(tmp_path)
    result = import_checkpoint(file, RunDirectory(tmp_path / "run"))
    assert result.format == "lightning" and result.step == NUM_STEPS and result.notes == []
    results = ranks(2).run(load, engine, result.folder, {})
    loaded = toy.whole_tensors([shards for shards, *_ in results])
    assert loaded.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(loaded[key], value), key
    _, notes, lr, _ = results[0]
    assert notes == [] and 1e-3 < lr < 0.02


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_adamw_of_lightning_becomes_ademamix(ranks, tmp_path: Path, engine: str) -> None:
    expected, file = fit_and_save(tmp_path, optimizer={"_target_": "torch.optim.AdamW"})
    result = import_checkpoint(file, RunDirectory(tmp_path / "run"))
    assert "training.optimizer.schedule_start=4" in result.notes[0]
    ademamix = {**toy.make_config("ddp").training.optimizer, "schedule_start": NUM_STEPS}
    results = ranks(2).run(load, engine, result.folder, {"optimizer": ademamix})
    loaded = toy.whole_tensors([shards for shards, *_ in results])
    for key, value in expected.items():
        ours = key.replace(":exp_avg", ":exp_avg_fast") if key.endswith(":exp_avg") else key
        assert torch.equal(loaded[ours], value), key
    assert not any(loaded[key].any() for key in loaded if key.endswith(":exp_avg_slow"))
    _, notes, _, schedule = results[0]
    assert notes == ["the checkpoint has no exp_avg_slow: they start at zero"]
    assert schedule["alpha"] == pytest.approx(5.0 * 1 / 30), "the first step of the warm-up, not the fifth"

    (_, notes, _, schedule), _ = ranks(2).run(load, engine, result.folder, {})
    assert schedule["alpha"] == pytest.approx(5.0 * 5 / 30)
    assert notes[0].endswith("set ++training.optimizer.schedule_start=4")
