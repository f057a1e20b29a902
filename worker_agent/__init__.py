"""The worker agent. Start at worker_agent/README.md."""
