"""How old a replica says that it is, and how long it says that its disk is full."""

from __future__ import annotations

import pytest

from coordinator.model import Monotonic
from tests.replica_driver import Cluster
from worker_agent.shard_interface import PeerSaid
from worker_agent.store_interface import StoreFull


def test_a_new_primary_is_as_old_as_it_was_until_it_serves() -> None:
    """Shows that a backup that becomes primary says how old it is, though it lacks what it will find out about."""
    cluster = Cluster("w1", "w2", "w3")
    cluster.form("w1", "w2", "w3")
    cluster.pass_time(1.0)
    for name in ("w2", "w3"):
        cluster.cut("w1", name)
        cluster.cut(name, "w1")
    cluster.pass_time(0.5)
    cluster.assign(cluster.view(2, "w2", "w3"), "w2", "w3")
    successor = cluster.nodes["w2"].replica
    ages_s = []
    while not successor.may_read(cluster.now):
        ages_s.append(successor.age_s(cluster.now))
        cluster.pass_time(0.1)
    assert min(ages_s) >= 0.5
    assert successor.age_s(cluster.now) == 0.0


def test_an_old_message_that_is_read_late_makes_nothing_new() -> None:
    """Shows that a backup that stood still does not take a heartbeat of before for news."""
    cluster = Cluster("w1", "w2")
    primary = cluster.form("w1", "w2")
    cluster.pass_time(1.0)
    backup = cluster.nodes["w2"]
    assert backup.replica.age_s(cluster.now) < 1.0
    cluster.now = Monotonic(cluster.now + 0.5)
    primary.advance()
    held = list(cluster.mail)
    cluster.mail.clear()
    assert held
    cluster.now = Monotonic(cluster.now + 60.0)
    for sender, action in held:
        backup.feed(PeerSaid(sender, action.message, action.is_answer))
    assert backup.replica.age_s(cluster.now) > 60.0


@pytest.mark.parametrize("name", ["w1", "w2"])
def test_an_epoch_that_found_no_room_is_forgotten_once_there_is_some(name: str) -> None:
    """Shows that a disk that was full when an epoch came is told of no longer than that, also without any write."""
    cluster = Cluster("w1", "w2")
    primary = cluster.form("w1", "w2")
    primary.submit(1)
    cluster.settle()
    cluster.pass_time(1.0)
    node = cluster.nodes[name]
    see_epoch = node.store.see_epoch

    def find_no_room(epoch: int) -> None:
        raise StoreFull("disk full")

    node.store.see_epoch = find_no_room  # type: ignore[method-assign]
    cluster.assign(cluster.view(2, "w1", "w2"))
    cluster.pass_time(0.3)
    assert node.replica.problem == "disk full"
    node.store.see_epoch = see_epoch  # type: ignore[method-assign]
    cluster.pass_time(5.0)
    assert not node.replica.problem
