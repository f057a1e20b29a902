"""A master's seat among the masters: what its disk says of itself to peers, which peers it takes, and when it votes.

The rules are voters.py's; here they meet the connections and the identity file. Who says that a disk was replaced must
have applied at least what that disk had when it came to vote: an older state (a snapshot at the start, a master that
was away) may name the disk before it, where the same master was replaced twice. And it must know it to be committed: an
admission that only stands in its log may be overwritten, and who could do so may be a leader with the disk before.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from coordinator.api.v1 import peer_pb2
from coordinator.machine.state import State
from coordinator.model import AdmittedMaster
from coordinator.model.errors import Damaged
from coordinator.raft.consensus import Consensus
from coordinator.raft.frames import ProtocolViolation
from coordinator.raft.identity import Identity
from coordinator.raft.interface import Machine, PeerStanding
from coordinator.raft.transport import PeerTransport
from coordinator.raft.voters import Membership

log = logging.getLogger(__name__)


class Seat:
    """One master's seat, from the start of its process to the end."""

    def __init__(self, transport: PeerTransport, identity: Identity, machine: Machine) -> None:
        self.identity = identity
        self._transport = transport
        self._machine = machine
        self._consensus: Consensus | None = None
        self._state: State | None = None
        self._admitted: Mapping[str, AdmittedMaster] | None = None
        self._founders: dict[str, str] = {}
        """Disks of the other masters when this one's was founded."""
        transport.describe = self._describe
        transport.check_peer = self._check

    @property
    def membership(self) -> Membership:
        """What the consensus is told of this disk when it is made."""
        machine = self._machine
        return Membership(self.identity.disk_id, self.identity.is_voter, machine.admitted, machine.admission)

    def take(self, consensus: Consensus) -> None:
        """The consensus is made."""
        self._consensus = consensus
        self.look()
        if not self.identity.is_voter:
            log.info(
                "%s: its data directory is new; it votes once all masters are connected and theirs are new too, or "
                "once the leader has admitted it: by itself when it was there at the founding, else told by "
                "`clusterctl masters replace %s`",
                self._transport.self_id,
                self._transport.self_id,
            )

    # Peers

    def _describe(self, hello: peer_pb2.PeerHello) -> None:
        hello.cluster_id = self.identity.cluster_id
        hello.disk_id = self.identity.disk_id
        hello.is_voter = self.identity.is_voter
        hello.voter_from = self.identity.voter_from
        hello.has_history = self._consensus is None or self._consensus.has_history

    def _check(self, hello: peer_pb2.PeerHello) -> None:
        """Raises ProtocolViolation for a peer of another cluster, or with a disk that was replaced."""
        own_id = self.identity.cluster_id
        if hello.cluster_id and own_id and hello.cluster_id != own_id:
            raise ProtocolViolation(
                f"its disk belongs to cluster id {hello.cluster_id}, this master's to {own_id}; one of them was not "
                "restored with the others: give that one an empty data directory"
            )
        consensus = self._consensus
        knows_it = consensus is not None and consensus.applied_index >= hello.voter_from
        wanted = consensus.voters.disk_in_state(hello.from_id) if consensus is not None and knows_it else ""
        if hello.is_voter and wanted and hello.disk_id != wanted:
            raise ProtocolViolation(
                f"its disk {hello.disk_id} was replaced by {wanted} (`clusterctl masters replace`) and counts nowhere; "
                "stop it and move its data directory away"
            )

    def standing(self, id: str) -> PeerStanding | None:
        """A peer at the leader; None while it is not connected."""
        if self._consensus is None or id not in self._transport.connected_ids:
            return None
        # Before it has answered this leader there is only what it said when the connection was made.
        told = self._transport.told[id].is_voter, 0
        counts, matched_index = self._consensus.replication.standing(id) or told
        disk_id = self._transport.disk_of(id)
        return PeerStanding(disk_id, not counts, self._founders.get(id) == disk_id, matched_index)

    # Voting

    def look(self) -> None:
        """After every step: follows the state, and votes as soon as it may. Raises Damaged for a replaced disk."""
        consensus = self._consensus
        if consensus is None:
            return
        if consensus.state is not self._state:
            self._state = consensus.state
            self._follow(consensus)
        if self.identity.is_voter:
            return
        is_founding = self._is_founding(consensus)
        if is_founding:
            self._founders = {id: self._transport.disk_of(id) for id in self._transport.nodes}
        if is_founding or consensus.voters.is_admitted:
            # First the vote of this term goes, then the word comes: never the other way round.
            consensus.become_voter()
            self.identity.become_voter(consensus.applied_index)
            log.info("%s: its disk %s votes from now on", self._transport.self_id, self.identity.disk_id)

    def _follow(self, consensus: Consensus) -> None:
        self.identity.learn(self._machine.cluster_id(consensus.state))
        if other := consensus.voters.replaced_by:
            if self.identity.is_voter and consensus.applied_index >= self.identity.voter_from:
                own = f"this data directory of master {self._transport.self_id} (disk {self.identity.disk_id})"
                raise Damaged(
                    f"{own} counts nowhere any more, `clusterctl masters replace` put disk {other} in its place; move "
                    "it away"
                )
        admitted = self._machine.admitted(consensus.state)
        if admitted is self._admitted:
            return
        self._admitted = admitted
        addresses = {id: master.peer_address for id, master in admitted.items() if master.peer_address}
        self.identity.learn_addresses(addresses, consensus.applied_index)
        for id in self._transport.nodes:
            self._transport.move(id, self.identity.addresses.get(id, ""))

    def _is_founding(self, consensus: Consensus) -> bool:
        transport = self._transport
        if consensus.has_history or set(transport.connected_ids) != set(transport.nodes):
            return False
        return not any(transport.told[id].has_history for id in transport.nodes)
