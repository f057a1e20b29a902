"""The primary of one shard: numbers writes, has them on every needed disk, answers while its leases hold.

    WAITING     not formed yet, or an earlier process has used this epoch      Assigned
    RECOVERING  waits out own promises; brings all needed disks to its log     done -> SERVING (-> CEDING)
    SERVING     reads and writes                             cede_to or is_sealed, epoch on disk -> CEDING
    CEDING      stopped; finishes what is in flight, tells its target          done -> CEDED
    CEDED       never serves again in this epoch

- Committed = on its own disk and on all needed ones (replica_streams.py says who is needed). Then applied, then
  acknowledged. With nobody needed, the worker's session lease stands in for the replicas' leases, for writes too.
- (sequence, epoch) is used once: a record that was sent keeps its place although its own disk was full, and an epoch
  that an earlier process of this worker may have used is never used again.
- Group commit: one append is on its way; what arrives meanwhile goes with the next one, and in one message.
- A full disk: what nobody else can have is refused definitely, the rest may be applied and keeps its place; reads go
  on, writes are refused until an attempt succeeds.
"""

from __future__ import annotations

import enum
from collections import deque

from coordinator.model import Monotonic
from coordinator.model.errors import CoordinatorError, NotPrimary, OutcomeUnknown, Overloaded
from worker_agent.replica_core import NEVER, Core
from worker_agent.replica_follower import Phase, Tail
from worker_agent.replica_messages import record_bytes, to_us
from worker_agent.replica_streams import Streams
from worker_agent.shard_interface import (
    AppendRecords,
    ApplyLog,
    Barrier,
    Progress,
    ReportReplica,
    Settle,
    ShardView,
    Submit,
    TruncateLog,
)
from worker_agent.store_interface import LogRecord, StoreFull

IN_FLIGHT_RECORDS_MAX = 4_096
IN_FLIGHT_BYTES_MAX = 16 << 20
"""Of writes that are not settled; more are refused with Overloaded."""
BARRIERS_MAX = 10_000
WAKE_S_MIN = 0.002
"""Nothing here is more urgent: what is due waits for an event, or for this."""


class State(enum.Enum):
    """See above."""

    WAITING = "waiting"
    RECOVERING = "recovering"
    SERVING = "serving"
    CEDING = "ceding"
    CEDED = "ceded"


class Primary:
    """One replica while it is primary."""

    def __init__(self, core: Core, now: Monotonic, view: ShardView, fresh_at: Monotonic, *, is_barred: bool) -> None:
        self._core = core
        self._disk = core.disk
        self._is_barred = is_barred
        self._tail = Tail(core.disk.last)
        self.streams = Streams(core, self._tail)
        self.view = view
        self.since_epoch = view.epoch
        """Answers of this epoch or a later one are answers to this primary's time."""
        self.state = State.WAITING
        self._tokens: deque[tuple[int, int, int]] = deque()
        """(sequence, token, bytes) of writes that are not settled."""
        self._in_flight_bytes = 0
        self._doubted_until = 0
        """Records up to there may wait without a token: who decides on a write cannot see them before they apply."""
        self._barriers: deque[tuple[int, int]] = deque()
        self._cede_deadline = NEVER
        self._word_deadline = NEVER
        self._has_sent_ceded = False
        self._looked_at = now
        self.fresh_at = fresh_at
        self.streams.committed = core.disk.applying
        core.disk.ask_for_tail(core.node_id)
        self.follow(now, view)

    def may_continue(self, view: ShardView) -> bool:
        """True when it may go on serving at a later epoch: it serves, and already needs everybody whom that needs."""
        needed = {follower.node_id for follower in self.streams.needed}
        return self.state is State.SERVING and needed.issuperset(set(view.in_sync) - {self._core.node_id})

    def follow(self, now: Monotonic, view: ShardView) -> None:
        """Takes the assignment over: a set that changed, or a wish to cede."""
        self.view = view
        self.streams.follow_view(now, view)
        if self.state is State.WAITING and view.is_formed and not self._is_barred:
            self.state = State.RECOVERING
        self._stop_if_asked(now)

    # What others may ask

    @property
    def is_serving(self) -> bool:
        """True when it answers, leases permitting."""
        return self.state is State.SERVING

    def may_read(self, now: Monotonic) -> bool:
        """True when what is applied now is what a read may show."""
        if self.state is not State.SERVING:
            return False
        return self.streams.have_leases(now) or not self._core.protections.checks_lease

    def age_s(self, now: Monotonic) -> float:
        """How long ago nobody else can have committed anything: 0 while it may answer."""
        return 0.0 if self.may_read(now) else now - self.fresh_at

    def lagging(self, now: Monotonic) -> dict[str, str]:
        """In-sync replicas to be taken out, with why."""
        return self.streams.lagging(now) if self.state not in (State.WAITING, State.CEDED) else {}

    def report(self, now: Monotonic, epoch: int) -> ReportReplica:
        """What the leader is to hear."""
        lagging = self.lagging(now)
        progress = Progress.CEDED if self.state is State.CEDED else Progress.ACCEPTED
        caught_up = tuple(node_id for node_id in self.streams.told() if node_id not in lagging)
        reasons = [*lagging.values(), *([self._core.block_reason] if self._core.block_reason else [])]
        return ReportReplica(epoch, progress, caught_up, tuple(lagging), "; ".join(reasons))

    def validate(self) -> None:
        """Raises AssertionError when an invariant is broken."""
        disk = self._disk
        assert self._tail.last >= disk.last, "the log in memory ends at or behind the disk's"
        assert self.streams.committed >= disk.applying, "only what is committed is applied"
        assert self._in_flight_bytes == sum(size for _, _, size in self._tokens), "bytes in flight are counted"
        for follower in self.streams.followers.values():
            assert follower.durable < follower.next, f"{follower.node_id} has what it was not sent"
            assert follower.is_counted or not follower.is_told or not self._core.protections.needs_before_report

    # Requests

    def on_submit(self, now: Monotonic, submit: Submit) -> None:
        """A write."""
        refusal = self._refusal(now)
        if refusal is not None:
            self._settle(submit.token, error=refusal)
            return
        record = LogRecord(self._tail.last + 1, self.view.epoch, submit.time_ms, submit.payload)
        size = record_bytes(record)
        self._tail.append(record)
        self._tokens.append((record.sequence, submit.token, size))
        self._in_flight_bytes += size

    def _refusal(self, now: Monotonic) -> CoordinatorError | None:
        core, shard_id = self._core, self._core.shard_id
        if self.state is not State.SERVING:
            return self._not_primary()
        if now < core.blocked_until or self._disk.position.applied < self._doubted_until:
            return StoreFull(
                f"worker {core.node_id} cannot write shard {shard_id} ({core.block_reason}); make room on its disk, "
                "reads go on"
            )
        if len(self._tokens) >= IN_FLIGHT_RECORDS_MAX or self._in_flight_bytes >= IN_FLIGHT_BYTES_MAX:
            return Overloaded(f"{len(self._tokens)} writes of shard {shard_id} are on their way; try again later")
        if not self.streams.needed and not core.has_session_lease(now):
            return NotPrimary(
                f"worker {core.node_id} has the only copy of shard {shard_id} and no lease of the masters; try again",
                shard_id=shard_id,
            )
        return None

    def _not_primary(self) -> NotPrimary:
        core, target = self._core, self.view.cede_to
        if self.state in (State.CEDING, State.CEDED):
            goes = f"cedes shard {core.shard_id} to {target}" if target else f"has stopped shard {core.shard_id}"
            return NotPrimary(f"worker {core.node_id} {goes}; ask again", target, shard_id=core.shard_id)
        return NotPrimary(
            f"worker {core.node_id} is about to serve shard {core.shard_id}; ask again", core.node_id, "", core.shard_id
        )

    def on_barrier(self, now: Monotonic, barrier: Barrier) -> None:
        """A read that wants to be sure."""
        if self.state is not State.SERVING:
            self._settle(barrier.token, error=self._not_primary())
        elif self.may_read(now):
            self._settle(barrier.token, sequence=self._disk.position.applied)
        elif len(self._barriers) >= BARRIERS_MAX:
            self._settle(barrier.token, error=Overloaded("too many reads wait for a lease; try again later"))
        else:
            now_us = to_us(now)
            self._barriers.append((now_us, barrier.token))
            self.streams.beat(now, [each for each in self.streams.needed if each.sent_us < now_us])

    def _settle(self, token: int, *, sequence: int = 0, error: CoordinatorError | None = None) -> None:
        self._core.actions.append(Settle(token, sequence, error))

    def _settle_barriers(self, now: Monotonic) -> None:
        while self._barriers:
            since_us, token = self._barriers[0]
            is_sure = self.may_read(now) or (self.streams.needed and self.streams.all_answered(since_us))
            if not is_sure:
                return
            self._barriers.popleft()
            self._settle(token, sequence=self._disk.position.applied)

    def _settle_applied(self) -> None:
        applied = self._disk.position.applied
        while self._tokens and self._tokens[0][0] <= applied:
            sequence, token, size = self._tokens.popleft()
            self._in_flight_bytes -= size
            self._settle(token, sequence=sequence)

    def end(self, error: NotPrimary) -> None:
        """It is primary no more: everything that waits is settled."""
        for _, token in self._barriers:
            self._settle(token, error=error)
        self._barriers.clear()
        sent = self._sent_until()
        self._drop_unsent(sent, error)
        self._doubt(f"worker {self._core.node_id} ceased to be primary of shard {self._core.shard_id} meanwhile")

    def _sent_until(self) -> int:
        """Somebody may have the records up to there, this worker's disk included."""
        return max(self._disk.last, *(each.next - 1 for each in self.streams.followers.values()), 0)

    def _drop_unsent(self, sent: int, error: CoordinatorError) -> None:
        """Refuses definitely what nobody has, and takes it out of the log."""
        while self._tokens and self._tokens[-1][0] > sent:
            _, token, size = self._tokens.pop()
            self._in_flight_bytes -= size
            self._settle(token, error=error)
        self._tail.cut(max(sent, self._disk.last))

    def _doubt(self, why: str) -> None:
        """Settles what is in flight as unknown; the records keep their places."""
        self._doubted_until = self._tail.last
        while self._tokens:
            _, token, _ = self._tokens.popleft()
            self._settle(token, error=OutcomeUnknown(f"{why}; the write may be applied"))
        self._in_flight_bytes = 0

    # What happens

    def on_store_failed(self, now: Monotonic, error: CoordinatorError) -> None:
        """The store failed, and stands where `disk` says."""
        self.streams.on_store_failed()
        if self.state in (State.WAITING, State.RECOVERING):
            # What was on its way to the disk when it became primary did not arrive.
            self._tail.reset(self._disk.last)
            self.streams.ask_again(now)
        else:
            self._drop_unsent(self._sent_until(), error)
            self._doubt(f"the disk of {self._core.node_id} failed ({error})")
        self._disk.ask_for_tail(self._core.node_id)

    def pump(self, now: Monotonic) -> None:
        """Everything that can be done now."""
        core, disk, streams = self._core, self._disk, self.streams
        if self.state is State.SERVING and self.streams.have_leases(now):
            self.fresh_at = now
        if now - self._looked_at > core.times.lagging_s / 2:
            streams.excuse(now)
        self._looked_at = now
        if now >= core.blocked_until:
            core.persist_epoch()
            self._write()
        if core.has_seen_durably:
            streams.epoch = self.view.epoch
        if streams.epoch and self.state not in (State.WAITING, State.CEDED) and disk.knows_its_tail:
            streams.pump(now)
        self._advance(now)

    def _write(self) -> None:
        disk = self._disk
        if self._tail.last > disk.last and not disk.pending(AppendRecords) and disk.position.last == disk.last:
            disk.do(AppendRecords(self._tail.all_from(disk.last + 1)))

    def _advance(self, now: Monotonic) -> None:
        self._stop_if_asked(now)
        match self.state:
            case State.RECOVERING:
                self._recover(now)
            case State.SERVING:
                self._commit(now)
                self.streams.judge_joining(now)
                self._settle_barriers(now)
            case State.CEDING:
                self._cede(now)
            case _:
                pass

    # Recovering

    def _recover(self, now: Monotonic) -> None:
        """Serves once its promises are over and all of its log is on all needed disks, and applied."""
        disk, streams = self._disk, self.streams
        if now < self._core.promised_until and self._core.protections.waits_out_promise:
            return
        are_all_heard = all(each.phase is Phase.STREAMING and each.has_acknowledged for each in streams.needed)
        is_durable = disk.position.last == disk.last and not disk.pending(TruncateLog)
        if not are_all_heard or not is_durable or streams.durable() < disk.last or not self._core.has_seen_durably:
            return
        if not streams.needed and not self._core.has_session_lease(now):
            return
        streams.committed = disk.last
        if disk.position.applied < disk.last or disk.digest is None:
            self._apply()
            return
        self.state = State.SERVING
        self.streams.is_serving = True
        self._stop_if_asked(now)

    # Serving

    def _commit(self, now: Monotonic) -> None:
        streams = self.streams
        durable = min(self._disk.position.last, streams.durable())
        if durable > streams.committed and (streams.needed or self._core.has_session_lease(now)):
            streams.committed = durable
        self._apply()
        self._tail.trim(min(self._disk.position.applied, self._disk.position.last) + 1)

    def _apply(self) -> None:
        disk = self._disk
        if disk.pending(ApplyLog) or self._looked_at < self._core.blocked_until:
            return
        if self.streams.committed > disk.applying or disk.digest is None:
            disk.do(ApplyLog(self.streams.committed, self._core.keeps_tombstones))

    def on_applied(self) -> None:
        """More is applied."""
        self._settle_applied()

    # Ceding

    def _stop_if_asked(self, now: Monotonic) -> None:
        if self.state is not State.SERVING or not (self.view.cede_to or self.view.is_sealed):
            return
        if not self._core.has_seen_durably:
            return  # Nobody may hear of it before: until then there is no reason to keep anybody waiting.
        self.state = State.CEDING
        self.streams.is_serving = False
        self._cede_deadline = Monotonic(now + self._core.times.cede_wait_s)
        for _, token in self._barriers:
            self._settle(token, error=self._not_primary())
        self._barriers.clear()

    def _cede(self, now: Monotonic) -> None:
        disk, streams = self._disk, self.streams
        if not self._core.has_seen_durably:
            return
        if not self._has_sent_ceded:
            self._commit(now)
            is_quiet = disk.position.applied == self._tail.last and not disk.operations
            if not is_quiet and not (now >= self._cede_deadline and not self.view.is_sealed):
                return
            self._drop_unsent(self._sent_until(), self._not_primary())
            self._doubt(f"shard {self._core.shard_id} was ceded to {self.view.cede_to}")
        if self.view.is_sealed:
            if all(each.applied == self._tail.last and each.has_acknowledged for each in streams.needed):
                self.state = State.CEDED
            elif not streams.is_hurried:
                streams.is_hurried = True
                streams.beat(now, streams.needed)
            return
        target = streams.followers.get(self.view.cede_to)
        if not self._has_sent_ceded:
            self._has_sent_ceded = True
            # The last commit point goes ahead: the others apply the rest while the masters decide.
            streams.beat(now, streams.needed)
            self._word_deadline = Monotonic(now + self._core.times.cede_wait_s)
            if target is not None:
                message = self._core.message(streams.epoch)
                message.ceded.last_sequence = self._tail.last
                self._core.send(target.node_id, message, is_answer=False)
        if target is None or target.has_ceded_word or now >= self._word_deadline:
            self.state = State.CEDED

    # Time

    def next_wake(self, now: Monotonic) -> Monotonic:
        """When to look again at the latest."""
        times, streams = self._core.times, self.streams
        moments = [Monotonic(now + min(times.heartbeat_s, times.lagging_s / 4))]
        is_sending = streams.epoch > 0 and self.state not in (State.WAITING, State.CEDED)
        for follower in streams.followers.values() if is_sending else ():
            if follower.phase is Phase.PROBING:
                moments.append(Monotonic(max(follower.probe_at, now)))
            elif follower.phase is Phase.STREAMING:
                moments.append(Monotonic(max(streams.beat_at(follower), now)))
        if self.state is State.RECOVERING and now < self._core.promised_until:
            moments.append(self._core.promised_until)
        if self.state is State.CEDING:
            moments.append(self._word_deadline if self._has_sent_ceded else self._cede_deadline)
        if now < self._core.blocked_until:
            moments.append(self._core.blocked_until)
        return Monotonic(max(min(moments), now + WAKE_S_MIN))
