"""Masters as real processes, killed while clients write."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.raft_cluster import IDS, until
from tools.lib.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Master:
    """One process and what it said."""

    process: asyncio.subprocess.Process
    status: tuple[str, int] = ("None", 0)
    applied: list[str] | None = None
    reader: asyncio.Task[None] | None = None

    def send(self, line: str) -> None:
        """Gives a command; one that is dead does not mind."""
        assert self.process.stdin is not None
        if not self.process.stdin.is_closing():
            self.process.stdin.write(line.encode() + b"\n")


@dataclass
class Processes:
    """Three masters and the outcomes of all that was proposed."""

    directory: Path
    ports: dict[str, int]
    masters: dict[str, Master] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)

    async def start(self, id: str) -> None:
        """Starts a master on its directory."""
        spec = json.dumps({"id": id, "directory": str(self.directory / id), "ports": self.ports})
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.raft_process", spec, cwd=ROOT, limit=1 << 22,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        master = self.masters[id] = Master(process)
        master.reader = asyncio.create_task(self._read(master))

    async def _read(self, master: Master) -> None:
        assert master.process.stdout is not None
        while line := (await master.process.stdout.readline()).decode().split():
            match line:
                case ["status", leader, index]:
                    master.status = (leader, int(index))
                case ["applied", *causes]:
                    master.applied = causes
                case [outcome, cause]:
                    self.outcomes[cause] = outcome

    async def kill(self, id: str) -> None:
        """kill -9."""
        master = self.masters.pop(id)
        if master.process.returncode is None:
            master.process.kill()
        await master.process.wait()
        assert master.reader is not None
        await master.reader
        assert master.process.stdin is not None
        master.process.stdin.close()

    async def agreed_leader(self) -> str:
        """The leader that all who run name, once they are ready and have applied the same."""

        def agree() -> bool:
            for master in self.masters.values():
                master.send("status")
            found = {master.status for master in self.masters.values()}
            return len(found) == 1 and ("None", 0) not in found and found.pop()[0] in self.masters

        for master in self.masters.values():
            master.status = ("None", 0)
        await until(agree, 20.0)
        return next(iter(self.masters.values())).status[0]

    async def write(self, prefix: str, count: int) -> None:
        """Proposes through all in turn; returns once a good part is acknowledged, while the rest is on its way."""
        causes = [f"{prefix}-{number}" for number in range(count)]
        for number, cause in enumerate(causes):
            list(self.masters.values())[number % len(self.masters)].send(f"propose {cause}")
        await until(lambda: sum(self.outcomes.get(cause) == "ok" for cause in causes) >= count // 3, 20.0)

    async def check(self) -> None:
        """All masters applied the same, with everything acknowledged, nothing denied, and nothing twice."""
        await self.agreed_leader()
        for master in self.masters.values():
            master.applied = None
            master.send("applied")
        await until(lambda: all(master.applied is not None for master in self.masters.values()))
        found = self.masters["m1"].applied
        assert found is not None
        assert all(master.applied == found for master in self.masters.values())
        assert len(found) == len(set(found))
        acknowledged = {cause for cause, outcome in self.outcomes.items() if outcome == "ok"}
        denied = {cause for cause, outcome in self.outcomes.items() if outcome == "failed"}
        assert acknowledged <= set(found)
        assert not denied & set(found)


@asynccontextmanager
async def processes(directory: Path) -> AsyncIterator[Processes]:
    """Three masters; whatever runs at the end is killed."""
    made = Processes(directory, dict(zip(IDS, free_ports(len(IDS)), strict=True)))
    try:
        for id in IDS:
            await made.start(id)
        await made.agreed_leader()
        yield made
    finally:
        for id in list(made.masters):
            await made.kill(id)


async def test_kill_of_the_leader_loses_nothing(tmp_path: Path) -> None:
    """kill -9 of the leader under load, several times, over snapshots and cuts of the log."""
    async with processes(tmp_path) as masters:
        for round_number in range(4):
            leader = await masters.agreed_leader()
            await masters.write(f"leader{round_number}", 300)
            await masters.kill(leader)
            await masters.write(f"without{round_number}", 60)
            await masters.start(leader)
        await masters.check()
    assert all((tmp_path / id / "snapshot").exists() for id in IDS)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="Windows cannot stop a process")
async def test_paused_leader_is_replaced_and_comes_back_as_follower(tmp_path: Path) -> None:
    """SIGSTOP of the leader: its silent connections are noticed, others lead, and it loses nothing on its return."""
    async with processes(tmp_path) as masters:
        leader = await masters.agreed_leader()
        await masters.write("before", 60)
        paused = masters.masters.pop(leader)
        paused.process.send_signal(signal.SIGSTOP)
        try:
            assert await masters.agreed_leader() != leader
            await masters.write("meanwhile", 60)
        finally:
            paused.process.send_signal(signal.SIGCONT)
            masters.masters[leader] = paused
        await masters.check()


async def test_kill_of_all_loses_nothing(tmp_path: Path) -> None:
    """kill -9 of all three under load: what was acknowledged is there when they come back."""
    async with processes(tmp_path) as masters:
        for round_number in range(3):
            await masters.write(f"all{round_number}", 300)
            for id in IDS:
                await masters.kill(id)
            for id in IDS:
                await masters.start(id)
            await masters.agreed_leader()
        await masters.check()
