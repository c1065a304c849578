"""One way to put something around every kind of gRPC handler, and the errors that leave a handler."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from migrate import errors
from migrate.agent.errors import code_of, status_details, to_problem
from migrate.agent.logging import get_logger

__all__ = ["Around", "ErrorReporter", "wrapped"]

Context = grpc.aio.ServicerContext[Any, Any]
Around = Callable[[Context], contextlib.AbstractAsyncContextManager[None]]

_log = get_logger(__name__)


def wrapped(handler: grpc.RpcMethodHandler[Any, Any] | None, around: Around) -> grpc.RpcMethodHandler[Any, Any] | None:
    """The same handler, run inside ``around(context)``. None, the handler of an unknown method, stays None."""
    if handler is None:
        return None
    parts = (handler.request_streaming, handler.response_streaming)
    name = "_".join("stream" if streaming else "unary" for streaming in parts)
    inner = getattr(handler, name)
    make = getattr(grpc, f"{name}_rpc_method_handler")

    async def unary(request: Any, context: Context) -> Any:
        async with around(context):
            return await inner(_sound(request), context)

    async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
        async with around(context):
            responses = inner(_sound(request), context)
            if not hasattr(responses, "__aiter__"):  # it writes to the context itself
                await responses
                return
            async with contextlib.aclosing(responses):
                async for response in responses:
                    yield response

    behaviour = stream if handler.response_streaming else unary
    rebuilt: grpc.RpcMethodHandler[Any, Any] = make(
        behaviour,
        _parser(handler.request_deserializer, streaming=handler.request_streaming),
        handler.response_serializer,
    )
    return rebuilt


def _parser(parse: Callable[[bytes], Any] | None, *, streaming: bool) -> Callable[[bytes], Any]:
    """What is no message becomes a UsageError: raised, or in the request's place."""

    def parsed(data: bytes) -> Any:
        try:
            return data if parse is None else parse(data)
        except DecodeError:
            error = errors.UsageError("the request is no message of this call", hint="is the caller's .proto ours?")
            if streaming:
                raise error from None
            return error  # what is raised before the handler runs nobody reports

    return parsed


def _sound(request: Any) -> Any:
    if isinstance(request, errors.Error):
        raise request
    return request


class ErrorReporter(grpc.aio.ServerInterceptor):
    """Turns what a handler raises into a status with details; an error not of our tree is logged and named INTERNAL."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of every call."""
        method = handler_call_details.method

        @contextlib.asynccontextmanager
        async def reported(context: Context) -> AsyncIterator[None]:
            try:
                yield
            except grpc.aio.AbortError:
                raise
            except errors.Error as error:
                await _abort(context, code_of(error), error)
            except Exception:
                _log.exception("call failed", method=method)
                problem = errors.RemoteError("the agent failed", hint="its log says more")
                await _abort(context, grpc.StatusCode.INTERNAL, problem)

        return wrapped(await continuation(handler_call_details), reported)


async def _abort(context: Context, code: grpc.StatusCode, error: errors.Error) -> None:
    problem = to_problem(error)
    await context.abort(code, problem.what, status_details(code, problem))
