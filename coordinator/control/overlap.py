"""Overlap policies: what becomes of a launch while earlier ones of its job have not ended. Pure.

Two questions are answered from the launches of one job that its schedule made and that have not ended. Manual launches
stand beside the policy: they are never among these.

1. `judge`: a scheduled time is due. Is it launched, committed as WAITING, or recorded as skipped?
2. `may_begin`: which of the WAITING launches may begin their next attempt, as far as the others allow?

A launch has *begun* once it had an attempt: a retry that waits has begun and has not ended. With `allow` at most
`overlap_limit` launches that have begun exist at once; with every other policy one, for

    what runs holds up all others; a retry that waits holds up those that have not begun, and later retries;
    what has not begun holds up what is later and has not begun.

That is an order, so exactly one can go on, whatever a change of the policy left behind. Launches of a catch-up are
committed WAITING, not skipped because of each other, and take their turns by the same rules; they take no place in the
queue of `queue`, and a time that is due goes before those of them that have not begun with `skip`, where the one whose
turn comes first is the first. A time that was decided within its start deadline, and only waits for its slot because
it was late (slots.py), is as good as begun for the times after it: they are judged as if it had started at once.

Both answers hold for one moment of the state, so a decision of a job and the begin of one of its WAITING launches are
never on their way at once (cron.py and launches.py see to that).

3. `superseded`: with `cancel_previous`, which launches the latest one replaces. It is read from the state, so a new
leader finds the same: those earlier than the latest launch that waits and is not one of a catch-up.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.control.schedule import format_wall
from coordinator.model import CronJobSpec, Launch, LaunchState, OverlapPolicy


class Verdict(enum.Enum):
    """What becomes of a scheduled time that is due."""

    LAUNCH = "launch"
    WAIT = "wait"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict, and why for people; empty for LAUNCH."""

    verdict: Verdict
    reason: str = ""


def judge(spec: CronJobSpec, open_launches: Sequence[Launch]) -> Judgement:
    """The verdict on a time that is due, given the job's launches that have not ended, by scheduled time."""
    begun = [launch for launch in open_launches if has_begun(launch) or is_only_late(spec, launch)]
    match spec.overlap:
        case OverlapPolicy.ALLOW if len(begun) >= spec.overlap_limit:
            reason = f"{len(begun)} launches have not ended, overlap_limit = {spec.overlap_limit}"
            return Judgement(Verdict.SKIP, reason)
        case OverlapPolicy.SKIP if begun:
            return Judgement(Verdict.SKIP, f"previous launch of {_clock(begun[-1])} {_doing(begun[-1])}")
        case OverlapPolicy.QUEUE if open_launches:
            queued = sum(not has_begun(launch) and not is_paced(launch) for launch in open_launches)
            if queued >= spec.overlap_limit:
                return Judgement(Verdict.SKIP, f"{queued} launches wait already, overlap_limit = {spec.overlap_limit}")
            return Judgement(Verdict.WAIT, f"waits for the end of the launch of {_clock(open_launches[-1])}")
        case OverlapPolicy.CANCEL_PREVIOUS if open_launches:
            return Judgement(Verdict.WAIT, f"waits until the launch of {_clock(open_launches[-1])} has stopped")
        case _:
            return Judgement(Verdict.LAUNCH)


def may_begin(spec: CronJobSpec, open_launches: Sequence[Launch]) -> list[Launch]:
    """The WAITING launches that the others do not hold up."""
    waiting = [launch for launch in open_launches if launch.state is LaunchState.WAITING]
    retries = [launch for launch in waiting if has_begun(launch)]
    new = [launch for launch in waiting if not has_begun(launch)]
    if spec.overlap is OverlapPolicy.ALLOW:
        begun = len(open_launches) - len(new)
        return retries + new[: max(0, spec.overlap_limit - begun)]
    if len(waiting) < len(open_launches):
        return []
    if spec.overlap is OverlapPolicy.SKIP:
        new.sort(key=lambda launch: (launch.not_before_ms, launch.scheduled_at_ms))
    return (retries or new)[:1]


def superseded(spec: CronJobSpec, open_launches: Sequence[Launch]) -> tuple[list[Launch], str]:
    """The launches that shall stop or never start because a later one takes their place, and why."""
    if spec.overlap is not OverlapPolicy.CANCEL_PREVIOUS:
        return [], ""
    newest = next((launch for launch in reversed(open_launches) if _replaces(launch)), None)
    if newest is None:
        return [], ""
    earlier = [launch for launch in open_launches if launch.scheduled_at_ms < newest.scheduled_at_ms]
    return [launch for launch in earlier if not launch.cancel_reason], f"the launch of {_clock(newest)} takes its place"


def has_begun(launch: Launch) -> bool:
    """True once it had an attempt."""
    return launch.attempt > 0


def is_paced(launch: Launch) -> bool:
    """True for one that waits for its slot after an outage."""
    return launch.state is LaunchState.WAITING and not has_begun(launch) and launch.not_before_ms > 0


def is_only_late(spec: CronJobSpec, launch: Launch) -> bool:
    """True for one that waits for its slot, and was decided while it could still start within its deadline."""
    return is_paced(launch) and launch.committed_ms - launch.due_ms <= round(spec.start_deadline_s * 1_000)


def _replaces(launch: Launch) -> bool:
    return launch.state is LaunchState.WAITING and not has_begun(launch) and not is_paced(launch)


def _clock(launch: Launch) -> str:
    return format_wall(launch.scheduled_at_ms)[11:]


def _doing(launch: Launch) -> str:
    match launch.state:
        case LaunchState.RUNNING:
            return f"still running on {launch.worker}"
        case LaunchState.COMMITTED:
            return f"not started yet on {launch.worker}"
        case _:
            return f"waits for attempt {launch.attempt + 1}" if has_begun(launch) else "waits for its turn"
