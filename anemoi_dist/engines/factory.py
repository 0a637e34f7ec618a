"""From ``engine.kind`` and ``engine.stage`` to an engine."""

from __future__ import annotations

from anemoi_dist.config import Config
from anemoi_dist.engines.base import Engine
from anemoi_dist.module import BaseGraphModule
from anemoi_dist.world import World


def create_engine(module: BaseGraphModule, *, config: Config, world: World) -> Engine:
    """Spread a module over the ranks. Collective.

    Parameters
    ----------
    module : BaseGraphModule
        Built from the same seed on every rank; moved to the rank's device here.
    config : Config
        The run's configuration; ``engine`` chooses.
    world : World
        This rank's place.
    """
    module.to(world.device)
    module.train()
    # Imported where chosen: DeepSpeed alone costs every rank most of a second.
    if config.engine.kind == "ddp":
        from anemoi_dist.engines.replicated import DdpEngine

        return DdpEngine(module, config=config, world=world)
    if config.engine.kind == "fsdp2":
        from anemoi_dist.engines.fsdp2 import Fsdp2Engine

        return Fsdp2Engine(module, config=config, world=world)
    from anemoi_dist.engines.deepspeed_zero import Zero0Engine, Zero3Engine, Zero12Engine

    chosen = (Zero0Engine, Zero12Engine, Zero12Engine, Zero3Engine)[config.engine.stage]
    return chosen(module, config=config, world=world)
