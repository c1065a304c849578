"""Channel arguments of both sides of every gRPC connection here, so that they agree.

The numbers belong together: the server's ``min_ping_interval_without_data_ms`` is lower than the client's
``keepalive_time_ms``, or the server closes the connection with "Too many pings"; what one side may send the other may
receive. The names are those of include/grpc/impl/channel_arg_names.h.
"""

from __future__ import annotations

__all__ = ["CHUNK_BYTES", "KEEPALIVE_SECONDS", "MAX_MESSAGE_BYTES", "channel_options", "server_options"]

Options = list[tuple[str, int]]

CHUNK_BYTES = 1 << 20
"""Largest ``records`` or ``packets`` field of one message, bytes. Larger ones bring no throughput, only delay."""

MAX_MESSAGE_BYTES = 4 << 20
"""Largest message either side takes, bytes: a chunk, and room for the longest list of results beside it."""

KEEPALIVE_SECONDS = 5.0  # gRPC makes less than 1 s one second
"""A peer that answers no ping for this long after this much silence is gone: a cut link shows within twice that."""


def _common() -> Options:
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", int(KEEPALIVE_SECONDS * 1000)),
        ("grpc.keepalive_timeout_ms", int(KEEPALIVE_SECONDS * 1000)),
        # Against a link that swallows everything the time-out above does nothing; this one counts, by default 60 s.
        ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_SECONDS * 1000)),
        # A standing handoff stream without a message, or a channel between two moves, must notice a cut link too.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def server_options() -> Options:
    """Options for ``grpc.aio.server(options=…)``."""
    return [
        *_common(),
        # Otherwise a second agent binds the same port, silently, and the kernel deals the calls out to both.
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", int(KEEPALIVE_SECONDS * 500)),
    ]


def channel_options() -> Options:
    """Options for ``grpc.aio.secure_channel(options=…)`` and ``insecure_channel``."""
    return [
        *_common(),
        # Each channel connects anew, with the certificates it was given, not with those of an earlier channel.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]
