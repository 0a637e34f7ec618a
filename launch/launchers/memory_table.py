"""Memory of a rank for every engine and many numbers of ranks, before anyone queues. Pure, and without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from anemoi_dist.config.batch import plan_batches
from anemoi_dist.config.engines import ENGINES, EngineSpec
from anemoi_dist.config.schema import Config, EngineConfig
from anemoi_dist.engines.memory_estimate import ExpectedMemory, ModelSize, expected_memory
from anemoi_dist.errors import ConfigError

WORLD_SIZES = tuple(2**power for power in range(11))


@dataclass(frozen=True)
class Row:
    """Memory on one number of ranks.

    Attributes
    ----------
    world_size : int
        Ranks.
    memory : Mapping[str, ExpectedMemory]
        Name for ``engine=`` -> memory of the fullest rank.
    batch_problem : str
        Why the batch cannot be divided among so many ranks; empty if it can.
    """

    world_size: int
    memory: Mapping[str, ExpectedMemory]
    batch_problem: str


def memory_table(config: Config, model: ModelSize) -> list[Row]:
    """Return the memory of a rank under every engine on 1 to 1024 ranks; everything else as configured.

    Parameters
    ----------
    config : Config
        ``engine.options`` go to all stages of ZeRO if the configured engine is one.
    model : ModelSize
        The model.
    """
    variants = {name: replace(config, engine=_settings(spec, config.engine)) for name, spec in ENGINES.items()}
    return [
        Row(
            world_size,
            {name: expected_memory(variant, model, world_size=world_size) for name, variant in variants.items()},
            _batch_problem(config, world_size),
        )
        for world_size in WORLD_SIZES
    ]


def _settings(spec: EngineSpec, configured: EngineConfig) -> EngineConfig:
    # engine.options are DeepSpeed's: other engines refuse them.
    options = configured.options if spec.kind == "deepspeed" else {}
    return EngineConfig(kind=spec.kind, stage=spec.stage, offload=spec.offload, options=options)


def _batch_problem(config: Config, world_size: int) -> str:
    # The memory is of interest even so: a row with a remark is better than a refusal.
    try:
        plan_batches(config, world_size=world_size)
    except ConfigError as error:
        return f"{error.key}={error.value} {error.rule}"
    return ""
