"""What the points of the check share: the cluster, the words, and what was seen so far."""

from __future__ import annotations

import gzip
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from coordinator.api.v1 import cluster_pb2
from tools.lib.quickstart_cluster import QuickstartCluster

WORDS = Path(__file__).resolve().parents[1] / "data" / "words.txt.gz"
BATCH_KEYS = 10_000
"""Most keys that one LocateKeys call takes."""


class CheckFailed(Exception):
    """Something was not as promised; one line for people."""


@dataclass
class Stage:
    """The cluster that the check works on."""

    cluster: QuickstartCluster
    directory: Path
    workers: tuple[str, ...]
    newcomer: str
    places: dict[str, Place] = field(default_factory=dict)
    """Where each word was at the latest look."""

    @cached_property
    def words(self) -> list[str]:
        """The words of the list that the tool carries."""
        return gzip.decompress(WORDS.read_bytes()).decode("utf-8").split()

    def locate_all(self) -> dict[str, Place]:
        """Where every word is now."""
        places: dict[str, Place] = {}
        for start in range(0, len(self.words), BATCH_KEYS):
            answer = self.cluster.client.locate_keys(self.words[start : start + BATCH_KEYS])
            for location in answer.locations:
                places[location.key] = Place.of(location)
        return places

    def require(self, holds: bool, otherwise: str) -> None:
        """Raises CheckFailed unless it holds."""
        if not holds:
            raise CheckFailed(otherwise)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a key lives."""

    key_hash: int
    shard_id: int
    primary: str
    in_sync: tuple[str, ...]

    @classmethod
    def of(cls, location: cluster_pb2.LocateKeysResponse.Location) -> Place:
        """The part of an answer that counts here."""
        return cls(location.key_hash, location.shard_id, location.primary, tuple(location.in_sync))


def peak_to_average(counts: Counter[str], members: tuple[str, ...]) -> float:
    """Largest count over the average of the members; all weigh the same here."""
    return max(counts[member] for member in members) / (sum(counts[member] for member in members) / len(members))
