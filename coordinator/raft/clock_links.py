"""The links between masters, with clock readings (clocks.py) put on what leaves and taken off what comes in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pysyncobj.node import Node

from coordinator.raft.clocks import Clocks
from coordinator.raft.engine import Links, now_s
from coordinator.raft.frames import Message

STAMPED = frozenset({"append_entries", "next_node_idx", "request_vote", "response_vote", "pre_vote", "pre_vote_answer"})
WITHOUT_LEADER = frozenset({"pre_vote", "pre_vote_answer"})
"""Messages that always tell of all clocks: whoever is about to stand shall know them."""


class ClockedLinks:
    """Links as the consensus uses them; all but what is named here is that of the links below."""

    def __init__(self, links: Links, clocks: Clocks) -> None:
        self._links = links
        self.clocks = clocks
        self.self_id = links.self_id
        self.nodes = links.nodes

    @property
    def on_unsent(self) -> Callable[[Node, Message], None]:
        """Called for what had no link to go over."""
        return self._links.on_unsent

    @on_unsent.setter
    def on_unsent(self, callback: Callable[[Node, Message], None]) -> None:
        self._links.on_unsent = callback

    def send(self, node: Node, message: Message) -> bool:
        """Sends a message, with the wall clock as it is now."""
        if message["type"] in STAMPED:
            tells_all = message["type"] in WITHOUT_LEADER
            message["clock"] = self.clocks.stamp(str(node.id), now_s(), tells_all=tells_all)
        return self._links.send(node, message)

    def setOnMessageReceivedCallback(self, callback: Callable[[Node, Message], object]) -> None:
        """Has messages handed over once their reading is taken."""

        def take(node: Node, message: Message) -> None:
            reading = message.pop("clock", None)
            if reading is not None:
                self.clocks.take(str(node.id), reading, now_s())
            callback(node, message)

        self._links.setOnMessageReceivedCallback(take)

    def setOnNodeConnectedCallback(self, callback: Callable[[Node], object]) -> None:
        """Has it told when a peer comes; a reading over another connection is not to be echoed."""

        def connected(node: Node) -> None:
            self.clocks.connected(str(node.id))
            callback(node)

        self._links.setOnNodeConnectedCallback(connected)

    def is_congested(self, node: Node) -> bool:
        """As the links below say."""
        return self._links.is_congested(node)

    def disk_of(self, id: str) -> str:
        """As the links below say."""
        return self._links.disk_of(id)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._links, name)
