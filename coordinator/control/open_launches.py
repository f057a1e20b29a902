"""The launches that have not ended, by job and by worker: soft state of the launch tracker, made from the state.

Invariant: a key is in `by_job`, and in exactly one of `by_worker` (a begun attempt) and `waiting` (none at present).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import TypeAlias, TypeVar

from coordinator.machine.state import LaunchKey, State
from coordinator.model import Launch, LaunchState, LaunchTrigger, WallMs

Member = TypeVar("Member")
_Urgency: TypeAlias = tuple[int, WallMs, LaunchKey]
"""Class of the job, when it was due, and which it is: the smallest is the most urgent."""


class OpenLaunches:
    """An index over launches of the state; whoever changes the state tells it."""

    def __init__(self) -> None:
        self._by_job: dict[str, set[WallMs]] = {}
        self._waiting: dict[str, set[WallMs]] = {}
        self._by_worker: dict[str, set[LaunchKey]] = {}
        self._worker_of: dict[LaunchKey, str] = {}

    def put(self, launch: Launch) -> None:
        """Files a launch that has not ended as it is now."""
        key = launch.key
        self.drop(key)
        self._by_job.setdefault(key[0], set()).add(key[1])
        if launch.state is LaunchState.WAITING:
            self._waiting.setdefault(key[0], set()).add(key[1])
        else:
            self._by_worker.setdefault(launch.worker, set()).add(key)
            self._worker_of[key] = launch.worker

    def drop(self, key: LaunchKey) -> None:
        """Forgets a launch, known or not."""
        _discard(self._by_job, key[0], key[1])
        _discard(self._waiting, key[0], key[1])
        worker = self._worker_of.pop(key, None)
        if worker is not None:
            _discard(self._by_worker, worker, key)

    def of_job(self, job_id: str) -> list[LaunchKey]:
        """All of a job, by scheduled time."""
        return [(job_id, scheduled_at_ms) for scheduled_at_ms in sorted(self._by_job.get(job_id, ()))]

    def waiting_of_job(self, job_id: str) -> list[LaunchKey]:
        """Those of a job that wait, by scheduled time."""
        return [(job_id, scheduled_at_ms) for scheduled_at_ms in sorted(self._waiting.get(job_id, ()))]

    def of_worker(self, node_id: str) -> list[LaunchKey]:
        """Those whose present attempt is a worker's, sorted."""
        return sorted(self._by_worker.get(node_id, ()))

    def scheduled(self, state: State, job_id: str) -> list[Launch]:
        """Those of a job that its schedule made, by scheduled time."""
        return [launch for launch in _found(state, self.of_job(job_id)) if launch.trigger is LaunchTrigger.SCHEDULE]


def most_urgent_first(state: State, keys: Iterable[LaunchKey]) -> list[LaunchKey]:
    """Launches by the class of their jobs, then by when they were due; without those that are gone."""
    known = [key for key in keys if key[0] in state.jobs and key in state.launches]
    return sorted(known, key=lambda key: _urgency(state, key))


class StarvedLaunches:
    """WAITING launches that only a worker is missing for, kept by their urgency: each free slot asks for the first."""

    def __init__(self) -> None:
        self._in_order: list[_Urgency] = []
        self._urgencies: dict[LaunchKey, _Urgency] = {}

    def __len__(self) -> int:
        return len(self._in_order)

    def __iter__(self) -> Iterator[LaunchKey]:
        """The most urgent first, as they are now, whatever becomes of them meanwhile."""
        return (key for _, _, key in tuple(self._in_order))

    def add(self, state: State, key: LaunchKey) -> None:
        """Files one, by what its job is now."""
        self.discard(key)
        urgency = self._urgencies[key] = _urgency(state, key)
        insort(self._in_order, urgency)

    def discard(self, key: LaunchKey) -> None:
        """Forgets one, known or not."""
        urgency = self._urgencies.pop(key, None)
        if urgency is not None:
            del self._in_order[bisect_left(self._in_order, urgency)]


def _urgency(state: State, key: LaunchKey) -> _Urgency:
    return (state.jobs[key[0]].spec.priority_class, state.launches[key].due_ms, key)


def _found(state: State, keys: Iterable[LaunchKey]) -> Iterable[Launch]:
    return (launch for key in keys if (launch := state.launches.get(key)) is not None and not launch.state.has_ended)


def _discard(sets: dict[str, set[Member]], name: str, member: Member) -> None:
    members = sets.get(name)
    if members is not None:
        members.discard(member)
        if not members:
            del sets[name]
