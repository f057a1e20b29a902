"""Runs the leader's controllers while this master leads: the thin, impure half of coordinator/control/.

Order rules:
- Controllers exist only between a barrier that succeeded in this term and the end of that leadership, so they start
  from everything that was ever acknowledged, and never act for a term that is over.
- Events are taken one at a time, in the order in which they happened; what an action causes waits its turn. Nothing
  runs inside the callbacks of Raft, so a slow controller delays no log entry.
- What the controllers want to propose in one turn of the loop travels as one batch: a thousand launches at midnight are
  one log entry, not a thousand. Each still ends by itself.
- A lease is granted only while this master has one itself: a majority has lately answered that it leads.
- A controller that raises has a bug, and its view may be wrong: the master says so and stops, another one takes over.
  Going on, or hiding it, would leave shards without anybody who decides for them.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, assert_never

from coordinator.api.v1 import command_pb2, session_pb2
from coordinator.control import interface
from coordinator.control.leader import LeaderControl
from coordinator.discovery.interface import Discovery
from coordinator.machine.codec import job_spec_to_proto, launch_to_proto
from coordinator.machine.state import Transition
from coordinator.model import Monotonic
from coordinator.model.errors import CoordinatorError
from coordinator.server.batches import batches, results_of
from coordinator.server.context import MasterContext
from coordinator.server.founders import admit_founders
from coordinator.server.sessions import SessionHub

_log = logging.getLogger(__name__)

DISCOVERY_POLL_S = 0.5
"""How often the discovery's view, which is in memory, is compared with the last one."""
BARRIER_TIMEOUT_S = 5.0
WAKE_DELAY_S_MIN = 0.001
"""Keeps a wake time in the past from taking the whole loop."""


class LeaderDriver:
    """Feeds LeaderControl with what happens and carries out what it wants."""

    def __init__(
        self,
        *,
        master: MasterContext,
        hub: SessionHub,
        discovery: Discovery,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._master = master
        self._raft = master.raft
        self._config = master.config
        self._clock = master.clock
        self._hub = hub
        self._discovery = discovery
        self._on_fatal = on_fatal
        self.control: LeaderControl | None = None
        """The controllers, while they run."""
        self._term = 0
        self._has_stopped = False
        self._begin_task: asyncio.Task[None] | None = None
        self._discovery_task: asyncio.Task[None] | None = None
        self._founders_task: asyncio.Task[None] | None = None
        self._proposals: set[asyncio.Task[None]] = set()
        self._wanted: list[interface.Propose] = []
        """What to propose once this turn is over."""
        self._events: deque[interface.Event] = deque()
        self._is_drain_scheduled = False
        self._is_advance_due = False
        self._wake: asyncio.TimerHandle | None = None
        self._wake_at: Monotonic | None = None
        self._raft.on_leadership(self._on_leadership)
        self._raft.on_transition(self._on_transition)

    def stop(self) -> None:
        """Drops the controllers for good and ends the sessions; harmless when nothing runs."""
        self._has_stopped = True
        self._end("this master stops")

    @property
    def is_running(self) -> bool:
        """True while the controllers run."""
        return self.control is not None

    def leader_redirect(self, reason: str) -> session_pb2.Redirect:
        """Where a worker shall go instead, as far as this master knows."""
        leader_id = self._master.leader_id
        addresses = {master.id: master.grpc_address for master in self._config.masters}
        return session_pb2.Redirect(leader_id=leader_id, leader_address=addresses.get(leader_id, ""), reason=reason)

    async def redirect_unless_leading(self) -> session_pb2.Redirect | None:
        """None when sessions are taken here; waits for controllers that are just being started."""
        task = self._begin_task
        if task is not None and not task.done():
            await asyncio.wait({task}, timeout=BARRIER_TIMEOUT_S)
        if self._hub.is_attached:
            return None
        return self.leader_redirect("this master does not lead")

    # Leadership

    def _on_leadership(self, is_leader: bool, term: int) -> None:
        self._end("this master no longer leads")
        if is_leader and not self._has_stopped:
            self._term = term
            self._begin_task = self._spawn(self._begin(term))

    async def _begin(self, term: int) -> None:
        """Starts the controllers once the state shows everything that was acknowledged before this term."""
        while True:
            try:
                await self._raft.barrier(BARRIER_TIMEOUT_S)
                break
            except CoordinatorError as error:
                if not self._raft.is_leader or self._raft.term != term:
                    return
                _log.warning("leading term %d, but the log does not move yet: %s", term, error)
                await asyncio.sleep(self._config.raft.append_period_s)
        if not self._raft.is_leader or self._raft.term != term:
            return
        self.control = LeaderControl(
            self._raft.state,
            self._config,
            interface.Tokens(),
            self._clock.monotonic(),
            self._clock.wall_ms(),
            random.Random(),
            leader_id=self._master.self_id,
            term=term,
        )
        _log.info("leading term %d from index %d", term, self._raft.state.index)
        self._hub.attach(self.post, self._build_assignment)
        self._discovery_task = self._spawn(self._watch_discovery())
        self._founders_task = self._spawn(admit_founders(self._master))
        self._is_advance_due = True
        self._schedule_drain()

    def _end(self, reason: str) -> None:
        was_running = self.control is not None
        self.control = None
        for task in (self._begin_task, self._discovery_task, self._founders_task, *self._proposals):
            if task is not None:
                task.cancel()
        self._begin_task = self._discovery_task = self._founders_task = None
        self._events.clear()
        self._wanted.clear()
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        self._wake_at = None
        self._hub.detach(self.leader_redirect(reason))
        if was_running:
            _log.info("no longer leading term %d: %s", self._term, reason)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task whose unexpected exception is the end of this master, like any other bug of the controllers' side."""

        def on_done(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._fail(error)

        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(on_done)
        return task

    def _fail(self, error: BaseException) -> None:
        _log.critical("the leader's controllers failed; this master stops", exc_info=error)
        self._end("this master stops after an internal error")
        self._on_fatal(error)

    # Events in

    def post(self, event: interface.Event) -> None:
        """Queues an event; dropped when the controllers do not run."""
        if self.control is None:
            return
        self._events.append(event)
        self._schedule_drain()

    def _on_transition(self, transition: Transition) -> None:
        self.post(interface.Applied(transition.state, transition.changes))

    async def _watch_discovery(self) -> None:
        service = self._config.discovery.consul.worker_service
        last: frozenset[str] | None = None
        is_first = True
        while True:
            view = self._discovery.healthy(service)
            healthy = view.ids if view.known else None
            if is_first or healthy != last:
                is_first, last = False, healthy
                self.post(interface.DiscoveryReported(healthy))
            await asyncio.sleep(DISCOVERY_POLL_S)

    def _schedule_drain(self) -> None:
        if not self._is_drain_scheduled:
            self._is_drain_scheduled = True
            asyncio.get_running_loop().call_soon(self._drain)

    def _on_wake(self) -> None:
        self._wake = self._wake_at = None
        self._is_advance_due = True
        self._schedule_drain()

    def _drain(self) -> None:
        """Hands what waits to the controllers, and the passing of time when they asked for it."""
        self._is_drain_scheduled = False
        try:
            # What comes in meanwhile waits for the next turn of the loop, which has others to serve too.
            for _ in range(len(self._events)):
                if self.control is None or not self._events:
                    return
                event = self._events.popleft()
                self._take(self.control.on_event(self._clock.monotonic(), self._clock.wall_ms(), event))
            if self._is_advance_due and self.control is not None:
                self._is_advance_due = False
                self._take(self.control.on_advance(self._clock.monotonic(), self._clock.wall_ms()))
        except Exception as error:
            self._fail(error)
            return
        self._propose_wanted()
        if self._events:
            self._schedule_drain()

    def _take(self, step: interface.Step) -> None:
        """Carries a step out. Its `next_wake` stands for all controllers, so it replaces the one before."""
        for action in step.actions:
            self._carry_out(action)
        if step.next_wake == self._wake_at:
            return
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        self._wake_at = step.next_wake
        if step.next_wake is not None:
            delay_s = max(WAKE_DELAY_S_MIN, step.next_wake - self._clock.monotonic())
            self._wake = asyncio.get_running_loop().call_later(delay_s, self._on_wake)

    # Actions out

    def _carry_out(self, action: interface.Action) -> None:
        match action:
            case interface.Propose():
                self._wanted.append(action)
            case interface.SendToNode():
                # Without its own lease this master may have been deposed, and the new leader counts on it that no
                # worker gets another lease from here.
                if not action.message.HasField("lease_grant") or self._raft.has_lease:
                    self._hub.send(action.session, action.message)
            case interface.SendAssignment():
                self._hub.send_assignment(action.session)
            case interface.SendLaunch():
                order = session_pb2.LaunchOrder(
                    launch=launch_to_proto(action.launch), spec=job_spec_to_proto(action.spec)
                )
                self._hub.send_to_node(action.node_id, session_pb2.OpenResponse(launch_order=order))
            case interface.StopLaunch():
                token = session_pb2.LaunchToken(
                    job_id=action.job_id, scheduled_at_unix_ms=action.scheduled_at_ms, attempt=action.attempt
                )
                stop = session_pb2.LaunchStop(token=token, reason=action.reason)
                self._hub.send_to_node(action.node_id, session_pb2.OpenResponse(launch_stop=stop))
            case interface.CloseSession():
                self._hub.close(action.session, action.reason, action.final)
            case _:
                assert_never(action)

    def _build_assignment(self, node_id: str) -> session_pb2.Assignment:
        if self.control is None:
            raise asyncio.CancelledError  # Leadership ended between the wake-up and this message's turn.
        return self.control.assignment(node_id)

    def _propose_wanted(self) -> None:
        wanted, self._wanted = self._wanted, []
        start = 0
        for entry, count in batches([action.command for action in wanted], self._config.raft.command_bytes_max):
            task = self._spawn(self._propose(entry, wanted[start : start + count]))
            self._proposals.add(task)
            task.add_done_callback(self._proposals.discard)
            start += count

    async def _propose(self, entry: command_pb2.Command, actions: Sequence[interface.Propose]) -> None:
        results: Sequence[command_pb2.CommandResult | None] = [None] * len(actions)
        failure: CoordinatorError | None = None
        try:
            results = results_of(await self._raft.propose(entry, is_urgent=True), len(actions))
        except CoordinatorError as error:
            causes = ", ".join(action.command.cause or str(action.token) for action in actions[:3])
            more = f" and {len(actions) - 3} more" if len(actions) > 3 else ""
            _log.info("proposal %s%s failed: %s", causes, more, error)
            failure = error
        for action, result in zip(actions, results, strict=True):
            self._master.count_ended("control", result, failure)
            self.post(interface.ProposalEnded(action.token, result, failure))
