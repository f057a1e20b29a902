"""Owners and backups of cron jobs: by the ring with bounded loads, and sticky.

An owner stays while it may receive and holds no more jobs than its bound. One that is suspect, down,
draining or gone is replaced by its first good backup, so that the next launch goes where the job is already
known. A backup stays until it is down, draining or gone; that it is suspect for a moment changes nothing,
since a suspect backup is passed over anyway. Jobs carry no data, so a newcomer gets its part at once: what
owners hold above their bound.

A job with `required_labels` is only for workers that have them all: an owner or backup without them loses it. It leaves
an owner above its bound only for a worker with room that has the labels, too.

While no worker (with the labels) may receive, everything stays as it is: an owner that comes back finds its jobs. A
job whose labels no worker has ever had, or has now, has no owner.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from coordinator.config import PlacementSettings
from coordinator.machine.state import State
from coordinator.model import CronJob, Node, NodeState
from coordinator.placement.board import RingOf, is_drained, member_of
from coordinator.placement.ring import Ring, name_position
from coordinator.placement.shares import band_around, fill

JobAssignment = tuple[str, str, tuple[str, ...]]
"""Job id, owner, backups in their order."""


class JobPlacer:
    """One round of decisions about jobs."""

    def __init__(self, state: State, settings: PlacementSettings, ring_of: RingOf) -> None:
        self._jobs = sorted(state.jobs.values(), key=lambda job: (not job.spec.required_labels, job.id))
        """Those that require labels first: they have the smaller choice."""
        self._by_id = {job.id: job for job in self._jobs}
        self._nodes: dict[str, Node] = dict(sorted(state.nodes.items()))
        self._members = {
            node.id: member_of(node) for node in self._nodes.values() if node.may_receive and not is_drained(node)
        }
        self._ring_of = ring_of
        self._ring: Ring | None = None
        self._cron_backups = settings.cron_backups
        self._labelled = {
            required: frozenset(name for name in self._members if self._nodes[name].has_labels(required))
            for required in {job.spec.required_labels for job in self._jobs}
        }
        """The workers that may receive, for each set of labels that a job requires."""
        self._paused = state.settings.rebalance_paused
        weights = [member.weight for member in self._members.values()]
        self._owned: Counter[str] = Counter()
        self._backed: Counter[str] = Counter()
        self._owned_max = self._bounds(weights, len(self._jobs), settings.load_bound)
        backups = sum(self._backups_wanted(job) for job in self._jobs)
        self._backed_max = self._bounds(weights, backups, settings.load_bound)

    def _bounds(self, weights: list[float], total: int, load_bound: float) -> dict[str, int]:
        shares = fill(weights, [float(max(total, 1))] * len(weights), float(total)) if weights else []
        return {name: band_around(share, load_bound).high for name, share in zip(self._members, shares, strict=True)}

    def _fit(self, job: CronJob) -> frozenset[str]:
        """The workers that may receive the job."""
        return self._labelled[job.spec.required_labels]

    def _backups_wanted(self, job: CronJob) -> int:
        return min(self._cron_backups, max(0, len(self._fit(job)) - 1))

    def decide(self) -> list[JobAssignment]:
        """The jobs whose owner or backups must change."""
        if not self._members or not self._jobs:
            return []
        owners = self._choose_owners()
        changes = []
        kept = {job.id: self._kept_backups(job, owners[job.id]) for job in self._jobs}
        for backups in kept.values():
            self._backed.update(backups)
        for job in self._jobs:
            backups = kept[job.id]
            while len(backups) < self._backups_wanted(job) and owners[job.id]:
                backups.append(self._choose_backup(job, owners[job.id], backups))
            if (owners[job.id], tuple(backups)) != (job.owner, job.backups):
                changes.append((job.id, owners[job.id], tuple(backups)))
        return changes

    def _choose_owners(self) -> dict[str, str]:
        owners = {job.id: job.owner for job in self._jobs if job.owner in self._fit(job)}
        self._owned.update(owners.values())
        if not self._paused:
            for job_id in self._over_bound(owners):
                self._owned[owners.pop(job_id)] -= 1
        for job in self._jobs:
            if job.id not in owners:
                owners[job.id] = self._new_owner(job)
                self._owned[owners[job.id]] += 1
        return owners

    def _over_bound(self, owners: dict[str, str]) -> list[str]:
        """Jobs that owners above their bound give away: those that the ring puts farthest from them."""
        by_owner: dict[str, list[str]] = {}
        for job_id, owner in sorted(owners.items()):
            by_owner.setdefault(owner, []).append(job_id)
        leaving: list[str] = []
        for owner, job_ids in sorted(by_owner.items()):
            excess = len(job_ids) - self._owned_max[owner]
            if excess > 0:
                ring = self._get_ring()
                movable = [job_id for job_id in job_ids if self._has_elsewhere(job_id, owner)]
                far = sorted(movable, key=lambda job_id: (-ring.distance(name_position(job_id), owner), job_id))
                leaving += far[:excess]
        return leaving

    def _has_elsewhere(self, job_id: str, owner: str) -> bool:
        """True unless only workers without room have the labels that the job requires."""
        job = self._by_id[job_id]
        others = self._fit(job) - {owner}
        return not job.spec.required_labels or any(self._owned[name] < self._owned_max[name] for name in others)

    def _new_owner(self, job: CronJob) -> str:
        fit = self._fit(job)
        if not fit:
            # It stays with an owner that has the labels and may come back.
            owner = self._nodes.get(job.owner)
            stays = owner is not None and owner.has_labels(job.spec.required_labels)
            return job.owner if stays and owner is not None and owner.state is not NodeState.LEFT else ""
        if job.owner and job.owner not in fit:
            good = [name for name in job.backups if name in fit]
            if good:
                return good[0]
        return self._pick(job, lambda name: self._owned[name] < self._owned_max[name], frozenset(), frozenset())

    def _kept_backups(self, job: CronJob, owner: str) -> list[str]:
        kept = [name for name in job.backups if name != owner and self._may_back(job, name)]
        return kept[: self._backups_wanted(job)] if self._fit(job) else kept

    def _may_back(self, job: CronJob, name: str) -> bool:
        node = self._nodes.get(name)
        if node is None or not node.has_labels(job.spec.required_labels):
            return False
        return node.state is NodeState.ACTIVE and not is_drained(node)

    def _choose_backup(self, job: CronJob, owner: str, backups: list[str]) -> str:
        taken = frozenset((owner, *backups))
        zones = frozenset(self._nodes[name].zone for name in taken if name in self._nodes and self._nodes[name].zone)
        name = self._pick(job, lambda name: self._backed[name] < self._backed_max[name], taken, zones)
        self._backed[name] += 1
        return name

    def _pick(self, job: CronJob, has_room: Callable[[str], bool], taken: frozenset[str], zones: frozenset[str]) -> str:
        """The ring's choice: with room and in another zone, else in another zone, else with room, else anybody."""
        ring, position, members = self._get_ring(), name_position(job.id), self._members
        free = self._fit(job) - taken
        tests: tuple[Callable[[str], bool], ...] = (
            lambda name: name in free and members[name].zone not in zones and has_room(name),
            lambda name: name in free and members[name].zone not in zones,
            lambda name: name in free and has_room(name),
            lambda name: name in free,
        )
        for test in tests:
            if any(test(name) for name in free):
                found = ring.first(position, test)
                if found is not None:
                    return found[1]
        raise AssertionError(f"job {job.id}: nobody is left to pick, although fewer are wanted than there are workers")

    def _get_ring(self) -> Ring:
        if self._ring is None:
            self._ring = self._ring_of(tuple(self._members.values()))
        return self._ring
