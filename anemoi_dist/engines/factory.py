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
        from anemoi_dist.engines.replicated import DdpEngine as Chosen
    elif config.engine.kind == "fsdp2":
        from anemoi_dist.engines.fsdp2 import Fsdp2Engine as Chosen
    elif config.engine.stage == 0:
        from anemoi_dist.engines.deepspeed_zero import Zero0Engine as Chosen
    elif config.engine.stage in (1, 2):
        from anemoi_dist.engines.deepspeed_zero import Zero12Engine as Chosen
    else:
        from anemoi_dist.engines.deepspeed_zero import Zero3Engine as Chosen
    return Chosen(module, config=config, world=world)
