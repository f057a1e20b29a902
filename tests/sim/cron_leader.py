"""A master that leads the cron world: the real controllers of cron and of membership, the real placement of jobs.

They are put together as coordinator/control/leader.py does it, without those that care for shards: there are none here.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, assert_never

from coordinator.api.v1 import command_pb2, session_pb2, types_pb2
from coordinator.config import ClusterConfig
from coordinator.control import interface
from coordinator.control.assignment import AssignmentIndex, build_assignment
from coordinator.control.cron import CronControl
from coordinator.control.membership import Membership
from coordinator.control.proposals import Proposals
from coordinator.control.reports import LossWishes, Reports
from coordinator.machine.codec import job_spec_to_proto
from coordinator.machine.state import JobChanged, NodeChanged, SettingsChanged, State
from coordinator.model import CronJobSpec, Launch, Monotonic, WallMs
from coordinator.model.errors import NoLeader, OutcomeUnknown
from coordinator.placement.planner import Planner
from tests.sim.cron_time import Alarm

if TYPE_CHECKING:
    from tests.sim.cron_world import Master, World


FOR_OWNERS = (interface.Applied, interface.ProposalEnded)
ORDERS = (interface.SendLaunch, interface.StopLaunch)
"""Sent last, behind everything that was decided with them."""


@dataclass(slots=True, eq=False)
class Flight:
    """A proposal on its way into the log. `token` 0: an operator's."""

    token: int
    command: command_pb2.Command
    wall: WallMs


class JobOwners:
    """Keeps owners and backups as the planner wants them: BalanceControl's part for jobs."""

    def __init__(self, state: State, config: ClusterConfig, tokens: interface.Tokens) -> None:
        self._state = state
        self._planner = Planner(config.placement)
        self._proposals = Proposals("jobs", tokens)
        self._is_due = True

    def on_event(self, now: Monotonic, event: interface.Event) -> interface.Step:
        """Takes an event in."""
        match event:
            case interface.Applied(state, changes):
                self._state = state
                if not self._is_due:
                    self._is_due = any(map(self._matters, changes))
            case interface.ProposalEnded():
                ended = self._proposals.end(now, event)
                self._is_due |= ended is not None
            case _:
                pass
        return self.on_advance(now)

    def on_advance(self, now: Monotonic) -> interface.Step:
        """Takes the passing of time in."""
        if not self._is_due or not self._proposals.is_free(now, self._state.index, "all"):
            return interface.Step((), self._proposals.next_free(now) if self._is_due else None)
        self._is_due = False
        wanted = [
            command_pb2.AssignJobs.Assignment(job_id=job_id, owner=owner, backups=backups)
            for job_id, owner, backups in self._planner.assign_jobs(self._state)
        ]
        if not wanted:
            return interface.Step()
        command = command_pb2.Command(assign_jobs=command_pb2.AssignJobs(assignments=wanted))
        return interface.Step(self._proposals.propose(now, self._state.index, "all", command))

    @staticmethod
    def _matters(change: object) -> bool:
        if isinstance(change, JobChanged):
            before, after = change.before, change.after
            return before is None or after is None or (before.owner, before.spec) != (after.owner, after.spec)
        return isinstance(change, (NodeChanged, SettingsChanged))


class Leader:
    """One master from the moment when it leads until it does not."""

    def __init__(self, world: World, master: Master, term: int) -> None:
        self.world = world
        self.master = master
        self.term = term
        self.is_alive = True
        self.is_cut = False
        """No majority hears it: nothing that it proposes is committed, and it grants no lease."""
        self._rng = random.Random(f"{world.seed} leader {term}")
        self._flights: list[Flight] = []
        self._last_commit_at = 0.0
        self._events: deque[interface.Event] = deque()
        self._is_busy = False
        self._specs: dict[int, tuple[CronJobSpec, types_pb2.CronJobSpec]] = {}
        state, tokens, time = world.state, interface.Tokens(), world.time
        self._index = AssignmentIndex(state)
        self.membership = Membership(
            state,
            world.config.session,
            tokens,
            time.session_now,
            index=self._index,
            losses=LossWishes(Reports(), world.config.moves, 1),
            needs_discovery=False,
            leader_id=master.id,
            term=term,
        )
        self._owners = JobOwners(state, world.config, tokens)
        self.cron = CronControl(state, world.config.cron, tokens, time.now, master.wall)

        def clock() -> float:
            return time.now

        self._cron_alarm = Alarm(time.at, clock, self._advance_cron)
        self._owners_alarm = Alarm(time.at, clock, self._advance_owners)
        self._session_alarm = Alarm(time.at_session, lambda: time.session_now, self._advance_membership)
        self._advance_membership()
        self._advance_owners()
        self._advance_cron()

    # Events

    def take(self, session: int, node_id: str, request: session_pb2.OpenRequest) -> None:
        """A message of a worker came in."""
        kind = request.WhichOneof("message")
        if kind == "hello":
            self.tell(interface.SessionOpened(session, request.hello))
        elif kind == "heartbeat":
            self.tell(interface.HeartbeatReceived(session, node_id, request.heartbeat))
        elif kind == "launch_report":
            self.tell(interface.LaunchReported(session, node_id, request.launch_report))
        elif kind == "goodbye":
            self.tell(interface.GoodbyeReceived(session, node_id, request.goodbye.reason))

    def knows_slots(self, node_id: str, free: int) -> bool:
        """Whether its controllers are right about a worker's having a free slot."""
        return self.cron._launches._slots.has_free(node_id) == (free > 0)

    def tell(self, event: interface.Event) -> None:
        """Hands an event to the controllers, one at a time."""
        self._events.append(event)
        if self._is_busy:
            return
        self._is_busy = True
        while self._events and self.is_alive:
            self._on_event(self._events.popleft())
        self._is_busy = False

    def _on_event(self, event: interface.Event) -> None:
        time = self.world.time
        if isinstance(event, interface.Applied):
            self._index.take(event.state, event.changes)
        concerns_cron = self._concerns_cron(event)
        step = self.membership.on_event(time.session_now, WallMs(0), event)  # It does not look at the wall clock.
        self._session_alarm.want(step.next_wake)
        actions = list(step.actions)
        if isinstance(event, FOR_OWNERS):
            step = self._owners.on_event(time.now, event)
            self._owners_alarm.want(step.next_wake)
            actions += step.actions
        if concerns_cron:
            actions += self._tell_cron(event)
        self._finish(actions)

    def _concerns_cron(self, event: interface.Event) -> bool:
        match event:
            case interface.SessionOpened():
                return False
            case interface.SessionClosed() | interface.GoodbyeReceived() | interface.LaunchReported():
                return self.membership.is_current(event.node_id, event.session)
            case interface.HeartbeatReceived():
                return self.membership.is_current(event.node_id, event.session)
            case _:
                return True

    def _tell_cron(self, event: interface.Event) -> tuple[interface.Action, ...]:
        step = self.cron.on_event(self.world.time.now, self.master.wall, event)
        self._cron_alarm.want(step.next_wake)
        return step.actions

    def _advance_membership(self) -> None:
        if self.is_alive:
            step = self.membership.on_advance(self.world.time.session_now, WallMs(0))
            self._session_alarm.want(step.next_wake)
            self._finish(list(step.actions))

    def _advance_owners(self) -> None:
        if self.is_alive:
            step = self._owners.on_advance(self.world.time.now)
            self._owners_alarm.want(step.next_wake)
            self._finish(list(step.actions))

    def _advance_cron(self) -> None:
        if self.is_alive:
            step = self.cron.on_advance(self.world.time.now, self.master.wall)
            self._cron_alarm.want(step.next_wake)
            self._finish(list(step.actions))

    def look_at_clock(self) -> None:
        """The look at the wall clock that the controller asks for every second; played after steps only."""
        self._advance_cron()

    # Actions

    def _finish(self, actions: list[interface.Action]) -> None:
        for opened in self.membership.take_welcomed():
            actions += self._tell_cron(opened)
        if not actions:
            return
        orders = [action for action in actions if isinstance(action, ORDERS)]
        for action in actions:
            if self.is_alive and not isinstance(action, ORDERS):
                self._act(action)
        for order in orders:
            if self.is_alive:
                self._act(order)

    def _act(self, action: interface.Action) -> None:
        net = self.world.net
        match action:
            case interface.Propose():
                self._propose(action)
            case interface.SendToNode():
                if action.message.HasField("lease_grant") and self.is_cut:
                    return
                if action.message.HasField("launch_report_receipt"):
                    self.world.hook("receipt")
                    if not self.is_alive:
                        return
                net.send_down(action.session, action.message)
            case interface.SendAssignment():
                assignment = build_assignment(self.world.state, action.node_id, self._index)
                net.send_down(action.session, session_pb2.OpenResponse(assignment=assignment))
            case interface.SendLaunch():
                session = self.membership.session_of(action.node_id)
                if session is not None:
                    net.send_down(session, self._order(action.launch, action.spec))
                    self.world.hook("ordered")
            case interface.StopLaunch():
                session = self.membership.session_of(action.node_id)
                if session is not None:
                    token = session_pb2.LaunchToken(
                        job_id=action.job_id, scheduled_at_unix_ms=action.scheduled_at_ms, attempt=action.attempt
                    )
                    stop = session_pb2.LaunchStop(token=token, reason=action.reason)
                    net.send_down(session, session_pb2.OpenResponse(launch_stop=stop))
                    self.world.counts["stops"] += 1
            case interface.CloseSession():
                farewell = session_pb2.Farewell(reason=action.reason, final=action.final)
                net.send_down(action.session, session_pb2.OpenResponse(farewell=farewell))
                net.close(action.session)
            case _:
                assert_never(action)

    def _order(self, launch: Launch, spec: CronJobSpec) -> session_pb2.OpenResponse:
        known = self._specs.get(id(spec))
        if known is None or known[0] is not spec:
            known = self._specs[id(spec)] = (spec, job_spec_to_proto(spec))
        order = session_pb2.LaunchOrder(
            launch=types_pb2.Launch(
                job_id=launch.job_id, scheduled_at_unix_ms=launch.scheduled_at_ms, attempt=launch.attempt
            ),
            spec=known[1],
        )
        return session_pb2.OpenResponse(launch_order=order)

    # The log

    def _propose(self, action: interface.Propose) -> None:
        self.world.hook(f"proposed {action.command.WhichOneof('operation')}")
        if not self.is_alive:
            return
        chance, faults = self._rng.random(), self.world.log_faults
        if chance < faults.lost:
            ended = interface.ProposalEnded(action.token, None, NoLeader("lost"))
            self.world.time.after(self._rng.uniform(0.001, 0.02), partial(self.tell, ended))
            return
        flight = Flight(action.token, action.command, self.master.wall)
        is_answered = chance >= faults.lost + faults.unknown
        if is_answered or chance < faults.lost + faults.unknown / 2:
            self.submit(flight, is_answered=is_answered)
        else:
            self._submit_late(flight)

    def _submit_late(self, flight: Flight) -> None:
        """The leader is told that nobody knows; the command is committed after it may have proposed it again."""
        ended = interface.ProposalEnded(flight.token, None, OutcomeUnknown("no answer in time"))
        flight.token = 0
        self._flights.append(flight)
        self.world.time.after(self._rng.uniform(0.001, 0.02), partial(self.tell, ended))
        self.world.time.after(self._rng.uniform(0.02, 3.0), partial(self._commit, flight, True))

    def submit(self, flight: Flight, *, is_answered: bool = True) -> None:
        """Puts a command into the log behind those before it."""
        self._flights.append(flight)
        self._last_commit_at = max(self._last_commit_at, self.world.time.now + self._rng.uniform(0.001, 0.01))
        self.world.time.at(self._last_commit_at, partial(self._commit, flight, is_answered))

    def _commit(self, flight: Flight, is_answered: bool) -> None:
        if not self.is_alive or self.is_cut:
            return
        self._flights.remove(flight)
        transition = self.world.apply(flight.command, flight.wall)
        if not self.is_alive:
            return
        ended = interface.ProposalEnded(flight.token, transition.result, None)
        if not is_answered:
            ended = interface.ProposalEnded(flight.token, None, OutcomeUnknown("lost"))
        is_answer_first = self._rng.random() < 0.05
        if is_answer_first and flight.token:
            self.tell(ended)
        self.tell(interface.Applied(transition.state, transition.changes))
        if not is_answer_first and flight.token:
            self.tell(ended)

    def stop(self) -> list[Flight]:
        """It leads no more. Returns what of its proposals a majority may have: they are committed by the next one."""
        self.is_alive = False
        reached = self._rng.randint(0, len(self._flights))
        survivors, self._flights = self._flights[:reached], []
        return survivors
