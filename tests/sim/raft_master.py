"""One simulated master: its clock, its disk, its lives. In each life a real RaftNode runs on an event loop of its own.

A master's code runs only in turns of its loop (event_loop.py). While one runs, PySyncObj reads this master's clock.
While the master is paused, or while its disk works (a sync blocks the loop), there are no turns, and what comes in
waits. A life ends when somebody says so, at a step of the disk, or between any two calls of a turn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.api.v1 import command_pb2
from coordinator.config import MasterSettings
from coordinator.machine.snapshot import encode_snapshot
from coordinator.machine.state import State
from coordinator.model import Monotonic, WallMs
from coordinator.model.errors import CoordinatorError, Damaged
from coordinator.raft import Machine, RaftNode
from coordinator.raft.consensus import Consensus
from coordinator.raft.files import DiskFailed
from coordinator.raft.identity import Identity
from coordinator.raft.parts import Makers, Parts
from coordinator.raft.seat import Seat
from coordinator.raft.snapshot import SnapshotStore
from tests.sim.event_loop import SimLoop
from tests.sim.raft_disk import Disk, Ended

if TYPE_CHECKING:
    from tests.sim.raft_world import World

Answer = Callable[[command_pb2.CommandResult | None, CoordinatorError | None], None]
"""What became of a command; exactly one of the two is there."""
Read = Callable[[State | None, CoordinatorError | None], None]
"""What a linearizable read showed."""

TURN_S_MAX = 0.000_5
"""How long it takes until a process does something."""
THREAD_S_MAX = 0.1
"""How long it takes until a thread has done something."""


class LaterExecutor(Executor):
    """Runs what is submitted at some later time of the world, unless the master's life has ended by then."""

    def __init__(self, master: Master) -> None:
        self._master = master
        self._waiting: list[Future[Any]] = []

    def submit(self, fn: Any, /, *arguments: Any, **keywords: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._waiting.append(future)

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            self._waiting.remove(future)
            try:
                result = fn(*arguments, **keywords)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._master.wait_for_thread(run)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for future in self._waiting if cancel_futures else ():
            future.cancel()


class Master:
    """Invariant: `node` is None unless its process runs; `loop` is that of its latest life."""

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
        """Whether a fuse is a power cut; else it is a kill."""
        self.calls_left: int | None = None
        """After so many more calls of its loop the process ends."""
        self.is_powered = True
        self.is_paused = False
        self.is_stopping = False
        """It was told to stop, and has not come to its end."""
        self._paused_at_s = 0.0
        self.lives = 0
        self.node: RaftNode | None = None
        self.loop: SimLoop
        self.identity: Identity | None = None
        """What the present disk says of itself; None until it was read."""
        self._ending = ""
        """Why the process ends by itself; empty while it does not."""
        self._is_known = False
        """Whether the checks know of this life."""
        self._busy_until_s = 0.0
        self._has_turn_waiting = False

    # What others look at

    @property
    def consensus(self) -> Consensus | None:
        """None unless it takes part."""
        return self.node._consensus if self.node is not None else None

    @property
    def _parts(self) -> Parts:
        assert self.node is not None
        assert self.node._parts is not None
        return self.node._parts

    @property
    def journal(self) -> Any:
        """Its log; it takes part."""
        return self._parts.journal

    @property
    def seat(self) -> Seat:
        """Its seat; it takes part."""
        return self._parts.seat

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
        if self.node is not None:
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

    def monotonic(self) -> Monotonic:
        """This master's clock, as coordinator.model has it."""
        return Monotonic(self.monotonic_s())

    def wall_ms(self) -> WallMs:
        """This master's wall clock."""
        return WallMs(1_700_000_000_000 + self.wall_offset_ms + round(self.time_s() * 1_000))

    def _synced(self) -> None:
        self._busy_until_s = self.time_s() + self.sync_s_max * self.rng.random()

    @property
    def is_busy(self) -> bool:
        """True while its disk works."""
        return self._busy_until_s > self.world.now_s

    # Running its code

    def enqueue(self, action: Callable[[Any], object]) -> None:
        """Has it do something as soon as it runs; forgotten when it does not take part."""
        if self.consensus is not None:
            self.loop.call_soon(lambda: action(self) if self.consensus is not None else None)

    def enqueue_later(self, seconds: float, action: Callable[[Any], object]) -> None:
        """Has this life of it do something at a time of its own."""
        life = self.lives
        self.world.at(self.time_s() + seconds, lambda: self.enqueue(action) if self.lives == life else None)

    def spawn(self, work: Coroutine[Any, Any, object]) -> None:
        """Has it run a coroutine."""
        self.loop.create_task(work)

    def turn_later(self) -> None:
        loop, soon_s = self.loop, self.rng.uniform(0.0, TURN_S_MAX)
        self.world.at(self.time_s() + soon_s, lambda: self._turn(loop))

    def _turn(self, loop: SimLoop) -> None:
        if loop.is_dead:
            return
        if self.is_paused:
            self._has_turn_waiting = True
            return
        if self.is_busy:
            self.world.at(self._busy_until_s, lambda: self._turn(loop))
            return
        self.world.running = self
        try:
            loop.run_turn()
        except Ended:
            self.end(is_power_cut=self.fuse_is_power and not self._ending, why=self._ending or "in the middle of it")
        finally:
            self.world.running = None

    def called(self) -> bool:
        node = self.node
        assert node is not None
        if self.disk.is_burnt:
            # A task keeps every exception to itself.
            raise Ended
        if self.calls_left is not None:
            self.calls_left -= 1
            if self.calls_left < 0:
                raise Ended
        if (error := node.fatal.exception() if self._is_known and node.fatal.done() else None) is not None:
            self._may_end(error)
            self.burn(str(error))
        if self.consensus is not None:
            if not self._is_known:
                self._is_known = True
                self.world.checks.started(self)
            self.world.checks.look(self)
        return not self.is_busy

    def burn(self, why: str) -> None:
        """The process ends by itself, at once."""
        self._ending = why
        self.disk.is_burnt = True
        raise Ended

    def _may_end(self, error: BaseException) -> None:
        """Of all reasons for which a node gives up only some are to be expected here."""
        # What the operator sees to: raft_operator.py.
        is_replaced = isinstance(error, Damaged) and "counts nowhere any more" in str(error)
        if not is_replaced and not isinstance(error, DiskFailed):
            self.world.failures.append(error if isinstance(error, Exception) else AssertionError(repr(error)))

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self.world.at(self.time_s() + seconds / self.rate, action)

    def wait_for_thread(self, call: Callable[[], None]) -> None:
        loop = self.loop
        self.world.at(self.time_s() + self.rng.uniform(0.0, THREAD_S_MAX), lambda: loop.call_soon(call))

    def failed(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.world.failures.append(error if isinstance(error, Exception) else AssertionError(str(context)))

    # Lives

    def start(self) -> None:
        """Starts on what the disk holds; with a full disk it may fail, and is down again."""
        if self.node is not None:
            self.end(is_power_cut=False, why="it does not come to its end")
        self.lives += 1
        self.is_powered = True
        self.world.note(f"{self.id} starts")
        self.loop = SimLoop(self, self.world.network)
        self.node = self._make_node()
        self.loop.create_task(self._run(self.node), name=f"start {self.id}")
        self._turn(self.loop)

    def _make_node(self) -> RaftNode:
        world = self.world
        return RaftNode(
            self_id=self.id,
            masters=tuple(MasterSettings(id, f"{id}:1", f"{id}:2", f"{id}:3") for id in world.ids),
            cluster_name="sim",
            directory=self.disk.path,
            settings=world.settings,
            clock=self,
            machine=Machine(encode=encode_snapshot),
            rng=random.Random(f"{world.seed} {self.id} {self.lives}"),
            makers=self._makers(),
        )

    async def _run(self, node: RaftNode) -> None:
        """What a daemon does with its node."""
        try:
            await node.start()
        except Exception as error:
            self._may_end(error)
            self.burn(str(error))

    def _makers(self) -> Makers:
        world = self.world

        def identify(directory: Path) -> Identity:
            identity = self.identity = Identity(directory, self._name_disk)
            identity.is_voter |= world.trusts_empty_disks
            return identity

        return Makers(
            executor=lambda name: LaterExecutor(self),
            identity=identify,
            snapshots=partial(SnapshotStore, monotonic=self.monotonic_s),
            journal=partial(world.journal_type, segment_bytes_max=world.segment_bytes_max),
            consensus=partial(world.consensus_type, protections=world.protections),
        )

    def stop(self) -> None:
        """Stops as a daemon does when it is told to: it hands over what it leads, and leaves."""
        if self.consensus is not None:
            self.world.note(f"{self.id} is to stop")
            self.is_stopping = True
            self.enqueue(lambda _: self.spawn(self._leave()))

    async def _leave(self) -> None:
        node = self.node
        assert node is not None
        if node.is_leader:
            await self._hand_over(node, None)
        await node.stop()
        self.burn("it has stopped")

    def end(self, *, is_power_cut: bool, why: str) -> None:
        """Ends this life; a power cut takes what was not synced, and says goodbye to nobody."""
        self.world.note(f"{self.id} {'loses its power' if is_power_cut else 'ends'}: {why}")
        self.lives += 1
        self.loop.die()
        self.node = None
        self.is_paused = self.is_stopping = self._is_known = self._has_turn_waiting = False
        self._ending = ""
        self.is_powered = not is_power_cut
        self._busy_until_s = 0.0
        self.calls_left = self.disk.steps_left = None
        self.disk.is_burnt = False
        self.world.network.process_ended(self.id, is_silent=is_power_cut)
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
            if self._has_turn_waiting:
                self._has_turn_waiting = False
                self.turn_later()

    # What a client or an operator asks of it, once it runs

    def propose(
        self, command: command_pb2.Command, answer: Answer, timeout_s: float | None = None, *, is_urgent: bool = False
    ) -> None:
        """Proposes."""
        self.spawn(self._propose(command, answer, timeout_s, is_urgent))

    async def _propose(
        self, command: command_pb2.Command, answer: Answer, timeout_s: float | None, is_urgent: bool
    ) -> None:
        assert self.node is not None
        try:
            result = await self.node.propose(command, timeout_s, is_urgent=is_urgent)
        except CoordinatorError as error:
            answer(None, error)
        else:
            answer(result, None)

    def read(self, answer: Read, timeout_s: float | None = None) -> None:
        """A linearizable read of the whole state."""
        self.spawn(self._read(answer, timeout_s))

    async def _read(self, answer: Read, timeout_s: float | None) -> None:
        node = self.node
        assert node is not None
        try:
            await node.read_barrier(timeout_s)
        except CoordinatorError as error:
            answer(None, error)
        else:
            answer(node.state, None)

    def hand_over(self, target_id: str | None) -> None:
        """Hands the leadership on, if it has it."""
        assert self.node is not None
        self.spawn(self._hand_over(self.node, target_id))

    async def _hand_over(self, node: RaftNode, target_id: str | None) -> None:
        try:
            await node.transfer_leadership(target_id)
        except CoordinatorError as error:
            self.world.note(f"{self.id} does not hand over: {error}")
