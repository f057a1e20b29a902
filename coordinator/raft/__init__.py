"""PySyncObj made durable, deterministic and safe to expose: one RaftNode per master."""

from coordinator.raft.consensus import ApplyFailed
from coordinator.raft.node import Machine, RaftNode, RaftStatus

__all__ = ["ApplyFailed", "Machine", "RaftNode", "RaftStatus"]
