"""What tests say to the peer port of a real master."""

from __future__ import annotations

from coordinator.api.v1 import peer_pb2
from coordinator.raft.frames import PROTOCOL_VERSION, pack


def hello(from_id: str, to_id: str, cluster_name: str) -> bytes:
    """What a master says first."""
    said = peer_pb2.PeerHello(
        protocol_version=PROTOCOL_VERSION, from_id=from_id, to_id=to_id, cluster_name=cluster_name, incarnation="test"
    )
    return pack(peer_pb2.PeerFrame(hello=said))
