"""A cluster coordinator for fleets of long-running, stateful agents. Start at coordinator/README.md."""

__version__ = "0.1.0"
