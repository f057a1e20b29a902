"""How much each worker should hold: weighted fair shares and the band around them.

The fair share of a worker is its part of all copies by weight, as far as the placement rules let it be so:

- A worker never holds two copies of one shard, so nobody's share is above the number of shards; what a
  heavy worker cannot take is spread over the others.
- Copies of one shard go to distinct failure domains where there are enough, so a domain's share is limited
  in the same way. Two domains of three and of four workers hold half of the copies each, and a worker of
  the smaller one a sixth instead of a seventh. A small domain is asked for at most ZONE_STRETCH_MAX times
  its plain share: with one worker against nine, all shards on the one would trade a risk for an outage.
  Beyond that, copies share a domain, and the planner says so.

The band: nobody above `high` (bounded loads, c = 1.10), nobody below `low`, its mirror image. Within the
band nothing moves, so the band is the planner's hysteresis. `high` is never below the rounded-up share,
without which nothing could be placed.

Invariant: sum(low) <= copies <= sum(high), and the shares add up to the copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, fsum

from coordinator.placement.ring import RingMember

ZONE_STRETCH_MAX = 2.0
_EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class Band:
    """One worker's fair share and what it may hold. Invariant: low <= fair <= middle <= high."""

    fair: float
    low: int
    middle: int
    """The fair share, rounded up."""
    high: int

    @property
    def goal(self) -> int:
        """What a newcomer is filled up to: the fair share, rounded down."""
        return floor(self.fair)


def band_around(fair: float, load_bound: float) -> Band:
    """The band around a fair share; `load_bound` is c, above 1."""
    fair = round(fair, 9)
    middle = ceil(fair)
    high = max(middle, floor(load_bound * fair + _EPSILON))
    low = min(floor(fair), ceil(max(0.0, 2.0 - load_bound) * fair - _EPSILON))
    return Band(fair=fair, low=max(0, low), middle=middle, high=high)


def fair_shares(members: Sequence[RingMember], shards: int, replicas: int) -> dict[str, float]:
    """Fair share of copies by worker, when `shards` shards have `replicas` copies each."""
    if not members or not shards:
        return {member.id: 0.0 for member in members}
    copies = float(shards * min(replicas, len(members)))
    limit = float(shards)
    weights = [member.weight for member in members]
    plain = fill(weights, [limit] * len(members), copies)
    domains: dict[str, list[int]] = {}
    for place, member in enumerate(members):
        domains.setdefault(member.domain, []).append(place)
    if len(domains) in (1, len(members)):
        return {member.id: share for member, share in zip(members, plain, strict=True)}
    totals = _domain_totals(
        [fsum(plain[place] for place in places) for places in domains.values()],
        [len(places) for places in domains.values()],
        limit,
        copies,
    )
    shares: dict[str, float] = {}
    for places, total in zip(domains.values(), totals, strict=True):
        parts = fill([weights[place] for place in places], [limit] * len(places), total)
        shares.update((members[place].id, part) for place, part in zip(places, parts, strict=True))
    return shares


def _domain_totals(plain: list[float], sizes: list[int], shards: float, copies: float) -> list[float]:
    """What each failure domain holds: by weight, no more than lets copies be spread, within the stretch."""
    per_domain = ceil(copies / shards / len(plain) - _EPSILON)
    limits = [shards * min(size, per_domain) for size in sizes]
    if fsum(limits) < copies - _EPSILON:
        return plain
    totals = fill(plain, limits, copies)
    clipped = [min(total, share * ZONE_STRETCH_MAX) for total, share in zip(totals, plain, strict=True)]
    excess = copies - fsum(clipped)
    room = [max(0.0, share - total) for share, total in zip(plain, clipped, strict=True)]
    if excess <= _EPSILON or fsum(room) <= 0:
        return totals
    factor = excess / fsum(room)
    return [total + space * factor for total, space in zip(clipped, room, strict=True)]


def fill(weights: Sequence[float], limits: Sequence[float], total: float) -> list[float]:
    """Splits `total` by weight with no part above its limit; what is cut off goes to the others by weight."""
    parts = [0.0] * len(weights)
    rest = total
    order = sorted(range(len(weights)), key=lambda place: limits[place] / weights[place])
    weight_rest = fsum(weights)
    for number, place in enumerate(order):
        # By ascending limit per weight: once one part fits below its limit, all that follow do.
        if rest * weights[place] / weight_rest <= limits[place]:
            for later in order[number:]:
                parts[later] = rest * weights[later] / weight_rest
            return parts
        parts[place] = limits[place]
        rest -= limits[place]
        weight_rest = fsum(weights[later] for later in order[number + 1 :]) if number + 1 < len(order) else 0.0
    return parts
