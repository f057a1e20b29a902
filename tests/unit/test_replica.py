"""The replica machine, step by step: writes, leases, failovers, copies, ceding, faults of the store.

The simulation is tests/sim/test_replica_seeds.py.
"""

from __future__ import annotations

import pytest

from coordinator.api.v1 import replication_pb2
from coordinator.model.errors import Damaged, NotPrimary, OutcomeUnknown, Overloaded
from tests.replica_driver import SHARD, TIMES, Cluster, Node
from tests.sim.replica_store import SimStore, payload_of
from worker_agent import replica_follower, replica_primary
from worker_agent.replica_follower import COPY_CHUNKS_MAX
from worker_agent.shard_interface import (
    AppendRecords,
    Barrier,
    Foresee,
    PeerConnected,
    PeerSaid,
    Progress,
    SeeEpoch,
    SendToPeer,
    StoreFailed,
)
from worker_agent.store_interface import LogRecord, StoreFull

PROMISE_S = TIMES.replica_lease_s * TIMES.lease_margin


def test_a_write_is_acknowledged_when_it_is_on_all_disks_and_applied() -> None:
    """One append, one message for each replica; settled only after the last disk, and with its sequence."""
    cluster = Cluster("w1", "w2", "w3")
    primary = cluster.form("w1", "w2", "w3")
    actions = primary.submit(1)
    assert [type(action) for action in actions] == [AppendRecords, SendToPeer, SendToPeer]
    primary.work()
    cluster.deliver()
    cluster.nodes["w2"].work()
    cluster.deliver()
    assert 1 not in primary.settled
    cluster.nodes["w3"].work()
    cluster.deliver()
    assert 1 not in primary.settled
    primary.work()
    assert primary.settled[1].sequence == 1
    assert primary.store.get("a") == "v1"
    cluster.pass_time(1.0)
    assert {node.store.digest() for node in cluster.nodes.values()} == {primary.store.digest()}


def test_writes_that_come_together_go_together() -> None:
    """What arrives while an append is on its way is one append and one message afterwards."""
    cluster = Cluster("w1", "w2")
    primary = cluster.form("w1", "w2")
    primary.submit(1)
    for token in range(2, 12):
        assert primary.submit(token) == []
    primary.work(1)
    assert [len(each.records) for each in primary.queue if isinstance(each, AppendRecords)] == [10]
    sent = [action for sender, action in cluster.mail if action.message.WhichOneof("message") == "append"]
    assert [len(action.message.append.records) for action in sent] == [1, 10]
    cluster.settle()
    assert [primary.settled[token].sequence for token in range(1, 12)] == list(range(1, 12))


def test_too_many_writes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in flight is bounded; a refusal is definite."""
    monkeypatch.setattr(replica_primary, "IN_FLIGHT_RECORDS_MAX", 3)
    cluster = Cluster("w1", "w2")
    primary = cluster.form("w1", "w2")
    for token in range(1, 6):
        primary.submit(token)
    assert [token for token, end in primary.settled.items() if isinstance(end.error, Overloaded)] == [4, 5]
    cluster.settle()
    assert [primary.settled[token].sequence for token in (1, 2, 3)] == [1, 2, 3]


def test_reads_need_the_leases_of_all_needed_replicas() -> None:
    """A replica that does not answer ends the right to read; a barrier waits for all, and passes with their answers."""
    cluster = Cluster("w1", "w2", "w3")
    primary = cluster.form("w1", "w2", "w3")
    assert primary.replica.may_read(cluster.now)
    cluster.cut("w1", "w3")
    cluster.pass_time(TIMES.replica_lease_s + 0.1)
    assert primary.replica.is_serving
    assert not primary.replica.may_read(cluster.now)
    primary.feed(Barrier(9))
    cluster.settle()
    assert 9 not in primary.settled
    cluster.mend("w1", "w3")
    cluster.pass_time(0.5)
    assert primary.settled[9].error is None
    assert primary.replica.may_read(cluster.now)


def test_a_single_copy_needs_the_session_lease() -> None:
    """With nobody else needed, reads and writes rest on the worker's session."""
    cluster = Cluster("w1")
    primary = cluster.form("w1")
    primary.submit(1)
    cluster.settle()
    assert primary.settled[1].sequence == 1
    primary.has_session = False
    assert not primary.replica.may_read(cluster.now)
    primary.submit(2)
    assert isinstance(primary.settled[2].error, NotPrimary)


def test_a_replica_that_does_not_follow_is_named_and_waited_for() -> None:
    """The primary names it and acknowledges nothing without it before a new epoch says so."""
    cluster = Cluster("w1", "w2", "w3")
    primary = cluster.form("w1", "w2", "w3")
    cluster.cut("w1", "w3")
    primary.submit(1)
    cluster.pass_time(TIMES.lagging_s + 0.5)
    assert primary.report.lagging == ("w3",)
    assert 1 not in primary.settled
    cluster.assign(cluster.view(2, "w1", "w2"), "w1", "w2")
    cluster.settle()
    assert primary.settled[1].sequence == 1
    assert not primary.report.lagging


def test_a_new_primary_waits_for_the_lease_that_it_granted() -> None:
    """The old primary may read until its lease ends, and the new one serves only after that."""
    cluster = Cluster("w1", "w2")
    old = cluster.form("w1", "w2")
    old.submit(1)
    cluster.settle()
    cluster.cut("w1", "w2")
    cluster.cut("w2", "w1")
    cluster.assign(cluster.view(2, "w2"), "w2")
    new = cluster.nodes["w2"]
    while not new.replica.is_serving:
        assert not (old.replica.may_read(cluster.now) and new.replica.may_read(cluster.now))
        cluster.pass_time(0.05)
        assert cluster.now < 200.0
    assert not old.replica.may_read(cluster.now)
    assert new.store.get("a") == "v1"


def test_a_restarted_replica_waits_a_whole_lease() -> None:
    """What a process promised before it ended, the next one keeps."""
    cluster = Cluster("w1", "w2")
    cluster.form("w1", "w2")
    node = cluster.nodes["w2"]
    cluster.cut("w1", "w2")
    cluster.cut("w2", "w1")
    node.restart(cluster.view(2, "w2"))
    cluster.pass_time(PROMISE_S - 0.05)
    assert not node.replica.is_serving
    cluster.pass_time(0.1)
    assert node.replica.is_serving


def test_a_new_primary_brings_the_others_to_its_log() -> None:
    """Records that only one replica has go when the new primary has others; what was acknowledged stays."""
    cluster = Cluster("w1", "w2", "w3")
    old = cluster.form("w1", "w2", "w3")
    old.submit(1)
    cluster.settle()
    cluster.cut("w1", "w2")
    old.submit(2)
    old.submit(3)
    cluster.settle()
    assert cluster.nodes["w3"].store.position().last == 3
    cluster.assign(cluster.view(2, "w2", "w3"), "w2", "w3")
    cluster.pass_time(PROMISE_S + 0.5)
    new = cluster.nodes["w2"]
    assert new.replica.is_serving
    assert cluster.nodes["w3"].store.position().last == 1
    new.submit(4)
    cluster.settle()
    assert new.settled[4].sequence == 2
    assert cluster.nodes["w3"].store.position().last_epoch == 2
    cluster.pass_time(0.5)
    assert cluster.nodes["w3"].store.digest() == new.store.digest()


def test_a_primary_that_is_replaced_stops_and_doubts() -> None:
    """What it had sent may be applied; what comes later is refused with the new primary's name."""
    cluster = Cluster("w1", "w2", "w3")
    old = cluster.form("w1", "w2", "w3")
    cluster.cut("w1", "w2")
    old.submit(1)
    cluster.settle()
    cluster.assign(cluster.view(2, "w2", "w3"), "w2", "w3")
    cluster.pass_time(0.5)
    # w3 knows the new epoch and refuses; or the new assignment comes.
    cluster.assign(cluster.view(3, "w2", "w3", joining=("w1",)), "w1")
    assert isinstance(old.settled[1].error, OutcomeUnknown)
    old.submit(2)
    error = old.settled[2].error
    assert isinstance(error, NotPrimary)
    assert error.primary_id == "w2"


def test_a_refusal_that_names_a_higher_epoch_ends_the_primary() -> None:
    """A primary that was forgotten hears of its successor from a replica."""
    cluster = Cluster("w1", "w2", "w3")
    old = cluster.form("w1", "w2", "w3")
    cluster.cut("w1", "w2")
    cluster.cut("w2", "w1")
    cluster.assign(cluster.view(2, "w2", "w3"), "w2", "w3")
    cluster.pass_time(1.0)
    assert not old.replica.is_serving
    assert old.replica.epoch == 2


def test_the_serving_primary_goes_on_at_the_next_epoch() -> None:
    """A joining replica is added, copied to, promoted, and the primary serves at every step."""
    cluster = Cluster("w1", "w2")
    primary = cluster.form("w1", "w2")
    for token in range(200):
        primary.submit(token, f"k{token % 30}")
        cluster.settle()
    cluster.add("w3", SimStore(is_complete=False))
    cluster.assign(cluster.view(2, "w1", "w2", joining=("w3",)))
    assert primary.replica.may_read(cluster.now)
    token = 200
    while primary.report.caught_up != ("w3",):
        primary.submit(token, f"k{token % 30}", None)
        token += 1
        cluster.pass_time(0.05)
        assert primary.replica.may_read(cluster.now)
        assert token < 300
    assert cluster.nodes["w3"].store.digest().value == primary.store.digest().value or token
    cluster.cut("w1", "w3")
    primary.submit(999)
    cluster.settle()
    assert 999 not in primary.settled, "what was told to be in sync is needed from before"
    cluster.mend("w1", "w3")
    cluster.assign(cluster.view(3, "w1", "w2", "w3"))
    cluster.pass_time(0.5)
    assert primary.settled[999].error is None
    assert primary.replica.may_read(cluster.now)
    cluster.pass_time(0.5)
    assert len({node.store.digest() for node in cluster.nodes.values()}) == 1


def test_a_replica_that_was_away_gets_what_it_lacks() -> None:
    """A complete store whose log the primary's reaches is no copy: only the records that it lacks travel."""
    cluster = Cluster("w1", "w2")
    primary = cluster.form("w1", "w2")
    for token in range(10):
        primary.submit(token)
    cluster.settle()
    cluster.cut("w1", "w2")
    cluster.assign(cluster.view(2, "w1"), "w1")
    for token in range(10, 20):
        primary.submit(token)
    cluster.settle()
    assert primary.settled[19].error is None
    cluster.mend("w1", "w2")
    cluster.assign(cluster.view(3, "w1", joining=("w2",)))
    arrived = []
    for _ in range(20):
        arrived += cluster.deliver()
        cluster.settle()
    cluster.pass_time(1.0)
    assert primary.report.caught_up == ("w2",)
    assert primary.replica.copies()[0].rows == 0
    assert cluster.nodes["w2"].store.digest() == primary.store.digest()


def test_a_copy_goes_on_where_it_was() -> None:
    """A stream that breaks in the middle of a copy costs what was on its way, not what has arrived."""
    cluster = Cluster("w1")
    primary = cluster.form("w1")
    for token in range(150):
        primary.submit(token, f"k{token:03}")
        cluster.settle()
    joiner = cluster.add("w2", SimStore(is_complete=False))
    cluster.assign(cluster.view(2, "w1", joining=("w2",)))
    for _ in range(40):
        primary.work(1)
        cluster.deliver(1)
        joiner.work(1)
    cursor = joiner.store.position().copy_cursor
    assert cursor != b""
    cluster.cut("w1", "w2")
    joiner.work()
    cluster.mend("w1", "w2")
    cluster.pass_time(1.0)
    assert primary.report.caught_up == ("w2",)
    assert primary.replica.copies()[0].rows < 2 * 300
    assert joiner.store.digest() == primary.store.digest()


def test_ceding_hands_over_without_waiting() -> None:
    """The old primary finishes what is in flight and stops; its target forgets the lease and serves at once."""
    cluster = Cluster("w1", "w2")
    old = cluster.form("w1", "w2")
    old.submit(1)
    cluster.assign(cluster.view(1, "w1", "w2", cede_to="w2"), "w1")
    assert not old.replica.is_serving
    old.submit(2)
    cluster.settle()
    assert old.settled[1].sequence == 1
    assert isinstance(old.settled[2].error, NotPrimary)
    assert old.report.progress is Progress.CEDED
    before = cluster.now
    cluster.assign(cluster.view(2, "w2", "w1"))
    cluster.settle()
    new = cluster.nodes["w2"]
    assert new.replica.may_read(cluster.now)
    assert cluster.now == before
    assert new.store.get("a") == "v1"


def test_nobody_waits_for_the_disk_before_a_cutover() -> None:
    """A primary serves until the epoch of its ceding is on disk; one that was foreseen is there already."""
    cluster = Cluster("w1", "w2")
    primary = cluster.form("w1", "w2")
    primary.submit(1)
    cluster.settle()
    primary.feed(Foresee(2))
    assert [type(operation) for operation in primary.queue] == [SeeEpoch]
    assert primary.replica.epoch == 1, "what is foreseen is not followed"
    cluster.settle()
    cluster.assign(cluster.view(2, "w1", "w2", cede_to="w2"))
    assert not primary.replica.is_serving
    cluster.settle()
    assert cluster.nodes["w2"].store.position().applied == 1, "the last commit point came with the word"
    late = Cluster("w1", "w2")
    primary = late.form("w1", "w2")
    late.assign(late.view(2, "w1", "w2", cede_to="w2"))
    assert primary.replica.is_serving
    primary.work(1)
    assert not primary.replica.is_serving


def test_a_ceded_primary_serves_again_at_the_next_epoch() -> None:
    """A move that is rolled back raises the epoch, and the old primary goes on."""
    cluster = Cluster("w1", "w2")
    old = cluster.form("w1", "w2")
    cluster.assign(cluster.view(1, "w1", "w2", cede_to="w2"), "w1")
    cluster.settle()
    assert old.report.progress is Progress.CEDED
    cluster.pass_time(3.0)
    assert not old.replica.is_serving
    cluster.assign(cluster.view(2, "w1", "w2"))
    cluster.pass_time(0.2)
    assert old.replica.may_read(cluster.now)


def test_a_sealed_shard_is_applied_everywhere() -> None:
    """Sealed means: nothing on its way, everything applied on every needed replica, no end of a log beyond."""
    cluster = Cluster("w1", "w2", "w3")
    primary = cluster.form("w1", "w2", "w3")
    for token in range(5):
        primary.submit(token)
    cluster.assign(cluster.view(1, "w1", "w2", "w3", is_sealed=True), "w1")
    cluster.pass_time(0.1)
    assert primary.report.progress is Progress.CEDED
    for node in cluster.nodes.values():
        position = node.store.position()
        assert (position.last, position.applied) == (5, 5)


def test_a_full_disk_refuses_writes_and_serves_reads() -> None:
    """What was sent may be applied, what comes later is refused definitely; with room again everything goes on."""
    cluster = Cluster("w1", "w2")
    primary = cluster.form("w1", "w2")
    primary.store.is_full = True
    primary.submit(1)
    primary.submit(2)
    primary.work(1)
    assert isinstance(primary.settled[1].error, OutcomeUnknown)
    assert isinstance(primary.settled[2].error, StoreFull)
    primary.submit(3)
    assert isinstance(primary.settled[3].error, StoreFull)
    cluster.pass_time(1.0)
    assert primary.replica.may_read(cluster.now)
    assert "no space" in primary.report.reason
    primary.store.is_full = False
    cluster.pass_time(1.0)
    primary.submit(4)
    cluster.settle()
    assert primary.settled[4].sequence == 2
    assert primary.store.get("a") == "v4"
    assert primary.report.reason == ""


def test_a_replica_with_a_full_disk_lags() -> None:
    """It goes on granting its lease, acknowledges nothing, and is named."""
    cluster = Cluster("w1", "w2")
    primary = cluster.form("w1", "w2")
    cluster.nodes["w2"].store.is_full = True
    primary.submit(1)
    cluster.pass_time(1.25 * TIMES.lagging_s + 0.1)  # It is looked for at least four times in that time.
    assert primary.report.lagging == ("w2",)
    assert primary.replica.may_read(cluster.now)
    cluster.nodes["w2"].store.is_full = False
    cluster.pass_time(1.5)
    assert primary.settled[1].sequence == 1
    assert not primary.report.lagging


def test_a_damaged_store_is_reported_as_lost() -> None:
    """A store that cannot be trusted ends the replica; a primary doubts what was in flight."""
    cluster = Cluster("w1", "w2")
    primary = cluster.form("w1", "w2")
    primary.submit(1)
    operation = primary.queue.popleft()
    primary.queue.clear()
    primary.feed(StoreFailed(operation, Damaged("record 1 has a wrong checksum"), None))
    assert primary.report.progress is Progress.LOST
    assert isinstance(primary.settled[1].error, OutcomeUnknown)
    assert not primary.replica.is_serving


@pytest.mark.parametrize("is_formed", [True, False])
def test_an_empty_store_of_a_formed_shard_is_a_loss(is_formed: bool) -> None:
    """Before the shard is formed an empty store is its beginning; afterwards it is one that was lost."""
    cluster = Cluster("w1", "w2")
    cluster.assign(cluster.view(1, "w1", "w2", is_formed=is_formed))
    cluster.settle()
    expected = Progress.LOST if is_formed else Progress.ACCEPTED
    assert {node.report.progress for node in cluster.nodes.values()} == {expected}


def test_an_epoch_is_on_disk_before_it_is_shown() -> None:
    """A replica answers a higher epoch only after its store has written that down."""
    cluster = Cluster("w1", "w2")
    cluster.form("w1", "w2")
    cluster.assign(cluster.view(2, "w1", "w2"))
    cluster.nodes["w1"].work()
    cluster.pass_time(0.0)
    cluster.mail.clear()
    cluster.assign(cluster.view(3, "w1", "w2"), "w1")
    cluster.nodes["w1"].work()
    cluster.now = type(cluster.now)(cluster.now + 0.5)
    cluster.nodes["w1"].advance()
    cluster.deliver()
    assert not cluster.mail
    cluster.nodes["w2"].work()
    assert {action.message.epoch for _, action in cluster.mail} == {3}
    assert cluster.nodes["w2"].store.position().epoch_seen == 3


def test_an_epoch_is_used_by_one_process_only() -> None:
    """A primary that restarts waits for a new epoch: nobody can tell what it sent in the old one."""
    cluster = Cluster("w1", "w2")
    primary = cluster.form("w1", "w2")
    primary.restart(cluster.view(1, "w1", "w2"))
    cluster.pass_time(5.0)
    assert primary.replica.state == "waiting"
    cluster.assign(cluster.view(2, "w1", "w2"))
    cluster.pass_time(0.5)
    assert primary.replica.is_serving


def test_a_replica_whose_rows_differ_is_named() -> None:
    """Digests travel with the commit point; one that differs is to be removed."""
    cluster = Cluster("w1", "w2")
    primary = cluster.form("w1", "w2")
    primary.submit(1)
    cluster.settle()
    cluster.nodes["w2"].store.now.rows[(1, "b")] = ("alien", 1)
    primary.submit(2)
    cluster.pass_time(1.0)
    assert primary.report.lagging == ("w2",)
    assert "differ" in primary.report.reason


def test_no_late_chunk_wipes_a_store() -> None:
    """A chunk that begins a copy is taken only by a replica whose assignment says that it joins."""
    cluster = Cluster("w1", "w2")
    primary = cluster.form("w1", "w2")
    primary.submit(1)
    cluster.pass_time(0.5)
    message = cluster.nodes["w1"].replica._core.message(1)
    message.copy_chunk.start_sequence = 1
    cluster.post("w1", SendToPeer("w2", message, False))
    cluster.settle()
    assert cluster.nodes["w2"].store.position().is_complete
    assert cluster.nodes["w2"].store.get("a") == "v1"


def test_a_tail_of_several_epochs_is_learnt_after_a_restart() -> None:
    """A replica that starts with records that it has not applied reads their epochs before it says where it stands."""
    store = SimStore()
    store.see_epoch(5)
    store.append([LogRecord(number, 1 + number // 3, 0, payload_of("a", "x", f"r{number}")) for number in range(1, 8)])  # type: ignore[arg-type]
    cluster = Cluster("w1")
    node = cluster.add("w2", store)
    node.assign(cluster.view(6, "w2"))
    assert not node.replica._core.disk.knows_its_tail
    cluster.pass_time(PROMISE_S + 0.1)
    assert node.replica.is_serving
    assert store.position().applied == 7


def test_a_replica_whose_rows_differ_is_copied_anew() -> None:
    """One that was taken out because its rows differ has the whole log, and still gets a whole copy when it is back."""
    cluster = Cluster("w1", "w2")
    primary = cluster.form("w1", "w2")
    for token in range(1, 6):
        primary.submit(token, f"k{token}")
        cluster.settle()
    cluster.nodes["w2"].store.now.rows[(1, "b")] = ("alien", 1)
    primary.submit(6)
    cluster.pass_time(1.0)
    assert primary.report.lagging == ("w2",)
    cluster.assign(cluster.view(2, "w1", joining=("w2",)))
    for token in range(7, 10):  # It is written to all the time, and what is in flight is no harm.
        primary.submit(token)
        cluster.nodes["w1"].work(1)
        cluster.deliver(2)
    cluster.pass_time(1.0)
    assert primary.report.caught_up == ("w2",)
    assert primary.replica.copies()[0].rows > 0
    assert cluster.nodes["w2"].store.now.rows == primary.store.now.rows


def opening(cluster: Cluster, primary: Node, name: str, seconds: float) -> None:
    """A replica answers for so long that it is about to open its store."""
    end = cluster.now + seconds
    while cluster.now < end:
        message = replication_pb2.ShardMessage(shard_id=SHARD, epoch=1)
        message.refuse.is_opening = True
        primary.feed(PeerSaid(name, message, True))
        cluster.pass_time(0.1)


def test_a_replica_that_opens_its_store_is_waited_for() -> None:
    """It is not named as lagging while it says so, for `opening_s`; then it is, and one that says nothing at once."""
    cluster = Cluster("w1", "w2")
    primary = cluster.form("w1", "w2")
    cluster.cut("w1", "w2")
    primary.feed(PeerConnected("w2"))  # A stream is open, and nothing but these refusals comes down.
    opening(cluster, primary, "w2", TIMES.opening_s - 0.2)
    assert not primary.report.lagging
    opening(cluster, primary, "w2", 0.6)
    assert primary.report.lagging == ("w2",)
    assert "open" in primary.report.reason

    cluster = Cluster("w1", "w2")
    primary = cluster.form("w1", "w2")
    cluster.cut("w1", "w2")
    primary.feed(PeerConnected("w2"))
    opening(cluster, primary, "w2", TIMES.lagging_s + 1.0)
    cluster.pass_time(TIMES.lagging_s + 0.2)
    assert primary.report.lagging == ("w2",), "it fell silent"


@pytest.mark.parametrize("where", ["away", "first chunk", "later chunk", "records"])
def test_a_joining_replica_that_gets_no_further_is_named(where: str) -> None:
    """A disk that hangs, or a worker that cannot be reached, is named after `stall_s`; what goes on slowly is not."""
    cluster = Cluster("w1")
    primary = cluster.form("w1")
    for token in range(150):
        primary.submit(token, f"k{token:03}")
        cluster.settle()
    joiner = cluster.add("w2", SimStore(is_complete=False))
    if where == "away":
        cluster.cut("w1", "w2")
    cluster.assign(cluster.view(2, "w1", joining=("w2",)))
    for _ in range({"away": 0, "first chunk": 0, "later chunk": 40, "records": 10_000}[where]):
        primary.work(1)
        cluster.deliver(1)
        joiner.work(1)
        if where == "records" and joiner.store.position().is_complete:
            break
    joiner.is_stuck = True
    cluster.pass_time(TIMES.stall_s - 1.0)
    assert not primary.report.lagging
    cluster.pass_time(TIMES.stall_s + 5.0)
    assert primary.report.lagging == ("w2",)
    assert "got no further" in primary.report.reason
    assert primary.replica.is_serving
    primary.submit(1_000)
    cluster.settle()
    assert primary.settled[1_000].sequence == 151, "nobody waits for it"


def test_a_copy_that_waits_for_this_side_is_no_stall() -> None:
    """The throttle may hold a chunk back for long: that is not the receiver's fault."""
    cluster = Cluster("w1")
    primary = cluster.form("w1")
    primary.submit(1)
    cluster.settle()
    cluster.add("w2", SimStore(is_complete=False))
    primary.holds_chunks = True
    cluster.assign(cluster.view(2, "w1", joining=("w2",)))
    cluster.pass_time(4 * TIMES.stall_s)
    assert not primary.report.lagging
    primary.holds_chunks = False
    cluster.pass_time(1.0)
    assert primary.report.caught_up == ("w2",)


def test_a_new_store_gets_rows_although_the_log_reaches_back() -> None:
    """A copy is throttled and counted; one that was away a moment is fed from the log."""
    cluster = Cluster("w1")
    primary = cluster.form("w1")
    for token in range(20):
        primary.submit(token, f"k{token % 5}")
        cluster.settle()
    joiner = cluster.add("w2")
    cluster.assign(cluster.view(2, "w1", joining=("w2",)))
    cluster.pass_time(1.0)
    assert primary.report.caught_up == ("w2",)
    assert primary.replica.copies()[0].rows > 0
    cluster.assign(cluster.view(3, "w1", "w2"))
    cluster.assign(cluster.view(4, "w1"))
    primary.submit(20)
    cluster.settle()
    cluster.assign(cluster.view(5, "w1", joining=("w2",)))
    cluster.pass_time(1.0)
    assert primary.report.caught_up == ("w2",)
    assert primary.replica.copies()[0].rows == 0
    assert joiner.store.digest() == primary.store.digest()


def test_a_copy_is_no_faster_than_its_receiver() -> None:
    """Only so many chunks are on their way unacknowledged, however fast they are read; each answer lets one more go."""
    cluster = Cluster("w1")
    primary = cluster.form("w1")
    for token in range(150):
        primary.submit(token, f"k{token:03}")
        cluster.settle()
    receiver = cluster.add("w2", SimStore(is_complete=False))
    cluster.assign(cluster.view(2, "w1", joining=("w2",)))
    chunks = answers = 0
    receiver.work()
    while answers < 20:
        for _ in range(10):  # The primary has all the time of the world, the receiver's disk does nothing.
            primary.work()
            arrived = [message.WhichOneof("message") for _, _, message in cluster.deliver()]
            chunks += arrived.count("copy_chunk")
            answers += arrived.count("copy_acknowledge")
        assert chunks - answers <= COPY_CHUNKS_MAX
        receiver.work(1)
    cluster.pass_time(1.0)
    assert primary.report.caught_up == ("w2",)


def test_a_follower_that_does_not_acknowledge_is_sent_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent from memory without an answer is bounded; what comes after it is read from the log later."""
    monkeypatch.setattr(replica_follower, "WINDOW_RECORDS", 10)
    cluster = Cluster("w1", "w2")
    primary = cluster.form("w1", "w2")
    follower = cluster.nodes["w2"]
    follower.is_stuck = True
    sent = 0
    for token in range(50):
        primary.submit(token, f"k{token}")
        primary.work()
        sent += sum(len(message.append.records) for _, to, message in cluster.deliver() if to == "w2")
    assert 10 <= sent <= 12
    assert not primary.settled
    follower.is_stuck = False
    cluster.pass_time(1.0)
    assert [primary.settled[token].sequence for token in range(50)] == list(range(1, 51))
    assert follower.store.digest() == primary.store.digest()


def test_a_copy_that_differs_is_not_promoted() -> None:
    """A joining replica has caught up only with an equal digest; where its rows differ it is copied anew."""
    cluster = Cluster("w1")
    primary = cluster.form("w1")
    for token in range(150):
        primary.submit(token, f"k{token:03}")
        cluster.settle()
    joiner = cluster.add("w2", SimStore(is_complete=False))
    cluster.assign(cluster.view(2, "w1", joining=("w2",)))
    copies, is_altered = 0, False
    while not primary.report.caught_up:
        primary.work(1)
        arrived = cluster.deliver(1)
        joiner.work(1)
        copies += sum(message.HasField("copy_chunk") and not message.copy_chunk.cursor for _, _, message in arrived)
        if joiner.store.position().is_complete and not is_altered:
            joiner.store.now.rows[(1, "k000")] = ("alien", 1)
            is_altered = True
        if not arrived and not primary.queue and not joiner.queue:
            cluster.pass_time(0.01)
    assert is_altered
    assert copies == 2
    assert joiner.store.digest() == primary.store.digest()
