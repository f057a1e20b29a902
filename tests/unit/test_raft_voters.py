"""Lost disks: an empty one has no say until it is admitted, and nothing that was acknowledged is lost. Virtual time."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import pytest
from immutables import Map
from pysyncobj import FAIL_REASON

from coordinator.api.v1 import command_pb2
from coordinator.machine.masters import admission
from coordinator.machine.state import State, Transition
from coordinator.model import AdmittedMaster, WallMs
from coordinator.raft import Machine
from coordinator.raft.entry import NO_OP, stamp
from coordinator.raft.identity import Identity
from coordinator.raft.voters import Membership
from tests import raft_network
from tests.raft_machine import MACHINE, applied, command
from tests.raft_network import Network, network

THREE = ("m1", "m2", "m3")
FIVE = ("m1", "m2", "m3", "m4", "m5")


def _apply(state: State, payload: bytes, index: int, time_ms: WallMs) -> Transition:
    """The test machine, with admissions."""
    transition = MACHINE.apply(state, payload, index, time_ms)
    found = admission(payload)
    if found is None:
        return transition
    master_id, disk_id = found
    masters = state.masters.set(master_id, AdmittedMaster(master_id, disk_id, "", time_ms))
    return replace(transition, state=replace(transition.state, masters=masters))


def _encode(state: State) -> bytes:
    disks = ",".join(f"{master.id}={master.disk_id}" for _, master in sorted(state.masters.items()))
    return f"{disks}\n".encode() + MACHINE.encode(state)


def _decode(data: bytes) -> State:
    disks, _, rest = data.partition(b"\n")
    pairs = [pair.split("=") for pair in disks.decode().split(",") if pair]
    masters = {id: AdmittedMaster(id, disk, "", WallMs(0)) for id, disk in pairs}
    return replace(MACHINE.decode(rest), masters=Map(masters))


ADMITTING = Machine(_apply, _encode, _decode)


@dataclass
class Fleet:
    """Masters with disks: what Seat does for real ones is done here by `look`."""

    net: Network
    silent: bool = True
    """False lets a lost disk speak at once, which is what the rules are against."""
    _voters: dict[str, bool] = field(default_factory=dict)
    _lost: int = 0

    def membership(self, id: str) -> Membership:
        """What its disk says of itself."""
        return Membership(
            self.net.disks[id], self._voters[id] or not self.silent, lambda state: state.masters, admission
        )

    def start(self, id: str) -> None:
        """Starts a master on its disk."""
        self.net.start(id, self.membership(id))

    def lose_disk(self, id: str) -> None:
        """Kills a master, and starts it with an empty disk."""
        if id in self.net.masters:
            self.net.stop(id)
        shutil.rmtree(self.net.directory / id)
        self._lost += 1
        self.net.disks[id], self._voters[id] = f"{id}-{self._lost}", False
        self.start(id)

    def look(self) -> None:
        """Gives their say to those that know themselves to be admitted."""
        for id, master in self.net.masters.items():
            if not self._voters[id] and master.voters.is_admitted:
                master.become_voter()
                self._voters[id] = True

    def turn(self) -> None:
        """One turn of the network, then `look`."""
        self.net.turn()
        self.look()

    def admit(self, id: str) -> list[int]:
        """Proposes the present disk of a master at the leader; reasons of the outcome appear in the list."""
        leader = self.net.leader()
        outcome: list[int] = []
        if leader is not None:
            admit = command_pb2.AdmitMaster(master_id=id, disk_id=self.net.disks[id])
            payload = command_pb2.Command(cause="admit", admit_master=admit).SerializeToString()
            self.net.masters[leader].propose(payload, lambda result, reason: outcome.append(reason))
        return outcome

    def replace(self, id: str) -> None:
        """Admits a learner and waits until it votes."""
        outcome = self.admit(id)
        self.run(lambda: self._voters[id])
        assert outcome == [FAIL_REASON.SUCCESS]

    def run(self, condition: object, seconds: float = 5.0) -> None:
        """Turns until the condition holds."""
        assert callable(condition)
        end_s = self.net.now_s + seconds
        while not condition():
            assert self.net.now_s < end_s, f"not within {seconds:g} s of virtual time"
            self.turn()

    def turns(self, count: int) -> None:
        """So many turns."""
        for _ in range(count):
            self.turn()


@contextmanager
def fleet(directory: Path, ids: tuple[str, ...] = THREE, seed: int = 1, silent: bool = True) -> Iterator[Fleet]:
    """A founded cluster whose disks have names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raft_network, "MACHINE", ADMITTING)
        with network(directory, ids=ids, seed=seed) as net:
            made = Fleet(net, silent)
            for id in ids:
                net.stop(id)
                net.disks[id], made._voters[id] = f"{id}-0", True
            for id in ids:
                made.start(id)
            yield made


def others(net: Network, *ids: str) -> list[str]:
    """All but these."""
    return [id for id in net.ids if id not in ids]


def test_an_admission_is_found_in_its_bytes() -> None:
    """Only the command itself is taken for one, wherever its tag may stand by chance."""
    admit = command_pb2.AdmitMaster(master_id="m2", disk_id="d")
    assert admission(command_pb2.Command(cause="x", admit_master=admit).SerializeToString()) == ("m2", "d")
    for no_admission in (
        command("plain").SerializeToString(),
        command_pb2.Command(cause="\u0142\u0005", barrier=command_pb2.Barrier()).SerializeToString(),
        command_pb2.Command(admit_master=command_pb2.AdmitMaster(master_id="m2")).SerializeToString(),
        b"\x82\x05\xff",
        b"",
    ):
        assert admission(no_admission) is None


def test_an_empty_disk_neither_votes_nor_counts(tmp_path: Path) -> None:
    """With one of three away, an empty disk makes no majority: nothing is committed, and the leader steps down."""
    with fleet(tmp_path) as fleet_:
        net = fleet_.net
        leader = net.elect()
        net.commit(leader, "before")
        lost, away = others(net, leader)
        fleet_.lose_disk(lost)
        fleet_.run(lambda: applied(net.masters[lost].state) == ["before"])
        net.stop(away)
        outcome = net.propose(leader, "never")
        fleet_.turns(100)
        assert net.masters[leader].has_lease is False
        fleet_.turns(400)
        assert net.leader() is None
        assert net.masters[lost].role == "learner"
        assert not outcome
        fleet_.start(away)
        fleet_.run(lambda: net.leader() is not None)
        assert "before" in applied(net.masters[net.elect()].state)


def test_empty_disks_in_a_majority_never_elect(tmp_path: Path) -> None:
    """Two lost disks and one with everything: nobody leads, so that nothing is forgotten silently."""
    with fleet(tmp_path) as fleet_:
        net = fleet_.net
        leader = net.elect()
        net.commit(leader, "precious")
        for id in others(net, leader):
            fleet_.lose_disk(id)
        fleet_.turns(500)
        assert net.leader() is None
        assert applied(net.masters[leader].state) == ["precious"]


def test_without_the_rules_empty_disks_forget(tmp_path: Path) -> None:
    """What the silence is for: two empty disks that speak elect each other, and the acknowledged command is gone."""
    with fleet(tmp_path, silent=False) as fleet_:
        net = fleet_.net
        leader = net.elect()
        net.commit(leader, "precious")
        net.stop(leader)
        for id in others(net, leader):
            fleet_.lose_disk(id)
        fleet_.run(lambda: net.leader() is not None)
        found = net.leader()
        assert found is not None
        assert applied(net.masters[found].state) == []


@pytest.mark.parametrize("ids", [THREE, FIVE], ids=["three", "five"])
def test_an_admitted_disk_votes_and_counts(tmp_path: Path, ids: tuple[str, ...]) -> None:
    """After the admission the new disk makes a majority with what is left, and the cluster survives the next loss."""
    with fleet(tmp_path, ids=ids) as fleet_:
        net = fleet_.net
        leader = net.elect()
        for number in range(30):
            net.commit(leader, f"c{number}")
        lost = others(net, leader)[0]
        fleet_.lose_disk(lost)
        fleet_.replace(lost)
        rest = others(net, leader, lost)
        for id in (leader, *rest[: len(ids) // 2 - 1]):
            net.stop(id)
        fleet_.run(lambda: net.leader() is not None)
        successor = net.elect()
        assert applied(net.masters[successor].state)[:30] == [f"c{number}" for number in range(30)]
        net.commit(successor, "after")


def test_an_admitted_disk_may_lead(tmp_path: Path) -> None:
    """It is a master like any other: the leadership can be handed to it."""
    with fleet(tmp_path) as fleet_:
        net = fleet_.net
        leader = net.elect()
        lost = others(net, leader)[0]
        fleet_.lose_disk(lost)
        fleet_.turns(50)
        assert net.masters[leader].transfer(lost) != FAIL_REASON.SUCCESS
        fleet_.replace(lost)
        fleet_.run(lambda: net.masters[leader].transfer(lost) == FAIL_REASON.SUCCESS)
        fleet_.run(lambda: net.leader() == lost)


def test_a_disk_gives_no_vote_in_the_term_of_its_admission(tmp_path: Path) -> None:
    """The lost one may have voted in it."""
    with fleet(tmp_path) as fleet_:
        net = fleet_.net
        leader = net.elect()
        lost = others(net, leader)[0]
        fleet_.lose_disk(lost)
        fleet_.replace(lost)
        journal = net.masters[lost]._journal
        assert (journal.getCurrentTerm(), journal.getVotedForNodeId()) == (net.masters[leader].term, lost)


def test_the_replaced_disk_counts_nowhere(tmp_path: Path) -> None:
    """When the disk that was thought lost comes back, it gets no vote, gives none, and acknowledges nothing."""
    with fleet(tmp_path) as fleet_:
        net = fleet_.net
        leader = net.elect()
        lost, other = others(net, leader)
        net.stop(lost)
        shutil.copytree(tmp_path / lost, tmp_path / "kept")
        fleet_.lose_disk(lost)
        fleet_.replace(lost)
        net.stop(lost)
        shutil.rmtree(tmp_path / lost)
        shutil.copytree(tmp_path / "kept", tmp_path / lost)
        new_disk, net.disks[lost] = net.disks[lost], f"{lost}-0"
        fleet_.start(lost)
        net.stop(other)
        outcome = net.propose(leader, "never")
        fleet_.turns(600)
        assert not outcome
        assert net.leader() is None
        assert net.masters[lost].voters.replaced_by in ("", new_disk)


def test_an_admission_takes_the_old_disk_s_say_before_it_is_committed(tmp_path: Path) -> None:
    """Whoever has it in the log no longer counts the old disk, and that itself no longer speaks."""
    with fleet(tmp_path) as fleet_:
        net = fleet_.net
        leader = net.elect()
        old, other = others(net, leader)
        net.cut(leader, other)
        admit = command_pb2.AdmitMaster(master_id=old, disk_id="elsewhere")
        payload = command_pb2.Command(cause="admit", admit_master=admit).SerializeToString()
        net.masters[leader].propose(payload, lambda result, reason: None)
        for _ in range(20):
            net.turn()
        assert net.masters[leader].voters.disk_for(old) == "elsewhere"
        assert net.masters[leader].voters.has_admission_on_its_way
        assert not net.masters[old].voters.speaks
        net.stop(leader)
        fleet_.turns(300)
        assert net.leader() is None
        fleet_.start(leader)
        net.mend(leader, other)
        fleet_.run(lambda: net.masters[old].voters.replaced_by == "elsewhere")
        assert net.leader() in (leader, other)


def test_one_admission_at_a_time(tmp_path: Path) -> None:
    """A second one is denied while the first is on its way, and at any master but the leader."""
    with fleet(tmp_path, ids=FIVE) as fleet_:
        net = fleet_.net
        leader = net.elect()
        first, second, third, _ = others(net, leader)
        fleet_.lose_disk(first)
        fleet_.lose_disk(second)
        fleet_.turns(50)
        outcomes = [fleet_.admit(first), fleet_.admit(second)]
        assert outcomes[1] == [FAIL_REASON.REQUEST_DENIED]
        fleet_.run(lambda: outcomes[0])
        assert outcomes[0] == [FAIL_REASON.SUCCESS]
        fleet_.replace(second)
        admit = command_pb2.AdmitMaster(master_id=first, disk_id="x")
        payload = command_pb2.Command(admit_master=admit).SerializeToString()
        reasons: list[int] = []
        net.masters[third].propose(payload, lambda result, reason: reasons.append(reason))
        assert reasons == [FAIL_REASON.REQUEST_DENIED]


def test_a_learner_may_come_by_snapshot(tmp_path: Path) -> None:
    """Its admission may be in the snapshot already when it starts anew; then it votes at once."""
    with fleet(tmp_path) as fleet_:
        net = fleet_.net
        leader = net.elect()
        lost = others(net, leader)[0]
        fleet_.lose_disk(lost)
        fleet_.turns(20)
        net.stop(lost)
        outcome = fleet_.admit(lost)
        net.run(lambda: outcome)
        for number in range(5):
            net.commit(leader, f"c{number}")
        net.masters[leader].write_snapshot()
        net.run(lambda: net.masters[leader]._journal[0][1] > 5)
        fleet_.start(lost)
        fleet_.run(lambda: net.masters[lost].role == "follower")
        assert applied(net.masters[lost].state)[-1] == "c4"


def test_the_log_is_read_again_after_a_cut(tmp_path: Path) -> None:
    """An admission that a new leader overwrites is forgotten with its entry."""
    with fleet(tmp_path) as fleet_:
        master = fleet_.net.masters["m1"]
        journal, voters = master._journal, master.voters
        admit = command_pb2.Command(admit_master=command_pb2.AdmitMaster(master_id="m2", disk_id="new"))
        last = journal[-1][1]
        journal.add(stamp(admit.SerializeToString(), WallMs(1)), last + 1, 1)
        assert voters.disk_for("m2") == "new"
        journal.add(NO_OP, last + 1, 2)
        assert voters.disk_for("m2") == ""


@pytest.mark.parametrize("seed", range(25))
def test_lost_disks_at_random(tmp_path: Path, seed: int) -> None:
    """Kills, cuts, lost disks and replacements by a seed: one leader per term, and every acknowledged command stays.

    A disk is lost only while the others are a majority of voters, since no protocol survives more.
    """
    rng = random.Random(seed)
    ids = THREE if seed % 2 else FIVE
    with fleet(tmp_path, ids=ids, seed=seed) as fleet_:
        net = fleet_.net
        acknowledged: list[str] = []
        waiting: list[tuple[str, list[tuple[command_pb2.CommandResult | None, int]]]] = []
        leaders: dict[int, str] = {}
        learner = ""

        def check() -> None:
            for id, master in net.masters.items():
                if master.is_raft_leader:
                    assert leaders.setdefault(master.term, id + net.disks[id]) == id + net.disks[id]

        def heal() -> None:
            for id in sorted(set(ids) - net.masters.keys()):
                fleet_.start(id)
            for one, other in combinations(ids, 2):
                if not net.is_linked(one, other):
                    net.mend(one, other)

        fleet_.run(lambda: net.leader() is not None)
        for number in range(120):
            action = rng.random()
            if action < 0.45 and (leader := net.leader()):
                waiting.append((f"c{number}", net.propose(leader, f"c{number}")))
            elif action < 0.55 and len(net.masters) == len(ids) and not learner:
                learner = rng.choice(ids)
                fleet_.lose_disk(learner)
            elif action < 0.75 and learner:
                if learner != net.leader() and learner in net.masters:
                    fleet_.admit(learner)
            elif action < 0.85:
                one, other = rng.sample(ids, 2)
                if {one, other} <= net.masters.keys():
                    (net.cut if net.is_linked(one, other) else net.mend)(one, other)
            elif action < 0.92 and len(net.masters) == len(ids):
                net.stop(rng.choice([id for id in ids if id != learner]))
            else:
                heal()
            for _ in range(rng.randint(1, 40)):
                fleet_.turn()
                check()
            acknowledged += [cause for cause, outcome in waiting if outcome and outcome[0][1] == FAIL_REASON.SUCCESS]
            waiting = [(cause, outcome) for cause, outcome in waiting if not outcome]
            if learner and fleet_._voters[learner]:
                learner = ""
        heal()
        fleet_.run(lambda: net.leader() is not None, seconds=20)
        for _ in range(50):
            if not learner or fleet_._voters[learner]:
                break
            fleet_.admit(learner)
            fleet_.turns(20)
        assert not learner or fleet_._voters[learner]
        leader = net.elect()
        last = net.propose(leader, "last")
        fleet_.run(lambda: last)
        fleet_.run(lambda: len({tuple(applied(master.state)) for master in net.masters.values()}) == 1)
        assert set(acknowledged) <= set(applied(net.masters[leader].state))
        assert len(acknowledged) > 5


def test_where_masters_have_moved_outlives_the_process(tmp_path: Path) -> None:
    """An identity knows the addresses of the latest state that it was told of, whatever an older snapshot says."""
    identity = Identity(tmp_path)
    identity.learn_addresses({"m2": "there:1"}, 7)
    identity.learn_addresses({}, 6)
    again = Identity(tmp_path)
    assert again.addresses == {"m2": "there:1"}
    again.learn_addresses({}, 8)
    assert Identity(tmp_path).addresses == {}
