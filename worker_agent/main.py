"""The command `worker-agent`.

Exit status: 0 stopped cleanly, or the masters ended the session for good; 1 failed, with the reason on one line;
2 wrong usage. The first SIGTERM or SIGINT stops cleanly, the second at once.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import click

from coordinator import __version__
from coordinator.config import ClusterConfig, WorkerSettings
from coordinator.config_file import load, worker_settings
from coordinator.model.errors import CoordinatorError
from coordinator.server import logs
from worker_agent.session_interface import End

COLLECT_AFTER_OBJECTS = 10_000
"""Python's own 700 has the collector run for every few requests."""

_log = logging.getLogger(__name__)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("cluster.toml"),
    show_default=True,
    help="The cluster's configuration; all masters and workers have the same.",
)
@click.option("--id", "worker_id", required=True, help="Name of this worker, for example w1.")
@click.option(
    "--accept-cluster",
    default="",
    metavar="CLUSTER_ID",
    help="Join this cluster although the data is of another: after a restore, which prints the id. Data is kept.",
)
@click.version_option(__version__, prog_name="worker-agent")
def main(config_path: Path, worker_id: str, accept_cluster: str) -> None:
    """Run one worker of a cluster until it is told to stop.

    The worker finds the masters through the configured discovery, keeps a session with the leader, and does
    what it is assigned. A worker that the configuration does not name gets the settings of its [worker] table.
    Its files are in the folder of its id below the data directory.

    SIGTERM and Ctrl-C stop it cleanly: the leader hears a goodbye. A second signal ends it at once.
    """
    # Before gRPC is loaded. Runs are started by exec, never continued in a fork; gRPC's own care for forks would only
    # write a line to standard error for each.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    try:
        config = load(config_path)
        settings = worker_settings(config, worker_id)
        logs.configure(config.logging, worker_id)
        end = _run(config, settings, accept_cluster)
    except (CoordinatorError, OSError) as error:
        _fail(str(error))
    except Exception as error:
        _log.critical("internal error", exc_info=error)
        _fail(f"internal error: {type(error).__name__}: {error}")
    if end.exit_status != 0:
        _fail(end.reason)
    _log.info("worker %s ended: %s", worker_id, end.reason)


def _run(config: ClusterConfig, settings: WorkerSettings, accept_cluster: str) -> End:
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_run_agent(config, settings, accept_cluster))


async def _run_agent(config: ClusterConfig, settings: WorkerSettings, accept_cluster: str) -> End:
    # Imported here: `--version`, `--help` and a faulty configuration should not wait for gRPC.
    from worker_agent.agent import WorkerAgent

    # What the imports have made stays; and a worker's objects mostly go without the collector, which stops everything.
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER_OBJECTS)
    agent = WorkerAgent(config, settings, accepted_cluster_id=accept_cluster)
    signals_seen = 0

    def on_signal(number: int) -> None:
        nonlocal signals_seen
        signals_seen += 1
        name = signal.Signals(number).name
        if signals_seen > 1:
            _log.warning("%s again: stopping at once", name)
            logging.shutdown()
            # Nothing is lost that must last: whatever was shown is on disk, and the lease ends by itself.
            os._exit(1)
        agent.request_stop(f"it was told to stop by {name}")

    _watch_signals(on_signal)
    return await agent.run()


def _watch_signals(on_signal: Callable[[int], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, on_signal, number)
        except NotImplementedError:
            # Windows: the handler runs between two instructions of the main thread, so it only wakes the loop.
            signal.signal(number, lambda got, _frame: loop.call_soon_threadsafe(on_signal, got) and None)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def _fail(reason: str) -> None:
    for line in reason.splitlines() or ["failed without a reason"]:
        click.echo(f"worker-agent: {line}", err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
