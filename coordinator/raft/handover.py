"""A leader hands its leadership on (Raft thesis 3.10): to a follower that has the whole log, or soon will.

Under load no follower has everything at any moment. So the leader is asked again and again, and appends nothing
between (`Consensus.transfer`): what is on its way arrives within a round trip, and then one has it all.
"""

from __future__ import annotations

import asyncio

from pysyncobj import FAIL_REASON

from coordinator.config import RaftSettings
from coordinator.model.clock import offset_words
from coordinator.model.errors import RefusalReason, Refused, TimedOut
from coordinator.raft.clocks import ADVICE
from coordinator.raft.consensus import Consensus
from coordinator.raft.transport import PeerTransport

POLL_S = 0.002


async def hand_over(
    consensus: Consensus,
    transport: PeerTransport,
    target_id: str | None,
    settings: RaftSettings,
    lost: asyncio.Event,
) -> None:
    """Returns once `lost` tells that the leadership is gone. Raises Refused, TimedOut (nobody took over)."""
    if target_id and (verdict := consensus.elections.duty.refusal_of(target_id)):
        what = f"the wall clock of master {target_id} is {offset_words(verdict.offset_s)} the other masters'; {ADVICE}"
        raise Refused(RefusalReason.PRECONDITION, what)
    loop = asyncio.get_running_loop()
    give_up_at_s = loop.time() + settings.election_timeout_s_max
    while not lost.is_set() and consensus.transfer(target_id) != FAIL_REASON.SUCCESS:
        connected = transport.connected_ids
        is_there = target_id in connected if target_id else bool(connected)
        if not is_there or loop.time() >= give_up_at_s:
            wanted = f"master {target_id}" if target_id else "any other master"
            what = f"{wanted} cannot take over: unknown, not connected, or behind"
            raise Refused(RefusalReason.PRECONDITION, what)
        await asyncio.sleep(POLL_S)
    try:
        async with asyncio.timeout(settings.propose_timeout_s):
            await lost.wait()
    except TimeoutError:
        raise TimedOut("the other master did not take over; look who leads before trying again") from None
