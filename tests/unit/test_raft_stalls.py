"""A master that stood still says for how long and what for, and says nothing while it ticks in time."""

from __future__ import annotations

from coordinator.raft.stalls import Stalls

PERIOD_S = 0.025
ELECTION_S = 0.3


def test_ticks_in_time_say_nothing() -> None:
    """Neither the first tick, whatever was before it, nor ticks that are late by less than half an election timeout."""
    stalls = Stalls(PERIOD_S, ELECTION_S)
    assert stalls.ticked(1_000.0, 5.0, 7.0) is None
    assert stalls.ticked(1_000.025, 5.0, 7.0) is None
    assert stalls.ticked(1_000.174, 5.1, 7.0) is None


def test_a_late_tick_names_the_causes() -> None:
    """What the disk and the processor took is told apart from what the machine did not give."""
    stalls = Stalls(PERIOD_S, ELECTION_S)
    stalls.ticked(10.0, 2.0, 3.0)
    line = stalls.ticked(11.0, 2.6, 3.1)
    assert line == (
        "stood still for 1.00 s: 0.60 s for the disk to sync, 0.10 s computing, "
        "0.30 s waiting for a processor or other files; after 0.3 s others may elect a leader"
    )
    assert stalls.ticked(11.025, 2.6, 3.1) is None
