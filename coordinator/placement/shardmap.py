"""Which shard holds a key: sorted ranges, and a table that answers most lookups without a search.

The ranges are cut at their lower ends. The hash space is also cut into equal slots, at least four per
shard; a slot that lies within one shard names it, so that a lookup is one hash and one index. Only a slot
with a border inside leaves the search to bisect. With the equal ranges of a new cluster of 2^n shards no
slot has a border inside; after splits few have.

Invariant: the ranges cover [0, 2^64) once, or there are none.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from xxhash import xxh3_64_intdigest

from coordinator.model import HASH_SPACE, KEY_BYTES_MAX, Shard, check_key
from coordinator.model.errors import RefusalReason, Refused

SLOTS_PER_SHARD = 4
SLOT_BITS_MAX = 20
"""A million slots are 8 MB; more would leave the processor's caches anyway."""
CHUNK_KEYS = 1_024
"""Keys that are encoded at a time: what they take stays in the processor's cache, a fifth faster than all at once."""


class ShardMap:
    """An immutable map from keys to shards.

    Raises ValueError when the ranges have a gap or an overlap. Lookups in an empty map raise Refused
    (NOT_FOUND).
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._shards = sorted(shards, key=lambda shard: shard.lo)
        expected = 0
        for shard in self._shards:
            if shard.lo != expected:
                raise ValueError(f"shard {shard.id} begins at {shard.lo:#x}, the range before it ends at {expected:#x}")
            expected = shard.hi
        if self._shards and expected != HASH_SPACE:
            raise ValueError(f"the last shard ends at {expected:#x} instead of 2^64")
        self._lows = [shard.lo for shard in self._shards]
        bits = min(SLOT_BITS_MAX, (len(self._shards) * SLOTS_PER_SHARD).bit_length())
        self._shift = 64 - bits
        self._slots = self._fill_slots(1 << bits)

    def _fill_slots(self, count: int) -> list[Shard | None]:
        slots: list[Shard | None] = [None] * count
        width = 1 << self._shift
        for shard in self._shards:
            first = -(-shard.lo // width)
            end = shard.hi // width
            if first < end:
                slots[first:end] = [shard] * (end - first)
        return slots

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards by ascending range."""
        return tuple(self._shards)

    def locate(self, key_hash: int) -> Shard:
        """The shard whose range has `key_hash`. Raises ValueError when that is no unsigned 64-bit integer."""
        self._require_shards()
        if not 0 <= key_hash < HASH_SPACE:
            raise ValueError(f"a key hash is 0 to 2^64 - 1, not {key_hash}")
        return self._slots[key_hash >> self._shift] or self._search(key_hash)

    def locate_key(self, key: str) -> Shard:
        """The shard that holds `key`. Raises InvalidRequest as `check_key` does."""
        return self.locate(xxh3_64_intdigest(check_key(key)))

    def locate_many(self, keys: Sequence[str]) -> list[Shard]:
        """The shards that hold `keys`, in their order. Raises InvalidRequest for the first key that is none.

        Made for batches: keys are encoded, checked and hashed without a Python call per key.
        """
        self._require_shards()
        slots, shift, digest, search = self._slots, self._shift, xxh3_64_intdigest, self._search
        found: list[Shard] = []
        for start in range(0, len(keys), CHUNK_KEYS):
            encoded = self._encode(keys[start : start + CHUNK_KEYS])
            found += [slots[(key_hash := digest(key)) >> shift] or search(key_hash) for key in encoded]
        return found

    @staticmethod
    def _encode(keys: Sequence[str]) -> list[bytes]:
        try:
            encoded = list(map(str.encode, keys))
        except UnicodeEncodeError:
            return [check_key(key) for key in keys]
        lengths = set(map(len, encoded))
        if lengths and (min(lengths) < 1 or max(lengths) > KEY_BYTES_MAX):
            return [check_key(key) for key in keys]
        return encoded

    def _search(self, key_hash: int) -> Shard:
        return self._shards[bisect_right(self._lows, key_hash) - 1]

    def _require_shards(self) -> None:
        if not self._shards:
            raise Refused(RefusalReason.NOT_FOUND, "the cluster has no shards yet; wait until a leader has made them")
