"""The configuration manager of the simulated shards: the rules of coordinator/machine and control, in little.

Every change compares the epoch that it was decided on and adds one. It never fails itself; workers hear it late or not
at all, and it takes silence for death, rightly or not.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coordinator.model import Monotonic
from worker_agent.shard_interface import Progress, ReplicaRole, ReportReplica, ShardView

if TYPE_CHECKING:
    from tests.sim.replica_world import World

SUSPECT_S = 1.5
TICK_S = 0.15
CEDE_S_MAX = 4.0
COPY_S_MAX = 12.0


@dataclass(slots=True)
class Move:
    """A move of one shard. A transfer has a target that is in sync, a seal neither source nor target."""

    kind: str
    source: str = ""
    target: str = ""
    phase: str = "copying"
    until_s: float = 0.0


@dataclass(slots=True)
class Config:
    """One shard as the master has it."""

    shard_id: int
    epoch: int
    primary: str
    in_sync: list[str]
    joining: list[str] = field(default_factory=list)
    is_formed: bool = False
    move: Move | None = None


@dataclass(slots=True)
class Known:
    """What the master knows of a worker."""

    life: int = 0
    heard_s: float = float("-inf")
    generation: int = 0
    is_suspect: bool = True
    reports: dict[int, ReportReplica] = field(default_factory=dict)


class Master:
    """See above."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world = world
        self._rng = rng
        self.generation = 0
        self.cut_off: set[str] = set()
        """Workers that neither hear it nor are heard."""
        self.known = {name: Known() for name in world.names}
        self.shards: dict[int, Config] = {}
        self.changes = 0
        self.damaged: set[tuple[int, str]] = set()
        """Stores that are gone although nobody knows it yet."""

    def start(self) -> None:
        """Makes the shards, and looks after them from now on."""
        for shard_id in range(1, self.world.plan.shards + 1):
            names = self._rng.sample(self.world.names, self.world.plan.replicas)
            self.shards[shard_id] = Config(shard_id, 1, names[0], sorted(names))
        self.generation = 1
        self._tick()

    # Messages

    def hear(
        self, name: str, life: int, generation: int, reports: dict[int, ReportReplica], sent_at: Monotonic
    ) -> None:
        """A worker's heartbeat sets out."""
        if name in self.cut_off:
            return
        reports = dict(reports)
        self.world.after(self.world.net.delay_s(), lambda: self._heard(name, life, generation, reports, sent_at))

    def _heard(
        self, name: str, life: int, generation: int, reports: dict[int, ReportReplica], sent_at: Monotonic
    ) -> None:
        known = self.known[name]
        if life < known.life or name in self.cut_off:
            return
        if life > known.life:
            known.life, known.reports = life, {}
            self._lose(name, "restarted", is_process_gone=True)
        known.heard_s, known.is_suspect, known.reports = self.world.now_s, False, reports
        known.generation = generation
        self.world.after(
            self.world.net.delay_s(),
            lambda: self.world.workers[name].enqueue(lambda worker: worker.granted(life, sent_at)),
        )
        if generation < self.generation:
            self._push(name)
        for shard_id in sorted(reports):
            self._look(self.shards[shard_id])

    def _push(self, name: str) -> None:
        if name in self.cut_off or self.known[name].life == 0:
            return
        views = [view for shard in self.shards.values() if (view := self._view(shard, name)) is not None]
        life, generation = self.known[name].life, self.generation
        self.world.after(
            self.world.net.delay_s(),
            lambda: self.world.workers[name].enqueue(lambda worker: worker.heard(life, generation, views)),
        )

    def _view(self, shard: Config, name: str) -> ShardView | None:
        if name not in shard.in_sync and name not in shard.joining:
            return None
        role = ReplicaRole.JOINING if name in shard.joining else ReplicaRole.IN_SYNC
        role = ReplicaRole.PRIMARY if name == shard.primary else role
        move = shard.move
        is_ceding = move is not None and move.phase == "ceding" and role is ReplicaRole.PRIMARY
        return ShardView(
            shard_id=shard.shard_id,
            lo=0,
            hi=1 << 64,
            epoch=shard.epoch,
            role=role,
            primary=shard.primary,
            in_sync=tuple(sorted(shard.in_sync)),
            joining=tuple(sorted(shard.joining)),
            is_formed=shard.is_formed,
            cede_to=move.target if move is not None and is_ceding else "",
            is_sealed=move is not None and move.kind == "seal" and role is ReplicaRole.PRIMARY,
        )

    def _changed(self, shard: Config, why: str, *, is_new_epoch: bool = True) -> None:
        shard.epoch += is_new_epoch
        self.generation += 1
        self.changes += 1
        who = f"{shard.primary} {shard.in_sync} +{shard.joining}"
        self.world.note(f"master: shard {shard.shard_id} epoch {shard.epoch}: {who} ({why})")
        for name in sorted({*shard.in_sync, *shard.joining}):
            self._push(name)

    # Losses

    def _is_alive(self, name: str) -> bool:
        return not self.known[name].is_suspect

    def suspect(self, name: str) -> None:
        """A worker is not heard, or somebody thinks so."""
        self.known[name].is_suspect = True
        self._lose(name, "suspect")

    def _lose(self, name: str, why: str, *, is_process_gone: bool = False) -> None:
        for shard in self.shards.values():
            self._lose_of(shard, name, why, is_process_gone=is_process_gone)

    def _lose_of(self, shard: Config, name: str, why: str, *, is_process_gone: bool = False) -> None:
        if name in shard.joining:
            shard.joining.remove(name)
            shard.move = None
            self._changed(shard, f"{name} is {why}")
            return
        if name not in shard.in_sync:
            return
        others = [
            other
            for other in shard.in_sync
            # Two good copies at once are more than is promised.
            if other != name and self._is_alive(other) and (shard.shard_id, other) not in self.damaged
        ]
        if not others or not shard.is_formed:
            if is_process_gone and shard.primary == name and shard.is_formed:
                shard.joining.clear()
                shard.move = None
                self._changed(shard, f"{name} is {why}")
            return
        shard.in_sync.remove(name)
        self.damaged.discard((shard.shard_id, name))
        if shard.primary == name:
            shard.primary = self._rng.choice(others)
        if shard.move is not None and shard.joining:
            shard.joining.clear()
        shard.move = None
        self._changed(shard, f"{name} is {why}")

    # Looking after

    def _tick(self) -> None:
        for name, known in self.known.items():
            if not known.is_suspect and self.world.now_s - known.heard_s > SUSPECT_S:
                self.suspect(name)
        for shard in self.shards.values():
            self._look(shard)
        self.world.after(TICK_S, self._tick)

    def _report(self, shard: Config, name: str) -> ReportReplica | None:
        report = self.known[name].reports.get(shard.shard_id)
        return report if report is not None and report.epoch == shard.epoch else None

    def _look(self, shard: Config) -> None:
        if not shard.is_formed:
            if all(self._report(shard, name) is not None for name in shard.in_sync):
                shard.is_formed = True
                self._changed(shard, "formed", is_new_epoch=False)
            return
        for name in list(shard.in_sync):
            report = self._report(shard, name)
            if report is not None and report.progress is Progress.LOST:
                self._lose_of(shard, name, f"lost: {report.reason}")
                return
        report = self._report(shard, shard.primary)
        if report is not None:
            for name in report.lagging:
                if name in shard.joining or (name in shard.in_sync and name != shard.primary):
                    self._lose_of(shard, name, "lagging") if name in shard.joining else self._drop(shard, name)
                    return
        if shard.move is not None:
            self._drive(shard, shard.move, report)
        elif len(shard.in_sync) < self.world.plan.replicas:
            spare = [name for name in self.world.names if self._is_alive(name) and name not in shard.in_sync]
            if spare:
                self.move(shard, "repair", "", self._rng.choice(spare))
        elif len(shard.in_sync) > self.world.plan.replicas:
            self._drop(shard, next(name for name in shard.in_sync if name != shard.primary))

    def _drop(self, shard: Config, name: str) -> None:
        self.damaged.discard((shard.shard_id, name))
        shard.in_sync.remove(name)
        shard.joining.clear()
        shard.move = None
        self._changed(shard, f"{name} is taken out")

    # Moves

    def move(self, shard: Config, kind: str, source: str, target: str) -> None:
        """Starts a move."""
        if shard.move is not None or not shard.is_formed:
            return
        if kind in ("transfer", "seal"):
            shard.move = Move(kind, source, target, "ceding", self.world.now_s + CEDE_S_MAX)
            self._changed(shard, kind, is_new_epoch=False)
        else:
            shard.move = Move(kind, source, target, "copying", self.world.now_s + COPY_S_MAX)
            shard.joining.append(target)
            self._changed(shard, f"{kind} from {source or 'nowhere'} to {target}")

    def move_any(self, kind: str) -> None:
        """Starts a move of some shard."""
        shard = self.shards[self._rng.choice(sorted(self.shards))]
        if kind == "move":
            targets = [name for name in self.world.names if self._is_alive(name) and name not in shard.in_sync]
            if targets:
                # Most moves are of the primary: they have more to them.
                source = shard.primary if self._rng.random() < 0.7 else self._rng.choice(shard.in_sync)
                self.move(shard, kind, source, self._rng.choice(targets))
        elif kind == "seal":
            self.move(shard, kind, "", "")
        else:
            targets = [name for name in shard.in_sync if name != shard.primary and self._is_alive(name)]
            if targets:
                self.move(shard, "transfer", shard.primary, self._rng.choice(targets))

    def _drive(self, shard: Config, move: Move, report: ReportReplica | None) -> None:
        is_late = self.world.now_s > move.until_s
        if move.phase == "copying":
            if report is not None and move.target in report.caught_up:
                shard.joining.remove(move.target)
                shard.in_sync = sorted([*shard.in_sync, move.target])
                if not move.source:
                    shard.move = None
                elif move.source == shard.primary:
                    move.phase, move.until_s = "ceding", self.world.now_s + CEDE_S_MAX
                else:
                    move.phase = "removing"
                self._changed(shard, f"{move.target} is in sync")
            elif is_late:
                shard.joining.clear()
                shard.move = None
                self._changed(shard, "the copy takes too long")
        elif move.phase == "ceding":
            if report is not None and report.progress is Progress.CEDED:
                self.world.checks.ceded(shard, move)
                if move.target:
                    shard.primary = move.target
                    move.phase = "removing"
                if move.kind != "move":
                    shard.move = None
                self._changed(shard, "ceded")
            elif is_late:
                shard.move = None
                self._changed(shard, "it does not cede")
        elif report is not None and report.progress is Progress.ACCEPTED:
            shard.in_sync.remove(move.source)
            shard.move = None
            self._changed(shard, f"{move.source} gave it up")
