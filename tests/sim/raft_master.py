"""One simulated master: its clock, its disk, its lives. Plays what RaftNode does around Consensus.

A master's code runs only through `call`, which makes it the one whose clock PySyncObj reads and ends the life when the
disk says so. What comes in while it is paused, or while its disk works (a sync blocks the event loop), waits in order.
"""

from __future__ import annotations

import errno
import random
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any, cast

from coordinator.api.v1 import command_pb2
from coordinator.machine.machine import apply_bytes
from coordinator.machine.state import State
from coordinator.model import WallMs
from coordinator.model.errors import Damaged
from coordinator.raft.consensus import Consensus
from coordinator.raft.identity import Identity
from coordinator.raft.interface import Machine
from coordinator.raft.seat import Seat
from coordinator.raft.snapshot import SnapshotStore
from tests.sim.raft_disk import Disk, Ended
from tests.sim.raft_net import SimLinks

if TYPE_CHECKING:
    from tests.sim.raft_world import World

Answer = Callable[[State | None, command_pb2.CommandResult | None, int], None]
"""Called with (state after it, result, FAIL_REASON)."""


class LaterExecutor(Executor):
    """Runs what is submitted at some later time of the world, unless the master's life has ended by then."""

    def __init__(self, master: Master) -> None:
        self._master = master

    def submit(self, fn: Any, /, *arguments: Any, **keywords: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run(master: Master) -> None:
            try:
                result = fn(*arguments, **keywords)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._master.enqueue_later(self._master.rng.uniform(0.0, 0.1), run)
        return future


class Master:
    """Invariant: `consensus` is None unless it runs."""

    def __init__(self, world: World, id: str, rng: random.Random) -> None:
        self.world = world
        self.id = id
        self.rng = rng
        self.rate = 1.0
        """Seconds of its clock per second of the world."""
        self.clock_offset_s = rng.uniform(100.0, 10_000.0)
        self.wall_offset_ms = rng.randint(-2_000, 2_000)
        self._disks_made = 0
        self._names_given = 0
        self.disk = self._make_disk()
        self.spare: Disk | None = None
        """The disk that was in before this one, where one was lost."""
        self.sync_s_max = 0.000_2
        self.fuse_is_power = False
        """Whether the disk's fuse is a power cut; else it is a kill."""
        self.is_powered = True
        self.is_paused = False
        self._paused_at_s = 0.0
        self.lives = 0
        self.consensus: Consensus | None = None
        self.journal: Any = None
        self.links: SimLinks
        self.identity: Identity | None = None
        """What the present disk says of itself; None until it was read."""
        self.seat: Seat
        self._busy_until_s = 0.0
        self._backlog: deque[Callable[[Master], None]] = deque()
        self._is_step_due = False

    # Disks

    def _make_disk(self) -> Disk:
        self._disks_made += 1
        disk = Disk(random.Random(f"{self.world.seed} disk {self.id} {self._disks_made}"))
        disk.on_sync = self._synced
        disk.lies_about = self.world.lies_about
        return disk

    def lose_disk(self) -> None:
        """An empty disk takes the place of the one that it has; it is down afterwards."""
        self._pull_disk("its disk is lost")
        self.disk, self.spare = self._make_disk(), self.disk

    def swap_disks(self) -> None:
        """The disk that was in before comes back; it is down afterwards."""
        assert self.spare is not None
        self._pull_disk("it gets the disk that it had before")
        self.disk, self.spare = self.spare, self.disk
        self.disk.is_full = False

    def _pull_disk(self, why: str) -> None:
        if self.consensus is not None:
            self.end(is_power_cut=True, why=why)
        else:
            self.world.note(f"{self.id}: {why}")
            self.disk.lose_power()
        self.identity = None

    def _name_disk(self) -> str:
        self._names_given += 1
        return f"{self.id}-{self._names_given}"

    # Time

    def time_s(self) -> float:
        """The world's time where this master's code is: behind what its disk has taken since it was called."""
        return max(self.world.now_s, self._busy_until_s)

    def monotonic_s(self) -> float:
        """This master's clock."""
        return self.clock_offset_s + self.rate * self.time_s()

    def _wall_ms(self) -> WallMs:
        return WallMs(1_700_000_000_000 + self.wall_offset_ms + round(self.time_s() * 1_000))

    def _synced(self) -> None:
        self._busy_until_s = self.time_s() + self.sync_s_max * self.rng.random()

    @property
    def is_busy(self) -> bool:
        """True while its disk works."""
        return self._busy_until_s > self.world.now_s

    # Running its code

    def enqueue(self, action: Callable[[Master], None]) -> None:
        """Has it do something as soon as it runs; forgotten when it does not."""
        if self.consensus is None:
            return
        if not self.is_paused and not self.is_busy and not self._backlog:
            self.call(action)
            return
        self._backlog.append(action)
        if len(self._backlog) == 1 and not self.is_paused:
            self._flush_later()

    def enqueue_later(self, seconds: float, action: Callable[[Master], None]) -> None:
        """Has this life of it do something at a time of its own."""
        life = self.lives
        self.world.at(self.time_s() + seconds, lambda: self.enqueue(action) if self.lives == life else None)

    def _flush_later(self) -> None:
        life = self.lives
        self.world.at(self.time_s(), lambda: self._flush() if self.lives == life else None)

    def _flush(self) -> None:
        while self._backlog and not self.is_paused and self.consensus is not None:
            if self.is_busy:
                self._flush_later()
                return
            self.call(self._backlog.popleft())

    def call(self, action: Callable[[Master], None]) -> None:
        """Runs its code now."""
        outer, self.world.running = self.world.running, self
        try:
            action(self)
        except Ended:
            self.end(is_power_cut=self.fuse_is_power, why="in the middle of the disk's work")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EIO):
                raise
            # RaftNode stops taking part, and the process ends.
            self.end(is_power_cut=False, why=str(error))
        except Damaged as error:
            if "counts nowhere any more" not in str(error):
                raise
            # The same, and the operator sees to it: raft_operator.py.
            self.end(is_power_cut=False, why=str(error))
        finally:
            self.world.running = outer
        self.world.checks.look(self)

    # Lives

    def start(self) -> None:
        """Starts on what the disk holds; with a full disk it may fail, and is down again."""
        assert self.consensus is None
        self.lives += 1
        self.is_powered = True
        self._is_step_due = False
        self._backlog.clear()
        self.world.note(f"{self.id} starts")
        self.call(lambda master: master._load())
        if self.consensus is not None:
            self.enqueue_later(self.rng.uniform(0.0, 0.02), lambda master: master._tick())

    def _load(self) -> None:
        world, settings = self.world, self.world.settings
        peers = [id for id in world.masters if id != self.id]
        self.links = SimLinks(world.network, self, peers, 2 * settings.election_timeout_s_max)
        directory = self.disk.path
        snapshots = SnapshotStore(directory, LaterExecutor(self), monotonic=self.monotonic_s)
        snapshots.on_written = self.schedule_step
        identity = self.identity = Identity(directory, self._name_disk)
        identity.is_voter |= world.trusts_empty_disks
        self.seat = Seat(cast("Any", self.links), identity, Machine())
        self.journal = world.journal_type(directory, f"sim/{self.id}", world.segment_bytes_max)
        self.consensus = world.consensus_type(
            transport=self.links,
            journal=self.journal,
            snapshots=snapshots,
            apply=apply_bytes,
            settings=settings,
            wall_ms=self._wall_ms,
            rng=random.Random(f"{world.seed} {self.id} {self.lives}"),
            protections=world.protections,
            membership=self.seat.membership,
        )
        self.seat.take(self.consensus)
        world.checks.started(self)

    def end(self, *, is_power_cut: bool, why: str) -> None:
        """Ends this life; a power cut takes what was not synced, and says goodbye to nobody."""
        self.world.note(f"{self.id} {'loses its power' if is_power_cut else 'is killed'}: {why}")
        self.lives += 1
        self.consensus = None
        self.is_paused = False
        self.is_powered = not is_power_cut
        self._busy_until_s = 0.0
        self._backlog.clear()
        self.disk.steps_left = None
        if hasattr(self, "links"):
            self.links.end(is_silent=is_power_cut)
        if is_power_cut:
            self.disk.lose_power()
            # A machine that starts again has another monotonic clock.
            self.clock_offset_s = self.rng.uniform(100.0, 10_000.0) - self.rate * self.world.now_s

    def pause(self) -> None:
        """Stands still; its clock goes on."""
        self.world.note(f"{self.id} stands still")
        self.is_paused = True
        self._paused_at_s = self.time_s()

    def resume(self) -> None:
        """Goes on with what has gathered."""
        if self.is_paused:
            self.world.note(f"{self.id} goes on")
            self.is_paused = False
            if self.world.clocks_stop_in_pauses:
                self.clock_offset_s -= self.rate * (self.time_s() - self._paused_at_s)
            if self._backlog:
                self._flush_later()

    # What RaftNode does

    def schedule_step(self) -> None:
        """A step soon, one for all that comes in until then."""
        if not self._is_step_due:
            self._is_step_due = True
            self.enqueue_later(self.rng.uniform(0.0, 0.000_5), lambda master: master._step())

    def _tick(self) -> None:
        self.links.check()
        self.schedule_step()
        self.enqueue_later(self.world.settings.append_period_s / 2 / self.rate, lambda master: master._tick())

    def _step(self) -> None:
        self._is_step_due = False
        consensus = self.consensus
        assert consensus is not None
        consensus.step()
        self.seat.look()
        consensus.take_transitions()
        if consensus.wants_step:
            self.schedule_step()

    # What a client asks of it

    def propose(self, payload: bytes, answer: Answer) -> None:
        """Proposes; `answer` gets the state as it is when the outcome is known."""
        consensus = self.consensus
        assert consensus is not None
        consensus.propose(payload, lambda result, reason: answer(consensus.state, result, reason))
        self.schedule_step()

    def read(self, answer: Answer) -> None:
        """A linearizable read, as RaftNode.read_barrier makes it."""
        consensus = self.consensus
        assert consensus is not None
        if consensus.has_lease:
            answer(consensus.state, None, 0)
        else:
            barrier = command_pb2.Command(cause="barrier", barrier=command_pb2.Barrier())
            self.propose(barrier.SerializeToString(), answer)
