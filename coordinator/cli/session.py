"""What every command of clusterctl works with: where the cluster is, how to print, and how to ask.

The masters come from --address, else from the configuration: --config, else the environment variable CLUSTER_CONFIG,
else ./cluster.toml, else the quickstart of this machine.

What is shown to them is an operator's certificate (or a reader's, or a service's) in --certificate-directory, else in
the directory that the environment variable CLUSTER_CERTIFICATES names, else in the configuration's.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import yaml
from google.protobuf.message import Message

from coordinator.cli.structure import Plain, to_plain
from coordinator.client import ClusterClient
from coordinator.config_file import load
from coordinator.model.errors import ConfigError
from coordinator.security.credentials import Credentials, of_client, of_person

QUICKSTART_ADDRESSES = ("127.0.0.1:7101", "127.0.0.1:7102", "127.0.0.1:7103")
CONFIG_VARIABLE = "CLUSTER_CONFIG"
CERTIFICATES_VARIABLE = "CLUSTER_CERTIFICATES"
CONFIG_NAME = "cluster.toml"
OUTPUTS = ("table", "json", "yaml")


@dataclass(slots=True)
class Session:
    """One run of clusterctl."""

    config_path: Path | None = None
    addresses: tuple[str, ...] = ()
    output: str = "table"
    timeout_s: float = 10.0
    certificate_directory: Path | None = None
    identity_name: str = ""
    _client: ClusterClient | None = field(default=None, repr=False)

    def found_config(self) -> Path | None:
        """The configuration file that names the masters; None when there is none."""
        if self.config_path is not None:
            return self.config_path
        named = os.environ.get(CONFIG_VARIABLE)
        if named:
            return Path(named)
        return next((path for path in (Path(CONFIG_NAME), quickstart_config()) if path.is_file()), None)

    def masters(self) -> tuple[tuple[str, ...], str]:
        """The masters' addresses, and where they come from, for people. Raises ConfigError."""
        if self.addresses:
            return self.addresses, "--address"
        path = self.found_config()
        if path is None:
            return QUICKSTART_ADDRESSES, "the quickstart's ports, because no configuration was found"
        config = load(path)
        if not config.masters:
            raise ConfigError([f"{path}: names no master; add a [[masters]] table, or use --address HOST:PORT"])
        return tuple(master.grpc_address for master in config.masters), str(path)

    def found_certificates(self) -> Path | None:
        """The directory of certificates that was named, not by a configuration."""
        named = os.environ.get(CERTIFICATES_VARIABLE)
        return self.certificate_directory or (Path(named) if named else None)

    def credentials(self) -> Credentials | None:
        """What is shown to the cluster; None for a cluster in plain text. Raises ConfigError."""
        directory, path = self.found_certificates(), self.found_config()
        if path is not None and not (directory is not None and self.addresses):
            return of_client(load(path), self.identity_name, directory)
        if directory is None:
            raise ConfigError(
                [
                    "no certificate to show to the cluster: name its configuration with --config FILE, or a directory "
                    f"with operator-NAME.crt and .key with --certificate-directory or ${CERTIFICATES_VARIABLE}"
                ]
            )
        return of_person(directory, self.identity_name)

    def client(self) -> ClusterClient:
        """The connection to the cluster; made once. Nothing is sent before the first question."""
        if self._client is None:
            addresses = self.masters()[0]
            self._client = ClusterClient(addresses, timeout_s=self.timeout_s, credentials=self.credentials())
        return self._client

    def close(self) -> None:
        """Ends the connection."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def show(self, answer: Message | Plain, text: Callable[[], str]) -> None:
        """Prints an answer: as `text()` makes it for people, or whole for scripts."""
        if self.output == "table":
            said = text()
            if said:
                click.echo(said)
            return
        plain = to_plain(answer) if isinstance(answer, Message) else answer
        if self.output == "json":
            click.echo(json.dumps(plain, indent=2, ensure_ascii=False))
        else:
            click.echo(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100), nl=False)

    def say(self, line: str) -> None:
        """Prints what a command did; only for people, scripts read the exit status."""
        if self.output == "table":
            click.echo(line)


def state_directory() -> Path:
    """Where tools keep what they start on this machine, unless they are told otherwise."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return Path(base) / "coordinator"


def quickstart_config() -> Path:
    """The configuration of a quickstart that was told no directory."""
    return state_directory() / "quickstart" / CONFIG_NAME


def now_unix_ms() -> int:
    """The wall clock of this machine, for ages."""
    return time.time_ns() // 1_000_000


def _choose_output(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        context.ensure_object(Session).output = value


def output_option() -> click.Option:
    """The option -o, which clusterctl takes before a command and behind it."""
    return click.Option(
        ["-o", "--output"],
        type=click.Choice(OUTPUTS),
        expose_value=False,
        callback=_choose_output,
        help="How to print: table for people (the default), json or yaml for scripts.",
    )


class Command(click.Command):
    """A command that also takes -o behind its name, where people write it."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: object
    ) -> click.Context:
        if not any(parameter.name == "output" for parameter in self.params):
            self.params.append(output_option())
        return super().make_context(info_name, args, parent, **extra)


class Group(click.Group):
    """A group whose commands are of the kind above."""

    command_class = Command
    group_class = type


pass_session = click.make_pass_decorator(Session, ensure=True)
