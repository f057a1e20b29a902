"""Commands about workers.

A worker that may be gone gives up its roles in the same command that says so (`lose_replicas`), so no state between the
two is ever seen. What it held stays in `absent`: its place, should it come back.
"""

from __future__ import annotations

import math
from dataclasses import replace

from coordinator.api.v1 import command_pb2
from coordinator.machine.codec import node_from_proto
from coordinator.machine.draft import Draft
from coordinator.machine.losses import Loss, forgive, lose_replicas
from coordinator.model import NEVER_MS, Node, NodeState
from coordinator.model.errors import RefusalReason, Refused

NAME_LENGTH_MAX = 63


def check_name(what: str, name: str) -> None:
    """Refuses a name that is empty, too long, or has characters other than letters, digits, `-`, `_` and `.`."""
    allowed = name.replace("-", "").replace("_", "").replace(".", "")
    if not (1 <= len(name) <= NAME_LENGTH_MAX and name.isascii() and allowed.isalnum()):
        raise Refused(
            RefusalReason.INVALID,
            f"{what} {name!r} is no name; use 1 to {NAME_LENGTH_MAX} letters, digits, '-', '_' and '.'",
        )


def check_weight(weight: float) -> None:
    """Refuses a weight that is not a number between 0.001 and 1,000."""
    if not (math.isfinite(weight) and 0.001 <= weight <= 1_000):
        raise Refused(RefusalReason.INVALID, f"weight {weight} is out of range; use 0.001 to 1000")


def _require_incarnation(draft: Draft, node_id: str, incarnation: str) -> Node:
    node = draft.node(node_id)
    if incarnation and node.incarnation != incarnation:
        raise Refused(
            RefusalReason.STALE,
            f"worker {node_id} runs as {node.incarnation}, no longer as {incarnation}",
        )
    return node


def register_node(draft: Draft, command: command_pb2.RegisterNode) -> None:
    """A worker opened a session: makes or renews its record."""
    said = node_from_proto(command.node)
    check_name("worker id", said.id)
    check_weight(said.weight)
    if not said.incarnation:
        raise Refused(RefusalReason.INVALID, f"worker {said.id} names no incarnation; upgrade its software")
    before = draft.nodes.get(said.id)
    if before is None or before.state is NodeState.LEFT:
        node = replace(
            said,
            state=NodeState.JOINING,
            drain_requested=False,
            suspect_since_ms=NEVER_MS,
            registered_ms=draft.time_ms,
            configured_weight=said.weight,
        )
        draft.put_node(node)
        zone = f" in zone {said.zone}" if said.zone else ""
        draft.record("node", said.id, f"registered{zone}, weight {said.weight:g}, at {said.grpc_address}")
        return
    restarted = before.incarnation != said.incarnation
    if restarted and before.state is not NodeState.DOWN:
        # Also one that was not admitted yet: it may have served what nobody took over.
        lose_replicas(draft, Loss(before.id, "restarted", command.loss, is_process_gone=True))
    keeps_state = not restarted and before.state is not NodeState.DOWN
    draft.put_node(
        replace(
            said,
            weight=before.weight if said.weight == before.configured_weight else said.weight,
            configured_weight=said.weight,
            state=before.state if keeps_state else NodeState.JOINING,
            state_since_ms=before.state_since_ms,
            drain_requested=before.drain_requested,
            suspect_since_ms=before.suspect_since_ms if keeps_state else NEVER_MS,
            registered_ms=before.registered_ms,
        )
    )
    if not keeps_state:
        draft.record("node", said.id, "registered again" + (" after a restart" if restarted else ""))


def activate_node(draft: Draft, command: command_pb2.ActivateNode) -> None:
    """A registered worker is admitted, or a suspected one is heard again."""
    node = _require_incarnation(draft, command.node_id, command.incarnation)
    if node.state in (NodeState.DOWN, NodeState.LEFT):
        raise Refused(
            RefusalReason.PRECONDITION, f"worker {node.id} is {node.state.name.lower()}; it must register first"
        )
    state = NodeState.DRAINING if node.drain_requested else NodeState.ACTIVE
    if node.state is NodeState.JOINING:
        draft.record("node", node.id, f"is {state.name.lower()}")
    elif node.is_suspect:
        draft.record("node", node.id, "is heard again")
        forgive(draft, node.id)
    draft.put_node(replace(node, state=state, suspect_since_ms=NEVER_MS))


def suspect_node(draft: Draft, command: command_pb2.SuspectNode) -> None:
    """A worker is not heard: its roles go to others where there are others."""
    node = _require_incarnation(draft, command.node_id, command.incarnation)
    if node.state not in (NodeState.ACTIVE, NodeState.DRAINING):
        raise Refused(
            RefusalReason.PRECONDITION, f"worker {node.id} is {node.state.name.lower()}, it cannot be suspected"
        )
    if node.is_suspect:
        return
    draft.put_node(replace(node, suspect_since_ms=draft.time_ms))
    draft.record("node", node.id, f"is suspect: {command.reason or 'not heard'}")
    lose_replicas(draft, Loss(node.id, "suspect", command.loss))


def expire_node(draft: Draft, command: command_pb2.ExpireNode) -> None:
    """A worker's session ended without a leave."""
    node = _require_incarnation(draft, command.node_id, command.incarnation)
    if node.state in (NodeState.DOWN, NodeState.LEFT):
        return
    draft.put_node(replace(node, state=NodeState.DOWN, suspect_since_ms=NEVER_MS))
    draft.record("node", node.id, f"is down: {command.reason or 'its session lease ended'}")
    lose_replicas(draft, Loss(node.id, "down", command.loss, is_process_gone=True))


def drain_node(draft: Draft, command: command_pb2.DrainNode) -> None:
    """Asks for a worker to be emptied."""
    node = draft.node(command.node_id)
    if node.state is NodeState.LEFT:
        raise Refused(RefusalReason.PRECONDITION, f"worker {node.id} has left; there is nothing to drain")
    if node.drain_requested:
        return
    state = NodeState.DRAINING if node.state is NodeState.ACTIVE else node.state
    draft.put_node(replace(node, drain_requested=True, state=state))
    draft.record("node", node.id, "is to be drained")


def undrain_node(draft: Draft, command: command_pb2.UndrainNode) -> None:
    """Takes a drain back."""
    node = draft.node(command.node_id)
    if not node.drain_requested:
        return
    state = NodeState.ACTIVE if node.state is NodeState.DRAINING else node.state
    draft.put_node(replace(node, drain_requested=False, state=state))
    draft.record("node", node.id, "is no longer to be drained")


def set_node_weight(draft: Draft, command: command_pb2.SetNodeWeight) -> None:
    """Changes a worker's share of the load."""
    check_weight(command.weight)
    node = draft.node(command.node_id)
    if node.weight != command.weight:
        draft.put_node(replace(node, weight=command.weight))
        draft.record("node", node.id, f"has weight {command.weight:g}, was {node.weight:g}")


def leave_node(draft: Draft, command: command_pb2.LeaveNode) -> None:
    """A worker leaves for good."""
    node = _require_incarnation(draft, command.node_id, command.incarnation)
    if node.state is NodeState.LEFT:
        return
    held = sorted(shard.id for shard in draft.shards.values() if node.id in shard.replicas)
    if held:
        raise Refused(
            RefusalReason.PRECONDITION,
            f"worker {node.id} still holds {len(held)} shards (shard {held[0]} is one); drain it first",
        )
    _forget_places(draft, node.id)
    draft.put_node(replace(node, state=NodeState.LEFT, suspect_since_ms=NEVER_MS, drain_requested=False))
    draft.record("node", node.id, "has left")


def remove_node(draft: Draft, command: command_pb2.RemoveNode) -> None:
    """Forgets a worker that is down or has left."""
    node = draft.node(command.node_id)
    if node.state not in (NodeState.DOWN, NodeState.LEFT):
        raise Refused(
            RefusalReason.PRECONDITION,
            f"worker {node.id} is {node.state.name.lower()}; only one that is down or has left can be removed: "
            f"drain it and stop it first",
        )
    held = sorted(shard.id for shard in draft.shards.values() if node.id in shard.replicas)
    if held:
        raise Refused(
            RefusalReason.PRECONDITION,
            f"worker {node.id} has the last copy of {len(held)} shards (shard {held[0]} is one); "
            f"start it again, or its data is lost",
        )
    _forget_places(draft, node.id)
    draft.drop_node(node)
    draft.record("node", node.id, "is removed")


def _forget_places(draft: Draft, node_id: str) -> None:
    for shard in sorted(draft.shards.values(), key=lambda shard: shard.id):
        if node_id in shard.absent:
            draft.put_shard(replace(shard, absent=tuple(name for name in shard.absent if name != node_id)))
