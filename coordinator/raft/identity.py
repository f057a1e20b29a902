"""Who a master's data directory is: the file `identity.json`, with what must outlive the process.

- **The cluster.** Its identity is part of the replicated state, but a master that has just started may not have
  applied that part yet, and by then it has long said hello to its peers. So it is kept beside the log as well, from
  the moment at which the state shows it: masters of two clusters (an old one, and one restored from its backup) refuse
  each other although names and addresses are the same.
- **The disk's name**, random, made with the directory: an empty directory is another disk.
- **Whether it votes**, and since which index of the log: a snapshot may be older, and name the disk before it. A new
  one does not vote, see voters.py. A directory that has a vote file has forgotten nothing, so it votes also when this
  file is missing.
- **Where masters that were moved are**, since which index: the log behind the snapshot is known to be committed only
  once a leader says so, and who cannot be reached does not help to elect one.
"""

from __future__ import annotations

import json
import secrets
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coordinator.model.errors import Damaged
from coordinator.raft.files import ADVICE, replace_file

FILE_NAME = "identity.json"


def _random_name() -> str:
    return secrets.token_hex(8)


class Identity:
    """Who a data directory is; made when there is none yet."""

    def __init__(self, directory: Path, new_disk_id: Callable[[], str] = _random_name) -> None:
        """Raises Damaged when the file cannot be trusted, OSError when the disk fails."""
        self._path = directory / FILE_NAME
        self.cluster_id = ""
        """Empty while it is unknown."""
        self.disk_id = new_disk_id()
        self.is_voter = (directory / "vote.json").exists()
        self.voter_from = 0
        """Index that it had applied when it came to vote: a state that includes it knows of this disk."""
        self.addresses: dict[str, str] = {}
        """Peer addresses of the masters that are not where the configuration says, by id."""
        self._addresses_from = 0
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            self._store()
            return
        try:
            body = json.loads(content)
            checksum = body.pop("crc32")
            if checksum != _checksum(body):
                raise ValueError("checksum")
            self.cluster_id, self.disk_id, self.is_voter = body["cluster_id"], body["disk_id"], body["is_voter"]
            self.voter_from = body.get("voter_from", 0)
            self.addresses, self._addresses_from = body.get("addresses", {}), body.get("addresses_from", 0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Damaged(f"{self._path}, offset 0: cannot be read as a master's identity; {ADVICE}") from None

    def learn(self, cluster_id: str) -> None:
        """The state shows this cluster, empty for none yet; durable when it returns. Raises Damaged for another."""
        if cluster_id in ("", self.cluster_id):
            return
        if self.cluster_id:
            raise Damaged(
                f"{self._path}: this directory belongs to cluster {self.cluster_id}, but its state to {cluster_id}; "
                f"{ADVICE}"
            )
        self.cluster_id = cluster_id
        self._store()

    def become_voter(self, index: int = 0) -> None:
        """The disk votes from now on, with everything up to `index` applied; durable when it returns."""
        self.is_voter, self.voter_from = True, index
        self._store()

    def learn_addresses(self, addresses: dict[str, str], index: int) -> None:
        """The state at `index` has these; an older state than the one before says nothing. Durable when it returns."""
        if index >= self._addresses_from and addresses != self.addresses:
            self.addresses, self._addresses_from = addresses, index
            self._store()

    def _store(self) -> None:
        body: dict[str, Any] = {
            "cluster_id": self.cluster_id,
            "disk_id": self.disk_id,
            "is_voter": self.is_voter,
            "voter_from": self.voter_from,
            "addresses": self.addresses,
            "addresses_from": self._addresses_from,
        }
        replace_file(self._path, json.dumps(body | {"crc32": _checksum(body)}).encode())


def _checksum(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
