"""Runs one Python callable as a launch: `python -m worker_agent.run_python package.module:function`.

The launcher starts this in a process of its own, with the launch in the environment. A callable that takes a positional
argument gets a `LaunchContext`; an async one is run to its end. An exception ends the process with its traceback and
exit status 1; a callable that cannot be found, with one line and exit status 2.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_FORM = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True, slots=True)
class LaunchContext:
    """Which launch this is."""

    job: str
    scheduled_at: str
    """RFC 3339 in UTC."""
    attempt: int
    """From 1."""
    token: str
    """job/scheduled_at_ms/attempt. A sink that takes each scheduled time once makes effects happen exactly once."""
    worker: str


def is_well_formed(target: str) -> bool:
    """True for `package.module:function`."""
    return _FORM.fullmatch(target) is not None


def context_from_environment() -> LaunchContext:
    """What the launcher said of this launch."""
    return LaunchContext(
        job=os.environ.get("LAUNCH_JOB", ""),
        scheduled_at=os.environ.get("LAUNCH_SCHEDULED_AT", ""),
        attempt=int(os.environ.get("LAUNCH_ATTEMPT", "1")),
        token=os.environ.get("LAUNCH_TOKEN", ""),
        worker=os.environ.get("LAUNCH_WORKER", ""),
    )


def load(target: str) -> Callable[..., Any]:
    """The callable. Raises ValueError with one line when there is none, and what the module's import raises."""
    if not is_well_formed(target):
        raise ValueError(f"python {target!r} is not of the form package.module:function")
    module_name, _, path = target.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"python {target!r}: there is no module {error.name!r} on this worker") from None
        raise
    for name in path.split("."):
        if not hasattr(found, name):
            raise ValueError(f"python {target!r}: {module_name!r} has no {path!r}")
        found = getattr(found, name)
    if not callable(found):
        raise ValueError(f"python {target!r} is no callable, but a {type(found).__name__}")
    called: Callable[..., Any] = found
    return called


def takes_context(function: Callable[..., Any]) -> bool:
    """True when the callable can be called with one positional argument."""
    try:
        inspect.signature(function).bind(None)
    except (TypeError, ValueError):
        return False
    return True


def call(function: Callable[..., Any], context: LaunchContext) -> None:
    """Calls it, with the context where it takes one, and runs what it returns when that is awaitable."""
    result = function(context) if takes_context(function) else function()
    if inspect.isawaitable(result):
        asyncio.run(_await(result))


async def _await(awaitable: Any) -> None:
    await awaitable


def main(arguments: list[str]) -> int:
    """Exit status of the process."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m worker_agent.run_python package.module:function\n")
        return 2
    try:
        function = load(arguments[0])
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    try:
        call(function, context_from_environment())
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
