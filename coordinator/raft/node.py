"""RaftNode: what the rest of a master uses of the consensus. Runs on one event loop, without threads of its own.

    peers --frames--> PeerTransport --messages--> Consensus (PySyncObj) --entries--> machine
    callers --propose--> Proposals --payload--> Consensus
    RaftNode --step--> Consensus, after each of these and by timer

A step is scheduled once per turn of the event loop, however many frames and proposals came in that turn, so
that they share one append. Listeners are called after the step, on the loop, with everything up to date.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path

from coordinator.api.v1 import command_pb2
from coordinator.config import MasterSettings, RaftSettings
from coordinator.machine.state import State, Transition
from coordinator.model import Clock
from coordinator.model.errors import ConfigError, NotLeader
from coordinator.raft.address import parse_address
from coordinator.raft.consensus import COMMAND_BYTES_LIMIT, Consensus
from coordinator.raft.engine import now_s
from coordinator.raft.figures import RaftFigures
from coordinator.raft.files import DiskFailed
from coordinator.raft.gathering import LINGER_S
from coordinator.raft.handover import hand_over
from coordinator.raft.interface import Listeners, Machine, PeerStanding, RaftStatus
from coordinator.raft.parts import Makers, Parts, Setting, open_parts
from coordinator.raft.proposals import Proposals
from coordinator.raft.stalls import Stalls
from coordinator.raft.transport import PeerTransport
from coordinator.security.credentials import Credentials

log = logging.getLogger(__name__)


class RaftNode:
    """One master's replica of the state machine.

    After `start`, watch `fatal`: when it gets an exception (Damaged, ApplyFailed, DiskFailed), this master has
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
        credentials: Credentials | None = None,
        makers: Makers | None = None,
    ) -> None:
        """Raises ConfigError for what cannot work; reads its certificate, and touches neither log nor network.

        Without credentials it speaks plain text to its peers.
        """
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
        self._makers = makers or Makers()
        # Silence for two election timeouts: by then an election has long begun where it was the leader.
        self._transport = PeerTransport(
            own,
            tuple(addresses.values()),
            cluster_name,
            2 * settings.election_timeout_s_max,
            credentials=credentials,
        )
        self._consensus: Consensus | None = None
        self._last_state = State()
        self._parts: Parts | None = None
        self._loop: asyncio.AbstractEventLoop
        self._fatal: asyncio.Future[None]
        self._timer: asyncio.TimerHandle | None = None
        self._closing: asyncio.Task[None] | None = None
        self._is_step_scheduled = False
        self._is_gathering = False
        self._stalls = Stalls(settings.append_period_s / 2, settings.election_timeout_s_min)
        self._proposals = Proposals(self_id, settings, self._proposed)
        self._leadership_lost = asyncio.Event()
        self._told_term: int | None = None
        self._listeners = Listeners()

    # Life

    async def start(self) -> None:
        """Takes the peer port, loads what is on disk, joins the others.

        Raises ConfigError (the port cannot be had), Damaged (what is on disk cannot be trusted), DiskFailed.
        """
        self._loop = asyncio.get_running_loop()
        self._fatal = self._loop.create_future()
        # Whoever does not watch it shall not be told at exit that nobody did.
        self._fatal.add_done_callback(lambda fatal: fatal.cancelled() or fatal.exception())
        # The port comes first: a second daemon on the same directory fails before it touches a file.
        await self._transport.bind()
        try:
            self._load()
        except OSError as error:
            await self.stop()
            raise DiskFailed(self._directory, error) from None
        except BaseException:
            await self.stop()
            raise
        self._transport.on_activity = self._schedule_step
        self._transport.on_failure = self._fail
        await self._transport.open()
        self._tick()

    def _load(self) -> None:
        setting = Setting(
            transport=self._transport,
            directory=self._directory,
            name=f"{self._cluster_name}/{self.self_id}",
            machine=self._machine,
            settings=self._settings,
            wall_ms=self._clock.wall_ms,
            rng=self._rng,
            on_snapshot=self._wake_from_thread,
        )
        self._parts = open_parts(setting, self._makers)
        self._consensus = self._proposals.consensus = self._parts.consensus

    async def stop(self) -> None:
        """Leaves without a goodbye and closes everything; safe to call twice. What is in flight gets OutcomeUnknown."""
        parts = self._parts
        if self._consensus and parts:
            # So that the next start notices when the disk loses anything meanwhile; without it the stop is as good.
            with contextlib.suppress(OSError):
                parts.journal.mark()
        self._halt()
        await self._transport.close()
        if self._closing:
            await self._closing
        await self._proposals.close()
        if parts:
            # A snapshot that is being written ends first: the next process on this directory may write the same name.
            await asyncio.to_thread(parts.executor.shutdown, cancel_futures=True)

    def _halt(self) -> None:
        """Stops taking part, at once."""
        consensus, self._consensus = self._consensus, None
        if self._timer:
            self._timer.cancel()
        self._set_leadership(None)
        self._proposals.halt()
        if consensus:
            consensus.close()

    def _fail(self, error: Exception) -> None:
        if isinstance(error, OSError):
            error = DiskFailed(self._directory, error)
        if not self._fatal.done():
            log.critical("%s: stopped taking part in the consensus: %s", self.self_id, error)
            self._fatal.set_exception(error)
            self._halt()
            self._closing = self._loop.create_task(self._transport.close())

    # Reading

    @property
    def state(self) -> State:
        """The state after everything that this master has applied; the empty state before `start`."""
        return self._consensus.state if self._consensus else self._last_state

    @property
    def is_leader(self) -> bool:
        """True while this master leads, by what it knows, and has applied all that was committed before its term."""
        return self._told_term is not None

    @property
    def has_lease(self) -> bool:
        """True while this master is certain that nobody else leads; then `state`, read at once, is linearizable."""
        return self._consensus is not None and self._consensus.has_lease

    @property
    def leader_id(self) -> str | None:
        """Who leads, as far as this master knows; None while it is cut off from that one."""
        return self._consensus.leader_id if self._consensus else None

    @property
    def term(self) -> int:
        """The Raft term."""
        return self._consensus.term if self._consensus else 0

    @property
    def is_ready(self) -> bool:
        """True when it knows a leader and once had applied all that a leader called committed."""
        consensus = self._consensus
        return consensus is not None and consensus.leader_id is not None and consensus.has_caught_up

    @property
    def fatal(self) -> asyncio.Future[None]:
        """Gets an exception when this master must end; exists after `start`, never gets a result."""
        return self._fatal

    @property
    def cluster_id(self) -> str:
        """The identity of the cluster that this master's disk belongs to; empty while it has not learned it."""
        return self._parts.seat.identity.cluster_id if self._parts else ""

    def standing(self, id: str) -> PeerStanding | None:
        """At the leader: another master as it sees it; None while that is not connected."""
        return self._parts.seat.standing(id) if self._parts else None

    def move_peer(self, id: str, address: str) -> None:
        """Looks for another master at "host:port" until the state says otherwise. Raises ConfigError for no address."""
        self._transport.move(id, address)

    def status(self) -> RaftStatus:
        """How this master stands now."""
        consensus, parts = self._consensus, self._parts
        if consensus is None or parts is None:
            return RaftStatus("stopped", None, 0, 0, 0, 0, 0, ())
        return RaftStatus(
            role=consensus.role,
            leader_id=consensus.leader_id,
            term=consensus.term,
            commit_index=consensus.commit_index,
            applied_index=consensus.applied_index,
            log_entries=len(parts.journal),
            log_bytes=parts.journal.size_bytes,
            connected_peers=self._transport.connected_ids,
        )

    def figures(self) -> RaftFigures | None:
        """Figures for those who watch; None while it does not run."""
        consensus, transport, waiting = self._consensus, self._transport, self._proposals.in_flight
        return consensus.figures(transport.traffic, transport.queued_bytes, waiting) if consensus else None

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
        self, command: command_pb2.Command, timeout_s: float | None = None, *, is_urgent: bool = False
    ) -> command_pb2.CommandResult:
        """Replicates a command through the leader, whoever it is, and returns what applying it here answered.

        Definitely not applied: InvalidRequest (too large), Overloaded, NoLeader (none until the deadline).
        May be applied: OutcomeUnknown, TimedOut. The deadline is `timeout_s`, by default settings.propose_timeout_s.
        An urgent one does not wait for others to share its commit with.
        """
        return await self._proposals.propose(command, timeout_s, is_urgent=is_urgent)

    async def barrier(self, timeout_s: float | None = None) -> None:
        """Returns once `state` includes everything that was acknowledged anywhere before the call.

        Costs one commit, shared by all who call while an earlier barrier is on its way. Raises what `propose`
        raises; as a barrier changes nothing, calling again is always safe.
        """
        await self._proposals.barrier(timeout_s)

    async def read_barrier(self, timeout_s: float | None = None) -> None:
        """Afterwards `state`, read before the next `await`, shows everything that was acknowledged before the call.

        Free on a leader with a lease, else as dear as `barrier`, and raising the same.
        """
        if not self.has_lease:
            await self.barrier(timeout_s)

    async def transfer_leadership(self, target_id: str | None) -> None:
        """Hands the leadership to a follower that has the whole log, or to the best one; returns when it is gone.

        Raises NotLeader, Refused (unknown target, or it lacks entries), TimedOut (it did not take over).
        """
        consensus = self._consensus
        if consensus is None or not self.is_leader:
            raise NotLeader(f"master {self.self_id} does not lead", leader_id=self.leader_id or "")
        await hand_over(consensus, self._transport, target_id, self._settings, self._leadership_lost)

    def write_snapshot(self) -> None:
        """Has a snapshot written and the log cut soon, in the background."""
        if self._consensus:
            self._consensus.write_snapshot()
            self._schedule_step()

    # Stepping

    def _wake_from_thread(self) -> None:
        # The loop may be closed when a snapshot outlives its node.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._schedule_step)

    def _proposed(self) -> None:
        """A step soon, or once the commit that the command has to wait for should be done; it is mostly done before."""
        if self._consensus is None or self._consensus.may_take_commands():
            self._schedule_step()
        elif not self._is_gathering:
            self._is_gathering = True
            self._loop.call_later(LINGER_S, self._gathered)

    def _gathered(self) -> None:
        self._is_gathering = False
        self._proposed()

    def _schedule_step(self) -> None:
        if not self._is_step_scheduled and self._consensus:
            self._is_step_scheduled = True
            self._loop.call_soon(self._step)

    def _tick(self) -> None:
        """Twice per append period: elections and heartbeats are then late by half a period at most."""
        if self._consensus is None:
            return
        self._timer = self._loop.call_later(self._settings.append_period_s / 2, self._tick)
        synced_s = self._parts.journal.syncs.sum_s if self._parts else 0.0
        stall = self._stalls.ticked(self._loop.time(), synced_s, time.process_time())
        for line in filter(None, (stall, self._consensus.elections.duty.clocks.news(now_s()))):
            log.warning("%s: %s", self.self_id, line)
        self._transport.check(self._loop.time())
        self._proposals.prune()
        self._schedule_step()

    def _step(self) -> None:
        self._is_step_scheduled = False
        consensus = self._consensus
        if consensus is None:
            return
        try:
            consensus.step()
            if self._parts:
                self._parts.seat.look()
        except Exception as error:
            # Half a step may have been done, and nothing that is known to fail does so harmlessly.
            self._fail(error)
            return
        self._tell(consensus)
        if consensus.wants_step:
            self._schedule_step()

    def _tell(self, consensus: Consensus) -> None:
        self._last_state = consensus.state
        term = consensus.term if consensus.leads_whole else None
        if term != self._told_term:
            # A deposed leader hears of that before it hears what its successor did.
            self._set_leadership(None)
        for transition in consensus.take_transitions():
            self._listeners.applied(transition)
        if consensus.leader_id is None:
            self._proposals.leader_known.clear()
        else:
            self._proposals.leader_known.set()
        self._set_leadership(term)

    def _set_leadership(self, term: int | None) -> None:
        before, self._told_term = self._told_term, term
        if before == term:
            return
        if before is not None:
            self._leadership_lost.set()
            self._listeners.led(False, before)
        if term is not None:
            self._leadership_lost.clear()
            log.info("%s: leads in term %d", self.self_id, term)
            self._listeners.led(True, term)
