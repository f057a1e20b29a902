"""Pre-votes, steady voters, the leader's lease, and what is on disk before it is acknowledged, in virtual time."""

from __future__ import annotations

from pathlib import Path

import pytest
from pysyncobj import FAIL_REASON
from pysyncobj.node import Node

from coordinator.config import RaftSettings
from coordinator.raft.elections import LEASE_SHARE, Protections
from coordinator.raft.frames import parse, to_message
from tests.raft_machine import applied
from tests.raft_network import Network, network

SETTINGS = RaftSettings()
LEASE_S = LEASE_SHARE * SETTINGS.election_timeout_s_min


def others(net: Network, id: str) -> list[str]:
    return [other for other in net.ids if other != id]


def cut_off(net: Network, id: str) -> None:
    for other in others(net, id):
        net.cut(id, other)


def bring_back(net: Network, id: str) -> None:
    for other in others(net, id):
        net.mend(id, other)


def turn_for(net: Network, seconds: float) -> None:
    """Lets virtual time pass."""
    end_s = net.now_s + seconds
    while net.now_s < end_s:
        net.turn()


def test_a_master_that_was_cut_off_deposes_nobody(tmp_path: Path) -> None:
    """Shows that a follower comes back from a partition with the term it left with, and the leader stays."""
    with network(tmp_path) as net:
        leader = net.elect()
        away = others(net, leader)[0]
        term = net.masters[leader].term
        cut_off(net, away)
        turn_for(net, 10.0)
        assert net.masters[away].term == term
        bring_back(net, away)
        turn_for(net, 2.0)
        assert net.leader() == leader
        assert {master.term for master in net.masters.values()} == {term}


def test_without_pre_votes_it_does(tmp_path: Path) -> None:
    """Shows what the protection is for: with it switched off the same partition costs the leader its place."""
    with network(tmp_path, protections=Protections(hears_leader=False)) as net:
        leader = net.elect()
        away = others(net, leader)[0]
        term = net.masters[leader].term
        # One of two links stays, so that PySyncObj stands for election again and again.
        net.cut(leader, away)
        turn_for(net, 5.0)
        assert max(master.term for master in net.masters.values()) > term


def test_a_half_cut_follower_does_not_depose_the_leader(tmp_path: Path) -> None:
    """Shows that a follower that reaches another follower but not the leader gets no vote, however long it asks."""
    with network(tmp_path) as net:
        leader = net.elect()
        term = net.masters[leader].term
        net.cut(leader, others(net, leader)[0])
        turn_for(net, 10.0)
        assert net.leader() == leader
        assert net.masters[leader].term == term


@pytest.mark.parametrize("ids", [("m1", "m2", "m3"), ("m1", "m2", "m3", "m4", "m5")])
def test_of_those_who_ask_at_the_same_moment_one_is_elected(tmp_path: Path, ids: tuple[str, ...]) -> None:
    """Shows that the followers of a lost leader whose timeouts end together need one election, not another timeout."""
    with network(tmp_path, ids) as net:
        leader = net.elect()
        term = net.masters[leader].term
        left = others(net, leader)
        net.stop(leader)
        turn_for(net, SETTINGS.election_timeout_s_min - 0.01)
        for id in left:
            net.masters[id]._engine.stand_for_election()
        net.run(lambda: net.leader() is not None, seconds=0.1)
        assert net.masters[max(left)].term == term + 1
        assert net.leader() == max(left)


def test_who_said_yes_lets_the_other_stand_first(tmp_path: Path) -> None:
    """Shows that a voter whose own timeout ends with the candidate's question does not stand in the same term."""
    with network(tmp_path) as net:
        leader = net.elect()
        term = net.masters[leader].term
        first, second = others(net, leader)
        net.stop(leader)
        turn_for(net, SETTINGS.election_timeout_s_min - 0.01)
        net.now_s += 0.02
        net.masters[first]._engine.stand_for_election()
        net.masters[first].step()
        net.masters[second]._engine.stand_for_election()
        net.links[second].receive(first, net.queue(first, second).popleft())
        net.masters[second].step()
        net.run(lambda: net.leader() is not None, seconds=0.1)
        assert net.leader() == first
        assert net.masters[second].term == term + 1


def test_a_voter_that_hears_a_leader_ignores_candidates(tmp_path: Path) -> None:
    """Shows that a request for a vote in a later term changes neither term nor leader while a leader is heard."""
    with network(tmp_path) as net:
        leader = net.elect()
        voter, candidate = others(net, leader)
        term = net.masters[voter].term
        index = net.masters[voter].commit_index
        request = {"type": "request_vote", "term": term + 5, "last_log_index": index + 9, "last_log_term": term + 4}
        for asked in (voter, leader):
            net.masters[asked].receive(Node(candidate), request | {"is_transfer": False})
            assert net.masters[asked].term == term
        assert net.leader() == leader


def test_a_voter_that_has_just_started_waits(tmp_path: Path) -> None:
    """Shows that a voter does not vote while a leader that it heard before its restart may still have a lease."""
    with network(tmp_path) as net:
        leader = net.elect()
        voter, candidate = others(net, leader)
        net.stop(voter)
        net.start(voter)
        term = net.masters[voter].term
        request = {"type": "request_vote", "term": term + 1, "last_log_index": 10**6, "last_log_term": term}
        net.masters[voter].receive(Node(candidate), request | {"is_transfer": False})
        assert net.masters[voter].term == term


def test_a_later_term_of_a_follower_makes_the_leader_stand_again(tmp_path: Path) -> None:
    """Shows that a follower with a later term, which the leader could never command, is in again after an election."""
    with network(tmp_path) as net:
        leader = net.elect()
        odd = others(net, leader)[0]
        net.masters[odd]._engine.become_follower(net.masters[odd].term + 3)
        net.run(lambda: len({master.term for master in net.masters.values()}) == 1 and net.leader() is not None)
        net.commit(net.elect(), "on")
        net.run(lambda: all(applied(master.state) == ["on"] for master in net.masters.values()))


def test_the_lease_counts_from_the_sending(tmp_path: Path) -> None:
    """Shows that a leader that hears nobody has no lease when the lease's time has passed since its last sending."""
    with network(tmp_path) as net:
        leader = net.elect()
        turn_for(net, 0.5)
        assert net.masters[leader].has_lease
        cut_off(net, leader)
        turn_for(net, LEASE_S + 2 * SETTINGS.append_period_s)
        assert not net.masters[leader].has_lease
        assert net.masters[leader].is_raft_leader, "it has lost its lease before it knows that it is deposed"


def test_an_answer_that_comes_late_gives_no_lease(tmp_path: Path) -> None:
    """Shows that an answer which lay in the network for seconds counts from its append, and not from its arrival."""
    for protections, expected in ((Protections(), False), (Protections(lease_counts_from_sending=False), True)):
        directory = tmp_path / str(expected)
        directory.mkdir()
        with network(directory, protections=protections) as net:
            leader = net.elect()
            turn_for(net, 0.5)
            late = net.now_s
            net.now_s += 5.0
            master = net.masters[leader]
            answer = {"type": "next_node_idx", "next_node_idx": 1, "reset": False, "success": False}
            for id in others(net, leader):
                master.receive(Node(id), answer | {"term": master.term, "sent_at_us": round(late * 1e6)})
            assert master.elections.has_lease() is expected


def test_a_refused_append_gives_no_lease(tmp_path: Path) -> None:
    """Shows that the answer to an append of an older term, which the voter did not hear, names no time of sending."""
    with network(tmp_path) as net:
        leader = net.elect()
        voter = others(net, leader)[0]
        master = net.masters[voter]
        net.links[voter].disconnected(leader)
        net.queue(voter, leader).clear()
        append = {"type": "append_entries", "commit_index": 1, "entries": [], "prevLogIdx": 1, "prevLogTerm": 0}
        master.receive(Node(leader), append | {"term": master.term - 1, "sent_at_us": 10**15})
        master.step()
        answer = to_message(parse(net.queue(voter, leader)[-1][4:]))
        assert answer is not None
        assert (answer["type"], answer["success"], answer["sent_at_us"]) == ("next_node_idx", False, 0)


def test_a_new_leader_is_elected_only_after_the_old_ones_lease(tmp_path: Path) -> None:
    """Shows over many seeds that the lease of a cut-off leader has run out before another one leads."""
    for seed in range(30):
        directory = tmp_path / str(seed)
        directory.mkdir()
        with network(directory, seed=seed) as net:
            old = net.elect()
            turn_for(net, 0.3)
            cut_off(net, old)
            while net.leader() in (None, old):
                net.turn()
                leading = [id for id, master in net.masters.items() if master.is_raft_leader and id != old]
                assert not (leading and net.masters[old].has_lease), f"seed {seed}"


def test_a_single_master_always_has_its_lease(tmp_path: Path) -> None:
    """Shows that a cluster of one needs nobody's answer."""
    with network(tmp_path, ids=("m1",)) as net:
        assert net.masters[net.elect()].has_lease
        net.commit("m1", "alone")


def test_a_transfer_needs_no_timeout_and_ends_the_lease(tmp_path: Path) -> None:
    """Shows that the asked follower leads at once although all hear the old leader, which drops its lease first."""
    with network(tmp_path) as net:
        old = net.elect()
        net.commit(old, "before")
        turn_for(net, 0.5)
        target = others(net, old)[1]
        assert net.masters[old].transfer(target) == FAIL_REASON.SUCCESS
        assert not net.masters[old].has_lease
        net.run(lambda: net.leader() == target, seconds=0.2)
        net.commit(target, "after")


def test_nothing_is_appended_while_a_transfer_is_on_its_way(tmp_path: Path) -> None:
    """Commands that come in after the target was asked wait, so it lacks nothing, wins, and they are applied there."""
    with network(tmp_path) as net:
        old = net.elect()
        target = others(net, old)[0]
        index = net.commit(old, "before")
        net.run(lambda: net.masters[old].transfer(target) == FAIL_REASON.SUCCESS)
        last = net.masters[old]._last_index
        outcomes = [net.propose(old, f"meanwhile-{number}") for number in range(3)]
        net.masters[old].step()
        assert net.masters[old]._last_index == last >= index
        net.run(lambda: net.masters[target].leads_whole and all(outcomes))
        # Definitely not applied, so whoever proposed them does so again, at the new leader.
        assert {reason for outcome in outcomes for _, reason in outcome} <= {
            FAIL_REASON.MISSING_LEADER,
            FAIL_REASON.SUCCESS,
        }


def test_a_transfer_that_fails_costs_an_election_and_not_the_lease(tmp_path: Path) -> None:
    """Shows that a leader whose successor never came leads again in a new term, with a lease."""
    with network(tmp_path) as net:
        old = net.elect()
        turn_for(net, 0.5)
        target = others(net, old)[0]
        term = net.masters[old].term
        net.masters[old].transfer(target)
        net.queue(old, target).clear()
        turn_for(net, 5.0)
        leader = net.elect()
        assert net.masters[leader].term > term
        assert net.masters[leader].has_lease


def test_nothing_is_acknowledged_before_it_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that followers answer, and the leader commits, only after a sync that came after the write."""
    with network(tmp_path) as net:
        leader = net.elect()
        turn_for(net, 0.3)
        synced: list[int] = []
        monkeypatch.setattr("coordinator.raft.journal._fdatasync", synced.append)
        follower = others(net, leader)[0]
        outcome = net.propose(leader, "durable")
        net.masters[leader].step()
        assert synced == [], "the append leaves before the leader's own sync"
        frames = list(net.queue(leader, follower))
        assert frames
        net.queue(leader, follower).clear()
        for frame in frames:
            net.links[follower].receive(leader, frame)
        assert not net.queue(follower, leader), "nothing leaves before the sync"
        net.masters[follower].step()
        assert len(synced) == 1
        assert net.queue(follower, leader)
        net.deliver()
        assert not outcome
        net.masters[leader].step()
        assert len(synced) >= 2, "the leader's own entry counts once it is synced"
        assert [reason for _, reason in outcome] == [FAIL_REASON.SUCCESS]


def test_one_sync_serves_all_that_came_in_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows group commit: a hundred commands of one turn cost the leader one sync."""
    with network(tmp_path) as net:
        leader = net.elect()
        turn_for(net, 0.3)
        synced: list[int] = []
        outcomes = [net.propose(leader, f"c{number}") for number in range(100)]
        net.masters[leader].step()
        monkeypatch.setattr("coordinator.raft.journal._fdatasync", synced.append)
        net.masters[leader].step()
        assert len(synced) == 1
        net.run(lambda: all(outcomes))


def test_a_disk_that_fails_stops_the_master(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that an error of the sync comes out of the step with nothing acknowledged; RaftNode stops on it."""
    with network(tmp_path) as net:
        leader = net.elect()
        outcome = net.propose(leader, "lost")
        net.masters[leader].step()

        def full(fd: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("coordinator.raft.journal._fdatasync", full)
        with pytest.raises(OSError, match="No space left"):
            net.masters[leader].step()
        assert not outcome
        monkeypatch.undo()


def test_a_master_that_is_cut_off_names_no_leader(tmp_path: Path) -> None:
    """Shows that nobody is sent to a leader that this master cannot reach: PySyncObj alone would name it for ever."""
    with network(tmp_path) as net:
        leader = net.elect()
        away = others(net, leader)[0]
        assert net.masters[away].leader_id == leader
        cut_off(net, away)
        assert net.masters[away].leader_id is None
        turn_for(net, 5.0)
        assert net.masters[away].leader_id is None
        bring_back(net, away)
        net.run(lambda: net.masters[away].leader_id == leader)
        cut_off(net, leader)
        net.run(lambda: net.masters[leader].leader_id is None)
