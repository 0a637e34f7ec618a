"""anemoi-inference forecasts with what was trained here."""

from __future__ import annotations

import datetime
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from support import toy
from support.anemoi import PROCESSED, compose_small, steps_of
from support.saving import save

from anemoi_dist.checkpoint.manifest import Manifest
from anemoi_dist.checkpoint.store import LocalStore
from anemoi_dist.checkpoint.verified import SavedCheckpoint
from anemoi_dist.checkpoint.weights import load_weights
from anemoi_dist.config.parse import to_yaml
from anemoi_dist.config.schema import Config
from anemoi_dist.distributed.world import World
from anemoi_dist.engines.registry import create_engine
from anemoi_dist.errors import ConfigError
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.tasks import create_task
from anemoi_dist.tasks.anemoi.inference import _metadata, _write, export_inference
from anemoi_dist.tasks.anemoi.kept import KeptFiles
from anemoi_dist.tasks.anemoi.module import PREFIX

LEADS = 4
#: anemoi-inference computes these itself, and those of the small dataset are made up.
COMPUTED = "insolation,cos_julian_day,sin_julian_day,cos_local_time,sin_local_time"
PLACES = "lsm,cos_latitude,cos_longitude,sin_latitude,sin_longitude"
GIVEN = (
    f"dataloader.dataset={{dataset:${{system.input.dataset}},drop:[sst,{COMPUTED}]}}",
    f"data.datasets.data.forcing=[z,{PLACES}]",
    f"data.datasets.data.processors.normalizer.config.none=[{PLACES}]",
)


def train(world: World, config: Config, folder: Path) -> None:
    task = create_task(config)
    engine = create_engine(task.create_module(world_size=world.world_size), config=config, world=world)
    for _, micro_batches in steps_of(task, config, world):
        engine.train_step(micro_batches)
    trainer = {"task": task.state_dict()}
    save(LocalStore(folder), engine.shards(), world=world, step=config.training.max_steps, trainer=trainer)
    engine.close()


def own_forecast(config: Config, checkpoint: SavedCheckpoint) -> tuple[np.datetime64, dict[str, Any]]:
    """The first validation sample, and the trained module's forecast of it by variable: shape (lead, grid)."""
    task = create_task(config)
    method = task.create_module(world_size=1).method
    load_weights(method, checkpoint, averaged=False, prefix=PREFIX)
    method.eval()
    samples = task.samples("validation")
    fields = method.on_after_batch_transfer(dict(task.collate([samples.read(0, step=0)]).fields), 0)
    with torch.no_grad():
        predictions = method._step(fields, validation_mode=True).predictions
    physical = [method.model.post_processors["data"](p["data"], in_place=False)[0, 0, 0] for p in predictions]
    names = method.data_indices["data"].model.output.name_to_index
    position = samples._dataset.anchors[0][1]
    date = samples._dataset.data_readers["data"].data.dates[position]
    return date, {name: torch.stack([p[:, index] for p in physical]).numpy() for name, index in names.items()}


@pytest.mark.slow
def test_the_runner_of_anemoi_inference_forecasts_what_the_module_forecasts(ranks, tmp_path: Path) -> None:
    from anemoi.inference.config.run import RunConfiguration
    from anemoi.inference.runners import create_runner

    processed = [override for override in PROCESSED if "processors.imputer" not in override]
    overrides = (*processed, *GIVEN, "training.max_steps=3", f"task.validation_rollout={LEADS}")
    config = compose_small("config", *overrides, root=tmp_path, ranks=2, ours=("engine=zero2",))
    run = RunDirectory(tmp_path / "run")
    run.create()
    run.config_file.write_text(to_yaml(config))
    ranks(2).run(train, config, run.checkpoints_dir)
    checkpoint = SavedCheckpoint(run.checkpoints_dir / "step-00000003")
    files = KeptFiles(run, config)
    files.update(saved=3)
    files.wait()
    assert files.messages() == []
    out = run.inference_dir / "step-00000003.ckpt"
    date, expected = own_forecast(config, checkpoint)
    begin = str(date.astype("datetime64[s]")) if isinstance(date, np.datetime64) else date.isoformat()
    asked = {
        "checkpoint": str(out),
        "date": begin,
        "lead_time": f"{6 * LEADS}h",
        "device": "cpu",
        "input": {"dataset": str(tmp_path / "small.zarr")},
        "output": {"raw": {"dir": str(tmp_path / "raw")}},
        "allow_nans": True,
    }
    runner = create_runner(RunConfiguration.load(asked))
    runner.execute()
    for lead in range(LEADS):
        at = datetime.datetime.fromisoformat(begin) + datetime.timedelta(hours=6 * (lead + 1))
        found = np.load(tmp_path / "raw" / f"{at:%Y%m%d%H%M%S}.npz")
        for name, forecast in expected.items():
            np.testing.assert_allclose(found[f"field_{name}"], forecast[lead], rtol=1e-5, err_msg=name)
    metadata = runner.checkpoint
    assert metadata.timestep == datetime.timedelta(hours=6)
    assert (metadata.precision, len(metadata.lagged)) == ("32", 2)
    said = metadata._metadata._metadata["anemoi_dist"]
    assert (said["run_id"], said["step"]) == (config.run.id, 3)


class Layer(torch.nn.Module):
    """A layer that keeps its own node of the configuration, as some of anemoi-models do."""

    def __init__(self, node: DictConfig) -> None:
        super().__init__()
        self.node, self.supporting_arrays = node, {}


def test_a_model_takes_no_more_of_the_configuration_than_its_own_node(tmp_path: Path) -> None:
    settings = OmegaConf.create({"store": {"path": "elsewhere"}, "layer": {"size": 3, "token": "t0p"}})
    _write(Layer(settings.layer), tmp_path / "a.ckpt", metadata={})
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    assert b"elsewhere" not in content and b"t0p" not in content
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert loaded.node == {"size": 3, "token": "***"}


def test_metadata_hold_no_secrets() -> None:
    config = toy.make_config("ddp", precision="bf16")
    config.task.steps_per_epoch = 5
    metadata = {"config": {"training": {}, "dataset": {"secret": "s3cret", "url": "https://me:word@host/a"}}}
    said = {"save_id": "s", "engine": "ddp", "config_hash": "0", "versions": {}}
    manifest = Manifest(step=12, samples_seen=0, world_size=1, files={}, tensors=[], **said)
    made = _metadata(metadata, config, manifest)
    assert made["config"]["dataset"] == {"secret": "***", "url": "https://***@host/a"}
    assert made["config"]["training"]["precision"] == "bf16-mixed"
    assert made["training"] == {"current_epoch": 2, "global_step": 12}


def test_only_a_run_of_this_task_has_such_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a run of task=anemoi"):
        export_inference(None, tmp_path / "a.ckpt", config=toy.make_config("ddp"))  # type: ignore[arg-type]
