"""Which cluster a master's data directory belongs to: the file `identity.json`.

A cluster's identity is part of the replicated state, but a master that has just started may not have applied that part
yet, and by then it has long said hello to its peers. So it is kept beside the log as well, from the moment at which
the state shows it: masters of two clusters (an old one, and one restored from its backup) refuse each other although
names and addresses are the same.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from coordinator.model.errors import Damaged
from coordinator.raft.files import ADVICE, replace_file

FILE_NAME = "identity.json"


class Identity:
    """The identity of the cluster that a data directory belongs to; `cluster_id` is empty while it is unknown."""

    def __init__(self, directory: Path) -> None:
        """Raises Damaged when the file cannot be trusted."""
        self._path = directory / FILE_NAME
        self.cluster_id = ""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return
        try:
            body = json.loads(content)
            cluster_id, checksum = body["cluster_id"], body["crc32"]
            if zlib.crc32(cluster_id.encode()) != checksum:
                raise ValueError("checksum")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Damaged(f"{self._path}, offset 0: cannot be read as a cluster's identity; {ADVICE}") from None
        self.cluster_id = cluster_id

    def learn(self, cluster_id: str) -> None:
        """The state shows this identity, empty for none yet; durable when it returns. Raises Damaged for another."""
        if cluster_id in ("", self.cluster_id):
            return
        if self.cluster_id:
            raise Damaged(
                f"{self._path}: this directory belongs to cluster {self.cluster_id}, but its state to {cluster_id}; "
                f"{ADVICE}"
            )
        body = {"cluster_id": cluster_id, "crc32": zlib.crc32(cluster_id.encode())}
        replace_file(self._path, json.dumps(body).encode())
        self.cluster_id = cluster_id
