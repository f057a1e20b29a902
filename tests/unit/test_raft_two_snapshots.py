"""The newest snapshot damaged, and a snapshot that takes long to check: nothing acknowledged is lost, nobody waits."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.config import RaftSettings
from coordinator.model.errors import Damaged
from coordinator.raft import journal
from tests.raft_machine import applied
from tests.raft_network import InlineExecutor, Network, network
from tests.unit.test_raft_snapshot import LateExecutor

SETTINGS = RaftSettings(snapshot_entries=15)


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few entries fill a segment, so that cutting the log shows on disk."""
    monkeypatch.setattr(journal.Journal.__init__, "__defaults__", (400,))


def commit_many(net: Network, leader: str, count: int, name: str) -> None:
    """Commits so many commands, and waits until all that run have applied them and written what they write."""
    for number in range(count):
        net.commit(leader, f"{name}{number}")
    net.run(lambda: len({master.applied_index for master in net.masters.values()}) == 1)
    net.turn()


def test_the_disk_keeps_the_log_behind_the_older_snapshot(tmp_path: Path) -> None:
    """After many snapshots the first segment holds the older one's last entries, and not much more."""
    with network(tmp_path, settings=SETTINGS) as net:
        leader = net.elect()
        commit_many(net, leader, 70, "c")
        store = net.masters[leader]._snapshots
        first = min(int(path.stem.split("-")[1]) for path in (tmp_path / leader).glob("journal-*.log"))
        assert store.needed_from - 10 <= first <= store.needed_from < store.figures.index - 10
        assert net.masters[leader]._journal[0][1] == store.figures.index - 1


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_master_starts_from_the_snapshot_before_a_damaged_one(tmp_path: Path, damage: str) -> None:
    """All masters lose their newest snapshot at once: every acknowledged command is there, and it goes on."""
    with network(tmp_path, settings=SETTINGS) as net:
        leader = net.elect()
        commit_many(net, leader, 50, "c")
        expected = applied(net.masters[leader].state)
        for id in net.ids:
            net.stop(id)
            path = tmp_path / id / "snapshot"
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            match damage:
                case "flip":
                    path.write_bytes(content)
                case "cut":
                    path.write_bytes(content[:-5])
                case _:
                    path.unlink()
        for id in net.ids:
            net.start(id)
        leader = net.elect()
        commit_many(net, leader, 50, "d")
        assert applied(net.masters[leader].state)[: len(expected)] == expected
        assert len(applied(net.masters[leader].state)) == 100
        for id in net.ids:
            net.stop(id)
            net.start(id)
        assert len(applied(net.masters[net.elect()].state)) <= 100


def test_a_leader_s_snapshot_leaves_no_older_one_to_go_back_to(tmp_path: Path) -> None:
    """A follower whose log was replaced by a snapshot refuses when that is damaged: going back would forget."""
    with network(tmp_path, settings=SETTINGS) as net:
        leader = net.elect()
        commit_many(net, leader, 50, "c")
        away = next(id for id in net.ids if id != leader)
        net.stop(away)
        commit_many(net, leader, 50, "d")
        net.start(away)
        commit_many(net, leader, 1, "e")
        assert net.masters[away]._snapshots.figures.index > 60
        assert not (tmp_path / away / "snapshot.previous").exists()
        net.stop(away)
        path = tmp_path / away / "snapshot"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(Damaged, match="snapshot, offset 8"):
            net.start(away)


def test_the_leader_keeps_its_lease_while_a_snapshot_is_checked(tmp_path: Path) -> None:
    """With one of three gone and the other one checking for seconds, the leader leads on, and then commits at once."""
    with network(tmp_path, settings=SETTINGS) as net:
        leader = net.elect()
        away, gone = (id for id in net.ids if id != leader)
        net.stop(away)
        commit_many(net, leader, 50, "c")
        net.start(away)
        late = LateExecutor()
        net.masters[away]._snapshots._executor = late
        net.run(lambda: net.masters[away]._snapshots.is_checking)
        net.stop(gone)
        term = net.masters[leader].term
        outcome = net.propose(leader, "waits")
        for _ in range(200):
            net.turn()
            assert net.masters[leader].has_lease
        assert not outcome
        assert net.masters[away].leader_id == leader
        late.run()
        net.masters[away]._snapshots._executor = InlineExecutor()
        net.run(lambda: outcome, seconds=0.5)
        assert net.masters[leader].term == term
        net.run(lambda: net.masters[away].state == net.masters[leader].state)


def test_a_new_leader_is_followed_while_a_snapshot_is_checked(tmp_path: Path) -> None:
    """When its sender dies meanwhile, the snapshot counts for the next leader too, for all that it includes."""
    with network(tmp_path, settings=SETTINGS) as net:
        old = net.elect()
        away, other = (id for id in net.ids if id != old)
        net.stop(away)
        commit_many(net, old, 50, "c")
        net.start(away)
        late = LateExecutor()
        net.masters[away]._snapshots._executor = late
        net.run(lambda: net.masters[away]._snapshots.is_checking)
        net.stop(old)
        net.run(lambda: net.leader() == other or net.masters[other].is_raft_leader, seconds=20)
        late.run()
        net.masters[away]._snapshots._executor = InlineExecutor()
        assert net.elect() == other
        net.commit(other, "after")
        net.run(lambda: net.masters[away].state == net.masters[other].state)


def test_a_damaged_transfer_is_dropped_and_repeated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A snapshot that came in wrong is named in the log, and the leader sends it again."""
    with network(tmp_path, settings=SETTINGS) as net:
        leader = net.elect()
        away = next(id for id in net.ids if id != leader)
        net.stop(away)
        commit_many(net, leader, 50, "c")
        net.start(away)
        late = LateExecutor()
        net.masters[away]._snapshots._executor = late
        net.run(lambda: net.masters[away]._snapshots.is_checking)
        temporary = tmp_path / away / "snapshot.received.tmp"
        temporary.write_bytes(temporary.read_bytes()[:-1])
        late.run()
        net.masters[away]._snapshots._executor = InlineExecutor()
        net.run(lambda: net.masters[away].state == net.masters[leader].state)
        assert "dropped, this master keeps its state" in caplog.text
