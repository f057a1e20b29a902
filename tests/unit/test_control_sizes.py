"""What follows from figures: progress of copies, cuts of large shards, joins of small ones, relief of full workers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.api.v1 import command_pb2, session_pb2, types_pb2
from coordinator.config import PlacementSettings
from coordinator.control.figures import Figures
from coordinator.control.interface import Action, Event, FiguresReported, Propose
from coordinator.control.relief import CHECK_S, PATIENCE_S, REST_S, ReliefControl
from coordinator.control.reshape import REST_S as RESHAPE_REST_S
from coordinator.control.reshape import ReshapeControl
from coordinator.model import Monotonic, MoveKind
from coordinator.placement.planner import Planner
from tests.control_driver import ControlDriver, only, operations
from tests.machine_driver import MachineDriver
from tests.placement_cluster import NOW_MS, assigned, cluster, named, worker

SETTINGS = PlacementSettings(shards=2, users_max=100, merge_below_users=40, merge_after_s=60.0)


class Scene(ControlDriver):
    """Four shards on w1 (primary) and w2, and w3 without any; the cluster was made with two."""

    def __init__(self, settings: PlacementSettings = SETTINGS) -> None:
        machine = MachineDriver()
        machine.bootstrap(shards=4)
        for name in ("w1", "w2", "w3"):
            machine.add_worker(name)
        for shard_id in range(1, 5):
            machine.assign(shard_id, "w1", "w2")
        super().__init__(machine)
        self.figures = Figures()
        self.memory = {"w1": 50.0, "w2": 50.0, "w3": 30.0}
        self.unwritable: dict[str, int] = {}
        self.settings = settings
        self.controller = ReshapeControl(machine.state, settings, self.figures, self.tokens)

    def relieve(self) -> ReliefControl:
        """The controller for memory instead."""
        self.controller = control = ReliefControl(
            self.machine.state, self.settings, self.figures, self.metrics, self.tokens, self.now
        )
        return control

    def metrics(self, name: str) -> session_pb2.NodeMetrics | None:
        """A worker's figures."""
        if name not in self.memory:
            return None
        return session_pb2.NodeMetrics(memory_percent=self.memory[name], unwritable_shards=self.unwritable.get(name, 0))

    def tell(self, event: Event) -> list[Action]:
        """The book of figures sees each event first."""
        self.figures.take(self.now, event)
        return super().tell(event)

    def users(self, name: str = "w1", **users: int) -> list[Action]:
        """A primary's figures, for shards s1, s2, ...; the median is the middle of the range."""
        figures = []
        for key, count in users.items():
            shard = self.machine.shard(int(key[1:]))
            median = (shard.lo + shard.hi) // 2 + 1
            figures.append(
                session_pb2.ShardFigure(shard_id=shard.id, users=count, bytes=count * 100, median_hash=median)
            )
        return self.tell(FiguresReported(1, name, tuple(figures)))


class TestFigures:
    """What primaries say of their shards."""

    def test_only_the_present_primary_counts(self) -> None:
        """Shows that the figures of a worker that is no longer primary are not shown."""
        scene = Scene()
        scene.users(s1=7)
        assert scene.figures.of(scene.machine.shard(1)) is not None
        scene.users("w2", s1=9)
        assert scene.figures.of(scene.machine.shard(1)) is None

    def test_a_copy_has_a_rate_and_an_estimate(self) -> None:
        """Shows rate and remaining time from two reports, and that a copy that begins anew starts over."""
        scene = Scene()
        move_id = scene.machine.start_move(1, "w2", "w3", types_pb2.MOVE_KIND_BALANCE)
        move = scene.machine.state.moves[move_id]

        def say(rows: int) -> None:
            figure = session_pb2.ShardFigure(shard_id=1, copied_rows=rows, copied_bytes=rows * 100, copy_rows=1_000)
            scene.tell(FiguresReported(1, "w1", (figure,)))

        assert scene.figures.progress(scene.machine.state, move) is None
        say(100)
        first = scene.figures.progress(scene.machine.state, move)
        assert first is not None
        assert (first.copied_rows, first.bytes_per_s, first.remaining_s) == (100, 0.0, -1.0)
        scene.advance(2.0)
        say(300)
        second = scene.figures.progress(scene.machine.state, move)
        assert second is not None
        assert (second.bytes_per_s, second.remaining_s) == (10_000.0, 7.0)
        say(5)
        third = scene.figures.progress(scene.machine.state, move)
        assert third is not None
        assert third.bytes_per_s == 0.0


class TestCuts:
    """A shard with too many users is cut."""

    def test_at_the_median_of_its_users(self) -> None:
        """Shows the command, and that nothing happens at the limit itself."""
        scene = Scene()
        assert scene.users(s1=100) == []
        (proposal,) = only(scene.users(s1=101), Propose)
        split = proposal.command.split_shard
        shard = scene.machine.shard(1)
        assert (split.shard_id, split.at, split.expected_epoch) == (1, (shard.lo + shard.hi) // 2 + 1, shard.epoch)
        assert "101 users" in split.reason

    def test_one_at_a_time_the_largest_first(self) -> None:
        """Shows that the next one waits until the first has ended."""
        scene = Scene()
        scene.settle(scene.users(s1=200, s2=300))
        (move,) = scene.machine.state.moves.values()
        assert (move.kind, move.shard_id) == (MoveKind.SPLIT, 2)
        assert scene.advance(10.0) == []
        epochs = [scene.machine.shard(2).epoch]
        scene.settle(scene.run(reshape=command_pb2.Reshape(move_id=move.id, expected_epochs=epochs)))
        assert [move.shard_id for move in scene.machine.state.moves.values()] == [1]

    def test_one_that_was_rolled_back_rests(self) -> None:
        """Shows that a cut that fails is tried again later and later, since each try stops the shard."""
        scene = Scene()
        scene.settle(scene.users(s1=200))
        for rest_s in (RESHAPE_REST_S, 2 * RESHAPE_REST_S):
            (move_id,) = scene.machine.state.moves
            scene.settle(scene.run(abort_move=command_pb2.AbortMove(move_id=move_id)))
            scene.settle(scene.advance(rest_s - 1))
            assert not scene.machine.state.moves
            scene.settle(scene.advance(2))

    @pytest.mark.parametrize("users", [1_200, 1_201])
    def test_the_limit_of_the_specification(self, users: int) -> None:
        """Shows that without any setting a shard of 1,200 users stays whole, and one of 1,201 is cut."""
        scene = Scene(PlacementSettings(shards=2))
        proposals = only(scene.users(s1=users), Propose)
        assert [proposal.command.WhichOneof("operation") for proposal in proposals] == ["split_shard"] * (users - 1_200)

    @pytest.mark.parametrize("reason", ["paused", "short of a replica", "median at the end", "quarantine", "damage"])
    def test_not_while_there_is_a_reason_against_it(self, reason: str) -> None:
        """Shows what lets a large shard be."""
        scene = Scene()
        if reason == "paused":
            paused = types_pb2.Settings(replicas=2, rebalance_paused=True)
            scene.run(change_settings=command_pb2.ChangeSettings(settings=paused))
        elif reason == "short of a replica":
            scene.run(suspect_node=command_pb2.SuspectNode(node_id="w2", incarnation="1"))
        elif reason == "quarantine":
            rules = command_pb2.LossRules(quarantine_workers=1, quarantine_window_ms=1_000)
            scene.run(suspect_node=command_pb2.SuspectNode(node_id="w1", incarnation="1", loss=rules))
        if reason in ("median at the end", "damage"):
            shard = scene.machine.shard(1)
            median = shard.lo + (1 if reason == "damage" else 0)
            damage = "a row" if reason == "damage" else ""
            figure = session_pb2.ShardFigure(shard_id=1, users=500, median_hash=median, damage=damage)
            assert scene.tell(FiguresReported(1, "w1", (figure,))) == []
        else:
            assert scene.users(s1=500) == []


class TestJoins:
    """Two neighbours with few users become one shard."""

    def test_when_they_were_small_for_long(self) -> None:
        """Shows the wait, that growing ends it, and the command."""
        scene = Scene()
        assert scene.users(s1=10, s2=20, s3=90) == []
        scene.advance(50.0)
        scene.users(s1=30)
        scene.users(s1=10)
        assert scene.advance(50.0) == []
        (proposal,) = only(scene.advance(11.0), Propose)
        merge = proposal.command.merge_shards
        assert (merge.lower_shard_id, merge.upper_shard_id) == (1, 2)

    def test_launches_are_none_of_its_business(self) -> None:
        """Shows that entries about jobs, which are many, cost no look at all pairs, and no wake-up."""
        scene = Scene()
        scene.users(s1=1, s2=1, s3=90, s4=90)
        wanted_at = scene.next_wake
        assert wanted_at is not None
        scene.now = Monotonic(wanted_at + 1.0)
        job = types_pb2.CronJobSpec(id="tick", schedule="* * * * * *", command=["true"])
        assert scene.run(apply_job=command_pb2.ApplyJob(spec=job)) == []
        assert scene.next_wake == wanted_at
        assert operations(scene.advance()) == ["merge_shards"]

    def test_never_below_the_number_that_the_cluster_was_made_with(self) -> None:
        """Shows that a new cluster without users keeps its shards."""
        scene = Scene(replace(SETTINGS, shards=4))
        scene.users(s1=0, s2=0, s3=0, s4=0)
        assert scene.advance(100.0) == []

    def test_neighbours_on_other_workers_are_aligned_first(self) -> None:
        """Shows that the upper one's replica moves to the lower one's workers, and that they are joined then."""
        scene = Scene()
        move_id = scene.machine.start_move(2, "w2", "w3", types_pb2.MOVE_KIND_BALANCE)
        self._finish(scene, move_id)
        scene.users(s1=1, s2=1, s3=90)
        scene.settle(scene.advance(61.0))
        (move,) = scene.machine.state.moves.values()
        assert (move.kind, move.shard_id, move.source, move.target) == (MoveKind.BALANCE, 2, "w3", "w2")
        self._finish(scene, move.id)
        (merge,) = scene.machine.state.moves.values()
        assert (merge.kind, merge.shard_ids) == (MoveKind.MERGE, (1, 2))

    @staticmethod
    def _finish(scene: Scene, move_id: int) -> None:
        epoch = scene.machine.shard(2).epoch
        promote = command_pb2.PromoteReplica(move_id=move_id, expected_epoch=epoch)
        scene.settle(scene.run(promote_replica=promote))
        remove = command_pb2.RemoveReplica(move_id=move_id, expected_epoch=epoch + 1)
        scene.settle(scene.run(remove_replica=remove))


class TestRelief:
    """A worker whose memory runs full gives shards away."""

    def wait(self, scene: Scene, seconds: float) -> list[str]:
        """What is committed while time goes on."""
        done: list[str] = []
        for _ in range(round(seconds / CHECK_S)):
            done += operations(scene.settle(scene.advance(CHECK_S)))
        return done

    def test_the_largest_shard_goes_to_the_worker_with_most_room(self) -> None:
        """Shows one move after some patience, and no second one while it runs."""
        scene = Scene()
        scene.users(s1=10, s2=50, s3=20)
        control = scene.relieve()
        scene.memory["w1"] = 91.0
        assert self.wait(scene, PATIENCE_S) == []
        assert control.crowded() == {"w1"}
        assert self.wait(scene, REST_S * 3) == ["start_move"]
        (move,) = scene.machine.state.moves.values()
        assert (move.shard_id, move.source, move.target) == (2, "w1", "w3")
        assert "91 %" in move.reason

    @pytest.mark.parametrize("memory", [{"w3": 75.0}, {"w1": 79.0}, {"w1": 95.0, "w3": 95.0}])
    def test_nothing_moves_without_need_or_room(self, memory: dict[str, float]) -> None:
        """Shows that everybody on one full machine stays, and that a worker just below the limit takes nothing."""
        scene = Scene()
        scene.memory |= {"w1": 90.0, "w2": 90.0, **memory} if "w1" not in memory else memory
        scene.relieve()
        assert self.wait(scene, PATIENCE_S * 3) == []

    @pytest.mark.parametrize("percent", [80.0, 80.5])
    def test_the_limit_of_the_specification(self, percent: float) -> None:
        """Shows that without any setting a worker may use 80 % of its memory, and gives a shard away above that."""
        scene = Scene(PlacementSettings())
        scene.relieve()
        scene.memory["w1"] = percent
        assert self.wait(scene, PATIENCE_S + REST_S) == (["start_move"] if percent > 80.0 else [])

    def test_who_cannot_write_loses_its_roles_and_gets_none_back(self) -> None:
        """Shows that replicas that can write take over, also while balance is paused, and that nobody else does."""
        scene = Scene()
        control = scene.relieve()
        scene.unwritable = {"w1": 4}
        assert self.wait(scene, CHECK_S) == ["drop_replica"] * 4
        shards = scene.machine.state.shards.values()
        assert {(shard.primary, shard.in_sync) for shard in shards} == {("w2", ("w2",))}
        assert control.crowded() == {"w1"}
        assert self.wait(scene, CHECK_S * 3) == []
        scene = Scene()
        scene.relieve()
        scene.unwritable = {"w1": 4, "w2": 1}
        assert self.wait(scene, CHECK_S * 3) == []

    def test_balance_gives_nothing_to_a_full_worker(self) -> None:
        """Shows that a newcomer without memory to spare is not filled, and one with is."""
        state = assigned(cluster(named(2), shards=16), Planner(SETTINGS))
        state = replace(state, nodes=state.nodes.set("w3", worker("w3")))
        planner = Planner(SETTINGS)
        assert {move.target for move in planner.plan(state, NOW_MS).moves} == {"w3"}
        assert planner.plan(state, NOW_MS, frozenset({"w3"})).moves == ()
