"""anemoi-training's default configuration, made small, on the project's sample."""

from __future__ import annotations

from pathlib import Path

SAMPLE = Path(__file__).parents[2] / "anemoi_dist/data/sample/era5-msl-2025-12-2p5.zarr"
_COORDINATES = "cos_latitude,cos_longitude,sin_latitude,sin_longitude"
_TIMES = "cos_julian_day,cos_local_time,sin_julian_day,sin_local_time,insolation"


def overrides(output: Path, *, ranks: int) -> list[str]:
    """Return the arguments of ``anemoi-training train`` for so many ranks on one node."""
    return [
        f"system.input.dataset={SAMPLE}",
        "system.input.graph=null",
        f"system.output.root={output}",
        f"hydra.run.dir={output}/hydra",
        "system.hardware.accelerator=cpu",
        f"system.hardware.num_gpus_per_node={ranks}",
        "diagnostics.log.mlflow.enabled=false",
        "diagnostics.log.mlflow.tracking_uri=null",
        "diagnostics/plot=simple",
        "diagnostics.plot.callbacks=[]",
        "diagnostics.enable_progress_bar=false",
        "dataloader.num_workers={training:1,validation:1,test:1}",
        "dataloader.batch_size={training:1,validation:1,test:1}",
        "dataloader.persistent_workers=false",
        "dataloader.pin_memory=false",
        "dataloader.training.datasets.data.end=2025-12-21",
        "dataloader.validation.datasets.data.start=2025-12-22",
        "dataloader.validation.datasets.data.end=2025-12-25",
        "dataloader.test.datasets.data.start=2025-12-26",
        "dataloader.limit_batches.validation=1",
        "graph.nodes.hidden.node_builder.resolution=1",
        "model.num_channels=8",
        "model.processor.num_layers=2",
        "training.precision='32'",
        "~graph.attributes.nodes.area_weight.fill_value",
        "graph.attributes.nodes.area_weight._target_=anemoi.graphs.nodes.attributes.CosineLatWeightedAttribute",
        f"data.datasets.data.forcing=[{_COORDINATES},{_TIMES}]",
        "data.datasets.data.diagnostic=[]",
        "model.bounding=[]",
        "training.metrics.datasets.data=[msl]",
        "data.datasets.data.processors.normalizer.config.std=[]",
        "data.datasets.data.processors.normalizer.config.max=[]",
        f"data.datasets.data.processors.normalizer.config.none=[{_COORDINATES},{_TIMES}]",
    ]
