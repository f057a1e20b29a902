"""A whole cluster of masters in one thread, where one seed decides everything.

Real: RaftNode with all that it is made of: PySyncObj, transport and links, proposals, barriers, hand-over, seat,
consensus, journal, snapshots, machine. Played: event loops (event_loop.py), processes and clocks that drift
(raft_master.py), sockets (raft_net.py), disks (raft_disk.py), faults (raft_faults.py), clients (raft_clients.py), an
operator who replaces lost disks (raft_operator.py). TLS is left out. What must hold is in raft_checks.py.
`run_seed` plays one life of a cluster: it is set up, faults and clients have their time, everything is healed, and
within LIVE_S_MAX there must be a leader and a committed write.

Determinism: events happen in the order of (time, sequence); every master, link, disk and client has a generator of its
own, so nothing depends on the order of PySyncObj's sets.
"""

from __future__ import annotations

import heapq
import logging
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pysyncobj.syncobj
from pysyncobj import FAIL_REASON

from coordinator.api.v1 import command_pb2
from coordinator.config import RaftSettings
from coordinator.model.errors import CoordinatorError, NoLeader
from coordinator.raft import proposals, snapshot, transport
from coordinator.raft.consensus import Consensus
from coordinator.raft.elections import Protections
from coordinator.raft.journal import Journal
from coordinator.raft.proposals import Proposals, error_of
from tests.sim import raft_disk
from tests.sim.linearizability import Operation
from tests.sim.raft_checks import Checks, Violation, WatchedJournal
from tests.sim.raft_clients import INITIAL, REGISTERS, Client, Ledger, set_up_commands
from tests.sim.raft_faults import Faults, Plan
from tests.sim.raft_master import Master
from tests.sim.raft_net import Listener, Network
from tests.sim.raft_operator import Operator
from tests.sim.seeds import SeedFailed, replay

LIVE_S_MAX = 3.0
"""After the last fault: a leader, and a write that is committed."""
EQUAL_S_MAX = 4.0
"""After that, and after the last disk is through with what it began while it was slow: all have applied everything."""
CHUNK_BYTES = 700
"""Of a snapshot, so that one takes several chunks."""
TRACE_LINES = 150


@dataclass(frozen=True, slots=True)
class Mutation:
    """What a run does without, to show what it is for. The default is everything."""

    protections: Protections = Protections()  # noqa: RUF009 - frozen
    journal_type: type[Journal] = WatchedJournal
    consensus_type: type[Consensus] = Consensus
    lies_about: tuple[str, ...] = ()
    """See Disk.lies_about."""
    barrier: Callable[..., Any] = Proposals.barrier
    takes_leader_changed_for_denied: bool = False
    trusts_empty_disks: bool = False
    """An empty disk votes and counts at once."""
    clocks_stop_in_pauses: bool = False
    """A master reads a clock that stands still while it is paused, as most clocks do while a machine sleeps."""


class World:
    """Masters, network, clients, and their time."""

    master_type: type[Master] = Master
    played_by = "tests/sim/test_raft_seeds.py"

    def __init__(self, seed: int, plan: Plan, mutation: Mutation) -> None:
        self.seed = seed
        self.plan = plan
        self.protections = mutation.protections
        self.journal_type = mutation.journal_type
        self.consensus_type = mutation.consensus_type
        self.lies_about = mutation.lies_about
        self.trusts_empty_disks = mutation.trusts_empty_disks
        self.clocks_stop_in_pauses = mutation.clocks_stop_in_pauses
        self.rng = random.Random(f"{seed} world")
        self.settings = RaftSettings(snapshot_entries=self.rng.choice((self.rng.randint(15, 40), 150)))
        self.segment_bytes_max = self.rng.choice((300, 1_000, 4_000))
        self.ids = tuple(f"m{number}" for number in range(1, plan.masters + 1))
        self.now_s = 0.0
        self.running: Master | None = None
        self.trace: deque[str] = deque(maxlen=TRACE_LINES)
        self.events = 0
        self.failures: list[Exception] = []
        """What went wrong where nobody could be told."""
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._sequence = 0
        self.network = Network(self, seed)
        self.masters = {id: self.master_type(self, id, random.Random(f"{seed} {id}")) for id in self.ids}
        self.operator = Operator(self, random.Random(f"{seed} operator"))
        self.checks = Checks(self)
        self.barrier = mutation.barrier
        self.takes_leader_changed_for_denied = mutation.takes_leader_changed_for_denied
        self.ledger = Ledger()
        for master in self.masters.values():
            master.rate = 1.0 + self.rng.uniform(-plan.drift, plan.drift)

    def clock_s(self) -> float:
        """What PySyncObj reads: the clock of the master whose code runs."""
        return self.now_s if self.running is None else self.running.monotonic_s()

    def close(self) -> None:
        """Ends what still runs."""
        for master in self.masters.values():
            if master.node is not None:
                master.loop.die()

    async def listen(self, host: str, port: int) -> list[Listener]:
        """What raft/listener.py does; for the master whose code runs."""
        assert self.running is not None
        return [Listener(self.network, self.running.loop, self.running.id)]

    def error_of(self, reason: int) -> CoordinatorError:
        """What proposals.py makes of an outcome; the mutation trusts PySyncObj's documentation instead."""
        if reason == FAIL_REASON.LEADER_CHANGED and self.takes_leader_changed_for_denied:
            return NoLeader("not committed, says the documentation")
        return error_of(reason)

    def note(self, line: str) -> None:
        """Remembers a line for whoever replays this seed."""
        self.trace.append(f"{self.now_s:9.4f}  {line}")

    def at(self, time_s: float, action: Callable[[], object]) -> None:
        """Has something done at a time."""
        self._sequence += 1
        heapq.heappush(self._queue, (max(time_s, self.now_s), self._sequence, action))

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        """Has something done after a while."""
        self.at(self.now_s + seconds, action)

    def run_until(self, end_s: float, condition: Callable[[], object] | None = None) -> bool:
        """Lets time pass until then, or until the condition holds; whether it does."""
        queue = self._queue
        while condition is None or not condition():
            if not queue or queue[0][0] > end_s:
                self.now_s = end_s
                return False
            self.now_s, _, action = heapq.heappop(queue)
            self.events += 1
            action()
            if self.failures:
                raise self.failures[0]
        return True

    def leader(self) -> Master | None:
        """The master that leads whole in the highest term."""
        leading = [
            (master.consensus.term, id)
            for id, master in self.masters.items()
            if master.consensus is not None and master.consensus.leads_whole and not master.is_paused
        ]
        return self.masters[max(leading)[1]] if leading else None

    # One life

    def commit(self, command: command_pb2.Command, seconds: float) -> int:
        """Has a command committed, trying again with the same request id; its index."""
        done: list[int] = []
        end_s = self.now_s + seconds

        def answered(result: command_pb2.CommandResult | None, error: CoordinatorError | None) -> None:
            if result is not None:
                assert result.WhichOneof("outcome") == "applied", result
                done.append(result.applied.index)

        def again() -> None:
            leader = self.leader()
            if leader is not None and not done:
                leader.enqueue(lambda master: master.propose(command, answered))
            if not done and self.now_s < end_s:
                self.after(0.05, again)

        again()
        if not self.run_until(end_s, lambda: done):
            raise Violation(f"nothing was committed within {seconds:g} s")
        return done[0]

    def play(self) -> None:
        """Sets up, plays, heals, checks."""
        for master in self.masters.values():
            master.start()
        for command in set_up_commands():
            self.commit(command, LIVE_S_MAX)
        clients = [
            Client(self, f"c{number}", random.Random(f"{self.seed} c{number}"))
            for number in range(1, self.plan.clients + 1)
        ]
        faults = Faults(self, random.Random(f"{self.seed} faults"))
        faults.play()
        self.note("everything is healed")
        faults.heal()
        healed_s = self.now_s
        # A disk that was slow is so until it is through with what it began: hundreds of syncs of tiny segments.
        through_s = max(master.time_s() for master in self.masters.values())
        self.commit(command_pb2.Command(request_id="live", cause="live", barrier=command_pb2.Barrier()), LIVE_S_MAX)
        self.note(f"committed {self.now_s - healed_s:.2f} s after the last fault")
        self.run_until(self.now_s + 0.5)
        for client in clients:
            client.is_stopped = True
        if not self.run_until(max(self.now_s, through_s) + EQUAL_S_MAX, self._all_equal):
            raise Violation(f"the masters are not equal within {EQUAL_S_MAX:g} s: {self._show_masters()}")
        if self.operator.replacing is not None:
            raise Violation(f"the disk of {self.operator.replacing.id} does not vote within {EQUAL_S_MAX:g} s")
        self._read_all()
        self.checks.finish(self.ledger.acknowledged, self.ledger.denied, self.ledger.history, INITIAL)

    def _all_equal(self) -> bool:
        if any(master.consensus is None for master in self.masters.values()):
            return False
        applied = {master.consensus and master.consensus.applied_index for master in self.masters.values()}
        last = {master.journal[-1][1] for master in self.masters.values()}
        return len(applied) == 1 and applied == last and self.operator.replacing is None

    def _show_masters(self) -> str:
        return ", ".join(
            f"{id} {'is down' if master.consensus is None else f'has applied {master.consensus.applied_index}'}"
            for id, master in self.masters.items()
        )

    def _read_all(self) -> None:
        leader = self.leader()
        assert leader is not None
        assert leader.consensus is not None
        for key in REGISTERS:
            value = leader.consensus.state.nodes[key].weight
            self.ledger.reads.append(Operation(key, False, value, self.now_s, self.now_s, "end"))


class _Story(logging.Handler):
    """Takes what masters warn of into the story of a world; but no time that was measured on the real machine."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.WARNING)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        self._world.note(line.partition(" s: ")[0] if "stood still for" in line else line)


@contextmanager
def _simulated(world: World) -> Iterator[None]:
    """The code under test reads the world's clocks, uses its disks and sockets, and sends snapshots in small chunks.

    What it warns of becomes part of the world's story.
    """
    modules: tuple[Any, ...] = pysyncobj.syncobj, snapshot, transport, proposals
    engine, store, peers, waiting = modules
    real = engine.monotonicTime, store.CHUNK_BYTES, peers.listen, waiting.error_of, waiting.Proposals.barrier
    engine.monotonicTime, store.CHUNK_BYTES, peers.listen = world.clock_s, CHUNK_BYTES, world.listen
    waiting.error_of, waiting.Proposals.barrier = world.error_of, world.barrier
    story, log = _Story(world), logging.getLogger("coordinator.raft")
    log.addHandler(story)
    is_told = log.propagate
    log.propagate = False
    try:
        with raft_disk.installed():
            yield
    finally:
        engine.monotonicTime, store.CHUNK_BYTES, peers.listen, waiting.error_of, waiting.Proposals.barrier = real
        world.close()
        log.removeHandler(story)
        log.propagate = is_told


def run_seed(
    seed: int, plan: Plan | None = None, mutation: Mutation | None = None, world_type: type[World] = World
) -> World:
    """Plays one seed. Raises SeedFailed with its story and with the command that plays it again."""
    world: World | None = None
    plan = plan or Plan.of_seed(seed)
    try:
        world = world_type(seed, plan, mutation or Mutation())
        with _simulated(world):
            world.play()
    except Exception as error:
        story = "\n".join(world.trace) if world is not None else ""
        raise SeedFailed(
            f"seed {seed} at {world.now_s if world else 0:.4f} s: {type(error).__name__}: {error}\n{story}\n{plan}\n"
            + replay(seed, world_type.played_by)
        ) from error
    return world
