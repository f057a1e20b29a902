"""Shell completion: the script for a shell, and the names of things, asked from the cluster where it answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem, get_completion_class

from coordinator.cli.session import Session
from coordinator.client import ClusterClient
from coordinator.model.errors import CoordinatorError

ANSWER_WITHIN_S = 0.7
"""Nobody waits longer for a key press."""


if TYPE_CHECKING:
    TextType = click.ParamType[str]
    IntegerType = click.ParamType[int]
else:
    # Not generic in every version of click that will do.
    TextType = IntegerType = click.ParamType


class ClusterName(TextType):
    """A name or number of something in the cluster, completed by asking."""

    def __init__(self, name: str, ask: Callable[[ClusterClient], Iterable[str]]) -> None:
        self.name = name
        self._ask = ask

    def shell_complete(
        self, context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        root = context.find_root()
        session = Session(
            root.params.get("config"),
            tuple(root.params.get("address") or ()),
            timeout_s=ANSWER_WITHIN_S,
            certificate_directory=root.params.get("certificate_directory"),
            identity_name=root.params.get("identity_name") or "",
        )
        # Whatever is wrong, a key press must not print it into the line that is being typed.
        with contextlib.suppress(CoordinatorError, OSError), contextlib.closing(session):
            return [CompletionItem(name) for name in self._ask(session.client()) if name.startswith(incomplete)]
        return []


NODE = ClusterName("node", lambda client: [view.node.id for view in client.list_nodes().nodes])
JOB = ClusterName("job", lambda client: [view.job.spec.id for view in client.list_jobs().jobs])


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell.

    It completes commands, options, and the names of workers and jobs, which it asks from the cluster.

    \b
    Examples:
      eval "$(clusterctl completion bash)"                       in ~/.bashrc
      eval "$(clusterctl completion zsh)"                        in ~/.zshrc
      clusterctl completion fish > ~/.config/fish/completions/clusterctl.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None, f"click knows no completion for {shell}"
    command = click.get_current_context().find_root().command
    click.echo(kind(command, {}, "clusterctl", "_CLUSTERCTL_COMPLETE").source())
