"""Forecasts of a trained model, against what its engine computes in an evaluation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray
from support.anemoi import steps_of
from support.saving import save

import anemoi_dist
from anemoi_dist.checkpoint.store import open_store
from anemoi_dist.config.compose import compose
from anemoi_dist.config.parse import to_yaml
from anemoi_dist.config.schema import Config
from anemoi_dist.distributed.world import World
from anemoi_dist.engines.registry import create_engine
from anemoi_dist.errors import CheckpointError, ConfigError
from anemoi_dist.launch.cli import main
from anemoi_dist.run.directory import RunDirectory
from anemoi_dist.tasks import create_task
from anemoi_dist.tasks.forecast.output import to_xarray, write_netcdf

LEADS, STEPS = 3, 2


def make_config(root: Path, *overrides: str) -> Config:
    small = ("data=synthetic", "data.dataset.field_shape=[6,12]", "training.global_batch_size=4", "launcher.ranks=2")
    model = ("model.dilations=[1]", "model.hidden_channels=8")
    lengths = (f"training.max_steps={STEPS}", f"validation.lead_steps=[{LEADS}]", f"run.root={root}", "run.id=r")
    return compose([*small, *model, *lengths, *overrides]).config


def train(world: World, config: Config, run: RunDirectory) -> tuple[int, np.ndarray]:
    """Train and save; return date and forecast, in physical units, of a sample of the validation split."""
    task = create_task(config)
    engine = create_engine(task.create_module(world_size=world.world_size), config=config, world=world)
    for step, batches in steps_of(task, config, world):
        engine.train_step(batches)
        save(open_store(run, None), engine.shards(), world=world, step=step + 1)
    sample = task.collate([task.samples("validation")[1]])
    with engine.averaged_weights():
        predicted = engine.evaluate(sample, rollout=LEADS)
    engine.close()
    return int(sample.dates), predicted[0, :, 0].numpy()


ROWS = [("zero2",), ("fsdp2", "training.weight_averaging.decay=0.5")]
#: For what does not depend on how the model was trained.
ONE = pytest.mark.parametrize("trained", ROWS[:1], ids=["zero2"], indirect=True)


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row[0])
def trained(request, ranks, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    engine, *overrides = request.param
    config, run = make_config(root, f"engine={engine}", *overrides), RunDirectory(root / "r")
    run.create()
    run.config_file.write_text(to_yaml(config))
    return run, *ranks(2).run(train, config, run)[0]


def test_a_forecast_is_what_validation_scores(trained) -> None:
    run, date_s, expected = trained
    model = anemoi_dist.load_run(run.path)
    assert model.step == STEPS
    start = str(np.datetime64(date_s, "s"))
    forecast = model.forecast(start, LEADS)
    for number, name in enumerate(("wave_0", "wave_1")):
        values = forecast[name].values.reshape(LEADS, -1)
        np.testing.assert_allclose(values, expected[..., number], rtol=1e-5)
    hours = np.arange(1, LEADS + 1) * np.timedelta64(6, "h")
    np.testing.assert_array_equal(forecast.time, np.datetime64(date_s, "s") + hours)
    assert forecast.sizes == {"time": LEADS, "latitude": 6, "longitude": 12}
    object.__setattr__(model.fields, "variables_metadata", {"wave_0": {"units": "K"}, "wave_1": {}})
    described = model.forecast(start, 1)
    assert described.wave_0.attrs["units"] == "K" and "units" not in described.wave_1.attrs
    earlier = anemoi_dist.load_run(run.path, step=1)
    assert earlier.step == 1 and not np.allclose(earlier.forecast(start, 1).wave_0, forecast.wave_0[:1], rtol=1e-6)


def test_the_command_writes_what_xarray_reads(trained, tmp_path: Path, capsys) -> None:
    run, date_s, expected = trained
    out, start = tmp_path / "f.nc", str(np.datetime64(date_s, "s"))
    words = ["forecast", str(run.path), "--start", start, "--steps", str(LEADS), "-o", str(out)]
    assert main(words) == 0
    assert "wave_0, wave_1, valid 2000-" in capsys.readouterr().out
    with xarray.open_dataset(out) as forecast:
        np.testing.assert_allclose(forecast.wave_1.values.reshape(LEADS, -1), expected[..., 1], rtol=1e-5)
        assert forecast.attrs["Conventions"] == "CF-1.10" and "run r, step 2" in forecast.attrs["source"]
        np.testing.assert_array_equal(forecast.forecast_period, [6, 12, 18])
    assert main(words) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--start": "yesterday"}, "--start='yesterday': is not a date"),
        ({"--start": "1999-01-01"}, "is not a date of the dataset"),
        ({"--steps": "0"}, "--steps=0: must be at least 1"),
        ({"--checkpoint": "7"}, "is not a checkpoint of the run"),
        ({"-o": "f.zarr"}, "must be a netCDF file"),
        ({"-o": "nowhere/f.nc"}, "is no directory"),
    ],
    ids=["date", "early", "steps", "checkpoint", "suffix", "folder"],
)
@ONE
def test_a_wrong_word_is_one_error(trained, tmp_path: Path, monkeypatch, capsys, change, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    words = {"--start": "2000-08-10", "--steps": "1", "-o": "f.nc"} | change
    assert main(["forecast", str(trained[0].path), *(word for pair in words.items() for word in pair)]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_that_has_saved_nothing_or_trains_another_task(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run"):
        anemoi_dist.load_run(tmp_path)
    run = RunDirectory(tmp_path / "r")
    run.create()
    config = make_config(tmp_path)
    run.config_file.write_text(to_yaml(config))
    with pytest.raises(CheckpointError, match="has not saved a checkpoint"):
        anemoi_dist.load_run(run.path)
    config.task.kind = "anemoi"
    run.config_file.write_text(to_yaml(config))
    with pytest.raises(ConfigError, match="--to inference"):
        anemoi_dist.load_run(run.path)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, anemoi_dist as a; assert 'torch' not in sys.modules; a.load_run; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = anemoi_dist.no_such_name


@ONE
def test_members_and_grids_without_rows(trained, tmp_path: Path) -> None:
    spec = anemoi_dist.load_run(trained[0].path).module.spec
    cells = type(spec)(**{**spec.__dict__, "field_shape": (72,), "variables": ("msl", "t_850")})
    values = torch.rand(2, 3, 72, 2).numpy()
    made = to_xarray(values, spec=cells, start=np.datetime64("2020-01-01"), units={"msl": "Pa"}, source="a test")
    write_netcdf(made, tmp_path / "f.nc")
    with xarray.open_dataset(tmp_path / "f.nc") as read:
        assert read.msl.dims == ("time", "realization", "cell") and read.latitude.dims == ("cell",)
        np.testing.assert_array_equal(read.t_850, values[..., 1])
        assert read.msl.attrs["standard_name"] == "air_pressure_at_mean_sea_level" and read.msl.attrs["units"] == "Pa"
        assert read.t_850.attrs["long_name"] == "t at level 850"
        assert "_FillValue" not in read.time.encoding
