"""A move of a shard's primary from A to B in the simulated cluster, which may be cut at one of its steps.

The world is cluster_world.py's without its random faults: the real consensus of three masters, the real state machine
and controllers, the real session and replica machines; A is primary, R the second replica, B the target, and there is a
fourth worker. A step is a message about the move between two workers, or between a worker and the leader, or a commit
that changes the move or its shard. What masters say to each other is not counted: it is the same for every command,
and raft_faults.py cuts it everywhere.

A cut loses the message with its stream; a commit is applied and nobody has heard of it yet. At the same moment A, B or
the leading master crashes, or two of them, and is back after a while. Or nothing is lost and nobody crashes, but an
operator asks for the move to be rolled back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from coordinator.api.v1 import command_pb2, session_pb2, types_pb2
from coordinator.machine.codec import settings_to_proto
from coordinator.machine.state import State
from coordinator.model import Move, MoveKind, MovePhase, Shard
from coordinator.raft import snapshot
from tests.sim import raft_faults, replica_faults, replica_world
from tests.sim.cluster_faults import TIMES, Plan
from tests.sim.cluster_world import CHUNK_BYTES, RESTORED_S_MAX, World
from tests.sim.raft_world import LIVE_S_MAX, _simulated
from worker_agent.replica_core import Protections
from worker_agent.shard_interface import SendToPeer

if TYPE_CHECKING:
    from tests.sim.cluster_net import SessionStream

PLAN = Plan(
    masters=raft_faults.Plan(masters=3, clients=0, drift=0.02),
    workers=replica_faults.Plan(workers=4, replicas=2, clients=3, think_s=0.02, drift=0.02, times=TIMES),
    shards=4,
    users=6,
)
"""The fewest shards of which each worker has some, and writes to the one that moves all the time."""
WATCH_S = 0.001
MOVED_S_MAX = 5.0
"""A move that nothing happens to."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Cut at the step of this number; the victims, of "A", "B" and "leader", are away for so long. None: an abort."""

    number: int
    victims: tuple[str, ...]
    away_s: float


class MovingWorld(World):
    """One life of the cluster with one move in it."""

    def __init__(self, cut: Cut | None, seed: int) -> None:
        super().__init__(seed, PLAN, Protections())
        self.cut = cut
        self.steps: list[str] = []
        """Messages and commits of the move, in order."""
        self.is_cut = False
        self.paused_s = 0.0
        """How long nobody served the shard while it moved."""
        self._shard_id = self._move_id = 0
        self._letters: dict[str, str] = {}
        """What the workers are called here; of those that have a part in it."""
        self._mute: set[str] = set()
        self._reports: dict[str, session_pb2.ReplicaReport] = {}

    # The steps

    @property
    def move(self) -> Move | None:
        """The move, as who knows most of it has it."""
        state = self.newest_state()
        return state.moves.get(self._move_id) or state.ended_moves.get(self._move_id)

    def _is_on(self) -> bool:
        move = self.move
        return move is not None and not move.has_ended

    def _step(self, name: str) -> bool:
        """Notes a step; True when it is the one that is cut, and then the victims crash."""
        self.steps.append(name)
        cut = self.cut
        if cut is None or self.is_cut or len(self.steps) - 1 != cut.number:
            return False
        self.is_cut = True
        if not cut.victims:
            self.note(f"-- at step {cut.number}, {name}, the operator wants the move to be rolled back")
            abort = command_pb2.AbortMove(move_id=self._move_id, reason="the operator wants it")
            command = command_pb2.Command(request_id="abort", abort_move=abort)
            self.after(0.0, lambda: self._propose(command))
            return False
        self.note(f"-- cut at step {cut.number}, {name}; {' and '.join(cut.victims)} crash")
        for worker, letter in self._letters.items():
            if letter in cut.victims:
                self._mute.add(worker)
                self.after(0.0, lambda worker=worker: self._crash(worker, cut.away_s))  # type: ignore[misc]
        if "leader" in cut.victims:
            self._end_leader(cut.away_s)
        return True

    def _crash(self, name: str, away_s: float) -> None:
        worker = self.workers.workers[name]
        worker.crash(is_silent=False)
        self._mute.discard(name)
        self.after(away_s, worker.start)

    def _end_leader(self, away_s: float) -> None:
        leader = self.leader()
        assert leader is not None
        self.after(away_s, lambda: leader.start() if leader.consensus is None else None)
        if self.running is leader:
            # In the middle of what it does: nothing that comes after this in its turn happens.
            leader.burn("the cut")
        self.after(0.0, lambda: leader.end(is_power_cut=False, why="the cut"))

    def _listen(self) -> None:
        """From now on messages pass here."""
        for worker in self.workers.workers.values():
            self._listen_to_worker(worker.name)
        for stream in self.net.sessions:
            self._listen_to_session(stream)
        open_session = self.net.open_session

        def on_open(worker: str, number: int, master: str) -> SessionStream:
            stream = open_session(worker, number, master)
            self._listen_to_session(stream)
            return stream

        self.net.open_session = on_open  # type: ignore[method-assign]

    def _listen_to_worker(self, name: str) -> None:
        worker = self.workers.workers[name]
        send = worker.send

        def on_send(action: SendToPeer) -> None:
            if name in self._mute:
                return
            message = action.message
            ends = [self._letters.get(name), self._letters.get(action.node_id)]
            is_step = message.shard_id == self._shard_id and all(ends) and self._is_on()
            if is_step and self._step(f"{ends[0]} to {ends[1]}: {message.WhichOneof('message')}"):
                opener, other = (action.node_id, name) if action.is_answer else (name, action.node_id)
                if (stream := self.net.streams.get((opener, other))) is not None:
                    self.net.drop(stream)
                return
            send(action)

        worker.send = on_send  # type: ignore[method-assign]

    def _listen_to_session(self, stream: SessionStream) -> None:
        send = stream.send

        def on_send(sender: str, item: Any) -> None:
            if sender in self._mute:
                return
            name = self._session_step(stream.worker, item) if self._is_on() else ""
            if name and self._step(name):
                stream.break_off()
                return
            send(sender, item)

        stream.send = on_send  # type: ignore[method-assign]

    def _session_step(self, worker: str, item: Any) -> str:
        """What a message of a session has to do with the move; empty when nothing."""
        letter = self._letters.get(worker)
        if letter is None:
            return ""
        if isinstance(item, session_pb2.OpenResponse):
            return f"leader to {letter}: assignment" if item.HasField("assignment") else ""
        if not isinstance(item, session_pb2.OpenRequest):
            return ""
        for report in item.replica_reports.reports:
            if report.shard_id == self._shard_id and report != self._reports.get(worker):
                self._reports[worker] = report
                progress = session_pb2.ReplicaProgress.Name(report.progress).removeprefix("REPLICA_PROGRESS_")
                return f"{letter} to leader: report {progress}{' with B' if report.caught_up else ''}"
        return ""

    def machine_moved(self, state: State) -> None:
        before = self._validated
        super().machine_moved(state)
        if not self._letters or state.index <= before.index:
            return
        places = [(each.moves.get(self._move_id), each.shards.get(self._shard_id)) for each in (before, state)]
        if places[0] == places[1] or (places[0][0] is None and places[1][0] is None):
            return
        move = state.moves.get(self._move_id) or state.ended_moves.get(self._move_id)
        if move is not None:
            self._step(f"commit {move.phase.name.lower()}")

    # One life

    def play(self) -> None:
        """Sets up, moves, and holds what is left to everything that must hold."""
        clients = self._set_up()
        self._pause_balance()
        self.run_until(self.now_s + 0.3)
        leader = self.leader()
        assert leader is not None
        state = self.newest_state()
        shard = next(shard for _, shard in sorted(state.shards.items()) if self._is_written(shard))
        source = shard.primary
        [other] = [name for name in shard.in_sync if name != source]
        target = next(name for name in self.workers.names if name not in shard.in_sync)
        self._shard_id = shard.id
        self._listen()
        self._letters = {source: "A", target: "B", other: "R"}
        self._move_id = state.next_move_id
        self._start(shard, source, target)
        self._watch()
        if not self._wait(RESTORED_S_MAX if self.cut is not None else MOVED_S_MAX, self._has_ended_whole):
            raise replica_world.Violation(f"the move goes on, or the cluster is not whole: {self.move} {self._show()}")
        assert self.is_cut == (self.cut is not None), "what should have been cut never came"
        self._hold_to_direction()
        self._end(clients)

    def _start(self, shard: Shard, source: str, target: str) -> None:
        start = command_pb2.StartMove(
            shard_id=shard.id,
            source=source,
            target=target,
            kind=types_pb2.MoveKind.ValueType(MoveKind.BALANCE.value),
            reason="it is interrupted",
            expected_epoch=shard.epoch,
        )
        self._propose(command_pb2.Command(request_id="move", start_move=start))

    def _propose(self, command: command_pb2.Command) -> None:
        """Gives the leader a command, once. It waits no longer than what the controllers decide: a step is a step."""
        command.cause = "test"
        leader = self.leader()
        assert leader is not None
        leader.enqueue(lambda master: master.propose(command, lambda *answer: None, is_urgent=True))

    def _pause_balance(self) -> None:
        """Nothing else moves but what is to be repaired."""
        settings = settings_to_proto(self.newest_state().settings)
        settings.rebalance_paused = True
        change = command_pb2.ChangeSettings(settings=settings)
        self.commit(command_pb2.Command(request_id="pause", cause="test", change_settings=change), LIVE_S_MAX)

    def _is_written(self, shard: Shard) -> bool:
        """True for a shard whose users have something by now."""
        return len(self.workers.workers[shard.primary].stores[shard.id].registers()) > 1

    def _has_ended_whole(self) -> bool:
        move = self.move
        return move is not None and move.has_ended and self._is_whole()

    def _watch(self) -> None:
        """Adds up how long nobody serves."""
        hosted = [worker.hosted.get(self._shard_id) for worker in self.workers.workers.values()]
        if not any(each is not None and each.machine.is_serving for each in hosted):
            self.paused_s += WATCH_S
        if self.move is None or self._is_on():
            self.after(WATCH_S, self._watch)

    def _hold_to_direction(self) -> None:
        """After the cutover only the loss of B takes a move back: while A is in sync its copy is the better one."""
        move = self.move
        assert move is not None
        is_b_lost = self.cut is not None and "B" in self.cut.victims
        if "commit removing" in self.steps and move.phase is not MovePhase.DONE and not is_b_lost:
            raise replica_world.Violation(f"after its cutover the move was rolled back: {move}")


def play(seed: int, cut: Cut | None = None) -> MovingWorld:
    """One life with one move. Raises AssertionError with its story."""
    world = MovingWorld(cut, seed)
    store = cast("Any", snapshot)
    try:
        with _simulated(world):
            store.CHUNK_BYTES = CHUNK_BYTES
            world.play()
    except Exception as error:
        where = f"seed {seed}, {cut} at {world.now_s:.4f} s"
        raise AssertionError("\n".join([f"{where}: {type(error).__name__}: {error}", *world.trace])) from error
    return world
