"""Random faults on real PySyncObj, journals and snapshots in virtual time: nothing acknowledged is lost.

A plain first campaign: kills without loss of what was written, cuts, pauses between turns. A failing seed is
shown by the name of its test, and that test alone replays it.
"""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path

import pytest
from pysyncobj import FAIL_REASON

from coordinator.config import RaftSettings
from tests.raft_machine import applied, times
from tests.raft_network import Network, network

TURNS = 400
IDS = ("m1", "m2", "m3")
DEFINITE = {
    FAIL_REASON.QUEUE_FULL,
    FAIL_REASON.MISSING_LEADER,
    FAIL_REASON.NOT_LEADER,
    FAIL_REASON.DISCARDED,
    FAIL_REASON.REQUEST_DENIED,
}


def one_fault(net: Network, rng: random.Random, cut: set[tuple[str, str]]) -> None:
    """Kills, starts, cuts or mends something; at most one master is down at a time, or all of them are restarted."""
    stopped = [id for id in IDS if id not in net.masters]
    choice = rng.random()
    if stopped:
        net.start(stopped[0])
    elif choice < 0.35:
        net.stop(rng.choice(IDS))
    elif choice < 0.45:
        for id in IDS:
            net.stop(id)
        for id in IDS:
            net.start(id)
    elif cut and choice < 0.7:
        pair = rng.choice(sorted(cut))
        cut.discard(pair)
        net.mend(*pair)
    else:
        free = [pair for pair in combinations(IDS, 2) if pair not in cut]
        if free:
            pair = rng.choice(free)
            cut.add(pair)
            net.cut(*pair)


def lose_some(net: Network, rng: random.Random) -> None:
    """A connection breaks with what is on it, and is there again."""
    one, other = rng.choice(list(combinations(sorted(net.masters), 2)))
    if net.is_linked(one, other):
        net.cut(one, other)
        net.mend(one, other)


def settle(net: Network) -> None:
    """Commits one more command; what the faults left behind may still cost an election."""
    for attempt in range(10):
        outcome = net.propose(net.elect(), f"last-{attempt}")
        net.run(lambda: outcome)  # noqa: B023 - called before the next round
        if outcome[0][1] == FAIL_REASON.SUCCESS:
            return
    raise AssertionError("ten commands after the last fault failed")


@pytest.mark.parametrize("seed", range(25))
def test_faults_lose_nothing(tmp_path: Path, seed: int) -> None:
    """Whatever is killed and cut, acknowledged commands stay, denied ones never appear, none twice, and all agree."""
    rng = random.Random(seed)
    outcomes: dict[str, list[tuple[object, int]]] = {}
    cut: set[tuple[str, str]] = set()
    with network(tmp_path, settings=RaftSettings(snapshot_entries=15), seed=seed) as net:
        for turn in range(TURNS):
            if rng.random() < 0.05:
                one_fault(net, rng, cut)
            if rng.random() < 0.03 and len(net.masters) > 1:
                lose_some(net, rng)
            for _ in range(rng.choice((0, 0, 1, 4))):
                cause = f"c{turn}-{len(outcomes)}"
                outcomes[cause] = net.propose(rng.choice(sorted(net.masters)), cause)  # type: ignore[assignment]
            net.turn(rng.choice((0.0, 0.01, 0.05)))
        for pair in sorted(cut):
            net.mend(*pair)
        for id in IDS:
            if id not in net.masters:
                net.start(id)
        settle(net)
        net.run(lambda: len({master.applied_index for master in net.masters.values()}) == 1, seconds=3.0)
        states = [master.state for master in net.masters.values()]
        found = applied(states[0])
        assert all(state == states[0] for state in states)
        assert len(found) == len(set(found))
        lost = [cause for cause, outcome in outcomes.items() if outcome and outcome[0][1] == 0 and cause not in found]
        assert not lost
        denied = {cause for cause, outcome in outcomes.items() if outcome and outcome[0][1] in DEFINITE}
        assert not denied & set(found)
        assert all(len(outcome) <= 1 for outcome in outcomes.values())
        assert times(states[0])
