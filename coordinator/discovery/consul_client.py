"""py-consul on this project's event loop.

py-consul's own asyncio client (`consul.aio`, seen in 1.8.0) makes its connector with arguments that aiohttp has
deprecated and will drop, loads certificates although it speaks plain HTTP, and knows deadlines only for the whole
session. Its base classes are made to be put on any HTTP client, so they are put on an aiohttp session of ours here.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

import aiohttp
import consul.base
from yarl import URL

from coordinator.config import ConsulSettings

CONNECT_TIMEOUT_S = 2.0


class _SessionAdapter(consul.base.HTTPClient):  # type: ignore[misc]
    """Sends py-consul's requests through an aiohttp session; each call gives a coroutine."""

    def __init__(self, host: str, port: int, scheme: str, verify: bool | str, cert: object) -> None:
        super().__init__(f"[{host}]" if ":" in host else host, port, scheme, verify, cert)
        security: ssl.SSLContext | bool = True
        if isinstance(verify, str):
            security = ssl.create_default_context(cafile=verify)
        elif not verify:
            security = False
        # Deadlines are set where the requests are made, since a blocking query may take its time; connecting may not.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=security),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        )

    async def _request(
        self,
        method: str,
        callback: Callable[[Any], Any],
        path: str,
        params: list[tuple[str, Any]] | None,
        headers: dict[str, str] | None,
        data: str | bytes | None = None,
    ) -> Any:
        url = URL(self.uri(path, params), encoded=True)
        async with self._session.request(method, url, headers=headers, data=data) as response:
            return callback(consul.base.Response(response.status, response.headers, await response.text()))

    def get(self, callback: Any, path: str, params: Any = None, headers: Any = None, **_: Any) -> Any:
        return self._request("GET", callback, path, params, headers)

    def put(self, callback: Any, path: str, params: Any = None, data: Any = "", headers: Any = None, **_: Any) -> Any:
        return self._request("PUT", callback, path, params, headers, data)

    def delete(
        self, callback: Any, path: str, params: Any = None, data: Any = "", headers: Any = None, **_: Any
    ) -> Any:
        return self._request("DELETE", callback, path, params, headers, data)

    def post(self, callback: Any, path: str, params: Any = None, data: Any = "", headers: Any = None, **_: Any) -> Any:
        return self._request("POST", callback, path, params, headers, data)

    async def close(self) -> None:
        await self._session.close()


class ConsulClient(consul.base.Consul):  # type: ignore[misc]
    """py-consul's whole interface, each call a coroutine. Made on a running event loop; `close` it."""

    http: _SessionAdapter

    def __init__(self, settings: ConsulSettings) -> None:
        host, _, port = settings.address.rpartition(":")
        super().__init__(
            host=host.strip("[]"),
            port=int(port),
            scheme=settings.scheme,
            token=settings.token or None,
            dc=settings.datacenter or None,
        )

    def http_connect(
        self, host: str, port: int, scheme: str, verify: bool | str = True, cert: object = None
    ) -> _SessionAdapter:
        return _SessionAdapter(host, port, scheme, verify, cert)

    async def close(self) -> None:
        """Closes the connections."""
        await self.http.close()
