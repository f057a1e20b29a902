"""A tiny state machine for tests of the consensus: it remembers every payload with index and time.

The payloads live in `State.cluster_id`, one line each, so that State needs no field for tests.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.api.v1 import command_pb2
from coordinator.machine.state import State, Transition
from coordinator.model import WallMs
from coordinator.model.errors import Damaged
from coordinator.raft import Machine

POISON = "raise"
"""A command with this cause makes `apply` raise, which no machine may."""


def command(cause: str) -> command_pb2.Command:
    """A command that is known by its cause."""
    return command_pb2.Command(cause=cause, barrier=command_pb2.Barrier())


def applied(state: State) -> list[str]:
    """Causes of the commands in the order of their application; barriers are left out."""
    return [line.split(" ")[2] for line in state.cluster_id.splitlines() if not line.endswith(" barrier")]


def times(state: State) -> list[int]:
    """Times of the commands."""
    return [int(line.split(" ")[1]) for line in state.cluster_id.splitlines()]


def _apply(state: State, payload: bytes, index: int, time_ms: WallMs) -> Transition:
    cause = command_pb2.Command.FromString(payload).cause
    if cause == POISON:
        raise RuntimeError("poison")
    line = f"{index} {time_ms} {cause}\n"
    result = command_pb2.CommandResult(applied=command_pb2.Applied(index=index))
    return Transition(replace(state, cluster_id=state.cluster_id + line, index=index, time_ms=time_ms), result)


def _encode(state: State) -> bytes:
    return f"{state.index} {state.time_ms}\n{state.cluster_id}".encode()


def _decode(data: bytes) -> State:
    try:
        head, _, lines = data.decode().partition("\n")
        index, time_ms = (int(word) for word in head.split())
    except ValueError:
        raise Damaged("no state of the test machine") from None
    return State(cluster_id=lines, index=index, time_ms=WallMs(time_ms))


MACHINE = Machine(_apply, _encode, _decode, lambda state: "")
