"""The vocabulary: frozen dataclasses and the exception tree. Imports nothing else of this project."""

from coordinator.model.clock import NEVER_MS, Clock, ManualClock, Monotonic, SystemClock, WallMs
from coordinator.model.cluster import ClusterSettings, LogRecord
from coordinator.model.cron import (
    CatchUpPolicy,
    CronJob,
    CronJobSpec,
    Launch,
    LaunchAttempt,
    LaunchState,
    LaunchTrigger,
    OverlapPolicy,
    PassedTimes,
    RetryPolicy,
)
from coordinator.model.keys import HASH_SPACE, KEY_BYTES_MAX, check_key, key_hash
from coordinator.model.master import AdmittedMaster
from coordinator.model.move import Move, MoveKind, MovePhase
from coordinator.model.node import Node, NodeState
from coordinator.model.shard import LostPrimary, Shard

__all__ = [
    "HASH_SPACE",
    "KEY_BYTES_MAX",
    "NEVER_MS",
    "AdmittedMaster",
    "CatchUpPolicy",
    "Clock",
    "ClusterSettings",
    "CronJob",
    "CronJobSpec",
    "Launch",
    "LaunchAttempt",
    "LaunchState",
    "LaunchTrigger",
    "LogRecord",
    "LostPrimary",
    "ManualClock",
    "Monotonic",
    "Move",
    "MoveKind",
    "MovePhase",
    "Node",
    "NodeState",
    "OverlapPolicy",
    "PassedTimes",
    "RetryPolicy",
    "Shard",
    "SystemClock",
    "WallMs",
    "check_key",
    "key_hash",
]
