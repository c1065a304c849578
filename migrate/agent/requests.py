"""What requests of the public API say, in this program's own words."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from migrate.agent.v1 import types_pb2
from migrate.errors import UsageError
from migrate.fourtuple import FourTuple, parse_endpoint
from migrate.selection import Selector
from migrate.tcpstate import TcpState

__all__ = ["DAY", "seconds_of", "selector_of"]

DAY = 86400.0  # seconds


def selector_of(selector: types_pb2.Selector) -> Selector:
    """The selector of a request. Raises UsageError."""
    if selector.HasField("fd") and not selector.pid:
        raise UsageError("fd needs pid: a descriptor belongs to a process")
    try:
        states = frozenset(TcpState(state) for state in selector.states) or None
    except ValueError:
        raise UsageError("a state of the selector is none") from None
    return Selector(
        FourTuple.parse(selector.connection) if selector.connection else None,
        parse_endpoint(selector.local) if selector.local else None,
        parse_endpoint(selector.remote) if selector.remote else None,
        states,
        selector.pid or None,
        selector.fd if selector.HasField("fd") else None,
    )


def seconds_of(request: Message, field: str, *, most: float) -> float | None:
    """A Duration of a request, or None if it is not set. Raises UsageError if it is not between 0 and ``most``."""
    if not request.HasField(field):
        return None
    duration: Duration = getattr(request, field)
    seconds = duration.seconds + duration.nanos / 1e9  # ToTimedelta() raises for what is no duration
    if not 0 <= seconds <= most:
        raise UsageError(f"{field} is not between 0 and {most:g} seconds")
    return seconds
