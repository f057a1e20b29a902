"""RaftNode: what the rest of a master uses of the consensus. Runs on one event loop, without threads of its own.

    peers --frames--> PeerTransport --messages--> Engine (PySyncObj) --entries--> machine
    callers --propose--> RaftNode --payload--> Engine        RaftNode --step--> Engine, after each of these and by timer

A step is scheduled once per turn of the event loop, however many frames and proposals came in that turn, so
that they share one append. Listeners are called after the step, on the loop, with everything up to date.

Outcomes of `propose`: a result of the machine, or an exception that says whether the command may have been
applied (coordinator/model/errors.py). What is definitely not applied because the leader was changing is
proposed again until the deadline; what may be applied never is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pysyncobj import FAIL_REASON

from coordinator.api.v1 import command_pb2
from coordinator.config import MasterSettings, RaftSettings
from coordinator.machine.machine import apply_bytes
from coordinator.machine.snapshot import decode_snapshot, encode_snapshot
from coordinator.machine.state import State, Transition
from coordinator.model import Clock
from coordinator.model.errors import (
    ConfigError,
    CoordinatorError,
    InvalidRequest,
    NoLeader,
    NotLeader,
    OutcomeUnknown,
    Overloaded,
    RefusalReason,
    Refused,
    TimedOut,
)
from coordinator.raft.engine import COMMAND_BYTES_LIMIT, Apply, Engine
from coordinator.raft.journal import Journal
from coordinator.raft.snapshot import SnapshotStore
from coordinator.raft.transport import PeerTransport, parse_address

RETRY_S = 0.02
"""Pause before a command that was definitely not applied is proposed again; a fraction of an election."""
_PROPOSE_AGAIN = frozenset({FAIL_REASON.MISSING_LEADER, FAIL_REASON.NOT_LEADER, FAIL_REASON.DISCARDED})

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Machine:
    """The state machine that is replicated; tests bring their own. Of `State` this package reads only `index`."""

    apply: Apply = apply_bytes
    encode: Callable[[State], bytes] = encode_snapshot
    decode: Callable[[bytes], State] = decode_snapshot


@dataclass(frozen=True, slots=True)
class RaftStatus:
    """How one master stands in the consensus."""

    role: str
    """"follower", "candidate", "leader" or "stopped"."""
    leader_id: str | None
    term: int
    commit_index: int
    applied_index: int
    log_entries: int
    log_bytes: int
    connected_peers: tuple[str, ...]
    """Ids, sorted."""


@dataclass(slots=True)
class _Waiter:
    """A proposal that waits for its outcome; the engine calls it once, or never."""

    future: asyncio.Future[command_pb2.CommandResult]
    reason: int | None = None

    def __call__(self, result: command_pb2.CommandResult | None, reason: int) -> None:
        if self.future.done():
            return
        self.reason = reason
        if reason == FAIL_REASON.SUCCESS and result is not None:
            self.future.set_result(result)
        else:
            self.future.set_exception(_error_of(reason))


@dataclass(slots=True)
class _Barriers:
    """Barriers that wait: everybody who comes while one runs shares the next one."""

    following: asyncio.Future[None] | None = None
    runner: asyncio.Task[None] | None = None


@dataclass(slots=True)
class _Listeners:
    transition: list[Callable[[Transition], None]] = field(default_factory=list)
    leadership: list[Callable[[bool, int], None]] = field(default_factory=list)


class RaftNode:
    """One master's replica of the state machine.

    After `start`, watch `fatal`: when it gets an exception (Damaged, ApplyFailed, OSError of the disk), this master has
    already stopped taking part, and the daemon must end with the exception's message.
    """

    def __init__(
        self,
        *,
        self_id: str,
        masters: tuple[MasterSettings, ...],
        cluster_name: str,
        directory: Path,
        settings: RaftSettings,
        clock: Clock,
        machine: Machine | None = None,
        rng: random.Random | None = None,
        ssl_server: ssl.SSLContext | None = None,
        ssl_client: ssl.SSLContext | None = None,
    ) -> None:
        """Raises ConfigError for what cannot work; touches neither disk nor network."""
        addresses = {master.id: parse_address(master.id, master.peer_address) for master in masters}
        if self_id not in addresses:
            raise ConfigError([f"master {self_id!r} is not among the masters {', '.join(sorted(addresses))}"])
        if settings.command_bytes_max > COMMAND_BYTES_LIMIT:
            found = settings.command_bytes_max
            raise ConfigError([f"raft.command_bytes_max is {found}, at most {COMMAND_BYTES_LIMIT} is possible"])
        own = addresses.pop(self_id)
        self.self_id = self_id
        self._cluster_name = cluster_name
        self._directory = directory
        self._settings = settings
        self._clock = clock
        self._machine = machine or Machine()
        self._rng = rng or random.Random()
        # Silence for two election timeouts: by then an election has long begun where it was the leader.
        self._transport = PeerTransport(
            own,
            tuple(addresses.values()),
            cluster_name,
            2 * settings.election_timeout_s_max,
            ssl_server=ssl_server,
            ssl_client=ssl_client,
        )
        self._engine: Engine | None = None
        self._last_state = State()
        self._journal: Journal | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._loop: asyncio.AbstractEventLoop
        self._fatal: asyncio.Future[None]
        self._timer: asyncio.TimerHandle | None = None
        self._is_step_scheduled = False
        self._has_expired = False
        self._in_flight: set[asyncio.Future[command_pb2.CommandResult]] = set()
        self._proposals = 0
        self._leader_known = asyncio.Event()
        self._leadership_lost = asyncio.Event()
        self._told_term: int | None = None
        self._barriers = _Barriers()
        self._listeners = _Listeners()

    # Life

    async def start(self) -> None:
        """Takes the peer port, loads what is on disk, joins the others.

        Raises ConfigError (the port cannot be had), Damaged (what is on disk cannot be trusted), OSError (the disk).
        """
        self._loop = asyncio.get_running_loop()
        self._fatal = self._loop.create_future()
        # Whoever does not watch it shall not be told at exit that nobody did.
        self._fatal.add_done_callback(lambda fatal: fatal.cancelled() or fatal.exception())
        # The port comes first: a second daemon on the same directory fails before it touches a file.
        await self._transport.bind()
        try:
            self._load()
        except BaseException:
            await self.stop()
            raise
        self._transport.on_activity = self._schedule_step
        self._transport.on_failure = self._fail
        await self._transport.open()
        self._tick()

    def _load(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"snapshot-{self.self_id}")
        machine = self._machine
        snapshots = SnapshotStore(self._directory, self._executor, machine.encode, machine.decode)
        snapshots.on_written = self._wake_from_thread
        self._journal = Journal(self._directory, f"{self._cluster_name}/{self.self_id}")
        self._engine = Engine(
            transport=self._transport,
            journal=self._journal,
            snapshots=snapshots,
            apply=machine.apply,
            settings=self._settings,
            wall_ms=self._clock.wall_ms,
            rng=self._rng,
        )

    async def stop(self) -> None:
        """Leaves without a goodbye and closes everything; safe to call twice. What is in flight gets OutcomeUnknown."""
        self._halt()
        await self._transport.close()
        if self._barriers.runner:
            self._barriers.runner.cancel()
            await asyncio.gather(self._barriers.runner, return_exceptions=True)
        if self._executor:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def _halt(self) -> None:
        """Stops taking part, at once."""
        engine, self._engine = self._engine, None
        if self._timer:
            self._timer.cancel()
        self._set_leadership(None)
        self._leader_known.clear()
        for future in list(self._in_flight):
            if not future.done():
                future.set_exception(OutcomeUnknown(f"master {self.self_id} stopped; the command may be applied"))
        if engine:
            engine.close()
        elif self._journal:
            self._journal.close()

    def _fail(self, error: Exception) -> None:
        if not self._fatal.done():
            log.critical("%s: stopped taking part in the consensus: %s", self.self_id, error)
            self._fatal.set_exception(error)
            self._halt()
            self._loop.create_task(self._transport.close())

    # Reading

    @property
    def state(self) -> State:
        """The state after everything that this master has applied; the empty state before `start`."""
        return self._engine.state if self._engine else self._last_state

    @property
    def is_leader(self) -> bool:
        """True while this master leads, by what it knows, and has applied all that was committed before its term."""
        return self._told_term is not None

    @property
    def leader_id(self) -> str | None:
        """Who leads, as far as this master knows."""
        return self._engine.leader_id if self._engine else None

    @property
    def term(self) -> int:
        """The Raft term."""
        return self._engine.term if self._engine else 0

    @property
    def is_ready(self) -> bool:
        """True when it knows a leader and once had applied all that a leader called committed."""
        engine = self._engine
        return engine is not None and engine.leader_id is not None and engine.has_caught_up

    @property
    def fatal(self) -> asyncio.Future[None]:
        """Gets an exception when this master must end; exists after `start`, never gets a result."""
        return self._fatal

    def status(self) -> RaftStatus:
        """How this master stands now."""
        engine, journal = self._engine, self._journal
        if engine is None or journal is None:
            return RaftStatus("stopped", None, 0, 0, 0, 0, 0, ())
        return RaftStatus(
            role=engine.role,
            leader_id=engine.leader_id,
            term=engine.term,
            commit_index=engine.commit_index,
            applied_index=engine.applied_index,
            log_entries=len(journal),
            log_bytes=journal.size_bytes,
            connected_peers=self._transport.connected_ids,
        )

    def on_transition(self, callback: Callable[[Transition], None]) -> None:
        """Calls back for every applied log entry, in order, once `state` includes it.

        A follower that was far behind gets a whole state from the leader: then there is one Transition with that state
        and without changes, in the place of all that it missed. A listener's exception is logged and dropped.
        """
        self._listeners.transition.append(callback)

    def on_leadership(self, callback: Callable[[bool, int], None]) -> None:
        """Calls back with (is_leader, term) when that changes; True only as `is_leader` says."""
        self._listeners.leadership.append(callback)

    # Writing

    async def propose(
        self, command: command_pb2.Command, timeout_s: float | None = None
    ) -> command_pb2.CommandResult:
        """Replicates a command through the leader, whoever it is, and returns what applying it here answered.

        Definitely not applied: InvalidRequest (too large), Overloaded, NoLeader (none until the deadline).
        May be applied: OutcomeUnknown, TimedOut. The deadline is `timeout_s`, by default settings.propose_timeout_s.
        """
        payload = command.SerializeToString()
        if len(payload) > self._settings.command_bytes_max:
            limit = self._settings.command_bytes_max
            raise InvalidRequest(f"the command has {len(payload)} bytes, at most {limit} are allowed; send less")
        if self._proposals >= self._settings.proposals_max:
            raise Overloaded(f"{self._proposals} proposals are in flight at master {self.self_id}; try again later")
        deadline = self._loop.time() + (self._settings.propose_timeout_s if timeout_s is None else timeout_s)
        self._proposals += 1
        try:
            while True:
                await self._await_leader(deadline)
                outcome = await self._propose_once(payload, deadline)
                if not isinstance(outcome, int):
                    return outcome
                await asyncio.sleep(min(RETRY_S, max(0.0, deadline - self._loop.time())))
        finally:
            self._proposals -= 1

    async def _await_leader(self, deadline: float) -> None:
        if not self._leader_known.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self._leader_known.wait()
        if self._loop.time() >= deadline:
            raise NoLeader(f"master {self.self_id} reaches no leader; are a majority of the masters running?")

    async def _propose_once(self, payload: bytes, deadline: float) -> command_pb2.CommandResult | int:
        """The result, or the reason when the command may be proposed again."""
        engine = self._engine
        if engine is None:
            raise NoLeader(f"master {self.self_id} does not run")
        waiter = _Waiter(self._loop.create_future())
        timer = self._loop.call_at(deadline, self._expire, waiter.future)
        self._in_flight.add(waiter.future)
        try:
            engine.propose(payload, waiter)
            self._schedule_step()
            return await waiter.future
        except CoordinatorError:
            if waiter.reason is None or waiter.reason not in _PROPOSE_AGAIN:
                raise
            return waiter.reason
        finally:
            timer.cancel()
            self._in_flight.discard(waiter.future)
            self._has_expired |= waiter.reason is None

    def _expire(self, future: asyncio.Future[command_pb2.CommandResult]) -> None:
        if not future.done():
            future.set_exception(TimedOut("no answer within the deadline; the command may be applied"))

    async def barrier(self, timeout_s: float | None = None) -> None:
        """Returns once `state` includes everything that was acknowledged anywhere before the call.

        Costs one commit, shared by all who call while an earlier barrier is on its way. Raises what `propose`
        raises; as a barrier changes nothing, calling again is always safe.
        """
        if self._barriers.following is None:
            self._barriers.following = self._loop.create_future()
            self._barriers.following.add_done_callback(lambda done: done.cancelled() or done.exception())
        if self._barriers.runner is None:
            self._barriers.runner = self._loop.create_task(self._run_barriers(), name="raft barriers")
        shared = asyncio.shield(self._barriers.following)
        try:
            await asyncio.wait_for(shared, self._settings.propose_timeout_s if timeout_s is None else timeout_s)
        except TimeoutError:
            raise TimedOut("no majority of the masters answered within the deadline") from None

    async def _run_barriers(self) -> None:
        barriers = self._barriers
        try:
            while (current := barriers.following) is not None:
                barriers.following = None
                try:
                    await self.propose(command_pb2.Command(cause="barrier", barrier=command_pb2.Barrier()))
                except CoordinatorError as error:
                    current.set_exception(error)
                except asyncio.CancelledError:
                    current.set_exception(NoLeader(f"master {self.self_id} stopped"))
                    raise
                else:
                    current.set_result(None)
        finally:
            barriers.runner = None

    async def transfer_leadership(self, target_id: str | None) -> None:
        """Hands the leadership to a follower that has the whole log, or to the best one; returns when it is gone.

        Raises NotLeader, Refused (unknown target, or it lacks entries), TimedOut (it did not take over).
        """
        engine = self._engine
        if engine is None or not self.is_leader:
            raise NotLeader(f"master {self.self_id} does not lead", leader_id=self.leader_id or "")
        reason = engine.transfer(target_id)
        if reason != FAIL_REASON.SUCCESS:
            wanted = f"master {target_id}" if target_id else "any other master"
            raise Refused(RefusalReason.PRECONDITION, f"{wanted} cannot take over: unknown, not connected, or behind")
        try:
            async with asyncio.timeout(self._settings.propose_timeout_s):
                await self._leadership_lost.wait()
        except TimeoutError:
            raise TimedOut("the other master did not take over; look who leads before trying again") from None

    def write_snapshot(self) -> None:
        """Has a snapshot written and the log cut soon, in the background."""
        if self._engine:
            self._engine.write_snapshot()
            self._schedule_step()

    # Stepping

    def _wake_from_thread(self) -> None:
        # The loop may be closed when a snapshot outlives its node.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._schedule_step)

    def _schedule_step(self) -> None:
        if not self._is_step_scheduled and self._engine:
            self._is_step_scheduled = True
            self._loop.call_soon(self._step)

    def _tick(self) -> None:
        """Twice per append period: elections and heartbeats are then late by half a period at most."""
        if self._engine is None:
            return
        self._timer = self._loop.call_later(self._settings.append_period_s / 2, self._tick)
        self._transport.check(self._loop.time())
        if self._has_expired:
            self._has_expired = False
            self._engine.forget(lambda waiter: isinstance(waiter, _Waiter) and waiter.future.done())
        self._schedule_step()

    def _step(self) -> None:
        self._is_step_scheduled = False
        engine = self._engine
        if engine is None:
            return
        try:
            engine.step()
        except Exception as error:
            # Half a step may have been done, and nothing that is known to fail does so harmlessly.
            self._fail(error)
            return
        self._tell(engine)
        if engine.wants_step:
            self._schedule_step()

    def _tell(self, engine: Engine) -> None:
        self._last_state = engine.state
        for transition in engine.take_transitions():
            for listener in self._listeners.transition:
                _call(listener, transition)
        if engine.leader_id is None:
            self._leader_known.clear()
        else:
            self._leader_known.set()
        self._set_leadership(engine.term if engine.leads_whole else None)

    def _set_leadership(self, term: int | None) -> None:
        before, self._told_term = self._told_term, term
        if before == term:
            return
        if before is not None:
            self._leadership_lost.set()
            for listener in self._listeners.leadership:
                _call(listener, False, before)
        if term is not None:
            self._leadership_lost.clear()
            log.info("%s: leads in term %d", self.self_id, term)
            for listener in self._listeners.leadership:
                _call(listener, True, term)


def _call(listener: Callable[..., None], *arguments: object) -> None:
    try:
        listener(*arguments)
    except Exception:
        log.exception("a listener of the consensus failed")


def _error_of(reason: int) -> CoordinatorError:
    match reason:
        case FAIL_REASON.QUEUE_FULL:
            return Overloaded("the leader's queue is full; try again later")
        case FAIL_REASON.MISSING_LEADER | FAIL_REASON.NOT_LEADER:
            return NoLeader("the leader is changing")
        case FAIL_REASON.DISCARDED:
            return NoLeader("a new leader put another command in the place of this one")
        case FAIL_REASON.REQUEST_DENIED:
            return InvalidRequest("the leader does not take this command")
        case _:
            return OutcomeUnknown("the leader changed while the command was on its way; it may be applied")
