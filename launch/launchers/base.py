"""Plan of a launch: the seam between a configuration and the launchers that start ranks. No torch.

Each kind of launcher (``launcher.kind``) is the module of that name in this folder. It gives
``plan(config, run, machine) -> Plan``, which is pure: all that it knows of this machine is in its arguments
(:func:`anemoi_dist.launch.launchers.machine.detect_machine`).
"""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

from anemoi_dist.config.batch import BatchPlan
from anemoi_dist.config.schema import LAUNCHER_KINDS, Config
from anemoi_dist.run.directory import RunDirectory


@dataclass(frozen=True)
class Mpirun:
    """An mpirun of this machine.

    Attributes
    ----------
    path : str
        The program.
    family : str
        ``openmpi``, or ``hydra`` (MPICH, Intel MPI, MVAPICH): they take other options.
    """

    path: str
    family: str


@dataclass(frozen=True)
class Machine:
    """The machine that a plan is made on.

    Attributes
    ----------
    num_gpus : int
        GPUs that ranks started here could see.
    environ : Mapping[str, str]
        The caller's environment.
    python : str
        The interpreter that starts ranks.
    mpirun : Mpirun, optional
        Starts the ranks of ``launcher=mpi``; None for the other launchers.
    """

    num_gpus: int
    environ: Mapping[str, str]
    python: str
    mpirun: Mpirun | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The ranks to start, where, and by which command.

    Attributes
    ----------
    kind : str
        ``launcher.kind``.
    nodes, ranks_per_node : int
        Number of nodes, and of ranks on each.
    batches : BatchPlan
        How the global batch is divided among them.
    environment : Mapping[str, str]
        Variables that the ranks get in addition to the environment they are started in.
    rendezvous : str
        Where ranks find each other, in words or as an address.
    command : tuple[str, ...]
        Command that starts them from this machine: torchrun, mpirun, sbatch.
    script : str, optional
        Text of the batch script, if there is one.
    notes : tuple[str, ...]
        What this machine lacks, in words.
    """

    kind: str
    nodes: int
    ranks_per_node: int
    batches: BatchPlan
    environment: Mapping[str, str]
    rendezvous: str
    command: tuple[str, ...]
    script: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.ranks_per_node

    def shell(self) -> str:
        """Return the command with the variables it needs, to paste into a shell."""
        added = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*added, shlex.join(self.command)])


class Launcher(Protocol):
    """Interface of the launcher modules."""

    def plan(self, config: Config, run: RunDirectory, machine: Machine) -> Plan:
        """Return what would be started. Pure.

        Raises
        ------
        ConfigError
            The configuration cannot be launched: its batch does not divide, a value has no meaning for this kind.
        """


def launcher(kind: str) -> Launcher:
    """Return the module that launches runs of this kind, imported now."""
    # By name, since the launchers import this module for their types.
    assert kind in LAUNCHER_KINDS, kind
    return cast(Launcher, importlib.import_module(f".{kind}", __package__))


def plan(config: Config, run: RunDirectory, machine: Machine) -> Plan:
    """Return what ``config.launcher`` would start for a run. Pure.

    Parameters
    ----------
    config : Config
        The run's configuration.
    run : RunDirectory
        Its directory, which need not exist.
    machine : Machine
        Where the launcher runs.

    Raises
    ------
    ConfigError
        The configuration cannot be launched.
    """
    return launcher(config.launcher.kind).plan(config, run, machine)
