"""RaftNode by itself: three of them in three processes, and clients on the event loop of one.

`python -m tools.bench_lib.raft_layer DIRECTORY ID` runs one node over the real machine and takes orders as JSON lines:
{"clients": N, "seconds": S} or {"latencies": N}. It answers each with one line, and before the first with who leads.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from coordinator.api.v1 import command_pb2
from coordinator.config import MasterSettings, RaftSettings
from coordinator.model import SystemClock
from coordinator.raft.node import RaftNode
from coordinator.server.main import _loop_factory
from tools.bench_lib.raft_ours import JOBS, job_id, job_spec
from tools.bench_lib.result import OURS, Emit, Params, emit_quantiles
from tools.lib.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
MASTERS = "masters.json"
READY_TIMEOUT_S = 30.0
ORDER_TIMEOUT_S = 300.0


# The process of one node


class _Node:
    """One RaftNode and its clients."""

    def __init__(self, directory: Path, self_id: str) -> None:
        peers = json.loads((directory / MASTERS).read_text(encoding="utf-8"))
        self.raft = RaftNode(
            self_id=self_id,
            masters=tuple(MasterSettings(id, "unused:1", address, "unused:1") for id, address in peers.items()),
            cluster_name="bench",
            directory=directory / self_id,
            settings=RaftSettings(),
            clock=SystemClock(),
            rng=random.Random(),
        )
        self._number = 0

    async def _write(self) -> None:
        """Commits what OurMember.write has committed."""
        self._number += 1
        job = self.raft.state.jobs[job_id(self._number)]
        change = command_pb2.SetJobPaused(job_id=job.id, paused=not job.paused)
        request_id = uuid.uuid4().hex
        command = command_pb2.Command(request_id=request_id, cause=request_id, set_job_paused=change)
        result = await self.raft.propose(command)
        assert result.HasField("applied"), result

    async def prepare(self) -> dict[str, Any]:
        """Makes the jobs that the commands are about."""
        applies = [command_pb2.ApplyJob(spec=job_spec(number)) for number in range(JOBS)]
        batch = command_pb2.Batch(commands=[command_pb2.Command(apply_job=apply) for apply in applies])
        result = await self.raft.propose(command_pb2.Command(batch=batch))
        return {"done": len(result.applied.results)}

    async def load(self, clients: int, seconds: float) -> dict[str, Any]:
        """So many clients for so long."""
        end_s = time.perf_counter() + seconds
        before = self._number

        async def client() -> None:
            while time.perf_counter() < end_s:
                await self._write()

        cpu_s, begun_s = time.process_time(), time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        spent_s, done = time.perf_counter() - begun_s, self._number - before
        return {"per_s": done / spent_s, "cpu_us": (time.process_time() - cpu_s) / done * 1e6}

    async def latencies(self, count: int) -> dict[str, Any]:
        """Of one client."""
        taken = []
        for _ in range(count):
            begun_s = time.perf_counter()
            await self._write()
            taken.append((time.perf_counter() - begun_s) * 1_000)
        return {"ms": taken}


async def _serve(directory: Path, self_id: str) -> None:
    node = _Node(directory, self_id)
    await node.raft.start()
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while not node.raft.is_ready:  # noqa: ASYNC110  (RaftNode tells of leadership, not of readiness)
                await asyncio.sleep(0.01)
        _say({"leads": node.raft.is_leader})
        while line := await lines.readline():
            order = json.loads(line)
            match order.pop("do"):
                case "prepare":
                    _say(await node.prepare())
                case "load":
                    _say(await node.load(**order))
                case "latencies":
                    _say(await node.latencies(**order))
                case other:
                    raise ValueError(f"no such order: {other}")
    finally:
        await node.raft.stop()


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


# The side that measures


async def measure(emit: Emit, directory: Path, latencies: int, load_s: float) -> None:
    """Emits `commit_ms` and `commits_per_s` of this layer."""
    ids = ("m1", "m2", "m3")
    ports = free_ports(len(ids))
    peers = {id: f"127.0.0.1:{port}" for id, port in zip(ids, ports, strict=True)}
    (directory / MASTERS).write_text(json.dumps(peers), encoding="utf-8")
    processes = [await _start(directory, id) for id in ids]
    try:
        leads = [bool((await _answer(process))["leads"]) for process in processes]
        leader, follower = processes[leads.index(True)], processes[leads.index(False)]
        await _order(leader, do="prepare")
        for through, process in (("leader", leader), ("follower", follower)):
            params: Params = {"clients": 1, "through": through, "layer": "raft"}
            answer = await _order(process, do="latencies", count=latencies)
            emit_quantiles(emit, OURS, "commit_ms", "ms", params, answer["ms"])
        for clients in (64, 256):
            params = {"clients": clients, "through": "leader", "layer": "raft"}
            answer = await _order(leader, do="load", clients=clients, seconds=load_s)
            emit(OURS, "commits_per_s", answer["per_s"], "1/s", params)
            emit(OURS, "leader_cpu_us", answer["cpu_us"], "us", params)
    finally:
        for process in processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in processes:
            await _end(process)


async def _start(directory: Path, id: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tools.bench_lib.raft_layer",
        str(directory),
        id,
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=16 << 20,
    )


async def _order(process: asyncio.subprocess.Process, **order: Any) -> dict[str, Any]:
    assert process.stdin is not None
    process.stdin.write(json.dumps(order).encode() + b"\n")
    return await _answer(process)


async def _answer(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), ORDER_TIMEOUT_S)
    if not line:
        raise RuntimeError("a node of the Raft layer ended; standard error says why")
    answer: dict[str, Any] = json.loads(line)
    return answer


async def _end(process: asyncio.subprocess.Process) -> None:
    try:
        await asyncio.wait_for(process.wait(), 10)
    except TimeoutError:
        process.kill()
        await process.wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(Path(sys.argv[1]), sys.argv[2]))
