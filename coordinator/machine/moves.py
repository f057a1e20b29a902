"""Commands about moves: where a move changes its phase, and a shard its replica set as planned.

losses.py has what faults do to both, reshape.py cuts and joins.

Every change of a replica set adds one to the shard's epoch, and every command compares the epoch on which it was
decided (PacificA, section 4.2: the configuration manager is a compare-and-set on the configuration number).

Order rule (DESIGN.md section 7): the set whose answers the primary needs grows before the command and shrinks after it.
Here that shows as: promotion follows the target's report, cutover follows the source's report that it has ceded,
removal comes last.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.api.v1 import command_pb2
from coordinator.machine.draft import Draft
from coordinator.model import Move, MoveKind, MovePhase, NodeState, Shard
from coordinator.model.errors import RefusalReason, Refused


def with_name(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The names and one more, sorted."""
    return tuple(sorted({*names, name}))


def without_name(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The names but one."""
    return tuple(other for other in names if other != name)


def require_epoch(shard: Shard, expected: int) -> None:
    """Refuses what was decided on another epoch."""
    if shard.epoch != expected:
        raise Refused(
            RefusalReason.STALE, f"shard {shard.id} is at epoch {shard.epoch}, the command was decided at {expected}"
        )


def precondition(message: str) -> Refused:
    """A refusal because of how things stand."""
    return Refused(RefusalReason.PRECONDITION, message)


def start_move(draft: Draft, command: command_pb2.StartMove) -> None:
    """Starts a move; its target joins the shard at once."""
    shard = draft.shard(command.shard_id)
    require_epoch(shard, command.expected_epoch)
    running = draft.move_on(shard.id)
    if running is not None:
        raise precondition(f"shard {shard.id} is already moving (move {running.id})")
    if not command.kind:
        raise Refused(RefusalReason.INVALID, f"the move of shard {shard.id} names no kind")
    kind = MoveKind(command.kind)
    if kind.is_reshape:
        raise Refused(RefusalReason.INVALID, f"a {kind.name.lower()} is started by a command of its own")
    _check_move(draft, shard, kind, command.source, command.target)
    if kind is MoveKind.TRANSFER:
        phase = MovePhase.CEDING
    elif kind is MoveKind.SURPLUS:
        phase = MovePhase.REMOVING
    else:
        phase = MovePhase.COPYING
        draft.put_shard(
            replace(
                shard,
                epoch=shard.epoch + 1,
                joining=with_name(shard.joining, command.target),
                absent=without_name(shard.absent, command.target),
            )
        )
    move = Move(
        id=draft.next_move_id,
        shard_id=shard.id,
        source=command.source,
        target=command.target,
        kind=kind,
        phase=phase,
        reason=command.reason,
        cause=draft.cause,
        started_ms=draft.time_ms,
    )
    draft.next_move_id += 1
    draft.created_ids.append(move.id)
    draft.put_move(move)
    where = f"from {move.source or 'nowhere'} to {move.target or 'nowhere'}"
    draft.record("move", move.id, f"{kind.name.lower()} of shard {shard.id} {where} started: {move.reason}")


def _check_move(draft: Draft, shard: Shard, kind: MoveKind, source: str, target: str) -> None:
    """Refuses a move that does not fit its kind, the shard or the workers."""
    if not shard.in_sync:
        raise precondition(f"shard {shard.id} has never been assigned, so there is nothing to move")
    if not shard.is_formed:
        raise precondition(f"shard {shard.id} is still being made by {', '.join(shard.in_sync)}; wait for that")
    if shard.quarantine:
        raise precondition(
            f"shard {shard.id} is in quarantine: {shard.quarantine}; `clusterctl shards release {shard.id}` ends that"
        )
    if bool(source) == (kind is MoveKind.REPAIR):
        wanted = "no source" if kind is MoveKind.REPAIR else "a source"
        raise Refused(RefusalReason.INVALID, f"a {kind.name.lower()} move has {wanted}, not {source!r}")
    if bool(target) == (kind is MoveKind.SURPLUS):
        wanted = "no target" if kind is MoveKind.SURPLUS else "a target"
        raise Refused(RefusalReason.INVALID, f"a {kind.name.lower()} move has {wanted}, not {target!r}")
    if source and source not in shard.in_sync:
        raise precondition(f"worker {source} does not hold shard {shard.id}")
    if kind is MoveKind.SURPLUS:
        if source == shard.primary:
            raise precondition(f"worker {source} is primary of shard {shard.id}; transfer the role first")
        if len(shard.in_sync) < 2:
            raise precondition(f"worker {source} has the last copy of shard {shard.id}")
        return
    node = draft.node(target)
    if kind is MoveKind.TRANSFER:
        if source != shard.primary or target == source or target not in shard.in_sync:
            raise precondition(
                f"shard {shard.id} cannot hand its primary role from {source} to {target}: the primary is "
                f"{shard.primary}, in sync are {', '.join(shard.in_sync)}"
            )
        if not node.is_serving:
            raise precondition(f"worker {target} is {node.state.name.lower()} and cannot become primary")
        return
    if target in shard.replicas:
        raise precondition(f"worker {target} already holds shard {shard.id}")
    if not node.may_receive:
        suffix = ", suspect" if node.is_suspect else ""
        raise precondition(f"worker {target} is {node.state.name.lower()}{suffix} and cannot receive a shard")


def promote_replica(draft: Draft, command: command_pb2.PromoteReplica) -> None:
    """The target has caught up: joining becomes in sync."""
    move = draft.move(command.move_id)
    shard = draft.shard(move.shard_id)
    require_epoch(shard, command.expected_epoch)
    if move.phase is not MovePhase.COPYING:
        raise precondition(f"move {move.id} is {move.phase.name.lower()}, its target is already in sync")
    in_sync = with_name(shard.in_sync, move.target)
    # A place is kept only until the shard is whole: afterwards the worker that was away is one candidate among others.
    leaving = 1 if move.source in in_sync else 0
    whole = len(in_sync) - leaving >= draft.settings.replicas
    shard = draft.put_shard(
        replace(
            shard,
            epoch=shard.epoch + 1,
            in_sync=in_sync,
            joining=without_name(shard.joining, move.target),
            absent=() if whole else shard.absent,
        )
    )
    draft.record("shard", shard.id, f"{move.target} is in sync (move {move.id}), epoch {shard.epoch}")
    if not move.source:
        end_move(draft, move, MovePhase.DONE, f"{move.target} holds the shard")
    elif move.source == shard.primary:
        draft.put_move(replace(move, phase=MovePhase.CEDING))
    else:
        draft.put_move(replace(move, phase=MovePhase.REMOVING))


def cut_over(draft: Draft, command: command_pb2.CutOver) -> None:
    """The old primary has ceded: the target becomes primary."""
    move = draft.move(command.move_id)
    shard = draft.shard(move.shard_id)
    require_epoch(shard, command.expected_epoch)
    if move.phase is not MovePhase.CEDING or move.kind.is_reshape:
        what = f"a {move.kind.name.lower()}" if move.kind.is_reshape else move.phase.name.lower()
        raise precondition(f"move {move.id} is {what}, not ceding")
    shard = draft.put_shard(replace(shard, epoch=shard.epoch + 1, primary=move.target))
    draft.record("shard", shard.id, f"{move.target} is primary, was {move.source} (move {move.id})")
    if move.kind is MoveKind.TRANSFER:
        end_move(draft, move, MovePhase.DONE, f"{move.target} is primary")
    else:
        draft.put_move(replace(move, phase=MovePhase.REMOVING))


def remove_replica(draft: Draft, command: command_pb2.RemoveReplica) -> None:
    """The source gives its copy up; the move ends."""
    move = draft.move(command.move_id)
    shard = draft.shard(move.shard_id)
    require_epoch(shard, command.expected_epoch)
    if move.phase is not MovePhase.REMOVING:
        raise precondition(f"move {move.id} is {move.phase.name.lower()}, not removing")
    if move.source == shard.primary or without_name(shard.in_sync, move.source) == ():
        raise precondition(f"worker {move.source} is still needed by shard {shard.id}")
    draft.put_shard(replace(shard, epoch=shard.epoch + 1, in_sync=without_name(shard.in_sync, move.source)))
    end_move(draft, move, MovePhase.DONE, f"{move.source} gave the shard up")


def abort_move(draft: Draft, command: command_pb2.AbortMove) -> None:
    """Rolls a move back; after its cutover it can only go forward."""
    move = draft.move(command.move_id)
    if move.phase is MovePhase.REMOVING:
        raise precondition(f"move {move.id} is past its cutover and goes forward; it cannot be aborted")
    roll_back(draft, move, command.reason or "aborted")


def roll_back(draft: Draft, move: Move, why: str) -> None:
    """Takes the target out again. The epoch grows in any case, so that a primary that has ceded serves again."""
    if move.kind.is_reshape:
        for shard_id in move.shard_ids:
            sealed = draft.shard(shard_id)
            draft.put_shard(replace(sealed, epoch=sealed.epoch + 1))
        end_move(draft, move, MovePhase.ABORTED, why)
        return
    shard = draft.shard(move.shard_id)
    in_sync = shard.in_sync
    if move.kind is not MoveKind.TRANSFER and move.target != shard.primary and len(in_sync) > 1:
        in_sync = without_name(in_sync, move.target)
    draft.put_shard(
        replace(shard, epoch=shard.epoch + 1, in_sync=in_sync, joining=without_name(shard.joining, move.target))
    )
    end_move(draft, move, MovePhase.ABORTED, why)


def end_move(draft: Draft, move: Move, phase: MovePhase, outcome: str) -> None:
    """Files the move under the ended ones."""
    draft.put_move(replace(move, phase=phase, outcome=outcome))
    shard = draft.shard(move.shard_id)
    # The dwell time protects a placement that was chosen; a repair fills a hole and says nothing of what is best.
    if phase is MovePhase.DONE and move.kind is not MoveKind.REPAIR:
        draft.put_shard(replace(shard, moved_ms=draft.time_ms))
    draft.record("move", move.id, f"{phase.name.lower()}: {outcome}")


def assign_shards(draft: Draft, command: command_pb2.AssignShards) -> None:
    """First replicas of shards that never had one; all or none."""
    for assignment in command.assignments:
        shard = draft.shard(assignment.shard_id)
        replicas = list(assignment.replicas)
        if shard.epoch != 0:
            raise Refused(RefusalReason.STALE, f"shard {shard.id} has been assigned before; move its replicas instead")
        if not replicas or len(set(replicas)) != len(replicas):
            raise Refused(RefusalReason.INVALID, f"shard {shard.id} needs distinct workers, not {replicas}")
        for name in replicas:
            node = draft.node(name)
            if node.state is not NodeState.ACTIVE or node.is_suspect:
                raise precondition(f"worker {name} is {node.state.name.lower()} and cannot receive shard {shard.id}")
        draft.put_shard(replace(shard, epoch=1, primary=replicas[0], in_sync=tuple(sorted(replicas))))
    draft.record("shard", "all", f"{len(command.assignments)} shards got their first workers")


def form_shards(draft: Draft, command: command_pb2.FormShards) -> None:
    """Every replica of these shards has made its store: they are served, or need their parents no longer."""
    formed = 0
    for report in command.shards:
        shard = draft.shards.get(report.shard_id)
        if shard is None or shard.epoch != report.epoch or not shard.in_sync:
            continue
        formed += not shard.is_formed
        draft.put_shard(replace(shard, is_formed=True, parents=()))
    if formed:
        draft.record("shard", "all", f"{formed} {'shard is' if formed == 1 else 'shards are'} formed and served")
