"""anemoi-models behind our interface; skipped where the extra ``anemoi`` is not installed."""

import copy
import sys
from importlib.resources import files

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from anemoi_dist.config.compose import compose
from anemoi_dist.data.anemoi import open_split
from anemoi_dist.data.batch import Batch, DataSpec
from anemoi_dist.errors import ConfigError
from anemoi_dist.models.graph_transformer import AnemoiModel
from anemoi_dist.tasks.forecast.module import BaseGraphModule

NODE = files("anemoi_dist.configs") / "model" / "anemoi_graph_transformer.yaml"


def make_spec(rows: int = 13, columns: int = 24) -> DataSpec:
    latitudes, longitudes = np.meshgrid(np.linspace(90, -90, rows), np.arange(columns) * 360 / columns, indexing="ij")
    return DataSpec(
        variables=("cos_latitude", "t", "u"),
        forcing=("cos_latitude",),
        latitudes=latitudes.ravel(),
        longitudes=longitudes.ravel(),
        field_shape=(rows, columns),
        mean=np.zeros(3),
        stdev=np.ones(3),
        tendency_stdev=np.ones(3),
        multistep_input=2,
        frequency_s=21600,
    )


def make_node() -> dict:
    node = OmegaConf.to_container(OmegaConf.create(NODE.read_text()))
    node.pop("_target_")
    node["graph"]["nodes"]["hidden"]["node_builder"]["resolution"] = 2
    return node


@pytest.fixture
def extra() -> None:
    pytest.importorskip("anemoi.models")
    pytest.importorskip("anemoi.graphs")


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "anemoi.models", None)
    with pytest.raises(ConfigError, match=r"anemoi-dist\[anemoi\]"):
        AnemoiModel(make_spec(), **make_node())


@pytest.mark.usefixtures("extra")
def test_shapes_and_start_at_persistence():
    model = AnemoiModel(make_spec(), **make_node())
    tendency = model(torch.randn(2, 2, 1, 13 * 24, 3))
    assert tendency.shape == (2, 1, 13 * 24, 2)
    assert torch.equal(tendency, torch.zeros_like(tendency))


@pytest.mark.usefixtures("extra")
def test_learns_a_tendency_in_float32_and_runs_in_bfloat16():
    torch.manual_seed(0)
    model = AnemoiModel(make_spec(), **make_node())
    x = torch.randn(2, 2, 1, 13 * 24, 3)
    truth = x[:, 1, ..., 1:] - x[:, 0, ..., 1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (model(x) - truth).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    low = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), model(x), atol=0.15, rtol=0.1)


@pytest.mark.usefixtures("extra")
@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("graph.nodes.hidden.node_builder._target_", "os.system", "os.system"),
        ("network.encoder.layer_kernels", {"Linear": {"_target_": "subprocess.run"}}, "subprocess.run"),
        ("network.residual", {"_target_": "torch.nn.Identity"}, "forecasts the tendency"),
        ("graph.nodes.data", {}, "filled in from the dataset"),
    ],
)
def test_refuses(path, value, message):
    node = OmegaConf.create(make_node())
    OmegaConf.update(node, path, value, force_add=True)
    with pytest.raises(ConfigError, match=message):
        AnemoiModel(make_spec(), **OmegaConf.to_container(node))


@pytest.mark.usefixtures("extra")
def test_trains_on_the_sample_from_the_shipped_configuration():
    config = compose(["model=anemoi_graph_transformer", "training.max_steps=12", "training.lr.warmup=2"]).config
    dataset = open_split(config.data, "train", rollout=1)
    torch.manual_seed(0)
    module = BaseGraphModule(config, spec=dataset.spec())
    optimizer = module.configure_optimizers()["optimizer"]
    losses = []
    for step in range(12):
        batch = Batch(*(torch.as_tensor(part)[None] for part in dataset[4 * step]))
        loss = module(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Persistence, where it starts, has a loss of about 1.
    assert losses[0] == pytest.approx(1, abs=0.3)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
