"""The worker's session machine: actions compared with expected actions, at times that the tests make up."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.api.v1 import session_pb2, types_pb2
from coordinator.model import Monotonic
from worker_agent.session import WorkerSession
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
    StopRequested,
    StreamEnded,
    StreamOpened,
)

MASTERS = ("a:1", "b:1", "c:1")
TIMES = SessionTimes()
LEASE_S = 10.0
HEARTBEAT_S = 0.5
LEASE_ENDED = EndRuns("the session lease ended")


class Driver:
    """Feeds one session and keeps the time; the machine's invariants are checked after every step."""

    def __init__(self, *, cluster_id: str = "", generation: int = 0) -> None:
        node = types_pb2.Node(id="w1", incarnation="first", grpc_address="w:1")
        self.session = WorkerSession(
            node, "prod", random.Random(7), cluster_id=cluster_id, generation=generation, times=TIMES
        )
        self.now = Monotonic(100.0)
        self.step = Step()
        self.stream = 0

    def feed(self, event: Event) -> tuple[Action, ...]:
        """What the machine does about an event."""
        return self._took(self.session.on_event(self.now, event))

    def wait(self, seconds: float) -> tuple[Action, ...]:
        """What the machine does when so much time has passed and it is called once."""
        self.now = Monotonic(self.now + seconds)
        return self._took(self.session.on_advance(self.now))

    def wake(self) -> tuple[Action, ...]:
        """What the machine does at the time that it asked for."""
        assert self.step.next_wake is not None
        self.now = max(self.now, self.step.next_wake)
        return self._took(self.session.on_advance(self.now))

    def say(self, **message: object) -> tuple[Action, ...]:
        """What the machine does when the master of the current stream sends something."""
        return self.feed(Received(self.stream, session_pb2.OpenResponse(**message)))  # type: ignore[arg-type]

    def _took(self, step: Step) -> tuple[Action, ...]:
        self.session.validate()
        self.step = step
        for action in step.actions:
            if isinstance(action, Dial):
                self.stream = action.stream
        return step.actions

    # Ways into a phase

    def dial(self) -> tuple[Action, ...]:
        """From the start to the first Dial."""
        assert self.wait(0.0) == (FindMasters(),)
        return self.feed(MastersFound(MASTERS))

    def greet(self) -> tuple[Action, ...]:
        """To the Hello."""
        self.dial()
        return self.feed(StreamOpened(self.stream))

    def welcome(self, cluster_id: str = "c-1") -> tuple[Action, ...]:
        """Answers the Hello."""
        return self.say(
            welcome=session_pb2.Welcome(
                leader_id="m1", term=3, heartbeat_s=HEARTBEAT_S, session_lease_s=LEASE_S, cluster_id=cluster_id
            )
        )

    def open(self) -> tuple[Action, ...]:
        """To the open session."""
        self.greet()
        return self.welcome()

    def grant(self, sequence: int) -> tuple[Action, ...]:
        """Answers a heartbeat."""
        return self.say(lease_grant=session_pb2.LeaseGrant(heartbeat_sequence=sequence))

    def fail(self, reason: str = "broken") -> tuple[Action, ...]:
        """Breaks the current stream."""
        return self.feed(StreamEnded(self.stream, "UNAVAILABLE", reason))


def heartbeat(stream: int, sequence: int, generation: int = 0) -> SendHeartbeat:
    """The action that sends a heartbeat."""
    return SendHeartbeat(stream, session_pb2.Heartbeat(sequence=sequence, applied_generation=generation))


def order(job_id: str) -> session_pb2.LaunchOrder:
    """A launch order."""
    return session_pb2.LaunchOrder(launch=types_pb2.Launch(job_id=job_id, attempt=1))


@pytest.fixture
def driver() -> Driver:
    return Driver()


# Finding the leader


def test_starts_by_asking_discovery_and_dials_the_first_master(driver: Driver) -> None:
    """A new session asks for the masters and dials the first one it is told."""
    assert driver.dial() == (Dial(1, "a:1"),)
    assert driver.session.phase is Phase.DIALING


def test_discovery_that_is_silent_is_not_waited_for(driver: Driver) -> None:
    """Without an answer from discovery the last known masters are dialed after a second."""
    driver.dial()
    for _ in MASTERS:
        driver.fail()
    assert driver.wake() == (FindMasters(),)
    assert driver.wait(TIMES.look_s) == (Dial(4, "a:1"),)


def test_no_known_master_costs_a_pause_and_another_question(driver: Driver) -> None:
    """A discovery that knows nobody is asked again after a pause, for ever, and the reason is kept."""
    driver.wait(0.0)
    assert driver.feed(MastersFound(())) == ()
    assert driver.session.last_problem == "discovery knows no master"
    assert driver.wake() == (FindMasters(),)


def test_masters_are_tried_in_turn_without_delay(driver: Driver) -> None:
    """A master that cannot be reached is followed by the next one at once."""
    driver.dial()
    assert driver.fail() == (HangUp(1), Dial(2, "b:1"))
    assert driver.fail() == (HangUp(2), Dial(3, "c:1"))


def test_a_connection_attempt_times_out(driver: Driver) -> None:
    """A frozen master costs less than half of the suspect time, then the next one is dialed."""
    driver.dial()
    assert driver.wait(0.7) == ()
    assert driver.wake() == (HangUp(1), Dial(2, "b:1"))
    assert driver.session.last_problem == "no connection to a:1 within 0.75 s"


def test_a_master_that_never_answers_hello_times_out(driver: Driver) -> None:
    """A master that takes the connection and then says nothing is given up too."""
    driver.greet()
    assert driver.wake() == (HangUp(1), Dial(2, "b:1"))
    assert "gave no answer within 2 s" in driver.session.last_problem


def test_redirect_leads_straight_to_the_leader(driver: Driver) -> None:
    """The address in a Redirect is dialed before the other masters."""
    driver.greet()
    redirect = session_pb2.Redirect(leader_id="m3", leader_address="c:1", reason="a follower")
    assert driver.say(redirect=redirect) == (HangUp(1), Dial(2, "c:1"))


def test_redirect_without_an_address_goes_to_the_next_master(driver: Driver) -> None:
    """During an election a Redirect names nobody; the round goes on."""
    driver.greet()
    assert driver.say(redirect=session_pb2.Redirect(reason="no leader")) == (HangUp(1), Dial(2, "b:1"))


def test_two_masters_that_name_each_other_make_no_loop(driver: Driver) -> None:
    """A Redirect to a master that was tried in this round brings it back only after the pause, but first then."""
    driver.greet()
    assert driver.say(redirect=session_pb2.Redirect(leader_address="b:1")) == (HangUp(1), Dial(2, "b:1"))
    driver.feed(StreamOpened(2))
    assert driver.say(redirect=session_pb2.Redirect(leader_address="a:1")) == (HangUp(2), Dial(3, "c:1"))
    driver.feed(StreamOpened(3))
    assert driver.say(redirect=session_pb2.Redirect(leader_address="b:1")) == (HangUp(3),)
    assert driver.session.phase is Phase.WAITING
    assert driver.wake() == (FindMasters(),)
    assert driver.feed(MastersFound(MASTERS)) == (Dial(4, "b:1"),)


def test_pauses_double_up_to_a_second_with_jitter(driver: Driver) -> None:
    """Whole rounds without a session cost 50 ms, 100 ms, ... 1 s, each shortened at random by up to half."""
    driver.dial()
    pauses_s = []
    for _ in range(8):
        for _ in MASTERS:
            driver.fail()
        assert driver.step.next_wake is not None
        pauses_s.append(driver.step.next_wake - driver.now)
        driver.wake()
        driver.feed(MastersFound(MASTERS))
    for pause_s, longest_s in zip(pauses_s, (0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0), strict=True):
        assert longest_s / 2 - 1e-9 <= pause_s <= longest_s + 1e-9
    assert len(set(pauses_s)) == len(pauses_s)


def test_a_master_that_greets_and_hangs_up_makes_no_hot_loop(driver: Driver) -> None:
    """Welcome followed by a Farewell does not reset the pause: only a lease grant proves a session."""
    driver.dial()
    dials = 1
    began_at = driver.now
    while driver.now - began_at < 10.0:
        match driver.session.phase:
            case Phase.DIALING:
                driver.feed(StreamOpened(driver.stream))
                driver.welcome()
                actions = driver.say(farewell=session_pb2.Farewell(reason="not now"))
            case _:
                actions = driver.wake()
                if FindMasters() in actions:
                    actions = driver.feed(MastersFound(MASTERS))
        dials += sum(isinstance(action, Dial) for action in actions)
    assert dials < 3 * 25, "at most three masters per round, and rounds up to a second apart"


# The open session


def test_hello_says_who_the_worker_is_and_what_it_runs(driver: Driver) -> None:
    """The first message is a Hello with the node, the cluster's name and the launches without a receipt."""
    driver.dial()
    launch = session_pb2.LaunchReport(job_id="loop_01", attempt=1, state=types_pb2.LAUNCH_STATE_RUNNING)
    (action,) = driver.feed(StreamOpened(1, (launch,)))
    assert isinstance(action, Send)
    hello = action.request.hello
    assert (hello.node.id, hello.node.incarnation, hello.cluster_name) == ("w1", "first", "prod")
    assert (hello.protocol_version, hello.applied_generation, list(hello.launches)) == (1, 0, [launch])


def test_welcome_asks_for_all_reports_and_sends_the_first_heartbeat(driver: Driver) -> None:
    """A new session hears everything that the worker has to say, and earns a lease from the first moment."""
    assert driver.open() == (GatherReports(everything=True), heartbeat(1, 1))
    assert driver.session.leader_id == "m1"
    replica = session_pb2.ReplicaReport(shard_id=4, epoch=2, progress=session_pb2.REPLICA_PROGRESS_ACCEPTED)
    launch = session_pb2.LaunchReport(job_id="loop_01")
    assert driver.feed(ReportsReady((replica,), (launch,))) == (
        Send(1, session_pb2.OpenRequest(replica_reports=session_pb2.ReplicaReports(reports=[replica]))),
        Send(1, session_pb2.OpenRequest(launch_report=launch)),
    )


def test_heartbeats_follow_the_leaders_interval_and_carry_the_generation(driver: Driver) -> None:
    """Heartbeats come every heartbeat_s and name the last assignment that is in force."""
    driver.open()
    driver.grant(1)
    driver.feed(AssignmentApplied(41))
    assert driver.wait(HEARTBEAT_S - 0.01) == ()
    assert driver.wait(0.01) == (heartbeat(1, 2, 41),)


def test_reports_without_a_session_are_left_to_the_next_welcome(driver: Driver) -> None:
    """A report that comes while no session is open is not sent; the Welcome asks for everything again."""
    driver.greet()
    assert driver.feed(ReportsReady((), (session_pb2.LaunchReport(job_id="loop_01"),))) == ()
    assert GatherReports(everything=True) in driver.welcome()


def test_launch_reports_are_asked_for_again_and_again(driver: Driver) -> None:
    """Every five seconds the reports without a receipt are gathered again."""
    driver.open()
    gathered_at = []
    for sequence in range(1, 25):
        driver.grant(sequence)
        if GatherReports(everything=False) in driver.wake():
            gathered_at.append(round(driver.now - 100.0, 3))
    assert gathered_at == [5.0, 10.0]


def test_a_silent_leader_is_left(driver: Driver) -> None:
    """Three heartbeats without a grant end the session and the next master is dialed at once."""
    driver.open()
    assert driver.wake() == (heartbeat(1, 2),)
    assert driver.wake() == (heartbeat(1, 3),)
    assert driver.wake() == (HangUp(1), Dial(2, "b:1"))
    assert driver.session.last_problem == "leader a:1 left 3 heartbeats unanswered"


def test_a_paused_worker_reads_before_it_gives_its_leader_up(driver: Driver) -> None:
    """A process that stood still for a minute sends one heartbeat when it wakes, and keeps a leader that answers."""
    driver.open()
    driver.grant(1)
    assert driver.wait(60.0) == (LEASE_ENDED, GatherReports(everything=False), heartbeat(1, 2))
    assert driver.grant(2) == ()
    assert driver.session.phase is Phase.OPEN


def test_a_broken_session_is_followed_by_the_other_masters_first(driver: Driver) -> None:
    """After a session that worked every other master is tried before the one that failed, without any pause."""
    driver.open()
    driver.grant(1)
    assert driver.fail() == (HangUp(1), Dial(2, "b:1"))
    assert driver.fail() == (HangUp(2), Dial(3, "c:1"))
    assert driver.fail() == (HangUp(3), Dial(4, "a:1"))
    assert driver.fail() == (HangUp(4),)


def test_a_leader_that_steps_down_redirects(driver: Driver) -> None:
    """A Redirect on an open session leads to the new leader."""
    driver.open()
    driver.grant(1)
    redirect = session_pb2.Redirect(leader_id="m2", leader_address="b:1")
    assert driver.say(redirect=redirect) == (HangUp(1), Dial(2, "b:1"))


def test_events_of_an_old_stream_are_ignored(driver: Driver) -> None:
    """What arrives late from a stream that was given up changes nothing."""
    driver.greet()
    driver.fail()
    assert driver.feed(Received(1, session_pb2.OpenResponse(farewell=session_pb2.Farewell(final=True)))) == ()
    assert driver.feed(StreamEnded(1, "CANCELLED", "")) == ()
    assert driver.feed(StreamOpened(1)) == ()
    assert driver.session.phase is Phase.DIALING


@pytest.mark.parametrize(
    "message",
    [
        {"lease_grant": session_pb2.LeaseGrant(heartbeat_sequence=1)},
        {"assignment": session_pb2.Assignment(generation=1)},
        {"launch_order": order("loop_01")},
    ],
)
def test_a_master_that_skips_the_welcome_is_left(driver: Driver, message: dict[str, object]) -> None:
    """Nothing is taken from a master that has not welcomed the worker."""
    driver.greet()
    assert driver.say(**message) == (HangUp(1), Dial(2, "b:1"))


def test_a_message_of_a_newer_master_is_ignored(driver: Driver) -> None:
    """A message whose kind this version does not know does not end the session."""
    driver.open()
    assert driver.say() == ()
    assert driver.session.phase is Phase.OPEN


@pytest.mark.parametrize(("heartbeat_s", "lease_s"), [(0.0, 10.0), (1.0, 0.5), (0.5, 0.0)])
def test_a_welcome_that_makes_no_sense_is_refused(driver: Driver, heartbeat_s: float, lease_s: float) -> None:
    """A lease shorter than a heartbeat, or none, is no session."""
    driver.greet()
    welcome = session_pb2.Welcome(heartbeat_s=heartbeat_s, session_lease_s=lease_s)
    assert driver.say(welcome=welcome) == (HangUp(1), Dial(2, "b:1"))


# The lease


def test_a_new_process_has_no_lease_until_a_grant(driver: Driver) -> None:
    """Neither a Welcome nor a heartbeat is a lease."""
    driver.open()
    assert not driver.session.has_lease(driver.now)


def test_the_lease_counts_from_the_sending_of_the_heartbeat(driver: Driver) -> None:
    """A grant that took 0.4 s to come gives a lease that is 0.4 s shorter."""
    driver.open()
    sent_at = driver.now
    driver.wait(0.4)
    driver.grant(1)
    assert driver.session.lease_until == sent_at + LEASE_S
    assert driver.session.has_lease(Monotonic(sent_at + LEASE_S - 0.001))
    assert not driver.session.has_lease(Monotonic(sent_at + LEASE_S))


def test_a_grant_for_an_unknown_heartbeat_gives_nothing(driver: Driver) -> None:
    """A grant counts only for a heartbeat that this session sent, once."""
    driver.open()
    driver.grant(9)
    assert not driver.session.has_lease(driver.now)
    driver.grant(1)
    until = driver.session.lease_until
    driver.wait(0.2)
    driver.grant(1)
    assert driver.session.lease_until == until


def test_a_late_grant_never_shortens_the_lease(driver: Driver) -> None:
    """A grant for an older heartbeat that comes after a newer one changes nothing."""
    driver.open()
    driver.wake()
    driver.grant(2)
    until = driver.session.lease_until
    driver.grant(1)
    assert driver.session.lease_until == until


def test_the_lease_of_a_lost_session_lasts_to_its_end(driver: Driver) -> None:
    """Losing the stream, and opening another one, leaves the lease that was earned."""
    driver.open()
    driver.grant(1)
    until = driver.session.lease_until
    driver.fail()
    driver.feed(StreamOpened(driver.stream))
    driver.welcome()
    assert driver.session.lease_until == until
    assert driver.session.has_lease(driver.now)


def test_a_heartbeat_of_an_old_session_earns_nothing_on_the_new_one(driver: Driver) -> None:
    """Heartbeats are counted per session: the new leader's grant for number 1 means the new number 1."""
    driver.open()
    driver.wait(0.4)
    driver.fail()
    driver.feed(StreamOpened(driver.stream))
    driver.welcome()
    sent_at = driver.now
    driver.grant(1)
    assert driver.session.lease_until == sent_at + LEASE_S


# Assignments and launches


def test_assignments_only_move_forward(driver: Driver) -> None:
    """An assignment of the same or a lower generation than the last one is ignored."""
    driver.open()
    assert driver.say(assignment=session_pb2.Assignment(generation=7)) == (
        Apply(session_pb2.Assignment(generation=7), "c-1"),
    )
    assert driver.say(assignment=session_pb2.Assignment(generation=7)) == ()
    assert driver.say(assignment=session_pb2.Assignment(generation=6)) == ()
    assert len(driver.say(assignment=session_pb2.Assignment(generation=8))) == 1


def test_a_restarted_worker_takes_its_last_generation_again_but_nothing_older() -> None:
    """What was in force before the restart must be confirmed, and an older map never comes back."""
    driver = Driver(cluster_id="c-1", generation=7)
    driver.open()
    assert driver.say(assignment=session_pb2.Assignment(generation=6)) == ()
    assert len(driver.say(assignment=session_pb2.Assignment(generation=7))) == 1
    assert driver.say(assignment=session_pb2.Assignment(generation=7)) == ()


def test_launch_orders_wait_for_a_lease(driver: Driver) -> None:
    """An order that comes before the first grant runs with the grant; later ones run at once."""
    driver.open()
    assert driver.say(launch_order=order("loop_01")) == ()
    assert driver.grant(1) == (Launch(order("loop_01")),)
    assert driver.say(launch_order=order("loop_02")) == (Launch(order("loop_02")),)


def test_an_order_found_after_a_long_pause_is_not_run(driver: Driver) -> None:
    """An order from the buffers of a paused process goes with its stream: the leader gave it to another worker."""
    driver.open()
    driver.grant(1)
    driver.wait(LEASE_S * 3)
    assert driver.say(launch_order=order("loop_01")) == ()
    driver.fail()
    driver.feed(StreamOpened(driver.stream))
    driver.welcome()
    assert driver.grant(1) == ()


def test_receipts_are_handed_on(driver: Driver) -> None:
    """A receipt reaches the launcher, also while the worker leaves."""
    driver.open()
    receipt = session_pb2.LaunchReportReceipt(job_id="loop_01", attempt=1)
    assert driver.say(launch_report_receipt=receipt) == (Receipt(receipt),)
    driver.feed(StopRequested("maintenance"))
    assert driver.say(launch_report_receipt=receipt) == (Receipt(receipt),)


# Endings


def test_goodbye_waits_for_the_farewell_and_gives_the_lease_back(driver: Driver) -> None:
    """A clean stop says Goodbye, holds no lease from then on, and ends with the Farewell."""
    driver.open()
    driver.grant(1)
    ended, goodbye = driver.feed(StopRequested("maintenance"))
    assert ended == EndRuns("maintenance")
    assert goodbye == Send(1, session_pb2.OpenRequest(goodbye=session_pb2.Goodbye(reason="maintenance")))
    assert not driver.session.has_lease(driver.now)
    assert driver.say(farewell=session_pb2.Farewell(reason="bye")) == (HangUp(1), End(0, "left: bye"))
    assert driver.session.phase is Phase.ENDED


def test_a_grant_after_goodbye_gives_no_lease(driver: Driver) -> None:
    """Once it has said Goodbye the worker takes no lease, no assignment and no order."""
    driver.open()
    driver.feed(StopRequested("maintenance"))
    assert driver.grant(1) == ()
    assert driver.say(assignment=session_pb2.Assignment(generation=9)) == ()
    assert driver.say(launch_order=order("loop_01")) == ()
    assert not driver.session.has_lease(driver.now)


def test_a_farewell_that_does_not_come_is_waited_for_two_seconds(driver: Driver) -> None:
    """A leader that does not answer the Goodbye cannot hold the worker."""
    driver.open()
    driver.feed(StopRequested("maintenance"))
    assert driver.wait(1.9) == ()
    assert driver.wake() == (HangUp(1), End(0, "left without a farewell from a:1"))


def test_stop_without_a_session_ends_at_once(driver: Driver) -> None:
    """A worker that has no session needs no Goodbye."""
    driver.dial()
    assert driver.feed(StopRequested("maintenance")) == (HangUp(1), End(0, "left while no session was open"))
    assert driver.step.next_wake is None
    assert driver.feed(StopRequested("again")) == ()


def test_a_final_farewell_ends_the_worker_well(driver: Driver) -> None:
    """A worker that has left or was removed ends with exit status 0 and says why."""
    driver.open()
    driver.grant(1)
    actions = driver.say(farewell=session_pb2.Farewell(reason="w1 has left", final=True))
    why = "the masters ended the session for good: w1 has left"
    assert actions == (HangUp(1), EndRuns(why), End(0, why))
    assert not driver.session.has_lease(driver.now)


def test_a_final_farewell_instead_of_a_welcome_is_a_failure(driver: Driver) -> None:
    """A worker of another cluster ends with exit status 1 and the master's reason."""
    driver.greet()
    actions = driver.say(farewell=session_pb2.Farewell(reason="this is cluster 'other'", final=True))
    assert actions == (HangUp(1), End(1, "master a:1 refuses this worker: this is cluster 'other'"))


def test_a_farewell_that_is_not_final_is_followed_by_another_try(driver: Driver) -> None:
    """A leader that ends the session for now is dialed again, after the others."""
    driver.open()
    driver.grant(1)
    assert driver.say(farewell=session_pb2.Farewell(reason="restarting")) == (HangUp(1), Dial(2, "b:1"))


def test_data_of_another_cluster_is_never_taken_over() -> None:
    """A worker whose directory belongs to one cluster refuses the masters of another one."""
    driver = Driver(cluster_id="c-1")
    driver.greet()
    _, end = driver.welcome(cluster_id="c-2")
    assert isinstance(end, End)
    assert end.exit_status == 1
    assert "belongs to cluster c-1, master a:1 to cluster c-2" in end.reason
    assert "--accept-cluster" in end.reason


RESPONSES = st.sampled_from(
    [
        session_pb2.OpenResponse(
            welcome=session_pb2.Welcome(heartbeat_s=HEARTBEAT_S, session_lease_s=LEASE_S, leader_id="m1")
        ),
        session_pb2.OpenResponse(redirect=session_pb2.Redirect(leader_address="b:1")),
        session_pb2.OpenResponse(redirect=session_pb2.Redirect()),
        session_pb2.OpenResponse(lease_grant=session_pb2.LeaseGrant(heartbeat_sequence=1)),
        session_pb2.OpenResponse(lease_grant=session_pb2.LeaseGrant(heartbeat_sequence=2)),
        session_pb2.OpenResponse(assignment=session_pb2.Assignment(generation=3)),
        session_pb2.OpenResponse(assignment=session_pb2.Assignment(generation=2)),
        session_pb2.OpenResponse(launch_order=order("loop_01")),
        session_pb2.OpenResponse(farewell=session_pb2.Farewell()),
    ]
)
STEPS = st.one_of(
    st.tuples(st.just("response"), RESPONSES),
    st.tuples(st.just("wait"), st.floats(0.0, 3.0)),
    st.tuples(st.just("opened"), st.none()),
    st.tuples(st.just("failed"), st.none()),
    st.tuples(st.just("masters"), st.none()),
)


@settings(deadline=None)
@given(st.lists(STEPS, max_size=60))
def test_whatever_happens_the_invariants_hold_and_the_machine_never_sleeps(steps: list[tuple[str, object]]) -> None:
    """Random events: the state stays valid, a lease never outlasts the last heartbeat, and a wake-up is always set."""
    driver = Driver()
    last_sent_at = float("-inf")
    generations: list[int] = []
    for kind, value in steps:
        if kind == "response":
            assert isinstance(value, session_pb2.OpenResponse)
            actions = driver.feed(Received(driver.stream, value))
        elif kind == "wait":
            assert isinstance(value, float)
            actions = driver.wait(value)
        elif kind == "opened":
            actions = driver.feed(StreamOpened(driver.stream))
        elif kind == "failed":
            actions = driver.fail()
        else:
            actions = driver.feed(MastersFound(MASTERS))
        for action in actions:
            if isinstance(action, SendHeartbeat):
                last_sent_at = driver.now
            if isinstance(action, Apply):
                generations.append(action.assignment.generation)
            if isinstance(action, Launch):
                assert driver.session.has_lease(driver.now)
        assert driver.session.lease_until <= last_sent_at + LEASE_S
        assert driver.step.next_wake is not None
        assert generations == sorted(set(generations))
