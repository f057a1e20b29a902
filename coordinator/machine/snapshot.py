"""The state as bytes and back. Equal states make equal bytes, on every master.

`decode_snapshot(encode_snapshot(state))` is the same state, and encoding that gives the same bytes. A snapshot of an
older format version still loads; one of a newer version is refused as `Damaged`, since guessing would lose data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError
from immutables import Map

from coordinator.api.v1 import snapshot_pb2
from coordinator.machine.codec import (
    event_from_proto,
    event_to_proto,
    job_from_proto,
    job_to_proto,
    launch_from_proto,
    launch_to_proto,
    move_from_proto,
    move_to_proto,
    node_from_proto,
    node_to_proto,
    settings_from_proto,
    settings_to_proto,
    shard_from_proto,
    shard_to_proto,
)
from coordinator.machine.state import LaunchKey, RememberedResult, State
from coordinator.model import AdmittedMaster, Launch, LaunchState, WallMs
from coordinator.model.errors import Damaged

FORMAT_VERSION = 1
PIECE_ITEMS = 100
"""About a millisecond."""

Item = TypeVar("Item")


def encode_snapshot(state: State, pause: Callable[[], None] | None = None) -> bytes:
    """The whole state as a `Snapshot` message.

    It is made in pieces, which together are one message, with a `pause` after each: whoever waits for the interpreter
    meanwhile, as a leader's event loop does, gets it between two of them. In one piece the loop stood still for up to
    0.6 s with a full table of results, longer than an election timeout.
    """
    encoded: list[bytes] = []
    for piece in _pieces(state):
        encoded.append(piece.SerializeToString(deterministic=True))
        if pause is not None:
            pause()
    return b"".join(encoded)


def _pieces(state: State) -> Iterator[snapshot_pb2.Snapshot]:
    yield snapshot_pb2.Snapshot(
        format_version=FORMAT_VERSION,
        cluster_id=state.cluster_id,
        index=state.index,
        time_unix_ms=state.time_ms,
        settings=settings_to_proto(state.settings),
        next_shard_id=state.next_shard_id,
        next_move_id=state.next_move_id,
        next_event_sequence=state.next_event_sequence,
        masters=[
            snapshot_pb2.AdmittedMaster(
                id=master.id,
                disk_id=master.disk_id,
                peer_address=master.peer_address,
                admitted_unix_ms=master.admitted_ms,
            )
            for _, master in sorted(state.masters.items())
        ],
    )
    for nodes in _batched(sorted(state.nodes.items())):
        yield snapshot_pb2.Snapshot(nodes=[node_to_proto(node) for _, node in nodes])
    for shards in _batched(sorted(state.shards.items())):
        yield snapshot_pb2.Snapshot(shards=[shard_to_proto(shard) for _, shard in shards])
    for moves in _batched(sorted(state.moves.items())):
        yield snapshot_pb2.Snapshot(moves=[move_to_proto(move) for _, move in moves])
    for moves in _batched(sorted(state.ended_moves.items())):
        yield snapshot_pb2.Snapshot(ended_moves=[move_to_proto(move) for _, move in moves])
    for jobs in _batched(sorted(state.jobs.items())):
        yield snapshot_pb2.Snapshot(jobs=[job_to_proto(job) for _, job in jobs])
    for job_id in sorted(state.launch_times):
        for times in _batched(state.launch_times[job_id]):
            yield snapshot_pb2.Snapshot(launches=[launch_to_proto(state.launches[job_id, time]) for time in times])
    for sequences in _batched(sorted(state.events)):
        yield snapshot_pb2.Snapshot(events=[event_to_proto(state.events[sequence]) for sequence in sequences])
    end = state.next_result_position
    for positions in _batched(range(end - len(state.result_order), end)):
        kept = [state.results[state.result_order[position]] for position in positions]
        yield snapshot_pb2.Snapshot(
            results=[
                snapshot_pb2.RememberedResult(
                    request_id=one.request_id, index=one.index, at_unix_ms=one.at_ms, result=one.result
                )
                for one in kept
            ]
        )


def _batched(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Slices of at most PIECE_ITEMS."""
    return (items[first : first + PIECE_ITEMS] for first in range(0, len(items), PIECE_ITEMS))


def decode_snapshot(data: bytes) -> State:
    """The state from a `Snapshot` message. Raises Damaged when the bytes are none, or of a newer format."""
    try:
        message = snapshot_pb2.Snapshot.FromString(data)
    except DecodeError as error:
        raise Damaged(f"the snapshot cannot be decoded: {error}") from None
    if not 1 <= message.format_version <= FORMAT_VERSION:
        raise Damaged(
            f"the snapshot has format version {message.format_version}, this software reads 1 to {FORMAT_VERSION}; "
            f"run the version that wrote it, or a newer one"
        )
    try:
        return _build(message)
    except ValueError as error:
        raise Damaged(f"the snapshot holds a value that this software does not know: {error}") from None


def _build(message: snapshot_pb2.Snapshot) -> State:
    launches = [launch_from_proto(launch) for launch in message.launches]
    moves = [move_from_proto(move) for move in message.moves]
    kept = [
        RememberedResult(result.request_id, result.index, WallMs(result.at_unix_ms), result.result)
        for result in message.results
    ]
    masters = [
        AdmittedMaster(master.id, master.disk_id, master.peer_address, WallMs(master.admitted_unix_ms))
        for master in message.masters
    ]
    return State(
        cluster_id=message.cluster_id,
        index=message.index,
        time_ms=WallMs(message.time_unix_ms),
        settings=settings_from_proto(message.settings),
        nodes=Map((node.id, node_from_proto(node)) for node in message.nodes),
        shards=Map((shard.id, shard_from_proto(shard)) for shard in message.shards),
        moves=Map((move.id, move) for move in moves),
        ended_moves=Map((move.id, move_from_proto(move)) for move in message.ended_moves),
        jobs=Map((job.spec.id, job_from_proto(job)) for job in message.jobs),
        launches=Map[LaunchKey, Launch]((launch.key, launch) for launch in launches),
        events=Map((event.sequence, event_from_proto(event)) for event in message.events),
        results=Map((result.request_id, result) for result in kept),
        result_order=Map((number, result.request_id) for number, result in enumerate(kept, start=1)),
        next_result_position=len(kept) + 1,
        next_shard_id=message.next_shard_id,
        next_move_id=message.next_move_id,
        next_event_sequence=message.next_event_sequence,
        masters=Map((master.id, master) for master in masters),
        move_of_shard=Map((shard_id, move.id) for move in moves for shard_id in move.shard_ids),
        launch_times=Map(launch_times(launches)),
        launch_counts=Map(launch_counts(launches)),
    )


def launch_counts(launches: Iterable[Launch]) -> dict[LaunchState, int]:
    """Launches by state: the derived `State.launch_counts`."""
    return Counter(launch.state for launch in launches)


def launch_times(launches: Iterable[Launch]) -> dict[str, tuple[WallMs, ...]]:
    """Scheduled times by job, ascending: the derived `State.launch_times`."""
    times: dict[str, list[WallMs]] = {}
    for launch in launches:
        times.setdefault(launch.job_id, []).append(launch.scheduled_at_ms)
    return {job_id: tuple(sorted(of_job)) for job_id, of_job in times.items()}
