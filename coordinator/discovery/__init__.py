"""How masters and workers find each other: one interface, two backends."""

from __future__ import annotations

from coordinator.config import ClusterConfig
from coordinator.discovery.embedded import EmbeddedDiscovery
from coordinator.discovery.interface import Discovery, HealthySet, MasterAddress, Registration
from coordinator.model.errors import ConfigError

__all__ = ["Discovery", "HealthySet", "MasterAddress", "Registration", "make_discovery"]


def make_discovery(config: ClusterConfig) -> Discovery:
    """The backend that the configuration names; not started. Raises ConfigError for an unknown one."""
    match config.discovery.backend:
        case "embedded":
            return EmbeddedDiscovery(config.masters)
        case "consul":
            # Here and not at the top: the client library costs a daemon without Consul a quarter of its start.
            from coordinator.discovery.consul import ConsulDiscovery

            return ConsulDiscovery(config.discovery.consul, config.masters, config.name)
        case unknown:
            raise ConfigError([f'discovery.backend = "{unknown}" is not known; use "embedded" or "consul"'])
