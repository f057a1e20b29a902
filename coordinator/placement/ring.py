"""The consistent-hash ring: for every position, the workers in order of preference.

A worker has tokens in proportion to its weight; token i of worker w lies at XXH3-64 of "w#i". The workers
that a position prefers are the owners of the tokens that follow it, clockwise. A worker that joins or
leaves changes only the preferences next to its own tokens (Karger et al. 1997), and the order in which
members are given changes nothing.

The ring alone is uneven: with 256 tokens the shares vary by about 1/sqrt(256) = 6 %. Bounded loads
(Mirrokni, Thorup, Zadimoghaddam 2018) mend that: who is full is passed over and the next one takes its
place. The ring does not count loads; whoever places says which members are open (`board.py`).

The position of a shard is the hash of its `lo`: the lower half of a split and the result of a merge keep
the place that the range had before, so a split alone gives no reason to move anything. Hashing `lo` spreads
neighbours over the ring.

Failure domains: a worker's zone; a worker without a zone is a failure domain of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from math import fsum

from xxhash import xxh3_64_intdigest

from coordinator.model import HASH_SPACE

HASH_MASK = HASH_SPACE - 1
TOKENS_MAX = 1 << 20
"""Most tokens of a ring (about 40 MB); with larger weights every worker gets fewer per unit of weight."""


@dataclass(frozen=True, slots=True, order=True)
class RingMember:
    """A worker as the ring sees it; `weight` is above 0."""

    id: str
    zone: str = ""
    weight: float = 1.0

    @property
    def domain(self) -> str:
        """Its failure domain. A NUL keeps the names of workers and of zones apart."""
        return self.zone or f"\0{self.id}"


def shard_position(lo: int) -> int:
    """Where the shard whose range begins at `lo` lies on the ring."""
    return xxh3_64_intdigest(lo.to_bytes(8, "little"))


def name_position(name: str) -> int:
    """Where something with a name, a cron job for one, lies on the ring."""
    return xxh3_64_intdigest(name.encode())


@lru_cache(maxsize=4_096)
def _tokens_of(member_id: str, count: int) -> tuple[int, ...]:
    """Sorted tokens of one worker; remembered, because a ring is made anew when one worker of many comes or goes."""
    return tuple(sorted(xxh3_64_intdigest(f"{member_id}#{number}".encode()) for number in range(count)))


class Ring:
    """An immutable ring. Raises ValueError when two members share an id or a weight is not above 0."""

    def __init__(self, members: Iterable[RingMember], tokens_per_weight: int = 256) -> None:
        self.members = tuple(sorted(members))
        self._by_id = {member.id: member for member in self.members}
        if len(self._by_id) != len(self.members):
            raise ValueError("two members of a ring have the same id")
        for member in self.members:
            if not member.weight > 0:
                raise ValueError(f"worker {member.id} has weight {member.weight}; a weight is above 0")
        per_weight = tokens_per_weight
        weight_sum = fsum(member.weight for member in self.members)
        self._per_weight = min(float(per_weight), TOKENS_MAX / weight_sum) if self.members else float(per_weight)
        self._build([(member.id, max(1, round(member.weight * self._per_weight))) for member in self.members])

    def _build(self, counts: list[tuple[str, int]]) -> None:
        self._own = {member_id: _tokens_of(member_id, count) for member_id, count in counts}
        tokens = list(chain.from_iterable(self._own.values()))
        owners = list(chain.from_iterable([member_id] * len(own) for member_id, own in self._own.items()))
        # The sort is stable and members come by id, so that two equal tokens have the same order everywhere.
        order = sorted(range(len(tokens)), key=tokens.__getitem__)
        self._tokens = [tokens[place] for place in order]
        self._owners = [owners[place] for place in order]

    def __len__(self) -> int:
        return len(self.members)

    def subset(self, ids: Collection[str]) -> Ring:
        """The ring of some of the members, with the tokens that they have here."""
        ring = Ring.__new__(Ring)
        ring.members = tuple(member for member in self.members if member.id in ids)
        ring._by_id = {member.id: member for member in ring.members}
        ring._per_weight = self._per_weight
        ring._build([(member.id, len(self._own[member.id])) for member in ring.members])
        return ring

    def first(self, position: int, accepts: Callable[[str], bool]) -> tuple[int, str] | None:
        """The first worker clockwise that is accepted, after its distance; None when no worker is."""
        tokens, owners = self._tokens, self._owners
        start = bisect_left(tokens, position)
        for places in (range(start, len(tokens)), range(start)):
            for place in places:
                if accepts(owners[place]):
                    return (tokens[place] - position) & HASH_MASK, owners[place]
        return None

    def distance(self, position: int, member_id: str) -> int:
        """Distance clockwise to the worker's next token: the smaller, the more the position prefers it."""
        own = self._own[member_id]
        place = bisect_left(own, position)
        return (own[place if place < len(own) else 0] - position) & HASH_MASK

    def preference(self, position: int, count: int, is_open: Callable[[str], bool] | None = None) -> list[str]:
        """Up to `count` workers, best first: distinct failure domains first, then distinct workers.

        `is_open` passes over workers that are full (bounded loads); by default nobody is.
        """
        chosen: list[str] = []
        domains: set[str] = set()
        second: list[str] = []
        seen: set[str] = set()
        start = bisect_left(self._tokens, position)
        for place in chain(range(start, len(self._tokens)), range(start)):
            if len(chosen) == count or len(seen) == len(self.members):
                break
            owner = self._owners[place]
            if owner in seen:
                continue
            seen.add(owner)
            if is_open is not None and not is_open(owner):
                continue
            domain = self._by_id[owner].domain
            if domain in domains:
                second.append(owner)
            else:
                domains.add(domain)
                chosen.append(owner)
        return (chosen + second)[:count]
