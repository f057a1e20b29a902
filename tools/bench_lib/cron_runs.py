"""Runs of jobs that are due every second: how late they started, which were missed, which ran twice. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000
KEPT_UP_SHARE = 0.95
"""A system that starts less than this share of what is due does not keep up."""


@dataclass(frozen=True, slots=True)
class Run:
    """One start of one job, in ns since the epoch."""

    job: str
    due_ns: int
    """When it should have started; with the job its identity."""
    start_ns: int
    """When its own first instruction ran, by the clock of the process that it ran in."""

    @property
    def lateness_ms(self) -> float:
        """How long after its due time it started."""
        return (self.start_ns - self.due_ns) / NS_PER_MS


@dataclass(frozen=True, slots=True)
class Account:
    """What became of one window of seconds."""

    lateness_ms: Sequence[float]
    missed: int
    """Due times without a start; where a system has no timetable, how many runs there are too few."""
    doubled: int
    """Starts beyond the first of a due time."""


def within(runs: Iterable[Run], from_ns: int, until_ns: int) -> list[Run]:
    """Those that were due in the window."""
    return [run for run in runs if from_ns <= run.due_ns < until_ns]


def account(runs: Iterable[Run], jobs: Iterable[str], from_s: int, until_s: int) -> Account:
    """For jobs that are due once in every second of the window; `from_s` and `until_s` in whole seconds."""
    inside = within(runs, from_s * NS_PER_S, until_s * NS_PER_S)
    firsts: dict[tuple[str, int], int] = {}
    for run in inside:
        key = (run.job, run.due_ns)
        firsts[key] = min(run.start_ns, firsts.get(key, run.start_ns))
    counts: dict[str, int] = {}
    for job, _ in firsts:
        counts[job] = counts.get(job, 0) + 1
    return Account(
        lateness_ms=[(start_ns - due_ns) / NS_PER_MS for (_, due_ns), start_ns in firsts.items()],
        missed=sum(max(0, until_s - from_s - counts.get(job, 0)) for job in jobs),
        doubled=len(inside) - len(firsts),
    )


def per_s(runs: Iterable[Run], from_ns: int, until_ns: int) -> float:
    """Starts per second in the window, whenever they were due."""
    count = sum(from_ns <= run.start_ns < until_ns for run in runs)
    return count * NS_PER_S / (until_ns - from_ns)


def most_per_s(jobs: Iterable[int], rate_of: Callable[[int], float]) -> float:
    """The highest rate that was seen, with more and more jobs until a rate falls short of them."""
    highest = 0.0
    for count in jobs:
        rate = rate_of(count)
        highest = max(highest, rate)
        if rate < count * KEPT_UP_SHARE:
            break
    return highest


def first_after_s(runs: Iterable[Run], killed_ns: int, dead_ns: int) -> float:
    """Seconds from a kill until the first start of what became due once the process was surely dead."""
    starts = [run.start_ns for run in runs if run.due_ns > dead_ns]
    return (min(starts) - killed_ns) / NS_PER_S if starts else math.inf


def parse_ours(text: str, offset_ns: dict[str, int]) -> list[Run]:
    """Lines `job/scheduled_ms/attempt start_ns`; `offset_ns` is how long after its scheduled times each job is due."""
    runs = []
    for line in text.splitlines():
        token, start = line.split()
        job, scheduled_ms, _ = token.rsplit("/", 2)
        runs.append(Run(job, int(scheduled_ms) * NS_PER_MS + offset_ns.get(job, 0), int(start)))
    return runs


def parse_timed(text: str) -> list[Run]:
    """Lines `job due_ns start_ns`."""
    return [Run(job, int(due), int(start)) for job, due, start in map(str.split, text.splitlines())]


def parse_relative(text: str) -> list[Run]:
    """Lines `job sent_ns start_ns` of a scheduler whose runs are due one second after the one before was sent."""
    by_job: dict[str, list[tuple[int, int]]] = {}
    for line in text.splitlines():
        job, sent, start = line.split()
        by_job.setdefault(job, []).append((int(sent), int(start)))
    runs = []
    for job, pairs in by_job.items():
        pairs.sort()
        for (sent_before_ns, _), (_, start_ns) in itertools.pairwise(pairs):
            runs.append(Run(job, sent_before_ns + NS_PER_S, start_ns))
    return runs
