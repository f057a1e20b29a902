"""PySyncObj made durable, deterministic and safe to expose: one RaftNode per master."""

from coordinator.raft.consensus import ApplyFailed
from coordinator.raft.interface import Machine, RaftStatus
from coordinator.raft.node import RaftNode

__all__ = ["ApplyFailed", "Machine", "RaftNode", "RaftStatus"]
