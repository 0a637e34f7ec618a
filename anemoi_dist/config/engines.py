"""The table of engines: everything that is known of one without importing it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineSpec:
    """One option of ``engine=``.

    Attributes
    ----------
    name : str
        Its name for ``engine=``.
    kind, stage, offload : str, int, bool
        The values of ``engine.kind``, ``engine.stage`` and ``engine.offload`` that choose it.
    target : str
        ``module:Class`` that implements it.
    partitioned : frozenset[str]
        Which of ``parameters``, ``gradients`` and ``states`` are partitioned over the ranks.
    can_overlap : bool
        Whether ``engine.overlap`` has an effect.
    """

    name: str
    kind: str
    target: str
    stage: int = 0
    offload: bool = False
    partitioned: frozenset[str] = frozenset()
    can_overlap: bool = False


_STATES = frozenset({"states"})
_GRADIENTS = _STATES | {"gradients"}
_ALL = _GRADIENTS | {"parameters"}
_ZERO = "anemoi_dist.engines.zero"

#: In the order in which tables show them.
ENGINES = {
    spec.name: spec
    for spec in (
        EngineSpec("ddp", "ddp", "anemoi_dist.engines.replicated:DdpEngine"),
        EngineSpec("zero0", "deepspeed", f"{_ZERO}:Zero0Engine"),
        EngineSpec("zero1", "deepspeed", f"{_ZERO}:Zero12Engine", stage=1, partitioned=_STATES, can_overlap=True),
        EngineSpec("zero2", "deepspeed", f"{_ZERO}:Zero12Engine", stage=2, partitioned=_GRADIENTS, can_overlap=True),
        EngineSpec("zero3", "deepspeed", f"{_ZERO}:Zero3Engine", stage=3, partitioned=_ALL),
        EngineSpec("zero3_offload", "deepspeed", f"{_ZERO}:Zero3Engine", stage=3, offload=True, partitioned=_ALL),
        EngineSpec("fsdp2", "fsdp2", "anemoi_dist.engines.fsdp2:Fsdp2Engine", partitioned=_ALL, can_overlap=True),
    )
}
ENGINE_KINDS = tuple(dict.fromkeys(spec.kind for spec in ENGINES.values()))
_BY_SETTINGS = {(spec.kind, spec.stage, spec.offload): spec for spec in ENGINES.values()}


def find_engine(kind: str, *, stage: int, offload: bool) -> EngineSpec:
    """Return the engine that the three keys of a checked ``engine`` group choose."""
    return _BY_SETTINGS[kind, stage, offload]
