"""One worker's replica of one shard: primary and backup by the rules of PacificA, as a passive machine.

Theory of operation (DESIGN.md section 7; Lin et al., PacificA, 2008; the parts are described where they are made):

- **Committed** = on the disks of the primary and of all needed replicas. Whoever may become primary is needed before
  that (replica_streams.py), so every later primary has everything that was ever acknowledged.
- **One log.** (sequence, epoch) is made once, by the one primary of the epoch; a replica takes a record only behind one
  that both have. So equal (sequence, epoch) means equal logs up to there, and what is applied, being committed, is the
  same everywhere (replica_backup.py).
- **One that answers.** A primary answers only while leases of all needed replicas run. A replica that becomes primary
  waits until the lease that it gave has run out (replica_primary.py), or was told that the old primary has stopped.
- **Epochs fence.** A replica that has seen an epoch follows no lower one; what it has seen is on disk before it is
  shown (replica_core.py). A primary that hears of a higher epoch stops at once.
- **No pause for a changed set.** The primary that serves goes on serving at the next epoch when it needs already
  whoever is needed then. Nobody can have served between the two: they would have needed this worker's answer.

    role      made by
    Primary   an assignment as primary at an epoch above all seen; or the next one, while it serves
    Backup    any other assignment; a message of a higher epoch; a refusal that names one
    lost      a store that is damaged, or missing what it should have: it follows nobody and says LOST

`started_at` is the latest moment before which this worker may have given a lease for the shard that this machine does
not know of: the start of the process, or when an earlier machine of the shard was dropped.
"""

from __future__ import annotations

from collections.abc import Callable

from coordinator.api.v1 import replication_pb2
from coordinator.model import Monotonic
from coordinator.model.errors import CoordinatorError, NotPrimary
from worker_agent.replica_backup import Backup
from worker_agent.replica_core import LONG_AGO, Core, Protections
from worker_agent.replica_follower import CopyFigure
from worker_agent.replica_primary import Primary, State
from worker_agent.shard_interface import (
    ApplyLog,
    Assigned,
    Barrier,
    Foresee,
    PeerConnected,
    PeerLost,
    PeerSaid,
    Progress,
    ReadChunk,
    ReadLog,
    ReplicaEvent,
    ReplicaRole,
    ReplicaStep,
    ReplicaTimes,
    ReportReplica,
    Settle,
    ShardView,
    StoreDone,
    StoreFailed,
    Submit,
)
from worker_agent.store_interface import StoreFull

LOOK_S = 0.05
"""How often a primary looks who is silent; who lags is a matter of a second."""


class Replica:
    """The machine of one shard on one worker."""

    def __init__(
        self,
        node_id: str,
        shard_id: int,
        times: ReplicaTimes,
        has_session_lease: Callable[[Monotonic], bool],
        started_at: Monotonic,
        protections: Protections | None = None,
    ) -> None:
        self._core = Core(node_id, shard_id, times, has_session_lease, started_at, protections or Protections())
        self._role: Primary | Backup | None = None
        self._lost_reason = ""
        self._reported: ReportReplica | None = None
        self._looked: tuple[object, ...] = ()
        """What a report was last made of, but for silence, which is looked for every now and then."""
        self._look_at = started_at

    # What others may ask

    @property
    def is_primary(self) -> bool:
        """True when it is primary by the newest epoch that it knows."""
        return isinstance(self._role, Primary)

    @property
    def is_serving(self) -> bool:
        """True when it answers for the shard, leases permitting."""
        return isinstance(self._role, Primary) and self._role.is_serving

    def may_read(self, now: Monotonic) -> bool:
        """True when a read may be answered from what is applied now; to be asked when it starts and before it ends."""
        return isinstance(self._role, Primary) and self._role.may_read(now)

    @property
    def primary_id(self) -> str:
        """The primary as far as it is known here; empty when it is not."""
        if isinstance(self._role, Primary):
            return self._role.view.cede_to if self._role.state is State.CEDED else self._core.node_id
        if isinstance(self._role, Backup) and self._role.leader:
            return self._role.leader
        view = self._core.view
        return view.primary if view is not None and view.primary != self._core.node_id else ""

    def age_s(self, now: Monotonic) -> float:
        """How long ago it last knew itself to have everything that was committed; infinite when it never did."""
        return self._role.age_s(now) if self._role is not None else float("inf")

    @property
    def state(self) -> str:
        """In a word, for people."""
        if isinstance(self._role, Primary):
            return self._role.state.value
        if self._role is None:
            return "lost" if self._lost_reason else "new"
        view = self._core.view
        if not self._core.disk.position.is_complete:
            return "copying"
        return "joining" if view is not None and view.role is ReplicaRole.JOINING else "following"

    @property
    def problem(self) -> str:
        """What is wrong with the store; empty when nothing is."""
        return self._lost_reason or self._core.block_reason

    @property
    def epoch(self) -> int:
        """Highest epoch that it knows of."""
        return self._core.seen

    @property
    def last_sequence(self) -> int:
        """Last record that is on disk."""
        return self._core.disk.position.last

    def copies(self) -> tuple[CopyFigure, ...]:
        """Progress of the copies that this primary sends."""
        if not isinstance(self._role, Primary):
            return ()
        return tuple(
            CopyFigure(each.node_id, each.copied_rows, each.copied_bytes, each.is_complete)
            for each in self._role.streams.followers.values()
            if each.is_joining
        )

    def validate(self) -> None:
        """Raises AssertionError when an invariant is broken."""
        disk = self._core.disk
        assert disk.position.applied <= disk.applying <= disk.last, "applied <= applying <= last"
        assert not (self._lost_reason and self._role), "who has no store has no role"
        if self._role:
            self._role.validate()

    # What happens

    def on_event(self, now: Monotonic, event: ReplicaEvent) -> ReplicaStep:
        """Takes an event in."""
        core, role = self._core, self._role
        match event:
            case Assigned():
                self._take_assignment(now, event)
            case Foresee(epoch):
                core.foresee(epoch)
            case Submit() if isinstance(role, Primary):
                role.on_submit(now, event)
            case Barrier() if isinstance(role, Primary):
                role.on_barrier(now, event)
            case Submit() | Barrier():
                core.actions.append(Settle(event.token, error=self._not_primary()))
            case PeerConnected(node_id):
                core.connected[node_id] = None
                if isinstance(role, Primary):
                    role.streams.on_connected(now, node_id)
            case PeerLost(node_id):
                core.connected.pop(node_id, None)
                if isinstance(role, Primary):
                    role.streams.on_lost(now, node_id)
            case PeerSaid():
                self._take_message(now, event)
            case StoreDone():
                self._take_done(now, event)
            case StoreFailed():
                self._take_failed(now, event)
        return self.on_advance(now)

    def on_advance(self, now: Monotonic) -> ReplicaStep:
        """Takes the passing of time in."""
        core, role = self._core, self._role
        if role is not None:
            role.pump(now)
        self._report(now)
        actions = tuple(core.actions)
        core.actions.clear()
        is_blocked = isinstance(role, Backup) and now < core.blocked_until
        wake = role.next_wake(now) if isinstance(role, Primary) else core.blocked_until if is_blocked else None
        return ReplicaStep(actions, wake)

    # Roles

    def _take_assignment(self, now: Monotonic, event: Assigned) -> None:
        core, view = self._core, event.view
        is_first = core.view is None
        if core.view is not None and view.epoch < core.view.epoch:
            return
        core.view = view
        if is_first and event.position is None:
            self._lose("there is no store, or none that can be trusted")
        if event.position is not None:
            self._lost_reason = ""
            core.disk.load(event.position)
            core.seen = core.used_epoch = max(core.seen, event.position.epoch_seen)
            is_first = True
        if self._lost_reason or self._lacks_rows(view):
            return
        if view.role is ReplicaRole.PRIMARY:
            self._become_primary(now, view, is_first=is_first)
            return
        if not isinstance(self._role, Backup) or is_first:
            self._become_backup(now)
        if core.seen == 0:
            # From now on a store that knows no epoch is one that was lost.
            core.see(view.epoch)

    def _lacks_rows(self, view: ShardView) -> bool:
        """True when the store should have rows and has none; then that is noted."""
        position = self._core.disk.position
        if view.role is ReplicaRole.JOINING or not view.is_formed:
            return False
        if not position.is_complete:
            self._lose("the store has not all rows although the replica is in sync")
        elif position.epoch_seen == 0 and self._core.seen == 0 and not view.parents:
            self._lose("the store is empty and new although the shard has been formed")
        return bool(self._lost_reason)

    def _become_primary(self, now: Monotonic, view: ShardView, *, is_first: bool) -> None:
        core, role = self._core, self._role
        if isinstance(role, Primary) and role.view.epoch == view.epoch:
            role.follow(now, view)
        elif isinstance(role, Primary) and view.epoch > core.seen and role.may_continue(view):
            core.see(view.epoch)
            core.used_epoch = view.epoch
            role.follow(now, view)
        elif view.epoch >= core.seen and (is_first or view.epoch > core.used_epoch):
            # What an earlier process has made in this epoch nobody can tell from what this one would make.
            is_barred = view.epoch <= core.used_epoch
            fresh_at = self._end_role()
            core.see(view.epoch)
            core.used_epoch = view.epoch
            self._role = Primary(core, now, view, fresh_at, is_barred=is_barred)
        elif role is None:
            self._become_backup(now)

    def _become_backup(self, now: Monotonic) -> None:
        fresh_at = self._end_role()
        self._role = Backup(self._core, now, fresh_at)

    def _end_role(self) -> Monotonic:
        """Returns when it last knew itself to have everything that was committed, which is still true."""
        role, self._role = self._role, None
        if isinstance(role, Primary):
            role.end(self._not_primary())
        elif role is not None:
            role.end()
        return LONG_AGO if role is None else role.fresh_at

    def _not_primary(self) -> NotPrimary:
        core = self._core
        view = core.view
        known = (self._role.leader if isinstance(self._role, Backup) else "") or (view.primary if view else "")
        primary = known if known != core.node_id else ""
        where = f"; {primary} is" if primary else ""
        message = f"worker {core.node_id} is not primary of shard {core.shard_id}{where}"
        return NotPrimary(message, primary, "", core.shard_id)

    def _lose(self, reason: str) -> None:
        self._end_role()
        self._lost_reason = reason

    # Messages

    def _take_message(self, now: Monotonic, event: PeerSaid) -> None:
        core, message = self._core, event.message
        if event.is_answer:
            self._take_answer(now, event.node_id, message)
        elif self._role is None:
            refusal = core.message(message.epoch)
            refusal.refuse.reason = self._lost_reason or "the store is not open yet"
            core.send(event.node_id, refusal, is_answer=True)
        else:
            if isinstance(self._role, Primary) and message.epoch > core.seen:
                self._become_backup(now)
            if isinstance(self._role, Backup):
                self._role.on_message(now, event.node_id, message)
            else:
                self._refuse(event.node_id, message.epoch)

    def _refuse(self, node_id: str, epoch: int) -> None:
        core = self._core
        epoch_seen = min(core.seen, core.disk.position.epoch_seen)
        if epoch < epoch_seen:
            refusal = core.message(epoch)
            refusal.refuse.epoch_seen = epoch_seen
            refusal.refuse.reason = f"{core.node_id} is primary of shard {core.shard_id} at epoch {core.seen}"
            core.send(node_id, refusal, is_answer=True)

    def _take_answer(self, now: Monotonic, node_id: str, message: replication_pb2.ShardMessage) -> None:
        core, role = self._core, self._role
        if not isinstance(role, Primary):
            return
        if message.WhichOneof("message") == "refuse" and message.refuse.epoch_seen > core.seen:
            # Another one is primary already, or was: this one has to be told anew what it is.
            core.see(message.refuse.epoch_seen)
            self._become_backup(now)
            return
        follower = role.streams.followers.get(node_id)
        if follower is not None and role.since_epoch <= message.epoch <= role.view.epoch:
            role.streams.on_message(now, follower, message)

    # Store

    def _take_done(self, now: Monotonic, event: StoreDone) -> None:
        core, role = self._core, self._role
        core.disk.done(event)
        core.unblock(event.operation)
        if isinstance(role, Backup):
            role.on_done(now, event)
        elif isinstance(role, Primary):
            match event.operation:
                case ReadLog(node_id) if node_id == core.node_id:
                    core.disk.take_tail(event.records)
                    core.disk.ask_for_tail(core.node_id)
                case ReadLog():
                    role.streams.on_records(now, event, event.operation)
                case ReadChunk():
                    role.streams.on_chunk(now, event, event.operation)
                case ApplyLog():
                    role.on_applied()
                case _:
                    pass

    def _take_failed(self, now: Monotonic, event: StoreFailed) -> None:
        core, role = self._core, self._role
        if self._lost_reason:
            return
        if isinstance(event.operation, ReadChunk) and event.position is not None:
            # What is sound goes on being served, and who keeps the store decides whether it is given up.
            core.disk.chunk_failed()
            if isinstance(role, Primary):
                role.streams.on_chunk_failed(event.operation, str(event.error))
            return
        if event.position is None or not isinstance(event.error, StoreFull | OSError | KeyError):
            self._lose(f"the store cannot be trusted ({event.error})")
            return
        if isinstance(event.operation, ReadLog) and isinstance(event.error, KeyError):
            # The log begins later by now. Nothing is wrong with the store.
            core.disk.read_failed()
            if isinstance(role, Primary):
                role.streams.on_unreadable(now, event.operation.node_id)
            return
        core.disk.failed(event.position)
        core.block(now, event.operation, str(event.error))
        if isinstance(role, Primary):
            error = event.error if isinstance(event.error, CoordinatorError) else StoreFull(str(event.error))
            role.on_store_failed(now, error)
        elif isinstance(role, Backup):
            role.on_failed(now)

    # Reports

    def _report(self, now: Monotonic) -> None:
        core, role, view = self._core, self._role, self._core.view
        if view is None:
            return
        state = (role.state, role.streams.told_count) if isinstance(role, Primary) else None
        looked = (view, role, state, self._lost_reason, core.block_reason, core.has_seen_durably)
        if now < self._look_at and looked == self._looked:
            return
        self._looked, self._look_at = looked, Monotonic(now + LOOK_S)
        if self._lost_reason:
            report = ReportReplica(view.epoch, Progress.LOST, reason=self._lost_reason)
        elif not core.has_seen_durably:
            return
        elif isinstance(role, Primary):
            report = role.report(now, view.epoch)
        else:
            report = ReportReplica(view.epoch, Progress.ACCEPTED, reason=core.block_reason)
        if report != self._reported:
            self._reported = report
            core.actions.append(report)
