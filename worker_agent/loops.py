"""The reference loop that cluster.toml gives its fifteen jobs; replace it by what the agents really do."""

from __future__ import annotations

import sys

from worker_agent.run_python import LaunchContext


def run(context: LaunchContext) -> None:
    """Says which launch this is, in one line."""
    sys.stdout.write(
        f"{context.job} of {context.scheduled_at} on {context.worker}, attempt {context.attempt} ({context.token})\n"
    )
