"""The embedded backend, and the choice between the backends."""

from __future__ import annotations

import dataclasses

import pytest

from coordinator.config import ClusterConfig, DiscoverySettings, MasterSettings
from coordinator.discovery import HealthySet, MasterAddress, Registration, make_discovery
from coordinator.discovery.consul import ConsulDiscovery
from coordinator.discovery.embedded import EmbeddedDiscovery
from coordinator.model.errors import ConfigError

CONFIG = ClusterConfig(
    masters=(
        MasterSettings("m1", "127.0.0.1:7101", "127.0.0.1:7151", "127.0.0.1:7201"),
        MasterSettings("m2", "127.0.0.1:7102", "127.0.0.1:7152", "127.0.0.1:7202"),
    )
)


async def test_masters_are_those_of_the_configuration() -> None:
    """The embedded backend shows the masters table, with nobody marked as leader."""
    discovery = make_discovery(CONFIG)
    await discovery.start()
    assert await discovery.masters() == (MasterAddress("m1", "127.0.0.1:7101"), MasterAddress("m2", "127.0.0.1:7102"))
    await discovery.stop()


async def test_it_has_no_opinion_on_health() -> None:
    """Without a backend nobody is dropped and nobody kept out, registered or not."""
    discovery = make_discovery(CONFIG)
    await discovery.start()
    await discovery.register(Registration("worker-agent", "w1", "127.0.0.1:7301", "127.0.0.1:7401"))
    assert discovery.healthy("worker-agent") == HealthySet(known=False)
    await discovery.stop()


async def test_the_last_registration_is_kept_until_stop() -> None:
    """A registration replaces the one before it and ends with the daemon."""
    discovery = EmbeddedDiscovery(CONFIG.masters)
    first = Registration("coordinator", "m1", "127.0.0.1:7101", "127.0.0.1:7201", tags=("follower",))
    second = dataclasses.replace(first, tags=("leader",))
    for registration in (first, second):
        await discovery.register(registration)
        assert discovery.registration == registration
    await discovery.stop()
    assert discovery.registration is None


async def test_the_configuration_chooses_the_backend() -> None:
    """The two names give the two backends, any other is refused; a backend that never started can be stopped."""
    assert isinstance(make_discovery(CONFIG), EmbeddedDiscovery)
    consul = make_discovery(dataclasses.replace(CONFIG, discovery=DiscoverySettings(backend="consul")))
    assert isinstance(consul, ConsulDiscovery)
    assert [master.id for master in await consul.masters()] == ["m1", "m2"]
    assert consul.healthy("worker-agent") == HealthySet(known=False)
    await consul.stop()
    with pytest.raises(ConfigError, match='backend = "zookeeper" is not known; use "embedded" or "consul"'):
        make_discovery(dataclasses.replace(CONFIG, discovery=DiscoverySettings(backend="zookeeper")))
