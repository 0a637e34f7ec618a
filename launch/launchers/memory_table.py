"""Memory of a rank for every engine and many numbers of ranks, before anyone queues. Pure, and without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from anemoi_dist.config.batch import plan_batches
from anemoi_dist.config.engines import ENGINES, EngineSpec
from anemoi_dist.config.schema import Config, EngineConfig
from anemoi_dist.engines.memory_estimate import ExpectedMemory, ModelSize, expected_memory
from anemoi_dist.errors import ConfigError

WORLD_SIZES = tuple(2**power for power in range(11))


@dataclass(frozen=True)
class Cell:
    """One engine on one number of ranks.

    Attributes
    ----------
    engine : str
        Its name for ``engine=``.
    world_size : int
        Ranks.
    memory : ExpectedMemory
        Of the fullest rank.
    fits : bool, optional
        Whether the device holds it, activations aside; None: its memory is not known.
    """

    engine: str
    world_size: int
    memory: ExpectedMemory
    fits: bool | None


@dataclass(frozen=True)
class Row:
    """One number of ranks.

    Attributes
    ----------
    world_size : int
        Ranks.
    batch_problem : str
        Why the batch cannot be cut over so many; empty where it can.
    cells : Sequence[Cell]
        In the order of :data:`~anemoi_dist.config.engines.ENGINES`.
    """

    world_size: int
    batch_problem: str
    cells: Sequence[Cell]


def memory_table(config: Config, model: ModelSize, *, device_bytes: int | None) -> list[Row]:
    """Return what every engine would hold on 1 to 1024 ranks; everything else as configured.

    Parameters
    ----------
    config : Config
        ``engine.options`` go to all stages of ZeRO if the configured engine is one.
    model : ModelSize
        The model.
    device_bytes : int, optional
        Memory of each rank's device.
    """
    variants = {name: replace(config, engine=_settings(spec, config.engine)) for name, spec in ENGINES.items()}
    rows = []
    for world_size in WORLD_SIZES:
        cells = []
        for name, variant in variants.items():
            memory = expected_memory(variant, model, world_size=world_size)
            fits = None if device_bytes is None else memory.device <= device_bytes
            cells.append(Cell(name, world_size, memory, fits))
        rows.append(Row(world_size, _batch_problem(config, world_size), cells))
    return rows


def _settings(spec: EngineSpec, configured: EngineConfig) -> EngineConfig:
    options = configured.options if spec.kind == "deepspeed" else {}
    return EngineConfig(kind=spec.kind, stage=spec.stage, offload=spec.offload, options=options)


def _batch_problem(config: Config, world_size: int) -> str:
    try:
        plan_batches(config.training, world_size=world_size)
    except ConfigError as error:
        return f"{error.key}={error.value} {error.rule}"
    return ""
