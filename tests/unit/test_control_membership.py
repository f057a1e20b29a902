"""The membership controller: sessions, leases, suspicion, admission, farewells."""

from __future__ import annotations

import pytest

from coordinator.api.v1 import command_pb2, types_pb2
from coordinator.config import MoveSettings, SessionSettings
from coordinator.control.assignment import AssignmentIndex
from coordinator.control.interface import (
    Action,
    CloseSession,
    DiscoveryReported,
    GoodbyeReceived,
    ProposalEnded,
    Propose,
    SessionClosed,
    SessionOpened,
)
from coordinator.control.membership import Membership
from coordinator.control.reports import LossWishes
from coordinator.model import NodeState
from coordinator.model.errors import NoLeader, OutcomeUnknown
from tests.control_driver import ControlDriver, grants, heartbeat, hello, only, operations, welcomes
from tests.machine_driver import MachineDriver

SETTINGS = SessionSettings(heartbeat_s=0.5, session_lease_s=10.0, suspect_s=1.5, lease_margin=1.25)
LEASE_S = SETTINGS.session_lease_s * SETTINGS.lease_margin


class Scene(ControlDriver):
    """A membership controller on a real machine."""

    def __init__(self, *, needs_discovery: bool = False, workers: tuple[str, ...] = ()) -> None:
        machine = MachineDriver()
        machine.bootstrap(shards=2)
        for name in workers:
            machine.add_worker(name)
        super().__init__(machine)
        self.needs_discovery = needs_discovery
        self.begin()

    def begin(self) -> Membership:
        """A new leader."""
        self.membership = Membership(
            self.machine.state,
            SETTINGS,
            self.tokens,
            self.now,
            index=AssignmentIndex(self.machine.state),
            losses=LossWishes(self.reports, MoveSettings(), heirs_max=100),
            needs_discovery=self.needs_discovery,
            leader_id="m1",
            term=3,
        )
        self.controller = self.membership
        self.advance()
        return self.membership

    def join(self, session: int, name: str, incarnation: str = "1") -> None:
        """A worker's session, with its first heartbeat."""
        self.settle(self.tell(SessionOpened(session, hello(name, incarnation))))
        self.settle(self.tell(heartbeat(session, name)))

    def advance_until_proposal(self) -> list[Action]:
        """Small steps of time until something is proposed; what is wanted then."""
        for _ in range(200):
            actions = self.advance(0.1)
            if operations(actions):
                return actions
        raise AssertionError("nothing was proposed within 20 s")

    def state_of(self, name: str) -> NodeState:
        """The worker's agreed state."""
        return self.machine.state.nodes[name].state

    def beat_for(self, session: int, name: str, seconds: float) -> None:
        """Heartbeats for some time."""
        for sequence in range(2, 2 + round(seconds / 0.5)):
            self.settle(self.advance(0.5))
            self.settle(self.tell(heartbeat(session, name, sequence)))


def test_a_new_worker_registers_is_welcomed_and_admitted_after_its_first_heartbeat() -> None:
    """Hello -> RegisterNode -> Welcome; heartbeat -> grant and ActivateNode."""
    scene = Scene()
    opened = scene.tell(SessionOpened(1, hello("w1")))
    assert operations(opened) == ["register_node"]
    assert welcomes(opened) == []
    done = scene.settle(opened)
    assert welcomes(done) == [1]
    assert scene.state_of("w1") is NodeState.JOINING
    beaten = scene.tell(heartbeat(1, "w1"))
    assert grants(beaten) == [(1, 1)]
    assert operations(beaten) == ["activate_node"]
    scene.settle(beaten)
    assert scene.state_of("w1") is NodeState.ACTIVE
    assert scene.tell(heartbeat(1, "w1", 2)) != []
    live = scene.membership.live("w1", scene.now)
    assert live is not None
    assert (live.connected, live.heartbeat_age_s, live.applied_generation, live.incarnation) == (True, 0.0, 7, "1")


def test_the_welcome_tells_the_terms_of_the_lease() -> None:
    """A Welcome carries leader, term, cluster and durations."""
    scene = Scene(workers=("w1",))
    actions = scene.settle(scene.tell(SessionOpened(1, hello("w1"))))
    welcome = next(action.message.welcome for action in actions if hasattr(action, "message"))
    assert (welcome.leader_id, welcome.term, welcome.cluster_id) == ("m1", 3, "c1")
    assert (welcome.heartbeat_s, welcome.session_lease_s) == (0.5, 10.0)


def test_a_known_worker_is_welcomed_without_a_command() -> None:
    """A reconnect of the same process changes nothing in the log."""
    scene = Scene(workers=("w1",))
    actions = scene.tell(SessionOpened(1, hello("w1")))
    assert operations(actions) == []
    assert welcomes(actions) == [1]


def test_a_changed_weight_in_the_configuration_registers_once() -> None:
    """What the worker says of itself now replaces what the record says, once."""
    scene = Scene(workers=("w1",))
    done = scene.settle(scene.tell(SessionOpened(1, hello("w1", weight=2.0))))
    assert operations(done) == ["register_node"]
    assert welcomes(done) == [1]
    assert scene.machine.state.nodes["w1"].weight == 2.0


def test_a_heartbeat_before_the_welcome_earns_no_lease() -> None:
    """A lease belongs to a registered process only."""
    scene = Scene()
    scene.tell(SessionOpened(1, hello("w1")))
    assert grants(scene.tell(heartbeat(1, "w1"))) == []


def test_a_silent_worker_is_suspected_after_suspect_s_and_cleared_when_heard() -> None:
    """Silence -> SuspectNode at suspect_s, not before; a heartbeat -> ActivateNode."""
    scene = Scene()
    scene.join(1, "w1")
    assert scene.advance(1.4) == []
    suspected = scene.advance(0.11)
    assert operations(suspected) == ["suspect_node"]
    scene.settle(suspected)
    assert scene.machine.state.nodes["w1"].is_suspect
    heard = scene.tell(heartbeat(1, "w1", 2))
    assert grants(heard) == [(1, 2)]
    assert operations(heard) == ["activate_node"]
    scene.settle(heard)
    assert scene.machine.state.nodes["w1"].is_serving


def test_a_closed_stream_counts_from_the_last_word() -> None:
    """A stream that closed and is back within suspect_s costs nothing; one that is not back is suspected."""
    scene = Scene()
    scene.join(1, "w1")
    scene.settle(scene.advance(1.0))
    assert scene.tell(SessionClosed(1, "w1")) == []
    back = scene.tell(SessionOpened(2, hello("w1")))
    assert (operations(back), welcomes(back)) == ([], [2])
    scene.tell(SessionClosed(2, "w1"))
    assert operations(scene.advance(1.5)) == ["suspect_node"]


def test_a_worker_expires_a_lease_and_its_margin_after_the_last_grant() -> None:
    """ExpireNode comes no earlier than session_lease_s * lease_margin after the last grant, and ends the session."""
    scene = Scene()
    scene.join(1, "w1")
    granted_at = scene.now
    scene.settle(scene.advance(1.5))
    actions = scene.advance_until_proposal()
    assert granted_at + LEASE_S <= scene.now < granted_at + LEASE_S + 0.2
    assert operations(actions) == ["expire_node"]
    done = scene.settle(actions)
    assert scene.state_of("w1") is NodeState.DOWN
    assert [(action.session, action.final) for action in only(done, CloseSession)] == [(1, False)]


def test_no_lease_is_granted_once_the_end_is_proposed() -> None:
    """A heartbeat that comes while ExpireNode is on its way must not renew what is being taken away."""
    scene = Scene()
    scene.join(1, "w1")
    scene.settle(scene.advance(1.5))
    expiring = scene.advance_until_proposal()
    assert operations(expiring) == ["expire_node"]
    assert grants(scene.tell(heartbeat(1, "w1", 2))) == []
    failed = scene.fail(expiring[0], OutcomeUnknown("the leader changed"))
    assert grants(scene.tell(heartbeat(1, "w1", 3))) == []
    again = failed + scene.advance(0.2)
    assert operations(again) == ["expire_node"]


def test_an_end_that_was_definitely_not_applied_is_forgotten_when_the_worker_is_heard() -> None:
    """After a definite failure of ExpireNode a heartbeat earns a lease again."""
    scene = Scene()
    scene.join(1, "w1")
    scene.settle(scene.advance(1.5))
    expiring = scene.advance_until_proposal()
    scene.tell(heartbeat(1, "w1", 2))
    scene.fail(expiring[0], NoLeader("nobody leads"))
    heard = scene.tell(heartbeat(1, "w1", 3))
    assert grants(heard) == [(1, 3)]


def test_the_leaders_own_stall_is_not_the_workers_silence() -> None:
    """A controller that is called long after its wake gives the unread heartbeats time to be read."""
    scene = Scene()
    scene.join(1, "w1")
    assert scene.advance(8.0) == []
    assert scene.advance(0.5) == []
    scene.tell(heartbeat(1, "w1", 2))
    assert scene.advance(1.0) == []


def test_a_new_leader_gives_unheard_workers_time_and_a_whole_lease() -> None:
    """Suspicion at twice suspect_s, the end one lease and its margin after the leader began."""
    scene = Scene(workers=("w1",))
    began = scene.now
    step = scene.advance_until_proposal()
    assert operations(step) == ["suspect_node"]
    assert began + 2 * SETTINGS.suspect_s <= scene.now < began + 2 * SETTINGS.suspect_s + 0.2
    scene.settle(step)
    assert operations(scene.advance_until_proposal()) == ["expire_node"]
    assert began + LEASE_S <= scene.now < began + LEASE_S + 0.2


def test_a_worker_heard_by_a_new_leader_keeps_the_old_leaders_lease() -> None:
    """A Hello without a heartbeat does not shorten the lease that the predecessor may have granted."""
    scene = Scene(workers=("w1",))
    began = scene.now
    scene.tell(SessionOpened(1, hello("w1")))
    scene.tell(SessionClosed(1, "w1"))
    scene.settle(scene.advance(1.6))
    assert operations(scene.advance_until_proposal()) == ["expire_node"]
    assert scene.now >= began + LEASE_S


def test_a_restart_wins_at_once() -> None:
    """A new process at the same address replaces the old one's session and registers without delay."""
    scene = Scene()
    scene.join(1, "w1")
    actions = scene.tell(SessionOpened(2, hello("w1", incarnation="2")))
    assert [action.session for action in only(actions, CloseSession)] == [1]
    assert operations(actions) == ["register_node"]
    assert welcomes(scene.settle(actions)) == [2]
    assert grants(scene.tell(heartbeat(1, "w1", 9))) == []


def test_a_second_live_process_with_the_same_id_is_refused() -> None:
    """Another address while the first process is heard is a mistake in a configuration: the newcomer is told so."""
    scene = Scene()
    scene.join(1, "w1")
    actions = scene.tell(SessionOpened(2, hello("w1", incarnation="2", address="elsewhere:1")))
    (refusal,) = actions
    assert isinstance(refusal, CloseSession)
    assert (refusal.session, refusal.final) == (2, False)
    assert "in use by a live process at w1:1" in refusal.reason
    assert grants(scene.tell(heartbeat(1, "w1", 2))) == [(1, 2)]
    scene.settle(scene.advance(SETTINGS.suspect_s))
    assert operations(scene.tell(SessionOpened(3, hello("w1", "2", "elsewhere:1")))) == ["register_node"]


def test_a_worker_that_cannot_be_registered_is_told_why() -> None:
    """A refused registration ends the session with the machine's words."""
    scene = Scene()
    done = scene.settle(scene.tell(SessionOpened(1, hello("bad name"))))
    (closed,) = only(done, CloseSession)
    assert "'bad name' is no name" in closed.reason


def test_goodbye_of_a_drained_empty_worker_is_final() -> None:
    """Draining and holding nothing -> LeaveNode, then a final farewell."""
    scene = Scene()
    scene.join(1, "w1")
    scene.run(drain_node=command_pb2.DrainNode(node_id="w1"))
    done = scene.settle(scene.tell(GoodbyeReceived(1, "w1", "asked")))
    assert operations(done) == ["leave_node"]
    assert [(action.session, action.final) for action in only(done, CloseSession)] == [(1, True)]
    assert scene.state_of("w1") is NodeState.LEFT


def test_goodbye_without_a_drain_fails_over_at_once() -> None:
    """A worker that stops gives everything up without waiting for its lease; it may come back."""
    scene = Scene()
    scene.join(1, "w1")
    stopping = scene.tell(GoodbyeReceived(1, "w1", "the machine shuts down"))
    assert operations(stopping) == ["expire_node"]
    assert grants(scene.tell(heartbeat(1, "w1", 2))) == []
    done = scene.settle(stopping)
    (closed,) = only(done, CloseSession)
    assert (closed.reason, closed.final) == ("stopped: the machine shuts down", False)
    back = scene.settle(scene.tell(SessionOpened(2, hello("w1", "2"))))
    assert (operations(back), welcomes(back)) == (["register_node"], [2])


def test_a_goodbye_that_fails_is_tried_again() -> None:
    """The end of a worker that said Goodbye is proposed until it is applied."""
    scene = Scene()
    scene.join(1, "w1")
    stopping = scene.tell(GoodbyeReceived(1, "w1", "asked"))
    scene.fail(stopping[0], NoLeader("nobody leads"))
    scene.tell(SessionClosed(1, "w1"))
    assert operations(scene.advance(0.2)) == ["expire_node"]


def test_a_removed_worker_registers_anew_when_it_says_hello() -> None:
    """Removal forgets; it does not ban. While the registration is on its way, the removal is no obstacle."""
    scene = Scene()
    scene.join(1, "w1")
    scene.run(expire_node=command_pb2.ExpireNode(node_id="w1", incarnation="1"))
    assert scene.membership.session_of("w1") is None
    opened = scene.tell(SessionOpened(2, hello("w1")))
    scene.run(remove_node=command_pb2.RemoveNode(node_id="w1"))
    assert welcomes(scene.settle(opened)) == [2]
    assert scene.state_of("w1") is NodeState.JOINING


@pytest.mark.parametrize(
    ("healthy", "admitted"),
    [(None, False), (frozenset[str](), False), (frozenset({"w2"}), False), (frozenset({"w1"}), True)],
)
def test_discovery_admits(healthy: frozenset[str] | None, admitted: bool) -> None:
    """Where Consul is configured, a new worker waits until Consul holds it for healthy."""
    scene = Scene(needs_discovery=True)
    scene.join(1, "w1")
    assert scene.state_of("w1") is NodeState.JOINING
    scene.settle(scene.tell(DiscoveryReported(healthy)))
    assert (scene.state_of("w1") is NodeState.ACTIVE) is admitted


@pytest.mark.parametrize("healthy", [None, frozenset[str]()])
def test_discovery_never_drops(healthy: frozenset[str] | None) -> None:
    """Consul gone, or against a worker that is in: nothing changes while its session lives."""
    scene = Scene(needs_discovery=True)
    scene.tell(DiscoveryReported(frozenset({"w1"})))
    scene.join(1, "w1")
    assert scene.state_of("w1") is NodeState.ACTIVE
    assert scene.tell(DiscoveryReported(healthy)) == []
    scene.beat_for(1, "w1", 15)
    assert scene.machine.state.nodes["w1"].is_serving


def test_one_command_for_each_worker_at_a_time() -> None:
    """While a command about a worker is on its way nothing more is proposed about it."""
    scene = Scene()
    opened = scene.tell(SessionOpened(1, hello("w1")))
    assert operations(opened) == ["register_node"]
    assert operations(scene.tell(SessionOpened(2, hello("w1")))) == []
    assert operations(scene.advance(0.1)) == []
    (proposal,) = only(opened, Propose)
    result, applied = scene.commit(proposal.command)
    ended = scene.tell(ProposalEnded(proposal.token, result, None))
    assert welcomes(applied + ended) == [2]


def test_nothing_happens_before_the_cluster_exists() -> None:
    """Sessions that come before the bootstrap wait, and are taken then."""
    machine = MachineDriver()
    driver = ControlDriver(machine)
    driver.controller = Membership(
        machine.state,
        SETTINGS,
        driver.tokens,
        driver.now,
        index=AssignmentIndex(machine.state),
        losses=LossWishes(driver.reports, MoveSettings(), heirs_max=100),
        needs_discovery=False,
    )
    assert driver.tell(SessionOpened(1, hello("w1"))) == []
    bootstrap = command_pb2.BootstrapCluster(
        cluster_id="c1", shards=1, settings=types_pb2.Settings(replicas=1)
    )
    assert operations(driver.run(bootstrap_cluster=bootstrap)) == ["register_node"]
