"""Cuts and joins of ranges, in their place. Shard ids are never reused.

A shard that was never formed holds nothing and is cut at once. One that is formed goes through a move of its own kind:

    SplitShard, MergeShards  -> CEDING: the primaries stop and have every replica apply everything (the seal)
    Reshape                  -> DONE: the new shards take the old ones' place, in one command
    AbortMove, or any fault  -> ABORTED: the epochs grow, and the primaries serve again

The new shards name the old ones as their parents. Sealed stores are equal on every replica, so each makes the new ones
from its own, and no row travels. The replica set is the same before and after; no other move of the shards runs.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.api.v1 import command_pb2
from coordinator.machine.draft import Draft
from coordinator.machine.losses import LOST_PRIMARIES_KEPT
from coordinator.machine.moves import precondition, require_epoch
from coordinator.model import LostPrimary, Move, MoveKind, MovePhase, Shard
from coordinator.model.errors import RefusalReason, Refused


def split_shard(draft: Draft, command: command_pb2.SplitShard) -> None:
    """Cuts a shard in two, or starts to; both halves will have its replicas and new ids."""
    shard = draft.shard(command.shard_id)
    if command.expected_epoch:
        require_epoch(shard, command.expected_epoch)
    _require_still(draft, shard)
    at = command.at or (shard.lo + shard.hi) // 2
    if not shard.lo < at < shard.hi:
        raise Refused(
            RefusalReason.INVALID,
            f"shard {shard.id} cannot be cut at {at}; use more than {shard.lo} and less than {shard.hi}",
        )
    if shard.is_formed:
        move = Move(draft.next_move_id, shard.id, "", "", MoveKind.SPLIT, MovePhase.CEDING, at=at)
        _start(draft, move, command.reason)
    else:
        _cut(draft, shard, at, ())


def merge_shards(draft: Draft, command: command_pb2.MergeShards) -> None:
    """Joins two neighbours with the same replicas into a new shard, or starts to."""
    lower, upper = draft.shard(command.lower_shard_id), draft.shard(command.upper_shard_id)
    if lower.hi != upper.lo:
        raise precondition(
            f"shards {lower.id} and {upper.id} are no neighbours in this order; name the lower one first"
        )
    _require_still(draft, lower)
    _require_still(draft, upper)
    if lower.in_sync != upper.in_sync:
        raise precondition(
            f"shard {lower.id} is on {', '.join(lower.in_sync) or 'no worker'}, shard {upper.id} on "
            f"{', '.join(upper.in_sync) or 'no worker'}; only shards on the same workers can be joined"
        )
    if lower.is_formed != upper.is_formed:
        unformed = upper if lower.is_formed else lower
        raise precondition(f"shard {unformed.id} is still being made; wait for that")
    if lower.is_formed:
        move = Move(
            draft.next_move_id, lower.id, "", "", MoveKind.MERGE, MovePhase.CEDING, other_shard_id=upper.id
        )
        _start(draft, move, command.reason)
    else:
        _join(draft, lower, upper, ())


def reshape(draft: Draft, command: command_pb2.Reshape) -> None:
    """The shards of a move are sealed: the new ones take their place."""
    move = draft.move(command.move_id)
    if not move.kind.is_reshape:
        raise precondition(f"move {move.id} is a {move.kind.name.lower()}; it changes no range")
    shards = [draft.shard(shard_id) for shard_id in move.shard_ids]
    if len(command.expected_epochs) != len(shards):
        raise Refused(RefusalReason.INVALID, f"move {move.id} holds on to {len(shards)} shards; name an epoch for each")
    for shard, epoch in zip(shards, command.expected_epochs, strict=True):
        require_epoch(shard, epoch)
    if move.kind is MoveKind.SPLIT:
        created: tuple[int, ...] = (draft.next_shard_id, draft.next_shard_id + 1)
        outcome = f"shard {shards[0].id} is now shard {created[0]} and shard {created[1]}"
    else:
        created = (draft.next_shard_id,)
        outcome = f"shards {shards[0].id} and {shards[1].id} are now shard {created[0]}"
    # Before its shards are gone: a move in progress holds on to shards that exist.
    draft.put_move(replace(move, phase=MovePhase.DONE, outcome=outcome, created_shard_ids=created))
    draft.record("move", move.id, f"done: {outcome}")
    if move.kind is MoveKind.SPLIT:
        _cut(draft, shards[0], move.at, move.shard_ids)
    else:
        _join(draft, shards[0], shards[1], move.shard_ids)


def _start(draft: Draft, move: Move, reason: str) -> None:
    for shard_id in move.shard_ids:
        shard = draft.shard(shard_id)
        if shard.parents:
            raise precondition(f"shard {shard.id} has only just been made; wait a moment")
        if not draft.node(shard.primary).is_serving:
            raise precondition(f"the primary {shard.primary} of shard {shard.id} does not answer")
    move = replace(move, reason=reason, cause=draft.cause, started_ms=draft.time_ms)
    draft.next_move_id += 1
    draft.started_move_id = move.id
    draft.put_move(move)
    what = " and ".join(str(shard_id) for shard_id in move.shard_ids)
    why = f": {reason}" if reason else ""
    draft.record("move", move.id, f"{move.kind.name.lower()} of shard {what} started{why}")


def _cut(draft: Draft, shard: Shard, at: int, parents: tuple[int, ...]) -> None:
    lower_id = draft.next_shard_id
    draft.next_shard_id += 2
    draft.drop_shard(shard)
    # Epoch 0 means "never assigned"; the halves of such a shard stay so.
    epoch = shard.epoch + 1 if shard.in_sync else 0
    draft.put_shard(replace(shard, id=lower_id, hi=at, epoch=epoch, parents=parents))
    draft.put_shard(replace(shard, id=lower_id + 1, lo=at, epoch=epoch, parents=parents))
    draft.created_ids += [lower_id, lower_id + 1]
    draft.record("shard", shard.id, f"is cut into {lower_id} and {lower_id + 1}")


def _join(draft: Draft, lower: Shard, upper: Shard, parents: tuple[int, ...]) -> None:
    joined = replace(
        lower,
        id=draft.next_shard_id,
        hi=upper.hi,
        epoch=max(lower.epoch, upper.epoch) + 1 if lower.in_sync else 0,
        absent=tuple(sorted({*lower.absent, *upper.absent})),
        moved_ms=max(lower.moved_ms, upper.moved_ms),
        parents=parents,
        lost_primaries=_both(lower, upper),
    )
    draft.next_shard_id += 1
    draft.drop_shard(lower)
    draft.drop_shard(upper)
    draft.put_shard(joined)
    draft.created_ids.append(joined.id)
    draft.record("shard", joined.id, f"is joined from {lower.id} and {upper.id}")


def _both(lower: Shard, upper: Shard) -> tuple[LostPrimary, ...]:
    """The losses of two shards, each worker once, the latest last."""
    latest = {lost.node_id: lost for lost in sorted((*lower.lost_primaries, *upper.lost_primaries), key=_when)}
    return tuple(sorted(latest.values(), key=_when))[-LOST_PRIMARIES_KEPT:]


def _when(lost: LostPrimary) -> tuple[int, str]:
    return lost.at_ms, lost.node_id


def _require_still(draft: Draft, shard: Shard) -> None:
    move = draft.move_on(shard.id)
    if move is not None:
        raise precondition(f"shard {shard.id} is moving (move {move.id}); wait for it, or abort it")
    if shard.quarantine:
        raise precondition(
            f"shard {shard.id} is in quarantine: {shard.quarantine}; `clusterctl shards release {shard.id}` ends that"
        )
