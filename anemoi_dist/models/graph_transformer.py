"""Encoder-processor-decoder of anemoi-models on a graph of anemoi-graphs, from their own configuration.

Needs the extra ``anemoi``; nothing of it is imported before a model is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anemoi_dist.config.targets import nested_targets, resolve_target
from anemoi_dist.data.batch import DataSpec
from anemoi_dist.errors import ConfigError

#: Packages that nested ``_target_`` entries of a graph or a model may name: a configuration must not run other code.
ALLOWED_TARGETS = ("anemoi.models", "anemoi.graphs", "torch.nn")


class NoSkip(nn.Module):
    """A residual connection that adds nothing: the network then forecasts the tendency instead of the state."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(
        self, x: Tensor, grid_shard_shapes: Any = None, model_comm_group: Any = None, n_step_output: int | None = None
    ) -> Tensor:
        """Return zeros, shape (batch, n_step_output, ensemble, grid, variable)."""
        return x.new_zeros(()).expand(x.shape[0], n_step_output or 1, *x.shape[2:])


class AnemoiModel(nn.Module):
    """A model of anemoi-models that forecasts the normalised tendency.

    Parameters
    ----------
    data : DataSpec
        Grid and variables; the graph's ``data`` nodes are made of them.
    graph : Mapping[str, Any]
        anemoi-graphs' configuration (``nodes``, ``edges``, ``post_processors``) without the ``data`` nodes.
    network : Mapping[str, Any]
        anemoi-models' configuration: what anemoi-training keeps under ``model``. ``residual`` is ours to set.

    Raises
    ------
    ConfigError
        The extra is not installed, or a nested ``_target_`` lies outside of anemoi-models, anemoi-graphs and torch.nn.
    """

    def __init__(self, data: DataSpec, *, graph: Mapping[str, Any], network: Mapping[str, Any]) -> None:
        super().__init__()
        _require_extra()
        # All targets are checked before anything is built: building imports and runs what they name.
        for key, target in nested_targets({"graph": graph, "network": network}, key="model"):
            resolve_target(target, key=key, allowed=ALLOWED_TARGETS)
        if "residual" in network:
            raise ConfigError(
                "model.network.residual", network["residual"], "is fixed: the network forecasts the tendency"
            )
        self.network = _build_network(data, _build_graph(data, graph), network)

    def forward(self, x: Tensor) -> Tensor:
        """Forecast the normalised tendency.

        Parameters
        ----------
        x : torch.Tensor
            Normalised states, shape (batch, time, ensemble, grid, variable), in the dtype of the weights.

        Returns
        -------
        torch.Tensor
            Shape (batch, ensemble, grid, prognostic variable).
        """
        return self.network({"data": x})["data"][:, 0]


def _require_extra() -> None:
    try:
        import anemoi.graphs
        import anemoi.models  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "model._target_",
            f"{__name__}.AnemoiModel",
            f"needs anemoi-models and anemoi-graphs ({error})",
            fix="pip install 'anemoi-dist[anemoi]'",
        ) from error


def _build_graph(data: DataSpec, graph: Mapping[str, Any]) -> Any:
    """Return the ``HeteroData`` of the dataset's own nodes and whatever ``graph`` adds to them."""
    # Imported here: the extra is optional, and loads torch-geometric.
    from anemoi.graphs.create import GraphCreator
    from anemoi.graphs.nodes import LatLonNodes
    from anemoi.utils.config import DotDict
    from torch_geometric.data import HeteroData

    if "data" in graph.get("nodes", {}):
        raise ConfigError("model.graph.nodes.data", graph["nodes"]["data"], "is filled in from the dataset")
    creator = GraphCreator(config=DotDict(graph))
    latitudes, longitudes = (torch.tensor(values, dtype=torch.float32) for values in (data.latitudes, data.longitudes))
    nodes = LatLonNodes(latitudes, longitudes, name="data").update_graph(HeteroData(), attrs_config={})
    return creator.post_process(creator.clean(creator.update_graph(nodes)))


def _build_network(data: DataSpec, graph: Any, network: Mapping[str, Any]) -> nn.Module:
    """Build ``network.model._target_`` as anemoi-models' own interface does."""
    from anemoi.models.data_indices.collection import IndexCollection
    from anemoi.utils.config import DotDict
    from omegaconf import OmegaConf

    roles = OmegaConf.create({"forcing": list(data.forcing), "diagnostic": [], "target": []})
    indices = IndexCollection(roles, {name: i for i, name in enumerate(data.variables)})
    # Statistics are passed because the interface asks for them; normalisation is the training module's.
    config = {
        "model": {**network, "residual": {"_target_": f"{__name__}.{NoSkip.__name__}"}},
        "training": {"multistep_input": data.multistep_input, "multistep_output": 1},
    }
    key = "model.network.model._target_"
    build = resolve_target(network["model"]["_target_"], key=key, allowed=ALLOWED_TARGETS)
    return build(
        model_config=DotDict(config),
        data_indices={"data": indices},
        statistics={"data": {"mean": data.mean, "stdev": data.stdev}},
        graph_data=graph,
    )
