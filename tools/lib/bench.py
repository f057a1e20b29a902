"""Lets `tools/lib/run bench` start the benchmarks in the environment of development."""

from __future__ import annotations

from tools.bench_lib.main import main

__all__ = ["main"]
