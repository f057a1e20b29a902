"""The worker's session with the leader, and its lease. A passive machine: no clock, no I/O, no task.

What it keeps (DESIGN.md section 5):

- **Lease.** The lease runs from the moment the worker *sent* the heartbeat that a grant answers, never from
  the moment the grant came in, so that it always ends before the leader's own, longer count. A lease that
  an older stream earned stays good until its end. A new process starts with none; a worker that says
  Goodbye gives its own back at once. With the lease end the runs that it was the right to (EndRuns).
- **Generations.** An assignment is applied only when its generation is above that of the last one accepted
  by this process, and never when it is below the last one on disk: a master with an old view cannot turn
  the worker back.
- **Launch orders wait for a lease.** A process that was paused finds old orders in its buffers; without a
  lease they stay where they are, and go with the stream. The leader gives such a launch to another worker
  after its order timeout.
- **Only a final Farewell ends it.** Whatever a master's status or silence may mean, another one is tried.
- **One stream at a time.** Events of any other stream are stale and ignored.

Finding the leader: masters are tried in rounds, each once per round and without delay between them; a
Redirect's address comes first. Only a whole round without a session costs a pause (50 ms doubling to 1 s,
with jitter). The pause starts from the bottom again only after a lease grant: a master that greets and
hangs up at once cannot make a hot loop.

    phase       what it waits for                          leaves by
    WAITING     the pause between rounds                   time -> LOOKING
    LOOKING     the masters' addresses from discovery      MastersFound or time -> DIALING, or WAITING when none
    DIALING     a connection                               StreamOpened -> GREETING; failure or time -> next
    GREETING    Welcome                                    Welcome -> OPEN; Redirect, failure or time -> next;
                                                           final Farewell -> ENDED (exit 1)
    OPEN        grants, assignments, orders                failure, Redirect, Farewell -> next;
                                                           three unanswered heartbeats -> next;
                                                           final Farewell -> ENDED (exit 0); StopRequested -> LEAVING
    LEAVING     Farewell                                   Farewell, failure or time -> ENDED (exit 0)
    ENDED       nothing

    next = DIALING while the round has masters left, else WAITING; StopRequested ends every phase but OPEN at once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import assert_never

from coordinator.api.v1 import session_pb2, types_pb2
from coordinator.model import Monotonic
from worker_agent.session_interface import (
    Action,
    Apply,
    AssignmentApplied,
    Dial,
    End,
    EndRuns,
    Event,
    FindMasters,
    GatherReports,
    HangUp,
    Launch,
    MastersFound,
    Phase,
    Receipt,
    Received,
    ReportsReady,
    Send,
    SendHeartbeat,
    SessionTimes,
    Step,
    StopLaunch,
    StopRequested,
    StreamEnded,
    StreamOpened,
)
from worker_agent.session_lease import NO_LEASE, SessionLease

PROTOCOL_VERSION = 1


class WorkerSession:
    """The session of one process of one worker.

    `node` is the worker's own description with its addresses and incarnation. `cluster_id` and `generation` are what an
    earlier process of this worker left on disk, empty and 0 when there was none: a cluster with another id is refused.
    """

    def __init__(
        self,
        node: types_pb2.Node,
        cluster_name: str,
        rng: random.Random,
        *,
        cluster_id: str = "",
        generation: int = 0,
        times: SessionTimes | None = None,
    ) -> None:
        self._node = node
        self._cluster_name = cluster_name
        self._rng = rng
        self._times = times or SessionTimes()
        self._cluster_id = cluster_id
        self._generation_next_min = generation
        self._applied_generation = 0
        self._phase = Phase.WAITING
        self._deadline: Monotonic | None = NO_LEASE
        self._masters: tuple[str, ...] = ()
        self._round: list[str] = []
        self._tried: set[str] = set()
        self._hint = ""
        self._pauses = 0
        self._stream = 0
        self._address = ""
        self._is_proven = False
        self._leader_id = ""
        self._heartbeat_s = 0.0
        self._lease_s = 0.0
        self._sequence = 0
        self._sent: dict[int, Monotonic] = {}
        self._repeat_at = NO_LEASE
        self._lease = SessionLease()
        self._held_orders: list[session_pb2.LaunchOrder] = []
        self._last_problem = ""
        self._actions: list[Action] = []

    # What others may ask

    @property
    def phase(self) -> Phase:
        """What the session waits for."""
        return self._phase

    @property
    def leader_id(self) -> str:
        """Id of the master that the session is open with; empty when it is not open."""
        return self._leader_id if self._phase in (Phase.OPEN, Phase.LEAVING) else ""

    @property
    def last_problem(self) -> str:
        """Why the last stream ended, or could not be opened; one sentence, empty when none has."""
        return self._last_problem

    @property
    def lease_until(self) -> Monotonic:
        """When the lease ends, minus infinity when there was none."""
        return self._lease.until

    def has_lease(self, now: Monotonic) -> bool:
        """True while the session lease holds."""
        return self._lease.holds(now)

    def validate(self) -> None:
        """Raises AssertionError when an invariant is broken."""
        assert len(self._sent) <= self._times.unanswered_max, "heartbeats in flight are bounded"
        assert list(self._sent) == sorted(self._sent), "heartbeats are in flight in the order of their sequence"
        assert (self._deadline is None) == (self._phase is Phase.ENDED), "every phase but the last has a deadline"
        assert not self._held_orders or self._phase is Phase.OPEN, "orders go with their stream"
        assert bool(self._address) == (self._phase in (Phase.DIALING, Phase.GREETING, Phase.OPEN, Phase.LEAVING)), (
            "an address belongs to a stream"
        )

    # What happens

    def on_event(self, now: Monotonic, event: Event) -> Step:
        """Takes an event in."""
        self._end_runs(self._lease.has_just_ended(now))
        match event:
            case MastersFound(addresses):
                if addresses:
                    self._masters = tuple(dict.fromkeys(addresses))
                if self._phase is Phase.LOOKING:
                    self._begin_round(now)
            case StreamOpened(stream, launches):
                if self._is_current(stream) and self._phase is Phase.DIALING:
                    self._greet(now, launches)
            case Received(stream, response):
                if self._is_current(stream):
                    self._on_response(now, response)
            case StreamEnded(stream, code, reason):
                if self._is_current(stream):
                    self._on_stream_ended(now, code, reason)
            case AssignmentApplied(generation):
                self._applied_generation = max(self._applied_generation, generation)
            case ReportsReady():
                for request in event.requests() if self._phase in (Phase.OPEN, Phase.LEAVING) else ():
                    self._send(request)
            case StopRequested(reason):
                self._on_stop(now, reason)
            case _:
                assert_never(event)
        return self._step()

    def on_advance(self, now: Monotonic) -> Step:
        """Takes the passing of time in."""
        self._end_runs(self._lease.has_just_ended(now))
        if self._deadline is not None and now >= self._deadline:
            match self._phase:
                case Phase.WAITING:
                    self._phase = Phase.LOOKING
                    self._deadline = _after(now, self._times.look_s)
                    self._actions.append(FindMasters())
                case Phase.LOOKING:
                    self._begin_round(now)
                case Phase.DIALING:
                    self._fail(now, f"no connection to {self._address} within {self._times.connect_s:g} s")
                case Phase.GREETING:
                    self._fail(now, f"master {self._address} gave no answer within {self._times.welcome_s:g} s")
                case Phase.OPEN:
                    self._beat(now)
                case Phase.LEAVING:
                    self._end(0, f"left without a farewell from {self._address}")
                case Phase.ENDED:
                    pass
                case _:
                    assert_never(self._phase)
        return self._step()

    def _step(self) -> Step:
        actions, self._actions = tuple(self._actions), []
        return Step(actions, self._lease.first(self._deadline))

    def _end_runs(self, has_lease_ended: bool, reason: str = "the session lease ended") -> None:
        if has_lease_ended:
            self._actions.append(EndRuns(reason))

    def _is_current(self, stream: int) -> bool:
        return bool(self._address) and stream == self._stream

    # Finding the leader

    def _begin_round(self, now: Monotonic) -> None:
        self._round = list(self._masters)
        self._tried = set()
        self._dial_next(now)

    def _dial_next(self, now: Monotonic) -> None:
        """Dials the hinted master, or the next of the round; pauses when the round is over."""
        hint, self._hint = self._hint, ""
        candidates = [hint, *self._round] if hint else self._round
        address = next((candidate for candidate in candidates if candidate not in self._tried), "")
        if not address:
            if not self._masters:
                self._last_problem = "discovery knows no master"
            pause_s = min(self._times.pause_s_max, self._times.pause_s_min * 2.0 ** min(self._pauses, 30))
            self._pauses += 1
            # A hint that was tried in this round leads the next one: an election may end during the pause.
            self._hint = hint
            self._phase = Phase.WAITING
            self._deadline = _after(now, pause_s * self._rng.uniform(0.5, 1.0))
            return
        self._tried.add(address)
        self._stream += 1
        self._address = address
        self._is_proven = False
        self._phase = Phase.DIALING
        self._deadline = _after(now, self._times.connect_s)
        self._actions.append(Dial(self._stream, address))

    def _greet(self, now: Monotonic, launches: Sequence[session_pb2.LaunchReport]) -> None:
        hello = session_pb2.Hello(
            node=self._node,
            cluster_name=self._cluster_name,
            protocol_version=PROTOCOL_VERSION,
            applied_generation=self._applied_generation,
            launches=launches,
        )
        self._phase = Phase.GREETING
        self._deadline = _after(now, self._times.welcome_s)
        self._send(session_pb2.OpenRequest(hello=hello))

    def _fail(self, now: Monotonic, problem: str) -> None:
        """Gives the stream up and goes to the next master, at once while the round has one left."""
        self._drop_stream(problem)
        self._dial_next(now)

    def _drop_stream(self, problem: str) -> None:
        if self._is_proven:
            # A session that worked: the masters it did not need count as untried, the one that failed goes last.
            self._round = [*(master for master in self._masters if master != self._address), self._address]
            self._tried = set()
        self._last_problem = problem
        self._actions.append(HangUp(self._stream))
        self._address = ""
        self._leader_id = ""
        self._sent = {}
        self._held_orders = []

    # The open session

    def _on_response(self, now: Monotonic, response: session_pb2.OpenResponse) -> None:
        kind = response.WhichOneof("message")
        if kind == "farewell":
            self._on_farewell(now, response.farewell)
        elif kind == "launch_report_receipt":
            self._actions.append(Receipt(response.launch_report_receipt))
        elif self._phase is Phase.OPEN and kind == "launch_stop":
            self._actions.append(StopLaunch(response.launch_stop))
        elif self._phase is Phase.LEAVING:
            return
        elif kind == "redirect":
            self._hint = response.redirect.leader_address
            self._fail(now, f"master {self._address} redirects: {response.redirect.reason or 'it does not lead'}")
        elif self._phase is Phase.GREETING and kind == "welcome":
            self._on_welcome(now, response.welcome)
        elif self._phase is Phase.OPEN and kind == "lease_grant":
            self._on_grant(now, response.lease_grant.heartbeat_sequence)
        elif self._phase is Phase.OPEN and kind == "assignment":
            self._on_assignment(response.assignment)
        elif self._phase is Phase.OPEN and kind == "launch_order":
            if self.has_lease(now):
                self._actions.append(Launch(response.launch_order))
            else:
                self._held_orders.append(response.launch_order)
        elif kind is not None:
            # A kind that is None comes from a newer master: fields are only ever added, so it is no fault.
            self._fail(now, f"master {self._address} sent {kind} while the session was {self._phase.value}")

    def _on_welcome(self, now: Monotonic, welcome: session_pb2.Welcome) -> None:
        if not (welcome.heartbeat_s > 0 and welcome.session_lease_s >= welcome.heartbeat_s):
            offer = f"a lease of {welcome.session_lease_s:g} s with a heartbeat every {welcome.heartbeat_s:g} s"
            self._fail(now, f"master {self._address} offers {offer}")
            return
        if self._cluster_id and welcome.cluster_id and welcome.cluster_id != self._cluster_id:
            self._end(
                1,
                f"this worker's data belongs to cluster {self._cluster_id}, master {self._address} to cluster "
                f"{welcome.cluster_id}; use its own masters, an empty data directory, or --accept-cluster if restored",
            )
            return
        self._cluster_id = welcome.cluster_id or self._cluster_id
        self._leader_id = welcome.leader_id
        self._heartbeat_s = welcome.heartbeat_s
        self._lease_s = welcome.session_lease_s
        self._sequence = 0
        self._phase = Phase.OPEN
        self._actions.append(GatherReports(everything=True))
        self._repeat_at = _after(now, self._times.repeat_s)
        self._beat(now)

    def _beat(self, now: Monotonic) -> None:
        if len(self._sent) >= self._times.unanswered_max:
            self._fail(now, f"leader {self._address} left {len(self._sent)} heartbeats unanswered")
            return
        if now >= self._repeat_at:
            self._actions.append(GatherReports(everything=False))
            self._repeat_at = _after(now, self._times.repeat_s)
        self._sequence += 1
        self._sent[self._sequence] = now
        heartbeat = session_pb2.Heartbeat(sequence=self._sequence, applied_generation=self._applied_generation)
        self._actions.append(SendHeartbeat(self._stream, heartbeat))
        self._deadline = _after(now, self._heartbeat_s)

    def _on_grant(self, now: Monotonic, sequence: int) -> None:
        sent_at = self._sent.get(sequence)
        if sent_at is None:
            return
        self._lease.renew(now, sent_at, self._lease_s)
        self._sent = {number: at for number, at in self._sent.items() if number > sequence}
        self._pauses = 0
        self._is_proven = True
        if self.has_lease(now):
            self._actions.extend(Launch(order) for order in self._held_orders)
            self._held_orders = []

    def _on_assignment(self, assignment: session_pb2.Assignment) -> None:
        if assignment.generation < self._generation_next_min:
            return
        self._generation_next_min = assignment.generation + 1
        self._actions.append(Apply(assignment, self._cluster_id))

    def _send(self, request: session_pb2.OpenRequest) -> None:
        self._actions.append(Send(self._stream, request))

    # Endings

    def _on_stream_ended(self, now: Monotonic, code: str, reason: str) -> None:
        if self._phase is Phase.LEAVING:
            self._end(0, f"left; {self._address} closed the session")
        elif self._phase is Phase.DIALING:
            self._fail(now, reason or code)
        else:
            self._fail(now, f"session with {self._address} ended: {reason or code}")

    def _on_farewell(self, now: Monotonic, farewell: session_pb2.Farewell) -> None:
        reason = farewell.reason or "no reason given"
        if self._phase is Phase.LEAVING:
            self._end(0, f"left: {reason}")
        elif not farewell.final:
            self._fail(now, f"leader {self._address} ended the session: {reason}")
        elif self._phase is Phase.OPEN:
            self._end(0, f"the masters ended the session for good: {reason}")
        else:
            self._end(1, f"master {self._address} refuses this worker: {reason}")

    def _on_stop(self, now: Monotonic, reason: str) -> None:
        if self._phase is Phase.OPEN:
            # From here on the leader may give everything to others, so nothing may be done under the lease any more.
            self._end_runs(self._lease.give_back(), reason)
            self._held_orders = []
            self._phase = Phase.LEAVING
            self._deadline = _after(now, self._times.farewell_s)
            self._send(session_pb2.OpenRequest(goodbye=session_pb2.Goodbye(reason=reason)))
        elif self._phase is not Phase.LEAVING:
            self._end(0, "left while no session was open")

    def _end(self, exit_status: int, reason: str) -> None:
        if self._phase is Phase.ENDED:
            return
        if self._address:
            self._drop_stream(reason)
        self._end_runs(self._lease.give_back(), reason)
        self._phase = Phase.ENDED
        self._deadline = None
        self._actions.append(End(exit_status, reason))


def _after(now: Monotonic, seconds: float) -> Monotonic:
    return Monotonic(now + seconds)
