"""The agent itself: everything put together, from the first descriptor to the last.

Order matters at the start: what an earlier agent left is recovered before the first stream; the spawner is forked
before there are threads, and therefore comes in from outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from migrate import bulk
from migrate.adopt.spawner import Spawner
from migrate.agent.adoption import Adopters, Rule
from migrate.agent.arrival import Arrivals
from migrate.agent.at_rest import journal_key
from migrate.agent.auth import Authorizer
from migrate.agent.carry import Carrier
from migrate.agent.departure import Departures
from migrate.agent.driver import Host
from migrate.agent.engine import Engine
from migrate.agent.events import Events
from migrate.agent.handoff_service import HandoffService
from migrate.agent.holds import Holds
from migrate.agent.intercept import ErrorReporter
from migrate.agent.link import Links, OutLink
from migrate.agent.listen import listen_tcp, listen_unix
from migrate.agent.logging import get_logger
from migrate.agent.metrics import Metrics
from migrate.agent.migration_service import MigrationService
from migrate.agent.options import server_options
from migrate.agent.recovery import forget_old, recover
from migrate.agent.steering import Steerer
from migrate.agent.tls import expiry
from migrate.agent.v1 import handoff_pb2, handoff_pb2_grpc, migration_pb2, migration_pb2_grpc
from migrate.errors import Error, from_oserror
from migrate.handoff.journal import Journal
from migrate.handoff.messages import Message
from migrate.handoff.registry import SqliteRegistry
from migrate.pathstate import PathState

__all__ = ["Settings", "serve"]

_SWITCH = (
    0.0005  # seconds until another thread may have the interpreter: the engine and the streams wait for each other
)
_YOUNG, _MIDDLE, _OLD = 20_000, 50, 1000  # new objects, and collections, until garbage is looked for
_TIDY = 0.25  # seconds between two looks whether the journal's log is to be brought into its file
_SWEEP = 60.0  # seconds between two looks for what is forwarded and has ended
_FORGET = 3600.0  # seconds between two looks for what is too old to be remembered
_BUSY = 10.0  # seconds until that is tried again, because connections are under way
_GRACE = 5.0  # seconds for calls that run when the agent is told to stop

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says."""

    socket: Path
    state_dir: Path
    key_dir: Path
    listen: str | None = None
    tls: Path | None = None
    force_insecure: bool = False
    adopt: Sequence[Rule] = field(default_factory=tuple)
    adopt_users: Sequence[int] = field(default_factory=tuple)
    registry: Path | None = None
    metrics: str | None = None
    path_state: bool = True


def serve(settings: Settings, spawner: Spawner) -> None:
    """Run until SIGTERM or SIGINT. Raises HostError, UsageError if it cannot begin."""
    sys.setswitchinterval(_SWITCH)
    gc.freeze()  # what is imported is no garbage, and looking through it takes as long as a batch
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)
    _raise_descriptor_limit()
    try:
        settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise from_oserror(f"mkdir {settings.state_dir}", error) from None
    asyncio.run(_serve(settings, spawner))


async def _serve(settings: Settings, spawner: Spawner) -> None:
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as opened:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        journal = opened.enter_context(Journal(settings.state_dir / "journal.db", journal_key(settings.key_dir)))
        registry = None if settings.registry is None else opened.enter_context(SqliteRegistry(settings.registry))
        metrics = Metrics()
        insecure = settings.tls is None
        server = grpc.aio.server(
            interceptors=[ErrorReporter(), Authorizer(insecure=insecure, refused=metrics.call_refused)],
            options=server_options(),
        )
        # Listening comes before threads, because of the umask; streams come only after `start`.
        listen_unix(server, settings.socket)
        opened.callback(partial(settings.socket.unlink, missing_ok=True))
        port = 0
        if settings.listen is not None:
            port = listen_tcp(server, settings.listen, tls=settings.tls, force=settings.force_insecure)

        engine = Engine()
        holds = Holds(f"agent-{journal.identity[:16]}")
        opened.callback(holds.close)
        carrier = Carrier(settings.state_dir / "carried")
        opened.callback(carrier.close)
        steerer = Steerer()
        opened.callback(steerer.close)
        events = Events(loop)

        def answered(link: OutLink, message: Message) -> None:
            engine.call(partial(departures.answer, link, link.peer, message))

        def lost(link: OutLink) -> None:
            engine.call(partial(departures.lost, link))

        links = Links(loop, settings.tls, journal.identity, answered, lost)
        host = Host(
            engine=engine,
            journal=journal,
            holds=holds,
            carrier=carrier,
            steerer=steerer,
            adopters=Adopters(settings.adopt, spawner, settings.adopt_users),
            metrics=metrics,
            dial=links.dial,
            forward=links.forward,
            check=links.check,
            registry=registry,
            events=events,
            paths=opened.enter_context(_paths()) if settings.path_state else None,
        )
        departures, arrivals = Departures(host), Arrivals(host)
        opened.callback(arrivals.close)
        metrics.watch(
            held=lambda: len(holds),
            doubt=lambda: sum(
                len(each.machine.moving)
                for each in list(departures.batches.values())
                if each.machine.state.name in ("DOUBT", "CLAIMING")
            ),
            expiry=None if settings.tls is None else partial(expiry, settings.tls),
        )
        if settings.metrics is not None:
            opened.enter_context(metrics.served(settings.metrics))

        def sweep() -> None:
            steerer.sweep()
            engine.later(_SWEEP, sweep)

        def forget() -> None:
            idle = not (departures.batches or arrivals.batches)
            if idle:
                forget_old(host)
            engine.later(_FORGET if idle else _BUSY, forget)

        holds.tell(lambda: engine.call(departures.kept))
        engine.watch(holds.fileno(), holds.collect)
        engine.call(bulk.prepare)
        engine.call(partial(recover, host, departures, arrivals))
        engine.call(sweep)
        engine.call(lambda: engine.later(_FORGET, forget))
        engine.start()
        opened.callback(engine.stop)
        opened.push_async_callback(links.close)

        handoff = HandoffService(arrivals, journal.identity, insecure=insecure)
        migration = MigrationService(departures, arrivals, events)
        healthy = health.aio.HealthServicer()
        migration_pb2_grpc.add_MigrationServicer_to_server(migration, server)
        handoff_pb2_grpc.add_HandoffServicer_to_server(handoff, server)
        health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
        names = [
            migration_pb2.DESCRIPTOR.services_by_name["Migration"].full_name,
            handoff_pb2.DESCRIPTOR.services_by_name["Handoff"].full_name,
            reflection.SERVICE_NAME,
        ]
        reflection.enable_server_reflection(names, server)
        await server.start()
        tidying = asyncio.create_task(_keep_tidy(journal))
        for name in ("", *names):
            await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
        _log.info("agent started", listen=settings.listen, port=port, socket=settings.socket, tls=not insecure)
        _notify("READY=1")
        await stop.wait()
        _notify("STOPPING=1")
        _log.info("agent stops")
        await healthy.enter_graceful_shutdown()
        await migration.close()
        handoff.close()
        await server.stop(_GRACE)
        tidying.cancel()
        await asyncio.wait([tidying])


async def _keep_tidy(journal: Journal) -> None:
    """In a thread of its own: a long log takes longer than a connection should stand still."""
    while True:
        await asyncio.sleep(_TIDY)
        if journal.untidy:
            try:
                await asyncio.to_thread(journal.tidy)
            except Error as error:
                _log.warning("the journal's log could not be brought into its file", why=str(error))


def _paths() -> contextlib.AbstractContextManager[PathState | None]:
    try:
        return PathState()
    except Error as error:
        _log.warning("connections that arrive begin with a new congestion window", why=str(error))
        return contextlib.nullcontext()


def _raise_descriptor_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _notify(state: str) -> None:
    """sd_notify(3)."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)
