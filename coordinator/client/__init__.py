"""The Python client of a cluster: finds a master that answers, follows the leader, retries what is safe.

    who = credentials.of_person(Path("certificates"))      # operator-*.crt there, with its key; coordinator/security
    with ClusterClient(["127.0.0.1:7101", "127.0.0.1:7102", "127.0.0.1:7103"], credentials=who) as client:
        for node in client.list_nodes().nodes: ...

    with StateClient(["127.0.0.1:7101"], credentials=who) as state:      # users' state, kept by the workers
        state.put("ann", "name", b"Ann")

`AsyncClusterClient` and `AsyncStateClient` have the same methods as coroutines.
"""

from coordinator.client.client import LINEARIZABLE, STALE, AsyncClusterClient, Consistency
from coordinator.client.state import AsyncStateClient
from coordinator.client.state_sync import StateClient
from coordinator.client.state_types import (
    Delete,
    Entries,
    Entry,
    Page,
    Put,
    Read,
    Scan,
    UserDescription,
    Write,
    Written,
)
from coordinator.client.sync import ClusterClient

__all__ = [
    "LINEARIZABLE",
    "STALE",
    "AsyncClusterClient",
    "AsyncStateClient",
    "ClusterClient",
    "Consistency",
    "Delete",
    "Entries",
    "Entry",
    "Page",
    "Put",
    "Read",
    "Scan",
    "StateClient",
    "UserDescription",
    "Write",
    "Written",
]
