"""What the launch tracker remembers of one attempt, or of the wait for one. Soft state: a new leader begins without."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.control.interface import Action
from coordinator.control.launch_reports import Report, judge, receipt
from coordinator.model import Launch, LaunchState, Monotonic


@dataclass(slots=True)
class Watch:
    """Soft state of one attempt, or of the wait for one."""

    begin_at: Monotonic
    """WAITING: nothing begins before; on the monotonic clock, so that a step of the wall clock changes nothing."""
    ready_since: Monotonic | None = None
    """Since when only a worker is, or was, missing."""
    unfit: dict[str, str] = field(default_factory=dict)
    """Workers that said that they cannot run it at all, and why."""
    ordered_at: Monotonic | None = None
    """When the attempt was ordered in the worker's latest session, or last named by it; None before its order."""
    stop_sent_at: Monotonic | None = None
    """When the worker was told to stop it, last in its latest session; None when it was not."""
    report: Report | None = None
    """The latest report that waits to be proposed."""
    proposed: Report | None = None
    """The report whose proposal is on its way."""
    gone: str = ""
    """Why the worker does not have this running launch any more; empty while it may."""
    backoff_until: Monotonic | None = None
    """Nothing is proposed before: the last proposal failed or was refused."""

    @property
    def has_end(self) -> bool:
        """True once the worker has said its last word of the attempt."""
        return any(report is not None and report.is_final for report in (self.report, self.proposed))

    def hand_on(self, now: Monotonic, next_watch: Watch, before: Launch, after: Launch) -> None:
        """Keeps what is true of the wait for a worker over attempts that are declined."""
        if before.earlier_attempts == after.earlier_attempts:
            is_declined = before.state is LaunchState.COMMITTED
            next_watch.unfit = dict(self.unfit)
            next_watch.ready_since = now if is_declined and self.ready_since is None else self.ready_since


def step_of(launch: Launch) -> tuple[int, bool]:
    """What changes when an attempt begins, and when one is over."""
    return (launch.attempt, launch.state is LaunchState.WAITING)


def answer_all(watch: Watch | None, launch: Launch | None) -> list[Action]:
    """Receipts for the reports that an attempt leaves behind, from the state that ended it."""
    waiting = () if watch is None else (watch.proposed, watch.report)
    return [receipt(report, judge(launch, report) or "") for report in waiting if report is not None]
