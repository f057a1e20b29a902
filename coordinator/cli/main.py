"""clusterctl: the cluster at the command line. Here are the options, the command tree, and the exit statuses.

    0  done
    1  refused, or failed
    2  wrong usage
    3  the cluster cannot be reached
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

import coordinator
import coordinator.cli.quiet
from coordinator.cli import (
    backup,
    certs,
    completion,
    config,
    cron,
    events,
    masters,
    moves,
    nodes,
    rebalance,
    shards,
    status,
)
from coordinator.cli.session import Group, Session, output_option
from coordinator.model.errors import ConfigError, CoordinatorError, IndefiniteError, NoLeader, NotLeader, Unreachable
from coordinator.security.diagnosis import tls_problem

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    params=[output_option()],
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="Configuration that names the masters; else $CLUSTER_CONFIG, ./cluster.toml, or this machine's quickstart.",
)
@click.option("--address", multiple=True, metavar="HOST:PORT", help="A master to ask; may be repeated.")
@click.option(
    "--certificate-directory",
    type=click.Path(path_type=Path),
    help="Where your certificate is, operator-NAME.crt with its .key, and authority.crt; else $CLUSTER_CERTIFICATES, "
    "else the configuration's.",
)
@click.option("--as", "identity_name", metavar="NAME", default="", help="Whose certificate, where there are several.")
@click.option(
    "--timeout", type=click.FloatRange(min=0.1), default=10.0, show_default=True, help="Seconds to wait for an answer."
)
@click.version_option(coordinator.__version__, prog_name="clusterctl")
@click.pass_context
def cli(
    context: click.Context,
    config: Path | None,
    address: tuple[str, ...],
    certificate_directory: Path | None,
    identity_name: str,
    timeout: float,
) -> None:
    """See and change a cluster: its masters, workers, shards, moves and cron jobs.

    Any master will do: the one that is asked finds the leader.

    \b
    Begin with:
      clusterctl status                     is all well, and what is wrong
      clusterctl nodes list                 the workers and what they carry
      clusterctl shards locate alice bob    where users live
      clusterctl cron list                  jobs, owners, next launches
      clusterctl events --follow            what happens, as it happens

    Exit status: 0 done, 1 refused or failed, 2 wrong usage, 3 the cluster cannot be reached.
    """
    session = context.ensure_object(Session)
    session.config_path, session.addresses, session.timeout_s = config, address, timeout
    session.certificate_directory, session.identity_name = certificate_directory, identity_name
    context.call_on_close(session.close)


for command in (
    status.status,
    nodes.nodes,
    shards.shards,
    rebalance.rebalance,
    moves.moves,
    cron.cron,
    events.events,
    masters.masters,
    backup.backup,
    backup.restore,
    config.config,
    certs.certs,
    completion.completion,
):
    cli.add_command(command)


def explain(error: CoordinatorError, session: Session) -> tuple[str, int]:
    """What to print for an error, and the exit status."""
    match error:
        case ConfigError():
            return "\n".join(error.problems), EXIT_FAILED
        case Unreachable():
            addresses, source = session.masters()
            if problem := next(filter(None, (tls_problem(one, session.credentials()) for one in addresses)), ""):
                return f"no master at {', '.join(addresses)} (from {source}) can be talked to: {problem}", EXIT_FAILED
            return (
                f"cannot reach the cluster at {', '.join(addresses)} (from {source}); start the masters, "
                "or say where they are with --address HOST:PORT or --config FILE",
                EXIT_UNREACHABLE,
            )
        case NoLeader() | NotLeader():
            return f"{error}; a majority of the masters must run: see `clusterctl masters list`", EXIT_UNREACHABLE
        case IndefiniteError():
            return f"{error}; it may or may not have been done: look before you repeat it", EXIT_FAILED
        case _:
            return str(error), EXIT_FAILED


def run(arguments: list[str] | None = None) -> int:
    """Runs one command; the exit status. A traceback is shown only for a fault of this program itself."""
    session = Session()
    try:
        result = cli.main(args=arguments, prog_name="clusterctl", standalone_mode=False, obj=session)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except CoordinatorError as error:
        text, exit_status = explain(error, session)
        for line in text.splitlines():
            # Never wrapped: one fault is one line, for grep and for logs; a terminal folds it by itself.
            click.echo(f"error: {line}", err=True)
        return exit_status
    except BrokenPipeError:
        # The reader has seen enough (`clusterctl events | head`); what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def main() -> None:
    """Entry point of `clusterctl`."""
    sys.exit(run())


if __name__ == "__main__":
    main()
