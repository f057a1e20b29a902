"""What faults do to shards and their moves: roles of lost workers go to others, replicas that fail are taken out.

Invariants
1. A shard that was ever assigned keeps a replica: one that nobody else can stand in for stays with its worker, and its
   data comes back with it.
2. A process never serves in an epoch of its predecessor: when the worker of a shard that nobody takes over restarts or
   is given up, the epoch grows. Two records of one sequence and epoch are then one record, also when the first one was
   lost with an unsynced disk.
3. A shard in quarantine gets no further primary. What puts it there is counted by this machine, so that the loss that
   is one too many is not followed by one more promotion.

The leader says in the command what it wishes and what the configuration allows (`LossRules`): who of the in-sync
replicas should follow as primary, and how many lost primaries are too many. Wishes that do not fit are passed over.

A loss that turns out to be none (the same process is heard again) is forgiven, and so is the quarantine that it caused.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from coordinator.api.v1 import command_pb2
from coordinator.machine.draft import Draft
from coordinator.machine.moves import end_move, precondition, require_epoch, roll_back, with_name, without_name
from coordinator.model import LostPrimary, Move, MoveKind, MovePhase, Shard

LOST_PRIMARIES_KEPT = 16
"""Per shard; more than any `quarantine_workers`."""


@dataclass(frozen=True, slots=True)
class Loss:
    """One worker is taken out."""

    node_id: str
    why: str
    """In a word or a few, as in "w1 is suspect"."""
    rules: command_pb2.LossRules = field(default_factory=command_pb2.LossRules)
    is_process_gone: bool = False
    """True when this process will never serve again, also where nobody takes over."""


def lose_replicas(draft: Draft, loss: Loss) -> None:
    """Takes every role away from a worker that may be gone, wherever another in-sync worker serves.

    A shard of which it has the only good copy is left to it: its data comes back with the worker.
    """
    for shard in sorted(draft.shards.values(), key=lambda shard: shard.id):
        if loss.node_id in shard.joining:
            _lose_joining(draft, shard, loss)
        elif loss.node_id in shard.in_sync:
            # An earlier one of this loop may have changed it: a join holds on to two.
            _lose_in_sync(draft, draft.shard(shard.id), loss)


def forgive(draft: Draft, node_id: str) -> None:
    """A worker that was suspected is heard again: nothing was lost."""
    for shard in sorted(draft.shards.values(), key=lambda shard: shard.id):
        if not any(lost.node_id == node_id for lost in shard.lost_primaries):
            continue
        is_lifted = bool(shard.quarantine) and shard.primary == node_id
        draft.put_shard(
            replace(
                shard,
                lost_primaries=tuple(lost for lost in shard.lost_primaries if lost.node_id != node_id),
                quarantine="" if is_lifted else shard.quarantine,
            )
        )
        if is_lifted:
            draft.record("shard", shard.id, f"its quarantine is lifted: {node_id} is heard again")


def drop_replica(draft: Draft, command: command_pb2.DropReplica) -> None:
    """A replica does not follow, or lost its data: it leaves the in-sync set, and its place is kept."""
    shard = draft.shard(command.shard_id)
    require_epoch(shard, command.expected_epoch)
    node_id = command.node_id
    if node_id not in shard.in_sync:
        raise precondition(f"worker {node_id} is not in sync with shard {shard.id}")
    if not _others_that_serve(draft, shard, node_id):
        raise precondition(f"worker {node_id} has the last copy of shard {shard.id} that can serve")
    if shard.quarantine and node_id == shard.primary:
        raise precondition(f"shard {shard.id} is in quarantine and gets no other primary: {shard.quarantine}")
    rules = command_pb2.LossRules(heirs={shard.id: command.heir} if command.heir else {})
    _lose_in_sync(draft, shard, Loss(node_id, command.reason or "taken out", rules))


def release_shard(draft: Draft, command: command_pb2.ReleaseShard) -> None:
    """Ends a quarantine; a shard whose primary is gone goes to whom it can go."""
    shard = draft.shard(command.shard_id)
    if not shard.quarantine:
        raise precondition(f"shard {shard.id} is not in quarantine")
    shard = draft.put_shard(replace(shard, quarantine="", lost_primaries=()))
    draft.record("shard", shard.id, "is released from quarantine")
    if not draft.node(shard.primary).is_serving:
        _lose_in_sync(draft, shard, Loss(shard.primary, "not serving"))


def _others_that_serve(draft: Draft, shard: Shard, node_id: str) -> list[str]:
    return [name for name in shard.in_sync if name != node_id and draft.node(name).is_serving]


def _lose_joining(draft: Draft, shard: Shard, loss: Loss) -> None:
    move = draft.move_on(shard.id)
    if move is not None and move.target == loss.node_id:
        roll_back(draft, move, f"its target {loss.node_id} is {loss.why}")


def _lose_in_sync(draft: Draft, shard: Shard, loss: Loss) -> None:
    node_id = loss.node_id
    if shard.primary == node_id:
        shard = _count_lost_primary(draft, shard, loss)
    others = _others_that_serve(draft, shard, node_id)
    move = draft.move_on(shard.id)
    if not others or (shard.quarantine and shard.primary == node_id):
        _leave_alone(draft, shard, move, loss)
        return
    primary = _heir(shard, others, move, loss) if shard.primary == node_id else shard.primary
    is_leaving = move is not None and move.source == node_id and move.phase in (MovePhase.CEDING, MovePhase.REMOVING)
    is_leaving = is_leaving and move is not None and move.kind is not MoveKind.TRANSFER
    shard = draft.put_shard(
        replace(
            shard,
            epoch=shard.epoch + 1,
            primary=primary,
            in_sync=without_name(shard.in_sync, node_id),
            absent=shard.absent if is_leaving else with_name(shard.absent, node_id),
        )
    )
    draft.record("shard", shard.id, f"lost {node_id} ({loss.why}); primary is {primary}, epoch {shard.epoch}")
    if move is not None:
        _adjust_move(draft, move, loss)


def _heir(shard: Shard, others: list[str], move: Move | None, loss: Loss) -> str:
    """The next primary: who was to become it anyway, else whom the leader wishes, else the first by name."""
    leaving = move.source if move is not None else ""
    staying = [name for name in others if name != leaving] or others
    if move is not None and move.target in others:
        return move.target
    wished = loss.rules.heirs.get(shard.id, "")
    return wished if wished in staying else staying[0]


def _leave_alone(draft: Draft, shard: Shard, move: Move | None, loss: Loss) -> None:
    """Nobody takes over. What cannot go on without the worker is rolled back."""
    node_id = loss.node_id
    if shard.quarantine and move is not None:
        why = f"shard {shard.id} is in quarantine"
        if move.phase is MovePhase.REMOVING:
            end_move(draft, move, MovePhase.ABORTED, why)
        else:
            roll_back(draft, move, why)
    elif move is not None and (move.phase is MovePhase.COPYING or move.kind.is_reshape):
        roll_back(draft, move, f"the only good copy is on {node_id}, which is {loss.why}")
    if loss.is_process_gone and shard.primary == node_id:
        shard = draft.shard(shard.id)
        draft.put_shard(replace(shard, epoch=shard.epoch + 1))


def _adjust_move(draft: Draft, move: Move, loss: Loss) -> None:
    """What becomes of a shard's move when a worker has left its in-sync set by a fault."""
    node_id, why = loss.node_id, loss.why
    if move.kind.is_reshape:
        roll_back(draft, move, f"its replica {node_id} is {why}")
    elif move.target == node_id:
        if move.kind is MoveKind.TRANSFER or move.phase is MovePhase.CEDING:
            end_move(draft, move, MovePhase.ABORTED, f"its target {node_id} is {why}")
        else:
            why = f"{why} after the cutover; the source stays"
            end_move(draft, move, MovePhase.ABORTED, f"its target {node_id} is {why}")
    elif move.source == node_id:
        if move.phase is MovePhase.COPYING:
            # Nothing is left to take away: what remains is a repair that has already begun.
            draft.put_move(replace(move, source="", kind=MoveKind.REPAIR))
        else:
            rest = move.target or "the rest"
            end_move(draft, move, MovePhase.DONE, f"its source {node_id} is {why}; {rest} serves")
    elif move.phase is MovePhase.REMOVING and draft.shard(move.shard_id).primary == move.source:
        # The source had to take over as the last one that serves, so it must cede before it may go.
        if move.target in draft.shard(move.shard_id).in_sync:
            draft.put_move(replace(move, phase=MovePhase.CEDING))
        else:
            end_move(draft, move, MovePhase.ABORTED, f"its source took over from {node_id}, which is {why}")


def _count_lost_primary(draft: Draft, shard: Shard, loss: Loss) -> Shard:
    """Notes the loss, where it says something of the shard; one too many and the shard is in quarantine."""
    rules = loss.rules
    if not rules.quarantine_workers or shard.quarantine:
        return shard
    since_ms = draft.time_ms - rules.quarantine_window_ms
    recent = [lost for lost in shard.lost_primaries if lost.at_ms >= since_ms and lost.node_id != loss.node_id]
    recent.append(LostPrimary(loss.node_id, draft.time_ms))
    quarantine = ""
    if len(recent) >= rules.quarantine_workers:
        names = ", ".join(lost.node_id for lost in recent)
        window_s = rules.quarantine_window_ms / 1_000
        quarantine = f"{len(recent)} workers were lost within {window_s:g} s while they were its primary: {names}"
        draft.record("shard", shard.id, f"is in quarantine: {quarantine}")
    kept = tuple(recent[-LOST_PRIMARIES_KEPT:])
    return draft.put_shard(replace(shard, lost_primaries=kept, quarantine=quarantine))
