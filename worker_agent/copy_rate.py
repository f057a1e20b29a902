"""How fast this worker sends copies of its shards."""

from __future__ import annotations


class CopyRate:
    """A token bucket for what this worker sends of copies; one second's worth may go at once."""

    def __init__(self) -> None:
        self._bytes_per_s = 0
        self._free_at = 0.0

    def set(self, bytes_per_s: int) -> None:
        """0 for no limit."""
        self._bytes_per_s = bytes_per_s

    def delay_s(self, now_s: float, size: int) -> float:
        """Books `size` bytes; how long to wait before they may leave."""
        if not self._bytes_per_s:
            return 0.0
        self._free_at = max(self._free_at, now_s - 1.0) + size / self._bytes_per_s
        return max(0.0, self._free_at - now_s)
