"""A cluster that only has cron jobs, for as long as a slice of the year, in one thread and decided by one seed.

Real: CronControl with its LaunchTracker, the membership controller, the placement of jobs, the state machine, the
workers' session machines. Played: the log (an order of commands that may lose proposals and answers; what a dead leader
had on its way is committed up to some point), elections, wall clocks that differ and step, streams (cron_net.py),
launchers (cron_worker.py), faults (cron_faults.py). What must hold is in cron_oracle.py, which believes none of these.

Time jumps. Heartbeats are played around faults only (cron_time.py says why that is the same); CronControl's look at the
wall clock once a second is played after steps of that clock only, since between steps it does nothing.
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from coordinator.api.v1 import command_pb2, session_pb2, types_pb2
from coordinator.control import cron as cron_control
from coordinator.machine.codec import job_spec_to_proto
from coordinator.machine.machine import apply
from coordinator.machine.state import State, Transition
from coordinator.machine.validate import validate
from coordinator.model import CronJobSpec, NodeState, WallMs
from tests.sim.cron_jobs import SLICE_S, SLICES, YEAR_FROM_MS, jobs_of, load_config
from tests.sim.cron_leader import Flight, Leader
from tests.sim.cron_net import Network
from tests.sim.cron_oracle import Oracle
from tests.sim.cron_time import Time
from tests.sim.cron_worker import FINAL, Promises, Token, Worker
from tests.sim.seeds import SeedFailed, replay

FREEZE_EVERY_S = 3.0
TRACE_LINES = 400


@dataclass(slots=True)
class LogFaults:
    """How often proposals fail, as shares of 1."""

    lost: float = 0.0
    unknown: float = 0.0
    """Committed, and the answer is lost; half of them so late that the leader proposes them again."""


@dataclass(slots=True, eq=False)
class Master:
    """One master with its wall clock."""

    id: str
    world: World
    offset_ms: int
    is_up: bool = True

    @property
    def wall(self) -> WallMs:
        """What its clock shows."""
        return WallMs(self.world.true_ms + self.offset_ms)


class World:
    """The cluster of one seed."""

    def __init__(self, seed: int, promises: Promises | None = None) -> None:
        self.seed = seed
        self.promises = promises or Promises()
        self.rng = random.Random(f"{seed} world")
        self.config = load_config()
        self.time = Time()
        self._start_ms = YEAR_FROM_MS + round((seed % SLICES) * SLICE_S * 1_000) - round(self.time.now * 1_000)
        self.state = State()
        self.log_faults = LogFaults()
        self.masters = {f"m{n}": Master(f"m{n}", self, self.rng.randint(-400, 400)) for n in (1, 2, 3)}
        self.workers: dict[str, Worker] = {}
        self.leader: Leader | None = None
        self.counts: Counter[str] = Counter()
        self.traps: dict[str, Callable[[Worker | None], None]] = {}
        """What happens at the next moment of a kind: see `hook`."""
        self.trace: deque[str] = deque(maxlen=TRACE_LINES)
        self.net = Network(self)
        self.oracle = Oracle(self)
        self.masters_gone = False
        self.well_since = math.inf
        """Since when everything has been well; infinity while it is not."""
        self.led_since = 0.0
        """Since when the present leader leads."""
        self._survivors: list[Flight] = []
        self._terms = 0
        self._freezing = False

    @property
    def true_ms(self) -> int:
        """Wall time as it is."""
        return self._start_ms + math.floor(self.time.now * 1_000 + 1e-6)

    def note(self, text: str) -> None:
        """A line of the seed's story."""
        self.trace.append(f"{self.time.now - 1_000:12.3f} {text}")

    # The cluster's life

    def found(self, change: Callable[[CronJobSpec], CronJobSpec | None] | None = None) -> None:
        """Three masters, some workers, the jobs, with what a plan makes of each."""
        for number in range(self.rng.randint(3, 5)):
            self.add_worker(f"w{number + 1}")
        self.thaw()
        self.elect()
        self.operator(bootstrap_cluster=command_pb2.BootstrapCluster(cluster_id="cron", shards=1))
        for worker in self.workers.values():
            worker.start()
        for drawn in jobs_of(self.seed, self.rng):
            spec = drawn if change is None else change(drawn)
            if spec is not None:
                self.operator(apply_job=command_pb2.ApplyJob(spec=job_spec_to_proto(spec), source="config"))

    def add_worker(self, name: str) -> Worker:
        """A new machine, not started yet."""
        worker = Worker(self, name, zone="ab"[len(self.workers) % 2])
        self.workers[name] = worker
        return worker

    def elect(self) -> None:
        """Some master leads, from everything that was committed."""
        candidates = [master for master in self.masters.values() if master.is_up]
        if self.leader is not None or self.masters_gone:
            return
        if len(candidates) < 2:
            self.time.after(1.0, self.elect)
            return
        self.thaw()
        survivors, self._survivors = self._survivors, []
        for flight in survivors:
            self.apply(flight.command, flight.wall)
        self._terms += 1
        master = self.rng.choice(candidates)
        self.note(f"{master.id} leads in term {self._terms}, clock {master.offset_ms:+} ms")
        self.leader = Leader(self, master, self._terms)
        self.led_since = self.time.now

    def lose_leader(self, *, is_killed: bool, is_elected: bool = True) -> None:
        """The leader dies or is deposed; another one follows."""
        leader, self.leader = self.leader, None
        if leader is None:
            return
        self.thaw()
        self.note(f"{leader.master.id} leads no more" + (", it is killed" if is_killed else ""))
        self._survivors += leader.stop()
        is_told = not is_killed or self.rng.random() < 0.85
        for stream in list(self.net.streams.values()):
            if stream.leader is leader:
                if not is_killed:
                    redirect = session_pb2.Redirect(reason="it leads no more")
                    self.net.send_down(stream.session, session_pb2.OpenResponse(redirect=redirect))
                self.net.close(stream.session, is_told=is_told)
        if is_killed:
            leader.master.is_up = False
            self.time.after(self.rng.uniform(0.5, 20.0), partial(setattr, leader.master, "is_up", True))
        if is_elected:
            self.time.after(self.rng.uniform(0.3, 2.0), self.elect)

    # The log

    def apply(self, command: command_pb2.Command, wall: WallMs) -> Transition:
        """A command is committed."""
        before = self.state
        transition = apply(before, command, before.index + 1, wall)
        self.state = transition.state
        for record in transition.records:
            self.trace.append(f"{self.time.now - 1_000:12.3f}   {record.kind} {record.subject} {record.message}")
        self.oracle.take(command, before, transition, wall)
        self.hook(f"applied {command.WhichOneof('operation')}")
        return transition

    def operator(self, **operation: object) -> None:
        """An operator's command, through the leader; nothing without one."""
        if self.leader is not None:
            command = command_pb2.Command(cause="operator", **operation)  # type: ignore[arg-type]
            self.leader.submit(Flight(0, command, self.leader.master.wall))

    # Traps

    def hook(self, kind: str) -> None:
        """A moment of this kind is here: a trap that waits for it goes off."""
        if self.traps:
            trap = self.traps.pop(kind, None)
            if trap is not None:
                trap(None)

    def worker_hook(self, kind: str, worker: Worker) -> None:
        """The same at a worker."""
        if self.traps:
            trap = self.traps.pop(kind, None)
            if trap is not None:
                trap(worker)

    # Quiet

    def thaw(self) -> None:
        """Something happens: heartbeats are played until all is well again."""
        self.time.thaw()
        self.well_since = math.inf
        if not self._freezing:
            self._freezing = True
            self.time.after(FREEZE_EVERY_S, self._try_freeze)

    @property
    def is_starved(self) -> bool:
        """True while a launch waits for a free slot."""
        return self.leader is not None and self.leader.cron.waits_for_workers

    def _try_freeze(self) -> None:
        if self._is_settled():
            self._freezing = False
            self.time.freeze()
            if self.is_well():
                self.well_since = self.time.now
        else:
            self.time.after(FREEZE_EVERY_S, self._try_freeze)

    def _is_settled(self) -> bool:
        """True when nothing would change by heartbeats, and by their absence."""
        if self.log_faults.lost or self.log_faults.unknown or self._survivors:
            return False
        leader = self.leader
        if leader is None and not self.masters_gone:
            return False
        if leader is not None and leader.is_cut:
            return False
        if self.is_starved:
            return False  # The next heartbeat may tell of a free slot.
        return all(self._is_worker_settled(worker) for worker in self.workers.values())

    def _is_worker_settled(self, worker: Worker) -> bool:
        record = self.state.nodes.get(worker.id)
        is_out = record is None or record.state in (NodeState.DOWN, NodeState.LEFT)
        process = worker.process
        if process is None:
            return is_out or self.leader is None
        if self.leader is None:
            return not process.has_lease()
        if process.is_paused or worker.id in self.net.cut:
            return is_out and not process.has_lease()
        is_in = record is not None and record.state in (NodeState.ACTIVE, NodeState.DRAINING) and not record.is_suspect
        if not is_in or not process.is_well() or not all(self._counts(token) for token in process.orders):
            return False
        # Of a run that ends without a result, and of the slot that it leaves, only heartbeats tell.
        return not process.ends_in_silence and self.leader.knows_slots(worker.id, process.slots_free)

    def _counts(self, token: Token) -> bool:
        """True for an attempt that goes on; one that was given up is stopped by the next heartbeat."""
        launch = self.state.launches.get((token[0], WallMs(token[1])))
        return launch is not None and launch.attempt == token[2] and not launch.state.has_ended

    def is_well(self) -> bool:
        """True when no fault is left but clocks that are wrong."""
        return self.leader is not None and any(node.is_serving for node in self.state.nodes.values())

    # What runs do

    def fate(self, rng: random.Random, spec: types_pb2.CronJobSpec) -> tuple[float, int]:
        """How long a run would take, and how it would end."""
        chance = rng.random()
        state = FINAL[1] if rng.random() < 0.06 else FINAL[0]
        if chance < 0.85:
            return rng.uniform(0.2, 20.0), state
        if chance < 0.97:
            return rng.uniform(20.0, 250.0), state
        return rng.uniform(0.5, 2.5) * spec.timeout_s, state

    # The end

    def check_all(self) -> None:
        """Everything that must hold once the seed is over."""
        validate(self.state)
        self.oracle.check_end()


@contextmanager
def failing_as_seed(world: World) -> Iterator[None]:
    """Turns what goes wrong into a SeedFailed that tells the story."""
    try:
        yield
    except AssertionError as error:
        story = "\n".join(world.trace)
        raise SeedFailed(
            f"seed {world.seed}: {error}\n{story}\n{replay(world.seed, 'tests/sim/test_cron_seeds.py')}"
        ) from error


@contextmanager
def without_looks_at_the_clock() -> Iterator[None]:
    """See the module: the world plays them itself, after steps."""
    before = cron_control.WALL_CHECK_S
    cron_control.WALL_CHECK_S = 1e6
    try:
        yield
    finally:
        cron_control.WALL_CHECK_S = before
