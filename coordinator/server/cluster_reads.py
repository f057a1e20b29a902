"""The half of ClusterService that answers questions.

`GetStatus`, `ListNodes` and `PlanRebalance` need what only the leader has; a follower passes them on, unless the caller
asked for a stale answer. Everything else is answered from this master's own state, after a barrier unless stale.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Mapping

from immutables import Map

from coordinator import __version__
from coordinator.api.v1 import cluster_pb2
from coordinator.control.figures import DamagedCopy
from coordinator.control.replicas import LostCopy
from coordinator.machine.codec import event_to_proto, move_to_proto, node_to_proto, settings_to_proto, shard_to_proto
from coordinator.machine.state import State
from coordinator.model import Node, Shard, key_hash
from coordinator.model.errors import CoordinatorError, InvalidRequest
from coordinator.placement import ShardMap
from coordinator.raft.clocks import Verdict
from coordinator.server.cluster_parts import ClusterParts, not_found, planned_move_to_proto, progress_to_proto
from coordinator.server.context import Call
from coordinator.server.status import Surroundings, fill_status

KEYS_MAX = 10_000
CLOCK_MS_MAX = 1 << 60
"""A clock may say anything; this fits its field."""
STALE = cluster_pb2.CONSISTENCY_STALE


class ClusterReads:
    """Questions about the cluster."""

    def __init__(self, parts: ClusterParts) -> None:
        self._parts = parts
        self._master = parts.master
        self._mapped_shards: Map[int, Shard] | None = None
        self._shard_map = ShardMap(())

    # The cluster and its masters

    async def GetStatus(self, request: cluster_pb2.GetStatusRequest, context: Call) -> cluster_pb2.GetStatusResponse:
        async def here() -> cluster_pb2.GetStatusResponse:
            return await self._status(await self._master.read(request.consistency, context))

        if request.consistency == STALE:
            return await here()
        return await self._parts.forwarder.answer(context, here, "GetStatus", request)

    async def _status(self, state: State) -> cluster_pb2.GetStatusResponse:
        raft = self._master.raft
        control = self._parts.driver.control
        discovery = self._master.config.discovery
        view = self._parts.discovery.healthy(discovery.consul.worker_service)
        refusals: tuple[str, ...] = ()
        connected: frozenset[str] | None = None
        lost_copies: tuple[LostCopy, ...] = ()
        damaged_copies: tuple[DamagedCopy, ...] = ()
        unwritable: dict[str, int] = {}
        if control is not None:
            lost_copies, damaged_copies = control.lost_copies(), control.damaged_copies()
            plan = control.plan()
            refusals = (*control.problems(), *(plan.refusals if plan is not None else ()))
            connected = frozenset(node_id for node_id, live in control.sessions().items() if live.connected)
            said = ((node_id, control.metrics(node_id)) for node_id in state.nodes)
            unwritable = {node_id: metrics.unwritable_shards for node_id, metrics in said if metrics is not None}
        response = cluster_pb2.GetStatusResponse(
            cluster_name=self._master.config.name,
            leader_id=self._master.leader_id,
            term=raft.term,
            settings=settings_to_proto(state.settings),
        )
        around = Surroundings(
            masters=await self._masters(),
            now_ms=self._master.clock.wall_ms(),
            uses_discovery=discovery.backend == "consul",
            healthy=view.ids if view.known else None,
            connected=connected,
            refusals=refusals,
            lost_copies=lost_copies,
            damaged_copies=damaged_copies,
            unwritable=unwritable,
        )
        fill_status(response, state, around)
        return response

    async def ListMasters(
        self, request: cluster_pb2.ListMastersRequest, context: Call
    ) -> cluster_pb2.ListMastersResponse:
        return cluster_pb2.ListMastersResponse(masters=await self._masters())

    async def GetMaster(self, request: cluster_pb2.GetMasterRequest, context: Call) -> cluster_pb2.GetMasterResponse:
        return cluster_pb2.GetMasterResponse(master=self._own_figures())

    async def _masters(self) -> list[cluster_pb2.Master]:
        """The figures of all masters, asked at the same time; one that does not answer says why not."""
        return list(await asyncio.gather(*(self._figures(master.id) for master in self._master.config.masters)))

    async def _figures(self, master_id: str) -> cluster_pb2.Master:
        if master_id == self._master.self_id:
            return self._own_figures()
        settings = self._master.master(master_id)
        try:
            figures = await self._parts.channels.figures(master_id)
            own_id = self._master.raft.cluster_id
            if figures.cluster_id and own_id and figures.cluster_id != own_id:
                figures.problem = f"its disk belongs to cluster id {figures.cluster_id}, not to {own_id}"
            return figures
        except CoordinatorError as error:
            return cluster_pb2.Master(
                id=master_id,
                grpc_address=settings.grpc_address,
                http_address=settings.http_address,
                peer_address=settings.peer_address,
                role="unreachable",
                problem=str(error),
            )

    def _own_figures(self) -> cluster_pb2.Master:
        settings = self._master.me
        status, figures = self._master.raft.status(), self._master.raft.figures()
        clock = figures.clocks.verdict if figures is not None else Verdict()
        return cluster_pb2.Master(
            id=settings.id,
            grpc_address=settings.grpc_address,
            http_address=settings.http_address,
            peer_address=settings.peer_address,
            role=str(status.role),
            leader_id=self._master.leader_id,
            term=status.term,
            commit_index=status.commit_index,
            applied_index=status.applied_index,
            log_entries=status.log_entries,
            log_bytes=status.log_bytes,
            connected_peers=sorted(status.connected_peers),
            version=__version__,
            started_unix_ms=self._master.started_ms,
            cluster_id=self._master.raft.cluster_id,
            clock_offset_ms=max(-CLOCK_MS_MAX, min(CLOCK_MS_MAX, round(clock.offset_s * 1_000))),
            clocks_known=clock.known,
            clock_is_off=clock.is_off,
            refuses_to_lead=clock.refuses,
        )

    # Workers

    async def ListNodes(self, request: cluster_pb2.ListNodesRequest, context: Call) -> cluster_pb2.ListNodesResponse:
        async def here() -> cluster_pb2.ListNodesResponse:
            state = await self._master.read(request.consistency, context)
            if request.node_id and request.node_id not in state.nodes:
                raise not_found(f"worker {request.node_id!r}", "`clusterctl nodes list` names those that exist")
            return cluster_pb2.ListNodesResponse(nodes=self._node_views(state, request.node_id))

        if request.consistency == STALE:
            return await here()
        return await self._parts.forwarder.answer(context, here, "ListNodes", request)

    def _node_views(self, state: State, only: str) -> list[cluster_pb2.NodeView]:
        loads = _loads(state)
        nodes = [state.nodes[only]] if only else sorted(state.nodes.values(), key=lambda node: node.id)
        return [self._node_view(node, loads) for node in nodes]

    def _node_view(self, node: Node, loads: Mapping[str, Counter[str]]) -> cluster_pb2.NodeView:
        load = loads[node.id]
        view = cluster_pb2.NodeView(
            node=node_to_proto(node),
            primaries=load["primaries"],
            replicas=load["replicas"],
            joining=load["joining"],
            jobs=load["jobs"],
            key_share=load["hashes"] / (1 << 64),
            heartbeat_age_ms=-1,
        )
        control = self._parts.driver.control
        live = control.live(node.id, self._master.clock.monotonic()) if control is not None else None
        if live is not None:
            view.connected = live.connected
            if live.heartbeat_age_s is not None:
                view.heartbeat_age_ms = round(live.heartbeat_age_s * 1_000)
                view.metrics.CopyFrom(live.metrics)
        return view

    # Shards and moves

    async def ListShards(self, request: cluster_pb2.ListShardsRequest, context: Call) -> cluster_pb2.ListShardsResponse:
        async def here() -> cluster_pb2.ListShardsResponse:
            return self._shards(await self._master.read(request.consistency, context), request)

        if request.consistency == STALE or not request.with_figures:
            return await here()
        return await self._parts.forwarder.answer(context, here, "ListShards", request)

    def _shards(self, state: State, request: cluster_pb2.ListShardsRequest) -> cluster_pb2.ListShardsResponse:
        shards = state.shards.values()
        if request.shard_ids:
            missing = [shard_id for shard_id in request.shard_ids if shard_id not in state.shards]
            if missing:
                raise not_found(f"shard {missing[0]}", "a split or a merge gives new ids; see `clusterctl shards list`")
            shards = [state.shards[shard_id] for shard_id in dict.fromkeys(request.shard_ids)]
        if request.node_id:
            shards = [shard for shard in shards if request.node_id in shard.replicas]
        in_order = sorted(shards, key=lambda shard: shard.lo)
        response = cluster_pb2.ListShardsResponse(
            shards=[shard_to_proto(shard) for shard in in_order], generation=state.index
        )
        control = self._parts.driver.control
        if request.with_figures and control is not None:
            found = (control.figure(shard) for shard in in_order)
            response.figures.extend(figure for figure in found if figure is not None)
        return response

    async def LocateKeys(self, request: cluster_pb2.LocateKeysRequest, context: Call) -> cluster_pb2.LocateKeysResponse:
        if len(request.keys) > KEYS_MAX:
            raise InvalidRequest(f"{len(request.keys)} keys in one request; ask for at most {KEYS_MAX}")
        state = await self._master.read(request.consistency, context)
        shards = self._map_of(state).locate_many(request.keys)
        response = cluster_pb2.LocateKeysResponse(generation=state.index)
        addresses = {node.id: node.grpc_address for node in state.nodes.values()}
        for key, shard in zip(request.keys, shards, strict=True):
            response.locations.add(
                key=key,
                key_hash=key_hash(key),
                shard_id=shard.id,
                primary=shard.primary,
                primary_address=addresses.get(shard.primary, ""),
                in_sync=shard.in_sync,
                epoch=shard.epoch,
            )
        return response

    def _map_of(self, state: State) -> ShardMap:
        """The map of a state; made again only when a shard changed."""
        # The maps of a state are immutable, so the same object means the same shards.
        if self._mapped_shards is not state.shards:
            self._shard_map = ShardMap(state.shards.values())
            self._mapped_shards = state.shards
        return self._shard_map

    async def PlanRebalance(
        self, request: cluster_pb2.PlanRebalanceRequest, context: Call
    ) -> cluster_pb2.PlanRebalanceResponse:
        async def here() -> cluster_pb2.PlanRebalanceResponse:
            return self._plan(await self._master.read(request.consistency, context))

        if request.consistency == STALE:
            return await here()
        return await self._parts.forwarder.answer(context, here, "PlanRebalance", request)

    def _plan(self, state: State) -> cluster_pb2.PlanRebalanceResponse:
        plan = self._parts.planner.plan(state, self._master.clock.wall_ms())
        response = cluster_pb2.PlanRebalanceResponse(
            moves=[planned_move_to_proto(move) for move in plan.moves],
            refusals=plan.refusals,
            peak_to_average_before=plan.peak_to_average_before,
            peak_to_average_after=plan.peak_to_average_after,
            key_share_moved=plan.key_share_moved,
            paused=state.settings.rebalance_paused,
        )
        for load in plan.loads:
            response.loads.add(
                node_id=load.node_id,
                fair_share=load.fair_share,
                replicas_before=load.replicas_before,
                replicas_after=load.replicas_after,
                primaries_before=load.primaries_before,
                primaries_after=load.primaries_after,
            )
        return response

    async def ListMoves(self, request: cluster_pb2.ListMovesRequest, context: Call) -> cluster_pb2.ListMovesResponse:
        async def here() -> cluster_pb2.ListMovesResponse:
            return self._moves(await self._master.read(request.consistency, context), request)

        if request.consistency == STALE or not request.with_progress:
            return await here()
        return await self._parts.forwarder.answer(context, here, "ListMoves", request)

    def _moves(self, state: State, request: cluster_pb2.ListMovesRequest) -> cluster_pb2.ListMovesResponse:
        if request.move_id:
            move = state.moves.get(request.move_id) or state.ended_moves.get(request.move_id)
            if move is None:
                raise not_found(f"move {request.move_id}", "only the latest that ended are kept")
            moves = [move]
        else:
            moves = [*state.moves.values(), *(state.ended_moves.values() if request.include_ended else ())]
            moves.sort(key=lambda move: move.id)
        response = cluster_pb2.ListMovesResponse(moves=[move_to_proto(move) for move in moves])
        control = self._parts.driver.control
        if request.with_progress and control is not None:
            found = (control.progress(move) for move in moves)
            response.progress.extend(progress_to_proto(progress) for progress in found if progress is not None)
        return response

    # The story

    async def StreamEvents(
        self, request: cluster_pb2.StreamEventsRequest, context: Call
    ) -> AsyncIterator[cluster_pb2.StreamEventsResponse]:
        await self._master.read(cluster_pb2.CONSISTENCY_LINEARIZABLE, context)
        batches = self._parts.story.read(request.from_sequence, request.latest, request.follow, request.kind)
        async for records in batches:
            yield cluster_pb2.StreamEventsResponse(events=[event_to_proto(record) for record in records])


def _loads(state: State) -> Mapping[str, Counter[str]]:
    """What each worker holds: primaries, replicas, joining, jobs, and the hashes that it is primary of."""
    loads: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for shard in state.shards.values():
        for node_id in shard.in_sync:
            loads[node_id]["replicas"] += 1
        for node_id in shard.joining:
            loads[node_id]["joining"] += 1
        if shard.primary:
            loads[shard.primary]["primaries"] += 1
            loads[shard.primary]["hashes"] += shard.hi - shard.lo
    for job in state.jobs.values():
        loads[job.owner]["jobs"] += 1
    return loads
