"""Who may call what: the certificate's name decides.

A certificate says who its bearer is in a URI among its alternative names, ``tcpmig://ROLE/NAME``; it may have several.
The table ``ALLOWED`` says what each role may call. Two kinds of caller have no certificate:

- callers on the agent's unix socket are operators on this host: the socket's file mode (0600, in a directory that is
  root's) decides who can connect, since gRPC does not show a handler the peer's SO_PEERCRED;
- with ``--insecure`` everybody who reaches the agent may do everything. The agent listens so only on loopback or a unix
  socket unless it is forced.
"""

from __future__ import annotations

import contextlib
import enum
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import grpc
import grpc.aio

from migrate import errors
from migrate.agent.errors import status_details
from migrate.agent.intercept import wrapped
from migrate.agent.logging import get_logger
from migrate.agent.v1 import types_pb2

__all__ = ["ALLOWED", "EVERYBODY", "Authorizer", "Caller", "Role", "caller_of", "require_local", "uri_of"]


_log = get_logger(__name__)


class Role(enum.StrEnum):
    """What a certificate's bearer is."""

    AGENT = "agent"
    OPERATOR = "operator"
    VIEWER = "viewer"


ALLOWED: dict[Role, frozenset[str]] = {
    Role.AGENT: frozenset({"/tcpmig.v1.Handoff/*"}),
    Role.OPERATOR: frozenset({"/tcpmig.v1.Migration/*"}),
    Role.VIEWER: frozenset({"/tcpmig.v1.Migration/ListConnections", "/tcpmig.v1.Migration/Watch"}),
}
"""What each role may call: full method names, or a whole service."""

EVERYBODY = frozenset(
    {
        "/grpc.health.v1.Health/*",
        "/grpc.reflection.v1.ServerReflection/*",
        "/grpc.reflection.v1alpha.ServerReflection/*",
    }
)
"""What everybody may call whose certificate the authority signed."""

_URI = re.compile(r"tcpmig://(agent|operator|viewer)/([A-Za-z0-9._:-]{1,255})")


def uri_of(role: Role, name: str) -> str:
    """The URI that names a bearer in its certificate. Raises UsageError for a name that cannot stand in one."""
    uri = f"tcpmig://{role}/{name}"
    if not _URI.fullmatch(uri):
        raise errors.UsageError(f"{name!r} is no name for a certificate", hint="letters, digits and ._:- only")
    return uri


class Caller(NamedTuple):
    """Who calls: the roles it has, the name to call it by, and whether it stands on this host's unix socket."""

    roles: frozenset[Role]
    name: str
    local: bool

    def may(self, method: str) -> bool:
        """Whether this caller may call ``method``, "/package.Service/Method"."""
        service = method.rpartition("/")[0] + "/*"
        return not {method, service}.isdisjoint(EVERYBODY.union(*(ALLOWED[role] for role in self.roles)))


_EVERY_ROLE = frozenset(Role)


def caller_of(context: grpc.aio.ServicerContext[Any, Any], *, insecure: bool = False) -> Caller:
    """Who calls. ``insecure``: a caller without a certificate has every role."""
    peer = context.peer()
    authentication = context.auth_context()
    if b"ssl" not in authentication.get("transport_security_type", ()):
        local = peer.startswith("unix:")
        roles = _EVERY_ROLE if insecure else frozenset({Role.OPERATOR} if local else ())
        return Caller(roles, "unix socket" if local else peer, local)
    uris = [value.decode(errors="replace") for value in authentication.get("peer_uri", ())]
    named = [match for match in map(_URI.fullmatch, uris) if match]
    common_name = b" ".join(authentication.get("x509_common_name", ())).decode(errors="replace")
    name = " ".join(uris) or f"CN={common_name}"
    return Caller(frozenset(Role(match[1]) for match in named), name, False)


class Authorizer(grpc.aio.ServerInterceptor):
    """Refuses what the caller's roles do not allow with PERMISSION_DENIED, before the handler sees the call."""

    def __init__(self, *, insecure: bool = False, refused: Callable[[], None] | None = None) -> None:
        """``insecure`` as in caller_of; ``refused`` is called for each refusal, to count them."""
        self._insecure = insecure
        self._refused = refused

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of every call."""
        method = handler_call_details.method

        @contextlib.asynccontextmanager
        async def authorized(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
            caller = caller_of(context, insecure=self._insecure)
            if not caller.may(method):
                needed = [role for role in Role if Caller(frozenset({role}), "", False).may(method)]
                wants = " or ".join(f"tcpmig://{role}/NAME" for role in needed) or "a role that does not exist yet"
                _log.warning("call refused", caller=caller.name, peer=context.peer(), method=method)
                if self._refused:
                    self._refused()
                await _deny(context, f"{caller.name} may not call {method}", f"a certificate that names {wants} may")
            yield

        return wrapped(await continuation(handler_call_details), authorized)


async def require_local(context: grpc.aio.ServicerContext[Any, Any], what: str) -> None:
    """Refuse ``what``, a command or path that the agent would run or open, to a caller that is not on this host."""
    caller = caller_of(context)
    if not caller.local:
        await _deny(context, f"{caller.name} may not name {what}", "only a caller on the agent's unix socket may")


async def _deny(context: grpc.aio.ServicerContext[Any, Any], what: str, hint: str) -> None:
    problem = types_pb2.Problem(reason="PERMISSION", what=what, hint=hint)
    code = grpc.StatusCode.PERMISSION_DENIED
    await context.abort(code, what, status_details(code, problem))
