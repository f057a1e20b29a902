"""A backup of the whole state as one file, and the state that a new cluster begins with. Pure.

File: "FCBKUP" | version u16 | header length u32 | body length u64 | crc32 u32 | header | body, where the header is a
`BackupHeader`, the body a `Snapshot` message (snapshot.py), and the checksum covers both. All numbers are big-endian.

A restored cluster is a new one, and it must never be taken for the old one, nor for another restore of the same file:

1. It has a new identity: 16 random hex digits, then 16 digits that follow from the file. All its masters must have the
   same, so whoever restores the second master is given the first one's; the second half shows whether it is of the same
   file, because two states under one identity would never agree again.
2. Whatever counts upwards leaps ahead, beyond anything that the old cluster can have reached after the backup (etcd's
   `--bump-revision` is for the same): the index, so that workers take new assignments for newer than those that they
   had; the epochs of shards, so that what was fenced stays fenced; the ids of shards and moves, which are never used
   twice; the term, so that no log of the old cluster counts for more than the restored one. Shards that no worker was
   ever assigned to stay at epoch 0.

Which disks the old masters had is forgotten. Everything else is as it was at the backup's index. A launch that the
old cluster committed after the backup is unknown to the new one, so by its catch-up policy it may be launched again.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass, replace

from google.protobuf.message import DecodeError
from immutables import Map

from coordinator.api.v1 import snapshot_pb2
from coordinator.machine.snapshot import decode_snapshot, encode_snapshot
from coordinator.machine.state import State
from coordinator.model.errors import Damaged, InvalidRequest

INDEX_LEAP = 10**12
"""Log entries: at 5,000 per second more than six years after the backup; and 9,000 restores fit a JSON number."""
TERM_LEAP = 10**6
"""Elections: at one in the shortest election timeout for three days after the backup."""
EPOCH_LEAP = 10**6
"""Changes of one shard's replicas after the backup."""
ID_LEAP = 10**6
"""Shards or moves made after the backup."""
NONCE_DIGITS = 16
"""Hex digits of the random half of a restored cluster's identity."""
_MAGIC = b"FCBKUP"
_VERSION = 1
_HEADER = struct.Struct(">6sHIQI")
_DIGEST_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Backup:
    """What a backup file holds."""

    header: snapshot_pb2.BackupHeader
    state: State
    digest: str
    """Hex digits that follow from every byte of the file."""


def encode_backup(header: snapshot_pb2.BackupHeader, state: State) -> bytes:
    """The whole file; index and cluster id of the header are the state's."""
    head = snapshot_pb2.BackupHeader()
    head.CopyFrom(header)
    head.index, head.cluster_id = state.index, state.cluster_id
    first, body = head.SerializeToString(deterministic=True), encode_snapshot(state)
    checksum = zlib.crc32(body, zlib.crc32(first))
    return b"".join((_HEADER.pack(_MAGIC, _VERSION, len(first), len(body), checksum), first, body))


def decode_backup(data: bytes, name: str) -> Backup:
    """Reads what `encode_backup` made. Raises Damaged, naming the file, for anything else."""
    if data[: len(_MAGIC)] != _MAGIC:
        raise Damaged(f"{name}: it does not begin as a backup; name a file that `clusterctl backup` wrote")
    if len(data) < _HEADER.size:
        raise Damaged(f"{name}: cut off after {len(data)} bytes; use another backup")
    _, version, header_bytes, body_bytes, checksum = _HEADER.unpack_from(data)
    if version != _VERSION:
        raise Damaged(f"{name}: version {version} of the format, this clusterctl reads {_VERSION}; use a newer one")
    found, wanted = len(data) - _HEADER.size, header_bytes + body_bytes
    if found != wanted:
        raise Damaged(f"{name}: {found} bytes where its header says {wanted}; use another backup")
    if zlib.crc32(memoryview(data)[_HEADER.size :]) != checksum:
        raise Damaged(f"{name}: the checksum does not match; use another backup")
    body_at = _HEADER.size + header_bytes
    try:
        header = snapshot_pb2.BackupHeader.FromString(data[_HEADER.size : body_at])
        state = decode_snapshot(data[body_at:])
    except DecodeError as error:
        raise Damaged(f"{name}: its header cannot be read: {error}; use another backup") from None
    except Damaged as error:
        raise Damaged(f"{name}: {error}") from None
    if (header.index, header.cluster_id) != (state.index, state.cluster_id) or not state.cluster_id:
        raise Damaged(f"{name}: its header does not fit its state; use another backup")
    return Backup(header, state, hashlib.sha256(data).hexdigest()[:_DIGEST_DIGITS])


def restored_id(backup: Backup, nonce: str) -> str:
    """The identity of the cluster that is made of a backup; `nonce` is NONCE_DIGITS random hex digits."""
    return nonce + backup.digest


def check_restored_id(backup: Backup, cluster_id: str) -> None:
    """Raises InvalidRequest when an identity cannot have come from restoring this backup."""
    is_hex = len(cluster_id) == NONCE_DIGITS + _DIGEST_DIGITS and not set(cluster_id) - set("0123456789abcdef")
    if not is_hex or not cluster_id.endswith(backup.digest):
        raise InvalidRequest(
            f"cluster id {cluster_id!r} is not of this backup; give every master the same file, and the id that the "
            "first restore printed"
        )


def restored_state(backup: Backup, cluster_id: str, *, pause_cron: bool = False) -> State:
    """The state that the new cluster begins with."""
    state = backup.state
    shards = {
        shard.id: replace(shard, epoch=shard.epoch + EPOCH_LEAP if shard.epoch else 0)
        for shard in state.shards.values()
    }
    return replace(
        state,
        cluster_id=cluster_id,
        index=state.index + INDEX_LEAP,
        shards=Map(shards),
        settings=replace(state.settings, cron_paused=state.settings.cron_paused or pause_cron),
        masters=Map(),
        next_shard_id=state.next_shard_id + ID_LEAP,
        next_move_id=state.next_move_id + ID_LEAP,
    )


def restored_term(backup: Backup) -> int:
    """The term of the new cluster's first log entries."""
    return backup.header.term + TERM_LEAP
