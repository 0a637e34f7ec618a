"""Rendezvous of a job's torchrun agents: one store on the first node, whose port is bound before it is announced.

The set of nodes is fixed, because the launcher restarts a job as a whole after a crash. So nothing here is elastic, the
first node holds rank 0, and the store listens on one address instead of on every interface. Imports torch; only
``agent.py`` imports this.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.api import RendezvousParameters, rendezvous_handler_registry

from anemoi_dist.distributed.rendezvous import listen, serve, wait_for
from anemoi_dist.run.directory import write_atomically

#: The name that ``--rdzv-backend`` gives.
BACKEND = "anemoi-dist"


class FixedRendezvous(RendezvousHandler):
    """Rendezvous of nodes that are known beforehand.

    Parameters
    ----------
    address : str
        Address of the first node, which listens on it.
    node, num_nodes : int
        Place of this node, and their number.
    file : Path, optional
        On a file system that all nodes share: the first node writes the port here. It must not exist before.

    Raises
    ------
    PreflightError
        The first node cannot listen there, or has not appeared.
    """

    def __init__(self, *, address: str, node: int, num_nodes: int, file: Path | None = None) -> None:
        self._node, self._num_nodes = node, num_nodes
        if node == 0:
            listener, place = listen(address, num_callers=num_nodes)
            self._store = serve(listener)
            # Written once the store answers: an agent connects as soon as it finds the file.
            if file is not None:
                write_atomically(file, place.to_json())
        else:
            assert file is not None, "nodes beyond the first read the port from a file"
            place = wait_for(file)
            self._store = TCPStore(place.host, place.port, is_master=False)
        self._address, self._port = place.host, place.port

    def next_rendezvous(self) -> RendezvousInfo:
        """Return this node's place; the ranks meet in the same store, so that no second port is needed."""
        # A prefix keeps the agents' keys apart from those of the process groups.
        info = RendezvousStoreInfo(self._address, self._port)
        return RendezvousInfo(PrefixStore("agents", self._store), self._node, self._num_nodes, info)

    @property
    def use_agent_store(self) -> bool:
        """The ranks connect to the agent's store."""
        return True

    def get_backend(self) -> str:
        """Name of the rendezvous."""
        return BACKEND

    def get_run_id(self) -> str:
        """Address of the store: no two jobs share one."""
        return f"{self._address}:{self._port}"

    def is_closed(self) -> bool:
        """Return False: the launcher ends all agents together."""
        return False

    def set_closed(self) -> None:
        """Do nothing; see :meth:`is_closed`."""

    def num_nodes_waiting(self) -> int:
        """Return 0: nobody joins later."""
        return 0

    def shutdown(self) -> bool:
        """Do nothing: the store ends with this process."""
        return True


def register() -> None:
    """Make the rendezvous known to torchrun under :data:`BACKEND`."""
    rendezvous_handler_registry.register(BACKEND, _from_parameters)


def _from_parameters(parameters: RendezvousParameters) -> FixedRendezvous:
    file = parameters.get("file")
    return FixedRendezvous(
        address=parameters.endpoint,
        node=int(os.environ.get("SLURM_NODEID", "0")) if parameters.max_nodes > 1 else 0,
        num_nodes=parameters.max_nodes,
        file=None if file is None else Path(file),
    )
