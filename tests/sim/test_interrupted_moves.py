"""A move of a shard's primary from A to B, interrupted once at every message and every commit that it consists of.

The world is that of the replica simulation (replica_world.py) without its random faults: a worker A that is primary, a
second replica R, a worker B that the shard moves to, a spare one, clients that write and read all the time. What an
undisturbed move consists of is written down below, and held to be complete. Each case cuts one of these, and at the
same moment A, B or the leading master crashes: a message is lost with its stream, a commit is known to nobody yet.

After each: the move has ended or was rolled back, the shard has all its replicas and serves, they are equal, and
nothing that was acknowledged is lost, repeated or out of order.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from coordinator.model import Monotonic
from tests.sim.replica_clients import Client
from tests.sim.replica_faults import Plan
from tests.sim.replica_master import Config
from tests.sim.replica_worker import Hosted
from tests.sim.replica_world import EQUAL_S_MAX, FORMED_S_MAX, RESTORED_S_MAX, World
from worker_agent.replica_core import Protections
from worker_agent.shard_interface import ReportReplica, SendToPeer

SHARD = 1
SEED = 7
"""Of a move whose steps all come before its end."""
MOVE_S_MAX = 5.0
ELECTION_S = 0.8
"""Until there is a leader again."""
AWAY_S = (0.3, 3.0)
"""How long a crashed worker is away: shorter and longer than it takes to be suspected."""
WATCH_S = 0.001
VICTIMS = ("A", "B", "leader")

STEPS = (
    "commit move from A to B",
    "leader to A: assignment",
    "leader to R: assignment",
    "leader to B: assignment",
    "A to B: probe",
    "A to leader: report ACCEPTED",
    "B to A: standing",
    "B to leader: report ACCEPTED",
    "A to B: copy_chunk",
    "A to B: append",
    "B to A: acknowledge",
    "B to A: copy_acknowledge",
    "R to leader: report ACCEPTED",
    "A to leader: report ACCEPTED with B",
    "commit B is in sync",
    "A to R: append",
    "R to A: acknowledge",
    "A to B: ceded",
    "B to A: ceded_acknowledge",
    "A to leader: report CEDED",
    "commit ceded",
    "B to A: probe",
    "B to R: probe",
    "A to B: standing",
    "B to A: append",
    "A to B: acknowledge",
    "R to B: standing",
    "B to R: append",
    "commit A gave it up",
)
"""Kinds of steps, by who says what to whom; a commit is the leader's."""


@dataclass(frozen=True)
class Cut:
    """Where it is cut: at the step of this number, whichever that is, or at the first one of this name."""

    victim: str
    away_s: float
    name: str = ""
    number: int = -1


class Moving:
    """A world in which one shard moves."""

    def __init__(self, cut: Cut | None = None, seed: int = SEED) -> None:
        plan = Plan(workers=4, shards=1, replicas=2, clients=3, kinds=(), drift=0.02, think_s=0.02)
        self.world = World(seed, plan, Protections())
        self.steps: list[str] = []
        """Messages and commits of the move, in order."""
        self._cut = cut
        self._is_cut = False
        self._names: dict[str, str] = {}
        self._mute: set[str] = set()
        self._said: dict[str, ReportReplica | None] = {}
        self._is_leaderless = False
        self.paused_s = 0.0
        """How long nobody served while the shard moved."""
        self._listen()

    @property
    def shard(self) -> Config:
        """The shard as the master has it."""
        return self.world.master.shards[SHARD]

    def letters(self, names: list[str]) -> list[str]:
        """The workers, as they are called here."""
        return [letter for letter, name in self._names.items() if name in names]

    # Listening

    def _listen(self) -> None:
        world, master = self.world, self.world.master
        for worker in world.workers.values():
            self._listen_to(worker.name)
        hear, push, changed, look = master.hear, master._push, master._changed, master._look

        def on_hear(
            name: str, life: int, generation: int, reports: dict[int, ReportReplica], sent_at: Monotonic
        ) -> None:
            report = reports.get(SHARD)
            is_news, self._said[name] = report != self._said.get(name), report
            told = "" if report is None else f"{report.progress.name} {'with B' if report.caught_up else ''}".rstrip()
            if not is_news or not self._step(name, "leader", f"report {told}"):
                hear(name, life, generation, reports, sent_at)

        def on_push(name: str) -> None:
            if not self._step("leader", name, "assignment"):
                push(name)

        def on_changed(shard: Config, why: str, *, is_new_epoch: bool = True) -> None:
            if self._names and shard.move is None and "gave it up" not in why:
                changed(shard, why, is_new_epoch=is_new_epoch)
                return
            # The commit has happened; the cut is before anybody hears of it.
            what = {name: letter for letter, name in self._names.items()}
            words = " ".join(what.get(word, word) for word in why.split())
            if self._step("leader", "", f"commit {words}") and self._cut and self._cut.victim == "leader":
                master.cut_off.update(world.names)
            changed(shard, why, is_new_epoch=is_new_epoch)

        def on_look(shard: Config) -> None:
            if not self._is_leaderless:
                look(shard)

        master.hear = on_hear  # type: ignore[method-assign]
        master._push = on_push  # type: ignore[method-assign]
        master._changed = on_changed  # type: ignore[method-assign]
        master._look = on_look  # type: ignore[method-assign]

    def _listen_to(self, name: str) -> None:
        worker = self.world.workers[name]
        send = worker.send

        def on_send(action: SendToPeer) -> None:
            kind = action.message.WhichOneof("message")
            if name in self._mute:
                return
            if self._step(name, action.node_id, str(kind)):
                opener, other = (action.node_id, name) if action.is_answer else (name, action.node_id)
                if (stream := self.world.net.streams.get((opener, other))) is not None:
                    self.world.net.drop(stream)
                return
            send(action)

        worker.send = on_send  # type: ignore[method-assign]

    def _step(self, sender: str, receiver: str, what: str) -> bool:
        """Notes a step of the move; True when it is the one that is cut."""
        letters = {name: letter for letter, name in self._names.items()} | {"leader": "leader"}
        if not self._names or (self.shard.move is None and "gave it up" not in what) or sender not in letters:
            return False
        if receiver and receiver not in letters:
            return False
        name = f"{letters[sender]} to {letters[receiver]}: {what}" if receiver else what
        self.steps.append(name)
        cut = self._cut
        if cut is None or self._is_cut or (name != cut.name and len(self.steps) - 1 != cut.number):
            return False
        self._is_cut = True
        self.world.note(f"-- cut at step {len(self.steps) - 1}, {name}; {cut.victim} crashes")
        if cut.victim == "leader":
            self._is_leaderless = True
            self.world.after(0.0, self._lose_leader)
        else:
            victim = self._names[cut.victim]
            self._mute.add(victim)
            self.world.after(0.0, lambda: self._crash(victim))
        return True

    # Crashes

    def _crash(self, name: str) -> None:
        assert self._cut is not None
        self.world.workers[name].crash(is_silent=False)
        self._mute.discard(name)
        self.world.after(self._cut.away_s, self.world.workers[name].start)

    def _lose_leader(self) -> None:
        """What was heard is forgotten, what was committed is not; nobody decides until there is a new leader."""
        master = self.world.master
        self._is_leaderless = True
        master.cut_off.update(self.world.names)
        self.world.after(ELECTION_S, self._elect)

    def _elect(self) -> None:
        master = self.world.master
        master.cut_off.clear()
        self._is_leaderless = False
        for known in master.known.values():
            known.reports, known.generation, known.heard_s = {}, 0, self.world.now_s

    # One life

    def play(self) -> None:
        """Founds, moves, and holds what is left to everything that must hold."""
        world = self.world
        for worker in world.workers.values():
            worker.start()
        world.master.start()
        assert world.run_until(FORMED_S_MAX, world._is_whole), "the shard is not formed"
        clients = [Client(world, f"c{number}", random.Random(f"{world.seed} c{number}")) for number in range(3)]
        world.run_until(world.now_s + 0.5)
        shard = self.shard
        source = shard.primary
        target, *_ = [name for name in world.names if name not in shard.in_sync]
        [other] = [name for name in shard.in_sync if name != source]
        self._names = {"A": source, "B": target, "R": other}
        self._said = {name: hosted.report for name in world.names if (hosted := self._hosted(name)) is not None}
        world.master.move(shard, "move", source, target)
        self._watch()
        assert world.run_until(world.now_s + MOVE_S_MAX, lambda: shard.move is None), f"the move goes on: {shard}"
        assert self._is_cut == (self._cut is not None), "what should have been cut never came"
        whole_by_s = world.now_s + RESTORED_S_MAX
        assert world.run_until(whole_by_s, world._is_whole), f"the shard is not whole: {world._show()}"
        world.run_until(world.now_s + 0.2)
        for client in clients:
            client.is_stopped = True
        assert world.run_until(world.now_s + EQUAL_S_MAX + 1.0, world._are_equal), f"not equal: {world._show()}"
        world._finish()

    def _hosted(self, name: str) -> Hosted | None:
        return self.world.workers[name].hosted.get(SHARD)

    def _watch(self) -> None:
        """Adds up how long nobody serves, every millisecond."""
        hosts = [hosted for name in self.world.names if (hosted := self._hosted(name)) is not None]
        if not any(hosted.machine.is_serving for hosted in hosts):
            self.paused_s += WATCH_S
        if self.shard.move is not None:
            self.world.after(WATCH_S, self._watch)


@pytest.fixture(scope="module")
def undisturbed() -> list[str]:
    """The steps of a move that nothing happens to."""
    moving = Moving()
    moving.play()
    return moving.steps


def test_the_table_has_every_step(undisturbed: list[str]) -> None:
    """What a move consists of is what the table says, each message and each commit, and the move succeeds."""
    assert set(undisturbed) == set(STEPS)
    moving = Moving()
    moving.play()
    assert moving.steps == undisturbed, "the same seed plays the same move"
    assert (moving.letters([moving.shard.primary]), moving.letters(moving.shard.in_sync)) == (["B"], ["B", "R"])


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("name", STEPS)
def test_a_kind_of_step_is_cut(name: str, victim: str) -> None:
    """The first step of each kind is cut; whoever crashes, the move ends or rolls back, and nothing is lost."""
    Moving(Cut(victim, AWAY_S[STEPS.index(name) % 2], name=name)).play()


@pytest.mark.parametrize("victim", VICTIMS)
def test_every_single_step_is_cut(undisturbed: list[str], victim: str) -> None:
    """Every message and commit in turn, those that come again included."""
    for number in range(len(undisturbed)):
        Moving(Cut(victim, AWAY_S[1 - number % 2], number=number)).play()


@pytest.mark.parametrize("seed", range(1, 13))
def test_a_cutover_takes_no_longer_than_its_messages(seed: int) -> None:
    """From the moment when A stops to the moment when B serves pass some messages and syncs, not a timer."""
    moving = Moving(seed=seed)
    moving.play()
    assert moving.paused_s < 0.03
