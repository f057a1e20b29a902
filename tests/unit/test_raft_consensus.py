"""The rules that PySyncObj is held to, on a network and a clock of the test."""

from __future__ import annotations

import pickle
from contextlib import closing
from pathlib import Path

import pytest
from pysyncobj import FAIL_REASON
from pysyncobj.node import Node

from coordinator.config import RaftSettings
from coordinator.model.errors import Damaged
from coordinator.raft import ApplyFailed
from coordinator.raft.entry import stamp
from coordinator.raft.frames import Message, ProtocolViolation, parse, to_message
from coordinator.raft.journal import Journal
from tests.raft_machine import POISON, applied, command, times
from tests.raft_network import Network, network


def followers(net: Network, leader: str) -> list[str]:
    """The others, sorted."""
    return [id for id in net.ids if id != leader]


def converge(net: Network) -> None:
    """Turns until every master has applied the same."""
    net.run(lambda: len({(master.applied_index, master.commit_index) for master in net.masters.values()}) == 1)
    assert len({master.state for master in net.masters.values()}) == 1


def last_message(net: Network, from_id: str, to_id: str) -> Message:
    """The newest message on its way from one master to another."""
    message = to_message(parse(net.queue(from_id, to_id)[-1][4:]))
    assert message is not None
    return message


def test_commands_reach_every_master_in_one_order(tmp_path: Path) -> None:
    """Commands through the leader and through followers are applied everywhere, in the same order."""
    with network(tmp_path) as net:
        leader = net.elect()
        outcomes = [net.propose(id, f"{id}-{number}") for number in range(5) for id in net.ids]
        net.run(lambda: all(outcomes))
        assert {reason for outcome in outcomes for _, reason in outcome} == {FAIL_REASON.SUCCESS}
        converge(net)
        assert sorted(applied(net.masters[leader].state)) == sorted(f"{id}-{n}" for n in range(5) for id in net.ids)


def test_the_leader_stamps_the_time(tmp_path: Path) -> None:
    """A forwarded command carries the leader's clock, not the clock of the master that was asked."""
    with network(tmp_path) as net:
        leader = net.elect()
        asked = followers(net, leader)[0]
        net.clocks[asked].step_wall(-86_400)
        net.commit(asked, "forwarded")
        assert abs(times(net.masters[asked].state)[-1] - net.clocks[leader].wall_ms()) < 1_000


def test_a_commit_needs_no_heartbeat(tmp_path: Path) -> None:
    """A command through a follower is committed and applied there without any time passing."""
    with network(tmp_path) as net:
        leader = net.elect()
        converge(net)
        outcome = net.propose(followers(net, leader)[0], "quick")
        for _ in range(6):
            net.turn(0.0)
        assert [reason for _, reason in outcome] == [FAIL_REASON.SUCCESS]


def test_commands_of_one_turn_are_one_append(tmp_path: Path) -> None:
    """Fifty commands that were proposed together go to each follower as one message with fifty contiguous entries."""
    with network(tmp_path) as net:
        leader = net.elect()
        for _ in range(30):
            net.turn()
        others = [id for id in net.ids if id != leader]
        outcomes = [net.propose(leader, f"c{number}") for number in range(50)]
        net.masters[leader].step()
        for id in others:
            sent = [to_message(parse(frame[4:])) for frame in net.queue(leader, id)]
            entries = [message["entries"] for message in sent if message is not None and message["entries"]]
            assert len(entries) == 1
            first = entries[0][0][1]
            assert [index for _, index, _ in entries[0]] == list(range(first, first + 50))
        net.run(lambda: all(outcomes))


def test_leading_whole_waits_for_older_terms(tmp_path: Path) -> None:
    """A new leader does not say that it leads before it has applied what its predecessors committed."""
    with network(tmp_path) as net:
        old = net.elect()
        for number in range(10):
            net.commit(old, f"c{number}")
        net.stop(old)
        while not any(master.is_raft_leader for master in net.masters.values()):
            net.turn()
        net.run(lambda: net.leader() is not None)
        new = net.leader()
        assert new is not None
        assert applied(net.masters[new].state) == [f"c{number}" for number in range(10)]


def test_refused_append_resumes_at_the_commit_index(tmp_path: Path) -> None:
    """A follower that diverged by many entries is repaired in a few exchanges, not one per entry."""
    with network(tmp_path) as net:
        old = net.elect()
        net.commit(old, "first")
        converge(net)
        left, right = followers(net, old)
        net.cut(old, left)
        net.cut(old, right)
        for number in range(80):
            net.propose(old, f"lost-{number}")
        net.run(lambda: net.leader() not in (None, old))
        new = net.leader()
        assert new is not None
        net.commit(new, "kept")
        net.mend(old, left)
        net.mend(old, right)
        net.run(lambda: applied(net.masters[old].state) == ["first", "kept"], seconds=0.5)
        converge(net)


def test_overwritten_commands_are_definitely_not_applied(tmp_path: Path) -> None:
    """A deposed leader tells DISCARDED for a command whose place another one took."""
    with network(tmp_path) as net:
        old = net.elect()
        left, right = followers(net, old)
        net.cut(old, left)
        net.cut(old, right)
        outcome = net.propose(old, "lost")
        net.run(lambda: net.leader() not in (None, old))
        new = net.leader()
        assert new is not None
        net.commit(new, "kept")
        net.mend(old, left)
        net.mend(old, right)
        net.run(lambda: outcome)
        assert outcome == [(None, FAIL_REASON.DISCARDED)]
        converge(net)
        assert "lost" not in applied(net.masters[old].state)


def test_command_without_link_to_the_leader_is_definitely_not_applied(tmp_path: Path) -> None:
    """A follower that still believes in a leader it cannot reach says at once that nothing was sent."""
    with network(tmp_path) as net:
        leader = net.elect()
        asked = followers(net, leader)[0]
        net.cut(leader, asked)
        outcome = net.propose(asked, "unsent")
        net.masters[asked].step()
        assert outcome == [(None, FAIL_REASON.MISSING_LEADER)]


def test_command_whose_answer_is_lost_may_be_applied(tmp_path: Path) -> None:
    """A follower that loses the leader after it forwarded says that the outcome is unknown."""
    with network(tmp_path) as net:
        leader = net.elect()
        asked = followers(net, leader)[0]
        outcome = net.propose(asked, "sent")
        net.masters[asked].step()
        net.cut(leader, asked)
        assert outcome == [(None, FAIL_REASON.UNKNOWN_OUTCOME)]


def test_stale_acknowledgement_does_not_count(tmp_path: Path) -> None:
    """An answer of an older term is dropped; the bare library would take it as proof of what the follower has now."""
    with network(tmp_path) as net:
        leader = net.elect()
        master = net.masters[leader]
        before = master.commit_index
        for id in followers(net, leader):
            net.links[id].disconnected(leader)
        net.propose(leader, "pending")
        master.step()
        last = before + 1
        stale = {"type": "next_node_idx", "next_node_idx": last + 1, "reset": False, "success": True, "sent_at_us": 0}
        for id in followers(net, leader):
            net.queue(leader, id).clear()
            master.receive(Node(id), stale | {"term": master.term - 1})
        master.step()
        assert master.commit_index == before
        master.receive(Node(followers(net, leader)[0]), stale | {"term": master.term})
        master.step()
        assert master.commit_index == last


def test_acknowledgement_beyond_the_log_is_a_violation(tmp_path: Path) -> None:
    """A peer that acknowledges what was never sent is cut off; it could commit anything."""
    with network(tmp_path) as net:
        master = net.masters[net.elect()]
        answer = {"type": "next_node_idx", "next_node_idx": 10**9, "reset": False, "success": True, "sent_at_us": 0}
        with pytest.raises(ProtocolViolation, match="beyond the log"):
            master.receive(Node(followers(net, "")[0]), answer | {"term": master.term})


@pytest.mark.parametrize("kind", [b"\x01", b"\x02", b"\x03", b"", b"\x00short"])
def test_only_commands_are_taken_from_peers(tmp_path: Path, kind: bytes) -> None:
    """Membership and version changes, which PySyncObj unpickles, and broken entries are refused everywhere."""
    with network(tmp_path) as net:
        leader = net.elect()
        asked = followers(net, leader)[0]
        evil = kind + (pickle.dumps(["add", "m9"]) if kind in (b"\x02", b"\x03") else b"")
        with pytest.raises(ProtocolViolation):
            net.masters[leader].receive(Node(asked), {"type": "apply_command", "command": evil, "request_id": 1})
        if kind == b"\x01":
            return
        master = net.masters[asked]
        append = {
            "type": "append_entries",
            "sent_at_us": 0,
            "term": master.term,
            "commit_index": master.commit_index,
            "prevLogIdx": master.commit_index,
            "prevLogTerm": master.term,
            "entries": [(evil, master.commit_index + 1, master.term)],
        }
        with pytest.raises(ProtocolViolation):
            master.receive(Node(leader), append)


def test_commit_index_covers_only_what_an_append_showed(tmp_path: Path) -> None:
    """Entries behind an append may differ from the leader's, so its commit index must not reach them."""
    with network(tmp_path) as net:
        leader = net.elect()
        converge(net)
        asked = followers(net, leader)[0]
        master = net.masters[asked]
        commit, term = master.commit_index, master.term
        tail = [(stamp(command("tail").SerializeToString(), net.clocks[asked].wall_ms()), commit + 1, term)]
        append = {"type": "append_entries", "sent_at_us": 0, "term": term, "prevLogIdx": commit, "prevLogTerm": term}
        master.receive(Node(leader), append | {"entries": tail, "commit_index": commit})
        master.step()
        assert last_message(net, asked, leader)["next_node_idx"] == commit + 2
        master.receive(Node(leader), append | {"entries": [], "commit_index": commit + 1})
        master.step()
        assert master.commit_index == commit
        assert last_message(net, asked, leader)["next_node_idx"] == commit + 1
        master.receive(Node(leader), append | {"entries": tail, "commit_index": commit + 1})
        assert master.commit_index == commit + 1
        net.queue(asked, leader).clear()


def test_leader_that_contradicts_committed_entries_stops_the_follower(tmp_path: Path) -> None:
    """Two masters that committed different entries is lost data: nobody may go on quietly."""
    with network(tmp_path) as net:
        leader = net.elect()
        net.commit(leader, "kept")
        converge(net)
        asked = followers(net, leader)[0]
        master = net.masters[asked]
        append = {
            "type": "append_entries",
            "sent_at_us": 0,
            "term": master.term + 1,
            "commit_index": 1,
            "prevLogIdx": 1,
            "prevLogTerm": 0,
            "entries": [(b"\x01", 2, master.term + 1)],
        }
        with pytest.raises(Damaged, match="lost its disk"):
            master.receive(Node(leader), append)


def test_machine_that_raises_stops_the_master(tmp_path: Path) -> None:
    """An exception in the machine is not retried for ever; it ends the master with the entry named."""
    with network(tmp_path) as net:
        leader = net.elect()
        net.propose(leader, POISON)
        with pytest.raises(ApplyFailed, match=r"log entry \d+ cannot be applied: RuntimeError: poison"):
            net.run(lambda: False)


def test_far_behind_follower_gets_the_snapshot(tmp_path: Path) -> None:
    """Logs are cut after a snapshot; who was away catches up through it, and sees one transition for all."""
    settings = RaftSettings(snapshot_entries=20)
    with network(tmp_path, settings=settings) as net:
        leader = net.elect()
        away = followers(net, leader)[0]
        net.stop(away)
        for number in range(100):
            net.commit(leader, f"c{number}")
        assert len(list((tmp_path / leader).glob("snapshot"))) == 1
        back = net.start(away)
        net.run(lambda: back.applied_index >= net.masters[leader].commit_index)
        transitions = back.take_transitions()
        assert len(transitions) < 30
        assert transitions[0].changes == ()
        converge(net)
        assert applied(back.state) == [f"c{number}" for number in range(100)]
        net.commit(away, "after")


def test_everything_survives_a_restart_of_all(tmp_path: Path) -> None:
    """All masters are killed at once, between snapshots and after: each acknowledged command is there again."""
    settings = RaftSettings(snapshot_entries=20)
    with network(tmp_path, settings=settings) as net:
        for round_number in range(4):
            leader = net.elect()
            for number in range(15):
                net.commit(leader, f"r{round_number}-{number}")
            for id in net.ids:
                net.stop(id)
            for id in net.ids:
                net.start(id)
        net.elect()
        converge(net)
        expected = [f"r{round_number}-{number}" for round_number in range(4) for number in range(15)]
        assert applied(net.masters["m1"].state) == expected


def test_single_master_commits_alone(tmp_path: Path) -> None:
    """A cluster of one works, for trying things out."""
    with network(tmp_path, ids=("m1",)) as net:
        net.elect()
        net.commit("m1", "alone")
        assert applied(net.masters["m1"].state) == ["alone"]


def test_log_without_its_snapshot_refuses_to_start(tmp_path: Path) -> None:
    """Journal and snapshot are one unit: the rest of a log alone is not a state."""
    with network(tmp_path) as net:
        net.stop("m1")
        for path in (tmp_path / "m1").glob("journal-*.log"):
            path.unlink()
        with closing(Journal(tmp_path / "m1", "test/m1")) as journal:
            journal.align((b"\x01", 49, 3), (b"\x01", 50, 3))
        with pytest.raises(Damaged, match="there is no snapshot"):
            net.start("m1")


def test_what_comes_after_the_end_is_not_taken_in(tmp_path: Path) -> None:
    """Shows that an append that arrives while a stopped master closes its connections touches no closed file."""
    with network(tmp_path) as net:
        leader = net.elect()
        follower = next(id for id in net.ids if id != leader)
        links = net.links[follower]
        net.propose(leader, "late")
        net.masters[leader].step()
        frames = list(net.queue(leader, follower))
        net.masters[follower].close()
        assert frames
        for frame in frames:
            links.receive(leader, frame)
        net.masters.pop(follower)


def test_an_answer_to_a_command_of_an_earlier_life_acknowledges_nothing(tmp_path: Path) -> None:
    """Shows that a follower that was killed with a command on its way does not take its answer for a later one's."""
    with network(tmp_path) as net:
        leader = net.elect()
        follower = next(id for id in net.ids if id != leader)
        gathering = net.masters[leader]._gathering

        def hold() -> None:
            gathering.closed_until_s = net.now_s + 0.05

        for _ in range(20):
            net.turn(0.005)
        hold()
        net.propose(follower, "before")
        net.masters[follower].step()
        net.deliver()
        hold()
        net.stop(follower)
        net.start(follower)
        while net.masters[follower].leader_id != leader:
            net.turn(0.005)
            hold()
        outcome = net.propose(follower, "after")
        net.masters[follower].step()
        net.queue(follower, leader).clear()
        net.now_s += 0.06
        net.run(lambda: "before" in applied(net.masters[leader].state))
        for _ in range(20):
            net.turn()
        assert "after" not in applied(net.masters[leader].state)
        assert all(result is None and reason != FAIL_REASON.SUCCESS for result, reason in outcome)


def test_a_deposed_leader_that_leads_again_commits_as_fast_as_before(tmp_path: Path) -> None:
    """Shows that appends which nobody answered in its earlier term are not waited for in the later one."""
    with network(tmp_path) as net:
        leader = net.elect()
        others = [id for id in net.ids if id != leader]
        stalled = net.masters.pop(leader)
        net.run(lambda: net.leader() in others)
        net.masters[leader] = stalled
        for number in range(4):
            net.propose(leader, f"while deposed {number}")
            stalled.step()
        successor = net.leader()
        assert successor is not None
        net.run(lambda: net.masters[successor].transfer(leader) == FAIL_REASON.SUCCESS)
        net.run(lambda: net.leader() == leader)
        for _ in range(20):
            net.turn()
        began_s = net.now_s
        for number in range(10):
            outcome = net.propose(leader, f"again {number}")
            while not outcome:
                net.turn(0.001)
        assert net.now_s - began_s < 0.1
