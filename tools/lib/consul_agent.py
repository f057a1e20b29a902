"""A real Consul agent on this machine: for tests, and for `tools/quickstart --consul`.

One server that is its own cluster, on loopback only. Unlike `consul agent -dev` it keeps its data in a directory, so
that it can be stopped or killed and started again with what it knew, as a Consul in production is.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

from tools.lib.consul_binary import install_consul
from tools.lib.ports import free_ports

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.05


class ConsulAgentError(Exception):
    """The agent does not run; one line for people, with where its log is."""


class ConsulAgent:
    """One agent; a context manager that starts it and stops it.

    `directory` takes its configuration, data and log. A port of 0 means a free one, picked once, so that a restarted
    agent answers where it did. `extra` is merged into Consul's configuration. Raises ConsulAgentError or
    ConsulInstallError.
    """

    def __init__(
        self,
        directory: Path,
        *,
        http_port: int = 0,
        server_port: int = 0,
        serf_port: int = 0,
        node_name: str = "consul",
        datacenter: str = "dc1",
        binary: Path | None = None,
        extra: dict[str, object] | None = None,
    ) -> None:
        self.directory = directory
        self.log_path = directory / "consul.log"
        spare = iter(free_ports(3))
        self.http_port = http_port or next(spare)
        self.server_port = server_port or next(spare)
        self.serf_port = serf_port or next(spare)
        self.node_name = node_name
        self.datacenter = datacenter
        self._binary = binary
        self._extra = extra or {}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """host:port of the HTTP interface."""
        return f"127.0.0.1:{self.http_port}"

    @property
    def ui_url(self) -> str:
        """Where a browser finds the UI."""
        return f"http://{self.address}/ui/"

    @property
    def process_id(self) -> int | None:
        """The agent's process; None while it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def __enter__(self) -> ConsulAgent:
        self.start()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Starts it and returns once it leads itself and shows its own node. Starting a running one does nothing."""
        if self.process_id is not None:
            return
        binary = self._binary or install_consul()
        self.directory.mkdir(parents=True, exist_ok=True)
        configuration_path = self.directory / "consul.json"
        configuration_path.write_text(json.dumps(self._configuration(), indent=2))
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                [
                    str(binary),
                    "agent",
                    "-server",
                    "-bootstrap-expect=1",
                    "-ui",
                    "-client=127.0.0.1",
                    "-bind=127.0.0.1",
                    f"-data-dir={self.directory / 'data'}",
                    f"-config-file={configuration_path}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A Ctrl-C for the program that started it reaches it through `stop`, in that program's order.
                start_new_session=os.name != "nt",
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Ends it; its data stay. It does not leave its cluster, so a restart finds what it knew."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()

    def kill(self) -> None:
        """Ends it at once, without letting it tidy up."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def get(self, path: str) -> object:
        """The JSON that the agent answers at a path of its API, for example `/v1/agent/self`."""
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=5.0) as response:
            return json.load(response)

    def _configuration(self) -> dict[str, object]:
        unused = -1
        return {
            "node_name": self.node_name,
            "datacenter": self.datacenter,
            "ports": {
                "http": self.http_port,
                "server": self.server_port,
                "serf_lan": self.serf_port,
                "serf_wan": unused,
                "dns": unused,
                "grpc": unused,
            },
            # The timing that `-dev` has too: on one machine there is no network to be patient with.
            "performance": {"raft_multiplier": 1},
            "leave_on_terminate": False,
            "skip_leave_on_interrupt": True,
            "disable_update_check": True,
            **self._extra,
        }

    def _wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            process = self._process
            if process is None or process.poll() is not None:
                raise ConsulAgentError(f"consul ended while starting: {self._last_words()} (log: {self.log_path})")
            with contextlib.suppress(OSError, ValueError):
                # A leader is not enough: until it has written its own node, registrations do not show in the catalog.
                if self.get("/v1/status/leader") and self.get(f"/v1/health/node/{self.node_name}"):
                    return
            if time.monotonic() > deadline_s:
                raise ConsulAgentError(f"consul has no leader after {START_TIMEOUT_S:.0f} s (log: {self.log_path})")
            time.sleep(POLL_S)

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log_path.read_text(errors="replace").splitlines() if line.strip()]
        faults = [line for line in lines if "==>" in line or "[ERROR]" in line] or lines or ["it said nothing"]
        return faults[-1].removeprefix("==> ")
