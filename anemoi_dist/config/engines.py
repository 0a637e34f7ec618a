"""The engines by name."""

from __future__ import annotations

from anemoi_dist.config.schema import EngineConfig


def engine_name(engine: EngineConfig) -> str:
    """Return the name by which ``engine=`` chooses this engine."""
    if engine.kind != "deepspeed":
        return engine.kind
    return f"zero{engine.stage}" + ("_offload" if engine.offload else "")
