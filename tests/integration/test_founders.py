"""A master that was there at the founding, and saw another one too late to vote by itself: three in this process."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from coordinator.config import ClusterConfig, SecuritySettings
from coordinator.raft.consensus import Consensus
from coordinator.raft.seat import Seat
from coordinator.server.daemon import Master
from tools.lib.local_cluster import make_config

DEADLINE_S = 20.0


def late(monkeypatch: pytest.MonkeyPatch, *late_ids: str) -> None:
    """These masters see the others only once somebody has history."""
    real = Seat._is_founding

    def is_founding(self: Seat, consensus: Consensus) -> bool:
        return self._transport.self_id not in late_ids and real(self, consensus)

    monkeypatch.setattr(Seat, "_is_founding", is_founding)


async def role_becomes(master: Master, *roles: str) -> None:
    """Waits for it."""
    async with asyncio.timeout(DEADLINE_S):
        while master._raft.status().role not in roles:  # noqa: ASYNC110 - no event says it
            await asyncio.sleep(0.02)


async def test_the_leader_admits_who_saw_the_others_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It votes without anybody's help, with the disk that it had, and the other two can then do without a third."""
    late(monkeypatch, "m3")
    made = make_config(masters=3, workers=0)
    plain_text = SecuritySettings(mode="plaintext")
    config = ClusterConfig(name=made.name, data_directory=str(tmp_path), masters=made.masters, security=plain_text)
    masters = {id: Master(config, id) for id in ("m1", "m2", "m3")}
    try:
        for master in masters.values():
            await master.start()
        await role_becomes(masters["m3"], "follower")
        state = masters["m3"]._raft.state
        assert set(state.masters) == {"m3"}
        assert [event.subject for event in state.events.values() if event.kind == "master"] == ["m3"]
        leader = next(id for id, master in masters.items() if master._raft.is_leader)
        await masters.pop(leader).stop()
        async with asyncio.timeout(DEADLINE_S):
            while not any(master._raft.is_leader for master in masters.values()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    finally:
        for master in masters.values():
            await master.stop()
