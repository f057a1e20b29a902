"""Discovery through Consul: daemons register with a health check, and watch each other by blocking queries.

Theory of operation. What a daemon wants to be seen as is kept here, and a loop makes Consul agree: it compares every
few seconds and registers again what an agent has lost (anti-entropy), so neither a Consul without memory nor one that
was away needs any other care. What Consul says about others is kept as the last answer, with three rules:

1. An error never changes what is known about masters: the last answer stays, and behind it the configured table.
2. `healthy` has no opinion (`known` is False) from the first failed contact until Consul has been back for as long as
   it takes all daemons to be registered and checked again. A Consul that has just started shows everybody as
   critical, and one that lost its data shows nobody; neither is news about workers.
3. Only instances whose metadata name our cluster count, so that clusters can share a Consul.

Blocking queries follow Consul's own rules: the index goes back to 0 when it runs backwards, a wait has a deadline a
sixteenth and a little longer than asked, and the next question waits `PACE_S`, so that a restless index costs little.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
from dataclasses import dataclass
from typing import Any

from consul import Check
from consul.exceptions import ACLDisabled, ACLPermissionDenied, BadRequest, ClientError

from coordinator.config import ConsulSettings, MasterSettings
from coordinator.discovery.consul_client import ConsulClient
from coordinator.discovery.interface import HealthySet, MasterAddress, Registration

logger = logging.getLogger(__name__)

LEADER_TAG = "leader"
HEALTH_PATH = "/health"
ANTI_ENTROPY_PERIOD_S = 3.0
REQUEST_TIMEOUT_S = 2.0
STOP_TIMEOUT_S = 2.0
PACE_S = 0.1
BACKOFF_S_MIN = 0.25
BACKOFF_S_MAX = 5.0
REGISTRATION = "our registration"
REFUSALS = (BadRequest, ClientError, ACLDisabled, ACLPermissionDenied)
META_VALUE_CHARACTERS_MAX = 512
"""Consul refuses a registration with a longer one."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance of a service, as Consul shows it."""

    id: str
    grpc_address: str
    is_passing: bool
    tags: frozenset[str]


class ConsulDiscovery:
    """The backend "consul". Implements coordinator.discovery.interface.Discovery."""

    def __init__(
        self,
        settings: ConsulSettings,
        masters: tuple[MasterSettings, ...],
        cluster_name: str,
        rng: random.Random | None = None,
    ) -> None:
        self._settings = settings
        self._configured = tuple(MasterAddress(master.id, master.grpc_address) for master in masters)
        self._cluster_name = cluster_name
        self._rng = rng or random.Random()
        self._client: ConsulClient | None = None
        self._wanted: Registration | None = None
        self._has_changed = asyncio.Event()
        self._views: dict[str, tuple[Instance, ...] | None] = {}
        """The last answer per watched service; None until there is one."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failing: set[str] = set()
        """Tasks whose last request failed."""
        self._refusals: set[str] = set()
        """Refusals that were logged, each once."""
        self._trusted_from_s = 0.0
        """Loop time from which what Consul says about health counts."""

    async def start(self) -> None:
        """Begins to watch the masters and to keep the registration up; returns at once."""
        if self._client is not None:
            return
        self._client = ConsulClient(self._settings)
        self._tasks[REGISTRATION] = asyncio.create_task(self._keep_registered(self._client))
        for service in {self._settings.coordinator_service, *self._views}:
            self._watch(service)

    async def stop(self) -> None:
        """Ends the background work and takes the registration back, within two seconds."""
        client, self._client = self._client, None
        if client is None:
            return
        tasks, wanted = list(self._tasks.values()), self._wanted
        self._tasks.clear()
        self._wanted = None
        try:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if wanted is not None:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await client.agent.service.deregister(self._service_id(wanted))
        except Exception as error:
            logger.warning("Consul at %s was not told that we stop: %s", self._settings.address, describe(error))
        finally:
            await client.close()

    async def masters(self) -> tuple[MasterAddress, ...]:
        """The masters: who leads first, then those that pass, then the rest, and those of the configuration."""
        seen = self._views.get(self._settings.coordinator_service) or ()
        found: dict[str, MasterAddress] = {}
        for instance in sorted(seen, key=lambda one: (not one.is_passing, LEADER_TAG not in one.tags, one.id)):
            leads = instance.is_passing and LEADER_TAG in instance.tags
            found.setdefault(instance.id, MasterAddress(instance.id, instance.grpc_address, is_leader=leads))
        for master in self._configured:
            found.setdefault(master.id, master)
        return tuple(found.values())

    async def register(self, registration: Registration) -> None:
        """Makes this daemon visible, or changes how; the background work brings it to Consul."""
        self._wanted = registration
        self._has_changed.set()

    def healthy(self, service: str) -> HealthySet:
        """Instances of our cluster whose checks all pass. The first call for a service begins to watch it."""
        self._watch(service)
        view = self._views.get(service)
        is_trusted = self._client is not None and not self._failing and self._loop_time_s() >= self._trusted_from_s
        if view is None or not is_trusted:
            return HealthySet(known=False)
        return HealthySet(known=True, ids=frozenset(instance.id for instance in view if instance.is_passing))

    @property
    def settle_s(self) -> float:
        """How long after an outage of Consul its word on health does not count yet."""
        # Register again, wait for the first check, and let that answer.
        return ANTI_ENTROPY_PERIOD_S + self._settings.check_interval_s + self._settings.check_timeout_s

    async def _keep_registered(self, client: ConsulClient) -> None:
        """Makes the agent show what is wanted, now, on every change, and every few seconds."""
        backoff = Backoff(self._rng)
        while True:
            self._has_changed.clear()
            delay_s = ANTI_ENTROPY_PERIOD_S
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    await self._reconcile(client)
                self._note_contact(REGISTRATION)
                backoff.reset()
            except Exception as error:
                # Whatever it was: a loop that ended here would leave the daemon invisible for good.
                self._note_failure(REGISTRATION, error)
                delay_s = backoff.next_s()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._has_changed.wait()

    async def _reconcile(self, client: ConsulClient) -> None:
        """Registers what is wanted unless the agent shows just that."""
        wanted = self._wanted
        if wanted is None:
            await client.agent.self()
            return
        service_id = self._service_id(wanted)
        host, _, port = wanted.grpc_address.rpartition(":")
        address, tags, meta = host.strip("[]"), list(wanted.tags), self._meta(wanted)
        shown = (await client.agent.services(filter_expr=f'ID == "{service_id}"')).get(service_id)
        if shown is not None:
            checks = await client.agent.checks(filter_expr=f'ServiceID == "{service_id}"')
            is_same = (
                (shown["Service"], shown["Address"], shown["Port"]) == (wanted.service, address, int(port))
                and (shown["Tags"] or []) == tags
                and (shown["Meta"] or {}) == meta
            )
            if is_same and checks:
                return
        settings = self._settings
        await client.agent.service.register(
            wanted.service,
            service_id=service_id,
            address=address,
            port=int(port),
            tags=tags,
            meta=meta,
            check=Check.http(
                f"http://{wanted.http_address}{HEALTH_PATH}",
                interval=go_duration(settings.check_interval_s),
                timeout=go_duration(settings.check_timeout_s),
                deregister=go_duration(settings.deregister_critical_after_s),
            ),
            replace_existing_checks=True,
        )
        logger.info("registered in Consul as %s of service %s, tags %s", service_id, wanted.service, tags)

    def _watch(self, service: str) -> None:
        """Begins to watch a service, once."""
        self._views.setdefault(service, None)
        if self._client is not None and service not in self._tasks:
            self._tasks[service] = asyncio.create_task(self._follow(self._client, service))

    async def _follow(self, client: ConsulClient, service: str) -> None:
        """Keeps the view of one service as new as Consul's."""
        backoff = Backoff(self._rng)
        wait_s = self._settings.poll_wait_s
        index = 0
        while True:
            try:
                async with asyncio.timeout(wait_s * 17 / 16 + REQUEST_TIMEOUT_S if index else REQUEST_TIMEOUT_S):
                    answered, entries = await client.health.service(
                        service, index=index or None, wait=go_duration(wait_s)
                    )
                self._views[service] = self._instances(entries)
                self._note_contact(service)
                backoff.reset()
                index = int(answered) if int(answered) >= index else 0
                await asyncio.sleep(PACE_S)
            except Exception as error:
                # As above: the view would stand still for good.
                self._note_failure(service, error)
                index = 0
                await asyncio.sleep(backoff.next_s())

    def _instances(self, entries: list[dict[str, Any]]) -> tuple[Instance, ...]:
        """The instances of our cluster in an answer of Consul."""
        instances = []
        for entry in entries:
            service = entry["Service"]
            meta = service["Meta"] or {}
            if meta.get("cluster") == self._cluster_name and meta.get("id") and meta.get("grpc_address"):
                instances.append(
                    Instance(
                        id=meta["id"],
                        grpc_address=meta["grpc_address"],
                        is_passing=all(check["Status"] == "passing" for check in entry["Checks"]),
                        tags=frozenset(service["Tags"] or ()),
                    )
                )
        return tuple(instances)

    def _note_contact(self, task: str) -> None:
        """Consul answered."""
        if self._failing == {task}:
            self._trusted_from_s = self._loop_time_s() + self.settle_s
            logger.info("Consul at %s answers again", self._settings.address)
        self._failing.discard(task)

    def _note_failure(self, task: str, error: Exception) -> None:
        """Consul did not answer, or not with sense."""
        if isinstance(error, REFUSALS):
            # It is there, and means us: no outage, but a person has to know.
            message = f"{task}: {describe(error)}"
            if message not in self._refusals:
                self._refusals.add(message)
                logger.error("Consul at %s refuses: %s", self._settings.address, message)
            return
        if not self._failing:
            logger.warning("Consul at %s cannot be asked (%s): %s", self._settings.address, task, describe(error))
        self._failing.add(task)

    def _service_id(self, registration: Registration) -> str:
        """Unique in the cluster, and, with the name of the cluster, on the agent."""
        return f"{self._cluster_name}-{registration.id}"

    def _meta(self, registration: Registration) -> dict[str, str]:
        """What the daemon says of itself, in the form that Consul takes."""
        pairs = {re.sub(r"[^A-Za-z0-9_-]", "_", name): value for name, value in registration.meta}
        pairs |= {
            "id": registration.id,
            "cluster": self._cluster_name,
            "grpc_address": registration.grpc_address,
            "http_address": registration.http_address,
        }
        return {name: value[:META_VALUE_CHARACTERS_MAX] for name, value in pairs.items()}

    @staticmethod
    def _loop_time_s() -> float:
        return asyncio.get_running_loop().time()


class Backoff:
    """Growing delays with jitter, so that a fleet does not come back in step."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._next_s = BACKOFF_S_MIN

    def reset(self) -> None:
        """Starts over after a success."""
        self._next_s = BACKOFF_S_MIN

    def next_s(self) -> float:
        """The next delay: half of it certain, half random."""
        delay_s, self._next_s = self._next_s, min(self._next_s * 2, BACKOFF_S_MAX)
        return delay_s * (0.5 + 0.5 * self._rng.random())


def go_duration(duration_s: float) -> str:
    """A duration as Consul reads it, for example `1500ms`."""
    return f"{round(duration_s * 1000)}ms"


def describe(error: Exception) -> str:
    """One line for people; timeouts have no text of their own."""
    return " ".join(str(error).split()) or type(error).__name__
