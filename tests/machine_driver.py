"""Drives the replicated state machine in tests: numbers the entries, checks every invariant after each one."""

from __future__ import annotations

from coordinator.api.v1 import command_pb2, types_pb2
from coordinator.machine.machine import apply
from coordinator.machine.state import State, Transition
from coordinator.machine.validate import validate, validate_step
from coordinator.model import Shard, WallMs

START_MS = WallMs(1_700_000_000_000)


class MachineDriver:
    """One master's machine. `run` takes the fields of Command; time goes on by a second with each entry."""

    def __init__(self) -> None:
        self.state = State()
        self.time_ms = START_MS

    def run(self, request_id: str = "", cause: str = "test", **operation: object) -> Transition:
        """Applies one command and checks what must hold."""
        command = command_pb2.Command(request_id=request_id, cause=cause, **operation)  # type: ignore[arg-type]
        self.time_ms = WallMs(self.time_ms + 1_000)
        transition = apply(self.state, command, self.state.index + 1, self.time_ms)
        validate(transition.state)
        validate_step(self.state, transition.state)
        self.state = transition.state
        return transition

    def accept(self, **operation: object) -> Transition:
        """Applies one command that must not be refused."""
        transition = self.run(**operation)  # type: ignore[arg-type]
        assert transition.result.WhichOneof("outcome") == "applied", transition.result
        return transition

    def refuse(self, **operation: object) -> command_pb2.Refusal:
        """Applies one command that must be refused, and must change nothing but index and time."""
        before = self.state
        transition = self.run(**operation)  # type: ignore[arg-type]
        assert transition.result.WhichOneof("outcome") == "refusal", transition.result
        assert transition.changes == ()
        assert (before.shards, before.nodes, before.moves, before.jobs, before.launches) == (
            self.state.shards,
            self.state.nodes,
            self.state.moves,
            self.state.jobs,
            self.state.launches,
        )
        return transition.result.refusal

    def bootstrap(self, shards: int = 4, replicas: int = 2) -> None:
        """Makes the cluster."""
        settings = types_pb2.Settings(replicas=replicas)
        self.accept(
            bootstrap_cluster=command_pb2.BootstrapCluster(cluster_id="c1", shards=shards, settings=settings)
        )

    def add_worker(self, name: str, incarnation: str = "1", zone: str = "", weight: float = 1.0) -> None:
        """Registers a worker and admits it."""
        node = types_pb2.Node(id=name, incarnation=incarnation, zone=zone, weight=weight, grpc_address=f"{name}:1")
        self.accept(register_node=command_pb2.RegisterNode(node=node))
        self.accept(activate_node=command_pb2.ActivateNode(node_id=name, incarnation=incarnation))

    def assign(self, shard_id: int, *replicas: str, is_formed: bool = True) -> None:
        """Gives a shard its first replicas, which make their stores at once; the first one is the primary."""
        assignment = command_pb2.AssignShards.Assignment(shard_id=shard_id, replicas=replicas)
        self.accept(assign_shards=command_pb2.AssignShards(assignments=[assignment]))
        if is_formed:
            self.form(shard_id)

    def form(self, *shard_ids: int) -> None:
        """Every replica of these shards has made its store."""
        formed = [
            command_pb2.FormShards.Formed(shard_id=shard_id, epoch=self.shard(shard_id).epoch) for shard_id in shard_ids
        ]
        self.accept(form_shards=command_pb2.FormShards(shards=formed))

    def reshape(self, move_id: int) -> tuple[int, ...]:
        """The shards of a split or a merge are sealed; what it makes."""
        epochs = [self.shard(shard_id).epoch for shard_id in self.state.moves[move_id].shard_ids]
        self.accept(reshape=command_pb2.Reshape(move_id=move_id, expected_epochs=epochs))
        return self.state.ended_moves[move_id].created_shard_ids

    def start_move(self, shard_id: int, source: str, target: str, kind: types_pb2.MoveKind.ValueType) -> int:
        """Starts a move at the shard's current epoch; its id."""
        command = command_pb2.StartMove(
            shard_id=shard_id,
            source=source,
            target=target,
            kind=kind,
            reason="test",
            expected_epoch=self.shard(shard_id).epoch,
        )
        return self.accept(start_move=command).result.applied.created_ids[0]

    def shard(self, shard_id: int) -> Shard:
        """The shard as it is now."""
        return self.state.shards[shard_id]
