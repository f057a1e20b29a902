"""Where shards and jobs belong: the ring and the planner. Pure: no clock, no I/O, no randomness."""

from coordinator.placement.plan import DrainCheck, LoadChange, Plan, PlannedMove
from coordinator.placement.planner import Planner
from coordinator.placement.ring import Ring, RingMember
from coordinator.placement.shardmap import ShardMap

__all__ = ["DrainCheck", "LoadChange", "Plan", "PlannedMove", "Planner", "Ring", "RingMember", "ShardMap"]
