"""The ring, the fair shares and the bands."""

from __future__ import annotations

from collections import Counter

import pytest

from coordinator.placement import Ring, RingMember
from coordinator.placement.ring import TOKENS_MAX, name_position, shard_position
from coordinator.placement.shares import band_around, fair_shares, fill


def members(*weights: float, zones: str = "") -> list[RingMember]:
    """Members w0, w1, ... with these weights; `zones` has one letter each."""
    return [RingMember(f"w{number}", zones[number : number + 1], weight) for number, weight in enumerate(weights)]


def test_places_never_change() -> None:
    """Positions and preferences are part of what masters of all versions must agree on."""
    ring = Ring(members(1, 1, 1, 1))
    assert name_position("loop_01") == 0x6B3F678A4C34E236
    assert shard_position(1 << 62) == 0xC41DA58624FD81ED
    preferred = [ring.preference(name_position(f"loop_{number:02}"), 2) for number in range(1, 5)]
    assert preferred == [["w3", "w0"], ["w2", "w3"], ["w0", "w2"], ["w2", "w0"]]


def test_shares_follow_the_weights() -> None:
    """A worker of twice the weight is first choice for about twice as many positions."""
    ring = Ring(members(1, 1, 2))
    first = Counter(ring.preference(shard_position(number << 40), 1)[0] for number in range(20_000))
    assert 0.42 < first["w2"] / 20_000 < 0.58


def test_a_newcomer_takes_and_changes_nothing_else() -> None:
    """When a worker joins, a position's first choice stays or becomes the newcomer."""
    before, after = Ring(members(1, 1, 1)), Ring(members(1, 1, 1, 1))
    changed = 0
    for number in range(3_000):
        position = shard_position(number << 44)
        old, new = before.preference(position, 1)[0], after.preference(position, 1)[0]
        assert new in (old, "w3")
        changed += new != old
    assert 0.17 < changed / 3_000 < 0.33


def test_zones_come_before_workers() -> None:
    """With two zones the second choice is in the other zone, the third wherever the ring says."""
    ring = Ring(members(1, 1, 1, 1, zones="aaab"))
    for number in range(200):
        preferred = ring.preference(shard_position(number << 50), 3)
        assert "w3" in preferred[:2]
        assert len(set(preferred)) == 3


def test_a_worker_without_a_zone_is_a_zone_of_its_own() -> None:
    """Workers without zones do not count as sharing one, nor with a zone of the same name as a worker."""
    assert RingMember("w1").domain != RingMember("w2").domain
    assert RingMember("w1").domain != RingMember("w2", zone="w1").domain


def test_full_workers_are_passed_over() -> None:
    """Bounded loads: who is not open is no choice, and its place goes to the next."""
    ring = Ring(members(1, 1, 1))
    position = shard_position(7)
    first, second, third = ring.preference(position, 3)
    assert ring.preference(position, 3, lambda name: name != first) == [second, third]
    assert ring.preference(position, 3, lambda name: False) == []


def test_distance_agrees_with_the_walk() -> None:
    """The nearest accepted worker on the walk is the one at the smallest distance, also in a subset of the ring."""
    ring = Ring(members(1, 0.5, 2, 1))
    subset = ring.subset({"w1", "w3"})
    for number in range(300):
        position = shard_position(number << 48)
        nearest = min(["w1", "w3"], key=lambda name: ring.distance(position, name))
        found = ring.first(position, lambda name: name in ("w1", "w3"))
        assert found == (ring.distance(position, nearest), nearest)
        assert subset.first(position, lambda name: True) == found


def test_an_empty_ring_prefers_nobody() -> None:
    """Nobody is a proper answer when there is nobody."""
    ring = Ring([])
    assert ring.preference(1, 2) == []
    assert ring.first(1, lambda name: True) is None


def test_bad_members_are_refused() -> None:
    """Two workers of one name, and weights that give no share, are mistakes of the caller."""
    with pytest.raises(ValueError, match="same id"):
        Ring([RingMember("w1"), RingMember("w1", zone="a")])
    with pytest.raises(ValueError, match="weight"):
        Ring([RingMember("w1", weight=0.0)])


def test_large_weights_are_scaled() -> None:
    """Weights given in gigabytes do not make a ring of gigabytes."""
    ring = Ring([RingMember(f"w{number}", weight=1_000.0) for number in range(50)])
    assert len(ring._tokens) <= TOKENS_MAX + 50


@pytest.mark.parametrize(
    ("weights", "zones", "shards", "replicas", "expected"),
    [
        ([1, 1, 1, 1], "", 100, 2, [50, 50, 50, 50]),
        ([1, 1, 2], "", 100, 1, [25, 25, 50]),
        ([1, 1, 8], "", 100, 2, [50, 50, 100]),  # nobody holds a shard twice
        ([1, 1], "", 100, 3, [100, 100]),  # fewer workers than wanted copies
        ([1, 1, 1], "aab", 100, 2, [50, 50, 100]),  # one copy in each zone
        ([1, 1, 1, 1, 1, 1, 1], "aaabbbb", 84, 2, [28, 28, 28, 21, 21, 21, 21]),
        ([1] * 10, "a" + "b" * 9, 90, 2, [36] + [16] * 9),  # twice the plain share of 18 is the limit
        ([1, 1, 1, 1], "aabb", 100, 3, [75, 75, 75, 75]),  # two zones for three copies
        ([1, 1], "", 0, 2, [0, 0]),
    ],
)
def test_fair_shares(weights: list[float], zones: str, shards: int, replicas: int, expected: list[float]) -> None:
    """Shares are by weight, within what distinct workers and distinct zones allow."""
    shares = fair_shares(members(*weights, zones=zones), shards, replicas)
    assert list(shares.values()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("fair", "low", "middle", "high"),
    [(0.0, 0, 0, 0), (0.5, 0, 1, 1), (5.0, 5, 5, 5), (10.0, 9, 10, 11), (32.0, 29, 32, 35), (131.072, 118, 132, 144)],
)
def test_bands(fair: float, low: int, middle: int, high: int) -> None:
    """The band is 10 % to either side in whole copies, and never so narrow that nothing fits."""
    band = band_around(fair, 1.10)
    assert (band.low, band.middle, band.high) == (low, middle, high)


def test_fill_spreads_what_is_cut_off() -> None:
    """What a limit cuts off goes to the others, by weight, also when that brings them to their limits."""
    assert fill([1, 1, 2], [10, 100, 10], 40) == pytest.approx([10, 20, 10])
    assert fill([3, 1], [10, 10], 20) == pytest.approx([10, 10])
