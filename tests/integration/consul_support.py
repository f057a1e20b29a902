"""What the tests with a real Consul share: agents, health servers, and waiting."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web

from coordinator.config import ConsulSettings, MasterSettings
from coordinator.discovery.consul import ConsulDiscovery
from coordinator.discovery.interface import Registration
from tools.lib.consul_agent import ConsulAgent

DEADLINE_S = 20.0
POLL_S = 0.05
MASTERS = (
    MasterSettings("m1", "127.0.0.1:7101", "127.0.0.1:7151", "127.0.0.1:7201"),
    MasterSettings("m2", "127.0.0.1:7102", "127.0.0.1:7152", "127.0.0.1:7202"),
    MasterSettings("m3", "127.0.0.1:7103", "127.0.0.1:7153", "127.0.0.1:7203"),
)
HEALTH_PROGRAM = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


async def eventually(
    what: str, condition: Callable[[], bool | Awaitable[bool]], deadline_s: float = DEADLINE_S
) -> float:
    """Waits until the condition holds, for news that no event announces. The seconds that it took."""
    begun_s = time.monotonic()
    while True:
        held = condition()
        if await held if inspect.isawaitable(held) else held:
            return time.monotonic() - begun_s
        assert time.monotonic() - begun_s < deadline_s, f"not within {deadline_s} s: {what}"
        await asyncio.sleep(POLL_S)


@contextlib.asynccontextmanager
async def health_server() -> AsyncIterator[str]:
    """A server that answers 200 at /health, in this process; its host:port."""

    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"status": "healthy"})

    application = web.Application()
    application.router.add_get("/health", answer)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def health_process() -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The same as a process of its own, which can be killed; the process and its host:port."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        HEALTH_PROGRAM,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        yield process, f"127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def discovery_at(agent: ConsulAgent, cluster_name: str = "test") -> AsyncIterator[ConsulDiscovery]:
    """A started backend that asks this agent; stopped at the end."""
    settings = ConsulSettings(address=agent.address, check_interval_s=1.0, check_timeout_s=0.5, poll_wait_s=10.0)
    discovery = ConsulDiscovery(settings, MASTERS, cluster_name)
    await discovery.start()
    try:
        yield discovery
    finally:
        await discovery.stop()


def worker(http_address: str, worker_id: str = "w1") -> Registration:
    """A worker as it wants to be seen."""
    return Registration(
        service="worker-agent",
        id=worker_id,
        grpc_address="127.0.0.1:7301",
        http_address=http_address,
        tags=("zone-a",),
        meta=(("version", "1.2.3"), ("weight", "2.0"), ("zone", "a")),
    )


def master(master_id: str, http_address: str, role: str) -> Registration:
    """A master as it wants to be seen; the ports are others than those of the configuration."""
    return Registration("coordinator", master_id, f"127.0.0.1:81{master_id[1:]:0>2}", http_address, tags=(role,))


async def asked(agent: ConsulAgent, path: str) -> Any:
    """What the agent's API answers, without holding up the event loop."""
    return await asyncio.to_thread(agent.get, path)
