"""Whether this master's wall clock is good enough to lead by: schedules go by the leader's. Passive.

What is known: every message of the consensus that stamps a `ClockReading` tells the sender's wall clock, and echoes the
receiver's latest stamp with how long it was held. So the reading was taken within one round trip of the receiver's own
monotonic clock, whoever was slow: an interval, never a guess. It is kept as the peer's wall clock minus *this* master's
monotonic clock, so a step of this master's own wall clock shows at once, and a step of a peer's with its next message.
Masters also pass on what they know of the others, so followers, which do not speak with each other, know all clocks.

Verdict. With an odd number of known clocks (this master's among them) the measure is their median, with an even number
the two middle ones: a master is *off*, which is said, when it certainly differs from the farther one by more than
`clock_offset_warn_s`; it *refuses* to lead when it certainly differs from the nearer one by more than
`clock_offset_max_s`. So of two masters neither refuses, though both say that they differ: nobody can tell which is
wrong.

Invariant: of masters that know the same clocks at least one does not refuse: the one that truly has a middle clock
finds it within what the others' intervals allow, and uncertainty only ever allows more. Masters that are connected, if
only through others, come to know the same clocks. What follows from a verdict is clock_duty.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from coordinator.api.v1 import peer_pb2
from coordinator.config import RaftSettings
from coordinator.model import WallMs
from coordinator.model.clock import offset_words

KNOWN_S = 10.0
"""A clock that was not heard for so long, or for three election timeouts, counts no more."""
DIRECT_S = 1.0
"""What a third master says of a peer counts only when the peer itself was not heard for so long."""
RELAY_S = 0.25
"""What is known of others goes to a peer so often."""
DRIFT = 0.001
"""Two clocks may part by so much per second between readings; NTP slews by half of that."""
READING_S = 0.001
"""A wall clock is told in whole milliseconds."""
US_MAX = 1 << 62
RECOVERED = 0.8
"""A clock counts as good again, in the log, below so much of the limit: at the limit every message would be news."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Where a number of seconds certainly is. Invariant: low_s <= high_s."""

    low_s: float
    high_s: float

    @property
    def middle_s(self) -> float:
        """The best guess."""
        return (self.low_s + self.high_s) / 2

    @property
    def uncertainty_s(self) -> float:
        """How far the truth may be from `middle_s`."""
        return (self.high_s - self.low_s) / 2


EXACT = Interval(0.0, 0.0)
"""A master's own clock, measured by itself."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a master holds of its own wall clock."""

    offset_s: float = 0.0
    """How far it is from the others', as far as can be told; positive when it is ahead."""
    known: int = 1
    """Clocks that were compared, its own among them."""
    is_off: bool = False
    """It certainly differs by more than `clock_offset_warn_s`."""
    refuses: bool = False
    """It certainly differs by more than `clock_offset_max_s`, so this master is not to lead."""


def _farthest(below_s: float, above_s: float) -> float:
    """Of a distance to clocks above (negative when there is one) and one to clocks below, the longer."""
    below_s, above_s = min(0.0, below_s), max(0.0, above_s)
    return below_s if -below_s > above_s else above_s


def _middles(values: Iterable[float]) -> tuple[float, float]:
    """The two middle ones; of an odd number twice the median."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]


def judge(clock: Interval, clocks: Sequence[Interval], settings: RaftSettings) -> Verdict:
    """The verdict on one of `clocks`, all measured against the same."""
    lower_low, upper_low = _middles(one.low_s for one in clocks)
    lower_high, upper_high = _middles(one.high_s for one in clocks)
    lower, upper = _middles(one.middle_s for one in clocks)
    nearer_s = _farthest(clock.high_s - lower_low, clock.low_s - upper_high)
    farther_s = _farthest(clock.high_s - upper_low, clock.low_s - lower_high)
    return Verdict(
        offset_s=_farthest(clock.middle_s - upper, clock.middle_s - lower),
        known=len(clocks),
        is_off=abs(farther_s) > settings.clock_offset_warn_s,
        refuses=abs(nearer_s) > settings.clock_offset_max_s,
    )


@dataclass(frozen=True, slots=True)
class ClockFigures:
    """What a master knows of clocks at one moment."""

    verdict: Verdict
    """On its own."""
    offsets: dict[str, Interval]
    """The peers' minus its own, by id."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A peer's wall clock minus this master's monotonic clock, as it was at `at_s`."""

    interval: Interval
    at_s: float
    is_direct: bool


@dataclass(frozen=True, slots=True)
class _Stamp:
    """The latest stamp of a peer, to be echoed."""

    sent_us: int
    received_s: float


class Clocks:
    """What one master knows of the masters' wall clocks. `now_s` is always its monotonic clock (`engine.now_s`)."""

    def __init__(self, peer_ids: Iterable[str], settings: RaftSettings, wall_ms: Callable[[], WallMs]) -> None:
        self._peer_ids = tuple(sorted(peer_ids))
        self._settings = settings
        self._wall_ms = wall_ms
        self._known_s = max(KNOWN_S, 3 * settings.election_timeout_s_max)
        self._known: dict[str, _Known] = {}
        self._stamps: dict[str, _Stamp] = {}
        self._relayed_s: dict[str, float] = {}
        self._told = Verdict()

    # What comes in and goes out

    def observe(self, peer_id: str, interval: Interval, at_s: float, *, is_direct: bool = True) -> None:
        """A peer's wall clock minus this master's monotonic clock was within `interval` at `at_s`."""
        known = self._known.get(peer_id)
        if not is_direct and known is not None:
            outlived_s = known.at_s + DIRECT_S if known.is_direct else known.at_s
            if at_s <= outlived_s:
                return
        self._known[peer_id] = _Known(interval, at_s, is_direct)

    def stamp(self, peer_id: str, now_s: float, *, tells_all: bool) -> peer_pb2.ClockReading:
        """What a message to a peer says of clocks; to be sent at once."""
        wall_ms = self._wall_ms()
        reading = peer_pb2.ClockReading(wall_unix_ms=wall_ms, sent_at_us=_us(now_s))
        echo = self._stamps.get(peer_id)
        if echo is not None:
            reading.echo_us = echo.sent_us
            reading.held_us = max(0, _us(now_s - echo.received_s))
        if tells_all or now_s - self._relayed_s.get(peer_id, -RELAY_S) >= RELAY_S:
            self._relayed_s[peer_id] = now_s
            own_s = wall_ms / 1_000 - now_s
            for id, known in self._known.items():
                if id != peer_id and now_s - known.at_s < self._known_s:
                    reading.others.add(
                        id=id,
                        offset_us=_us(known.interval.middle_s - own_s),
                        uncertainty_us=_us(known.interval.uncertainty_s),
                        age_us=max(0, _us(now_s - known.at_s)),
                    )
        return reading

    def take(self, peer_id: str, reading: peer_pb2.ClockReading, now_s: float) -> None:
        """A peer's message said this of clocks. What cannot be true is not taken."""
        self._stamps[peer_id] = _Stamp(reading.sent_at_us, now_s)
        round_trip_s = now_s - reading.echo_us / 1e6 - reading.held_us / 1e6
        if not reading.echo_us or not -READING_S <= round_trip_s <= self._known_s:
            return
        wall_s = reading.wall_unix_ms / 1_000
        earliest_s = wall_s - now_s
        interval = Interval(earliest_s, earliest_s + max(0.0, round_trip_s) + READING_S)
        self.observe(peer_id, interval, now_s)
        for other in reading.others:
            if other.id in self._peer_ids and other.id != peer_id:
                offset_s, uncertainty_s = other.offset_us / 1e6, other.uncertainty_us / 1e6
                told = Interval(interval.low_s + offset_s - uncertainty_s, interval.high_s + offset_s + uncertainty_s)
                self.observe(other.id, told, now_s - other.age_us / 1e6, is_direct=False)

    def connected(self, peer_id: str) -> None:
        """A peer came, perhaps after a restart of its machine: then its monotonic clock is another one."""
        self._stamps.pop(peer_id, None)

    # What follows

    def own_s(self, now_s: float) -> float:
        """The wall clock of this master minus its monotonic one: changes only when the wall clock steps or slews."""
        return self._wall_ms() / 1_000 - now_s

    def offsets(self, now_s: float) -> dict[str, Interval]:
        """The wall clocks of the peers minus this master's, by id; only those that still count."""
        own_s = self.own_s(now_s)
        found = {}
        for id in self._peer_ids:
            known = self._known.get(id)
            if known is not None and now_s - known.at_s < self._known_s:
                drift_s = max(0.0, now_s - known.at_s) * DRIFT
                low_s, high_s = known.interval.low_s - drift_s, known.interval.high_s + drift_s
                # This master's own reading is rounded down too.
                found[id] = Interval(low_s - own_s - READING_S, high_s - own_s)
        return found

    def verdict(self, now_s: float) -> Verdict:
        """On this master's own clock."""
        return judge(EXACT, (EXACT, *self.offsets(now_s).values()), self._settings)

    def verdicts(self, now_s: float) -> dict[str, Verdict]:
        """On the peers' clocks, by id, those that are best first."""
        offsets = self.offsets(now_s)
        clocks = (EXACT, *offsets.values())
        found = {id: judge(offset, clocks, self._settings) for id, offset in offsets.items()}
        return dict(sorted(found.items(), key=lambda item: (abs(item[1].offset_s), item[0])))

    def figures(self, now_s: float) -> ClockFigures:
        """All of it."""
        return ClockFigures(self.verdict(now_s), self.offsets(now_s))

    def knows(self, peer_id: str, now_s: float) -> bool:
        """True while a peer's clock counts."""
        known = self._known.get(peer_id)
        return known is not None and now_s - known.at_s < self._known_s

    def news(self, now_s: float) -> str | None:
        """What is to be logged, once per change; to be called now and then."""
        found, before = self.verdict(now_s), self._told
        if (found.is_off, found.refuses) == (before.is_off, before.refuses):
            return None
        is_better = found.refuses < before.refuses or found.is_off < before.is_off
        limit_s = self._settings.clock_offset_max_s if before.refuses else self._settings.clock_offset_warn_s
        if is_better and found.known > 1 and abs(found.offset_s) > RECOVERED * limit_s:
            return None
        self._told = found
        if not found.is_off and not found.refuses:
            return "its wall clock agrees with the other masters' again"
        what = f"its wall clock is {offset_words(found.offset_s)} the other masters'"
        if found.refuses:
            limit = f"more than clock_offset_max_s = {self._settings.clock_offset_max_s:g} s"
            return f"{what}, {limit}: it refuses to lead until that is set right; {ADVICE}"
        return f"{what}; schedules go by the leader's clock: {ADVICE}"


ADVICE = "check the time synchronization of its machine (chronyc tracking, timedatectl)"


def _us(seconds: float) -> int:
    """Microseconds; what a peer said may be beyond all bounds, and still has to fit when it is passed on."""
    return max(-US_MAX, min(US_MAX, round(seconds * 1e6)))
