"""What the worker holds: assignments in, roles in force and reports out, and what a restart remembers."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.api.v1 import session_pb2, types_pb2
from coordinator.model import Monotonic
from coordinator.model.errors import Damaged
from worker_agent.hosting import ACCEPTED, CAUGHT_UP, CEDED, Hosting, Outcome, Persist, Stored, decode, encode

PRIMARY = session_pb2.REPLICA_ROLE_PRIMARY
IN_SYNC = session_pb2.REPLICA_ROLE_IN_SYNC
JOINING = session_pb2.REPLICA_ROLE_JOINING
NOW = Monotonic(50.0)


@dataclass
class Lease:
    """A lease that the test gives and takes."""

    until: float = 100.0

    def __call__(self, now: Monotonic) -> bool:
        return now < self.until


@dataclass
class Worker:
    """A hosting machine with a disk that writes when it is told to."""

    lease: Lease = field(default_factory=Lease)
    disk: bytes | None = None
    generation: int = 0
    hosting: Hosting = field(init=False)

    def __post_init__(self) -> None:
        stored = None if self.disk is None else decode(self.disk, "assignment.bin")
        self.hosting = Hosting(self.lease, stored)

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

    def takes(self, *shards: session_pb2.ShardAssignment) -> list[tuple[int, int, int]]:
        """An assignment arrives and is written; returns what is reported."""
        return said(self.written(self.arrives(*shards)).reports)


def entry(
    shard_id: int, epoch: int, role: session_pb2.ReplicaRole.ValueType, cede_to: str = "", hi: int = 0
) -> session_pb2.ShardAssignment:
    """One line of an assignment."""
    shard = types_pb2.Shard(id=shard_id, lo=0, hi=hi, epoch=epoch)
    return session_pb2.ShardAssignment(shard=shard, role=role, cede_to=cede_to)


def said(reports: tuple[session_pb2.ReplicaReport, ...]) -> list[tuple[int, int, int]]:
    """Reports as (shard, epoch, progress)."""
    return [(report.shard_id, report.epoch, report.progress) for report in reports]


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.mark.parametrize(
    ("role", "reports"),
    [(PRIMARY, [(1, 4, ACCEPTED)]), (IN_SYNC, [(1, 4, ACCEPTED)]), (JOINING, [(1, 4, ACCEPTED), (1, 4, CAUGHT_UP)])],
)
def test_each_role_is_acknowledged(
    worker: Worker, role: session_pb2.ReplicaRole.ValueType, reports: list[tuple[int, int, int]]
) -> None:
    """Primaries and in-sync replicas accept; a joining replica accepts and then has caught up, at the same epoch."""
    assert worker.takes(entry(1, 4, role)) == reports


def test_only_what_changed_is_reported_and_a_new_session_hears_all(worker: Worker) -> None:
    """A second assignment reports its new shard only; `reports` gives the latest progress of every shard, sorted."""
    worker.takes(entry(2, 1, JOINING))
    assert worker.takes(entry(2, 1, JOINING), entry(1, 1, PRIMARY)) == [(1, 1, ACCEPTED)]
    assert said(worker.hosting.reports()) == [(1, 1, ACCEPTED), (2, 1, CAUGHT_UP)]


def test_a_new_epoch_is_accepted_anew(worker: Worker) -> None:
    """The same role at a higher epoch is reported at that epoch."""
    worker.takes(entry(1, 1, PRIMARY))
    assert worker.takes(entry(1, 2, PRIMARY)) == [(1, 2, ACCEPTED)]


def test_a_shard_that_is_not_named_is_given_up(worker: Worker) -> None:
    """An assignment is whole: what it leaves out is no longer held."""
    worker.takes(entry(1, 1, PRIMARY), entry(2, 1, IN_SYNC))
    assert worker.takes(entry(2, 1, IN_SYNC)) == []
    assert [held.shard_id for held in worker.hosting.held] == [2]
    assert not worker.hosting.may_answer(1, NOW)


def test_a_role_is_in_force_only_once_it_is_on_disk(worker: Worker) -> None:
    """Between the arrival and the write the worker neither answers as primary nor shows the epoch."""
    write = worker.arrives(entry(1, 3, PRIMARY))
    assert not worker.hosting.may_answer(1, NOW)
    assert worker.hosting.reports() == ()
    assert worker.hosting.generation == 0
    worker.written(write)
    assert worker.hosting.may_answer(1, NOW)
    assert worker.hosting.generation == 1


@pytest.mark.parametrize(
    "next_entries",
    [(), (entry(1, 2, IN_SYNC),), (entry(1, 2, JOINING),), (entry(1, 1, PRIMARY, cede_to="w2"),)],
)
def test_a_role_that_is_taken_away_is_gone_before_the_disk_knows(
    worker: Worker, next_entries: tuple[session_pb2.ShardAssignment, ...]
) -> None:
    """A primary stops answering the moment that an assignment says so, not after the write."""
    worker.takes(entry(1, 1, PRIMARY))
    assert worker.hosting.may_answer(1, NOW)
    worker.arrives(*next_entries)
    assert not worker.hosting.may_answer(1, NOW)


def test_a_primary_needs_the_session_lease(worker: Worker) -> None:
    """Without the lease nobody is answered; with a new one the role is there again."""
    worker.takes(entry(1, 1, PRIMARY))
    worker.lease.until = NOW
    assert not worker.hosting.may_answer(1, NOW)
    worker.lease.until = NOW + 1
    assert worker.hosting.may_answer(1, NOW)


def test_only_primaries_answer(worker: Worker) -> None:
    """In-sync and joining replicas do not answer, nor does a worker for a shard that it does not hold."""
    worker.takes(entry(1, 1, IN_SYNC), entry(2, 1, JOINING))
    assert not any(worker.hosting.may_answer(shard_id, NOW) for shard_id in (1, 2, 3))


def test_a_primary_cedes_when_it_is_asked_to(worker: Worker) -> None:
    """A primary with a successor stops and reports that it has ceded, once."""
    worker.takes(entry(1, 5, PRIMARY))
    assert worker.takes(entry(1, 5, PRIMARY, cede_to="w2")) == [(1, 5, CEDED)]
    assert not worker.hosting.may_answer(1, NOW)
    assert worker.takes(entry(1, 5, PRIMARY, cede_to="w2")) == []


def test_ceded_stays_ceded_at_the_same_epoch(worker: Worker) -> None:
    """After it has ceded a worker answers again only at a higher epoch, whatever an assignment leaves out."""
    worker.takes(entry(1, 5, PRIMARY, cede_to="w2"))
    assert worker.takes(entry(1, 5, PRIMARY)) == []
    assert not worker.hosting.may_answer(1, NOW)
    assert worker.takes(entry(1, 6, PRIMARY)) == [(1, 6, ACCEPTED)]
    assert worker.hosting.may_answer(1, NOW)


def test_an_epoch_below_the_highest_seen_is_not_followed(worker: Worker) -> None:
    """A lower epoch in a newer assignment is refused with a sentence, and the shard is not held."""
    worker.takes(entry(1, 5, IN_SYNC))
    outcome = worker.written(worker.arrives(entry(1, 4, PRIMARY)))
    assert outcome.reports == ()
    assert outcome.ignored == ("shard 1 is assigned at epoch 4, but epoch 5 was seen before",)
    assert worker.hosting.held == ()
    assert worker.hosting.epoch_seen(1) == 5


def test_a_role_of_a_newer_master_is_not_guessed(worker: Worker) -> None:
    """A role that this version does not know is left alone, and said."""
    outcome = worker.written(worker.arrives(entry(1, 1, session_pb2.REPLICA_ROLE_UNSPECIFIED)))
    assert outcome.reports == ()
    assert "role 0" in outcome.ignored[0]


def test_of_assignments_that_come_during_a_write_the_newest_counts(worker: Worker) -> None:
    """While one is written the next ones wait, the newest replaces the others, and both ends are reported."""
    write = worker.arrives(entry(1, 1, PRIMARY))
    assert worker.arrives(entry(2, 1, PRIMARY)) is None
    assert worker.arrives(entry(3, 1, PRIMARY)) is None
    outcome = worker.written(write)
    assert said(outcome.reports) == [(1, 1, ACCEPTED)]
    assert outcome.next_write is not None
    assert outcome.next_write.generation == 3
    outcome = worker.written(outcome.next_write)
    assert said(outcome.reports) == [(3, 1, ACCEPTED)]
    assert [held.shard_id for held in worker.hosting.held] == [3]


def test_a_written_role_that_a_waiting_assignment_takes_away_never_begins(worker: Worker) -> None:
    """A write that ends after the role was taken away again must not bring the role into force."""
    write = worker.arrives(entry(1, 1, PRIMARY))
    worker.arrives(entry(1, 2, IN_SYNC))
    worker.written(write)
    assert not worker.hosting.may_answer(1, NOW)


def test_a_restart_confirms_nothing_but_remembers_epochs(worker: Worker) -> None:
    """After a restart the worker holds nothing until it is told so, and still refuses what is too old."""
    worker.takes(entry(1, 5, PRIMARY))
    restarted = Worker(disk=worker.disk, generation=worker.generation)
    assert restarted.hosting.held == ()
    assert restarted.hosting.reports() == ()
    assert not restarted.hosting.may_answer(1, NOW)
    assert restarted.hosting.epoch_seen(1) == 5
    assert restarted.takes(entry(1, 4, PRIMARY)) == []
    assert restarted.takes(entry(1, 5, PRIMARY)) == [(1, 5, ACCEPTED)]


def test_jobs_are_kept_for_people(worker: Worker) -> None:
    """Owned and backed jobs are told apart by their rank."""
    jobs = [session_pb2.JobAssignment(job_id=name, rank=rank) for name, rank in (("b", 0), ("a", 0), ("c", 2))]
    worker.written(worker.hosting.on_assignment(session_pb2.Assignment(generation=1, jobs=jobs), "c-1"))
    assert worker.hosting.jobs_owned == ("a", "b")
    assert worker.hosting.jobs_backed == ("c",)


def test_the_last_shard_ends_at_the_end_of_the_space(worker: Worker) -> None:
    """`hi` 0 stands for 2^64 on the wire."""
    worker.takes(entry(1, 1, PRIMARY), entry(2, 1, PRIMARY, hi=77))
    assert [held.hi for held in worker.hosting.held] == [1 << 64, 77]


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
def test_epochs_never_go_back_and_nothing_is_answered_against_an_assignment(
    steps: list[list[session_pb2.ShardAssignment] | str],
) -> None:
    """Random assignments, writes and restarts: reported epochs only grow, and are on disk before they are reported."""
    worker = Worker()
    writing: Persist | None = None
    shown: dict[int, int] = {}
    for step in steps:
        if isinstance(step, list):
            write = worker.arrives(*step)
            writing = writing or write
            asked = {line.shard.id for line in step if line.role == PRIMARY and not line.cede_to}
            assert not any(worker.hosting.may_answer(shard_id, NOW) for shard_id in {1, 2, 3} - asked)
        elif step == "write" and writing is not None:
            outcome = worker.written(writing)
            writing = outcome.next_write
            assert worker.disk is not None
            on_disk = {line.shard.id: line.shard.epoch for line in decode(worker.disk, "").assignment.shards}
            for report in outcome.reports:
                assert report.epoch >= shown.get(report.shard_id, 0)
                assert on_disk[report.shard_id] == report.epoch
                shown[report.shard_id] = report.epoch
        elif step == "restart":
            worker, writing = Worker(disk=worker.disk, generation=worker.generation), None
            # A shard that the last assignment did not name is forgotten with the process: the generation guards it.
            shown = {shard_id: worker.hosting.epoch_seen(shard_id) for shard_id in shown}
