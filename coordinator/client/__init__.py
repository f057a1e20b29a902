"""The Python client of a cluster: finds a master that answers, follows the leader, retries what is safe.

    who = credentials.of_person(Path("certificates"))      # operator-*.crt there, with its key; coordinator/security
    with ClusterClient(["127.0.0.1:7101", "127.0.0.1:7102", "127.0.0.1:7103"], credentials=who) as client:
        for node in client.list_nodes().nodes: ...

`AsyncClusterClient` has the same methods as coroutines.
"""

from coordinator.client.client import LINEARIZABLE, STALE, AsyncClusterClient, Consistency
from coordinator.client.sync import ClusterClient

__all__ = ["LINEARIZABLE", "STALE", "AsyncClusterClient", "ClusterClient", "Consistency"]
