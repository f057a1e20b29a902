"""What every servicer of a master needs, and what every call does: read the state, propose a command.

Consistency: a linearizable read takes this master's own state, at once on a leader with a lease, else after a barrier,
which commits only while a majority follows the leader. A stale read takes that state as it is.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from grpc import aio

from coordinator.api.v1 import cluster_pb2, command_pb2
from coordinator.config import ClusterConfig, MasterSettings
from coordinator.machine.state import State
from coordinator.model import Clock, WallMs
from coordinator.model.errors import CoordinatorError, InvalidRequest, NoLeader, RefusalReason, Refused
from coordinator.raft.node import RaftNode
from coordinator.server.batches import batches, results_of

CALL_TIMEOUT_S = 30.0
"""Deadline of a call whose caller set none."""
ANSWER_RESERVE_S = 0.05
"""What is left of a caller's deadline for the answer's way back, so that it is an answer and not silence."""
LEADER_POLL_S = 0.02
LEADER_WAIT_S = 3.0
"""How long a call waits for an election to end before it is refused with NoLeader."""
REQUEST_ID_BYTES_MAX = 200

Call = aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class MasterContext:
    """One master, as its servicers see it."""

    config: ClusterConfig
    self_id: str
    raft: RaftNode
    clock: Clock
    started_ms: WallMs
    stopping: asyncio.Event
    """Set when the daemon begins to stop: streams end."""
    count_proposal: Callable[[str, str], None] = lambda source, outcome: None
    """Told of each proposal that ended: who wanted it, and its outcome."""

    @property
    def me(self) -> MasterSettings:
        """This master's line in the table."""
        return self.master(self.self_id)

    def master(self, master_id: str) -> MasterSettings:
        """A master's line in the table; KeyError for one that is not there."""
        for master in self.config.masters:
            if master.id == master_id:
                return master
        raise KeyError(master_id)

    @property
    def leader_id(self) -> str:
        """Id of the leader; empty when this master knows none, or has lost the connection to the one that it knew."""
        return self.raft.leader_id or ""

    async def read(self, consistency: cluster_pb2.Consistency.ValueType, call: Call) -> State:
        """The state as fresh as asked for. Raises NoLeader or TimedOut when that cannot be had in time."""
        if consistency != cluster_pb2.CONSISTENCY_STALE:
            await self.wait_for_leader(min(LEADER_WAIT_S, time_left_s(call)))
            await self.raft.read_barrier(time_left_s(call))
        return self.raft.state

    async def submit(self, command: command_pb2.Command, request_id: str, call: Call) -> command_pb2.Applied:
        """Proposes a request's command and waits until it is applied.

        The request id, made here when the caller gave none, is the command's name and its cause. Raises Refused with
        the machine's reason, and what RaftNode.propose raises.
        """
        (applied,) = await self.submit_all([(command, request_id)], call)
        return applied

    async def submit_all(
        self, requests: Sequence[tuple[command_pb2.Command, str]], call: Call
    ) -> list[command_pb2.Applied]:
        """Like `submit` for many commands with their request ids, in few log entries; their order is kept.

        One that is refused stops no other; Refused has the first one's reason. After any error, the same request ids
        make it safe to submit all of them again.
        """
        for command, request_id in requests:
            if len(request_id.encode()) > REQUEST_ID_BYTES_MAX:
                raise InvalidRequest(
                    f"request_id has {len(request_id.encode())} bytes; use at most {REQUEST_ID_BYTES_MAX}, such as a "
                    "UUID"
                )
            command.request_id = request_id or uuid.uuid4().hex
            command.cause = command.cause or command.request_id
        await self.wait_for_leader(min(LEADER_WAIT_S, time_left_s(call)))
        results: list[command_pb2.CommandResult] = []
        for entry, count in batches([command for command, _ in requests], self.config.raft.command_bytes_max):
            results += await self._propose(entry, count, call)
        for result in results:
            if result.HasField("refusal"):
                raise Refused(RefusalReason(result.refusal.code), result.refusal.message)
        return [result.applied for result in results]

    async def _propose(
        self, entry: command_pb2.Command, count: int, call: Call
    ) -> list[command_pb2.CommandResult]:
        failure: CoordinatorError | None = None
        results: list[command_pb2.CommandResult | None] = [None] * count
        try:
            result = await self.raft.propose(entry, min(time_left_s(call), self.config.raft.propose_timeout_s))
            answered = results_of(result, count)
            results[:] = answered
        except CoordinatorError as error:
            failure = error
            raise
        finally:
            for ended in results:
                self.count_ended("api", ended, failure)
        return answered

    def count_ended(
        self, source: str, result: command_pb2.CommandResult | None, failure: CoordinatorError | None
    ) -> None:
        """Counts a proposal's end."""
        if result is not None:
            self.count_proposal(source, result.WhichOneof("outcome") or "none")
        else:
            self.count_proposal(source, type(failure).__name__ if failure is not None else "cancelled")

    async def wait_for_leader(self, timeout_s: float) -> str:
        """Id of the leader that this master knows. Raises NoLeader when there is none within `timeout_s`."""
        loop = asyncio.get_running_loop()
        give_up_at_s = loop.time() + timeout_s
        while not (leader_id := self.leader_id):
            if loop.time() >= give_up_at_s:
                raise NoLeader(
                    f"no master leads cluster {self.config.name!r} at the moment, as far as {self.self_id} knows"
                )
            await asyncio.sleep(LEADER_POLL_S)
        return leader_id


def time_left_s(call: Call) -> float:
    """Seconds that a call may still take here; CALL_TIMEOUT_S when its caller set no deadline."""
    remaining_s = call.time_remaining()
    if remaining_s is None:
        return CALL_TIMEOUT_S
    return max(0.0, min(remaining_s - ANSWER_RESERVE_S, CALL_TIMEOUT_S))
