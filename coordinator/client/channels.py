"""The options of every gRPC channel and server of this project, so that both ends agree."""

from __future__ import annotations

MESSAGE_BYTES_MAX = 16 << 20
"""Largest message in either direction: 65,536 shards at about 100 bytes are 7 MB."""
KEEPALIVE_MS = 10_000
"""How often an idle connection is probed, so that a peer that lost its power is noticed."""
KEEPALIVE_TIMEOUT_MS = 5_000

Options = list[tuple[str, int]]


def channel_options() -> Options:
    """For channels. A master that restarts is found again within a second, not after gRPC's two minutes."""
    return [
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # Masters and workers are named by address: an HTTP proxy of the environment has no business between them.
        ("grpc.enable_http_proxy", 0),
    ]


def server_options() -> Options:
    """For servers. A port that is in use is an error, never shared."""
    return [
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),
        # Clients probe as often as servers do; gRPC's default of five minutes would end their connections.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
