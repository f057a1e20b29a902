"""The daemons' HTTP server and their logs: real sockets, real records."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, Gauge

from coordinator.config import LoggingSettings
from coordinator.model.errors import ConfigError, CoordinatorError, InvalidRequest
from coordinator.server import logs
from coordinator.server.http import Health, HttpServer, join_address, split_address


@asynccontextmanager
async def serving(health: Health, registry: CollectorRegistry | None = None) -> AsyncIterator[str]:
    """A server on a free port; gives its base URL."""
    server = HttpServer("127.0.0.1:0", health, registry or CollectorRegistry())
    address = await server.start()
    try:
        yield f"http://{address}"
    finally:
        await server.stop()


async def get(url: str) -> tuple[int, str, str]:
    """Status, content type and text of an answer."""
    async with aiohttp.ClientSession() as client, client.get(url) as answer:
        return answer.status, answer.headers["Content-Type"], await answer.text()


def healthy() -> tuple[int, Mapping[str, Any]]:
    """A health check that is well."""
    return 200, {"status": "healthy"}


@pytest.mark.parametrize(("status", "word"), [(200, "healthy"), (503, "unhealthy")])
async def test_health_answers_with_the_status_and_the_document(status: int, word: str) -> None:
    """`/health` gives what the daemon says of itself, as JSON, with its HTTP status."""
    async with serving(lambda: (status, {"status": word, "zone": "süd"})) as url:
        got_status, content_type, text = await get(f"{url}/health")
    assert (got_status, json.loads(text)) == (status, {"status": word, "zone": "süd"})
    assert content_type.startswith("application/json")


async def test_a_health_check_that_fails_is_an_unhealthy_daemon(caplog: pytest.LogCaptureFixture) -> None:
    """An exception becomes status 500; its text stays in the log."""

    def broken() -> tuple[int, Mapping[str, Any]]:
        raise RuntimeError("the token is hunter2")

    async with serving(broken) as url:
        status, _, text = await get(f"{url}/health")
    assert (status, json.loads(text)) == (500, {"status": "unhealthy"})
    assert "hunter2" in caplog.text


async def test_metrics_are_prometheus_text() -> None:
    """`/metrics` gives the registry in the text format that Prometheus reads."""
    registry = CollectorRegistry()
    Gauge("coordinator_test_value", "A value.", registry=registry).set(4.5)
    async with serving(healthy, registry) as url:
        status, content_type, text = await get(f"{url}/metrics")
    assert status == 200
    assert content_type.startswith("text/plain")
    assert "coordinator_test_value 4.5" in text


async def test_there_is_nothing_else() -> None:
    """Other paths and other methods are refused."""
    async with serving(healthy) as url, aiohttp.ClientSession() as client:
        assert (await get(url))[0] == 404
        async with client.post(f"{url}/health") as answer:
            assert answer.status == 405


async def test_a_port_in_use_is_one_clear_line() -> None:
    """A taken port is refused with the address and the way out, and nothing stays open."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(CoordinatorError) as refusal:
            await HttpServer(address, healthy, CollectorRegistry()).start()
    assert f"HTTP address {address} cannot be used" in str(refusal.value)
    assert "configure another http_address" in str(refusal.value)
    assert "\n" not in str(refusal.value)


async def test_stop_is_bounded_and_frees_the_port() -> None:
    """An idle client does not hold the daemon, and the port can be used again."""
    server = HttpServer("127.0.0.1:0", healthy, CollectorRegistry())
    address = await server.start()
    host, port = split_address(address)
    _, writer = await asyncio.open_connection(host, port)
    await asyncio.wait_for(server.stop(), 5)
    await server.stop()
    writer.close()
    again = HttpServer(address, healthy, CollectorRegistry())
    assert await again.start() == address
    await again.stop()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("127.0.0.1:7201", ("127.0.0.1", 7201)),
        ("[::1]:80", ("::1", 80)),
        (":7201", ("127.0.0.1", 7201)),
        ("7201", ("127.0.0.1", 7201)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
    ],
)
def test_addresses_without_a_host_mean_loopback(text: str, parts: tuple[str, int]) -> None:
    """A daemon listens for others only when its address says so."""
    assert split_address(text) == parts


@pytest.mark.parametrize("text", ["", "host", "host:", "host:70000", "host:-1", "host:http", "host:٣"])
def test_what_is_no_address_is_refused(text: str) -> None:
    """A port that is missing or out of range is refused with the text that was given."""
    with pytest.raises(InvalidRequest, match="write host:port"):
        split_address(text)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:2"])
def test_addresses_round_trip(address: str) -> None:
    """Splitting and joining give the same text."""
    assert join_address(*split_address(address)) == address


# Logs


@contextmanager
def logging_to(settings: LoggingSettings) -> Iterator[io.StringIO]:
    """The process's logging as `configure` sets it up, into a text; everything as it was afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    levels = {name: logging.getLogger(name).level for name in logs.QUIET_LOGGERS}
    stream = io.StringIO()
    try:
        logs.configure(settings, "w1", stream)
        yield stream
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        for name, before in levels.items():
            logging.getLogger(name).setLevel(before)
        logging.captureWarnings(False)


def test_text_logs_carry_time_level_daemon_and_cause() -> None:
    """A line for people names when, how grave, who, where, what and why."""
    with logging_to(LoggingSettings()) as stream:
        logging.getLogger("worker_agent.agent").info("launch %s ended", "loop_01", extra={"cause": "cron/loop_01/7"})
    time, rest = stream.getvalue().split(" ", 1)
    assert rest == "INFO    w1 worker_agent.agent: launch loop_01 ended cause=cron/loop_01/7\n"
    assert len(time) == len("2026-01-05T10:30:00.123Z")
    assert time.endswith("Z")


def test_json_logs_are_one_object_per_line() -> None:
    """Each line is a JSON object; exceptions and causes are fields."""
    with logging_to(LoggingSettings(format="json")) as stream:
        with logs.cause("cli-7"):
            logging.getLogger("x").warning("two\nlines")
        try:
            raise ValueError("bad")
        except ValueError:
            logging.getLogger("x").exception("failed")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (first["level"], first["daemon"], first["message"], first["cause"]) == (
        "warning",
        "w1",
        "two\nlines",
        "cli-7",
    )
    assert "ValueError: bad" in second["exception"]
    assert "cause" not in second


def test_a_message_cannot_forge_a_line() -> None:
    """Line breaks and control characters from outside are written as escapes."""
    with logging_to(LoggingSettings()) as stream:
        logging.getLogger("x").info("name %s", "a\n2026-01-01T00:00:00.000Z ERROR w1 x: forged\x1b[31m")
    assert len(stream.getvalue().splitlines()) == 1
    assert r"a\n2026" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_a_traceback_is_indented_below_its_line() -> None:
    """A traceback follows the line that it belongs to and cannot be taken for another one."""
    with logging_to(LoggingSettings()) as stream:
        try:
            raise ValueError("bad")
        except ValueError:
            logging.getLogger("x").exception("failed")
    head, *trace = stream.getvalue().splitlines()
    assert head.endswith("x: failed")
    assert trace
    assert all(line.startswith("    ") for line in trace)


async def test_the_cause_follows_into_tasks() -> None:
    """What a task logs that was started inside a cause block carries that cause."""

    async def work() -> None:
        logging.getLogger("x").info("inside")

    with logging_to(LoggingSettings(format="json")) as stream:
        with logs.cause("move/17/4711"):
            task = asyncio.create_task(work())
        await task
        logging.getLogger("x").info("outside")
    inside, outside = (json.loads(line) for line in stream.getvalue().splitlines())
    assert inside["cause"] == "move/17/4711"
    assert "cause" not in outside


def test_the_level_is_kept_and_libraries_are_quiet() -> None:
    """Records below the level are dropped, and libraries speak from warnings on."""
    with logging_to(LoggingSettings(level="info")) as stream:
        logging.getLogger("worker_agent").debug("hidden")
        logging.getLogger("grpc").info("hidden too")
        logging.getLogger("grpc").warning("shown")
    assert "hidden" not in stream.getvalue()
    assert "shown" in stream.getvalue()


def test_configured_twice_logs_once() -> None:
    """Setting up again replaces what was there."""
    with logging_to(LoggingSettings()) as first:
        second = io.StringIO()
        logs.configure(LoggingSettings(), "w2", second)
        logging.getLogger("x").info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


@pytest.mark.parametrize(
    ("settings", "key"),
    [(LoggingSettings(level="loud"), "logging.level"), (LoggingSettings(format="xml"), "logging.format")],
)
def test_what_cannot_be_configured_is_refused(settings: LoggingSettings, key: str) -> None:
    """A level or a format that does not exist is named with what would be right."""
    with pytest.raises(ConfigError, match=rf"^{key} is .*; use "):
        logs.configure(settings, "w1", io.StringIO())
