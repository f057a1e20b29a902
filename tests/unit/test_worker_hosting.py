"""What the worker holds: assignments in, shards in force out, and what a restart remembers."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.api.v1 import session_pb2, types_pb2
from coordinator.model.errors import Damaged
from worker_agent.hosting import Hosting, Outcome, Persist, Stored, decode, encode
from worker_agent.shard_interface import ReplicaRole, ShardView

PRIMARY = session_pb2.REPLICA_ROLE_PRIMARY
IN_SYNC = session_pb2.REPLICA_ROLE_IN_SYNC
JOINING = session_pb2.REPLICA_ROLE_JOINING


@dataclass
class Worker:
    """A hosting machine with a disk that writes when it is told to."""

    disk: bytes | None = None
    generation: int = 0
    hosting: Hosting = field(init=False)

    def __post_init__(self) -> None:
        stored = None if self.disk is None else decode(self.disk, "assignment.bin")
        self.hosting = Hosting(stored)

    def arrives(self, *shards: session_pb2.ShardAssignment) -> Persist | None:
        """An assignment arrives; nothing is written yet."""
        self.generation += 1
        assignment = session_pb2.Assignment(generation=self.generation, shards=shards)
        write = self.hosting.on_assignment(assignment, "c-1")
        self.hosting.validate()
        return write

    def written(self, write: Persist | None) -> Outcome:
        """The write is done."""
        assert write is not None
        self.disk = write.content
        outcome = self.hosting.on_persisted()
        self.hosting.validate()
        return outcome

    def takes(self, *shards: session_pb2.ShardAssignment) -> list[tuple[int, int, ReplicaRole]]:
        """An assignment arrives and is written; returns what is in force."""
        return held(self.written(self.arrives(*shards)).views)


def entry(
    shard_id: int, epoch: int, role: session_pb2.ReplicaRole.ValueType, cede_to: str = "", hi: int = 0
) -> session_pb2.ShardAssignment:
    """One line of an assignment."""
    shard = types_pb2.Shard(id=shard_id, lo=0, hi=hi, epoch=epoch)
    return session_pb2.ShardAssignment(shard=shard, role=role, cede_to=cede_to)


def held(views: tuple[ShardView, ...]) -> list[tuple[int, int, ReplicaRole]]:
    """Shards as (id, epoch, role)."""
    return [(view.shard_id, view.epoch, view.role) for view in views]


@pytest.fixture
def worker() -> Worker:
    return Worker()


def test_everything_that_an_assignment_says_is_handed_on(worker: Worker) -> None:
    """A line becomes a view with all its fields; peers and the copy rate stand beside."""
    shard = types_pb2.Shard(
        id=7, lo=5, hi=9, epoch=3, primary="w1", in_sync=["w1", "w2"], joining=["w3"]
    )
    line = session_pb2.ShardAssignment(
        shard=shard, role=PRIMARY, cede_to="w2", move_id=4, seal=True, parents=[1, 2], formed=True
    )
    peers = [session_pb2.Peer(node_id="w2", grpc_address="h:1")]
    assignment = session_pb2.Assignment(generation=1, shards=[line], peers=peers, copy_bytes_per_s=99)
    outcome = worker.written(worker.hosting.on_assignment(assignment, "c-1"))
    assert outcome.views == (
        ShardView(
            7, 5, 9, 3, ReplicaRole.PRIMARY, "w1", ("w1", "w2"), ("w3",),
            is_formed=True, cede_to="w2", is_sealed=True, parents=(1, 2), move_id=4,
        ),
    )  # fmt: skip
    assert (outcome.peers, outcome.copy_bytes_per_s) == ({"w2": "h:1"}, 99)


def test_a_shard_that_is_not_named_is_given_up(worker: Worker) -> None:
    """An assignment is whole: what it leaves out is no longer held."""
    worker.takes(entry(1, 1, PRIMARY), entry(2, 1, IN_SYNC))
    assert worker.takes(entry(2, 1, IN_SYNC)) == [(2, 1, ReplicaRole.IN_SYNC)]


def test_a_role_is_in_force_only_once_it_is_on_disk(worker: Worker) -> None:
    """Between the arrival and the write nothing is held yet."""
    write = worker.arrives(entry(1, 3, PRIMARY))
    assert (worker.hosting.views, worker.hosting.generation) == ((), 0)
    worker.written(write)
    assert (held(worker.hosting.views), worker.hosting.generation) == ([(1, 3, ReplicaRole.PRIMARY)], 1)


def test_an_epoch_below_the_highest_seen_is_not_followed(worker: Worker) -> None:
    """A lower epoch in a newer assignment is refused with a sentence, and the shard is not held."""
    worker.takes(entry(1, 5, IN_SYNC))
    outcome = worker.written(worker.arrives(entry(1, 4, PRIMARY)))
    assert outcome.ignored == ("shard 1 is assigned at epoch 4, but epoch 5 was seen before",)
    assert outcome.views == ()
    assert worker.hosting.epoch_seen(1) == 5


def test_new_epochs_are_known_before_they_are_in_force(worker: Worker) -> None:
    """What an assignment brings above all that was seen can be told before it is on disk, and changes nothing."""
    worker.takes(entry(1, 3, PRIMARY))
    arrived = session_pb2.Assignment(generation=9, shards=[entry(1, 3, PRIMARY), entry(2, 5, PRIMARY)])
    assert worker.hosting.news(arrived) == {2: 5}
    assert worker.hosting.epoch_seen(2) == 0


def test_an_epoch_is_not_told_to_who_is_about_to_go(worker: Worker) -> None:
    """Nothing is told ahead of a shard that is given up before the newest assignment: it is opened anew for that."""
    worker.takes(entry(1, 3, IN_SYNC), entry(2, 3, IN_SYNC))
    giving_up = worker.arrives(entry(2, 3, IN_SYNC))
    newest = session_pb2.Assignment(generation=9, shards=[entry(1, 8, PRIMARY), entry(2, 4, PRIMARY)])
    assert worker.hosting.news(newest) == {2: 4}
    worker.written(giving_up)
    assert worker.hosting.news(newest) == {1: 8, 2: 4}


def test_a_role_of_a_newer_master_is_not_guessed(worker: Worker) -> None:
    """A role that this version does not know is left alone, and said."""
    outcome = worker.written(worker.arrives(entry(1, 1, session_pb2.REPLICA_ROLE_UNSPECIFIED)))
    assert outcome.views == ()
    assert "role 0" in outcome.ignored[0]


def test_of_assignments_that_come_during_a_write_the_newest_counts(worker: Worker) -> None:
    """While one is written the next ones wait, the newest replaces the others, and both come into force."""
    write = worker.arrives(entry(1, 1, PRIMARY))
    assert worker.arrives(entry(2, 1, PRIMARY)) is None
    assert worker.arrives(entry(3, 1, PRIMARY)) is None
    outcome = worker.written(write)
    assert held(outcome.views) == [(1, 1, ReplicaRole.PRIMARY)]
    assert outcome.next_write is not None
    assert outcome.next_write.generation == 3
    assert held(worker.written(outcome.next_write).views) == [(3, 1, ReplicaRole.PRIMARY)]


def test_a_restart_confirms_nothing_but_remembers_epochs(worker: Worker) -> None:
    """After a restart the worker holds nothing until it is told so, and still refuses what is too old."""
    worker.takes(entry(1, 5, PRIMARY))
    restarted = Worker(disk=worker.disk, generation=worker.generation)
    assert restarted.hosting.views == ()
    assert restarted.hosting.epoch_seen(1) == 5
    assert restarted.takes(entry(1, 4, PRIMARY)) == []
    assert restarted.takes(entry(1, 5, PRIMARY)) == [(1, 5, ReplicaRole.PRIMARY)]


def test_jobs_are_kept_for_people(worker: Worker) -> None:
    """Owned and backed jobs are told apart by their rank."""
    jobs = [session_pb2.JobAssignment(job_id=name, rank=rank) for name, rank in (("b", 0), ("a", 0), ("c", 2))]
    worker.written(worker.hosting.on_assignment(session_pb2.Assignment(generation=1, jobs=jobs), "c-1"))
    assert worker.hosting.jobs_owned == ("a", "b")
    assert worker.hosting.jobs_backed == ("c",)


def test_the_last_shard_ends_at_the_end_of_the_space(worker: Worker) -> None:
    """`hi` 0 stands for 2^64 on the wire."""
    worker.takes(entry(1, 1, PRIMARY), entry(2, 1, PRIMARY, hi=77))
    assert [view.hi for view in worker.hosting.views] == [1 << 64, 77]


# The file


def test_the_file_round_trips() -> None:
    """What is encoded is decoded, the cluster's id included."""
    stored = Stored("c-ä", session_pb2.Assignment(generation=9, shards=[entry(1, 5, PRIMARY)]))
    assert decode(encode(stored), "assignment.bin") == stored


@settings(deadline=None)
@given(st.data())
def test_any_damage_to_the_file_is_found(data: st.DataObject) -> None:
    """A changed byte or a cut file is refused with the file's name and the way out."""
    content = bytearray(encode(Stored("c-1", session_pb2.Assignment(generation=9, shards=[entry(1, 5, PRIMARY)]))))
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= data.draw(st.integers(1, 255))
    else:
        del content[position:]
    with pytest.raises(Damaged, match=r"^data/w1/assignment\.bin is damaged; move the file away"):
        decode(bytes(content), "data/w1/assignment.bin")


# Any order of events

ROLES = st.sampled_from([PRIMARY, IN_SYNC, JOINING])
ENTRIES = st.lists(
    st.builds(entry, st.integers(1, 3), st.integers(1, 6), ROLES, st.sampled_from(["", "w2"])),
    max_size=3,
    unique_by=lambda line: line.shard.id,
)


@settings(deadline=None)
@given(st.lists(st.one_of(ENTRIES, st.just("write"), st.just("restart")), max_size=40))
def test_epochs_never_go_back_and_are_on_disk_before_they_are_in_force(
    steps: list[list[session_pb2.ShardAssignment] | str],
) -> None:
    """Random assignments, writes and restarts: epochs in force only grow, and the disk has them."""
    worker = Worker()
    writing: Persist | None = None
    shown: dict[int, int] = {}
    for step in steps:
        if isinstance(step, list):
            write = worker.arrives(*step)
            writing = writing or write
        elif step == "write" and writing is not None:
            outcome = worker.written(writing)
            writing = outcome.next_write
            assert worker.disk is not None
            on_disk = {line.shard.id: line.shard.epoch for line in decode(worker.disk, "").assignment.shards}
            for view in outcome.views:
                assert view.epoch >= shown.get(view.shard_id, 0)
                assert on_disk[view.shard_id] == view.epoch
                shown[view.shard_id] = view.epoch
        elif step == "restart":
            worker, writing = Worker(disk=worker.disk, generation=worker.generation), None
            # A shard that the last assignment did not name is forgotten with the process: the generation guards it.
            shown = {shard_id: worker.hosting.epoch_seen(shard_id) for shard_id in shown}
