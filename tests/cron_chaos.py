"""What runs of cron jobs did while faults happened, and whether the history accounts for every second of it.

A run appends lines to one file, the sink: `begin TOKEN WORKER`, and after its work `effect TOKEN WORKER`. Short appends
are atomic, so the file is one order of all of them, and it is judged as a store that checks fencing tokens would: an
effect of an attempt counts unless a later attempt of its scheduled time has begun, or the time has had its effect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from coordinator.api.v1 import types_pb2

Time = tuple[str, int]
"""A job and a scheduled time in ms."""

ENDED_RUNS = (
    types_pb2.LAUNCH_STATE_SUCCEEDED,
    types_pb2.LAUNCH_STATE_FAILED,
    types_pb2.LAUNCH_STATE_TIMED_OUT,
    types_pb2.LAUNCH_STATE_CANCELLED,
    types_pb2.LAUNCH_STATE_LOST,
)
NEVER_RAN = (types_pb2.LAUNCH_STATE_MISSED, types_pb2.LAUNCH_STATE_SKIPPED)


def command(sink: str, work: str = "") -> list[str]:
    """A job's command: begin, `work` in shell, effect."""
    line = '"$LAUNCH_TOKEN $LAUNCH_WORKER"'
    say = f"echo begin {line} >> {sink}", work, f"echo effect {line} >> {sink}"
    return ["/bin/sh", "-c", "; ".join(part for part in say if part)]


def time_text(time: Time) -> str:
    """For people."""
    return f"{time[0]} at {time[1] / 1_000:.3f}"


@dataclass
class Sink:
    """What a store that checks tokens makes of the lines."""

    begun: dict[Time, list[tuple[int, str]]] = field(default_factory=dict)
    """Attempts with their workers, in the order in which they began."""
    effects: dict[Time, int] = field(default_factory=dict)
    """The attempt whose effect counted."""
    fenced: list[str] = field(default_factory=list)
    """Effects that were refused: of an attempt that was given up, or of a time that had its effect."""
    problems: list[str] = field(default_factory=list)
    """What must never be."""

    def take(self, line: str) -> None:
        """Takes the next line in."""
        parts = line.split()
        if len(parts) != 3 or parts[0] not in ("begin", "effect"):
            self.problems.append(f"a line that no run writes: {line!r}")
            return
        verb, token, worker = parts
        job_id, scheduled, attempt_text = token.rsplit("/", 2)
        time, attempt = (job_id, int(scheduled)), int(attempt_text)
        begun = self.begun.setdefault(time, [])
        numbers = [number for number, _ in begun]
        if verb == "begin":
            if attempt in numbers:
                self.problems.append(f"{token} began twice: on {dict(begun)[attempt]}, then on {worker}")
            begun.append((attempt, worker))
        elif attempt not in numbers:
            self.problems.append(f"{token} had an effect on {worker} without a beginning")
        elif attempt < max(numbers) or time in self.effects:
            self.fenced.append(token)
        else:
            self.effects[time] = attempt


def read_sink(text: str) -> Sink:
    """All lines of the file."""
    sink = Sink()
    for line in text.splitlines():
        sink.take(line)
    return sink


@dataclass(frozen=True, slots=True)
class Expected:
    """What is asked of one job."""

    job_id: str
    never: bool
    """Its retry policy is `never`."""
    every_s: int = 1
    is_whole: bool = False
    """It catches up and retries until each of its times has had its effect."""


def check(
    jobs: Iterable[Expected], launches: Sequence[types_pb2.Launch], sink: Sink, from_s: int, until_s: int
) -> list[str]:
    """Everything that is wrong; the times from `from_s` up to, not including, `until_s` are accounted for."""
    problems = list(sink.problems)
    entries = Counter((launch.job_id, launch.scheduled_at_unix_ms) for launch in launches)
    problems += [f"{time_text(time)} has {count} entries" for time, count in entries.items() if count > 1]
    by_time = {(launch.job_id, launch.scheduled_at_unix_ms): launch for launch in launches}
    for job in jobs:
        for second in range(from_s, until_s):
            if second % job.every_s == 0:
                time = (job.job_id, second * 1_000)
                problems += _check_time(time, job, by_time.get(time), sink)
    problems += [f"{time_text(time)} began and is not in the history" for time in sink.begun if time not in by_time]
    return problems


def _check_time(time: Time, job: Expected, launch: types_pb2.Launch | None, sink: Sink) -> list[str]:
    begun = sink.begun.get(time, [])
    if launch is None:
        return [f"{time_text(time)} is not accounted for"]
    named = f"{time_text(time)}, {types_pb2.LaunchState.Name(launch.state).removeprefix('LAUNCH_STATE_').lower()}"
    problems = []
    if job.is_whole and launch.state != types_pb2.LAUNCH_STATE_SUCCEEDED:
        problems.append(f"{named}: and it was to run whatever happens: {launch.reason}")
    if job.never and len(begun) > 1:
        problems.append(f"{named}: retry is never, and it began {len(begun)} times: {begun}")
    if launch.state in NEVER_RAN:
        if begun:
            problems.append(f"{named}: though it began on {begun[0][1]}")
        if not launch.reason:
            problems.append(f"{named}: without a reason")
    elif launch.state not in ENDED_RUNS:
        problems.append(f"{named}: has not ended")
    elif launch.state == types_pb2.LAUNCH_STATE_SUCCEEDED:
        if (launch.attempt, launch.worker) not in begun:
            problems.append(f"{named}: attempt {launch.attempt} on {launch.worker} never began, but {begun}")
        if time not in sink.effects:
            problems.append(f"{named}: without an effect; began: {begun}")
    elif not launch.reason and not launch.exit_status:
        problems.append(f"{named}: without a reason")
    if any(attempt > launch.attempt for attempt, _ in begun):
        problems.append(f"{named}: the history knows {launch.attempt} attempts, and there began {begun}")
    return problems


def figures(launches: Iterable[types_pb2.Launch], sink: Sink) -> str:
    """How much happened."""
    states = Counter(types_pb2.LaunchState.Name(launch.state).removeprefix("LAUNCH_STATE_") for launch in launches)
    text = ", ".join(f"{count} {name.lower()}" for name, count in sorted(states.items()))
    again = sum(len(begun) > 1 for begun in sink.begun.values())
    return f"{text}; {len(sink.effects)} effects, {len(sink.fenced)} fenced, {again} times began again"
