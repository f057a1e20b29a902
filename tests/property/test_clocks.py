"""Whatever the clocks and the network are: offsets are what they are said to be, and somebody may always lead."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.config import RaftSettings
from coordinator.model import ManualClock
from coordinator.raft.clocks import Clocks

SETTINGS = RaftSettings()
MAX_S = SETTINGS.clock_offset_max_s
ROUNDED_S = 1e-5
"""Times travel in whole microseconds, and a wall clock of 2023 has room for a quarter of one in a float."""

offsets_s = st.one_of(
    st.floats(-20.0, 20.0),
    st.sampled_from((0.0, 4.999, 5.0, 5.001, -5.0, 10.0, 1e6, -1.7e9)),
)
fleets = st.sampled_from((1, 2, 3, 4, 5)).flatmap(lambda count: st.lists(offsets_s, min_size=count, max_size=count))
messages = st.tuples(st.integers(0, 4), st.integers(0, 4), st.floats(0.0, 4.0), st.booleans())


class Fleet:
    """Masters whose monotonic and wall clocks differ; messages between any two take as long as said."""

    def __init__(self, fleet: list[float]) -> None:
        self.walls = fleet
        self.ids = [f"m{number}" for number in range(1, len(fleet) + 1)]
        self.clocks = []
        self._manual = []
        for number, wall_s in enumerate(fleet):
            clock = ManualClock(monotonic_s=1_000.0 + 777.7 * number)
            clock.step_wall(wall_s)
            self._manual.append(clock)
            self.clocks.append(Clocks(self.ids[:number] + self.ids[number + 1 :], SETTINGS, clock.wall_ms))

    def now_s(self, number: int) -> float:
        return self._manual[number].monotonic()

    def send(self, one: int, other: int, delay_s: float, *, tells_all: bool = True) -> None:
        """One message, alone on the network; messages of a pair keep their order, so more of them show nothing else."""
        reading = self.clocks[one].stamp(self.ids[other], self.now_s(one), tells_all=tells_all)
        for clock in self._manual:
            clock.advance(delay_s)
        self.clocks[other].take(self.ids[one], reading, self.now_s(other))

    def play(self, story: list[tuple[int, int, float, bool]]) -> None:
        count = len(self.walls)
        for one, other, delay_s, tells_all in story:
            if one % count != other % count:
                self.send(one % count, other % count, delay_s, tells_all=tells_all)

    def refusing(self) -> list[int]:
        return [number for number, clocks in enumerate(self.clocks) if clocks.verdict(self.now_s(number)).refuses]


@settings(max_examples=300, deadline=None)
@given(fleets, st.lists(messages, max_size=40))
def test_the_truth_is_within_the_interval(fleet: list[float], story: list[tuple[int, int, float, bool]]) -> None:
    """Shows that what a master knows of another's clock, directly or through others, is true whatever the delays."""
    played = Fleet(fleet)
    played.play(story)
    for number, clocks in enumerate(played.clocks):
        for id, interval in clocks.offsets(played.now_s(number)).items():
            truth_s = fleet[played.ids.index(id)] - fleet[number]
            # ManualClock rounds each advance to a millisecond, and steps too.
            tolerance_s = ROUNDED_S + 0.001 * (len(story) + 2)
            assert interval.low_s - tolerance_s <= truth_s <= interval.high_s + tolerance_s


@settings(max_examples=300, deadline=None)
@given(fleets, st.lists(messages, max_size=20), st.lists(st.floats(0.0, 0.1), min_size=60, max_size=60))
def test_somebody_may_lead(
    fleet: list[float], story: list[tuple[int, int, float, bool]], delays_s: list[float]
) -> None:
    """Shows that of masters that know each other's clocks, however well, at least one does not refuse."""
    played = Fleet(fleet)
    played.play(story)
    rest = iter(delays_s)
    # Three rounds on a ring: nobody hears more than two others directly.
    for _ in range(3):
        for number in range(len(fleet)):
            other = (number + 1) % len(fleet)
            if other != number:
                for one, two in ((number, other), (other, number), (number, other)):
                    played.send(one, two, next(rest, 0.0))
    known = {clocks.verdict(played.now_s(number)).known for number, clocks in enumerate(played.clocks)}
    assert known == {len(fleet)}
    assert len(played.refusing()) < len(fleet)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(-MAX_S / 2 + 0.1, MAX_S / 2 - 0.1), min_size=1, max_size=5), st.lists(messages, max_size=60)
)
def test_a_slow_network_makes_nobody_refuse(fleet: list[float], story: list[tuple[int, int, float, bool]]) -> None:
    """Shows that masters whose clocks are close never refuse, whatever the delays, and whoever has heard whom."""
    played = Fleet(fleet)
    for step in range(len(story)):
        played.play(story[step : step + 1])
        assert played.refusing() == []
