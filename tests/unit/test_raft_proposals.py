"""What those hear who proposed a command."""

from __future__ import annotations

import asyncio

import pytest
from pysyncobj import FAIL_REASON

from coordinator.config import RaftSettings
from coordinator.model.errors import CoordinatorError, InvalidRequest, NoLeader, OutcomeUnknown, Overloaded
from coordinator.raft.proposals import Proposals, error_of
from tests.raft_machine import command


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        (FAIL_REASON.QUEUE_FULL, Overloaded),
        (FAIL_REASON.MISSING_LEADER, NoLeader),
        (FAIL_REASON.NOT_LEADER, NoLeader),
        (FAIL_REASON.DISCARDED, NoLeader),
        (FAIL_REASON.REQUEST_DENIED, InvalidRequest),
        (FAIL_REASON.LEADER_CHANGED, OutcomeUnknown),
        (FAIL_REASON.UNKNOWN_OUTCOME, OutcomeUnknown),
    ],
)
def test_each_reason_is_one_error(reason: int, error: type[CoordinatorError]) -> None:
    """Definite only where PySyncObj's source shows that nothing was or can be applied."""
    assert type(error_of(reason)) is error
    assert error_of(reason).DEFINITE is (error is not OutcomeUnknown)


async def test_without_a_leader_nothing_is_queued() -> None:
    """No leader until the deadline is definite: the command never went anywhere."""
    proposals = Proposals("m1", RaftSettings(), lambda: None)
    with pytest.raises(NoLeader, match="master m1 reaches no leader"):
        await proposals.propose(command("x"), 0.01)


async def test_places_are_given_back() -> None:
    """A proposal that failed or was cancelled frees its place among those in flight."""
    proposals = Proposals("m1", RaftSettings(proposals_max=2), lambda: None)
    waiting = [asyncio.create_task(proposals.propose(command("x"), 60.0)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="2 proposals are in flight"):
        await proposals.propose(command("y"), 0.01)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    with pytest.raises(NoLeader):
        await proposals.propose(command("z"), 0.01)
