"""The command `coordinator`: runs one master until a signal ends it.

Exit status: 0 after a clean stop, 1 when it cannot start or go on (one line on standard error), 2 for wrong usage.
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
from typing import TYPE_CHECKING

import click

from coordinator import __version__
from coordinator.config import ClusterConfig
from coordinator.config_file import load, master_settings
from coordinator.model.errors import CoordinatorError
from coordinator.server import logs

if TYPE_CHECKING:
    from coordinator.server.daemon import Master

COLLECT_AFTER_OBJECTS = 50_000
"""So many more objects than at the last collection have the collector look at those; every third time at the survivors
of the times before too, which takes some 40 ms."""
COLLECT_ALL_S = 3_600.0
"""How often everything is looked at, by a master that does not lead."""
NEVER = 1 << 30

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
@click.option("--id", "master_id", required=True, help="Which of the configuration's masters this is, for example m1.")
@click.version_option(__version__, prog_name="coordinator")
def main(config_path: Path, master_id: str) -> None:
    """Run one master of a cluster: one of three (or five) that agree on everything by Raft.

    SIGTERM and Ctrl-C stop it cleanly: a leader first hands its leadership on. A second signal ends it at once.
    """
    try:
        config = load(config_path)
        master_settings(config, master_id)
        logs.configure(config.logging, master_id)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_run(config, master_id))
            _end_process()
    except (CoordinatorError, OSError) as error:
        _fail(str(error))
    except Exception as error:
        _log.critical("internal error", exc_info=error)
        _fail(f"internal error: {type(error).__name__}: {error}")


async def _run(config: ClusterConfig, master_id: str) -> None:
    """Starts the master and waits for a signal, or for a reason why it cannot go on."""
    # Imported here: `--version`, `--help` and a faulty configuration should not wait for gRPC.
    from coordinator.server.daemon import Master

    stop_asked = asyncio.Event()
    _watch_signals(stop_asked)
    master = Master(config, master_id)
    await master.start()
    _shorten_collections()
    collecting = asyncio.create_task(_collect_all(master))
    failed = asyncio.create_task(master.wait_failed())
    asked = asyncio.create_task(stop_asked.wait())
    try:
        await asyncio.wait({failed, asked}, return_when=asyncio.FIRST_COMPLETED)
        _log.info("stopping")
    finally:
        asked.cancel()
        collecting.cancel()
        await master.stop()
    if failed.done():
        await failed
    failed.cancel()


def _shorten_collections() -> None:
    """Makes garbage collections, which stop everything, short and rare.

    What was made so far (modules, classes, generated code, the state on disk) is left out of them. They wait for more
    than the 700 new objects that are Python's own choice: the state has no cycles, so what a command replaces goes
    without them. And a collection of everything, 0.25 s with 65,536 remembered results (as long as an election timeout,
    once a minute under load), comes to no leader: `_collect_all`.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER_OBJECTS, 2, NEVER)


async def _collect_all(master: Master) -> None:
    """Looks for what the short collections left, now and then, while nobody waits for this master."""
    while True:
        await asyncio.sleep(COLLECT_ALL_S)
        if not master.leads:
            gc.collect()


def _end_process() -> None:
    """Ends the process after a clean stop: everything is on disk and closed.

    Python would first take the whole state apart, object by object: 1.2 s with 65,536 remembered results, for which
    whoever restarts this master would wait.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _watch_signals(stop_asked: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stop_asked.is_set():
            _log.warning("%s again: stopping at once", signal.Signals(number).name)
            logging.shutdown()
            # Nothing is lost: whatever was acknowledged is on disk already.
            os._exit(1)
        stop_asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, on_signal, number)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda got, _frame: loop.call_soon_threadsafe(on_signal, got) and None)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def _fail(reason: str) -> None:
    for line in reason.splitlines() or ["failed without a reason"]:
        click.echo(f"coordinator: {line}", err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
