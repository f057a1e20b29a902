"""Drives one controller in tests: a virtual clock, and the real machine for the commands that it proposes."""

from __future__ import annotations

from typing import TypeVar

from coordinator.api.v1 import command_pb2, session_pb2, types_pb2
from coordinator.control import interface
from coordinator.control.reports import Reports
from coordinator.model import Monotonic, WallMs
from coordinator.model.errors import CoordinatorError
from tests.machine_driver import MachineDriver

ActionType = TypeVar("ActionType")


class ControlDriver:
    """Hands events to a controller; `do` also commits what it proposes, and so on until it wants nothing more."""

    def __init__(self, machine: MachineDriver) -> None:
        self.machine = machine
        self.tokens = interface.Tokens()
        self.reports = Reports()
        self.now = Monotonic(100.0)
        self.controller: interface.Controller | None = None
        self.next_wake: Monotonic | None = None

    @property
    def wall(self) -> WallMs:
        """The wall clock, which goes along with the machine's."""
        return self.machine.time_ms

    def tell(self, event: interface.Event) -> list[interface.Action]:
        """What the controller wants after one event; nothing is carried out."""
        assert self.controller is not None
        self.reports.take(event)
        return self._keep(self.controller.on_event(self.now, self.wall, event))

    def advance(self, seconds: float = 0.0) -> list[interface.Action]:
        """What the controller wants after some time."""
        assert self.controller is not None
        self.now = Monotonic(self.now + seconds)
        return self._keep(self.controller.on_advance(self.now, self.wall))

    def _keep(self, step: interface.Step) -> list[interface.Action]:
        self.next_wake = step.next_wake
        return list(step.actions)

    def commit(self, command: command_pb2.Command) -> tuple[command_pb2.CommandResult, list[interface.Action]]:
        """Applies a command and tells the controller of it."""
        operation = command.WhichOneof("operation")
        assert operation is not None
        fields: dict[str, object] = {operation: getattr(command, operation)}
        transition = self.machine.run(cause=command.cause, **fields)  # type: ignore[arg-type]
        return transition.result, self.tell(interface.Applied(transition.state, transition.changes))

    def run(self, **operation: object) -> list[interface.Action]:
        """An operator's command, applied; what the controller wants then."""
        transition = self.machine.accept(**operation)
        return self.tell(interface.Applied(transition.state, transition.changes))

    def settle(self, actions: list[interface.Action]) -> list[interface.Action]:
        """Commits every proposal among the actions and those that follow; all actions, in order."""
        done: list[interface.Action] = []
        waiting = list(actions)
        while waiting:
            action = waiting.pop(0)
            done.append(action)
            if isinstance(action, interface.Propose):
                result, more = self.commit(action.command)
                waiting += more
                waiting += self.tell(interface.ProposalEnded(action.token, result, None))
        return done

    def fail(self, proposal: interface.Action, error: CoordinatorError) -> list[interface.Action]:
        """Ends a proposal without applying it."""
        assert isinstance(proposal, interface.Propose)
        return self.tell(interface.ProposalEnded(proposal.token, None, error))


def only(actions: list[interface.Action], kind: type[ActionType]) -> list[ActionType]:
    """The actions of one kind."""
    return [action for action in actions if isinstance(action, kind)]


def operations(actions: list[interface.Action]) -> list[str]:
    """Names of the operations that are proposed."""
    return [action.command.WhichOneof("operation") or "" for action in only(actions, interface.Propose)]


def hello(name: str, incarnation: str = "1", address: str = "", weight: float = 1.0) -> session_pb2.Hello:
    """What a worker says first."""
    node = types_pb2.Node(id=name, incarnation=incarnation, weight=weight, grpc_address=address or f"{name}:1")
    return session_pb2.Hello(node=node, cluster_name="cluster", protocol_version=1)


def heartbeat(session: int, name: str, sequence: int = 1) -> interface.HeartbeatReceived:
    """A heartbeat of a worker."""
    return interface.HeartbeatReceived(session, name, session_pb2.Heartbeat(sequence=sequence, applied_generation=7))


def report(
    session: int,
    name: str,
    shard_id: int,
    epoch: int,
    progress: session_pb2.ReplicaProgress.ValueType,
    *,
    caught_up: str = "",
    lagging: str = "",
    last_sequence: int = 0,
    reason: str = "",
) -> interface.ReplicasReported:
    """A worker's report on one shard."""
    said = session_pb2.ReplicaReport(
        shard_id=shard_id,
        epoch=epoch,
        progress=progress,
        caught_up=[caught_up] if caught_up else [],
        lagging=[lagging] if lagging else [],
        last_sequence=last_sequence,
        reason=reason,
    )
    return interface.ReplicasReported(session, name, (said,))


def grants(actions: list[interface.Action]) -> list[tuple[int, int]]:
    """Session and heartbeat of each lease grant."""
    return [
        (action.session, action.message.lease_grant.heartbeat_sequence)
        for action in only(actions, interface.SendToNode)
        if action.message.HasField("lease_grant")
    ]


def welcomes(actions: list[interface.Action]) -> list[int]:
    """Sessions that are welcomed."""
    return [
        action.session for action in only(actions, interface.SendToNode) if action.message.HasField("welcome")
    ]
