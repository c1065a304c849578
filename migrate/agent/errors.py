"""The error tree over gRPC: what one host raises, the other raises too, with the same exit code.

An error travels as a status: code (table below), message (``what``), and details: google.rpc.ErrorInfo with domain
"tcpmig", the type as ``reason`` and its attributes as ``metadata``, and google.rpc.Help with the hint. The failure of
one connection among many travels as a ``Problem`` message with the same content. A type that the reader does not know,
and a status that no agent of ours made, becomes RemoteError.
"""

from __future__ import annotations

import re

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from migrate import errors
from migrate.agent.v1 import types_pb2

__all__ = ["DOMAIN", "code_of", "from_problem", "from_rpc_error", "status_details", "to_problem"]

DOMAIN = "tcpmig"

_DETAILS_KEY = "grpc-status-details-bin"
_MAX_TEXT = 1024  # characters; all metadata of a status together may have 8 KiB (grpc.max_metadata_size)

_CODES: dict[type[errors.Error], grpc.StatusCode] = {
    errors.Error: grpc.StatusCode.UNKNOWN,
    errors.UsageError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.RecordError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.RecordTruncated: grpc.StatusCode.INVALID_ARGUMENT,
    errors.RecordVersionError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.Refused: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Gone: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Conflict: grpc.StatusCode.ALREADY_EXISTS,
    # The agent's host lacks something. PERMISSION_DENIED would say that the caller does.
    errors.HostError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.PrivilegeError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.KernelError: grpc.StatusCode.INTERNAL,
    errors.RemoteError: grpc.StatusCode.UNAVAILABLE,
}

_ATTRIBUTES: dict[type[errors.Error], dict[str, type[int] | type[str]]] = {
    errors.RecordError: {"offset": int, "field": str},
    errors.KernelError: {"operation": str, "errno": int},
}
_OPTIONAL = {"field"}


def _reason(kind: type[errors.Error]) -> str:
    """RecordVersionError is RECORD_VERSION."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__.removesuffix("Error") or "Error").upper()


_KINDS = {_reason(kind): kind for kind in _CODES}


def _known(kind: type[errors.Error]) -> type[errors.Error]:
    """The nearest type that the other side knows."""
    return next(base for base in kind.__mro__ if base in _CODES)


def _attributes(kind: type[errors.Error]) -> dict[str, type[int] | type[str]]:
    return next((names for base, names in _ATTRIBUTES.items() if issubclass(kind, base)), {})


def code_of(error: errors.Error) -> grpc.StatusCode:
    """The gRPC status code that stands for this error."""
    return _CODES[_known(type(error))]


def to_problem(error: errors.Error) -> types_pb2.Problem:
    """The error as a message, for a list of results."""
    kind = _known(type(error))
    values = {name: getattr(error, name) for name in _attributes(kind)}
    return types_pb2.Problem(
        reason=_reason(kind),
        what=error.what[:_MAX_TEXT],
        hint=(error.hint or "")[:_MAX_TEXT],
        metadata={name: str(value) for name, value in values.items() if value is not None},
    )


def from_problem(problem: types_pb2.Problem) -> errors.Error:
    """The error that ``to_problem`` was given, on the other host; never raises, whatever the message holds."""
    return _build(problem.reason, problem.what, problem.hint or None, dict(problem.metadata))


# ``metadata`` is a real dictionary: a map of protobuf's answers for keys that it does not have.
def _build(reason: str, what: str, hint: str | None, metadata: dict[str, str]) -> errors.Error:
    kind = _KINDS.get(reason, errors.RemoteError)
    # The constructors of some types compose `what` from their arguments; here it is composed already.
    error = kind.__new__(kind)
    errors.Error.__init__(error, what, hint=hint)
    for name, convert in _attributes(kind).items():
        try:
            setattr(error, name, convert(metadata[name]))
        except KeyError:
            if name not in _OPTIONAL:
                return errors.RemoteError(what, hint=hint)
            setattr(error, name, None)
        except ValueError:
            return errors.RemoteError(what, hint=hint)
    return error


def status_details(code: grpc.StatusCode, problem: types_pb2.Problem) -> tuple[tuple[str, bytes], ...]:
    """Trailing metadata with google.rpc.Status, for ``context.abort(code, problem.what, …)``."""
    status = status_pb2.Status(code=code.value[0], message=problem.what)
    info = error_details_pb2.ErrorInfo(reason=problem.reason, domain=DOMAIN, metadata=problem.metadata)
    status.details.add().Pack(info)
    if problem.hint:
        link = error_details_pb2.Help.Link(description=problem.hint)
        status.details.add().Pack(error_details_pb2.Help(links=[link]))
    return ((_DETAILS_KEY, status.SerializeToString()),)


def from_rpc_error(error: grpc.aio.AioRpcError, agent: str) -> errors.Error:
    """The error behind a failed call to ``agent`` (its address, for the sentence)."""
    info = _error_info(error)
    if info is not None:
        return info
    said = error.details() or "it gave no reason"
    what, hint = _ELSE.get(error.code(), ("failed: {said} [{code}]", None))
    if _HANDSHAKE.search(said):
        hint = "are both certificates valid and of one authority, and does the agent's bear the name it was called by?"
    return errors.RemoteError(f"agent {agent} {what.format(said=said[:_MAX_TEXT], code=error.code().name)}", hint=hint)


# What gRPC says of a failed TLS handshake. An agent that does not accept the caller's certificate just hangs up.
_HANDSHAKE = re.compile(r"failed to connect.*(socket closed|handshake|certificate|ssl|verification)", re.I | re.S)

_ELSE: dict[grpc.StatusCode, tuple[str, str | None]] = {
    grpc.StatusCode.UNAVAILABLE: ("cannot be reached: {said}", "is it running, and does it listen there?"),
    grpc.StatusCode.DEADLINE_EXCEEDED: ("did not answer in time", None),
    grpc.StatusCode.UNIMPLEMENTED: ("does not know this call: {said}", "is it an older version?"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: ("refused for want of room: {said}", None),
    grpc.StatusCode.CANCELLED: ("stopped the call: {said}", None),
}


def _error_info(error: grpc.aio.AioRpcError) -> errors.Error | None:
    """The error in the details of the status; None if no agent of ours wrote it."""
    for key, value in error.trailing_metadata() or ():
        if key != _DETAILS_KEY or not isinstance(value, bytes):
            continue
        try:
            status = status_pb2.Status.FromString(value)
        except DecodeError:
            return None
        info, help_ = error_details_pb2.ErrorInfo(), error_details_pb2.Help()
        for detail in status.details:
            # Unpack tells by its result whether the detail is of that type.
            detail.Unpack(info) or detail.Unpack(help_)
        if info.domain == DOMAIN:
            hint = help_.links[0].description if help_.links else None
            return _build(info.reason, status.message, hint, dict(info.metadata))
    return None
