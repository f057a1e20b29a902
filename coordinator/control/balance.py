"""Keeps the map as the planner wants it: first replicas, moves within the budgets, owners of jobs.

The planner is pure and costs time in proportion to the shards, so the art here is when to ask it:

- A change of a worker, of the settings, of the set of shards, or the end of a move asks for a plan. Plans come no
  closer together than `plan_interval_s`, which grows with the number of shards, so that planning leaves the leader most
  of its time however large the map is.
- While a plan holds moves, whether the budgets admit them yet or not, the next one follows within a second.
- When waiting alone may change the plan (a hold, a dwell), the plan says when.
- Otherwise nothing is planned at all.

No plan is made while an answer to the last one's proposals is awaited: the state would not show them, and the budgets
would be spent twice.

The first replicas are a decision that is cheap to make once and dear to correct by moves. So they wait until as many
workers as a shard wants are there and no further one has come for `SETTLE_QUIET_S`, but not longer than `SETTLE_S_MAX`
after the first one came: workers that start together share from the start. Jobs without an owner wait along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from coordinator.api.v1 import command_pb2, types_pb2
from coordinator.config import PlacementSettings
from coordinator.control.interface import Action, Applied, Event, ProposalEnded, Step, Tokens
from coordinator.control.proposals import Outcome, Proposals
from coordinator.control.stalls import Stalls
from coordinator.control.timers import earliest
from coordinator.machine.state import (
    JobChanged,
    MoveChanged,
    NodeChanged,
    SettingsChanged,
    ShardChanged,
    State,
)
from coordinator.model import CronJob, Monotonic, Node, WallMs
from coordinator.placement.plan import Plan, PlannedMove
from coordinator.placement.planner import Planner

SETTLE_QUIET_S = 1.0
SETTLE_S_MAX = 5.0
ASSIGNMENTS_PER_COMMAND = 2_000
"""First assignments in one command: at 80 bytes each (two names of 30) 160 kB, below the limit of 1 MiB."""
DEBOUNCE_S = 0.02
"""Changes that come together are planned together."""
PLAN_INTERVAL_S_MIN = 0.1
PLAN_INTERVAL_S_PER_SHARD = 0.000_1
"""A plan takes up to 75 microseconds per shard (5 s for 65,536 of them)."""
WAITING_S = 1.0
"""How soon a plan follows one with moves, if nothing happens before; also the pause after a refused proposal."""


class BalanceControl:
    """The balance controller of one leader."""

    def __init__(
        self,
        state: State,
        settings: PlacementSettings,
        tokens: Tokens,
        now: Monotonic,
        planner: Planner | None = None,
        crowded: Callable[[], frozenset[str]] = frozenset,
        stalls: Stalls | None = None,
    ) -> None:
        self._state = state
        self._planner = planner or Planner(settings)
        self._crowded = crowded
        self._stalls = stalls if stalls is not None else Stalls()
        self._firsts = Proposals("assign", tokens)
        self._starts = Proposals("balance", tokens)
        self._owners = Proposals("jobs", tokens)
        self._unassigned = {shard.id for shard in state.shards.values() if shard.epoch == 0}
        self._receivers = {node.id for node in state.nodes.values() if node.may_receive}
        self._first_came_at: Monotonic | None = now if self._receivers else None
        self._last_came_at = now
        self._firsts_due = now
        self._plan: Plan | None = None
        self._planned_without: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
        """Who was crowded, and who was avoided, when the latest plan was made."""
        self._planned_at = Monotonic(float("-inf"))
        self._plan_due: Monotonic | None = now
        self._jobs_due: Monotonic | None = now

    def plan(self) -> Plan | None:
        """The latest plan with its refusals; None before the first one."""
        return self._plan

    @property
    def plan_interval_s(self) -> float:
        """Least time between two plans."""
        return max(PLAN_INTERVAL_S_MIN, PLAN_INTERVAL_S_PER_SHARD * len(self._state.shards))

    # Controller

    def on_event(self, now: Monotonic, wall: WallMs, event: Event) -> Step:
        """Takes an event in."""
        match event:
            case Applied():
                self._state = event.state
                for change in event.changes:
                    match change:
                        case NodeChanged():
                            self._take_node(now, change)
                        case ShardChanged():
                            self._take_shard(now, change)
                        case MoveChanged():
                            if change.after.has_ended:
                                self._ask_plan(now)
                        case JobChanged():
                            self._take_job(now, change)
                        case SettingsChanged():
                            self._ask_plan(now)
                            self._ask_jobs(now)
                        case _:
                            pass
            case ProposalEnded():
                self._take_end(now, event)
            case _:
                pass
        return self._step(now, wall)

    def on_advance(self, now: Monotonic, wall: WallMs) -> Step:
        """Takes the passing of time in."""
        return self._step(now, wall)

    def _take_node(self, now: Monotonic, change: NodeChanged) -> None:
        if change.after is not None and change.after.may_receive:
            if change.after.id not in self._receivers:
                self._receivers.add(change.after.id)
                self._last_came_at = now
                self._first_came_at = now if self._first_came_at is None else self._first_came_at
        else:
            node = change.after or change.before
            self._receivers.discard(node.id if node is not None else "")
            if not self._receivers:
                self._first_came_at = None
        if _what_matters(change.before) != _what_matters(change.after):
            self._ask_plan(now)
            self._ask_jobs(now)

    def _take_shard(self, now: Monotonic, change: ShardChanged) -> None:
        before, after = change.before, change.after
        if before is not None and (after is None or after.epoch > 0):
            self._unassigned.discard(before.id)
        if after is not None:
            if after.epoch == 0:
                self._unassigned.add(after.id)
        if before is None or after is None or before.may_change != after.may_change:
            self._ask_plan(now)
        elif len(after.in_sync) < len(before.in_sync):
            # Its primary goes on without a replica that lagged: nothing else tells of that.
            self._ask_plan(now)

    def _take_job(self, now: Monotonic, change: JobChanged) -> None:
        before, after = change.before, change.after
        if before is None or after is None or _where(before) != _where(after):
            self._ask_jobs(now)

    def _take_end(self, now: Monotonic, event: ProposalEnded) -> None:
        self._firsts.end(now, event)
        started = self._starts.end(now, event)
        if started is not None and started.outcome is not Outcome.APPLIED:
            self._ask_plan(now, 0.0 if started.outcome is Outcome.STALE else WAITING_S)
        owned = self._owners.end(now, event)
        if owned is not None and owned.outcome is not Outcome.APPLIED:
            self._ask_jobs(now)

    def _ask_plan(self, now: Monotonic, after_s: float = 0.0) -> None:
        due = Monotonic(max(now + DEBOUNCE_S + after_s, self._planned_at + self.plan_interval_s))
        self._plan_due = earliest(self._plan_due, due)

    def _ask_jobs(self, now: Monotonic) -> None:
        self._jobs_due = earliest(self._jobs_due, Monotonic(now + DEBOUNCE_S))

    # Decisions

    def _step(self, now: Monotonic, wall: WallMs) -> Step:
        if (self._crowded(), self._stalls.avoided(now)) != self._planned_without:
            self._ask_plan(now)
        if not self._state.cluster_id:
            return Step()
        settled_at = self._settled_at()
        is_waiting = bool(self._unassigned) and (settled_at is None or now < settled_at)
        actions: list[Action] = []
        if self._unassigned and not is_waiting:
            actions += self._assign_firsts(now)
        if not is_waiting and self._jobs_due is not None and now >= self._jobs_due:
            if self._owners.is_free(now, self._state.index, "all"):
                actions += self._assign_jobs(now)
        if not self._unassigned and self._plan_due is not None and now >= self._plan_due and not len(self._starts):
            actions += self._start_moves(now, wall)
        return Step(tuple(actions), self._next_wake(now, settled_at if is_waiting else None))

    def _settled_at(self) -> Monotonic | None:
        """When the first replicas may be given out; None while there is no worker to give them to."""
        if self._first_came_at is None:
            return None
        latest = self._first_came_at + SETTLE_S_MAX
        if len(self._receivers) < self._state.settings.replicas:
            return Monotonic(latest)
        return Monotonic(min(latest, self._last_came_at + SETTLE_QUIET_S))

    def _next_wake(self, now: Monotonic, settled_at: Monotonic | None) -> Monotonic | None:
        times = [settled_at]
        if self._unassigned and settled_at is None and not len(self._firsts):
            times.append(self._firsts_due)
        if settled_at is None and not len(self._owners):
            times.append(self._jobs_due)
        if not self._unassigned and not len(self._starts):
            times.append(self._plan_due)
        times.append(self._stalls.next_end())
        # What is due and could not be done now waits for an event, or for the rest of a proposal.
        times.append(self._owners.next_free(now) if self._jobs_due is not None else None)
        return earliest(*(time for time in times if time is not None and time > now))

    def _assign_firsts(self, now: Monotonic) -> Iterator[Action]:
        """First replicas of every shard that never had one, decided at once and proposed in parts."""
        if len(self._firsts) or now < self._firsts_due:
            return
        self._firsts_due = Monotonic(now + WAITING_S)
        assignments = [
            command_pb2.AssignShards.Assignment(shard_id=shard_id, replicas=replicas)
            for shard_id, replicas in self._planner.assign_initial(self._state)
            if replicas
        ]
        for start in range(0, len(assignments), ASSIGNMENTS_PER_COMMAND):
            part = command_pb2.AssignShards(assignments=assignments[start : start + ASSIGNMENTS_PER_COMMAND])
            command = command_pb2.Command(assign_shards=part)
            yield from self._firsts.propose(now, self._state.index, str(start), command)

    def _assign_jobs(self, now: Monotonic) -> Iterator[Action]:
        """Owners and backups of the jobs whose present ones are not the planner's choice."""
        wanted = [
            command_pb2.AssignJobs.Assignment(job_id=job_id, owner=owner, backups=backups)
            for job_id, owner, backups in self._planner.assign_jobs(self._state)
            if (job := self._state.jobs.get(job_id)) is not None and (job.owner, job.backups) != (owner, tuple(backups))
        ]
        command = command_pb2.Command(assign_jobs=command_pb2.AssignJobs(assignments=wanted))
        self._jobs_due = None
        if wanted:
            yield from self._owners.propose(now, self._state.index, "all", command)

    def _start_moves(self, now: Monotonic, wall: WallMs) -> Iterator[Action]:
        """Makes a plan and proposes the moves of it that the budgets admit."""
        self._planned_at = now
        now_ms = max(wall, self._state.time_ms)
        self._planned_without = crowded, avoided = self._crowded(), self._stalls.avoided(now)
        self._plan = plan = self._planner.plan(self._state, now_ms, crowded, avoided)
        self._plan_due = self._next_plan_at(now, now_ms, plan)
        for move in plan.moves:
            if move.within_budget:
                command = command_pb2.Command(start_move=_start_move(move))
                yield from self._starts.propose(now, self._state.index, str(move.shard_id), command)

    def _next_plan_at(self, now: Monotonic, now_ms: WallMs, plan: Plan) -> Monotonic | None:
        """When to plan again if nothing changes; None when only a change could make another plan."""
        waits_s: list[float] = [WAITING_S] if plan.moves else []
        if plan.wake_ms is not None:
            waits_s.append(max((plan.wake_ms - now_ms) / 1_000, WAITING_S))
        return Monotonic(now + max(min(waits_s), self.plan_interval_s)) if waits_s else None


def _what_matters(node: Node | None) -> tuple[object, ...] | None:
    """What the planner reads of a worker."""
    if node is None:
        return None
    return (node.state, node.is_suspect, node.drain_requested, node.weight, node.zone, node.labels)


def _where(job: CronJob) -> tuple[object, ...]:
    """Where a job is, and what its place depends on."""
    return (job.owner, job.backups, job.spec.required_labels)


def _start_move(move: PlannedMove) -> command_pb2.StartMove:
    return command_pb2.StartMove(
        shard_id=move.shard_id,
        source=move.source,
        target=move.target,
        kind=types_pb2.MoveKind.ValueType(move.kind.value),
        reason=move.reason,
        expected_epoch=move.expected_epoch,
    )
