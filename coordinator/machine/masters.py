"""Commands about the masters themselves. What they mean for elections and commits is coordinator/raft/voters.py's."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from coordinator.api.v1 import command_pb2
from coordinator.machine.draft import Draft
from coordinator.model import AdmittedMaster
from coordinator.model.errors import RefusalReason, Refused


def admit_master(draft: Draft, command: command_pb2.AdmitMaster) -> None:
    """Another disk takes a master's place. Refused only where `admission` finds nothing either."""
    if not (command.master_id and command.disk_id):
        raise Refused(RefusalReason.INVALID, "an admission names the master and its disk")
    draft.masters = draft.masters.set(
        command.master_id,
        AdmittedMaster(command.master_id, command.disk_id, command.peer_address, draft.time_ms),
    )
    where = f" at {command.peer_address}" if command.peer_address else ""
    draft.record("master", command.master_id, f"votes with disk {command.disk_id}{where}; none before it counts")


_TAG = bytes((0x82, 0x05))
"""How the field `admit_master`, number 80, begins in a serialized Command; a test compares."""


def admission(payload: bytes) -> tuple[str, str] | None:
    """Master and disk of a serialized AdmitMaster, None for any other command; cheap for those."""
    if _TAG not in payload:
        return None
    try:
        command = command_pb2.Command.FromString(payload)
    except DecodeError:
        return None
    if command.WhichOneof("operation") != "admit_master":
        return None
    admitted = command.admit_master
    return (admitted.master_id, admitted.disk_id) if admitted.master_id and admitted.disk_id else None
