"""A virtual cluster around the real LeaderControl and the real state machine, for simulations of the control protocol.

Raft is a log with delays that may lose proposals and their answers; a change of leader drops every proposal in flight,
applied or not. Workers are pure objects that follow the session protocol. Streams keep their order and break as a
whole. Time is virtual and everything is drawn from one seed.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import assert_never

from coordinator.api.v1 import command_pb2, session_pb2, types_pb2
from coordinator.config import ClusterConfig
from coordinator.control import interface
from coordinator.control.leader import LeaderControl
from coordinator.machine.codec import job_spec_to_proto, launch_to_proto
from coordinator.machine.machine import apply
from coordinator.machine.state import State
from coordinator.machine.validate import validate, validate_step
from coordinator.model import Monotonic, WallMs
from coordinator.model.errors import NoLeader, OutcomeUnknown
from tests.sim.control_worker import FakeWorker

START_WALL_MS = 1_700_000_000_000


@dataclass
class Faults:
    """How often things go wrong, as shares of 1."""

    proposal_lost: float = 0.0
    proposal_unknown: float = 0.0
    """The answer is lost; half of these are applied."""


@dataclass
class World:
    """The cluster. `copies_min`, when set, is checked for every shard after every entry."""

    seed: int
    config: ClusterConfig
    faults: Faults = field(default_factory=Faults)
    copies_min: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.now = Monotonic(1_000.0)
        self.state = State()
        self.workers: dict[str, FakeWorker] = {}
        self.control: LeaderControl | None = None
        self.entries: list[command_pb2.Command] = []
        self.term = 0
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._order = 0
        self._sessions: dict[int, FakeWorker] = {}
        self._last_session = 0
        self._arrival: dict[tuple[int, str], float] = {}
        self._wakes = 0

    # Time

    @property
    def wall(self) -> WallMs:
        """The leader's wall clock."""
        return WallMs(START_WALL_MS + round(self.now * 1_000))

    def after(self, delay_s: float, what: Callable[[], object]) -> None:
        """Calls `what` after a delay."""
        self._order += 1
        heapq.heappush(self._events, (self.now + delay_s, self._order, what))

    def run(self, seconds: float) -> None:
        """Lets time go on."""
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            time, _, what = heapq.heappop(self._events)
            self.now = Monotonic(max(self.now, time))
            what()
        self.now = Monotonic(end)

    def run_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Lets time go on until the condition holds; fails, naming the seed, when it does not within `seconds`."""
        end = self.now + seconds
        while not condition():
            assert self.now < end, f"seed {self.seed}: {what}, not within {seconds} s"
            self.run(0.05)

    # Masters

    def lead(self) -> None:
        """Another master becomes leader: everything soft is gone."""
        self.depose()
        self.term += 1
        self.control = LeaderControl(
            self.state,
            self.config,
            interface.Tokens(),
            self.now,
            self.wall,
            self.rng,
            leader_id=f"m{self.term % 3 + 1}",
            term=self.term,
        )
        self._advance(self.control)

    def depose(self) -> None:
        """The leader is gone; every stream breaks."""
        self.control = None
        for session, worker in list(self._sessions.items()):
            del self._sessions[session]
            self.after(self.rng.uniform(0.001, 0.2), partial(worker.stream_ended, session))

    def tell(self, event: interface.Event) -> None:
        """Hands an event to the leader, if there is one."""
        if self.control is not None:
            self._carry_out(self.control, self.control.on_event(self.now, self.wall, event))

    def _advance(self, control: LeaderControl) -> None:
        if control is self.control:
            self._carry_out(control, control.on_advance(self.now, self.wall))

    def _carry_out(self, control: LeaderControl, step: interface.Step) -> None:
        for action in step.actions:
            self._act(control, action)
        self._wakes += 1
        number = self._wakes
        if step.next_wake is not None:
            self.after(max(0.000_5, step.next_wake - self.now), lambda: self._wake_up(control, number))

    def _wake_up(self, control: LeaderControl, number: int) -> None:
        """The wake that the latest step asked for; earlier ones are void."""
        if number == self._wakes:
            self._advance(control)

    def _act(self, control: LeaderControl, action: interface.Action) -> None:
        match action:
            case interface.Propose():
                self._propose(control, action)
            case interface.SendToNode():
                self._send(action.session, action.message)
            case interface.SendAssignment():
                assignment = control.assignment(action.node_id)
                self._send(action.session, session_pb2.OpenResponse(assignment=assignment))
            case interface.SendLaunch():
                order = session_pb2.LaunchOrder(
                    launch=launch_to_proto(action.launch), spec=job_spec_to_proto(action.spec)
                )
                session = self.workers[action.node_id].session
                self._send(session, session_pb2.OpenResponse(launch_order=order))
            case interface.StopLaunch():
                token = session_pb2.LaunchToken(
                    job_id=action.job_id, scheduled_at_unix_ms=action.scheduled_at_ms, attempt=action.attempt
                )
                stop = session_pb2.LaunchStop(token=token, reason=action.reason)
                self._send(self.workers[action.node_id].session, session_pb2.OpenResponse(launch_stop=stop))
            case interface.CloseSession():
                farewell = session_pb2.Farewell(reason=action.reason, final=action.final)
                self._send(action.session, session_pb2.OpenResponse(farewell=farewell))
                self.break_session(action.session)
            case _:
                assert_never(action)

    def _propose(self, control: LeaderControl, action: interface.Propose) -> None:
        assert len(action.command.SerializeToString()) < self.config.raft.command_bytes_max
        delay_s = self.rng.uniform(0.001, 0.02)
        chance = self.rng.random()
        token, command = action.token, action.command
        if chance < self.faults.proposal_lost:
            ended = interface.ProposalEnded(token, None, NoLeader("lost"))
            self.after(delay_s, lambda: self._answer(control, ended))
        elif chance < self.faults.proposal_lost + self.faults.proposal_unknown:
            if self.rng.random() < 0.5:
                self.after(delay_s, partial(self._commit, command))
            ended = interface.ProposalEnded(token, None, OutcomeUnknown("lost"))
            self.after(delay_s * 2, lambda: self._answer(control, ended))
        else:
            self.after(delay_s, lambda: self._commit_and_answer(control, token, command))

    def _answer(self, control: LeaderControl, ended: interface.ProposalEnded) -> None:
        if control is self.control:
            self.tell(ended)

    def _commit_and_answer(self, control: LeaderControl, token: int, command: command_pb2.Command) -> None:
        if control is not self.control and self.rng.random() < 0.5:
            return
        result = self._commit(command)
        self._answer(control, interface.ProposalEnded(token, result, None))

    def command(self, **operation: object) -> command_pb2.CommandResult:
        """What an operator asks for, applied at once."""
        return self._commit(command_pb2.Command(cause="operator", **operation))  # type: ignore[arg-type]

    def _commit(self, command: command_pb2.Command) -> command_pb2.CommandResult:
        before = self.state
        transition = apply(before, command, before.index + 1, self.wall)
        self.entries.append(command)
        self._check(before, transition.state, command)
        self.state = transition.state
        self.tell(interface.Applied(transition.state, transition.changes))
        return transition.result

    def _check(self, before: State, after: State, command: command_pb2.Command) -> None:
        validate(after)
        validate_step(before, after)
        if command.HasField("expire_node") and not command.expire_node.reason.startswith("stopped"):
            worker = self.workers[command.expire_node.node_id]
            if worker.incarnation == command.expire_node.incarnation:
                assert worker.lease_until <= self.now, f"seed {self.seed}: {worker.id} is expired and has a lease"
        for shard in after.shards.values():
            copies = len(shard.in_sync)
            assert shard.epoch == 0 or copies >= self.copies_min, f"seed {self.seed}: {shard} after {command}"

    # Network

    def add_worker(self, name: str, zone: str = "", weight: float = 1.0) -> FakeWorker:
        """A new worker, not started yet."""
        worker = FakeWorker(self, name, zone, weight)
        self.workers[name] = worker
        return worker

    def open_session(self, worker: FakeWorker, hello: session_pb2.Hello) -> int:
        """Opens a stream to the leader; 0 when there is none."""
        if self.control is None:
            return 0
        self._last_session += 1
        session = self._last_session
        self._sessions[session] = worker
        self._deliver(session, "up", lambda: self.tell(interface.SessionOpened(session, hello)))
        return session

    def break_session(self, session: int) -> None:
        """A stream breaks; both ends learn of it."""
        worker = self._sessions.get(session)
        if worker is None:
            return

        def leader_learns() -> None:
            if self._sessions.pop(session, None) is not None:
                self.tell(interface.SessionClosed(session, worker.id))

        self._deliver(session, "up", leader_learns)
        self._deliver(session, "down", lambda: worker.stream_ended(session), even_closed=True)

    def report(self, worker: FakeWorker, event: interface.Event) -> None:
        """A message from a worker on its session."""
        self._deliver(worker.session, "up", lambda: self.tell(event))

    def _send(self, session: int, message: session_pb2.OpenResponse) -> None:
        worker = self._sessions.get(session)
        if worker is not None:
            self._deliver(session, "down", lambda: worker.receive(session, message), even_closed=True)

    def _deliver(self, session: int, way: str, what: Callable[[], None], even_closed: bool = False) -> None:
        """In order on each way of each stream, after a random delay."""
        at = max(self.now + self.rng.uniform(0.000_5, 0.01), self._arrival.get((session, way), 0.0))
        self._arrival[session, way] = at
        term = self.term

        def arrive() -> None:
            if even_closed or (session in self._sessions and term == self.term):
                what()

        self.after(at - self.now, arrive)

    # What must come true in the end

    def is_settled(self) -> bool:
        """True when every shard has its copies on workers that may keep them, and nothing moves."""
        keepers = {node.id for node in self.state.nodes.values() if node.may_receive}
        wanted = min(self.state.settings.replicas, len(keepers))
        return (
            bool(self.state.shards)
            and not self.state.moves
            and all(len(shard.in_sync) == wanted for shard in self.state.shards.values())
            and all(shard.is_formed and not shard.parents for shard in self.state.shards.values())
            and all(set(shard.in_sync) <= keepers for shard in self.state.shards.values())
            and all(job.owner in keepers for job in self.state.jobs.values())
        )

    def is_known(self) -> bool:
        """True when nothing moves and every worker that serves holds exactly what the state says."""
        serving = [worker for worker in self.workers.values() if self._is_serving(worker)]
        return self.is_settled() and all(
            {shard_id: held.shard.epoch for shard_id, held in worker.held.items()}
            == {shard.id: shard.epoch for shard in self.state.shards.values() if worker.id in shard.replicas}
            for worker in serving
        )

    def _is_serving(self, worker: FakeWorker) -> bool:
        node = self.state.nodes.get(worker.id)
        return node is not None and node.is_serving

    def node_proto(self, worker: FakeWorker) -> types_pb2.Node:
        """What a worker says of itself."""
        return types_pb2.Node(
            id=worker.id,
            zone=worker.zone,
            weight=worker.weight,
            incarnation=worker.incarnation,
            grpc_address=f"{worker.id}:1",
            http_address=f"{worker.id}:2",
        )
