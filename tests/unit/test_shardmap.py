"""The shard map: which shard holds a key."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

import pytest

from coordinator.model import HASH_SPACE, Shard, key_hash
from coordinator.model.errors import InvalidRequest, Refused
from coordinator.placement import ShardMap


def equal(count: int) -> list[Shard]:
    """Shards of equal range, in descending order of id."""
    ranges = [(number * HASH_SPACE // count, (number + 1) * HASH_SPACE // count) for number in range(count)]
    return [Shard(count - number, lo, hi) for number, (lo, hi) in enumerate(ranges)]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 256, 1_000])
def test_borders_belong_to_the_shard_that_begins_there(count: int) -> None:
    """The first and last hash of every range are located in it."""
    shards = equal(count)
    found = ShardMap(reversed(shards))
    for shard in shards:
        assert found.locate(shard.lo) is shard
        assert found.locate(shard.hi - 1) is shard


def test_uneven_ranges_are_searched() -> None:
    """Ranges as thin as one hash, as splits could make them, are found through the search."""
    cuts = [0, 1, 2, 1 << 20, (1 << 63) + 5, HASH_SPACE - 1, HASH_SPACE]
    shards = [Shard(number, lo, hi) for number, (lo, hi) in enumerate(pairwise(cuts))]
    found = ShardMap(shards)
    for cut in cuts:
        for key in (cut - 1, cut, cut + 1):
            if 0 <= key < HASH_SPACE:
                assert found.locate(key) is shards[bisect_right(cuts, key) - 1]


def test_many_keys_agree_with_one_key() -> None:
    """The batch gives what single lookups give, in the order of the keys, repeated keys included."""
    found = ShardMap(equal(100))
    keys = [f"user-{number}" for number in range(2_000)] + ["ü", "日本", "user-1", "x" * 512]
    assert found.locate_many(keys) == [found.locate_key(key) for key in keys]
    assert found.locate_many(keys) == [found.locate(key_hash(key)) for key in keys]
    assert found.locate_many([]) == []


@pytest.mark.parametrize("bad", ["", "x" * 513, "ü" * 257, "\ud800"])
def test_a_bad_key_is_refused_alone_and_in_a_batch(bad: str) -> None:
    """A key that is empty, too long in bytes, or not Unicode is refused wherever it stands."""
    found = ShardMap(equal(4))
    with pytest.raises(InvalidRequest):
        found.locate_key(bad)
    with pytest.raises(InvalidRequest):
        found.locate_many(["good", bad, "good"])


def test_gaps_and_overlaps_are_refused() -> None:
    """Ranges that do not cover the hash space exactly once make no map."""
    first, second = Shard(1, 0, 100), Shard(2, 100, HASH_SPACE)
    assert len(ShardMap([second, first])) == 2
    for broken in ([first], [second], [first, Shard(2, 101, HASH_SPACE)], [first, Shard(2, 99, HASH_SPACE)]):
        with pytest.raises(ValueError, match=r"shard|2\^64"):
            ShardMap(broken)


def test_an_empty_map_says_that_there_are_no_shards() -> None:
    """Before the cluster is made, a lookup is refused, not answered wrongly."""
    for ask in (lambda: ShardMap([]).locate(1), lambda: ShardMap([]).locate_many(["a"])):
        with pytest.raises(Refused, match="no shards yet"):
            ask()


def test_a_number_that_is_no_hash_is_refused() -> None:
    """A negative hash would index from the end of the table."""
    for number in (-1, HASH_SPACE):
        with pytest.raises(ValueError, match="64"):
            ShardMap(equal(4)).locate(number)


def test_keys_spread_evenly() -> None:
    """A hundred thousand keys over 64 shards stay within five standard deviations of the mean."""
    found = ShardMap(equal(64))
    counts = dict.fromkeys(range(1, 65), 0)
    for shard in found.locate_many([f"user-{number}" for number in range(100_000)]):
        counts[shard.id] += 1
    mean = 100_000 / 64
    assert max(abs(count - mean) for count in counts.values()) < 5 * mean**0.5
