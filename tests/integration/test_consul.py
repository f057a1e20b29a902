"""The Consul backend against a real Consul agent."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import time
import urllib.request
from pathlib import Path

import pytest

from coordinator.config import ConsulSettings
from coordinator.discovery.consul import ConsulDiscovery
from coordinator.discovery.interface import MasterAddress
from tests.integration.consul_support import (
    MASTERS,
    asked,
    discovery_at,
    eventually,
    health_process,
    health_server,
    master,
    worker,
)
from tools.lib.consul_agent import ConsulAgent
from tools.lib.ports import free_ports


async def test_registration_shows_with_metadata_and_check(agent: ConsulAgent) -> None:
    """A worker is in the catalog with its address, tags, metadata and a passing check of its /health."""
    async with health_server() as http_address, discovery_at(agent) as discovery:
        await discovery.register(worker(http_address))
        await eventually("healthy", lambda: "w1" in discovery.healthy("worker-agent").ids)
        (entry,) = await asked(agent, "/v1/catalog/service/worker-agent")
        assert (entry["ServiceID"], entry["ServiceAddress"], entry["ServicePort"]) == ("test-w1", "127.0.0.1", 7301)
        assert entry["ServiceTags"] == ["zone-a"]
        assert entry["ServiceMeta"] == {
            "cluster": "test",
            "grpc_address": "127.0.0.1:7301",
            "http_address": http_address,
            "id": "w1",
            "version": "1.2.3",
            "weight": "2.0",
            "zone": "a",
        }
        (check,) = await asked(agent, "/v1/health/checks/worker-agent")
        assert (check["Status"], check["Type"]) == ("passing", "http")
        assert f"GET http://{http_address}/health: 200" in check["Output"]


async def test_clean_stop_takes_the_registration_back(agent: ConsulAgent) -> None:
    """After `stop` the service is gone from the catalog, and another watcher sees it go."""
    async with health_server() as http_address, discovery_at(agent) as watcher:
        async with discovery_at(agent) as discovery:
            await discovery.register(worker(http_address))
            await eventually("healthy", lambda: "w1" in watcher.healthy("worker-agent").ids)
        assert await asked(agent, "/v1/agent/services") == {}
        await eventually("gone", lambda: watcher.healthy("worker-agent").ids == frozenset())
        assert watcher.healthy("worker-agent").known


async def test_killed_daemon_becomes_critical(agent: ConsulAgent) -> None:
    """A daemon that is killed stays registered, turns critical, and is no longer among the healthy."""
    async with discovery_at(agent) as discovery, health_process() as (process, http_address):
        await discovery.register(worker(http_address))
        await eventually("healthy", lambda: "w1" in discovery.healthy("worker-agent").ids)
        process.kill()
        await process.wait()
        took_s = await eventually("critical", lambda: discovery.healthy("worker-agent").ids == frozenset())
        assert took_s < 5.0
        assert discovery.healthy("worker-agent").known
        (check,) = await asked(agent, "/v1/health/state/critical")
        assert check["ServiceID"] == "test-w1"


async def test_masters_are_found_with_the_leader_first(agent: ConsulAgent) -> None:
    """Masters come from Consul with their real addresses, the leader first, and from the configuration where unseen."""
    async with (
        health_server() as http_address,
        discovery_at(agent) as first,
        discovery_at(agent) as second,
        discovery_at(agent) as worker_side,
    ):
        assert [one.grpc_address for one in await worker_side.masters()] == [one.grpc_address for one in MASTERS]
        await first.register(master("m1", http_address, "follower"))
        await second.register(master("m2", http_address, "leader"))
        expected = (
            MasterAddress("m2", "127.0.0.1:8102", is_leader=True),
            MasterAddress("m1", "127.0.0.1:8101"),
            MasterAddress("m3", "127.0.0.1:7103"),
        )

        async def sees(masters: tuple[MasterAddress, ...]) -> bool:
            return await worker_side.masters() == masters

        await eventually("m2 leads", lambda: sees(expected))
        # The leader changes: both daemons register again with another tag.
        await second.register(master("m2", http_address, "follower"))
        await first.register(master("m1", http_address, "leader"))
        expected = (
            MasterAddress("m1", "127.0.0.1:8101", is_leader=True),
            MasterAddress("m2", "127.0.0.1:8102"),
            MasterAddress("m3", "127.0.0.1:7103"),
        )
        assert await eventually("m1 leads", lambda: sees(expected)) < 5.0
        (entry,) = await asked(agent, "/v1/health/service/coordinator?tag=leader")
        assert entry["Service"]["Meta"]["id"] == "m1"


async def test_change_of_tags_keeps_the_check_passing(agent: ConsulAgent) -> None:
    """A daemon that only changes its tags is never shown as critical for it."""
    async with health_server() as http_address, discovery_at(agent) as discovery:
        await discovery.register(master("m1", http_address, "follower"))
        await eventually("healthy", lambda: "m1" in discovery.healthy("coordinator").ids)
        for role in ("leader", "follower", "leader"):
            await discovery.register(master("m1", http_address, role))

            async def shows(role: str = role) -> bool:
                (entry,) = await asked(agent, "/v1/health/service/coordinator")
                assert [check["Status"] for check in entry["Checks"]] == ["passing", "passing"]
                return bool(entry["Service"]["Tags"] == [role])

            await eventually(f"tag {role}", shows)


async def test_other_clusters_do_not_count(agent: ConsulAgent) -> None:
    """Two clusters with workers of the same id share an agent, and neither sees the other's."""
    async with (
        health_server() as http_address,
        discovery_at(agent, "one") as one,
        discovery_at(agent, "two") as two,
    ):
        await one.register(worker(http_address, "w1"))
        await two.register(worker(http_address, "w2"))
        await eventually("one", lambda: one.healthy("worker-agent").ids == {"w1"})
        await eventually("two", lambda: two.healthy("worker-agent").ids == {"w2"})


async def test_lost_registration_comes_back(agent: ConsulAgent) -> None:
    """A registration that somebody takes away behind our back is there again within seconds."""
    async with health_server() as http_address, discovery_at(agent) as discovery:
        await discovery.register(worker(http_address))
        await eventually("healthy", lambda: "w1" in discovery.healthy("worker-agent").ids)
        request = urllib.request.Request(
            f"http://{agent.address}/v1/agent/service/deregister/test-w1", method="PUT", data=b""
        )
        await asyncio.to_thread(lambda: urllib.request.urlopen(request).close())
        await eventually("gone", lambda: discovery.healthy("worker-agent").ids == frozenset())
        await eventually("back", lambda: "w1" in discovery.healthy("worker-agent").ids)


@pytest.mark.parametrize("loses_data", [False, True])
async def test_consul_stopped_and_started_again(agent: ConsulAgent, loses_data: bool) -> None:
    """While Consul is away there is no opinion and the masters stay known; afterwards all comes back by itself.

    At no moment does the backend claim to know that the worker is not healthy, whether Consul kept its data or not.
    """
    async with (
        health_server() as http_address,
        discovery_at(agent) as master_side,
        discovery_at(agent) as worker_side,
    ):
        await master_side.register(master("m1", http_address, "leader"))
        await worker_side.register(worker(http_address))
        await eventually("healthy", lambda: "w1" in master_side.healthy("worker-agent").ids)
        leader = MasterAddress("m1", "127.0.0.1:8101", is_leader=True)
        await eventually("leader", lambda: first_is(worker_side, leader))
        claims: set[bool] = set()

        async def keep_asking() -> None:
            while True:
                seen = master_side.healthy("worker-agent")
                claims.add(not seen.known or "w1" in seen.ids)
                await asyncio.sleep(0.01)

        asking = asyncio.create_task(keep_asking())
        await asyncio.to_thread(agent.stop)
        await eventually("no opinion", lambda: not master_side.healthy("worker-agent").known)
        assert await first_is(worker_side, leader)
        if loses_data:
            shutil.rmtree(agent.directory / "data")
        await asyncio.to_thread(agent.start)
        await eventually("opinion", lambda: master_side.healthy("worker-agent").known, deadline_s=30.0)
        assert master_side.healthy("worker-agent").ids == {"w1"}
        await eventually("leader again", lambda: first_is(worker_side, leader))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert claims == {True}


async def first_is(discovery: ConsulDiscovery, expected: MasterAddress) -> bool:
    """True when that master is the first to be tried."""
    return (await discovery.masters())[0] == expected


async def test_start_and_stop_without_consul() -> None:
    """With nobody at the address, a daemon starts, knows the configured masters, and stops within two seconds."""
    (port,) = free_ports(1)
    discovery = ConsulDiscovery(ConsulSettings(address=f"127.0.0.1:{port}"), MASTERS, "test")
    await discovery.start()
    await discovery.register(worker("127.0.0.1:7401"))
    assert [one.id for one in await discovery.masters()] == ["m1", "m2", "m3"]
    assert not discovery.healthy("worker-agent").known
    await asyncio.sleep(0)
    begun_s = time.monotonic()
    await discovery.stop()
    assert time.monotonic() - begun_s < 2.5


async def test_stop_is_bounded_when_consul_hangs() -> None:
    """A Consul that takes connections and never answers takes away the opinion, and does not hold up the stop."""
    ended: list[asyncio.Event] = []

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ended.append(asyncio.Event())
        own = ended[-1]
        await reader.read()
        writer.close()
        await writer.wait_closed()
        own.set()

    async with await asyncio.start_server(swallow, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        discovery = ConsulDiscovery(ConsulSettings(address=f"127.0.0.1:{port}"), MASTERS, "test")
        await discovery.start()
        await discovery.register(worker("127.0.0.1:7401"))
        await eventually("asked", lambda: bool(ended))
        assert not discovery.healthy("worker-agent").known
        begun_s = time.monotonic()
        await discovery.stop()
        assert time.monotonic() - begun_s < 3.0
        await asyncio.gather(*(event.wait() for event in ended))


async def test_daemon_that_starts_before_consul_is_registered_later(tmp_path: Path, consul_binary: Path) -> None:
    """The order of starts does not matter: a daemon that was first is in the catalog once Consul is there."""
    late = ConsulAgent(tmp_path / "consul", binary=consul_binary)
    async with health_server() as http_address, discovery_at(late) as discovery:
        await discovery.register(worker(http_address))
        await eventually("noticed", lambda: bool(discovery._failing))
        await asyncio.to_thread(late.start)
        try:
            await eventually("healthy", lambda: discovery.healthy("worker-agent").ids == {"w1"}, deadline_s=30.0)
        finally:
            await discovery.stop()
            late.stop()


async def test_refused_registration_is_logged_once(agent: ConsulAgent, caplog: pytest.LogCaptureFixture) -> None:
    """What Consul refuses is told once, and is no reason to distrust its view of the others."""
    too_many = tuple((f"name-{number:03}", "x") for number in range(100))
    async with health_server() as http_address, discovery_at(agent) as discovery, discovery_at(agent) as other:
        await other.register(worker(http_address, "w2"))
        await discovery.register(dataclasses.replace(worker(http_address), meta=too_many))
        await eventually("refused", lambda: "refuses" in caplog.text)
        await eventually("view", lambda: discovery.healthy("worker-agent").ids == {"w2"})
        assert caplog.text.count("refuses") == 1


async def test_ui_answers(agent: ConsulAgent) -> None:
    """The agent serves its UI, so that people can see the fleet."""

    def status() -> int:
        with urllib.request.urlopen(agent.ui_url) as response:
            return int(response.status)

    assert await asyncio.to_thread(status) == 200
