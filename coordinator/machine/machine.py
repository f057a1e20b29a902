"""The replicated state machine: (state, command, index, time) -> transition. Pure, total, deterministic.

Theory of operation. Every master applies the same log entries in the same order, so everything here depends on the
arguments alone: no clock, no randomness, no iteration in map order. Time is the largest time of any entry so far; it
never runs backwards. A command that is refused changes nothing but index and time. A request id that was answered
before is answered the same again, without being applied (exactly once for clients that retry): results are remembered
for RESULTS_KEPT requests and RESULT_AGE_MS_MAX, whichever ends first.

A batch is its commands one after another, at one index and one time: whatever holds for each of them alone
(refusals, remembered results, faults) holds inside it, and nothing else does. So a batch that is proposed again
after an unknown outcome is as safe as its commands' request ids make it; it has none of its own, which would make
one request's result as large as a thousand.

`apply` never raises. A fault in a handler is itself deterministic, so it becomes a refusal like any other (and is
logged): an exception would stop every master at the same entry for ever.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from google.protobuf.message import DecodeError

from coordinator.api.v1 import command_pb2
from coordinator.machine import cron, launches, losses, masters, moves, nodes, ranges, reshape
from coordinator.machine.draft import Draft
from coordinator.machine.state import Change, RememberedResult, State, Transition
from coordinator.model import LogRecord, WallMs
from coordinator.model.errors import RefusalReason, Refused

logger = logging.getLogger(__name__)

RESULTS_KEPT = 65_536
"""At 5,000 commands per second, more than the masters commit, 13 s: longer than a client goes on asking by default."""
RESULT_AGE_MS_MAX = 600_000
FORGOTTEN_AT_ONCE_MAX = 1_000
"""Results that one command makes the machine forget at most: after a busy and then a quiet time all are too old, and to
drop them together would hold the masters up for a quarter of a second."""
REQUEST_ID_LENGTH_MAX = 200
BATCH_COMMANDS_MAX = 1_000
"""A master hears nobody while it applies an entry. A command takes 30 to 70 us: 70 ms at most, a quarter of the
shortest election timeout."""


def _barrier(draft: Draft, command: command_pb2.Barrier) -> None:
    """Changes nothing."""


HANDLERS: dict[str, Callable[[Draft, Any], None]] = {
    "bootstrap_cluster": ranges.bootstrap_cluster,
    "change_settings": ranges.change_settings,
    "barrier": _barrier,
    "register_node": nodes.register_node,
    "activate_node": nodes.activate_node,
    "suspect_node": nodes.suspect_node,
    "expire_node": nodes.expire_node,
    "drain_node": nodes.drain_node,
    "undrain_node": nodes.undrain_node,
    "set_node_weight": nodes.set_node_weight,
    "leave_node": nodes.leave_node,
    "remove_node": nodes.remove_node,
    "assign_shards": moves.assign_shards,
    "start_move": moves.start_move,
    "promote_replica": moves.promote_replica,
    "cut_over": moves.cut_over,
    "remove_replica": moves.remove_replica,
    "abort_move": moves.abort_move,
    "split_shard": reshape.split_shard,
    "merge_shards": reshape.merge_shards,
    "reshape": reshape.reshape,
    "form_shards": moves.form_shards,
    "drop_replica": losses.drop_replica,
    "release_shard": losses.release_shard,
    "apply_job": cron.apply_job,
    "delete_job": cron.delete_job,
    "set_job_paused": cron.set_job_paused,
    "assign_jobs": cron.assign_jobs,
    "commit_launch": launches.commit_launch,
    "record_no_launch": launches.record_no_launch,
    "start_launch": launches.start_launch,
    "finish_launch": launches.finish_launch,
    "lose_launch": launches.lose_launch,
    "assign_launch": launches.assign_launch,
    "cancel_launch": launches.cancel_launch,
    "decline_launch": launches.decline_launch,
    "admit_master": masters.admit_master,
}
"""One handler for each operation of command.proto but the batch, which is applied here; a test compares the lists."""


def apply_bytes(state: State, payload: bytes, index: int, time_ms: WallMs) -> Transition:
    """Applies one log entry as it stands on disk. Bytes that are no command are refused like a bad command."""
    try:
        command = command_pb2.Command.FromString(payload)
    except DecodeError:
        time_ms = max(state.time_ms, time_ms)
        result = _refusal(Refused(RefusalReason.INVALID, "the log entry is no command"))
        return Transition(replace(state, index=index, time_ms=time_ms), result)
    return apply(state, command, index, time_ms)


def apply(state: State, command: command_pb2.Command, index: int, time_ms: WallMs) -> Transition:
    """The state after `command` at log position `index`, the command's result, and what it changed. Never raises.

    `index` must be larger than that of every entry before; `time_ms` is the wall clock of the leader that proposed it.
    """
    time_ms = max(state.time_ms, time_ms)
    if command.WhichOneof("operation") == "batch":
        return _apply_batch(state, command, index, time_ms)
    return _apply_one(state, command, index, time_ms, command.cause)


def _apply_batch(state: State, command: command_pb2.Command, index: int, time_ms: WallMs) -> Transition:
    """The commands of a batch, one after another. A batch that is none is refused whole."""
    commands = command.batch.commands
    if not 1 <= len(commands) <= BATCH_COMMANDS_MAX:
        problem = f"a batch of {len(commands)} commands; use 1 to {BATCH_COMMANDS_MAX}"
    elif any(inner.WhichOneof("operation") == "batch" for inner in commands):
        problem = "a batch inside a batch; put its commands into the outer one"
    elif command.request_id:
        problem = "a batch with a request id; give one to each of its commands instead"
    else:
        results: list[command_pb2.CommandResult] = []
        changes: list[Change] = []
        records: list[LogRecord] = []
        for inner in commands:
            transition = _apply_one(state, inner, index, time_ms, inner.cause or command.cause)
            state = transition.state
            results.append(transition.result)
            changes += transition.changes
            records += transition.records
        applied = command_pb2.Applied(index=index, results=results)
        return Transition(state, command_pb2.CommandResult(applied=applied), tuple(changes), tuple(records))
    return Transition(replace(state, index=index, time_ms=time_ms), _refusal(Refused(RefusalReason.INVALID, problem)))


def _apply_one(state: State, command: command_pb2.Command, index: int, time_ms: WallMs, cause: str) -> Transition:
    """A command that is no batch; `time_ms` is not before the state's."""
    remembered = state.results.get(command.request_id) if command.request_id else None
    if remembered is not None:
        return Transition(replace(state, index=index, time_ms=time_ms), remembered.result)
    draft = Draft(state, index, time_ms, cause)
    try:
        _run(draft, command)
        applied = command_pb2.Applied(
            index=index,
            created_ids=draft.created_ids,
            scheduled_at_unix_ms=draft.scheduled_at_ms,
            move_id=draft.started_move_id,
        )
        result = command_pb2.CommandResult(applied=applied)
    except Refused as refusal:
        draft = Draft(state, index, time_ms, cause)
        result = _refusal(refusal)
    except Exception as error:
        logger.exception("the handler of %s failed at index %d", command.WhichOneof("operation"), index)
        draft = Draft(state, index, time_ms, cause)
        result = _refusal(Refused(RefusalReason.PRECONDITION, f"internal fault, please report it: {error!r}"))
    if 0 < len(command.request_id) <= REQUEST_ID_LENGTH_MAX:
        _remember(draft, command.request_id, result)
    return Transition(draft.finish(), result, tuple(draft.changes), tuple(draft.records))


def _run(draft: Draft, command: command_pb2.Command) -> None:
    if len(command.request_id) > REQUEST_ID_LENGTH_MAX:
        raise Refused(
            RefusalReason.INVALID,
            f"the request id has {len(command.request_id)} characters, {REQUEST_ID_LENGTH_MAX} at most are allowed",
        )
    operation = command.WhichOneof("operation")
    if operation is None:
        raise Refused(RefusalReason.INVALID, "the command names no operation that this version knows")
    HANDLERS[operation](draft, getattr(command, operation))


def _refusal(refusal: Refused) -> command_pb2.CommandResult:
    code = command_pb2.RefusalCode.ValueType(refusal.reason.value)
    return command_pb2.CommandResult(refusal=command_pb2.Refusal(code=code, message=str(refusal)))


def _remember(draft: Draft, request_id: str, result: command_pb2.CommandResult) -> None:
    """Remembers a result, and forgets the oldest ones beyond count or age."""
    results = draft.results.set(request_id, RememberedResult(request_id, draft.index, draft.time_ms, result))
    order = draft.result_order.set(draft.next_result_position, request_id)
    next_position = draft.next_result_position + 1
    for _ in range(FORGOTTEN_AT_ONCE_MAX):
        oldest = next_position - len(order)
        kept = results[order[oldest]]
        if len(order) <= RESULTS_KEPT and draft.time_ms - kept.at_ms <= RESULT_AGE_MS_MAX:
            break
        results = results.delete(kept.request_id)
        order = order.delete(oldest)
    draft.results, draft.result_order, draft.next_result_position = results, order, next_position
