"""Configurations that anemoi-training comes with, and what each needs to be whole."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

#: What no packaged configuration has a value for.
PLACES = ("system.input.dataset=/data.zarr", "system.input.graph=null")
_CUTOUT = ("system.input.forcing_dataset=/f.zarr", "dataloader.dataset.cutout.0.thinning=1")
#: Name of a packaged top-level file -> further overrides.
NEEDS: dict[str, tuple[str, ...]] = {
    "config": (),
    "ensemble_crps": (),
    "lam": _CUTOUT,
    "stretched": (*_CUTOUT, "training.scalers.datasets.data.node_weights.weight_frac_of_total=0.5"),
    "multi": (),
    "hierarchical": (),
    "point_wise": (),
    "temporal_downscaler": (),
    "temporal_downscaler_ensemble": (),
    "autoencoder": (),
    "hierarchical_autoencoder": (),
    "transport_edm_diffusion": (),
    "transport_edm_diffusion_tendency": (),
    "transport_stochastic_interpolant": (),
    "multi_transport_edm_diffusion": ("+system.input.dataset_b=/b.zarr",),
}


def packaged_configs() -> Path:
    """Return the directory of the packaged configurations; ``anemoi.training`` is not imported."""
    spec = find_spec("anemoi")
    assert spec is not None
    for root in spec.submodule_search_locations or ():
        if (directory := Path(root, "training", "config")).is_dir():
            return directory
    raise AssertionError("anemoi-training is not installed")
