"""The small HTTP server of every daemon: `/health` and `/metrics`, nothing else.

It answers from memory on the daemon's event loop. It carries no secret and changes nothing, and it listens
where it is told to: `:7201` and `7201` without a host mean the loopback address, `0.0.0.0` has to be asked
for.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from coordinator.model.errors import CoordinatorError, InvalidRequest

LOOPBACK = "127.0.0.1"
STOP_TIMEOUT_S = 1.0
"""How long requests in flight may take when the daemon stops."""

_log = logging.getLogger(__name__)

Health = Callable[[], tuple[int, Mapping[str, Any]]]
"""The HTTP status and the JSON document that `/health` answers with."""


class HttpServer:
    """Serves `/health` and `/metrics` at `address` ("host:port"; port 0 picks a free one)."""

    def __init__(self, address: str, health: Health, registry: CollectorRegistry) -> None:
        self._address = address
        self._health = health
        self._registry = registry
        self._runner: web.AppRunner | None = None

    async def start(self) -> str:
        """Listens; returns the address with the port that is really bound.

        Raises InvalidRequest when the address is none, CoordinatorError when it cannot be bound.
        """
        host, port = split_address(self._address)
        application = web.Application()
        application.router.add_get("/health", self._answer_health)
        application.router.add_get("/metrics", self._answer_metrics)
        runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=STOP_TIMEOUT_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            await runner.cleanup()
            raise CoordinatorError(
                f"HTTP address {self._address} cannot be used ({error.strerror or error}); "
                f"stop what listens there or configure another http_address"
            ) from None
        self._runner = runner
        bound_port = int(runner.addresses[0][1])
        return join_address(host, bound_port)

    async def stop(self) -> None:
        """Stops listening and ends what is open; harmless when it does not run."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _answer_health(self, request: web.Request) -> web.Response:
        try:
            status, document = self._health()
            body = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
        except Exception:
            # A health check that fails is an answer, and its reason belongs into the log, not to the caller.
            _log.exception("the health check failed")
            status, body = 500, '{"status":"unhealthy"}'
        return web.Response(status=status, text=body, content_type="application/json")

    async def _answer_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port", "[v6]:port", ":port" or "port". Raises InvalidRequest when it is none of these."""
    host, _, port_text = address.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or LOOPBACK
    if not (port_text.isascii() and port_text.isdigit() and int(port_text) <= 65_535):
        raise InvalidRequest(f"address {address!r} has no port between 0 and 65535; write host:port")
    return host, int(port_text)


def join_address(host: str, port: int) -> str:
    """The address as text; an IPv6 host gets its brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
