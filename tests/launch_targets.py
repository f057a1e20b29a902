"""Callables that tests run as launches."""

from __future__ import annotations

import asyncio
import os
import sys

from worker_agent.run_python import LaunchContext


def with_context(context: LaunchContext) -> None:
    """Shows what a launch is told."""
    sys.stdout.write(f"{context.job} {context.scheduled_at} {context.attempt} {context.token} {context.worker}\n")


def without_context() -> None:
    """Takes nothing."""
    sys.stdout.write(f"plain {os.environ['LAUNCH_TOKEN']}\n")


async def asynchronous(context: LaunchContext) -> None:
    """Runs on an event loop of its own."""
    await asyncio.sleep(0)
    sys.stdout.write(f"async {context.job}\n")


def failing() -> None:
    """Raises."""
    raise RuntimeError("the loop broke")


NOT_CALLABLE = 1


def tell_sink() -> None:
    """Begins and has its effect, as tests/cron_chaos.py has it; the file is the one that its environment names."""
    with open(os.environ["SINK"], "ab", buffering=0) as sink:
        for verb in ("begin", "effect"):
            sink.write(f"{verb} {os.environ['LAUNCH_TOKEN']} {os.environ['LAUNCH_WORKER']}\n".encode())
