"""Benchmarks: each module NAME.py has `run(emit)`; see `result.py` for what it emits."""
