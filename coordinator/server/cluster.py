"""Serves `ClusterService`: cluster_reads.py answers questions, cluster_writes.py makes changes,
cluster_masters.py is about the masters themselves."""

from __future__ import annotations

from coordinator.api.v1 import cluster_pb2_grpc
from coordinator.server.cluster_masters import ClusterMasters
from coordinator.server.cluster_parts import ClusterParts
from coordinator.server.cluster_reads import ClusterReads
from coordinator.server.cluster_writes import ClusterWrites


class ClusterServicer(ClusterReads, ClusterWrites, ClusterMasters, cluster_pb2_grpc.ClusterServiceServicer):
    """Every call of ClusterService."""

    def __init__(self, parts: ClusterParts) -> None:
        ClusterReads.__init__(self, parts)
        ClusterWrites.__init__(self, parts)
        ClusterMasters.__init__(self, parts)
