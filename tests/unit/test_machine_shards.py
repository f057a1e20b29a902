"""The state machine on shards that hold data: forming, failing replicas, successors, quarantine, cuts and joins."""

from __future__ import annotations

import pytest

from coordinator.api.v1 import command_pb2, types_pb2
from coordinator.machine.snapshot import decode_snapshot, encode_snapshot
from coordinator.model import MoveKind, MovePhase
from tests.machine_driver import MachineDriver

STRICT = command_pb2.LossRules(quarantine_workers=3, quarantine_window_ms=60_000)


def cluster(workers: str = "abcd", replicas: str = "abc", shards: int = 4) -> MachineDriver:
    """Shards 1 and 2 on the same workers."""
    driver = MachineDriver()
    driver.bootstrap(shards=shards, replicas=len(replicas))
    for name in workers:
        driver.add_worker(name)
    for shard_id in (1, 2):
        driver.assign(shard_id, *replicas)
    return driver


def suspect(driver: MachineDriver, name: str, rules: command_pb2.LossRules | None = None) -> None:
    driver.accept(suspect_node=command_pb2.SuspectNode(node_id=name, incarnation="1", loss=rules))


def hear(driver: MachineDriver, name: str) -> None:
    driver.accept(activate_node=command_pb2.ActivateNode(node_id=name, incarnation="1"))


def drop(driver: MachineDriver, name: str, heir: str = "") -> command_pb2.DropReplica:
    return command_pb2.DropReplica(
        shard_id=1, expected_epoch=driver.shard(1).epoch, node_id=name, reason="test", heir=heir
    )


def split(driver: MachineDriver, shard_id: int = 1) -> int:
    command = command_pb2.SplitShard(shard_id=shard_id)
    return driver.accept(split_shard=command).result.applied.move_id


def merge(driver: MachineDriver) -> int:
    command = command_pb2.MergeShards(lower_shard_id=1, upper_shard_id=2)
    return driver.accept(merge_shards=command).result.applied.move_id


class TestForming:
    """Nothing is served, moved or counted as lost before every first replica has its store."""

    def test_only_the_present_epoch_counts(self) -> None:
        """Shows that a report of an older set of replicas forms nothing."""
        driver = cluster()
        driver.assign(3, "a", "b", is_formed=False)
        suspect(driver, "b")
        old = command_pb2.FormShards(shards=[command_pb2.FormShards.Formed(shard_id=3, epoch=1)])
        driver.accept(form_shards=old)
        assert not driver.shard(3).is_formed
        driver.form(3)
        assert driver.shard(3).is_formed
        assert driver.shard(3).epoch == 2

    def test_an_unformed_shard_does_not_move(self) -> None:
        """Shows that a move of a shard that is still being made is refused."""
        driver = cluster()
        driver.assign(3, "a", "b", is_formed=False)
        move = command_pb2.StartMove(
            shard_id=3, target="c", kind=types_pb2.MOVE_KIND_REPAIR, expected_epoch=driver.shard(3).epoch
        )
        assert "still being made" in driver.refuse(start_move=move).message


class TestLosses:
    """A replica leaves, another takes over, and the last one stays."""

    def test_a_dropped_replica_keeps_its_place(self) -> None:
        """Shows that a replica that lags leaves the set, at a new epoch, and may come back to where it was."""
        driver = cluster()
        driver.accept(drop_replica=drop(driver, "b"))
        shard = driver.shard(1)
        assert (shard.primary, shard.in_sync, shard.absent, shard.epoch) == ("a", ("a", "c"), ("b",), 2)

    def test_a_primary_without_data_hands_its_role_on(self) -> None:
        """Shows that the replica that the leader wishes follows, and that a wish that does not fit is passed over."""
        driver = cluster()
        driver.accept(drop_replica=drop(driver, "a", heir="c"))
        assert driver.shard(1).primary == "c"
        driver = cluster()
        driver.accept(drop_replica=drop(driver, "a", heir="d"))
        assert driver.shard(1).primary == "b"

    def test_the_last_one_that_serves_is_never_dropped(self) -> None:
        """Shows that a shard keeps a replica, whatever is said of it."""
        driver = cluster(replicas="ab")
        driver.accept(drop_replica=drop(driver, "b"))
        assert "last copy" in driver.refuse(drop_replica=drop(driver, "a")).message
        stale = command_pb2.DropReplica(shard_id=1, expected_epoch=1, node_id="a")
        assert driver.refuse(drop_replica=stale).code == command_pb2.REFUSAL_CODE_STALE

    def test_the_furthest_log_takes_over(self) -> None:
        """Shows that the leader's wish decides who follows a lost worker, shard by shard."""
        driver = cluster()
        suspect(driver, "a", command_pb2.LossRules(heirs={1: "c", 2: "nobody"}))
        assert (driver.shard(1).primary, driver.shard(2).primary) == ("c", "b")

    @pytest.mark.parametrize("loss", ["suspect", "down", "restarted"])
    def test_a_process_never_serves_in_its_predecessors_epoch(self, loss: str) -> None:
        """Shows that the epoch of a shard that nobody takes over grows with the end of its process, and only then."""
        driver = cluster(replicas="a")
        if loss == "suspect":
            suspect(driver, "a")
        elif loss == "down":
            driver.accept(expire_node=command_pb2.ExpireNode(node_id="a", incarnation="1"))
        else:
            driver.add_worker("a", incarnation="2")
        shard = driver.shard(1)
        assert (shard.primary, shard.in_sync) == ("a", ("a",))
        assert shard.epoch == (1 if loss == "suspect" else 2)

    def test_a_restart_before_the_admission_counts_too(self) -> None:
        """Shows that a worker that restarts twice before it is admitted gets a new epoch each time."""
        driver = cluster(replicas="a")
        for incarnation in ("2", "3"):
            node = types_pb2.Node(id="a", incarnation=incarnation, weight=1.0)
            driver.accept(register_node=command_pb2.RegisterNode(node=node))
        assert driver.shard(1).epoch == 3


class TestQuarantine:
    """A shard that takes workers down one after the other gets no further one."""

    def test_the_loss_that_is_one_too_many_promotes_nobody(self) -> None:
        """Shows that the third lost primary keeps the shard although a replica could serve; and it moves no more."""
        driver = cluster("abcd", "abcd")
        for name in "abc":
            suspect(driver, name, STRICT)
        shard = driver.shard(1)
        assert (shard.primary, shard.in_sync) == ("c", ("c", "d"))
        assert "a, b, c" in shard.quarantine
        move = command_pb2.StartMove(
            shard_id=1, source="c", target="d", kind=types_pb2.MOVE_KIND_TRANSFER, expected_epoch=shard.epoch
        )
        assert "quarantine" in driver.refuse(start_move=move).message
        assert "quarantine" in driver.refuse(split_shard=command_pb2.SplitShard(shard_id=1)).message
        assert "quarantine" in driver.refuse(drop_replica=drop(driver, "c")).message

    def test_a_release_gives_it_to_who_serves(self) -> None:
        """Shows that a release ends it, promotes a replica that serves, and forgets the losses."""
        driver = cluster("abcd", "abcd")
        for name in "abc":
            suspect(driver, name, STRICT)
        driver.accept(release_shard=command_pb2.ReleaseShard(shard_id=1))
        shard = driver.shard(1)
        assert (shard.primary, shard.in_sync, shard.quarantine, shard.lost_primaries) == ("d", ("d",), "", ())
        assert "not in quarantine" in driver.refuse(release_shard=command_pb2.ReleaseShard(shard_id=1)).message

    def test_old_losses_and_losses_of_one_worker_do_not_count(self) -> None:
        """Shows that only different workers within the window count."""
        driver = cluster("abcd", "abcd")
        suspect(driver, "a", STRICT)
        suspect(driver, "b", STRICT)
        for _ in range(61):
            driver.accept(barrier=command_pb2.Barrier())
        suspect(driver, "c", STRICT)
        assert driver.shard(1).primary == "d"
        driver = cluster("abcd", "a")
        for _ in range(4):
            suspect(driver, "a", STRICT)
            driver.accept(expire_node=command_pb2.ExpireNode(node_id="a", loss=STRICT))
            driver.add_worker("a")
        assert not driver.shard(1).quarantine

    def test_a_loss_that_says_nothing_of_the_shard_is_not_counted(self) -> None:
        """Shows that a command without rules, as after a clean stop, leaves no trace."""
        driver = cluster("abcd", "abcd")
        for name in "abc":
            suspect(driver, name)
        assert (driver.shard(1).primary, driver.shard(1).lost_primaries) == ("d", ())

    def test_who_is_heard_again_was_not_lost(self) -> None:
        """Shows that a suspicion that was wrong is forgiven, together with the quarantine that it caused."""
        driver = cluster("abcd", "abcd")
        for name in "abc":
            suspect(driver, name, STRICT)
        hear(driver, "c")
        shard = driver.shard(1)
        assert (shard.primary, shard.quarantine) == ("c", "")
        assert [lost.node_id for lost in shard.lost_primaries] == ["a", "b"]

    def test_a_move_ends_with_the_quarantine(self) -> None:
        """Shows that what moves when the quarantine begins is rolled back, and that a snapshot keeps it all."""
        driver = cluster("abcde", "abcd")
        for name in "ab":
            suspect(driver, name, STRICT)
        move_id = driver.start_move(1, "", "e", types_pb2.MOVE_KIND_REPAIR)
        suspect(driver, "c", STRICT)
        assert driver.state.ended_moves[move_id].phase is MovePhase.ABORTED
        assert driver.shard(1).joining == ()
        assert decode_snapshot(encode_snapshot(driver.state)) == driver.state


class TestReshape:
    """Cuts and joins of shards that hold data."""

    def test_a_cut_is_sealed_first(self) -> None:
        """Shows that the shard stands until its seal is reported, and that its halves know whom they come from."""
        driver = cluster()
        move_id = split(driver)
        move = driver.state.moves[move_id]
        assert (move.kind, move.phase, driver.shard(1).epoch) == (MoveKind.SPLIT, MovePhase.CEDING, 1)
        lower, upper = driver.reshape(move_id)
        assert 1 not in driver.state.shards
        for shard_id in (lower, upper):
            shard = driver.shard(shard_id)
            assert (shard.primary, shard.in_sync, shard.epoch) == ("a", ("a", "b", "c"), 2)
            assert (shard.is_formed, shard.parents) == (True, (1,))
        assert driver.state.ended_moves[move_id].created_shard_ids == (lower, upper)

    def test_parents_are_forgotten_once_every_replica_has_its_store(self) -> None:
        """Shows that a shard is not cut again before it stands on its own."""
        driver = cluster()
        lower, _ = driver.reshape(split(driver))
        assert "only just been made" in driver.refuse(split_shard=command_pb2.SplitShard(shard_id=lower)).message
        driver.form(lower)
        assert driver.shard(lower).parents == ()
        assert split(driver, lower)

    def test_a_join_needs_both_seals(self) -> None:
        """Shows that both shards wait, whoever their primaries are, and that neither can move meanwhile."""
        driver = cluster()
        transfer = driver.start_move(2, "a", "b", types_pb2.MOVE_KIND_TRANSFER)
        driver.accept(cut_over=command_pb2.CutOver(move_id=transfer, expected_epoch=driver.shard(2).epoch))
        move_id = merge(driver)
        for shard_id in (1, 2):
            again = command_pb2.SplitShard(shard_id=shard_id)
            assert "is moving" in driver.refuse(split_shard=again).message
        one = command_pb2.Reshape(move_id=move_id, expected_epochs=[driver.shard(1).epoch])
        assert driver.refuse(reshape=one).code == command_pb2.REFUSAL_CODE_INVALID
        (joined,) = driver.reshape(move_id)
        shard = driver.shard(joined)
        assert (shard.primary, shard.epoch, shard.parents) == ("a", 3, (1, 2))

    def test_a_seal_of_an_older_epoch_cuts_nothing(self) -> None:
        """Shows that the command is a compare-and-set on the epoch."""
        driver = cluster()
        move_id = split(driver)
        old = command_pb2.Reshape(move_id=move_id, expected_epochs=[driver.shard(1).epoch - 1])
        assert driver.refuse(reshape=old).code == command_pb2.REFUSAL_CODE_STALE

    @pytest.mark.parametrize("kind", ["split", "merge"])
    @pytest.mark.parametrize("fault", ["abort", "suspect", "restart", "drop"])
    def test_every_fault_lets_the_shards_serve_again(self, kind: str, fault: str) -> None:
        """Shows that a cut or join that ends early raises every epoch, so that sealed primaries go on."""
        driver = cluster()
        move_id = split(driver) if kind == "split" else merge(driver)
        shard_ids = driver.state.moves[move_id].shard_ids
        before = [driver.shard(shard_id).epoch for shard_id in shard_ids]
        if fault == "abort":
            driver.accept(abort_move=command_pb2.AbortMove(move_id=move_id))
        elif fault == "suspect":
            suspect(driver, "b")
        elif fault == "restart":
            driver.add_worker("a", incarnation="2")
        else:
            driver.accept(drop_replica=drop(driver, "b"))
        assert driver.state.ended_moves[move_id].phase is MovePhase.ABORTED
        assert all(driver.shard(shard_id).epoch > epoch for shard_id, epoch in zip(shard_ids, before, strict=True))

    def test_the_only_replica_comes_back_to_a_shard_that_is_whole(self) -> None:
        """Shows that a cut whose only worker is lost is rolled back, and not left waiting."""
        driver = cluster(replicas="a")
        move_id = split(driver)
        suspect(driver, "a")
        assert driver.state.ended_moves[move_id].phase is MovePhase.ABORTED

    def test_what_cannot_be_joined_is_refused_with_the_reason(self) -> None:
        """Shows that shards on other workers, or still being made, are not joined."""
        driver = cluster()
        driver.assign(3, "a", "b")
        other = command_pb2.MergeShards(lower_shard_id=2, upper_shard_id=3)
        assert "same workers" in driver.refuse(merge_shards=other).message
        driver.assign(4, "a", "b", is_formed=False)
        young = command_pb2.MergeShards(lower_shard_id=3, upper_shard_id=4)
        assert "still being made" in driver.refuse(merge_shards=young).message

    def test_no_other_command_pushes_a_reshape_on(self) -> None:
        """Shows that a cut is not cut over, promoted or removed, and that a move is not reshaped."""
        driver = cluster()
        move_id, epoch = split(driver), driver.shard(1).epoch
        driver.refuse(cut_over=command_pb2.CutOver(move_id=move_id, expected_epoch=epoch))
        driver.refuse(promote_replica=command_pb2.PromoteReplica(move_id=move_id, expected_epoch=epoch))
        driver.refuse(remove_replica=command_pb2.RemoveReplica(move_id=move_id, expected_epoch=epoch))
        other = driver.start_move(2, "a", "b", types_pb2.MOVE_KIND_TRANSFER)
        driver.refuse(reshape=command_pb2.Reshape(move_id=other, expected_epochs=[driver.shard(2).epoch]))
        as_move = command_pb2.StartMove(
            shard_id=3, kind=types_pb2.MOVE_KIND_SPLIT, expected_epoch=driver.shard(3).epoch
        )
        assert driver.refuse(start_move=as_move).code == command_pb2.REFUSAL_CODE_INVALID
